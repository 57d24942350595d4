"""Decoding on CUDA through ONNX Runtime, beside the same artefacts on the CPU and, if a model is given, beside genai.

    python benchmarks/onnx_cuda.py                              # tiny: the same tokens, then times; minutes
    python benchmarks/onnx_cuda.py ARTEFACT ...                 # times of these too (onnx target, --quant fp16)
    python benchmarks/onnx_cuda.py --genai FOLDER               # what its builder made with -p fp16 -e cuda
    python benchmarks/onnx_cuda.py --smoke                      # on the CPU: says only that it runs, stores nothing

A step is one token from numpy ids to numpy logits, so what is copied counts. Tokens of ``tiny`` are chosen greedily on
both sides, each from its own past; with ``standard`` (float32) all have to be the same.
"""

from __future__ import annotations

import importlib.metadata
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
from common import exported, feed, median, parser, save

from trimkv_edge.cli.common import run_cli
from trimkv_edge.engine import Engine
from trimkv_edge.errors import TrimKVError, VerificationError
from trimkv_edge.runtime.artefact import Artefact
from trimkv_edge.runtime.engines import engine_class, engines_of
from trimkv_edge.runtime.engines.cuda_check import why_not
from trimkv_edge.runtime.engines.onnx_cuda import OnnxCudaEngine

sys.path.append(str(Path(__file__).parent / "peers"))

CASES = {"standard": dict(ops=("standard",)), "fp16": dict(quant="fp16")}
Open = Callable[..., Engine]


def opener(folder: Path, name: str, device: str, threads: int) -> Open:
    """Opens engine ``name`` of an artefact; where it is for CUDA, its code on ``device``."""
    artefact = Artefact.load(folder, verify=False)
    kind, target = engine_class(name, artefact.manifest.cache), engines_of(artefact.manifest)["onnx"]

    def open_(**settings: Any) -> Engine:
        if issubclass(kind, OnnxCudaEngine):
            settings["device"] = device
        return kind(folder, artefact.manifest, target, threads, **settings)

    return open_


def greedy(engine: Engine, prompt: list[int], count: int) -> list[int]:
    """What an engine chooses after ``prompt``, with all events on the way."""
    engine.reset()
    feed(engine, prompt[:-1])
    token, made = prompt[-1], []
    for _ in range(count):
        if engine.room == 0:
            engine.evict()
        token = int(engine.decode(token).argmax())
        made.append(token)
    return made


def pace(engine: Engine, steps: int) -> dict[str, Any]:
    """Medians over single steps and events from a full cache, in milliseconds."""
    rng = random.Random(0)
    engine.reset()
    feed(engine, rng.choices(range(engine.vocab_size), k=engine.config.slots))
    times: list[float] = []
    events: list[float] = []
    for turn, token in enumerate(rng.choices(range(engine.vocab_size), k=steps + engine.config.buffer)):
        begun = time.perf_counter()
        if engine.room == 0:
            engine.evict()
            events.append(time.perf_counter() - begun)
            begun = time.perf_counter()
        engine.decode(token)
        if turn >= engine.config.buffer:  # the first round warms up
            times.append(time.perf_counter() - begun)
    return {
        "ms_per_token": round(median(times) * 1e3, 4),
        "ms_per_event": round(median(events[1:] or events) * 1e3, 4),
        "steps": len(times),
        "events": len(events),
    }


def agreement(folder: Path, device: str, threads: int, count: int) -> dict[str, int]:
    """Tokens that CUDA and the CPU both choose."""
    rng = random.Random(1)
    engines = [opener(folder, name, device, threads)() for name in ("onnx", "onnx:cuda")]
    prompt = rng.choices(range(engines[0].vocab_size), k=2 * engines[0].config.slots)
    one, other = (greedy(engine, prompt, count) for engine in engines)
    return {"tokens": count, "same": sum(a == b for a, b in zip(one, other, strict=True))}


def measure(folder: Path, device: str, threads: int, steps: int) -> dict[str, Any]:
    """One row for each engine; on CUDA with and without CUDA graphs."""
    cuda = opener(folder, "onnx:cuda", device, threads)
    return {
        "onnx": pace(opener(folder, "onnx", device, threads)(), steps),
        "onnx:cuda": pace(cuda(), steps),
        "onnx:cuda without CUDA graphs": pace(cuda(capture=False), steps),
    }


def genai(folder: Path, steps: int, context: int) -> dict[str, Any]:
    """onnxruntime-genai at a context of as many entries, its whole cache."""
    from worker_genai import Model

    model = Model(folder, 1, context + steps + 1, {})
    model.feed(random.Random(0).choices(range(model.vocabulary), k=context))
    model.step()  # the first only chooses
    times = []
    for _ in range(steps):
        begun = time.perf_counter()
        model.step()
        times.append(time.perf_counter() - begun)
    return {"ms_per_token": round(median(times) * 1e3, 4), "context": context, **model.about()}


def run(args: Any) -> None:
    device = "cpu" if args.smoke else "cuda"
    if device == "cuda" and (missing := why_not(onnxruntime)):
        raise TrimKVError(f"this measures CUDA: {missing}; --smoke sees that it runs at all, and measures nothing")
    steps, count = (8, 24) if args.smoke else (args.steps, args.steps)
    results: dict[str, Any] = {"agreement": {}, "times": {}}
    for name, settings in CASES.items():
        with exported(targets=("onnx",), budget=str(args.budget), buffer=16, prefill_chunk=16, **settings) as folder:
            same = results["agreement"][name] = agreement(folder, device, args.threads, count)
            print(f"tiny {name}: {same['same']} of {same['tokens']} greedy tokens are those of the CPU", flush=True)
            if name == "standard" and same["same"] != same["tokens"]:
                raise VerificationError("float32 on CUDA chooses other tokens than on the CPU: nothing was stored")
            results["times"][f"tiny {name}"] = measure(folder, device, args.threads, steps)
    for folder in args.artefacts:
        results["times"][str(folder)] = measure(folder, device, args.threads, steps)
    if args.genai is not None:
        results["times"]["genai"] = genai(args.genai, steps, args.context)
    for name, rows in results["times"].items():
        print(name, rows, flush=True)
    if args.smoke:
        print("nothing was stored: this ran on the CPU")
        return
    results["versions"] = {"onnxruntime-gpu": importlib.metadata.version("onnxruntime-gpu")}
    results["device"] = device_name()
    save(args.output, "onnx_cuda", results)


def device_name() -> str:
    """The GPU, as its driver calls it."""
    import ctypes

    cuda, name = ctypes.CDLL("libcuda.so.1"), ctypes.create_string_buffer(256)
    cuda.cuInit(0)
    device = ctypes.c_int(0)
    cuda.cuDeviceGet(ctypes.byref(device), 0)
    cuda.cuDeviceGetName(name, 256, device)
    return name.value.decode()


def main(argv: list[str] | None = None) -> None:
    options = parser("decoding through ONNX Runtime on CUDA", "onnx_cuda")
    options.add_argument("artefacts", type=Path, nargs="*", metavar="ARTEFACT")
    options.add_argument("--budget", type=int, default=64, help="of tiny (default 64)")
    options.add_argument("--steps", type=int, default=512)
    options.add_argument("--genai", type=Path, metavar="FOLDER", help="a model of onnxruntime-genai-cuda")
    options.add_argument("--context", type=int, default=1024, help="entries of genai's cache (default 1024)")
    options.add_argument("--smoke", action="store_true", help="run its code on the CPU, store nothing")
    args = options.parse_args(argv)
    run_cli(lambda: run(args))


if __name__ == "__main__":
    main()
