"""What exporting costs: peak memory, time, size and load time of a model, target and scheme, beside what was predicted.

    python benchmarks/export_cost.py --model phi-3-mini --targets onnx --schemes int4
    python benchmarks/export_cost.py --model phi-3-mini llama-3.2-3b --targets onnx executorch --schemes int8 8da4w

Each export is the command itself in a process of its own, with seeded random weights (writing them counts, if they are
not there), everything included: loading, building, verifying, the model card. Memory is the process's largest resident
size, pages of mapped weight files included. Rows are added to those stored.
"""

from __future__ import annotations

import json
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import parser, processor, save

from trimkv_edge.budget import parse_size
from trimkv_edge.manifest import load_manifest

_SIZE = re.compile(r"^to export about (\S+ \S+) of memory(?:, (\S+ \S+) of disk)?(?:, (\d+) min)?", re.MULTILINE)
_LOAD = """
import sys, time, psutil
from pathlib import Path
from trimkv_edge.runtime.artefact import Artefact
from trimkv_edge.runtime.engines import load_engine
artefact = Artefact.load(Path(sys.argv[1]), verify=False)
before, started = psutil.Process().memory_info().rss, time.perf_counter()
engine = load_engine(artefact, sys.argv[2], int(sys.argv[3]))
engine.decode(5)
print(time.perf_counter() - started, psutil.Process().memory_info().rss)
"""


def export(command: list[str]) -> tuple[int, float, str]:
    """(peak resident bytes, seconds, output) of one command; its output is shown as it comes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    started = time.perf_counter()
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            print("   ", line.rstrip(), flush=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    if process.returncode or peak < before:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return 1024 * peak, time.perf_counter() - started, "".join(lines)


def measure(model: str, target: str, scheme: str, args: Any) -> dict[str, Any]:
    """One row of the table."""
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        output = Path(scratch) / "artefact"
        command = [sys.executable, "-m", "trimkv_edge.cli.export", "--model", model, "--random-weights"]
        command += ["--target", target, "--quant", scheme, "--budget", str(args.budget), "-o", str(output), "--restart"]
        if args.kv_dtype:
            command += ["--kv-dtype", args.kv_dtype]
        peak, seconds, text = export(command)
        manifest = load_manifest(output, verify_files=False)
        loaded = subprocess.run(
            [sys.executable, "-c", _LOAD, str(output), target, str(args.threads)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        if args.keep:
            shutil.copytree(output, args.keep / f"{model}-{target}-{scheme}-{args.budget}", dirs_exist_ok=True)
        size = sum(manifest.files[file].bytes for file in manifest.targets[target].files.values())
    found = _SIZE.search(text)
    predicted = parse_size(found[1].replace(" ", "")) if found else None
    return {
        "model": model,
        "parameters": manifest.model.parameters,
        "target": target,
        "scheme": scheme,
        "kv_dtype": manifest.cache.kv_dtype,
        "budget": args.budget,
        "processor": processor(),
        "peak_rss_bytes": peak,
        "predicted_peak_bytes": predicted,
        "peak_beyond_weights_bytes": peak - manifest.bytes.weights,
        "seconds": round(seconds, 1),
        "predicted_minutes": int(found[3]) if found and found[3] else None,
        "weight_bytes": manifest.bytes.weights,
        "file_bytes": size,
        "load_s": round(float(loaded[0]), 2),
        "run_rss_bytes": int(loaded[1]),
        "decode_ms": manifest.targets[target].speed.get("decode_ms"),
        "parity": manifest.targets[target].parity,
    }


def main() -> None:
    options = parser("cost of exporting", "export_cost")
    options.add_argument("--model", nargs="+", default=["phi-3-mini"])
    options.add_argument("--targets", nargs="+", default=["onnx"])
    options.add_argument("--schemes", nargs="+", default=["int4"])
    options.add_argument("--kv-dtype", help="default: the scheme's")
    options.add_argument("--budget", type=int, default=1024)
    options.add_argument("--scratch", type=Path, help="folder for the artefacts (default: the system's)")
    options.add_argument("--keep", type=Path, metavar="FOLDER", help="copy the artefacts into it")
    args = options.parse_args()
    rows: list[dict[str, Any]] = []
    if args.output.is_file():
        rows = json.loads(args.output.read_text(encoding="utf-8"))["results"]
    for model in args.model:
        for target in args.targets:
            for scheme in args.schemes:
                row = measure(model, target, scheme, args)
                key = ("model", "target", "scheme", "kv_dtype", "budget")
                rows = [old for old in rows if any(old[name] != row[name] for name in key)] + [row]
                print({name: value for name, value in row.items() if name != "parity"}, flush=True)
                save(args.output, "export_cost", rows)


if __name__ == "__main__":
    main()
