"""The text of tokens, as pages show it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from text_tokenizers import byte_level

from trimkv_edge.runtime.report.text import TokenText, token_texts, visible
from trimkv_edge.runtime.tokenizer import TextTokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    byte_level(270).save(str(path))
    return TextTokenizer(path)


def test_characters_of_several_tokens_belong_to_the_last(tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode("a🦊b")
    texts = token_texts(tokenizer, [1, *ids, 2])
    assert texts[0] == TokenText("<s>", True)
    assert texts[-1] == TokenText("</s>", True)
    assert [text.text for text in texts[1:-1]] == ["a", "", "", "", "🦊", "b"]
    assert not any(text.special for text in texts[1:-1])


def test_bytes_that_become_no_character_are_shown_at_the_end(tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode("a🦊")[:-2]
    assert [text.text for text in token_texts(tokenizer, ids)][:2] == ["a", ""]
    assert "".join(text.text for text in token_texts(tokenizer, ids)) == "a\ufffd"


@given(text=st.text(st.characters(exclude_categories=["Cs", "Cc", "Cf", "Zl", "Zp"]), max_size=30))
def test_nothing_is_lost(tokenizer: TextTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(part.text for part in texts) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb\tc", "a\nb\tc"),
        ("a\r\nb\rc", "a\nb⟨U+000D⟩c"),
        ("\x00\x1b[1m\x7f\x85", "⟨U+0000⟩⟨U+001B⟩[1m⟨U+007F⟩⟨U+0085⟩"),
        ("x\u202ey\u2066z\ufeff", "x⟨U+202E⟩y⟨U+2066⟩z⟨U+FEFF⟩"),
        ("👩\u200d🚀 é שלום", "👩\u200d🚀 é שלום"),
    ],
)
def test_what_cannot_be_seen_is_written_out(text: str, shown: str) -> None:
    assert visible(text) == shown
