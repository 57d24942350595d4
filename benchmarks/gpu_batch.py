"""Decoding many streams on a CUDA device, ours beside transformers with a full cache, same weights, same process.

    python benchmarks/gpu_batch.py                 # qwen3-4b's shape in bf16, random weights, M = 1024, B = 128
    python benchmarks/gpu_batch.py --case long     # only batch 4 at 32k; --case wide: only batch 64 at 16k
    python benchmarks/gpu_batch.py --smoke         # tiny, on the CPU, not compiled: says only that it runs

Nothing is read up to the context: caches of both hold random entries, ours as if its events had left them
(gpu_decode.place), and go on from there with tokens that are drawn on the device by the same sampler. Ours are compiled
steps, its events included, streams in turns. transformers' dynamic cache runs as it comes, its static cache through
torch.compile (reduce-overhead). One after the other, for the memory. Where the device cannot hold a full cache, that is
a row of its own, and half the streams are tried.
"""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from common import median, parser, save
from gpu_common import device_record, require_cuda
from gpu_decode import SMALL, WARM_UPS, fill, model_config, place, random_model
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from trimkv_edge.cli.common import run_cli
from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import ConfigError, VerificationError
from trimkv_edge.gpu.batch import Batch
from trimkv_edge.gpu.sampling import DeviceSampler
from trimkv_edge.models.gated import GatedModel
from trimkv_edge.models.skeleton import skeleton
from trimkv_edge.runtime.sampling import SamplingParams

MODEL = "qwen3-4b"
CACHES = ("dynamic", "static")


@dataclass(frozen=True)
class Case:
    """A batch of streams, all with a context of so many tokens; ``published``: tokens/s of others at this point."""

    batch: int
    context: int
    published: dict[str, float] = field(default_factory=dict)


CASES = {"long": Case(4, 32768, {"trimkv": 130.5, "full cache": 68.4}), "wide": Case(64, 16384)}


def plain_model(config: Any, model: GatedModel) -> PreTrainedModel:
    """transformers' own model of the same tensors, without gates; ``config``: not that of ``model``, which it keeps."""
    hollow = skeleton(config)
    device = model.base.get_input_embeddings().weight.device
    memo: dict[int, Any] = {id(own): model.base.get_parameter(name) for name, own in hollow.named_parameters()}
    memo |= {id(own): own.to(device) for own in hollow.buffers()}
    base: PreTrainedModel = copy.deepcopy(hollow, memo)
    return base.eval()


class FullCache:
    """transformers' decoding over a full cache of random entries.

    Args:
        base: see :func:`plain_model`.
        kind: ``dynamic`` or ``static``.
        case: streams and context.
        room: tokens that each stream will read at most.
        compiled: the step through ``torch.compile``.

    Raises:
        torch.OutOfMemoryError: the device cannot hold the cache.
    """

    def __init__(self, base: PreTrainedModel, kind: str, case: Case, room: int, compiled: bool) -> None:
        config, weight = base.config, base.get_input_embeddings().weight
        self._device = weight.device
        static = kind == "static"
        cache = StaticCache(config, case.context + room) if static else DynamicCache(config=config)
        shape = (case.batch, config.num_key_value_heads, case.context, config.head_dim)
        like = {"dtype": weight.dtype, "device": weight.device}
        generator = torch.Generator(weight.device).manual_seed(0)
        for layer in range(config.num_hidden_layers):
            cache.update(*(torch.randn(shape, generator=generator, **like) for _ in range(2)), layer)
        self.cache = cache

        def step(ids: Tensor, positions: Tensor) -> Tensor:
            out = base(ids, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
            return out.logits[:, -1].float()

        self._step: Callable[[Tensor, Tensor], Tensor] = step
        self._replayed = compiled and weight.is_cuda
        if compiled:
            self._step = torch.compile(step, mode="reduce-overhead", dynamic=False)
        self._ids = torch.zeros(case.batch, 1, dtype=torch.int64, device=weight.device)
        self._positions = torch.full_like(self._ids, case.context)

    @torch.no_grad()
    def decode(self, steps: int, draw: DeviceSampler) -> Tensor:
        """Reads and draws ``steps`` tokens of each stream, waiting only for the last: ``[streams, steps]``."""
        drawn = torch.empty(len(self._ids), steps, dtype=torch.int64, device=self._device)
        for step in range(steps):
            if self._replayed:
                torch.compiler.cudagraph_mark_step_begin()
            drawn[:, step] = draw(self._step(self._ids, self._positions))
            self._ids.copy_(drawn[:, step : step + 1])
            self._positions += 1
        return drawn.cpu()


def timed(decode: Callable[[], object], windows: int) -> list[float]:
    """Seconds of each window after those that warm up; ``decode`` waits for the device."""
    times = []
    for _ in range(WARM_UPS + windows):
        started = time.perf_counter()
        decode()
        times.append(time.perf_counter() - started)
    return times[WARM_UPS:]


def rate(times: Sequence[float], batch: int, steps: int) -> dict[str, Any]:
    """Tokens/s of all streams together, from windows of ``steps`` tokens of each."""
    seconds = median(times)
    return {
        "batch": batch,
        "windows": len(times),
        "tokens_per_s": round(batch * steps / seconds, 1),
        "ms_per_step": round(seconds / steps * 1e3, 3),
    }


def cache_gib(config: Any, batch: int, entries: int) -> float:
    """GiB of keys and values in 16 bits, ``entries`` of each head."""
    each = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return round(batch * entries * each / 2**30, 3)


def sampler(device: torch.device) -> DeviceSampler:
    return DeviceSampler(SamplingParams(temperature=1.0, seed=0), device)


def ours(model: GatedModel, config: CacheConfig, case: Case, windows: int, compiled: bool) -> dict[str, Any]:
    """Windows of B tokens in which each stream has its event once."""
    batch = Batch(model, config, case.batch, compiled=compiled)
    batch.graphs.warm_up()
    fill(batch.graphs.cache)
    place(batch, case.context)
    draw = sampler(batch.device)
    times = timed(lambda: batch.decode(config.buffer, draw).tokens(), windows)
    if not batch.graphs.logits.isfinite().all():
        raise VerificationError("the model's logits are not finite, so nothing it measures counts")
    held = cache_gib(model.config, case.batch, config.slots)
    return {"cache": f"trimkv {config.budget}"} | rate(times, case.batch, config.buffer) | {"cache_gib": held}


def theirs(
    base: PreTrainedModel, kind: str, case: Case, steps: int, windows: int, compiled: bool
) -> list[dict[str, Any]]:
    """Rows of :func:`until_it_fits`, of windows of ``steps`` tokens; only a static cache's steps are compiled."""

    def attempt(batch: int) -> dict[str, Any]:
        room = (WARM_UPS + windows) * steps
        full = FullCache(base, kind, Case(batch, case.context), room, compiled and kind == "static")
        draw = sampler(base.get_input_embeddings().weight.device)
        return rate(timed(lambda: full.decode(steps, draw), windows), batch, steps)

    return [
        {"cache": f"transformers {kind}"} | row | {"cache_gib": cache_gib(base.config, row["batch"], case.context)}
        for row in until_it_fits(case.batch, attempt)
    ]


def until_it_fits(batch: int, attempt: Callable[[int], dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each batch tried, halved until the device can hold it."""
    rows: list[dict[str, Any]] = []
    while batch and (not rows or "out_of_memory" in rows[-1]):
        try:
            rows.append(attempt(batch))
        except torch.OutOfMemoryError:
            rows.append({"batch": batch, "out_of_memory": True})
        # Not in the handler: until it ends the error holds what was allocated.
        forget()
        batch //= 2
    return rows


def forget() -> None:
    """Frees graphs and memory of what ran before."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def compare(
    model: GatedModel,
    base: PreTrainedModel,
    config: CacheConfig,
    case: Case,
    steps: int,
    windows: int,
    tell: Callable[[dict[str, Any]], object],
    compiled: bool = True,
) -> list[dict[str, Any]]:
    """A row for ours and one or more for each of transformers' caches; ``tell`` gets each as it comes."""
    rows = [ours(model, config, case, windows, compiled)]
    tell(rows[-1])
    forget()
    for kind in CACHES:
        found = theirs(base, kind, case, steps, windows, compiled)
        for row in found:
            tell(row)
        rows += found
    return [{"context": case.context} | row for row in rows]


def run() -> None:
    options = parser("decoding many streams on a CUDA device", "gpu_batch")
    options.add_argument("--case", choices=CASES, help="one of them only (default: all)")
    options.add_argument("--windows", type=int, default=7, help="timed windows of each")
    options.add_argument("--steps", type=int, default=32, help="tokens of a window of transformers'")
    options.add_argument("--smoke", action="store_true", help="a tiny model on the CPU, not compiled, stores nothing")
    args = options.parse_args()
    if args.windows < 1 or args.steps < 1:
        raise ConfigError(f"--windows {args.windows} and --steps {args.steps}: both must be at least 1")
    if args.smoke:
        torch.set_num_threads(args.threads)
        own = {**SMALL, "head_dim": 24}
        small = random_model(model_config(MODEL, **own), "cpu")
        plain = plain_model(model_config(MODEL, **own), small)
        tiny = CacheConfig(16, 8, prefill_chunk=1)
        compare(small, plain, tiny, Case(3, 64), 2, 1, lambda row: print(row["cache"], "ran"), compiled=False)
        print("smoke run on the CPU, not compiled: no measurement, nothing stored")
        return
    require_cuda()
    config = CacheConfig(1024, 128, prefill_chunk=1)
    results = {"device": device_record(), "model": MODEL, "dtype": "bfloat16"}
    results |= {"budget": config.budget, "buffer": config.buffer, "attention": "sdpa", "cases": []}
    model = random_model(model_config(MODEL), "cuda")
    base = plain_model(model_config(MODEL), model)
    for name in [args.case] if args.case else CASES:
        case = CASES[name]
        print(f"batch {case.batch}, context {case.context}")
        for whose, number in case.published.items():
            print(f"published, not measured here: {number} tokens/s ({whose})")
        rows = compare(model, base, config, case, args.steps, args.windows, lambda row: print(row, flush=True))
        results["cases"].append({"case": name, "published_not_measured": case.published, "rows": rows})
    save(args.output, "gpu_batch", results)


if __name__ == "__main__":
    run_cli(run)
