"""Gate training on a CUDA device: tokens/s and peak memory of a step, and how both grow with the length of the row.

    python benchmarks/gpu_training.py             # qwen3-0.6b's shape in bf16, random weights, 8k to 64k tokens
    python benchmarks/gpu_training.py --smoke     # small and on the CPU: says only that it runs

A step is the vanilla pass, the gated pass (FlexAttention), the losses and the gradient of the gates, with activation
checkpointing; the first step of each length compiles and is not counted. Memory must grow with the tokens, not with
their square: an exponent near 1. Time has attention's square in it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from common import median, parser, save
from gpu_common import device_record, require_cuda
from torch import Tensor
from training_memory import build

from trimkv_edge.cli.common import run_cli


def row_of(vocab: int, length: int, device: str) -> dict[str, Tensor]:
    """One row of random tokens, arguments of :class:`~trimkv_edge.training.module.GateModule`."""
    return {
        "input_ids": torch.randint(0, vocab, (1, length), device=device),
        "index": torch.arange(length, device=device)[None],
        "weight": torch.ones(1, length, device=device),
        "skips": torch.zeros(1, 4, dtype=torch.int64, device=device),
        "held": torch.tensor([length], device=device),
    }


def steps(module: Any, row: dict[str, Tensor], repeats: int, synchronise: Callable[[], None]) -> list[float]:
    """Seconds of each step after one that warms up."""
    times = []
    for _ in range(repeats + 1):
        module.zero_grad(set_to_none=True)
        synchronise()
        started = time.perf_counter()
        losses = module(**row)
        length = row["index"].shape[1]
        (losses["ce"] / length + losses["kl"] / length + losses["capacity"]).backward()
        synchronise()
        times.append(time.perf_counter() - started)
    return times[1:]


def exponent(rows: Sequence[dict[str, Any]], name: str) -> float:
    """With which power of the tokens a column grows, from the first row to the last."""
    first, last = rows[0], rows[-1]
    return round(math.log(last[name] / first[name]) / math.log(last["tokens"] / first["tokens"]), 3)


def measure(model: str, lengths: Sequence[int], repeats: int) -> dict[str, Any]:
    """All lengths on the CUDA device, with one model."""
    torch.manual_seed(0)
    module, vocab = build(model, "cuda", "bfloat16", checkpointing=True)
    module.base.to("cuda")
    held, rows = torch.cuda.memory_allocated(), []
    for length in lengths:
        row = row_of(vocab, length, "cuda")
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        seconds = median(steps(module, row, repeats, torch.cuda.synchronize))
        rows.append(
            {
                "tokens": length,
                "seconds": round(seconds, 4),
                "tokens_per_s": round(length / seconds, 1),
                "peak_bytes": torch.cuda.max_memory_allocated() - held,
            }
        )
        print(rows[-1], flush=True)
    grows = {name: exponent(rows, name) for name in ("seconds", "peak_bytes")}
    return {"model": model, "weight_bytes": held, "steps": rows, "exponents": grows}


def run() -> None:
    options = parser("gate training on a CUDA device", "gpu_training")
    options.add_argument("--model", default="qwen3-0.6b", help="small, or a name of the registry (random weights)")
    options.add_argument("--lengths", type=int, nargs="+", default=[8192, 16384, 32768, 65536])
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--smoke", action="store_true", help="a small model on the CPU, stores nothing")
    args = options.parse_args()
    if args.smoke:
        module, vocab = build("small", "cpu", "float32", checkpointing=True)
        for length in (64, 128):
            assert len(steps(module, row_of(vocab, length, "cpu"), 1, lambda: None)) == 1
            print(f"a step of {length} tokens ran")
        print("smoke run on the CPU: no measurement, nothing stored")
        return
    require_cuda()
    save(args.output, "gpu_training", {"device": device_record(), **measure(args.model, args.lengths, args.repeats)})


if __name__ == "__main__":
    run_cli(run)
