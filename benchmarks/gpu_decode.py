"""Decoding one stream on a CUDA device: share of the copy bandwidth, flat time and memory, what an event costs.

    python benchmarks/gpu_decode.py              # phi-3-mini's shape in bf16, random weights, M = 2048, B = 128
    python benchmarks/gpu_decode.py --smoke      # tiny, on the CPU, not compiled: says only that it runs

Two runs. The real one begins with an empty cache and reads every token that it draws, some thousand. The other compares
positions in turns: a cache of random entries is set to 2k or to 128k, as if the stream had been there, and goes on with
real tokens from that point; nothing in between is read. A window is B tokens and the event after them, each timed to
its end on the host, so launches and sampling count. Bytes of a step are the weights that it reads (gates included, the
embedding's rows not) and the live entries, on average over a window.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from common import median, parser, save
from gpu_common import device_copy_bandwidth, device_record, require_cuda
from torch import Tensor
from transformers import AutoConfig

from trimkv_edge.cli.common import run_cli
from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import ConfigError, VerificationError
from trimkv_edge.gpu.batch import Batch
from trimkv_edge.gpu.cache import BatchedCache
from trimkv_edge.gpu.placement import moved
from trimkv_edge.gpu.sampling import DeviceSampler
from trimkv_edge.models.gated import GatedModel
from trimkv_edge.models.gates import GateShape, random_gates
from trimkv_edge.models.registry import MODELS, family_of
from trimkv_edge.models.rope import fix_rope
from trimkv_edge.models.skeleton import skeleton
from trimkv_edge.runtime.sampling import SamplingParams

MODEL = "phi-3-mini"
POSITIONS = (2048, 131072)
# Windows that record CUDA graphs and fill the allocator's lists.
WARM_UPS = 2
# Of a named model, to see that the benchmark runs; its LongRoPE tables would not fit the narrower heads.
SMOKE_MODEL = "phi-3-mini-4k"
SMALL = dict(
    hidden_size=48,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    vocab_size=64,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=2,
)


def model_config(name: str, **other: Any) -> Any:
    """transformers' configuration of a named model, some fields replaced."""
    return AutoConfig.for_model(MODELS[name].family, **MODELS[name].fields(**other))


def random_model(config: Any, device: str, seed: int = 0) -> GatedModel:
    """A gated model in bf16 whose weights are drawn on the device: norms 1, biases 0, the rest normal."""
    base = skeleton(config)
    fix_rope(base)
    shape = GateShape.of(config)
    width = min(family_of(config.model_type).gate_intermediate_size, shape.hidden_size)
    hollow = GatedModel(base, random_gates("rg", shape, width, seed))
    own = {id(parameter) for gate in hollow.gates for parameter in gate.parameters()}
    generator = torch.Generator(device).manual_seed(seed)

    def drawn(name: str) -> Tensor:
        parameter = hollow.get_parameter(name)
        if id(parameter) in own:
            return parameter.detach()
        tensor = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
        if tensor.dim() == 1:
            return tensor.fill_(0.0 if name.endswith(".bias") else 1.0)
        return tensor.normal_(std=config.initializer_range, generator=generator)

    return moved(hollow, device, torch.bfloat16, drawn)


def weight_bytes(model: GatedModel) -> tuple[int, int]:
    """Bytes of the weights that a step reads: of the model, and of its gates."""
    gates = {id(part): part.nbytes for gate in model.gates for part in gate.parameters()}
    others = {id(part): part.nbytes for part in model.parameters() if id(part) not in gates}
    embedding = model.base.get_input_embeddings().weight
    if embedding is not model.base.get_output_embeddings().weight:
        del others[id(embedding)]
    return sum(others.values()), sum(gates.values())


def live_bytes(cache: BatchedCache) -> float:
    """Keys and values that a step reads, on average over the B tokens of a window."""
    layers, batch, heads, _, width = cache.key.shape
    live = cache.config.budget + (cache.config.buffer + 1) / 2
    return 2 * layers * batch * heads * live * width * cache.key.element_size()


def fill(cache: BatchedCache, seed: int = 0) -> None:
    """Random keys and values in all slots."""
    generator = torch.Generator(cache.key.device).manual_seed(seed)
    for table in (cache.key, cache.value):
        table.normal_(generator=generator)


def place(batch: Batch, position: int) -> None:
    """Sets every stream to ``position``, the kept entries spread evenly over it; events of a batch fall in turns.

    Keys and values stay as they are. Kept entries have lived through their age, so the further back one lies, the
    longer its retention.

    Raises:
        ConfigError: the stream would not have had its first event, or none just now.
    """
    cache = batch.graphs.cache
    budget, buffer, size = cache.config.budget, cache.config.buffer, cache.batch
    if position < budget or (position - budget) % buffer:
        raise ConfigError(
            f"position {position} is not one where an event has left {budget} entries: it must be that many and a "
            f"multiple of {buffer} more"
        )
    kept = torch.arange(budget, device=cache.positions.device) * position // budget
    cache.positions.copy_(kept.expand_as(cache.positions))
    generator = torch.Generator(kept.device).manual_seed(position)
    cache.log_beta.exponential_(generator=generator).neg_()
    cache.log_beta[..., :budget] /= position - kept
    cache.log_beta[..., budget:] /= buffer
    for row, stream in enumerate(batch.streams):
        ahead = row * buffer // size
        stream.seen, stream.live = position + ahead, budget + ahead


@dataclass(frozen=True)
class Window:
    """Seconds of B tokens of one stream and of the event after them, and the rows that it moved per head."""

    tokens: float
    event: float
    moved: float


def window(batch: Batch, draw: DeviceSampler) -> Window:
    """Of a batch of one stream with M live entries.

    Raises:
        VerificationError: the model computes no numbers.
    """
    cache = batch.graphs.cache
    synchronise(batch)
    started = time.perf_counter()
    batch.decode(cache.config.buffer, draw).tokens()
    read = time.perf_counter()
    before = cache.positions.clone()
    synchronise(batch)
    due = time.perf_counter()
    batch.evict()
    synchronise(batch)
    ended = time.perf_counter()
    if not batch.graphs.logits.isfinite().all():
        raise VerificationError("the model's logits are not finite, so nothing it measures counts")
    heads = before[..., 0].numel()
    return Window(read - started, ended - due, int((cache.positions != before).sum()) / heads)


def synchronise(batch: Batch) -> None:
    """Waits for the device."""
    if batch.device.type == "cuda":
        torch.cuda.synchronize()


def memory() -> tuple[int, int]:
    """Bytes that torch has allocated and reserved on the device."""
    return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()


def spread(notes: Sequence[tuple[int, int]]) -> dict[str, int]:
    """Of notes of :func:`memory`: the first, and the largest difference from it."""
    first = notes[0]
    off = [max(abs(note[kind] - first[kind]) for note in notes) for kind in range(2)]
    names = ("allocated", "reserved")
    held = {f"{name}_bytes": size for name, size in zip(names, first, strict=True)}
    return held | {f"{name}_changed_by": size for name, size in zip(names, off, strict=True)}


def speed(windows: Sequence[Window], buffer: int, step_bytes: float, copy: float) -> dict[str, Any]:
    """Medians of windows of ``buffer`` tokens; ``copy`` in GB/s."""
    step, event = (median(times) for times in ([w.tokens / buffer for w in windows], [w.event for w in windows]))
    achieved = step_bytes / step / 1e9
    return {
        "windows": len(windows),
        "ms_per_token": round(step * 1e3, 4),
        "gb_per_s": round(achieved, 1),
        "of_copy": round(achieved / copy, 4),
        "us_per_event": round(event * 1e6, 1),
        "event_share": round(median(w.event / (w.event + w.tokens) for w in windows), 5),
        "moved_per_head": round(median(w.moved for w in windows), 1),
    }


def ratio(pairs: Sequence[tuple[Window, Window]]) -> float:
    """Speed of each pair's second window against its first, the median."""
    return round(median(first.tokens / second.tokens for first, second in pairs), 4)


def real(batch: Batch, draw: DeviceSampler, count: int) -> tuple[list[Window], list[tuple[int, int]]]:
    """From an empty cache: fills it token by token, then ``count`` windows; with the memory after each."""
    config, stream = batch.graphs.cache.config, batch.streams[0]
    stream.reset()
    batch.read({0: [1]})
    batch.decode(config.budget - 1, draw).tokens()
    for _ in range(WARM_UPS):
        window(batch, draw)
    windows, notes = [], [memory()]
    for _ in range(count):
        windows.append(window(batch, draw))
        notes.append(memory())
    return windows, notes


def placed(batch: Batch, draw: DeviceSampler, positions: tuple[int, int], count: int) -> list[tuple[Window, Window]]:
    """A window at each of two positions, in turns."""
    fill(batch.graphs.cache)
    pairs = []
    for _ in range(WARM_UPS + count):
        found = []
        for position in positions:
            place(batch, position)
            found.append(window(batch, draw))
        pairs.append((found[0], found[1]))
    return pairs[WARM_UPS:]


def measure(
    model: GatedModel,
    config: CacheConfig,
    positions: tuple[int, int],
    counts: tuple[int, int],
    copy: float,
    compiled: bool = True,
) -> dict[str, Any]:
    """Both runs; ``counts``: windows of the real one, pairs of the other."""
    batch = Batch(model, config, 1, compiled=compiled)
    batch.graphs.warm_up()
    draw = DeviceSampler(SamplingParams(temperature=1.0, seed=0), batch.device)
    weights, gates = weight_bytes(model)
    live = live_bytes(batch.graphs.cache)
    size = weights + gates + live
    windows, notes = real(batch, draw, counts[0])
    first, last = (batch.streams[0].seen - back * config.buffer for back in (counts[0], 0))
    pairs = placed(batch, draw, positions, counts[1])
    rows = [
        {"position": position} | speed([pair[side] for pair in pairs], config.buffer, size, copy)
        for side, position in enumerate(positions)
    ]
    return {
        "bytes_per_step": {"weights": weights, "gates": gates, "live_entries": round(live), "all": round(size)},
        "real": {"positions": [first, last]} | speed(windows, config.buffer, size, copy),
        "memory": {"steps": last - first} | spread(notes),
        "placed": rows,
        "speed_at_last_of_first": ratio(pairs),
    }


def run() -> None:
    options = parser("decoding one stream on a CUDA device", "gpu_decode")
    options.add_argument("--windows", type=int, default=32, help="of the real run, 128 tokens each")
    options.add_argument("--pairs", type=int, default=12, help="windows at each of the two positions")
    options.add_argument("--smoke", action="store_true", help="a tiny model on the CPU, not compiled, stores nothing")
    args = options.parse_args()
    if args.windows < 1 or args.pairs < 1:
        raise ConfigError(f"--windows {args.windows} and --pairs {args.pairs}: both must be at least 1")
    if args.smoke:
        torch.set_num_threads(args.threads)
        small = random_model(model_config(SMOKE_MODEL, **SMALL), "cpu")
        found = measure(small, CacheConfig(16, 8, prefill_chunk=1), (16, 1024), (2, 1), 1.0, compiled=False)
        print(*(f"{name} ran" for name in found), sep="\n")
        print("smoke run on the CPU, not compiled: no measurement, nothing stored")
        return
    require_cuda()
    copy = device_copy_bandwidth()
    torch.cuda.empty_cache()  # what is reserved from here on is what decoding needs
    config = CacheConfig(2048, 128, prefill_chunk=1)
    results = {"device": device_record(), "copy_gb_per_s": round(copy, 1), "model": MODEL, "dtype": "bfloat16"}
    results |= {"batch": 1, "budget": config.budget, "buffer": config.buffer}
    model = random_model(model_config(MODEL), "cuda")
    results |= measure(model, config, POSITIONS, (args.windows, args.pairs), copy)
    for name, found in results.items():
        print(name, found)
    save(args.output, "gpu_decode", results)


if __name__ == "__main__":
    run_cli(run)
