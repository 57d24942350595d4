"""Streaming text against one-shot decoding, and stop strings against ``str.find``."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from text_tokenizers import byte_fallback, byte_level

from trimkv_edge.errors import ConfigError
from trimkv_edge.runtime.streaming import Detokenizer, StopStrings, TextStream

BYTE_LEVEL, BYTE_FALLBACK = byte_level(), byte_fallback()
TOKENIZERS = {"byte-level": BYTE_LEVEL, "byte-fallback": BYTE_FALLBACK}
UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
FALLBACK_BYTE = {byte: BYTE_FALLBACK.token_to_id(f"<0x{byte:02X}>") for byte in range(256)}


def pieces(decoder: object, ids: Sequence[int], context: Sequence[int] = ()) -> list[str]:
    stream = Detokenizer(decoder, context)  # type: ignore[arg-type]
    return [*(stream.push(token) for token in ids), stream.flush()]


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(text=UNICODE)
@example(text="a\ufffd")
@example(text="é🙂\ufffd\ufffd\ufffd\ufffd\ufffdx")
@example(text="  a b   b ")
def test_streamed_text_equals_one_shot_decoding(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(text).ids
    streamed = pieces(tokenizer, ids)
    assert "".join(streamed) == tokenizer.decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in streamed)


@given(ids=st.lists(st.integers(0, 319), max_size=60))
@example(ids=[BYTE_LEVEL.token_to_id("ÿ")] * 50)
def test_byte_level_streams_any_tokens_like_one_shot_decoding(ids: list[int]) -> None:
    assert "".join(pieces(BYTE_LEVEL, ids)) == BYTE_LEVEL.decode(ids)


@given(prompt=UNICODE, new=UNICODE)
def test_text_after_a_prompt_keeps_its_leading_space(prompt: str, new: str) -> None:
    prompt_ids = BYTE_FALLBACK.encode(prompt).ids
    ids = [*prompt_ids, *BYTE_FALLBACK.encode(new).ids]
    whole, before = BYTE_FALLBACK.decode(ids), BYTE_FALLBACK.decode(prompt_ids)
    if whole.startswith(before) and not before.endswith("\ufffd"):
        context = prompt_ids[-8:]
        if BYTE_FALLBACK.decode(context).endswith("\ufffd"):
            return  # the window starts inside a character
        assert before + "".join(pieces(BYTE_FALLBACK, ids[len(prompt_ids) :], context)) == whole


def test_characters_come_when_their_last_byte_does() -> None:
    ids = [FALLBACK_BYTE[byte] for byte in "é🙂".encode()]
    assert pieces(BYTE_FALLBACK, ids) == ["", "é", "", "", "", "🙂", ""]


def test_bytes_that_are_no_character_appear_at_the_next_text_or_at_flush() -> None:
    broken = FALLBACK_BYTE[0xF0]
    letter = BYTE_FALLBACK.token_to_id("x")
    assert pieces(BYTE_FALLBACK, [letter, broken, letter]) == ["x", "", "\ufffdx", ""]
    assert pieces(BYTE_FALLBACK, [letter, broken]) == ["x", "", "\ufffd"]


def test_a_wrong_byte_after_a_character_does_not_take_it_back() -> None:
    ids = [FALLBACK_BYTE[byte] for byte in ("你".encode() + b"\xff")] + [BYTE_FALLBACK.token_to_id("x")]
    assert "".join(pieces(BYTE_FALLBACK, ids)) == "你\ufffdx"


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_endless_wrong_bytes_are_given_out_and_not_collected(kind: str) -> None:
    wrong = FALLBACK_BYTE[0xFF] if kind == "byte-fallback" else BYTE_LEVEL.token_to_id("ÿ")
    longest = 0

    class Watching:
        def decode(self, ids: Sequence[int]) -> str:
            nonlocal longest
            longest = max(longest, len(ids))
            return str(TOKENIZERS[kind].decode(ids))

    out = pieces(Watching(), [wrong] * 1000)
    assert "".join(out) == "\ufffd" * 1000
    assert longest < 64
    assert sum(len(piece) for piece in out[:-1]) >= 996


def test_special_tokens_give_no_text_and_do_no_harm() -> None:
    ids = [1, *BYTE_LEVEL.encode("the 你").ids, 2, *BYTE_LEVEL.encode("好 cat").ids, 2, 2]
    assert "".join(pieces(BYTE_LEVEL, ids)) == "the 你好 cat"
    assert pieces(BYTE_LEVEL, [2] * 100) == [""] * 101


@st.composite
def texts_in_pieces(draw: st.DrawFn) -> list[str]:
    return draw(st.lists(st.text("ab\n", max_size=4), max_size=12))


@given(parts=texts_in_pieces(), stop=st.text("ab\n", min_size=1, max_size=4))
@example(parts=["a", "a", "ab"], stop="aab")
def test_one_stop_string_cuts_where_find_does(parts: list[str], stop: str) -> None:
    whole = "".join(parts)
    stops = StopStrings([stop])
    out = "".join([*(stops.push(part) for part in parts), stops.flush()])
    at = whole.find(stop)
    assert (out, stops.stopped) == ((whole, False) if at < 0 else (whole[:at], True))


@given(parts=texts_in_pieces(), wanted=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=4))
def test_of_several_the_first_complete_one_cuts_however_the_text_is_split(parts: list[str], wanted: list[str]) -> None:
    whole = "".join(parts)
    expected = whole
    for end in range(len(whole) + 1):
        complete = [stop for stop in wanted if whole[:end].endswith(stop)]
        if complete:
            expected = whole[: end - max(map(len, complete))]
            break
    stops = StopStrings(wanted)
    assert "".join([*(stops.push(part) for part in parts), stops.flush()]) == expected


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    stops = StopStrings(["END", "\n\n"])
    assert [stops.push(part) for part in ("hello", " E", "N", "d E", "ND rest", "more")] == [
        "hello",
        " ",
        "",
        "ENd ",
        "",
        "",
    ]
    assert stops.stopped
    assert stops.flush() == ""


def test_stop_strings_meet_text_that_only_the_flush_gives() -> None:
    stream = TextStream(BYTE_FALLBACK, ["\ufffd"])
    assert stream.push(BYTE_FALLBACK.token_to_id("x")) == "x"
    assert stream.push(FALLBACK_BYTE[0xF0]) == ""
    assert stream.flush() == ""
    assert stream.stopped


def test_wrong_stop_strings_are_errors() -> None:
    with pytest.raises(ConfigError, match="empty"):
        StopStrings(["a", ""])
    with pytest.raises(ConfigError, match="tokenizer"):
        TextStream(None, ["a"])


def test_without_a_tokenizer_there_is_no_text() -> None:
    stream = TextStream(None)
    assert (stream.push(3), stream.flush(), stream.stopped) == ("", "", False)
