"""Builds the page: one HTML file with its script, its style and its data."""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

import numpy as np

from trimkv_edge.errors import ConfigError
from trimkv_edge.runtime.lifetimes import Lifetimes
from trimkv_edge.runtime.recording import Recording
from trimkv_edge.runtime.report.pictures import page_pictures
from trimkv_edge.runtime.report.text import TokenText

MOST_TOKENS = 200_000
MOST_ENTRIES = 2**24  # tokens x heads of all layers: what a browser goes through for each move of the slider
_SCRIPTS = ("record.js", "colours.js", "chart.js", "overview.js", "charts.js", "text.js", "page.js")
_PICTURE_SCRIPTS = ("pictures.js", "kinds.js", "picture_page.js")


@dataclass(frozen=True)
class About:
    """What the page says about the run.

    Attributes:
        name: of the artefact.
        facts: (label, value), in order.
        slots: entries that each head holds at most, on average where heads share a budget.
        kv_heads: KV heads of each layer of the model, recorded or not.
        notes: remarks, such as what was left out.
    """

    name: str
    facts: Sequence[tuple[str, str]]
    slots: int
    kv_heads: int
    notes: Sequence[str] = field(default=())


def heads_to_show(tokens: int, layers: int, kv_heads: int) -> tuple[int, ...]:
    """KV heads of each layer that a page of so many tokens can show: all, or some that are evenly spaced.

    Raises:
        ConfigError: too many tokens for any page.
    """
    if tokens > MOST_TOKENS or tokens * layers > MOST_ENTRIES:
        most = min(MOST_TOKENS, MOST_ENTRIES // layers)
        raise ConfigError(f"{tokens} tokens are more than a page of {layers} layers can show: at most {most}")
    count = min(kv_heads, MOST_ENTRIES // (tokens * layers))
    return tuple(index * kv_heads // count for index in range(count))


def build_page(recording: Recording, texts: Sequence[TokenText], about: About) -> str:
    """The page as text. It asks for nothing from outside: its policy forbids the browser to. What shows pictures is in
    it only if the stream has some.

    Raises:
        ConfigError: ``texts`` are not one for each token.
    """
    if len(texts) != len(recording.tokens):
        raise ConfigError(f"{len(texts)} texts for {len(recording.tokens)} tokens: give one for each")
    shown = bool(recording.pictures)
    scripts = (*_SCRIPTS, *_PICTURE_SCRIPTS, "start_pictures.js") if shown else (*_SCRIPTS, "start.js")
    style, script = _asset("style.css"), "\n".join(map(_asset, scripts))
    if shown:
        style += _asset("pictures.css")
    policy = f"default-src 'none'; script-src '{_digest(script)}'; style-src '{_digest(style)}'"
    return Template(_asset("page.html")).substitute(
        policy=escape(policy + "; img-src data:" if shown else policy),
        name=escape(about.name),
        style=style,
        script=script,
        pictures=_asset("pictures.html") if shown else "",
        table=pack_lifetimes(recording.lifetimes),
        data=_inert(_data(recording, texts, about)),
    )


def pack_lifetimes(lifetimes: Lifetimes) -> str:
    """The table ``left`` as base64 of a zlib stream: how many events each token outlived, token after token within
    layers and heads, as planes of bytes, lowest first, as many as the largest needs."""
    positions = np.arange(lifetimes.tokens)
    first = np.searchsorted(lifetimes.events, positions, side="right")
    outlived = (np.searchsorted(lifetimes.events, lifetimes.left) - first).astype("<u4")
    planes = outlived.reshape(-1).view(np.uint8).reshape(-1, 4).T
    needed = max(1, -(-int(outlived.max()).bit_length() // 8))
    return base64.b64encode(zlib.compress(planes[:needed].tobytes())).decode()


def _data(recording: Recording, texts: Sequence[TokenText], about: About) -> dict[str, Any]:
    lifetimes, chunks = recording.lifetimes, recording.chunks
    pictures = {"pictures": page_pictures(recording)} if recording.pictures else {}
    return pictures | {
        "name": about.name,
        "facts": list(map(list, about.facts)),
        "notes": list(about.notes),
        "slots": about.slots,
        "layers": lifetimes.left.shape[0],
        "heads": list(lifetimes.heads),
        "kvHeads": about.kv_heads,
        "tokens": lifetimes.tokens,
        "promptTokens": recording.prompt_tokens,
        "events": lifetimes.events.tolist(),
        "text": [text.text for text in texts],
        "special": [position for position, text in enumerate(texts) if text.special],
        "chunks": {
            "seen": [chunk.seen for chunk in chunks],
            "seconds": [round(chunk.seconds, 6) for chunk in chunks],
            "rss": [chunk.rss for chunk in chunks],
            "entries": [chunk.entries for chunk in chunks],
        },
    }


def _inert(data: dict[str, Any]) -> str:
    """JSON that no HTML parser takes for anything else."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _asset(name: str) -> str:
    return files(__package__).joinpath("assets", name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
