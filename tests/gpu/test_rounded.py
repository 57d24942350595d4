"""``torch:int8`` and ``torch:int4``: an artefact's weights rounded while they are loaded."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factories import gated_model, random_tokens
from onnx_artefact import feed, spread_gates
from text_artefact import text_artefact
from torch_artefact import CONFIG, save_torch_artefact

from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import ArtefactError, ConfigError
from trimkv_edge.gpu.rounded import Int4Engine, Int4PooledEngine, Int8Engine, Int8PooledEngine
from trimkv_edge.models.eager import eager_engine
from trimkv_edge.models.gated import GatedModel
from trimkv_edge.runtime.artefact import Artefact
from trimkv_edge.runtime.engines import choose_engine, engine_class, load_engine
from trimkv_edge.runtime.session import Session

POOLED = CacheConfig(24, 8, 8, policy="global", caps=((30, 40), (24, 26)))
TOKENS = random_tokens(120, seed=6)
BITS = {"int8": 8, "int4": 4}


def checked_copy(model: GatedModel, rounded: GatedModel, bits: int) -> GatedModel:
    """``model`` with the linear weights of ``rounded``: few values in each output channel, or 32 inputs of one, and
    near the given ones. Gates and embedding are the given ones."""
    made, other = copy.deepcopy(model), dict(rounded.named_modules())
    for name, part in made.named_modules():
        if isinstance(part, torch.nn.Linear) and "retention_gate" not in name:
            width = part.in_features if bits == 8 else 32
            stored = other[name].weight.dequantize()
            before, blocks = (
                weight.detach().unflatten(1, (-1, width)).flatten(0, 1) for weight in (part.weight, stored)
            )
            assert max(len(row.unique()) for row in blocks) <= 2**bits
            most = before.abs().amax(-1, keepdim=True) / (2**bits - 2)
            assert ((blocks - before).abs() <= 1.01 * most).all()
            part.weight = torch.nn.Parameter(stored, requires_grad=False)
        elif not isinstance(part, torch.nn.Linear):
            for own, value in part.named_parameters(recurse=False):
                assert torch.equal(other[name].get_parameter(own), value)
    return made


@pytest.mark.parametrize("config", [CONFIG, POOLED], ids=["per-head", "pooled"])
@pytest.mark.parametrize("scheme", BITS)
def test_the_engine_follows_the_eager_model_of_these_weights(
    tmp_path: Path, scheme: str, config: CacheConfig, capsys: Any
) -> None:
    model = spread_gates(gated_model("qwen3-gqa", "rg10"))
    manifest = save_torch_artefact(tmp_path, model, config=config)
    kinds = {"int8": (Int8Engine, Int8PooledEngine), "int4": (Int4Engine, Int4PooledEngine)}[scheme]
    kind = kinds[config.caps is not None]
    assert engine_class(f"torch:{scheme}", config) is kind
    engine = kind(tmp_path, manifest, manifest.targets["torch"], device="cpu", compiled=False)
    assert f"rounded to {scheme} while loading: the export did not verify these" in capsys.readouterr().err
    got = feed(engine, TOKENS, [8, 3, 1])
    eager = eager_engine(checked_copy(model, engine.graphs.model, BITS[scheme]), config)
    for one, other in zip(got, feed(eager, TOKENS, [8, 3, 1]), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-3)
    np.testing.assert_array_equal(engine.survivors(), eager.survivors())
    exact = feed(eager_engine(model, config), TOKENS, [8, 3, 1])
    assert max(np.abs(one - other).max() for one, other in zip(got, exact, strict=True)) > 1e-2
    other = engine.another()
    other.decode(5)
    assert (other.seen, engine.seen) == (1, len(TOKENS))
    assert capsys.readouterr().err == ""  # the weights are shared, not rounded again


def test_sessions_run_it_compiled(tmp_path: Path) -> None:
    model = spread_gates(gated_model("llama-gqa"))
    save_torch_artefact(tmp_path, model)
    found = Artefact.load(tmp_path)
    assert choose_engine(found) == "torch"  # only what is named rounds
    session = Session.open(found, "torch:int8")
    eager = Session(eager_engine(checked_copy(model, session.engine.graphs.model, 8), CONFIG))
    said = []
    for each in (session, eager):
        each.feed(TOKENS)
        said.append([piece.token for piece in each.generate(12)])
    assert said[0] == said[1]


def test_what_cannot_be_rounded_is_refused(tmp_path: Path) -> None:
    odd = gated_model("llama-gqa", intermediate_size=40)
    save_torch_artefact(tmp_path, odd)
    with pytest.raises(ConfigError, match="groups of 32, but a layer is 40 wide"):
        load_engine(Artefact.load(tmp_path), "torch:int4")
    with pytest.raises(ConfigError, match=r"'torch:int3' is not known; use one of onnx, .*torch:int8, torch:int4"):
        load_engine(Artefact.load(tmp_path), "torch:int3")


def test_it_needs_the_torch_target(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="has no torch target"):
        load_engine(Artefact.load(text_artefact()), "torch:int8")
