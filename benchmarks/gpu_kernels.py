"""Achieved bandwidth of the Triton kernels at shapes of models, against that of a plain copy on the same device.

    python benchmarks/gpu_kernels.py                      # bf16, random numbers, no weights needed
    python benchmarks/gpu_kernels.py --sweep              # also tries other cuts of the attention's work
    python benchmarks/gpu_kernels.py --smoke              # tiny, in Triton's interpreter: says only that it runs

Kernels must agree with the ops on the CPU before any is timed. Bytes are those that must be touched: live keys and
values once for attention; for an event its tables once and each moved row read and written. An event's share of
decoding is against steps that read weights and live entries at copy bandwidth, so it is at most that of real steps.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from common import median, parser, save
from gpu_common import device_copy_bandwidth, device_record, require_cuda, seconds
from torch import Tensor

from trimkv_edge.cli.common import run_cli
from trimkv_edge.errors import VerificationError
from trimkv_edge.gpu import ops
from trimkv_edge.models.registry import MODELS

# Largest difference of attention in bf16 from that in float32, of values that are standard normal.
_TOLERANCE = 0.05
# Events that a stream has behind it when its events are timed.
_EVENTS_BEFORE = 16
# How often the rows that an event moved are counted, with as many times taken before each.
_SAMPLES = 3


@dataclass(frozen=True)
class Shape:
    """A model's cache: ``layers x batch x kv_heads`` heads of ``budget + buffer`` slots, and its bf16 weights."""

    name: str
    layers: int
    batch: int
    heads: int
    kv_heads: int
    width: int
    budget: int
    buffer: int
    weight_bytes: int

    @property
    def slots(self) -> int:
        return self.budget + self.buffer

    @property
    def live(self) -> int:
        """Entries that a step between two events sees on average."""
        return self.budget + self.buffer // 2

    @property
    def layer_bytes(self) -> int:
        """Live keys and values of a layer."""
        return 2 * 2 * self.batch * self.kv_heads * self.live * self.width

    def rows(self) -> dict[str, Any]:
        return {"model": self.name, "batch": self.batch, "budget": self.budget, "buffer": self.buffer}


def model_shape(name: str, batch: int, budget: int, buffer: int = 128) -> Shape:
    """A named model at its own size; of weights those that a step reads, so not the rows of the embedding."""
    given = MODELS[name].shape
    hidden, inner, layers = given["hidden_size"], given["intermediate_size"], given["num_hidden_layers"]
    heads, kv_heads = given["num_attention_heads"], given["num_key_value_heads"]
    width = given.get("head_dim") or hidden // heads
    layer = hidden * width * (2 * heads + 2 * kv_heads) + 3 * hidden * inner
    weights = 2 * (layers * layer + given["vocab_size"] * hidden)
    return Shape(name, layers, batch, heads, kv_heads, width, budget, buffer, weights)


SHAPES = (("phi-3-mini", 1, 2048), ("qwen3-4b", 4, 1024), ("qwen3-4b", 64, 1024))
SMOKE = Shape("none", 2, 2, 4, 2, 24, 20, 12, 0)


class Cache:
    """Random entries, all slots full."""

    def __init__(self, shape: Shape, device: str, seed: int = 0) -> None:
        self.shape = shape
        generator = torch.Generator(device).manual_seed(seed)
        heads = (shape.layers, shape.batch, shape.kv_heads)
        like = {"generator": generator, "device": device}
        rows = (*heads, shape.slots, shape.width)
        self.key, self.value = (torch.randn(rows, dtype=torch.bfloat16, **like) for _ in range(2))
        self.fresh = -torch.empty((16, *heads, shape.buffer), device=device).exponential_(50.0, generator=generator)
        self.log_beta = -torch.empty((*heads, shape.slots), device=device).exponential_(50.0, generator=generator)
        self.positions = torch.arange(shape.budget, device=device).expand(*heads, -1).contiguous()
        self.seen = torch.full((shape.batch,), shape.slots, device=device)
        self.due = torch.ones(shape.batch, dtype=torch.bool, device=device)
        self.before = self.positions.clone()
        self.events = 0

    def arguments(self) -> tuple[Any, ...]:
        tables = (self.key, self.value, self.log_beta, self.positions)
        return (*tables, self.seen, self.due, self.shape.budget, 0, 0)

    def refill(self, all_move: bool) -> None:
        """The next B tokens of a stream; with ``all_move`` they outlive whatever was kept before."""
        self.before.copy_(self.positions)
        ring = self.log_beta[..., self.shape.budget :]
        if all_move:
            self.log_beta.fill_(-1.0)
            ring.fill_(0.0)
        else:
            ring.copy_(self.fresh[self.events % len(self.fresh)])
        if self.events:
            self.seen += self.shape.buffer
        self.events += 1

    def moved(self) -> int:
        """Rows that the last event moved, in all heads."""
        return int((self.positions != self.before).sum())


def check(shape: Shape, device: str) -> None:
    """Raises :class:`VerificationError` if a kernel disagrees with the op on the CPU."""
    for turn in range(2):
        cache, other = Cache(shape, device, turn), Cache(shape, device, turn)
        if turn % 2:
            cache.log_beta.mul_(8.0).ceil_()
        on_cpu = [part.cpu().clone() if isinstance(part, Tensor) else part for part in cache.arguments()]
        ops.load_kernels("evict").evict(*cache.arguments())
        ops.evict(*on_cpu)
        if any(not torch.equal(got.cpu(), want) for got, want in zip(cache.arguments()[:4], on_cpu[:4], strict=True)):
            raise VerificationError("the eviction kernel keeps other entries than the op on the CPU, or elsewhere")
        query, live = attended(shape, device)
        kernels = ops.load_kernels("attend")
        key, value, start, length = pool(shape, device)
        for kernel, op, given in (
            (kernels.attend, ops.attend, (query[0], other.key[0], other.value[0], live)),
            (kernels.attend_pool, ops.attend_pool, (query[0], key, value, start[0], length[0])),
        ):
            got = kernel(*given, 0.1).float().cpu()
            wide = [part.cpu().float() if part.is_floating_point() else part.cpu() for part in given]
            if not (got - op(*wide, 0.1)).abs().max() <= _TOLERANCE:
                raise VerificationError("an attention kernel disagrees with the op on the CPU")


def attended(shape: Shape, device: str) -> tuple[Tensor, Tensor]:
    """Queries of one token, ``[layers, batch, heads, 1, head_dim]``, and entries before it."""
    size = (shape.layers, shape.batch, shape.heads, 1, shape.width)
    generator = torch.Generator(device).manual_seed(1)
    query = torch.randn(size, dtype=torch.bfloat16, device=device, generator=generator)
    return query, torch.full((shape.batch,), shape.live - 1, device=device)


def pool(shape: Shape, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As many entries as all heads together have, in uneven shares: key, value, and ``start``, ``length [layers]``."""
    torch.manual_seed(2)
    heads = shape.layers * shape.batch * shape.kv_heads
    share = torch.distributions.Dirichlet(torch.full((heads,), 2.0)).sample()
    length = (share * heads * shape.live).long().clamp(min=1).view(shape.layers, shape.batch, shape.kv_heads)
    flat = length.flatten()
    start = (flat.cumsum(0) - flat).view_as(length)
    rows = (int(flat.sum()), shape.width)
    key, value = (torch.randn(rows, dtype=torch.bfloat16, device=device) for _ in range(2))
    return key, value, start.to(device), length.to(device)


def rate(size: float, times: list[float], copy: float) -> dict[str, Any]:
    """Median time and bandwidth, alone and against a copy's."""
    achieved = size / median(times) / 1e9
    return {
        "us": round(median(times) * 1e6, 2),
        "us_least": round(min(times) * 1e6, 2),
        "mb": round(size / 1e6, 3),
        "gb_per_s": round(achieved, 1),
        "of_copy": round(achieved / copy, 3),
    }


def event(shape: Shape, all_move: bool, copy: float, device: str, repeats: int) -> dict[str, Any]:
    """An event of all heads: as a stream has them, or with a ring of nothing but survivors."""
    evict = ops.load_kernels("evict").evict
    cache = Cache(shape, device)
    for _ in range(min(repeats, _EVENTS_BEFORE)):
        cache.refill(False)
        evict(*cache.arguments())
    times, moved = [], []
    for _ in range(_SAMPLES):
        times += seconds(lambda: evict(*cache.arguments()), lambda: cache.refill(all_move), repeats, device)
        moved.append(cache.moved())
    heads = shape.layers * shape.batch * shape.kv_heads
    tables = heads * (4 * shape.slots + 8 * shape.budget)
    size = tables + median(moved) * (2 * 2 * 2 * shape.width + 2 * 4 + 8)
    step = (shape.weight_bytes + shape.layers * shape.layer_bytes) / copy / 1e9
    row = {"case": "all move" if all_move else "stream", "moved_per_head": round(median(moved) / heads, 1)}
    row |= rate(size, times, copy)
    row["of_decode_at_copy_bandwidth"] = round(median(times) / (shape.buffer * step), 5)
    return shape.rows() | row


def attention(shape: Shape, copy: float, device: str, repeats: int, shares: Any = None) -> list[dict[str, Any]]:
    """One token through the attention of all layers, per layer: our kernels and torch's own over the same entries."""
    kernels = ops.load_kernels("attend")
    cache = Cache(shape, device)
    query, live = attended(shape, device)
    scale, layers = shape.width**-0.5, range(shape.layers)
    grouped = shape.heads != shape.kv_heads

    def ours() -> None:
        for layer in layers:
            kernels.attend(query[layer], cache.key[layer], cache.value[layer], live, scale, shares)

    def torchs() -> None:
        for layer in layers:
            keys, values = (table[layer][:, :, : shape.live] for table in (cache.key, cache.value))
            F.scaled_dot_product_attention(query[layer], keys, values, scale=scale, enable_gqa=grouped)

    def per_layer(step: Callable[[], None]) -> list[float]:
        return [time / shape.layers for time in seconds(step, repeats=repeats, device=device)]

    results = [{"case": "live prefix", **rate(shape.layer_bytes, per_layer(ours), copy)}]
    if shares is None:
        results.append({"case": "torch sdpa", **rate(shape.layer_bytes, per_layer(torchs), copy)})
        key, value, start, length = pool(shape, device)

        def pooled() -> None:
            for layer in layers:
                kernels.attend_pool(query[layer], key, value, start[layer], length[layer], scale)

        size = 2 * 2 * int(length.sum()) * shape.width / shape.layers
        results.append({"case": "pool", **rate(size, per_layer(pooled), copy)})
    return [shape.rows() | row for row in results]


def sweep(shape: Shape, copy: float, repeats: int) -> list[dict[str, Any]]:
    """Other cuts of the work, best first."""
    default = ops.load_kernels("attend").Shares()
    rows = []
    for block, programs, warps, stages in product((32, 64, 128), (256, 512, 1024, 2048), (4, 8), (2, 3)):
        cut = dict(block=block, programs=programs, warps=warps, stages=stages)
        row = attention(shape, copy, "cuda", repeats, replace(default, **cut))[0]
        rows.append(cut | {name: row[name] for name in ("model", "batch", "us", "gb_per_s", "of_copy")})
    return sorted(rows, key=lambda row: float(row["us"]))[:8]


def run() -> None:
    options = parser("bandwidth of the Triton kernels", "gpu_kernels")
    options.add_argument("--repeats", type=int, default=30)
    options.add_argument("--sweep", action="store_true", help="try other cuts of the attention's work (minutes)")
    options.add_argument("--smoke", action="store_true", help="tiny shapes in Triton's interpreter, stores nothing")
    args = options.parse_args()
    if args.smoke:
        if os.environ.get("TRITON_INTERPRET") != "1":
            # Triton looks when it is imported, which torch has done by now.
            os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"TRITON_INTERPRET": "1"})
        check(SMOKE, "cpu")
        ran = [event(SMOKE, all_move, 1.0, "cpu", 1) for all_move in (False, True)]
        for row in ran + attention(SMOKE, 1.0, "cpu", 1):
            print(row["case"], "ran")
        print("smoke run in Triton's interpreter: no measurement, nothing stored")
        return
    require_cuda()
    check(replace(SMOKE, width=96, budget=200, buffer=56), "cuda")
    copy = device_copy_bandwidth()
    results: dict[str, Any] = {"device": device_record(), "copy_gb_per_s": round(copy, 1)}
    results |= {"evict": [], "attend": [], "sweep": []}
    for name, batch, budget in SHAPES:
        shape = model_shape(name, batch, budget)
        results["evict"] += [event(shape, all_move, copy, "cuda", args.repeats) for all_move in (False, True)]
        results["attend"] += attention(shape, copy, "cuda", args.repeats)
        results["sweep"] += sweep(shape, copy, args.repeats) if args.sweep else []
        torch.cuda.empty_cache()
    for kind in ("evict", "attend", "sweep"):
        for row in results[kind]:
            print(kind, row)
    save(args.output, "gpu_kernels", results)


if __name__ == "__main__":
    run_cli(run)
