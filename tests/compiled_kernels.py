"""Compiles kernels for a CUDA device that need not be there, as a launch would: ``python compiled_kernels.py``.

Run by itself, since Triton decides when it is imported whether kernels are compiled or interpreted. Prints JSON: for
each kernel and setting, spilled bytes and bytes of shared memory.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from trimkv_edge.gpu.kernels.attend import _attend_split, _combine, shares_of
from trimkv_edge.gpu.kernels.evict import _evict, warps_of

PTXAS = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
TYPES = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}


def compiled(
    kernel: Any, arch: int, pointers: dict[str, str], constants: dict[str, Any], warps: int, stages: int = 2
) -> dict[str, int]:
    """Integers that are not constants count as multiples of 16, like addresses: so they are at the sizes of models."""
    signature = dict.fromkeys(kernel.arg_names, "i32") | pointers | dict.fromkeys(constants, "constexpr")
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name] not in ("constexpr", "fp32")
    }
    source = ASTSource(kernel, signature, constants, aligned)
    result = triton.compile(
        source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps, "num_stages": stages}
    )
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernel.ptx"
        ptx.write_text(result.asm["ptx"])
        suffix = "a" if arch >= 90 else ""
        command = [str(PTXAS), "-v", f"-arch=sm_{arch}{suffix}", str(ptx), "-o", f"{folder}/kernel.cubin"]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    spilled = re.search(r"(\d+) bytes spill stores", said)
    assert spilled is not None, said
    return {"spilled": int(spilled[1]), "shared": result.metadata.shared}


def evictions(arch: int) -> dict[str, dict[str, int]]:
    """Budgets of 1 to 8,192 entries; a batch of one, and of a head alone."""
    results = {}
    for kept, ring, ones in ((2048, 128, ("batch",)), (1, 1, ("batch", "heads", "budget", "buffer")), (8192, 256, ())):
        pointers = dict(key="*bf16", value="*bf16", log_beta="*fp32", positions="*i64", seen_of="*i64", due="*i1")
        constants = dict(KEPT=kept, RING=ring, WIDTH=128, ROWS=16) | dict.fromkeys(ones, 1)
        results[f"evict {kept}"] = compiled(_evict, arch, pointers | {"moves": "*i32"}, constants, warps_of(kept))
    return results


def attentions(arch: int) -> dict[str, dict[str, int]]:
    """One token and a chunk, every dtype, a static cache and a pool, one query head per KV head and several."""
    results = {}
    for (name, pointer), pool, count, group in product(TYPES.items(), (False, True), (1, 128), (1, 3)):
        if pool and count > 1:
            continue
        pointers = dict(query=pointer, key=pointer, value=pointer, start="*i64", length="*i64")
        pointers |= dict(partial="*fp32", weight="*fp32", scale="fp32")
        shares = shares_of(name)
        queries = 16 if count == 1 else shares.queries
        constants = dict(POOL=pool, GROUP=group, QUERIES=queries, BLOCK=shares.block, WIDTH=128, WORK=getattr(tl, name))
        # A launch makes constants of integers that are 1.
        constants |= {"count": 1, "splits": 1, "kv_heads": 1} if count == 1 and group == 3 else {}
        case = f"attend {name} {'pool' if pool else 'cache'} T={count} group={group}"
        results[case] = compiled(_attend_split, arch, pointers, constants, shares.warps, shares.stages)
    for name, pointer in TYPES.items():
        pointers = {"partial": "*fp32", "weight": "*fp32", "out": pointer}
        results[f"combine {name}"] = compiled(_combine, arch, pointers, dict(GROUP=1, SPLITS=32, WIDTH=128), 4)
    return results


if __name__ == "__main__":
    architecture = int(sys.argv[1])
    print(json.dumps(evictions(architecture) | attentions(architecture)))
