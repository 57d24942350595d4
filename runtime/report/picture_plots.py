"""PNG files of the pictures of a stream: what of them was held, and what share the cache gave them."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from trimkv_edge.runtime.recording import Recording
from trimkv_edge.runtime.report.pictures import KINDS, entries_by_kind, held_rows
from trimkv_edge.runtime.seen_pictures import SeenPicture

_MOST_PICTURES, _MOMENTS = 12, 4
_NUMBERED = 100  # most rows of a picture that have room for their numbers
_LINES = {"text": ("#0b2a5c", "-"), "image": ("#0f766e", "--"), "video": ("#b45309", ":")}


def plot_pictures(recording: Recording) -> Any:
    """A line for each picture (of many, twelve evenly spaced ones): the picture, and the heads that hold its rows at
    four stream lengths from its end on."""
    import matplotlib.pyplot as plt

    pictures, lifetimes = recording.pictures, recording.lifetimes
    count = min(_MOST_PICTURES, len(pictures))
    chosen = [pictures[index * len(pictures) // count] for index in range(count)]
    most = lifetimes.left.shape[0] * lifetimes.left.shape[1]
    size = (1.9 * (_MOMENTS + 1) + 0.9, 2.1 * count + 0.5)
    figure, axes = plt.subplots(count, _MOMENTS + 1, figsize=size, squeeze=False, layout="constrained")
    for picture, (first, *others) in zip(chosen, axes, strict=True):
        pixels = plt.imread(io.BytesIO(picture.png), format="png")
        width, height = picture.across * picture.side, picture.down * picture.side
        first.imshow(pixels, extent=(0, width, height, 0))
        first.set_title(picture.label, fontsize=8)
        for axis, seen in zip(others, moments(recording, picture), strict=True):
            counts = held_rows(recording, picture, seen)
            axis.imshow(pixels, extent=(0, width, height, 0))
            heat = axis.imshow(
                np.ma.masked_less(counts, 0), cmap="GnBu", vmin=0, vmax=most, alpha=0.72, extent=(0, width, height, 0)
            )
            axis.set_title(f"after {seen:,} tokens", fontsize=8)
            _number(axis, counts, picture)
        for axis in (first, *others):
            axis.set(xticks=[], yticks=[], xlim=(0, width), ylim=(height, 0))
    figure.colorbar(heat, ax=axes, label="heads that hold a row", shrink=min(1.0, 3 / count + 0.2))
    return figure


def moments(recording: Recording, picture: SeenPicture) -> list[int]:
    """Four stream lengths, evenly spaced over the events from the picture's end on, the end of the stream last."""
    end, tokens = picture.start + picture.rows, recording.lifetimes.tokens
    later = [seen for seen in recording.lifetimes.events.tolist() if end <= seen < tokens]
    places = [min(end, tokens), *later, tokens]
    return [places[index] for index in np.linspace(0, len(places) - 1, _MOMENTS).round().astype(int)]


def plot_kinds(recording: Recording) -> Any:
    """Shares of text, images and videos among the entries after each event, and at the end."""
    import matplotlib.pyplot as plt

    seens = sorted({*recording.lifetimes.events.tolist(), recording.lifetimes.tokens})
    entries = entries_by_kind(recording, seens)
    shares = entries / np.maximum(entries.sum(1, keepdims=True), 1)
    figure, axis = plt.subplots(figsize=(7.2, 3.4), layout="constrained")
    for index, kind in enumerate(KINDS):
        if entries[:, index].any():
            tone, style = _LINES[kind]
            axis.plot(seens, shares[:, index], color=tone, linestyle=style, label=kind, marker=".", markersize=4)
    axis.set(xlabel="tokens read", ylabel="share of the entries", ylim=(0, 1.02), title="what the cache holds")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure


def _number(axis: Any, counts: Any, picture: SeenPicture) -> None:
    if picture.rows > _NUMBERED:
        return
    for row, count in enumerate(counts.reshape(-1).tolist()):
        left, top, right, bottom = picture.box(row)
        if count >= 0:
            style = {"boxstyle": "round,pad=0.1", "facecolor": "white", "alpha": 0.7, "linewidth": 0}
            place = ((left + right) / 2, (top + bottom) / 2)
            axis.text(*place, str(count), ha="center", va="center", fontsize=6, bbox=style)
