"""What compiling Phi-3-mini costs, from slices of it: one and two of its 32 layers at full width, random weights.

    python benchmarks/npu_slices.py --target npu:coreml --precisions fp16 c4w
    python benchmarks/npu_slices.py --target host-evicted
    python benchmarks/npu_slices.py --table         # what is stored, for docs/npu.md

Each slice is compiled as ``trimkv-export`` does it, in a process of its own, up to where that would run the artefact
beside the eager model: nothing is verified by running. What a layer adds, and the rest, give an estimate for 32 layers.
Memory is the process's largest resident size, pages of mapped weight files included; processor seconds say more than
those of a clock where a machine is busy. Rows are added to those stored.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from common import parser, save
from filelock import FileLock

from trimkv_edge.budget import parse_size
from trimkv_edge.export.pipeline import ExportRequest, plan_export, tool_versions
from trimkv_edge.export.targets import TARGETS, Job
from trimkv_edge.models.loading import load_model
from trimkv_edge.models.registry import MODELS

MODEL = "phi-3-mini"
LAYERS = MODELS[MODEL].shape["num_hidden_layers"]
KEY = ("target", "precision", "budget", "buffer")
_SECONDS_PER_LOOK = 0.25
_LAST_LINES = 3


def write_slice(folder: Path, layers: int) -> Path:
    """The model's ``config.json``, but for its number of layers."""
    fields = {"model_type": MODELS[MODEL].family, **MODELS[MODEL].shape, "num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    return folder


def compile_slice(args: argparse.Namespace, layers: int, folder: Path) -> dict[str, Any]:
    """Compiles one slice in this process: seconds, files and what the compiler took."""
    folder.mkdir()
    request = ExportRequest(
        model=MODEL,
        weights=write_slice(folder, layers),
        random_weights=True,
        output=folder / "artefact",
        budget=str(args.budget),
        buffer=args.buffer,
        prefill_chunk=args.buffer,
        targets=(args.target,),
        ops=tuple(args.precisions),
    )
    plan = plan_export(request)
    loaded = load_model(plan.source, request.gates, request.rope, request.seed, hollow=True)
    request.output.mkdir()
    begun, busy = time.perf_counter(), processor_seconds()
    made = TARGETS[args.target].export(
        Job(
            model=loaded.model,
            weights=loaded.weights,
            config=plan.config,
            folder=request.output,
            ops=plan.ops[args.target],
            scheme=plan.scheme,
            tokenizer=None,
            scales=None,
            key="",
            restart=True,
            say=print,
            progress=None,
        )
    )
    seconds, busy = time.perf_counter() - begun, processor_seconds() - busy
    graphs = {}
    if "report" in made.files:
        graphs = json.loads((request.output / made.files["report"]).read_text(encoding="utf-8")).get("graphs", {})
    return {
        "compile_s": round(seconds, 1),
        "compile_cpu_s": round(busy, 1),
        "partitions": {name: graph["partitions"] for name, graph in graphs.items()},
        "nodes": {name: graph["nodes"] for name, graph in graphs.items()},
        "left": {name: graph["left"] for name, graph in graphs.items()},
        "bytes": {role: (request.output / file).stat().st_size for role, file in made.files.items()},
    }


def processor_seconds() -> float:
    """That this process and those it waited for have used."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def measure(args: argparse.Namespace, precision: str, layers: int) -> dict[str, Any]:
    """Compiles one slice in a process of its own; ``error`` says why there is none."""
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        found, said = Path(scratch) / "found.json", Path(scratch) / "said"
        command = [sys.executable, __file__, "--target", args.target, "--precisions", precision, "--budget"]
        command += [str(args.budget), "--buffer", str(args.buffer), "--layers", str(layers), "--inside", str(found)]
        begun = time.perf_counter()
        with said.open("wb") as heard:
            process = subprocess.Popen(command, stdout=heard, stderr=heard)
            peak, over = watch(process.pid, parse_size(args.limit) or 0)
            _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        row: dict[str, Any] = {
            "total_s": round(time.perf_counter() - begun, 1),
            "peak_rss_bytes": max(peak, 1024 * used.ru_maxrss),
        }
        if over:
            return {**row, "error": f"stopped at {args.limit} of memory"}
        if process.returncode:
            lines = said.read_text(errors="replace").strip().splitlines()[-_LAST_LINES:]
            return {**row, "error": " ".join(lines)[-500:] or f"ended with {process.returncode}"}
        return {**json.loads(found.read_text(encoding="utf-8")), **row}


def watch(process: int, limit: int) -> tuple[int, bool]:
    """(largest resident bytes of a process and its children together, whether it was stopped at ``limit``)."""
    peak, begun = 0, psutil.Process(process)
    while True:
        try:
            if begun.status() == psutil.STATUS_ZOMBIE:
                return peak, False
            family = [begun, *begun.children(recursive=True)]
            peak = max(peak, sum(one.memory_info().rss for one in family))
            if peak > limit:
                for one in family:
                    one.kill()
                return peak, True
        except psutil.NoSuchProcess:
            pass  # a child ended between two looks
        time.sleep(_SECONDS_PER_LOOK)


def extrapolate(slices: dict[str, dict[str, Any]]) -> dict[str, int]:
    """Processor seconds, memory and bytes for all layers, from the two smallest slices that compiled; else empty."""
    good = sorted((int(layers), row) for layers, row in slices.items() if "error" not in row)
    if len(good) < 2:
        return {}
    (few, small), (more, large) = good[:2]

    def all_layers(less: float, greater: float) -> int:
        return round(less + (LAYERS - few) * (greater - less) / (more - few))

    return {
        "compile_cpu_s": all_layers(small.get("compile_cpu_s", 0), large.get("compile_cpu_s", 0)),
        "peak_rss_bytes": all_layers(small["peak_rss_bytes"], large["peak_rss_bytes"]),
        "bytes": all_layers(sum(small["bytes"].values()), sum(large["bytes"].values())),
    }


def store(output: Path, row: dict[str, Any]) -> None:
    """Adds a row, or replaces that of the same settings; slices that were not measured now stay."""
    with FileLock(f"{output}.lock"):
        rows = json.loads(output.read_text(encoding="utf-8"))["results"] if output.is_file() else []
        for old in rows:
            if all(old[name] == row[name] for name in KEY):
                row["slices"] = {**old["slices"], **row["slices"]}
        row["slices"] = dict(sorted(row["slices"].items()))
        row[f"layers_{LAYERS}"] = extrapolate(row["slices"])
        rows = [old for old in rows if any(old[name] != row[name] for name in KEY)] + [row]
        save(output, "npu_slices", sorted(rows, key=lambda one: [one[name] for name in KEY]))
    Path(f"{output}.lock").unlink(missing_ok=True)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line for each target and precision."""
    lines = [
        "| target | `--precision` | whole | 1 layer | 2 layers | 32 layers, estimated |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        slices, last = row["slices"], row[f"layers_{LAYERS}"]
        parts = {count for one in slices.values() for count in one.get("partitions", {}).values()}
        whole = {frozenset(): "-", frozenset([1]): "yes"}.get(frozenset(parts), "no")
        cells = [cost(slices.get(layers)) for layers in ("1", "2")]
        cells.append(cost({**last, "bytes": {"all": last["bytes"]}} if last else None))
        lines.append(f"| `{row['target']}` | `{row['precision']}` | {whole} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cost(one: dict[str, Any] | None) -> str:
    """Processor seconds, memory and files of a slice."""
    if one is None or "error" in one:
        return "-" if one is None else f"failed: {one['error']}"
    seconds = f"{one['compile_cpu_s']:,.0f} s, " if one.get("compile_cpu_s") else ""
    return f"{seconds}{one['peak_rss_bytes'] / 2**30:.1f} GiB, files {sum(one['bytes'].values()) / 2**30:.1f} GiB"


def main() -> None:
    options = parser(f"cost of compiling {MODEL}, from slices", "npu_slices")
    options.add_argument("--target", default="")
    options.add_argument("--precisions", nargs="+", help="default: all of the target")
    options.add_argument("--layers", type=int, nargs="+", default=[1, 2])
    options.add_argument("--budget", type=int, default=2048)
    options.add_argument("--buffer", type=int, default=128, help="and prefill chunk")
    options.add_argument("--limit", default="12GB", metavar="SIZE", help="most memory of a slice (default 12GB)")
    options.add_argument("--scratch", type=Path, help="folder for the artefacts (default: the system's)")
    options.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    options.add_argument("--table", action="store_true", help="print what is stored as Markdown, and stop")
    args = options.parse_args()
    if args.table:
        print(table(json.loads(args.output.read_text(encoding="utf-8"))["results"]))
        return
    if args.target not in TARGETS:
        raise SystemExit(f"target {args.target!r} is not known; use {', '.join(TARGETS)}")
    args.precisions = args.precisions or list(TARGETS[args.target].ops)
    if args.inside:
        (layers,) = args.layers
        found = compile_slice(args, layers, args.inside.with_name("slice"))
        args.inside.write_text(json.dumps(found), encoding="utf-8")
        return
    for precision in args.precisions:
        slices = {}
        for layers in args.layers:
            slices[str(layers)] = measure(args, precision, layers)
            print(args.target, precision, layers, slices[str(layers)], flush=True)
        row = {"target": args.target, "precision": precision, "budget": args.budget, "buffer": args.buffer}
        store(args.output, {**row, "slices": slices, "versions": tool_versions()})


if __name__ == "__main__":
    main()
