"""``npu:ethos-u85``: what Vela makes of the integer graphs. Nothing here can run it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from backend_artefact import compiled, need
from factories import gated_model
from onnx_artefact import spread_gates

from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import VerificationError
from trimkv_edge.export.backends.ethos_u85 import read_vela

need("npu:ethos-u85")


def test_all_of_it_runs_on_the_npu(tmp_path: Path) -> None:
    model = spread_gates(gated_model("llama-gqa", num_hidden_layers=1))
    made = compiled("npu:ethos-u85", model, CacheConfig(24, 8, 8), tmp_path, "int8")
    report = json.loads((tmp_path / "ethos_u85_report.json").read_text())
    borders = json.loads((tmp_path / "ethos_u85_borders.json").read_text())
    assert report["device"] == "ethos-u85-256"
    assert set(report["graphs"]) == set(report["vela"]) == set(borders) == {"decode", "prefill"}
    for name, vela in report["vela"].items():
        assert (report["graphs"][name]["partitions"], report["graphs"][name]["left"]) == (1, {})
        assert vela["cpu_operators"] == 0
        assert vela["npu_operators"] > 50
        assert vela["dram_memory_used"] > 0
        for port in (*borders[name]["inputs"], *borders[name]["outputs"]):
            assert port["dtype"] == ("int8" if port["name"].startswith(("past.", "new.")) else "int16"), port
        assert made.target.files[name] == f"ethos_u85_{name}.pte"
    assert json.loads((tmp_path / "ethos_u85_host.json").read_text())["masked"] == -30


def test_reports_are_read_as_vela_prints_them(tmp_path: Path) -> None:
    said = "Network summary\nCPU operators = 0 (0.0%)\nNPU operators = 95 (100.0%)\n"
    with pytest.raises(VerificationError, match="no report"):
        read_vela(tmp_path, said)
    (tmp_path / "output").mkdir()
    table = "experiment,sram_memory_used,dram_memory_used,cycles_total,inferences_per_second\nx,3.5,106.75,58725,17.5\n"
    (tmp_path / "output" / "out_summary_Ethos.csv").write_text(table)
    assert read_vela(tmp_path, said) == {
        "cpu_operators": 0,
        "npu_operators": 95,
        "sram_memory_used": 3.5,
        "dram_memory_used": 106.75,
        "cycles_total": 58725,
        "inferences_per_second": 17.5,
    }
    with pytest.raises(VerificationError, match="no report"):
        read_vela(tmp_path, "nothing")
