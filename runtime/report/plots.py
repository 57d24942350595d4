"""PNG files of what a cache held; needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from trimkv_edge.files import replace_durably
from trimkv_edge.runtime.recording import Recording
from trimkv_edge.runtime.report.page import About
from trimkv_edge.runtime.report.picture_plots import plot_kinds, plot_pictures

_INK = "#0b6486"


def plot_all(recording: Recording, about: About, folder: Path) -> list[Path]:
    """Writes ``stream``, ``heads``, ``retention``, ``events`` and ``machine`` as PNG files, and ``pictures`` and
    ``kinds`` of a stream with pictures; those that exist are replaced. Returns them.

    Raises:
        OSError: a file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    plots: dict[str, Callable[[Recording], Any]] = {
        "stream": _stream,
        "heads": _heads,
        "retention": _retention,
        "events": _events,
        "machine": lambda recording: _machine(recording, about),
    }
    if recording.pictures:
        plots |= {"pictures": plot_pictures, "kinds": plot_kinds}
    return [_save(plot(recording), about, folder / f"{name}.png") for name, plot in plots.items()]


def _stream(recording: Recording) -> Any:
    figure, (axis,) = _panels(1, (7.2, 5.4))
    lifetimes = recording.lifetimes
    image = axis.imshow(
        lifetimes.raster(800),
        cmap="GnBu",
        norm=_root(1.0),
        extent=(0, lifetimes.tokens, lifetimes.tokens, 0),
        aspect="auto",
        interpolation="antialiased",
    )
    axis.set(title="held over the stream", xlabel="tokens read", ylabel="position in the text")
    figure.colorbar(image, ax=axis, label="share of the heads that hold it")
    return figure


def _heads(recording: Recording) -> Any:
    lifetimes = recording.lifetimes
    layers, heads, seen = lifetimes.left.shape[0], len(lifetimes.heads), lifetimes.tokens
    width, height = max(5.6, 0.24 * layers + 1.6), max(1.8, 0.24 * heads + 1.2)
    figure, axes = _panels(3, (width, 3 * height), rows=True)
    tables: dict[str, Any] = {
        "entries held": lifetimes.occupancy(seen),
        "mean age, tokens": lifetimes.mean_age(seen),
        "share from the oldest tenth": lifetimes.oldest_share(seen),
    }
    for axis, (title, table) in zip(axes, tables.items(), strict=True):
        image = axis.imshow(table.T, cmap="GnBu", vmin=0, aspect="auto")
        axis.set(title=f"{title}, after {seen:,} tokens", xlabel="layer", ylabel="KV head")
        every = max(1, heads // 12)
        axis.set_yticks(range(0, heads, every), lifetimes.heads[::every])
        axis.set_xticks(range(0, layers, max(1, layers // 12)))
        figure.colorbar(image, ax=axis)
    return figure


def _retention(recording: Recording) -> Any:
    import matplotlib.pyplot as plt

    lifetimes = recording.lifetimes
    figure, (axis,) = _panels(1, (6.4, 4.2))
    ages = lifetimes.ages()
    curves = lifetimes.survival(ages)
    for layer, shares in enumerate(curves):
        tone = plt.get_cmap("viridis")(0.9 * layer / max(1, len(curves) - 1))
        label = f"layer {layer}" if layer % -(-len(curves) // 12) == 0 else None
        axis.plot(ages, np.where(shares > 0, shares, np.nan), color=tone, label=label, linewidth=1.4)
    axis.set(xscale="log", yscale="log", xlabel="age in tokens", ylabel="share still held", title="retention by age")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure


def _events(recording: Recording) -> Any:
    found = recording.lifetimes.departures()
    figure, (ages, counts) = _panels(2, (7.2, 4.6), rows=True)
    some = found.entries > 0
    ages.fill_between(found.seen[some], found.low[some], found.high[some], color=_INK, alpha=0.2, linewidth=0)
    ages.plot(found.seen[some], found.median[some], color=_INK)
    ages.set(yscale="log", ylabel="age in tokens", title="what left: median age, 10th to 90th percentile")
    counts.fill_between(found.seen, 0, found.entries, step="pre", color=_INK, alpha=0.8, linewidth=0)
    counts.set(xlabel="tokens read", ylabel="entries that left")
    counts.set_ylim(bottom=0)
    return figure


def _machine(recording: Recording, about: About) -> Any:
    chunks = recording.chunks
    heads = recording.lifetimes.left.shape[0] * about.kv_heads
    seen = [chunk.seen for chunk in chunks]
    sizes = [after - before for before, after in pairwise([0, *seen])]
    series = {
        "entries per head": [chunk.entries / heads for chunk in chunks],
        "memory, MiB": [chunk.rss / 2**20 for chunk in chunks],
        "tokens per second": [size / max(chunk.seconds, 1e-6) for size, chunk in zip(sizes, chunks, strict=True)],
    }
    figure, axes = _panels(3, (7.2, 5.6), rows=True)
    for axis, (label, values) in zip(axes, series.items(), strict=True):
        axis.plot(seen, values, color=_INK, linewidth=1.2)
        axis.set(ylabel=label)
        axis.set_ylim(0, 1.2 * max(values))
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel("tokens read")
    return figure


def _root(most: float) -> Any:
    from matplotlib.colors import PowerNorm

    return PowerNorm(0.5, 0, most)


def _panels(count: int, size: tuple[float, float], *, rows: bool = False) -> tuple[Any, list[Any]]:
    import matplotlib.pyplot as plt

    shape = (count, 1) if rows else (1, count)
    figure, axes = plt.subplots(*shape, figsize=size, squeeze=False, layout="constrained")
    return figure, list(axes.reshape(-1))


def _save(figure: Any, about: About, path: Path) -> Path:
    import matplotlib.pyplot as plt

    figure.suptitle(about.name, fontsize=9)
    try:
        # Without the version of the library the same input gives the same bytes.
        metadata = {"Software": None}
        replace_durably(path, lambda beside: figure.savefig(beside, format="png", dpi=120, metadata=metadata))
    finally:
        plt.close(figure)
    return path
