"""Oracle = eager = ExecuTorch = ONNX Runtime: the same survivors and greedy tokens over a long stream.

    python benchmarks/parity.py               # about 15 minutes

``tiny`` with both gate kinds, and small random Phi-3, Qwen3 and Llama models with both operator sets; budgets for each
head, and shared ones with calibrated caps. The oracle keeps Python lists and attends in float64
(``tests/oracle_model.py``). Two entries at the edge of the budget whose scores agree to 2e-5 relatively cannot be
ranked in float32; if an engine swaps such a pair it is counted as undecidable, as in the verification of exports, and
the engine goes on from the eager state.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from common import open_engine, parser, save

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from factories import base_config
from oracle_model import OracleModel

from trimkv_edge.export.pipeline import ExportRequest, plan_export, run_export
from trimkv_edge.export.verify import compare_survivors, load_tolerance
from trimkv_edge.models.eager import TorchEngine, eager_engine
from trimkv_edge.models.loading import load_model

CASES = {
    "tiny rg": dict(model="tiny", gates="rg"),
    "tiny rg10": dict(model="tiny", gates="rg10"),
    "random qwen3": dict(case="qwen3-gqa", gates="rg"),
    "random llama": dict(case="llama-gqa", gates="rg10"),
    "random phi3": dict(case="phi3-mha", gates="rg"),
    "random phi3 longrope": dict(case="phi3-longrope", gates="rg10"),
    "tiny global": dict(model="tiny", gates="rg10", policy="global"),
    "tiny layer, floor": dict(model="tiny", gates="rg10", policy="layer", min_per_head=24),
    "random qwen3 global": dict(case="qwen3-gqa", gates="rg10", policy="global"),
    "random phi3 global": dict(case="phi3-mha", gates="rg10", policy="global"),
}
OPS = {"fast": ("xnnpack", "gqa"), "portable": ("portable", "standard")}


def sample(folder: Path, engine: TorchEngine, count: int) -> list[int]:
    """Real text for a model with a tokenizer, seeded tokens for one without."""
    if (folder / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        text = "".join(path.read_text() for path in sorted(Path(np.__file__).parent.glob("*.py")))
        return list(Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text[: 8 * count]).ids[:count])
    return np.random.default_rng(0).integers(3, engine.vocab_size, count).tolist()


def run_case(name: str, settings: dict[str, Any], ops: str, tokens: int) -> dict[str, Any]:
    """Half of the stream in odd chunks, half decoded greedily; all four side by side."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        request: dict[str, Any] = dict(budget="96", buffer=64, prefill_chunk=64, ops=OPS[ops], **settings)
        if case := request.pop("case", None):
            base_config(case).save_pretrained(work / "model")
            request.update(model=str(work / "model"), random_weights=True)
        plan = plan_export(ExportRequest(output=work / "artefact", **request))
        config = run_export(plan, lambda line: None).cache
        loaded = load_model(plan.source, settings["gates"])
        eager = eager_engine(loaded.model, config)
        oracle = OracleModel(loaded.model, config)
        engines = {engine: open_engine(work / "artefact", engine, 1) for engine in ("executorch", "onnx")}
        text = sample(work / "artefact", eager, tokens // 2)
        return {"case": name, "ops": ops, **compare_all(eager, oracle, engines, text, tokens)}


def compare_all(
    eager: TorchEngine, oracle: OracleModel, engines: dict[str, Any], text: list[int], tokens: int
) -> dict[str, Any]:
    """Counts differences to the eager engine."""
    empty = {"survivors": 0, "undecidable": 0, "greedy": 0, "max_logit_diff": 0.0}
    faults = {who: dict(empty) for who in ("oracle", *engines)}
    score_rel = load_tolerance("float32").score_rel
    events, steps, greedy = 0, 0, 0
    while eager.seen < tokens:
        size = min([64, 21, 40][steps % 3], eager.room, max(1, len(text) - eager.seen))
        ids = text[eager.seen : eager.seen + size] or [greedy]
        want = eager.prefill(ids)
        got = {"oracle": oracle.read(ids)} | {who: engine.prefill(ids) for who, engine in engines.items()}
        greedy, steps = int(want.argmax()), steps + 1
        for who, logits in got.items():
            faults[who]["greedy"] += int(logits.argmax() != greedy)
            faults[who]["max_logit_diff"] = max(faults[who]["max_logit_diff"], float(np.abs(logits - want).max()))
        if eager.room == 0:
            before = eager.state()
            eager.evict()
            events += 1
            held = {"oracle": oracle.positions()}
            for who, engine in engines.items():
                engine.evict()
                held[who] = engine.survivors()
            for who, kept in held.items():
                wrong, undecidable = compare_survivors(before, eager.config, eager.survivors(), kept, score_rel)
                faults[who]["survivors"] += wrong
                faults[who]["undecidable"] += undecidable
                if undecidable and who in engines:
                    engines[who].load_state(eager.state())
    return {"tokens": eager.seen, "steps": steps, "events": events, "differences": faults}


def main() -> None:
    options = parser("survivors and greedy tokens: oracle = eager = ExecuTorch = ONNX Runtime", "parity")
    options.add_argument("--tokens", type=int, default=2400)
    options.add_argument(
        "--cases", nargs="+", default=list(CASES), choices=list(CASES), help="others keep their stored results"
    )
    args = options.parse_args()
    stored = json.loads(args.output.read_text())["results"] if args.output.is_file() else []
    results = [row for row in stored if row["case"] not in args.cases]
    for name in args.cases:
        for ops in OPS:
            results.append(run_case(name, CASES[name], ops, args.tokens))
            print(results[-1], flush=True)
    save(args.output, "parity", results)
    if any(f["survivors"] or f["greedy"] for result in results for f in result["differences"].values()):
        raise SystemExit("survivors or greedy tokens differ")


if __name__ == "__main__":
    main()
