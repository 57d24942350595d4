"""All engines over one stream: what each keeps at every event and its greedy token after every call, beside eager's.

    python benchmarks/engines_agree.py onnx executorch host-evicted     # others: --help; a minute each, tosa 10 or more

Each engine reads the same 2,000 tokens of held-out text with ``tiny`` and its gates ``rg``: in chunks until the cache
is full, then one by one, always from its own past. Engines need different environments, so each run replaces its own
rows of the results and leaves the others. The eager model is run each time; rows of another reference are refused.
"""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import exported, open_engine, parser, read_stream, save, shared

from trimkv_edge.config import CacheConfig
from trimkv_edge.engine import Engine, IntArray
from trimkv_edge.models.eager import eager_engine
from trimkv_edge.models.tiny.data import random_text
from trimkv_edge.models.tiny.evaluate import load

BUDGET, BUFFER, TOKENS, GATES = 224, 32, 2000, "rg"
WEB = Path(__file__).parents[1] / "examples" / "web"
SCRIPT = Path(__file__).with_suffix(".js")
CHROMIUM = "/usr/bin/chromium"


@dataclass(frozen=True)
class Made:
    """What an engine did: kept positions ``[events, layers * kv_heads, budget]``, and the greedy token of each call."""

    kept: IntArray
    greedy: IntArray

    def digest(self) -> str:
        """SHA-256 of both."""
        return hashlib.sha256(np.sort(self.kept).tobytes() + self.greedy.tobytes()).hexdigest()


@dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
        target, ops: exported.
        run: ``(artefact, tokens, threads)`` -> what it did.
        packages: whose versions are noted, as pip names them.
        where: what the engine ran in.
    """

    target: str
    ops: str
    run: Callable[[Path, list[int], int], Made]
    packages: tuple[str, ...]
    where: str


def read(engine: Engine, text: list[int]) -> Made:
    """What an engine of this package does."""
    logits, kept = read_stream(engine, text)
    rows = engine.num_layers * engine.num_kv_heads
    return Made(np.stack(kept).reshape(len(kept), rows, -1), np.stack(logits).argmax(-1))


def with_engine(name: str) -> Callable[[Path, list[int], int], Made]:
    """Runs an engine of this package."""
    return lambda folder, text, threads: read(open_engine(folder, name, threads), text)


def in_node(folder: Path, text: list[int], threads: int) -> Made:
    """``examples/web`` over onnxruntime-web's WebAssembly, in Node."""
    stream = folder / "stream.json"
    stream.write_text(json.dumps(text))
    done = subprocess.run(
        ["node", str(SCRIPT), str(folder), str(stream)], cwd=WEB, check=True, capture_output=True, text=True
    )
    return from_json(json.loads(done.stdout))


def in_chromium(folder: Path, text: list[int], threads: int) -> Made:
    """The same in a page."""
    from playwright.sync_api import sync_playwright

    server = subprocess.Popen(["node", "serve.js", str(folder), "0"], cwd=WEB, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        address = server.stdout.readline().strip()
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
            page = browser.new_page()
            page.route("**/engines_agree.js", lambda route: route.fulfill(path=str(SCRIPT)))
            page.goto(address)
            made = page.evaluate(
                """async (tokens) => {
                  const { read } = await import("/engines_agree.js"), { Session } = await import("/session.js");
                  const load = async (name) => new Uint8Array(await (await fetch(`/artefact/${name}`)).arrayBuffer());
                  return read(await Session.open(await import("onnxruntime-web/wasm"), load), tokens);
                }""",
                text,
            )
            browser.close()
    finally:
        server.terminate()
        server.wait()
    return from_json(made)


def from_json(made: dict[str, Any]) -> Made:
    return Made(np.asarray(made["kept"], np.int64), np.asarray(made["greedy"], np.int64))


_ORT, _QNN = ("onnxruntime",), ("onnxruntime", "onnxruntime-qnn")
CASES = {
    "onnx": Case("onnx", "gqa", with_engine("onnx"), _ORT, "ONNX Runtime, CPU"),
    "onnx-standard": Case("onnx", "standard", with_engine("onnx"), _ORT, "ONNX Runtime, CPU"),
    "executorch": Case("executorch", "xnnpack", with_engine("executorch"), ("executorch",), "ExecuTorch, CPU"),
    "executorch-portable": Case(
        "executorch", "portable", with_engine("executorch"), ("executorch",), "ExecuTorch, CPU"
    ),
    "torch": Case("torch", "compiled", with_engine("torch"), ("torch",), "torch.compile, CPU"),
    "host-evicted": Case("host-evicted", "rows", with_engine("host-evicted"), _ORT, "ONNX Runtime, CPU"),
    "node": Case("host-evicted", "rows", in_node, (), "onnxruntime-web (WebAssembly) in Node"),
    "chromium": Case("host-evicted", "rows", in_chromium, (), "onnxruntime-web (WebAssembly) in Chromium"),
    "litert": Case("litert", "fp32", with_engine("litert"), ("ai-edge-litert",), "LiteRT's interpreter, CPU"),
    "tosa": Case("tosa", "fp32", with_engine("tosa"), ("tosa-tools",), "Arm's reference model of TOSA"),
    **{
        f"hexagon-{ops}": Case("npu:hexagon", ops, with_engine("qnn-emulator"), _QNN, "Qualcomm's emulator of the HTP")
        for ops in ("fp16", "a16w8")
    },
}


def versions(name: str) -> dict[str, str]:
    """Of the packages that make a row's numbers."""
    found = {package: version(package) for package in CASES[name].packages}
    if name in ("node", "chromium"):
        packed = json.loads((WEB / "package.json").read_text())["dependencies"]
        found["onnxruntime-web"] = packed["onnxruntime-web"]
        command = "node" if name == "node" else CHROMIUM
        told = subprocess.run([command, "--version"], check=True, capture_output=True, text=True).stdout
        found[name] = next(word for word in told.split() if word.lstrip("v")[:1].isdigit()).lstrip("v")
    return found


def compare(want: Made, got: Made) -> dict[str, int]:
    """Counts of survivors and greedy tokens, and how many of them are the reference's.

    Raises:
        ValueError: another number of events or calls.
    """
    if want.kept.shape != got.kept.shape or want.greedy.shape != got.greedy.shape:
        raise ValueError(f"{got.kept.shape} and {got.greedy.shape}, but the reference has {want.kept.shape}")
    return {
        "survivors": want.kept.size,
        "survivors_same": shared(want.kept, got.kept),
        "greedy": want.greedy.size,
        "greedy_same": int((want.greedy == got.greedy).sum()),
    }


def stored_rows(path: Path, digest: str) -> list[dict[str, Any]]:
    """Rows of earlier runs.

    Raises:
        SystemExit: they were compared with another reference.
    """
    if not path.is_file():
        return []
    found = json.loads(path.read_text())["results"]
    if found["reference"]["sha256"] != digest:
        raise SystemExit(f"{path} was measured against another reference: remove it and run all engines again")
    rows: list[dict[str, Any]] = found["rows"]
    return rows


def main() -> None:
    options = parser("survivors and greedy tokens of all engines over one stream", "engines_agree")
    options.add_argument("engines", nargs="+", choices=list(CASES))
    options.add_argument("--tokens", type=int, default=TOKENS)
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    text = random_text(random.Random(20261128), args.tokens, held_out=True)
    config = CacheConfig(BUDGET, BUFFER, BUFFER)
    want = read(eager_engine(load(GATES), config, 2**24), text)
    reference = {
        "model": "tiny",
        "gates": GATES,
        "cache": asdict(config),
        "tokens": len(text),
        "events": len(want.kept),
        "sha256": want.digest(),
        "torch": version("torch"),
    }
    for name in args.engines:
        case = CASES[name]
        settings = dict(budget=str(BUDGET), buffer=BUFFER, prefill_chunk=BUFFER, gates=GATES)
        with exported(targets=(case.target,), ops=(case.ops,), **settings) as folder:
            begun = time.perf_counter()
            got = case.run(folder, text, args.threads)
        row = {
            "engine": name,
            "target": case.target,
            "precision": case.ops,
            "where": case.where,
            **compare(want, got),
            "seconds": round(time.perf_counter() - begun, 1),
            "versions": versions(name),
        }
        print(row, flush=True)
        rows = {old["engine"]: old for old in stored_rows(args.output, want.digest())} | {name: row}
        save(
            args.output, "engines_agree", {"reference": reference, "rows": [rows[key] for key in CASES if key in rows]}
        )


if __name__ == "__main__":
    main()
