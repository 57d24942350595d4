"""Memory of one gate-training step against the length of the row: it must grow with the tokens, not with their square.

    python benchmarks/training_memory.py                                    # small model on the CPU, a few minutes
    python benchmarks/training_memory.py --device cuda --model qwen3-0.6b --dtype bfloat16

A step is the vanilla pass, the gated pass, the three losses, and the gradient of the gates. Each length runs in a
process of its own. On the CPU the peak is resident memory above that before the step, on CUDA what the allocator peaked
at. ``dense`` is the same step with the decay as one T x T matrix per head.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
import time
from typing import Any

from common import parser, rss, save

KIB = 2**10


def build(model: str, device: str, dtype: str, checkpointing: bool) -> Any:
    """A training module with random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from trimkv_edge.models.gated import GatedModel
    from trimkv_edge.models.registry import MODELS
    from trimkv_edge.retention import build_gates
    from trimkv_edge.training.config import TrainConfig
    from trimkv_edge.training.module import GateModule

    torch.manual_seed(0)
    if model == "small":
        shape = dict(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            max_position_embeddings=65536,
        )
        config = AutoConfig.for_model("qwen3", **shape)
    else:
        config = AutoConfig.for_model(MODELS[model].family, **MODELS[model].fields())
    base = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    width = min(512, config.hidden_size)
    gates = build_gates(
        "rg", config.num_hidden_layers, config.hidden_size, config.num_key_value_heads, width, config.hidden_act
    )
    gated = GatedModel(base, gates)
    settings = TrainConfig(
        kind="rg",
        memory=256,
        length=1024,
        steps=1,
        intermediate_size=width,
        dtype=dtype,
        gradient_checkpointing=checkpointing,
    )
    return GateModule(gated.base, gates, settings).to(device), config.vocab_size


def dense_attention(query: Any, key: Any, value: Any, log_beta: Any, index: Any, scale: float) -> Any:
    """The decay as a T x T bias, for comparison."""
    import torch

    groups = query.shape[1] // key.shape[1]
    age = (index[:, :, None] - index[:, None, :])[:, None].float()
    bias = log_beta.transpose(1, 2)[:, :, None, :] * age.clamp(min=0)
    bias = bias.masked_fill(age < 0, -1e30).repeat_interleave(groups, 1)
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, bias, scale=scale)
    return out.transpose(1, 2)


class PeakMemory(threading.Thread):
    """Largest resident memory of this process while it runs, in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = self.start_bytes = rss()
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.wait(0.005):
            self.peak = max(self.peak, rss())

    def stop(self) -> int:
        self._done.set()
        self.join()
        return self.peak - self.start_bytes


def step(length: int, form: str, model: str, device: str, dtype: str) -> dict[str, Any]:
    """One step in this process."""
    import torch

    from trimkv_edge.training import backends

    if form == "dense":
        backends.decayed_attention = dense_attention
    torch.set_num_threads(2)
    module, vocab = build(model, device, dtype, checkpointing=True)
    if device == "cuda":
        base = module.base.to(device)
        assert next(base.parameters()).is_cuda
    batch = {
        "input_ids": torch.randint(0, vocab, (1, length), device=device),
        "index": torch.arange(length, device=device)[None],
        "weight": torch.ones(1, length, device=device),
        "skips": torch.zeros(1, 4, dtype=torch.int64, device=device),
        "held": torch.tensor([length], device=device),
    }
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    watch = PeakMemory()
    watch.start()
    started = time.perf_counter()
    losses = module(**batch)
    (losses["ce"] / length + losses["kl"] / length + losses["capacity"]).backward()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    peak = watch.stop()
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated() - before
    return {"form": form, "tokens": length, "peak_bytes": peak, "seconds": round(seconds, 2)}


def main() -> None:
    options = parser("memory of a training step", "training_memory")
    options.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192, 16384, 32768])
    options.add_argument("--dense-up-to", type=int, default=8192, help="longest row of the dense form")
    options.add_argument("--model", default="small", help="small, or a name of the registry (random weights)")
    options.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options.add_argument("--one", nargs=2, metavar=("FORM", "T"), help="run one step and print JSON (internal)")
    args = options.parse_args()
    if args.one:
        print(json.dumps(step(int(args.one[1]), args.one[0], args.model, args.device, args.dtype)))
        return
    results = []
    print(f"{'form':<10} {'tokens':>7} {'peak MiB':>9} {'KiB/token':>10} {'seconds':>8}")
    for form in ("blockwise", "dense") if args.device == "cpu" else ("flex",):
        for length in args.lengths:
            if form == "dense" and length > args.dense_up_to:
                continue
            command = [sys.executable, __file__, "--one", form, str(length)]
            command += ["--model", args.model, "--device", args.device, "--dtype", args.dtype]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            record = json.loads(done.stdout.splitlines()[-1])
            results.append(record)
            peak = record["peak_bytes"]
            line = f"{form:<10} {length:>7} {peak / 2**20:>9.1f} {peak / KIB / length:>10.2f} {record['seconds']:>8.1f}"
            print(line, flush=True)
    for form in dict.fromkeys(record["form"] for record in results):
        own = [record for record in results if record["form"] == form]
        if len(own) > 1:
            first, last = own[0], own[-1]
            growth = math.log(last["peak_bytes"] / first["peak_bytes"]) / math.log(last["tokens"] / first["tokens"])
            print(f"{form}: memory grows as tokens^{growth:.2f} from {first['tokens']} to {last['tokens']}")
    save(
        args.output,
        "training_memory",
        {"model": args.model, "device": args.device, "dtype": args.dtype, "steps": results},
    )


if __name__ == "__main__":
    main()
