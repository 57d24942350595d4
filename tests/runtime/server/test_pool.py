"""Which slot a request gets, and what memory is asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from text_artefact import text_artefact

from trimkv_edge.errors import BudgetError, ConfigError
from trimkv_edge.runtime.artefact import Artefact
from trimkv_edge.runtime.sampling import SamplingParams
from trimkv_edge.runtime.server import pool as module
from trimkv_edge.runtime.server.pool import BusyError, SlotPool, memory_to_serve
from trimkv_edge.runtime.server.prompt import Answer, Prompt
from trimkv_edge.runtime.server.requests import Message
from trimkv_edge.runtime.server.store import Chat


@pytest.fixture
def pool() -> SlotPool:
    return SlotPool.open(Artefact.load(text_artefact()), 2, "onnx", 1)


def test_a_conversation_keeps_its_slot_and_the_one_unused_longest_is_given_away(pool: SlotPool) -> None:
    a, b = pool.claim("a"), pool.claim("b")
    for slot in (a, b):
        pool.release(slot)
    assert pool.find("a") is a
    assert pool.claim("a", "same") is a
    pool.release(a)
    c = pool.claim("c", "same")  # b was used before a
    assert (c is b, c.conversation) == (True, "c")
    pool.release(c)
    assert pool.find("b") is None
    assert pool.claim("b", "same") is a
    pool.close()


def test_without_an_id_only_chats_without_one_go_on(pool: SlotPool) -> None:
    a, b = pool.claim("a"), pool.claim()
    a.chat, b.chat = Chat("a", "same"), Chat(None, "same")
    pool.release(b)
    pool.release(a)
    assert pool.claim(None, "same") is b
    assert pool.claim(None, "same") is a
    with pytest.raises(BusyError, match="all 2 sessions are busy"):
        pool.claim()
    pool.close()


def test_slots_share_the_weights_and_nothing_else(pool: SlotPool) -> None:
    """The same words in one, others in the other, step by step in turns: each says what it says alone."""
    texts = ["the cat sat on the mat", "a dog and a log"]

    def answer_of(slots: list[int]) -> list[str]:
        talks = []
        for index in slots:
            prompt = Prompt(SamplingParams(), 40, messages=[Message(role="user", content=texts[index])])
            found = Answer()
            talks.append((pool.slots[index].answer(prompt, found, lambda: None), found))
        going = list(talks)
        while going:
            for talk in list(going):
                if next(talk[0], "end") == "end":
                    going.remove(talk)
        return [found.text for _, found in talks]

    assert pool.slots[0].session.engine._decoder is pool.slots[1].session.engine._decoder  # type: ignore[attr-defined]
    alone = [answer_of([index])[0] for index in (0, 1)]
    for slot in pool.slots:
        slot.chat = None
    states = [slot.session.engine.state() for slot in pool.slots]
    assert answer_of([0, 1]) == alone
    for slot, state in zip(pool.slots, states, strict=True):
        again = slot.session.engine.state()
        np.testing.assert_array_equal(again.positions, state.positions)
        np.testing.assert_array_equal(again.key, state.key)
    pool.close()


def test_memory_is_asked_for_before_anything_is_loaded() -> None:
    artefact = Artefact.load(text_artefact())
    # Its manifest says a million for one and 1,000 for a cache, which ONNX sessions have for themselves.
    assert memory_to_serve(artefact, 3, "onnx") == module._PROCESS + 1_000_000 + 2 * 1000
    assert memory_to_serve(artefact, 3, "executorch") == module._PROCESS + 3_000_000
    model, slots = artefact.manifest.model, artefact.manifest.cache.slots
    rows = model.num_layers * model.num_kv_heads * slots
    copies = memory_to_serve(artefact, 3, "onnx", undo=2) - memory_to_serve(artefact, 3, "onnx")
    assert copies == 3 * 2 * rows * model.head_dim * (4 + 4)
    with pytest.raises(BudgetError, match=r"with 1000000000 sessions needs .* GiB"):
        SlotPool.open(artefact, 1_000_000_000)
    with pytest.raises(ConfigError, match="sessions is 0"):
        SlotPool.open(artefact, 0)


def test_a_prompt_is_one_thing() -> None:
    with pytest.raises(ConfigError, match="either messages or a text"):
        Prompt(SamplingParams(), 1)


def test_closing_saves_what_there_is_a_store_for(tmp_path: Path) -> None:
    from trimkv_edge.runtime.server.store import Store

    store = Store(tmp_path / "chats")
    pool = SlotPool.open(Artefact.load(text_artefact()), 2, "onnx", 1, store=store)
    slot = pool.claim("a")
    list(
        slot.answer(Prompt(SamplingParams(), 4, messages=[Message(role="user", content="hi")]), Answer(), lambda: None)
    )
    pool.release(slot)
    pool.close()
    assert len(store.files()) == 1
    assert (tmp_path / "chats").stat().st_mode & 0o777 == 0o700
