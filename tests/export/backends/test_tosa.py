"""``tosa``: graphs of Arm's standard, executed by its reference model with the numpy host around them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from backend_artefact import compiled, need
from factories import gated_model, random_tokens
from host_artefact import compare
from onnx_artefact import Artefact, spread_gates
from oracle_model import OracleModel

from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import ArtefactError, ConfigError
from trimkv_edge.runtime.engines.tosa import TosaEngine

need("tosa")
CONFIG = CacheConfig(budget=24, buffer=8, prefill_chunk=8)


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    return compiled("tosa", spread_gates(gated_model("llama-gqa")), CONFIG, tmp_path_factory.mktemp("tosa"), "fp32")


def engine(artefact: Artefact) -> TosaEngine:
    return TosaEngine(artefact.folder, artefact.manifest, artefact.target)


def test_same_survivors_tokens_and_logits(exact: Artefact) -> None:
    eager, tosa, oracle = exact.eager(), engine(exact), OracleModel(exact.model, CONFIG)
    tokens = random_tokens(24 + 8 * 6 + 3)
    assert compare(tosa, eager, oracle, tokens) >= 5
    other = tosa.another()
    assert (other.seen, tosa.seen) == (0, len(tokens))


def test_nothing_is_printed(exact: Artefact, capfd: pytest.CaptureFixture[str]) -> None:
    tosa = engine(exact)
    print("before")
    tosa.prefill([5, 6, 7])
    print("after")
    assert capfd.readouterr().out == "before\nafter\n"


def test_each_graph_is_one_delegate_with_every_node(exact: Artefact) -> None:
    graphs = json.loads((exact.folder / "tosa_report.json").read_text())["graphs"]
    assert set(graphs) == {"decode", "prefill"}
    for graph in graphs.values():
        assert (graph["partitions"], graph["left"]) == (1, {})
        assert graph["nodes"] > 100


def test_a_mixed_folder_is_told(exact: Artefact, tmp_path: Path) -> None:
    files = {role: exact.folder / name for role, name in exact.target.files.items()}
    for path in files.values():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "tosa_borders.json").write_text('{"decode": {"inputs": [], "outputs": []}}')
    with pytest.raises(ArtefactError, match="lacks prefill"):
        TosaEngine(tmp_path, exact.manifest, exact.target)
    (tmp_path / "tosa_borders.json").write_text("{")
    with pytest.raises(ArtefactError, match="cannot be read"):
        TosaEngine(tmp_path, exact.manifest, exact.target)
    (tmp_path / "tosa_decode.tosa").unlink()
    with pytest.raises(ArtefactError):
        TosaEngine(tmp_path, exact.manifest, exact.target)


def test_it_has_one_thread_and_no_profile(exact: Artefact) -> None:
    with pytest.raises(ConfigError, match="use 1 thread"):
        TosaEngine(exact.folder, exact.manifest, exact.target, 2)
    with pytest.raises(ConfigError, match="leave out --profile"):
        TosaEngine(exact.folder, exact.manifest, exact.target, profile=True)


# One layer, and mostly one graph: Arm's compiler takes a quarter of a minute for each of both.
@pytest.mark.parametrize(
    ("model", "precision", "chunk", "survivors", "cosine"),
    [
        ("qwen3-gqa", "int8", 8, 0.97, 0.99),  # its norms of queries and keys read 8-bit layers
        ("llama-gqa", "a8w4", 1, 0.8, 0.9),
        ("llama-gqa", "a16w8", 1, 0.98, 0.99),
    ],
)
def test_integers_agree_closely(
    model: str, precision: str, chunk: int, survivors: float, cosine: float, tmp_path: Path
) -> None:
    config = CacheConfig(CONFIG.budget, CONFIG.buffer, chunk)
    made = compiled("tosa", spread_gates(gated_model(model, num_hidden_layers=1)), config, tmp_path, precision)
    borders = json.loads((tmp_path / "tosa_borders.json").read_text())
    assert set(borders) == ({"decode", "prefill"} if chunk > 1 else {"decode"})
    ports = {side: {port["name"]: port for port in borders["decode"][side]} for side in ("inputs", "outputs")}
    for port in (*borders["decode"]["inputs"], *borders[list(borders)[-1]]["outputs"]):
        cached = port["name"].startswith(("past.", "new."))
        assert port["dtype"] == ("int8" if cached and precision != "a16w8" else "int16"), port
    for kind in ("key", "value"):  # a row comes back as the integers that it was
        entering, leaving = ports["inputs"][f"past.0.{kind}"], ports["outputs"][f"new.0.{kind}"]
        assert entering["zero_point"] == leaving["zero_point"]
        # Alike to a float32 or so: no integer of 16 bits becomes another one.
        assert abs(entering["scale"] / leaving["scale"] - 1) < 2**-20
    eager, tosa, same, kept, close = made.eager(), engine(made), 0, 0, []
    for token in random_tokens(24 + 8 * 6):
        want, got = eager.decode(token), tosa.decode(token)
        close.append(float(want @ got / np.linalg.norm(want) / np.linalg.norm(got)))
        if eager.room == 0:
            eager.evict()
            tosa.evict()
            pairs = zip(eager.survivors().reshape(2, -1), tosa.survivors().reshape(2, -1), strict=True)
            same += sum(len(set(one) & set(other)) for one, other in pairs)
            kept += 2 * 24
    assert kept == 6 * 2 * 24
    assert same / kept >= survivors
    assert np.mean(close) >= cosine
