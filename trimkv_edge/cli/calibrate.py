"""``trimkv-calibrate``: what each head holds under a shared budget, and caps that make its shapes static."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from trimkv_edge.budget import ModelShape, cache_bytes, check_fits, format_bytes
from trimkv_edge.caps import CAPS_FILE, Calibration
from trimkv_edge.cli.common import parse_share, quiet_libraries, run_cli
from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import ConfigError, TrimKVError

if TYPE_CHECKING:
    from trimkv_edge.calibration.streams import Streams
    from trimkv_edge.models.source import ModelSource

_BUDGET = 512
_EPILOG = """\
examples:
  trimkv-calibrate --model tiny --budget 128                            on the shipped sample: caps.json and caps.png
  trimkv-calibrate --model tiny --budget 128 --policy layer --target 99.5% -o tiny/caps.json
  trimkv-calibrate --model qwen3-4b --weights ./Qwen3-4B --gates rg10 --text my-chats.jsonl notes/ --tokens 8192
  trimkv-calibrate --model tiny --budget 256 --threshold 0.01           entries that faded leave even if there is room

Heads that share a budget hold different and changing numbers of entries, but an exported graph has fixed shapes: each
head gets a cap. Generous caps cost memory; tight ones drop entries that the exact policy would keep. The table shows
that trade, and caps.json holds the smallest caps found whose cache keeps --target of what the exact policy keeps on
held-out text. Calibrate on text like the text to come: caps are only as good as it.
"""


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="trimkv-calibrate",
        description="Find how many entries each KV head needs under a budget that heads share.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument_group("model").add_argument
    add(
        "--model", required=True, metavar="NAME|ID|DIR", help="a known name (tiny, qwen3-4b, ...), a hub id or a folder"
    )
    add("--weights", type=Path, metavar="DIR", help="folder with the weights of --model")
    add(
        "--gates",
        metavar="KIND|HUB-ID|DIR|FILE",
        help="rg or rg10 of the model's own, or others (default: rg10 if it has them: their scores compare)",
    )
    add("--rope", default="auto", help="LongRoPE models: short, long or auto (= long)")
    add("--random-weights", action="store_true", help="seeded random weights, for shape work")
    add("--seed", type=int, default=0, help="of streams and random weights (default 0)")
    cache = parser.add_argument_group("cache").add_argument
    cache(
        "--budget",
        type=int,
        metavar="M",
        help=f"entries per KV head on average: the heads share M x layers x KV heads (default {_BUDGET})",
    )
    cache("--buffer", type=int, default=128, metavar="B", help="new tokens between eviction events (default 128)")
    cache("--prefill-chunk", type=int, metavar="T", help="most tokens per prefill call (default: min(128, buffer))")
    cache("--policy", default="global", help="global (default: all heads share) or layer (the heads of a layer share)")
    cache("--min-per-head", type=int, default=0, metavar="N", help="entries that no head goes below (default 0)")
    cache(
        "--threshold",
        type=float,
        default=0.0,
        metavar="R",
        help="retention below which an entry leaves even if there is room; needs --budget as a ceiling (default: none)",
    )
    cache("--sinks", type=int, default=0, metavar="N", help="first tokens that never leave (default 0)")
    cache("--recent", type=int, default=0, metavar="N", help="newest tokens that never leave (default 0)")
    cache("--dtype", default="float32", help="of the cache whose bytes are counted (default float32)")
    how = parser.add_argument_group("calibration").add_argument
    how(
        "--target",
        default="99%",
        metavar="SHARE",
        help="of the exact policy's survivors to keep: 99%% (default), 0.995",
    )
    how(
        "--text", nargs="+", type=Path, metavar="PATH", help=".txt or .jsonl files or folders (default: shipped sample)"
    )
    how("--tokens", type=int, metavar="N", help="tokens per stream (default: max(2048, 6 x (budget + buffer)))")
    how("--streams", type=int, default=8, metavar="N", help="streams; half as many more are held out (default 8)")
    out = parser.add_argument_group("output").add_argument
    out("-o", "--output", type=Path, default=Path(CAPS_FILE), metavar="FILE", help=f"default: {CAPS_FILE}")
    out("--heat-map", type=Path, metavar="PNG", help="default: beside the output, with .png")
    out("--no-heat-map", action="store_true", help="draw none")
    out("--force", action="store_true", help="replace files that exist")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    args = build_parser().parse_args(argv)
    run_cli(lambda: _calibrate(args))


def _calibrate(args: argparse.Namespace) -> None:
    quiet_libraries()
    config, target = _config(args), parse_share(args.target, "--target")
    heat_map = _heat_map(args)
    for path in (args.output, heat_map):
        if path is not None and path.is_dir():
            raise ConfigError(f"{path} is a folder: name a file")
        if path is not None and path.exists() and not args.force:
            raise ConfigError(f"{path} exists: give --force to replace it, or another name")
    # torch and transformers take seconds to import: --help and option errors do not wait for them.
    from trimkv_edge.calibration.calibrate import calibrate
    from trimkv_edge.calibration.request import check_request, memory_to_calibrate
    from trimkv_edge.eviction import find_policy
    from trimkv_edge.models.loading import gates_for, load_model
    from trimkv_edge.models.source import find_source

    check_request(config, target, args.dtype)
    source = find_source(args.model, args.weights, args.random_weights, vision=True)
    shape = source.shape()
    streams = _streams(args, source, config)
    check_fits(memory_to_calibrate(shape, config), "calibration")
    gates = args.gates or ("rg10" if "rg10" in source.gates else None)
    loaded = load_model(source, gates_for(find_policy(config.policy), source, gates), args.rope, args.seed)
    print(f"model     {source.name} ({source.origin}), gates {loaded.gates.kind} ({loaded.gates.source})")
    print(
        f"policy    {config.policy}: {config.budget} entries per head on average, {shape.num_layers} layers x "
        f"{shape.num_kv_heads} KV heads share {config.budget * shape.rows}; buffer {config.buffer}"
    )
    print(f"text      {streams.text}")
    with tqdm(total=0, unit="tok", unit_scale=True, leave=False, disable=not sys.stderr.isatty()) as bar:

        def report(line: str) -> None:
            with bar.external_write_mode(file=sys.stdout):
                print(f"          {line}", flush=True)

        def progress(done: int, total: int) -> None:
            if done < bar.n:
                bar.reset()
            bar.total = total
            bar.update(done - bar.n)

        found = calibrate(
            loaded,
            shape,
            config,
            streams.calibration,
            streams.held_out,
            target=target,
            dtype=args.dtype,
            text=streams.text,
            report=report,
            progress=progress,
        )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    found.save(args.output)
    for line in describe(found, shape):
        print(line)
    print(f"written   {args.output}")
    if heat_map is not None:
        from trimkv_edge.calibration.heatmap import draw_heat_map

        heat_map.parent.mkdir(parents=True, exist_ok=True)
        draw_heat_map(found, heat_map)
        print(f"heat map  {heat_map}")


def describe(found: Calibration, shape: ModelShape) -> list[str]:
    """Occupancy, trade and result, as printed."""
    from trimkv_edge.calibration.search import percent

    occupancy, caps = found.occupancy, found.cache.caps
    assert caps is not None
    unit = cache_bytes(shape, replace(found.cache, caps=None), found.dtype)
    size, entries = cache_bytes(shape, found.cache, found.dtype), sum(map(sum, caps))
    means = [mean for layer in occupancy.mean for mean in layer]
    lines = [
        f"occupancy mean {min(means):.0f} to {max(means):.0f} entries per head; over all heads: mean {sum(means):.0f}, "
        f"p95 {sum(map(sum, occupancy.p95))}, max {sum(map(sum, occupancy.max))}",
        f"trade     {'level':<12} {'entries':>9} {'MiB':>9} {'x exact':>8} {'agreement':>11}",
    ]
    for point in found.trade:
        mark = "->" if (point.entries, point.bytes) == (entries, size) else ""
        lines.append(
            f"       {mark:>2} {point.level:<12} {point.entries:>9} {point.bytes / 2**20:>9.3f} "
            f"{point.bytes / unit:>8.2f} {percent(point.agreement):>11}"
        )
    lines.append(
        f"caps      {min(map(min, caps))} to {max(map(max, caps))} per head, {entries} in all, {format_bytes(size)}: "
        f"agreement {percent(found.agreement)} with the model over {found.held_out_tokens} held-out tokens"
    )
    return lines


def _config(args: argparse.Namespace) -> CacheConfig:
    if args.budget is None and args.threshold:
        raise ConfigError("threshold with no ceiling: give --budget")
    return CacheConfig(
        budget=_BUDGET if args.budget is None else args.budget,
        buffer=args.buffer,
        prefill_chunk=min(128, args.buffer) if args.prefill_chunk is None else args.prefill_chunk,
        policy=args.policy,
        sinks=args.sinks,
        recent=args.recent,
        min_per_head=args.min_per_head,
        threshold=args.threshold,
    )


def _heat_map(args: argparse.Namespace) -> Path | None:
    if args.no_heat_map:
        if args.heat_map is not None:
            raise ConfigError("--heat-map and --no-heat-map contradict each other: give one")
        return None
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise TrimKVError(
            f"the heat map needs matplotlib ({error}): pip install 'trimkv-edge[eval]', or give --no-heat-map"
        ) from error
    path: Path = args.heat_map or args.output.with_suffix(".png")
    if path == args.output:
        raise ConfigError(f"--output and the heat map are both {path}: give --heat-map another name")
    return path


def _streams(args: argparse.Namespace, source: ModelSource, config: CacheConfig) -> Streams:
    from trimkv_edge.calibration.request import default_length
    from trimkv_edge.calibration.streams import StreamPlan, sample_streams, text_streams

    length = default_length(config) if args.tokens is None else args.tokens
    plan = StreamPlan(length, args.streams, max(1, args.streams // 2), args.seed)
    if not source.family.vision:
        return sample_streams(source, plan) if args.text is None else text_streams(source, args.text, plan)
    if args.text is not None:
        raise ConfigError(f"--text has no pictures, and {source.name} reads them: leave it out for the shipped sample")
    from trimkv_edge.calibration.mixed import mixed_streams
    from trimkv_edge.export.vision import vision_info

    return mixed_streams(source, plan, vision_info(source, ()))


if __name__ == "__main__":
    main()
