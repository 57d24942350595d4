"""Which slot a request gets, and what memory is asked for."""

from __future__ import annotations

import pytest
from text_artefact import text_artefact

from trimkv_edge.errors import BudgetError, ConfigError
from trimkv_edge.runtime.artefact import Artefact
from trimkv_edge.runtime.sampling import SamplingParams
from trimkv_edge.runtime.server.pool import BusyError, Prompt, SlotPool, memory_to_serve


@pytest.fixture
def pool() -> SlotPool:
    return SlotPool.open(Artefact.load(text_artefact()), 2, "onnx", 1)


def test_a_conversation_keeps_its_slot_and_the_one_unused_longest_is_given_away(pool: SlotPool) -> None:
    a, b = pool.claim("a"), pool.claim("b")
    a.known = b.known = "same"
    for slot in (a, b):
        pool.release(slot)
    assert pool.claim("a", "same") is a
    pool.release(a)
    c = pool.claim("c", "same")  # b was used before a
    assert (c is b, c.known, c.conversation) == (True, None, "c")
    pool.release(c)
    assert pool.claim("b", "same") is a
    assert a.known is None
    pool.close()


def test_without_an_id_only_chats_without_one_go_on(pool: SlotPool) -> None:
    a, b = pool.claim("a"), pool.claim()
    a.known = b.known = "same"
    pool.release(b)
    pool.release(a)
    assert pool.claim(None, "same") is b
    taken = pool.claim(None, "same")
    assert (taken is a, taken.known) == (True, None)
    with pytest.raises(BusyError, match="all 2 sessions are busy"):
        pool.claim()
    pool.close()


def test_memory_is_asked_for_before_anything_is_loaded() -> None:
    artefact = Artefact.load(text_artefact())
    assert memory_to_serve(artefact, 3) == 3_000_000  # its manifest says a million for one
    with pytest.raises(BudgetError, match=r"with 100000000 sessions needs .* GiB"):
        SlotPool.open(artefact, 100_000_000)
    with pytest.raises(ConfigError, match="sessions is 0"):
        SlotPool.open(artefact, 0)


def test_a_prompt_is_one_thing() -> None:
    with pytest.raises(ConfigError, match="either messages or a text"):
        Prompt(SamplingParams(), 1)
