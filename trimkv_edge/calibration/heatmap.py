"""Heat map of what each head holds: layers x KV heads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trimkv_edge.caps import Calibration
from trimkv_edge.files import replace_durably

# Cells beyond this many are too small to read numbers in.
_NUMBERED = 150


def draw_heat_map(calibration: Calibration, path: Path) -> None:
    """Writes a PNG of three panels with one colour scale: mean occupancy, its 95th percentile, and the caps.

    Raises:
        OSError: the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import PowerNorm

    config, occupancy = calibration.cache, calibration.occupancy
    assert config.caps is not None
    panels: list[tuple[str, Sequence[Sequence[float]]]] = [
        ("mean", occupancy.mean),
        ("95th percentile", occupancy.p95),
        ("cap", config.caps),
    ]
    layers, heads = len(config.caps), len(config.caps[0])
    most = max(max(row) for _, table in panels for row in table)
    size = (3 * max(1.8, 0.45 * heads) + 1.5, max(2.6, 0.32 * layers + 1.4))
    figure, axes = plt.subplots(1, 3, figsize=size, sharey=True, layout="constrained")
    for axis, (title, table) in zip(axes, panels, strict=True):
        # The square root: few heads hold many times what the others do, whose differences should show too.
        image = axis.imshow(table, norm=PowerNorm(0.5, 0, most), aspect="auto", cmap="viridis")
        axis.set(title=title, xlabel="KV head", xticks=_ticks(heads), yticks=_ticks(layers))
        for layer in range(layers if layers * heads <= _NUMBERED else 0):
            for head in range(heads):
                value = table[layer][head]
                colour = "white" if value < 0.4 * most else "black"
                axis.text(head, layer, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=8)
    axes[0].set_ylabel("layer")
    figure.colorbar(image, ax=axes, label="entries")
    figure.suptitle(
        f"{calibration.model}: policy {config.policy}, {config.budget} entries per head on average", fontsize=9
    )
    try:
        # Without the version of the library the same input gives the same bytes.
        metadata = {"Software": None}
        replace_durably(path, lambda beside: figure.savefig(beside, format="png", dpi=110, metadata=metadata))
    finally:
        plt.close(figure)


def _ticks(count: int) -> list[int]:
    return list(range(0, count, max(1, -(-count // 16))))
