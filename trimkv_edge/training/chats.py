"""Chats as training rows: the tokenizer's own template, and which of its tokens the assistant said."""

from __future__ import annotations

from typing import Any

from trimkv_edge.errors import ConfigError
from trimkv_edge.training.records import Record
from trimkv_edge.training.rows import Row


def chat_row(tokenizer: Any, record: Record, answers_only: bool) -> Row:
    """The rendered chat; with `answers_only` only the assistant's words, and the token that ends each turn, weigh.

    The answers are found in the rendered text, so templates that rewrite turns are noticed.

    Raises:
        ConfigError: the template refuses the chat, or changes an answer.
    """
    messages = record.value
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # templates raise what they like
        detail = " ".join(str(error).split())[:200]
        raise ConfigError(f"{record.where}: the chat template refuses this chat ({detail})") from error
    if not answers_only:
        return Row(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    spans = _answers(text, messages, record.where)
    weight: list[float] = []
    inside = False
    for start, end in encoded["offset_mapping"]:
        said = any(start < last and end > first for first, last in spans)
        weight.append(1.0 if said or inside else 0.0)  # `inside`: the token after an answer ends the turn
        inside = said
    return Row(encoded["input_ids"], weight=weight)


def _answers(text: str, messages: list[dict[str, str]], where: str) -> list[tuple[int, int]]:
    spans, cursor = [], 0
    for message in messages:
        content = message["content"].strip()
        start = text.find(content, cursor)
        if start < 0:
            if message["role"] != "assistant":
                continue
            raise ConfigError(
                f"{where}: the chat template changes the answer {content[:40]!r}, so its tokens cannot be told: "
                "train without --answers-only, or give ready rows with weights"
            )
        cursor = start + len(content)
        if message["role"] == "assistant" and content:
            spans.append((start, cursor))
    return spans
