"""``trimkv-export``: a gated model in, a verified artefact folder out."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from trimkv_edge.budget import format_bytes, full_cache_bytes
from trimkv_edge.cli.common import quiet_libraries, run_cli

if TYPE_CHECKING:
    from trimkv_edge.export.pipeline import ExportPlan, ExportRequest
    from trimkv_edge.manifest import Manifest

_EPILOG = """\
examples:
  trimkv-export --model tiny -o artefacts/tiny            the small trained model that ships with the package
  trimkv-export --model qwen3-4b --weights ./Qwen3-4B --gates gates.safetensors --budget 1024
  trimkv-export --model tiny --budget 2MB --dry-run       what would it cost?

The budget is what each KV head keeps: 512 is 512 entries per head, 64MB is the whole cache, ring buffer included
(binary units: 64 MiB).
Between eviction events up to --buffer new tokens are held beside them, so a head never holds more than
budget + buffer entries, however long the stream is. --buffer 128 makes eviction nearly free; smaller is tighter.

The export ends with a check: the artefact must keep the same entries and choose the same tokens as the eager model
over a stream with at least five eviction events. If it does not, nothing is written.
"""


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="trimkv-export",
        description="Export a model with retention gates to ExecuTorch (.pte) and ONNX, with a KV cache of fixed size.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--model",
        required=True,
        metavar="NAME|ID|DIR",
        help="a known name (tiny, phi-3-mini, qwen3-4b, ...), a hub id or a folder",
    )
    add("-o", "--output", type=Path, metavar="DIR", help="artefact folder to make (default: artefacts/NAME)")
    add(
        "--budget",
        default="512",
        metavar="N|SIZE",
        help="entries per KV head, or bytes of the whole cache (64MB); default 512",
    )
    add(
        "--buffer", type=int, default=128, metavar="B", help="ring buffer: tokens between eviction events (default 128)"
    )
    add(
        "--prefill-chunk",
        type=int,
        metavar="T",
        help="most tokens per prefill call, at most the buffer (default: min(128, buffer))",
    )
    add(
        "--policy",
        default="trimkv",
        help="eviction policy: trimkv (default: gates, per head), streaming, keydiff or random (these need no gates)",
    )
    add(
        "--sinks",
        type=int,
        metavar="N",
        help="first tokens of the stream that never leave (default 0; with --policy streaming 4, as published)",
    )
    add("--recent", type=int, default=0, metavar="N", help="newest tokens that never leave (default 0)")
    add("--target", nargs="+", default=["executorch", "onnx"], metavar="T", help="executorch, onnx (default: both)")
    add("--executorch-ops", metavar="OPS", help="xnnpack (default, fast) or portable (any stock ExecuTorch runtime)")
    add(
        "--onnx-ops",
        metavar="OPS",
        help="gqa (default, ONNX Runtime's fused attention) or standard (plain ONNX operators)",
    )
    add(
        "--gates",
        metavar="KIND|HUB-ID|DIR|FILE",
        help="rg or rg10 of the model's own, none, or others, ours or published",
    )
    add("--dtype", default="float32", help="float32")
    add("--rope", default="auto", help="LongRoPE models: short, long or auto (= long)")
    add(
        "--weights",
        type=Path,
        metavar="DIR",
        help="folder with the weights of --model (config.json, *.safetensors, tokenizer)",
    )
    add(
        "--random-weights",
        action="store_true",
        help="no weights: seeded random ones, for shape work; recorded in the manifest",
    )
    add("--seed", type=int, default=0, help="seed of random weights")
    add("--force", action="store_true", help="replace the output folder if it exists")
    add("--dry-run", action="store_true", help="print the estimate and stop")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    args = build_parser().parse_args(argv)
    run_cli(lambda: _export(args))


def _export(args: argparse.Namespace) -> None:
    quiet_libraries()
    # torch and transformers take seconds to import: --help and option errors do not wait for them.
    from trimkv_edge.export.pipeline import plan_export, run_export

    request = _request(args)
    started = time.perf_counter()
    plan = plan_export(request)
    for line in describe_plan(plan):
        print(line)
    plan.check_fits()
    if args.dry_run:
        return
    step = 0

    def report(line: str) -> None:
        nonlocal step
        step += 1
        steps = 1 + 2 * len(plan.ops)
        print(f"[{step}/{steps}] {line}", flush=True)

    with tqdm(total=0, unit="tok", leave=False, disable=not sys.stderr.isatty()) as bar:

        def progress(done: int, total: int) -> None:
            if done < bar.n:
                bar.reset()
            bar.total = total
            bar.update(done - bar.n)

        manifest = run_export(plan, report, progress)
    for line in describe_result(manifest, request.output, time.perf_counter() - started):
        print(line)


def _request(args: argparse.Namespace) -> ExportRequest:
    from trimkv_edge.eviction import find_policy
    from trimkv_edge.export.pipeline import ExportRequest

    name = Path(args.model).name or "model"
    chunk = min(128, args.buffer) if args.prefill_chunk is None else args.prefill_chunk
    return ExportRequest(
        model=args.model,
        output=args.output or Path("artefacts") / name,
        budget=args.budget,
        buffer=args.buffer,
        prefill_chunk=chunk,
        policy=args.policy,
        sinks=find_policy(args.policy).sinks if args.sinks is None else args.sinks,
        recent=args.recent,
        targets=tuple(dict.fromkeys(args.target)),
        ops=tuple(op for op in (args.executorch_ops, args.onnx_ops) if op is not None),
        gates=args.gates,
        dtype=args.dtype,
        rope=args.rope,
        weights=args.weights,
        random_weights=args.random_weights,
        seed=args.seed,
        force=args.force,
    )


def describe_plan(plan: ExportPlan) -> list[str]:
    """The estimate that is printed before anything is built."""
    shape, config, memory = plan.shape, plan.config, plan.memory
    gates = "without gates" if plan.request.gates == "none" else "with gates"
    protected = "".join(f", {count} {what}" for what in ("sinks", "recent") if (count := getattr(config, what)))
    at_32k = full_cache_bytes(shape, 32768, plan.request.dtype)
    return [
        f"model     {plan.source.name} ({plan.source.origin}): {shape.parameters / 1e6:.1f} M parameters {gates}, "
        f"{shape.num_layers} layers x {shape.num_kv_heads} KV heads x {shape.head_dim}",
        f"cache     {format_bytes(memory.cache)} for ever: {config.budget} kept + {config.buffer} new entries per head "
        f"(a full cache at 32k tokens: {format_bytes(at_32k)})",
        f"policy    {config.policy}{protected}",
        f"gates     {_describe_gates(*plan.gates)}",
        f"to run    {format_bytes(memory.peak)}: weights {format_bytes(memory.weights)}, cache, "
        f"workspace {format_bytes(memory.workspace)}",
        f"to export about {format_bytes(plan.export_peak)} of memory; targets: "
        + ", ".join(f"{name} ({ops})" for name, ops in plan.ops.items()),
    ]


def _describe_gates(kind: str, path: Path | None) -> str:
    if path is None:
        return "none" if kind == "none" else f"{kind}, random"
    # Said aloud, because pickles are otherwise never read.
    return f"{kind}, {path}{'' if path.suffix == '.safetensors' else ', a pickle, read without running code from it'}"


def describe_result(manifest: Manifest, output: Path, seconds: float) -> list[str]:
    """What was made, how well it agrees with eager, and how to run it."""
    lines = [f"made      {output} in {seconds:.0f} s"]
    for name, target in manifest.targets.items():
        size = sum(manifest.files[file].bytes for file in target.files.values())
        parity = target.parity
        lines.append(
            f"  {name:<11} {format_bytes(size):>9}  same survivors ({parity['survivors']} over {parity['events']} "
            f"events), same greedy tokens ({parity['steps']}), logits within {parity['max_logit_diff']:.0e}"
        )
        if parity["undecidable"]:
            lines.append(f"  {'':<11} {parity['undecidable']} survivors had scores too close for float32 to rank")
    if manifest.model.random_weights:
        lines.append("warning   random weights: good for shapes and speed, not for text")
    if manifest.tokenizer is not None:
        lines.append(f"run it    trimkv-run {output} --prompt-file README.md --max-new-tokens 64 --stats text")
    return lines


if __name__ == "__main__":
    main()
