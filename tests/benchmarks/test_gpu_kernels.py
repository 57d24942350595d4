"""The benchmark of the Triton kernels: what it counts, that it checks before it times, and that it runs."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from trimkv_edge.errors import VerificationError
from trimkv_edge.gpu import ops
from trimkv_edge.models.registry import MODELS

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import gpu_kernels
from gpu_benchmark import run
from gpu_kernels import SMOKE, Cache, check, model_shape, pool, rate


def test_smoke_runs_every_case_and_stores_nothing(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton has no wheel for this platform")
    done = run(gpu_kernels.__file__, "--smoke", "--output", str(tmp_path / "result.json"))
    assert done.returncode == 0, done.stderr
    cases = ["stream ran", "all move ran", "live prefix ran", "torch sdpa ran", "pool ran"]
    last = "smoke run in Triton's interpreter: no measurement, nothing stored"
    assert done.stdout.splitlines() == [*cases, last]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["phi-3-mini", "qwen3-4b"])
def test_bytes_of_a_step_are_those_of_the_model(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(MODELS[name].family, **MODELS[name].fields()))
    read = {id(part): part.numel() for part in model.parameters() if part.dim() == 2}
    head = model.get_output_embeddings().weight
    if model.get_input_embeddings().weight is not head:
        del read[id(model.get_input_embeddings().weight)]
    assert model_shape(name, 1, 1024).weight_bytes == 2 * sum(read.values())


def test_live_bytes_of_phi_3_mini() -> None:
    shape = model_shape("phi-3-mini", 1, 2048)
    assert (shape.layers, shape.kv_heads, shape.width, shape.live) == (32, 32, 96, 2112)
    assert shape.layer_bytes == 2 * 32 * 2112 * 96 * 2


def test_moved_rows_are_counted() -> None:
    cache = Cache(SMOKE, "cpu")
    cache.refill(True)
    ops.evict(*cache.arguments())
    assert cache.moved() == 2 * 2 * 2 * 12
    cache.refill(False)
    cache.log_beta[..., SMOKE.budget :] = -100.0
    cache.log_beta[..., : SMOKE.budget] = 0.0
    cache.log_beta[..., SMOKE.budget] = 0.0
    ops.evict(*cache.arguments())
    assert cache.moved() == 2 * 2 * 2


def test_rates() -> None:
    assert rate(3e6, [2e-6, 3e-6, 1e-5], 2000.0) == {
        "us": 3.0,
        "us_least": 2.0,
        "mb": 3.0,
        "gb_per_s": 1000.0,
        "of_copy": 0.5,
    }


def test_the_pool_is_as_large_as_its_heads() -> None:
    key, _, start, length = pool(SMOKE, "cpu")
    ends = (start + length).flatten()
    assert torch.equal(start.flatten()[1:], ends[:-1])
    assert len(key) == int(ends[-1])
    assert length.min() >= 1
    assert length.unique().numel() > 1


@pytest.mark.parametrize("wrong", ["", "evict", "attend", "attend_pool"])
def test_kernels_that_disagree_are_not_timed(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def one_more_sink(*given: Any) -> None:
        ops.evict(*given[:-2], given[-2] + 3, given[-1])

    def other_scale(op: Any) -> Any:
        return lambda *given: op(*given[:-1], 2.0 * given[-1])

    kernels = {"evict": ops.evict, "attend": ops.attend, "attend_pool": ops.attend_pool}
    if wrong:
        kernels[wrong] = one_more_sink if wrong == "evict" else other_scale(kernels[wrong])
    monkeypatch.setattr(gpu_kernels.ops, "load_kernels", lambda name: SimpleNamespace(**kernels))
    if not wrong:
        check(SMOKE, "cpu")
        return
    with pytest.raises(VerificationError):
        check(SMOKE, "cpu")
