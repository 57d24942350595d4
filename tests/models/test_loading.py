"""Which gates a model gets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from factories import base_model

from trimkv_edge.errors import ModelError
from trimkv_edge.manifest import file_sha256
from trimkv_edge.models.loading import choose_gates, load_model
from trimkv_edge.models.source import find_source


def test_no_gates(tmp_path: Path) -> None:
    base_model("qwen3-gqa").save_pretrained(tmp_path)
    source = find_source(str(tmp_path))
    assert choose_gates(source, "none") == ("none", None)
    loaded = load_model(source, "none")
    assert (loaded.gates.kind, loaded.gates.sha256, loaded.gates.intermediate_size) == ("none", "", 0)
    for gate in loaded.model.gates:
        assert torch.equal(gate(torch.randn(2, 5, 64)), torch.zeros(2, 5, 2))
    with pytest.raises(ModelError, match="none are published for it"):
        choose_gates(source, None)


def test_the_shipped_model_has_both_kinds() -> None:
    source = find_source("tiny")
    for asked, kind in ((None, "rg"), ("rg", "rg"), ("rg10", "rg10")):
        found, path = choose_gates(source, asked)
        assert found == kind
        assert path is not None
        assert path.name == f"{kind}.safetensors"


def test_the_shipped_model_has_gates_for_conversations() -> None:
    source = find_source("tiny")
    _, path = choose_gates(source, "rg-chat")
    assert path is not None
    assert path.name == "rg-chat.safetensors"
    loaded = load_model(source, "rg-chat").gates
    assert (loaded.kind, loaded.source, loaded.sha256) == ("rg", "rg-chat", file_sha256(path))
    with pytest.raises(ModelError, match="no such file or folder"):
        choose_gates(source, "rg-talk")
