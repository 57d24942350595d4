"""``trimkv-export``: a gated model in, a verified artefact folder out."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from trimkv_edge.budget import format_bytes, full_cache_bytes
from trimkv_edge.cli.common import parse_share, quiet_libraries, run_cli
from trimkv_edge.cli.push import add_hub_options, check_hub, hub_repo, push
from trimkv_edge.errors import ConfigError
from trimkv_edge.export.backends import BACKENDS

if TYPE_CHECKING:
    from trimkv_edge.export.pipeline import ExportPlan, ExportRequest
    from trimkv_edge.manifest import Manifest

_EPILOG = """\
examples:
  trimkv-export --model tiny -o artefacts/tiny            the small trained model that ships with the package
  trimkv-export --model qwen3-4b --weights ./Qwen3-4B --gates gates.safetensors --budget 1024
  trimkv-export --model tiny --budget 2MB --dry-run       what would it cost?
  trimkv-export --model tiny --policy global --budget 128 one budget for all layers and heads; caps found on the way
  trimkv-export --model tiny --policy global --caps caps.json     caps that trimkv-calibrate found
  trimkv-export --model tiny --push-to-hub me/tiny-trimkv --private     upload it too (trimkv-push: one that exists)

The budget is what each KV head keeps: 512 is 512 entries per head, 64MB is the whole cache, ring buffer included
(binary units: 64 MiB).
Between eviction events up to --buffer new tokens are held beside them, so a head never holds more than
budget + buffer entries, however long the stream is. --buffer 128 makes eviction nearly free; smaller is tighter.

With --policy global all layers and heads share one budget (N entries per head on average; with layer, those of each
layer): useful heads hold more. Exported graphs are static, so each head has a cap, found by calibration: by this
command on sample text, or by trimkv-calibrate on yours. A budget in bytes is what the cache with its caps may take.

The export ends with a check: the artefact must keep the same entries and choose the same tokens as the eager model
over a stream with at least five eviction events. If it does not, nothing is written.
"""


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    return configure(argparse.ArgumentParser(prog="trimkv-export"))


def configure(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Makes ``parser`` that of this command; ``optimum-cli export trimkv`` brings its own."""
    parser.description = (
        "Export a model with retention gates to ExecuTorch (.pte) and ONNX, with a KV cache of fixed size."
    )
    parser.epilog = _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
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
        metavar="N|SIZE",
        help="entries per KV head, or bytes of the whole cache (64MB); default 512, or what --caps were made for",
    )
    add("--buffer", type=int, metavar="B", help="ring buffer: tokens between eviction events (default 128)")
    add(
        "--prefill-chunk",
        type=int,
        metavar="T",
        help="most tokens per prefill call, at most the buffer (default: min(128, buffer))",
    )
    add(
        "--policy",
        help="eviction policy: trimkv (default: gates, per head), global (gates, one budget for all), layer (one for "
        "each layer), streaming, keydiff or random (these need no gates)",
    )
    add(
        "--sinks",
        type=int,
        metavar="N",
        help="first tokens of the stream that never leave (default 0; with --policy streaming 4, as published)",
    )
    add("--recent", type=int, metavar="N", help="newest tokens that never leave (default 0)")
    add("--caps", metavar="auto|FILE", help="shared budgets: most entries of each head (default auto: calibrate now)")
    add(
        "--caps-target",
        metavar="SHARE",
        help="with --caps auto: survivors of the exact policy to keep (default 99%%; 90%% with random weights)",
    )
    add(
        "--min-per-head",
        type=int,
        metavar="N",
        help="shared budgets: entries that each head may always keep (default 0)",
    )
    add(
        "--threshold",
        type=float,
        metavar="ALPHA",
        help="shared budgets: entries whose retention is below this leave even if there is room; needs --budget",
    )
    add(
        "--target",
        nargs="+",
        default=["executorch", "onnx"],
        metavar="T",
        help="executorch, onnx (default: both), torch (weights for torch.compile, docs/gpu.md), host-evicted (static "
        "graphs for NPUs, whose cache the host drives), "
        f"or a compiler: {', '.join(BACKENDS)} (docs/npu.md)",
    )
    add(
        "--precision",
        metavar="P",
        help="of a compiler's target; the first is the default: "
        + "; ".join(f"{', '.join(backend.precisions)} ({name})" for name, backend in BACKENDS.items()),
    )
    add(
        "--image-sizes",
        nargs="+",
        metavar="WxH",
        help="models that read pictures: sizes in pixels that the encoder is exported for; each picture is resized to "
        "the one nearest in shape (default: a square and two oblongs, of at most 512 x 512 pixels)",
    )
    add("--soc", metavar="NAME", help="npu:hexagon: the chip, sm8550, sm8650 or sm8750 (default)")
    add("--shards", type=int, metavar="N", help="npu:hexagon: cut graphs into N parts (default: as few as it loads)")
    add("--executorch-ops", metavar="OPS", help="xnnpack (default, fast) or portable (any stock ExecuTorch runtime)")
    add(
        "--onnx-ops",
        metavar="OPS",
        help="gqa (default, ONNX Runtime's fused attention) or standard (plain ONNX operators)",
    )
    add(
        "--gates",
        metavar="KIND|HUB-ID|DIR|FILE",
        help="rg or rg10 of the model's own (tiny has rg-chat too), none, or others, ours or published",
    )
    add("--dtype", default="float32", help="float32")
    add(
        "--quant",
        default="none",
        metavar="SCHEME",
        help="weights in fewer bits: int8, int4 (onnx), 8da4w (both targets; in onnx the same as int4), fp16 or "
        "bf16 (onnx and torch, for GPUs: arithmetic and cache in float16 or bfloat16 too) or none (default)",
    )
    add(
        "--embedding-bits",
        type=int,
        metavar="N",
        help="with int8, int4 or 8da4w: bits of the token embedding, 8 (default) or 4",
    )
    add(
        "--kv-dtype",
        metavar="DTYPE",
        help="keys and values of the cache: float32 (default), int8 (onnx: a quarter of the bytes, and faster), or "
        "float16 or bfloat16, which are what --quant fp16 and bf16 always have",
    )
    add(
        "--rope",
        default="auto",
        metavar="SET",
        help="LongRoPE models: short or long factors, fixed at export; auto (default) takes long, unless "
        "--stream-length says that short will do",
    )
    add(
        "--stream-length",
        type=int,
        metavar="N",
        help="LongRoPE models: most tokens of a stream; up to the original training length (4096 for Phi-3) "
        "auto takes short, and the runtime refuses longer streams (default: without end)",
    )
    add(
        "--weights",
        type=Path,
        metavar="DIR",
        help="folder with the weights of --model (config.json, *.safetensors, tokenizer)",
    )
    add(
        "--random-weights",
        action="store_true",
        help="no weights: seeded random ones, for shape work; written once to $TRIMKV_CACHE (default "
        "~/.cache/trimkv-edge) in the hub's layout; recorded in the manifest",
    )
    add("--seed", type=int, default=0, help="seed of random weights and gates (default 0)")
    add("--push-to-hub", metavar="OWNER/NAME", help="upload the artefact to the model hub when it is verified")
    add_hub_options(parser)
    add(
        "--restart",
        action="store_true",
        help="pack all weights again instead of going on where an interrupted export stopped",
    )
    add("--force", action="store_true", help="replace the output folder if it exists")
    add("--dry-run", action="store_true", help="print the estimate and stop")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    args = build_parser().parse_args(argv)
    run_cli(lambda: export(args))


def export(args: argparse.Namespace) -> None:
    """What the command does with parsed options."""
    quiet_libraries()
    repo = hub_repo(args)
    # torch and transformers take seconds to import: --help and option errors do not wait for them.
    from trimkv_edge.export.pipeline import plan_export, run_export

    request = _request(args)
    started = time.perf_counter()
    plan = plan_export(request)
    for line in describe_plan(plan):
        print(line)
    plan.check_fits()
    if repo is not None:
        check_hub(repo)
    if args.dry_run:
        return
    step = 0

    def report(line: str) -> None:
        nonlocal step
        if line.startswith(" "):  # a detail of the step
            print(f"     {line}", flush=True)
            return
        step += 1
        steps = 1 + 2 * len(plan.ops) + (plan.request.caps == "auto")
        print(f"[{step}/{steps}] {line}", flush=True)

    with tqdm(total=0, unit="", unit_scale=True, leave=False, disable=not sys.stderr.isatty()) as bar:

        def progress(done: int, total: int) -> None:
            if done < bar.n:
                bar.reset()
            bar.total = total
            bar.update(done - bar.n)

        manifest = run_export(plan, report, progress)
    for line in describe_result(manifest, request.output, time.perf_counter() - started):
        print(line)
    if repo is not None:
        push(request.output, repo)


def _request(args: argparse.Namespace) -> ExportRequest:
    from trimkv_edge.caps import load_calibration
    from trimkv_edge.eviction import find_policy
    from trimkv_edge.export.pipeline import ExportRequest

    name = Path(args.model).name or "model"
    made: dict[str, Any] = {}
    if args.caps is not None and args.caps != "auto":
        made = asdict(load_calibration(Path(args.caps)).cache)
    elif args.threshold and args.budget is None:
        raise ConfigError("--threshold without a ceiling: say how much the cache may hold with --budget")
    buffer = _first(args.buffer, made.get("buffer"), 128)
    policy = _first(args.policy, made.get("policy"), "trimkv")
    return ExportRequest(
        model=args.model,
        output=args.output or Path("artefacts") / name,
        budget=str(_first(args.budget, made.get("budget"), 512)),
        buffer=buffer,
        prefill_chunk=_first(args.prefill_chunk, made.get("prefill_chunk"), min(128, buffer)),
        policy=policy,
        sinks=_first(args.sinks, made.get("sinks"), find_policy(policy).sinks),
        recent=_first(args.recent, made.get("recent"), 0),
        min_per_head=_first(args.min_per_head, made.get("min_per_head"), 0),
        threshold=_first(args.threshold, made.get("threshold"), 0.0),
        caps=args.caps,
        caps_target=None if args.caps_target is None else parse_share(args.caps_target, "--caps-target"),
        targets=tuple(dict.fromkeys(args.target)),
        ops=tuple(op for op in (args.executorch_ops, args.onnx_ops, args.precision) if op is not None),
        gates=args.gates,
        dtype=args.dtype,
        quant=args.quant,
        embedding_bits=args.embedding_bits,
        kv_dtype=args.kv_dtype,
        rope=args.rope,
        stream_length=args.stream_length,
        weights=args.weights,
        random_weights=args.random_weights,
        seed=args.seed,
        soc=args.soc,
        shards=args.shards,
        image_sizes=tuple(args.image_sizes or ()),
        restart=args.restart,
        force=args.force,
    )


def _first(*choices: Any) -> Any:
    """The first that was given."""
    return next(choice for choice in choices if choice is not None)


def describe_plan(plan: ExportPlan) -> list[str]:
    """The estimate that is printed before anything is built."""
    shape, config, memory = plan.shape, plan.config, plan.memory
    gates = "without gates" if plan.request.gates == "none" else "with gates"
    protected = "".join(f", {count} {what}" for what in ("sinks", "recent") if (count := getattr(config, what)))
    if config.min_per_head:
        protected += f", at least {config.min_per_head} per head"
    if config.threshold:
        protected += f", retention of {config.threshold:g} or more"
    at_32k = full_cache_bytes(shape, 32768, plan.scheme.dtype)
    return [
        f"model     {plan.source.name} ({plan.source.origin}): {shape.parameters / 1e6:.1f} M parameters {gates}, "
        f"{shape.num_layers} layers x {shape.num_kv_heads} KV heads x {shape.head_dim}",
        f"cache     {format_bytes(memory.cache)} for ever: {config.budget} kept + {config.buffer} new entries per head "
        f"{_sharing(plan)}(a full cache at 32k tokens: {format_bytes(at_32k)})",
        *_describe_random(plan),
        f"policy    {config.policy}{protected}",
        f"gates     {_describe_gates(*plan.gates)}",
        f"to run    {format_bytes(memory.peak)}: weights {format_bytes(memory.weights)}, cache, "
        f"workspace {format_bytes(memory.workspace)}",
        f"to export about {format_bytes(plan.cost.memory)} of memory, {format_bytes(plan.cost.disk)} of disk, "
        f"{max(1, round(plan.cost.seconds / 60))} min; targets: "
        + ", ".join(f"{name} ({ops})" for name, ops in plan.ops.items()),
    ]


def _describe_random(plan: ExportPlan) -> list[str]:
    from trimkv_edge.models.random_weights import plan_random_weights

    if not plan.source.random_weights:
        return []
    made = plan_random_weights(plan.source, plan.request.seed)
    state = "there already" if made.ready else "to be written"
    return [f"weights   random, seed {plan.request.seed}: {format_bytes(made.bytes)} in {made.folder}, {state}"]


def _sharing(plan: ExportPlan) -> str:
    if plan.config.caps is not None:
        every = [cap for heads in plan.config.caps for cap in heads]
        return f"on average, caps of {min(every)} to {max(every)} for a head "
    return "on average, and what the caps need beside, found by calibration " if plan.request.caps else ""


def _describe_gates(kind: str, path: Path | None) -> str:
    if path is None:
        return "none" if kind == "none" else f"{kind}, random"
    # Said aloud, because pickles are otherwise never read.
    return f"{kind}, {path}{'' if path.suffix == '.safetensors' else ', a pickle, read without running code from it'}"


def _agreement(parity: dict[str, Any]) -> str:
    shares = {}
    for what, differ, of in (
        ("survivors", "survivor_mismatches", "survivors"),
        ("greedy tokens", "greedy_mismatches", "steps"),
    ):
        kept = 1 - parity[differ] / parity[of]
        shares[what] = f"same {what}" if not parity[differ] else f"{100 * kept:.2f} % of the {what}"
    return (
        f"{shares['survivors']} ({parity['survivors']} over {parity['events']} events), {shares['greedy tokens']} "
        f"({parity['steps']}), logits within {parity['max_logit_diff']:.0e}"
        + (f", in {parity['close']} calls equal but for float noise" if "close" in parity else "")
    )


def describe_result(manifest: Manifest, output: Path, seconds: float) -> list[str]:
    """What was made, how well it agrees with eager, and how to run it."""
    from trimkv_edge.export.card import needed_engine

    lines = [f"made      {output} in {seconds:.0f} s"]
    if manifest.cache.caps is not None:
        lines.append(f"cache     {format_bytes(manifest.bytes.cache)} with caps for {manifest.cache.budget} per head")
    for name, target in manifest.targets.items():
        size = sum(manifest.files[file].bytes for file in target.files.values())
        parity = target.parity
        if not parity:
            lines.append(f"  {name:<11} {format_bytes(size):>9}  compiled for its device; nothing here runs it")
            continue
        lines.append(f"  {name:<11} {format_bytes(size):>9}  {_agreement(parity)}")
        if parity.get("dynamic", parity) != {key: value for key, value in parity.items() if key != "dynamic"}:
            lines.append(f"  {'':<11} {'as it runs':>9}: {_agreement(parity['dynamic'])} (activations rounded to int8)")
        if parity["undecidable"]:
            lines.append(f"  {'':<11} {parity['undecidable']} survivors had scores too close for float32 to rank")
    if manifest.model.random_weights:
        lines.append("warning   random weights: good for shapes and speed, not for text")
    if manifest.tokenizer is not None and any(target.parity for target in manifest.targets.values()):
        chosen = f" --engine {engine}" if (engine := needed_engine(manifest)) else ""
        lines.append(f"run it    trimkv-run {output}{chosen} --prompt-file README.md --max-new-tokens 64 --stats text")
    return lines


if __name__ == "__main__":
    main()
