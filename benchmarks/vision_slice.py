"""What exporting Qwen3-VL-4B costs, from slices of it: some of its 36 layers and the whole vision encoder, full width.

    python benchmarks/vision_slice.py --targets onnx executorch --layers 2 3 4

Each slice is exported by the command itself in a process of its own, with seeded random weights, everything included:
both engines read pictures beside the eager model. What a layer adds, from the two largest slices, and the rest give an
estimate of memory and sizes for 36 layers. DeepStack features go into the first layers, so a slice of 2 layers has 2 of
the 3 features.

The widths are those that public descriptions of the model agree on; the hub's own ``config.json`` was not at hand, so
its other fields may differ.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import parser, save
from export_cost import export

from trimkv_edge.manifest import load_manifest

LAYERS = 36
SCHEMES = {"onnx": "int4", "executorch": "8da4w"}
TEXT = {
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2560,
    "initializer_range": 0.02,
    "intermediate_size": 9728,
    "max_position_embeddings": 262144,
    "model_type": "qwen3_vl_text",
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {
        "mrope_interleaved": True,
        "mrope_section": [24, 20, 20],
        "rope_theta": 5000000,
        "rope_type": "default",
    },
    "tie_word_embeddings": True,
    "vocab_size": 151936,
}
VISION = {
    "deepstack_visual_indexes": [5, 11, 17],
    "depth": 24,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 1024,
    "in_channels": 3,
    "intermediate_size": 4096,
    "model_type": "qwen3_vl",
    "num_heads": 16,
    "num_position_embeddings": 2304,
    "out_hidden_size": 2560,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}


def write_slice(folder: Path, layers: int) -> Path:
    """A ``config.json`` with so many layers."""
    features = VISION["deepstack_visual_indexes"]
    assert isinstance(features, list)
    fields = {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "dtype": "bfloat16",
        "image_token_id": 151655,
        "model_type": "qwen3_vl",
        "text_config": {**TEXT, "num_hidden_layers": layers},
        "tie_word_embeddings": True,
        "video_token_id": 151656,
        "vision_config": {**VISION, "deepstack_visual_indexes": features[:layers]},
        "vision_end_token_id": 151653,
        "vision_start_token_id": 151652,
    }
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    return folder


def measure(target: str, layers: int, args: Any) -> dict[str, Any]:
    """One row."""
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        folder = Path(scratch) / f"qwen3-vl-4b-{layers}-layers"
        folder.mkdir()
        output = Path(scratch) / "artefact"
        command = [sys.executable, "-m", "trimkv_edge.cli.export", "--model", str(write_slice(folder, layers))]
        command += ["--random-weights", "--target", target, "--quant", SCHEMES[target], "-o", str(output), "--restart"]
        command += ["--budget", str(args.budget), "--image-sizes", *args.image_sizes]
        peak, seconds, _ = export(command)
        manifest = load_manifest(output, verify_files=False)
        made = manifest.targets[target]
    return {
        "target": target,
        "scheme": SCHEMES[target],
        "layers": layers,
        "budget": args.budget,
        "image_sizes": args.image_sizes,
        "peak_rss_bytes": peak,
        "seconds": round(seconds, 1),
        "weight_bytes": manifest.bytes.weights,
        "cache_bytes": manifest.bytes.cache,
        "file_bytes": {role: manifest.files[file].bytes for role, file in made.files.items()},
        "parity": made.parity,
    }


def extrapolated(rows: list[dict[str, Any]], layers: int = LAYERS) -> dict[str, Any]:
    """The whole model, from the two largest slices of one target: a line through them."""
    small, large = sorted(rows, key=lambda row: row["layers"])[-2:]
    step = large["layers"] - small["layers"]

    def line(one: float, other: float) -> float:
        return other + (other - one) / step * (layers - large["layers"])

    def of(row: dict[str, Any]) -> dict[str, float]:
        names = ("peak_rss_bytes", "weight_bytes", "cache_bytes")
        return {**{name: row[name] for name in names}, "files_bytes": sum(row["file_bytes"].values())}

    return {"layers": layers, **{name: round(line(of(small)[name], value)) for name, value in of(large).items()}}


def main() -> None:
    """Command line entry."""
    options = parser(__doc__, "vision_slice")
    options.add_argument("--targets", nargs="+", default=list(SCHEMES), choices=list(SCHEMES))
    options.add_argument("--layers", nargs="+", type=int, default=[2, 3, 4])
    options.add_argument("--budget", type=int, default=512)
    options.add_argument("--image-sizes", nargs="+", default=["512x512", "640x416", "416x640"])
    options.add_argument("--scratch", type=Path, help="where artefacts are made (default: the system's)")
    args = options.parse_args()
    found: dict[str, Any] = {"rows": [], "extrapolated": {}}
    for target in args.targets:
        rows = [measure(target, layers, args) for layers in args.layers]
        found["rows"] += rows
        if len(rows) > 1:
            found["extrapolated"][target] = extrapolated(rows)
        for row in rows:
            peak = row["peak_rss_bytes"] / 2**30
            print(f"{target:<11} {row['layers']} layers: peak {peak:.2f} GiB, {row['file_bytes']}")
    save(args.output, "vision_slice", found)


if __name__ == "__main__":
    main()
