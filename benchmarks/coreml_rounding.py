"""What rounding costs in ``npu:coreml``'s graphs: run in torch before CoreML gets them, on tiny with its trained gates.

    python benchmarks/coreml_rounding.py        # 5 min

Weights and inputs of layers are rounded as they will be; everything else is float32 here and float16 there. The text,
and what the columns mean, are those of ``npu_accuracy.py``.
"""

from __future__ import annotations

import random
from copy import deepcopy
from typing import Any

import torch
from common import parser, save
from npu_accuracy import BUFFER, perplexity, read, share

from trimkv_edge.config import CacheConfig
from trimkv_edge.export.backends.calibration import TorchHost
from trimkv_edge.export.backends.coreml import round_linears
from trimkv_edge.export.backends.coreml_quantize import quantized
from trimkv_edge.export.backends.lowering import traced
from trimkv_edge.export.host_evicted import HostEvicted
from trimkv_edge.export.host_files import chunks
from trimkv_edge.models.eager import eager_engine
from trimkv_edge.models.gated import GatedModel
from trimkv_edge.models.tiny.data import random_text
from trimkv_edge.models.tiny.evaluate import load


def rounded(model: GatedModel, precision: str, config: CacheConfig, tokens: list[int]) -> TorchHost:
    """The graphs of a precision with their host; ``tokens``: for ranges."""
    module, counts = HostEvicted(deepcopy(model)), chunks(config)
    if precision == "8a8w":
        programs = quantized(module, config, counts, tokens)
    else:
        if precision == "c4w":
            round_linears(module)
        programs = {name: traced(module, config, count) for name, count in counts.items()}
    return TorchHost(HostEvicted(model), {count: programs[name].module() for name, count in counts.items()}, config)


def main() -> None:
    options = parser("rounding of npu:coreml on tiny", "coreml_rounding")
    options.add_argument("--precisions", nargs="+", default=["c4w", "8a8w"], help="also: fp16, here float32")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    rng = random.Random(20261128)
    text, config = random_text(rng, 1104, held_out=True), CacheConfig(224, BUFFER, BUFFER)
    ranges = random_text(rng, config.slots + 3 * BUFFER)
    model = load("rg")
    logits, kept = read(eager_engine(model, config, 2**24), text)
    results: list[dict[str, Any]] = []
    for precision in args.precisions:
        found, survivors = read(rounded(model, precision, config, ranges), text)  # type: ignore[arg-type]
        results.append(
            {
                "precision": precision,
                "tokens": len(text),
                "events": len(kept),
                "survivors_own": round(share(kept, survivors), 5),
                "greedy": round(float((logits.argmax(-1) == found.argmax(-1)).mean()), 5),
                "greedy_calls": len(logits),
                "perplexity": round(perplexity(found, text), 4),
                "perplexity_float32": round(perplexity(logits, text), 4),
            }
        )
        print(results[-1], flush=True)
    save(args.output, "coreml_rounding", results)


if __name__ == "__main__":
    main()
