"""Turns of a chat against the template rendered as a whole, with the answers' own tokens in it."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
from numpy_engine import VOCAB, NumpyEngine
from text_tokenizers import byte_level
from vision_text_artefact import noise, png, vision_text_artefact

from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import ArtefactError, ConfigError, PositionLimitError
from trimkv_edge.mixed_engine import MixedEngine
from trimkv_edge.runtime import conversation
from trimkv_edge.runtime.artefact import Artefact
from trimkv_edge.runtime.chat import render_chat
from trimkv_edge.runtime.conversation import Conversation
from trimkv_edge.runtime.session import Session
from trimkv_edge.runtime.vision import PictureReader
from trimkv_edge.runtime.vision_text import finish_picture

CONFIG = CacheConfig(budget=16, buffer=12, prefill_chunk=6)
END = 2  # </s>

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# Begins with a token of its own, strips what is said, and closes answers with a special token.
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
# As Qwen3's: thoughts of earlier answers are dropped.
THINKING = CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")

FIRST = {
    "chatml": "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n",
    "phi3": "<|user|>\nthe cat<|end|>\n<|assistant|>\n",
    "llama2": "<s>[INST] the cat [/INST]",
    "thinking": "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n",
}
LATER = {
    "chatml": "<|im_end|>\n<|im_start|>user\nthe dog<|im_end|>\n<|im_start|>assistant\n",
    "phi3": "<|end|>\n<|user|>\nthe dog<|end|>\n<|assistant|>\n",
    "llama2": " </s>[INST] the dog [/INST]",
    "thinking": "<|im_end|>\n<|im_start|>user\nthe dog<|im_end|>\n<|im_start|>assistant\n",
}
TEMPLATES = {"chatml": CHATML, "phi3": PHI3, "llama2": LLAMA2, "thinking": THINKING}


class Tokenizer:
    """A ``tokenizer.json`` that was not written to a file."""

    def __init__(self) -> None:
        self._inner = byte_level(VOCAB)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return list(self._inner.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: list[int]) -> str:
        return str(self._inner.decode(ids, skip_special_tokens=True))


class Ending(NumpyEngine):
    """Wants to end an answer at each third step."""

    steps = 0

    def _forward(self, ids, position, live):  # type: ignore[no-untyped-def]
        logits = super()._forward(ids, position, live)
        self.steps += ids.size == 1
        logits[END] = 1e9 if self.steps % 3 == 2 else -1e9
        return logits


def chat(
    name: str = "chatml", engine: NumpyEngine | None = None, system: str | None = None, checkpoints: int = 8
) -> Conversation:
    session = Session(
        engine or NumpyEngine(CONFIG),
        Tokenizer(),  # type: ignore[arg-type]
        note_tokens=True,
        checkpoints=checkpoints,
    )
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    return Conversation(session, Tokenizer(), TEMPLATES.get(name, name), [END], special, system)  # type: ignore[arg-type]


def read(conversation: Conversation) -> list[int]:
    tokens = conversation.session.tokens
    assert tokens is not None
    return tokens.tolist()


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_stream_is_the_template_with_the_answers_own_tokens(name: str) -> None:
    talk = chat(name)
    one = [piece.token for piece in talk.ask("the cat", 5)]
    two = [piece.token for piece in islice(talk.ask("the dog", 50), 4)]  # left in the middle
    three = [piece.token for piece in talk.ask("the dog", 1)]
    encode = Tokenizer().encode
    later = encode(LATER[name])
    assert [*read(talk), talk.session.pending] == encode(FIRST[name]) + one + later + two + later + three
    assert talk.turns == 3


def test_a_closing_token_that_the_model_gave_is_not_read_twice() -> None:
    engine = Ending(CONFIG)
    talk = chat("{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{{ eos_token }}{% endfor %}a:", engine)
    one = [piece.token for piece in talk.ask("hi", 50)]
    assert one[-1] == END
    list(talk.ask("ho", 2))
    between = read(talk)[len(Tokenizer().encode("u:hi</s>a:")) :]
    assert between[: len(one) + 6] == [*one, *Tokenizer().encode("u:ho</s>a:")][: len(one) + 6]


def test_a_turn_reads_only_what_is_new_however_long_the_talk_is() -> None:
    talk, costs = chat(), []
    for _ in range(12):
        before = talk.session.engine.seen
        list(talk.ask("the dog", 3))
        costs.append(talk.session.engine.seen - before)
    assert len(set(costs[1:])) == 1
    assert talk.session.engine.seen > 10 * CONFIG.slots


def test_a_system_prompt_is_read_once() -> None:
    talk = chat(system="be kind")
    list(talk.ask("the cat", 3))
    list(talk.ask("the cat", 3))
    text = Tokenizer().decode(read(talk))
    assert text.startswith("<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nthe cat")
    assert text.count("be kind") == 1


def test_undo_is_as_if_the_turn_had_not_been() -> None:
    talk, other = chat(), chat()
    for one in (talk, other):
        list(one.ask("the cat", 4))
    list(talk.ask("something else", 4))
    talk.undo()
    want, got = ([piece.token for piece in one.ask("the dog", 6)] for one in (other, talk))
    assert (want, read(other)) == (got, read(talk))
    np.testing.assert_array_equal(talk.session.engine.survivors(), other.session.engine.survivors())
    with pytest.raises(ConfigError, match="3 turns cannot be taken back: there were 2"):
        talk.undo(3)


@pytest.mark.parametrize("checkpoints", [8, 0])
def test_a_message_that_cannot_be_read_leaves_the_chat_as_it_was(checkpoints: int) -> None:
    talk = chat(engine=NumpyEngine(CONFIG, position_limit=150), checkpoints=checkpoints)
    list(talk.ask("hi", 3))
    before = read(talk), talk.session.pending
    with pytest.raises(PositionLimitError):
        talk.ask("the cat " * 100)
    with pytest.raises(ConfigError, match="the message is empty"):
        talk.ask("  \n")
    assert (read(talk), talk.session.pending, talk.turns) == (*before, 1)
    assert list(talk.ask("the", 2))


def test_a_setting_out_of_range_takes_the_message_back() -> None:
    talk = chat()
    list(talk.ask("the cat", 4))
    before = read(talk), talk.session.pending
    with pytest.raises(ConfigError, match="max new tokens is -1"):
        talk.ask("the dog", -1)
    assert (read(talk), talk.session.pending, talk.turns) == (*before, 1)


def test_interrupted_reading_takes_the_message_back(monkeypatch: pytest.MonkeyPatch) -> None:
    talk = chat()
    list(talk.ask("the cat", 4))
    before = read(talk)
    engine, plain, calls = talk.session.engine, talk.session.engine.prefill, 0

    def interrupted(tokens):  # type: ignore[no-untyped-def]
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        return plain(tokens)

    monkeypatch.setattr(engine, "prefill", interrupted)
    with pytest.raises(KeyboardInterrupt):
        talk.ask("a message of several chunks")
    assert (read(talk), talk.turns) == (before, 1)


def test_templates_that_hide_answers_are_refused() -> None:
    talk = chat("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}>")
    list(talk.ask("hi", 2))
    with pytest.raises(ArtefactError, match="does not show an earlier answer once"):
        talk.ask("ho")


def test_the_hand_written_texts_are_what_the_templates_give() -> None:
    for name, template in TEMPLATES.items():
        rendered = render_chat(template, [{"role": "user", "content": "the cat"}], {"bos_token": "<s>"})
        assert rendered == FIRST[name]


@pytest.mark.parametrize("checkpoints", [8, 0])
def test_interrupted_reading_of_pictures_leaves_a_chat_that_goes_on(
    checkpoints: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    artefact = Artefact.load(vision_text_artefact())
    reader = PictureReader.of(artefact)
    shown = [reader.image(png(noise(seed, 16 + 8 * (seed % 2)))) for seed in range(6)]

    def opened() -> Conversation:
        return Conversation.open(artefact, Session.open(artefact, checkpoints=checkpoints, note_tokens=True))

    talk, other = opened(), opened()
    for one in (talk, other):
        list(one.ask("the cat", 4))
    engine = talk.session.engine
    assert isinstance(engine, MixedEngine)
    before, plain = read(talk), engine.prefill

    def interrupted(tokens):  # type: ignore[no-untyped-def]
        if engine.cursor.row:
            raise KeyboardInterrupt
        return plain(tokens)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "prefill", interrupted)
        # What finishes the picture may be interrupted too.
        patch.setattr(conversation, "finish_picture", lambda session: None)
        with pytest.raises(KeyboardInterrupt):
            talk.ask("which?", 4, shown=shown)
    if checkpoints:
        assert (read(talk), talk.turns) == (before, 1)
        want, got = (list(one.ask("and now?", 6, shown=shown[:1])) for one in (other, talk))
        assert want == got
    else:
        assert engine.cursor.row > 0
        finish_picture(talk.session)
        assert (engine.cursor.row, engine.waiting) == (0, [])
        assert list(talk.ask("and now?", 6, shown=shown[:1]))


def test_without_checkpoints_a_picture_is_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    artefact = Artefact.load(vision_text_artefact())
    shown = [PictureReader.of(artefact).image(png(noise(1)))]
    talk = Conversation.open(artefact, Session.open(artefact, checkpoints=0, note_tokens=True))
    list(talk.ask("the cat", 4))
    engine = talk.session.engine
    assert isinstance(engine, MixedEngine)
    plain, interrupted = engine.prefill, False

    def once(tokens):  # type: ignore[no-untyped-def]
        nonlocal interrupted
        if engine.waiting and not interrupted:
            plain(tokens[:2])
            interrupted = True
            raise KeyboardInterrupt
        return plain(tokens)

    monkeypatch.setattr(engine, "prefill", once)
    with pytest.raises(KeyboardInterrupt):
        talk.ask("which?", 4, shown=shown)
    assert (interrupted, engine.cursor.row, engine.waiting) == (True, 0, [])
    assert list(talk.ask("and now?", 6, shown=shown))
