"""``vulkan``: one delegate. Nothing here can run it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from backend_artefact import compiled
from factories import gated_model
from onnx_artefact import spread_gates

from trimkv_edge.config import CacheConfig


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_each_graph_is_one_delegate_with_every_node(tmp_path: Path, precision: str) -> None:
    from executorch.exir._serialize._program import deserialize_pte_binary

    model = spread_gates(gated_model("llama-gqa"))
    made = compiled("vulkan", model, CacheConfig(24, 8, 4), tmp_path, precision)
    assert made.target.files == {
        "program": "vulkan.pte",
        "report": "vulkan_report.json",
        "embedding": "host_embedding.bin",
        "constants": "vulkan_host.json",
    }
    graphs = json.loads((tmp_path / "vulkan_report.json").read_text())["graphs"]
    assert set(graphs) == {"decode", "prefill"}
    for graph in graphs.values():
        assert (graph["partitions"], graph["left"]) == (1, {})
    program = deserialize_pte_binary((tmp_path / made.target.files["program"]).read_bytes()).program
    assert {plan.name: [part.id for part in plan.delegates] for plan in program.execution_plan} == {
        "decode": ["VulkanBackend"],
        "prefill": ["VulkanBackend"],
    }
    assert all(not plan.operators for plan in program.execution_plan), "kernels beside the delegate"
