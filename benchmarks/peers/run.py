"""The same random weights in the tools people use: decode and prefill speed, memory, load time, side by side.

    python benchmarks/peers/run.py --setup                                      # environments of the peers, once
    python benchmarks/peers/run.py --shape phi3-54m --quant int4                # builds what is missing, then measures
    python benchmarks/peers/run.py --shape phi3-mini --quant int4 --peers ours-onnx,llama.cpp --contexts 1024,4096

docs/peers.md says what each row is. A peer that cannot run is a row that says why.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from builds import BuildError, built, forget, log_of, set_up, weights_folder
from measure import Lane, Plan, fill, run_group
from plan import STEPS, fitting, groups, need, not_quantised
from registry import HERE, PEERS, QUANTS, REFERENCE, Peer
from shapes import POSITIONS, SHAPES
from table import render

from trimkv_edge.cli.common import quiet_libraries, run_cli

Store = Callable[[Path, str, Any], None]
_SPARE = 2 * 2**30  # memory that is left to the machine


def main() -> None:
    args = _arguments()
    peers = {name: PEERS[name] for name in args.peers}
    if args.setup:
        for name, peer in peers.items():
            print(f"setting up {name} ...", flush=True)
            try:
                set_up(peer)
            except BuildError as error:
                print(f"  {error}")
        return
    quiet_libraries()
    sys.path.append(str(HERE.parent))
    # They import torch: not for --help and --setup, and not after an hour of measuring.
    from common import copy_bandwidth
    from common import save as store

    started = time.perf_counter()
    rows: dict[str, dict[str, Any]] = {name: {} for name in peers}
    lanes = _lanes(peers, args, rows)
    print(f"builds ready after {time.perf_counter() - started:.0f} s", flush=True)
    if args.build_only:
        _print_missing(rows)
        return
    bandwidth = copy_bandwidth(args.threads)
    reference = json.loads((weights_folder(args.shape) / "reference.json").read_text())
    plan = Plan(args.contexts, args.threads, args.rounds, args.turns, args.steps)
    needs = {
        lane.name: need(lane.peer, SHAPES[args.shape], lane.row["file_bytes"], lane.row["quant"]).at(max(lane.contexts))
        for lane in lanes
    }
    for names in groups(needs, REFERENCE, _available()):
        print(f"side by side: {', '.join(names)}", flush=True)
        # A reference that has a turn with each of several groups shows its first row.
        group = [lane if not lane.windows else _again(lane) for lane in lanes if lane.name in names]
        run_group(group, plan, reference)
        ours = next((lane for lane in group if lane.name == REFERENCE), None)
        for lane in group:
            fill(lane, ours)
        _report(store, args, rows, bandwidth, started)
    if not lanes:
        _report(store, args, rows, bandwidth, started)
    print("\n" + render(rows, args.contexts))
    print(f"\ncopy bandwidth {bandwidth:.1f} GB/s; {time.perf_counter() - started:.0f} s in all")
    if any("not the same weights" in row.get("missing", "") for row in rows.values()):
        sys.exit(1)


def _lanes(peers: dict[str, Peer], args: argparse.Namespace, rows: dict[str, dict[str, Any]]) -> list[Lane]:
    """Builds each peer; what cannot be had is noted in its row."""
    if args.rebuild:
        for peer in peers.values():
            forget(peer, args.shape)
    lanes = []
    length = max(args.contexts) + STEPS
    for name, peer in peers.items():
        quant = args.ours_quant if peer.script.name == "worker_ours.py" else args.quant
        scheme = peer.schemes.get(quant)
        if scheme is None:
            rows[name]["missing"] = f"has no {quant} form here"
            continue
        options = dict(peer.options)
        if peer.fixed_length:
            options["length"] = str(length)
        if "budget" in options:
            options |= {"budget": str(args.budget), "buffer": str(args.buffer), "verify": args.verify}
        try:
            folder, note = built(name, peer, args.shape, scheme, options)
        except BuildError as error:
            rows[name]["missing"] = str(error)
            print(f"  {name}: {error}", flush=True)
            continue
        rows[name] |= {**note, "weights": peer.label(quant), "quant": quant}
        if not peer.weights and (wrong := not_quantised(note["file_bytes"], SHAPES[args.shape], quant)):
            rows[name]["missing"] = wrong
            continue
        fit = fitting(need(peer, SHAPES[args.shape], note["file_bytes"], quant), args.contexts, _available())
        if not fit:
            rows[name]["missing"] = "does not fit into memory"
            continue
        if len(fit) < len(args.contexts):
            rows[name]["missing"] = f"contexts above {max(fit):,} do not fit into memory"
        lanes.append(Lane(name, peer, folder, log_of(args.shape, name), fit, options, rows[name]))
    return lanes


def _again(lane: Lane) -> Lane:
    return Lane(lane.name, lane.peer, lane.folder, lane.log, lane.contexts, lane.options, dict(lane.row))


def _available() -> int:
    return int(psutil.virtual_memory().available) - _SPARE


def _report(
    store: Store, args: argparse.Namespace, rows: dict[str, dict[str, Any]], bandwidth: float, started: float
) -> None:
    settings = {key: getattr(args, key) for key in ("shape", "quant", "ours_quant", "threads", "budget", "buffer")}
    settings |= {key: getattr(args, key) for key in ("contexts", "rounds", "turns", "steps")}
    measured = {"settings": settings, "copy_gb_per_s": bandwidth, "load_average": psutil.getloadavg(), "peers": rows}
    store(args.output, "peers", {**measured, "seconds": time.perf_counter() - started})


def _print_missing(rows: dict[str, dict[str, Any]]) -> None:
    for name, row in rows.items():
        print(f"{name}: {row.get('missing', 'ready')}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="phi3-54m")
    add("--quant", choices=QUANTS, default="int4", help="of the weights (default int4)")
    add("--ours-quant", choices=QUANTS, help="another one for ours (default: as --quant)")
    add("--contexts", type=_list, default="256,1024,2048,4096,8192", metavar="N,N", help="tokens before a measurement")
    add("--peers", type=_names, default=",".join(PEERS), metavar="PEER,PEER", help="default: all")
    add("--threads", type=int, default=1, help="of each tool (default 1: least noise)")
    add("--budget", type=int, default=1024, help="entries per KV head that ours keeps")
    add("--buffer", type=int, default=128, help="tokens between events of ours")
    add("--verify", choices=("yes", "no"), default="yes", help="no: our export does not compare itself with eager")
    add("--rounds", type=int, default=2, help="times that the whole stream is read")
    add("--turns", type=int, default=9, help="turns of each peer at each context")
    add("--steps", type=int, default=24, help="decode steps of a turn")
    add("--setup", action="store_true", help="make the environments of --peers and stop")
    add("--build-only", action="store_true", help="build what is missing and stop")
    add("--rebuild", action="store_true", help="build --peers again")
    add("--output", type=Path, help="default: benchmarks/results/peers-SHAPE-QUANT.json")
    args = parser.parse_args()
    args.ours_quant = args.ours_quant or args.quant
    args.output = args.output or HERE.parent / "results" / f"peers-{args.shape}-{args.quant}.json"
    if min(args.threads, args.rounds, args.turns, args.steps, args.budget, args.buffer) < 1:
        parser.error("--threads, --rounds, --turns, --steps, --budget and --buffer must be at least 1")
    if args.steps * (args.turns + 1) > STEPS:
        parser.error(f"--steps x (--turns + 1) is more than {STEPS}, the room that caches have after a context")
    gaps = np.diff([0, *args.contexts])
    if gaps.min() <= args.steps * (args.turns + 1) or max(args.contexts) + STEPS > POSITIONS:
        parser.error(f"contexts must grow by more than the steps decoded at each, up to {POSITIONS - STEPS}")
    return args


def _list(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _names(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in PEERS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(PEERS)}")
    return names


if __name__ == "__main__":
    run_cli(main)
