"""``npu:hexagon``: graphs compiled for Qualcomm's HTP, executed by its emulator with the numpy host around them."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from backend_artefact import compiled, job_for, need
from factories import gated_model, random_tokens
from onnx import TensorProto, helper
from onnx_artefact import Artefact, feed, same, spread_gates

from trimkv_edge.config import CacheConfig
from trimkv_edge.engine import Engine
from trimkv_edge.errors import ArtefactError, ConfigError, VerificationError
from trimkv_edge.export.backends.hexagon import export_hexagon, one_context
from trimkv_edge.hexagon import find_soc, load_info
from trimkv_edge.runtime.engines.qnn_emulator import QnnEmulatorEngine, htp_options

need("npu:hexagon")
CONFIG = CacheConfig(budget=24, buffer=8, prefill_chunk=8)
SIZES = (8, 3, 1, 1, 5, 8, 1)
# Least shares of survivors and of greedy tokens, and most that a logit may be off, of the largest one.
LIMITS = {
    "fp16": (0.998, 0.95, 0.005),
    "a16w8": (0.99, 0.85, 0.08),
    "a8w8": (0.98, 0.65, 0.2),
    "a16w4": (0.98, 0.5, 0.6),
}
CASES = [*(("llama-gqa", precision) for precision in LIMITS), ("phi3-partial-rotary", "a16w8"), ("qwen3-gqa", "fp16")]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Artefact]:
    """Artefacts by model and precision, each compiled when a test first asks for it."""
    store: dict[tuple[str, str], Artefact] = {}

    def make(case: str, precision: str) -> Artefact:
        if (case, precision) not in store:
            folder = tmp_path_factory.mktemp("hexagon")
            store[case, precision] = compiled("npu:hexagon", spread_gates(gated_model(case)), CONFIG, folder, precision)
        return store[case, precision]

    return make


def engine(artefact: Artefact) -> QnnEmulatorEngine:
    return QnnEmulatorEngine(artefact.folder, artefact.manifest, artefact.target)


def kept(one: Engine) -> list[set[int]]:
    return [set(row) for row in one.survivors().reshape(-1, one.config.budget).tolist()]


@pytest.mark.parametrize(("case", "precision"), CASES, ids=["-".join(case) for case in CASES])
def test_close_to_eager(made: Callable[[str, str], Artefact], case: str, precision: str) -> None:
    artefact = made(case, precision)
    eager, emulator = artefact.eager(), engine(artefact)
    tokens = random_tokens(24 + 8 * 7 + 3)
    start, calls, alike, worst, largest, shared, total = 0, 0, 0, 0.0, 0.0, 0, 0
    for turn in itertools.count():
        count = min(SIZES[turn % len(SIZES)], eager.room, len(tokens) - start)
        if not count:
            break
        want, got = (one.prefill(tokens[start : start + count]) for one in (eager, emulator))
        calls, alike = calls + 1, alike + int(want.argmax() == got.argmax())
        worst, largest = max(worst, float(np.abs(want - got).max())), max(largest, float(np.abs(want).max()))
        start += count
        if eager.room == 0:
            eager.evict()
            emulator.evict()
            shared += sum(len(one & other) for one, other in zip(kept(eager), kept(emulator), strict=True))
            total += eager.survivors().size
            emulator.load_state(eager.state())
    survivors, greedy, difference = LIMITS[precision]
    assert total == 7 * 4 * 24
    assert shared >= survivors * total, f"{shared} of {total}"
    assert alike >= greedy * calls, f"{alike} of {calls}"
    assert worst <= difference * largest, f"{worst} of {largest}"


def test_gates_in_float16_are_as_close_as_its_bits_allow(made: Callable[[str, str], Artefact]) -> None:
    artefact = made("llama-gqa", "fp16")
    eager, emulator = artefact.eager(), engine(artefact)
    tokens = random_tokens(28)
    logits = []
    for one in (eager, emulator):
        feed(one, tokens[:16], (8,))
        feed(one, tokens[16:], (1,))
        log_beta = one.state().log_beta[0, :, :28].astype(np.float64)
        logits.append(-np.log(np.expm1(-log_beta)))
    error = logits[1] - logits[0]
    # With the HTP's own sigmoid and a norm in parts: 0.005. Rounding numbers near 4 alone: 0.001.
    assert np.sqrt((error[:, :16] ** 2).mean()) < 0.0025
    assert np.sqrt((error[:, 16:] ** 2).mean()) < 0.0025


@pytest.mark.parametrize("precision", ["a16w8", "a8w8"])
def test_the_cache_stays_the_integers_that_graphs_gave(made: Callable[[str, str], Artefact], precision: str) -> None:
    artefact = made("llama-gqa", precision)
    one, other = engine(artefact), engine(artefact)
    encodings = load_info(artefact.folder / "hexagon.json").encodings
    dtype = "uint16" if precision == "a16w8" else "uint8"
    for layer, kind in itertools.product((0, 1), ("key", "value")):
        assert encodings[f"past.{layer}.{kind}"] == encodings[f"new.{layer}.{kind}"]
        assert encodings[f"past.{layer}.{kind}"].dtype == dtype
    assert {encodings[name].dtype for name in ("gate.0", "gate.1", "logits")} == {"uint16"}
    tokens = random_tokens(150)
    feed(one, tokens[:90], SIZES)
    other.load_state(one.state())  # through float32
    assert one._cache.key.dtype == dtype
    live = slice(one.live)
    np.testing.assert_array_equal(one._cache.key[:, :, live], other._cache.key[:, :, live])
    np.testing.assert_array_equal(one._cache.value[:, :, live], other._cache.value[:, :, live])
    assert same(feed(one, tokens[90:], SIZES), feed(other, tokens[90:], SIZES))


def test_padding_and_streams_before_are_not_seen(made: Callable[[str, str], Artefact]) -> None:
    artefact = made("llama-gqa", "a16w8")
    used, fresh = engine(artefact), engine(artefact)
    feed(used, random_tokens(77, seed=1), SIZES)
    again = used.another()
    used.reset()
    tokens = random_tokens(41)
    want = feed(fresh, tokens, (3,))
    assert same(feed(used, tokens, (3,)), want)
    assert same(feed(again, tokens, (3,)), want)


@pytest.mark.parametrize("precision", ["fp16", "a8w8"])
def test_each_graph_is_one_context(made: Callable[[str, str], Artefact], precision: str) -> None:
    artefact = made("llama-gqa", precision)
    for role in ("decode", "prefill"):
        (node,) = onnx.load(artefact.folder / artefact.target.files[role], load_external_data=False).graph.node
        assert node.op_type == "EPContext"
        assert (artefact.folder / artefact.target.files[f"{role}_context"]).stat().st_size > 100_000
    assert {path.name for path in artefact.folder.iterdir()} == set(artefact.target.files.values())
    assert (artefact.target.engine, artefact.target.ops) == ("qnn-emulator", precision)


def _graph(path: Path, operators: list[str]) -> Path:
    names = ["x", *(f"x{at}" for at in range(len(operators)))]
    nodes = [
        helper.make_node(operator, names[at : at + 1], names[at + 1 : at + 2]) for at, operator in enumerate(operators)
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 8, 8]) for name in (names[0], names[-1])]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def test_what_the_npu_does_not_take_is_an_error(tmp_path: Path) -> None:
    import onnxruntime

    onnxruntime.InferenceSession(str(_graph(tmp_path / "a.onnx", ["Neg", "Exp"])), htp_options("sm8750"))
    with pytest.raises(Exception, match="fallback to CPU EP has been explicitly disabled"):
        onnxruntime.InferenceSession(str(_graph(tmp_path / "b.onnx", ["Neg", "Erf", "Acosh"])), htp_options("sm8750"))
    with pytest.raises(VerificationError, match="has nodes Neg, Exp, but one context must hold all"):
        one_context(tmp_path / "a.onnx")


def test_nothing_is_printed(made: Callable[[str, str], Artefact], capfd: pytest.CaptureFixture[str]) -> None:
    artefact = made("llama-gqa", "fp16")
    code = (
        "import sys; sys.path[:0] = {path!r}\n"
        "from trimkv_edge.runtime.engines.qnn_emulator import htp_options, quiet_output\nimport onnxruntime\n"
        "with quiet_output(): one = onnxruntime.InferenceSession({graph!r}, htp_options('sm8750'))\nprint('loaded')\n"
        "import numpy as np\none.run(None, {{n.name: np.zeros(n.shape, np.float32) for n in one.get_inputs()}})\n"
    ).format(path=sys.path, graph=str(artefact.folder / "hexagon_decode.onnx"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "loaded\n", done.stderr
    capfd.readouterr()
    engine(artefact).prefill([5, 6, 7])
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("precision", ["fp16", "a16w8"])
@pytest.mark.parametrize("soc", ["sm8550", "sm8650"])
def test_other_chips(soc: str, precision: str, tmp_path: Path) -> None:
    config = CacheConfig(5, 4, 1)
    model = spread_gates(gated_model("phi3-mha"))
    job = job_for(model, config, tmp_path, precision)
    object.__setattr__(job, "soc", soc)
    target = export_hexagon(job)
    assert load_info(tmp_path / "hexagon.json").soc == soc
    assert "prefill" not in target.files
    made = compiled("npu:hexagon", model, config, tmp_path, precision)  # again, for the manifest
    emulator = QnnEmulatorEngine(tmp_path, made.manifest, target)
    feed(emulator, random_tokens(20), (1,))
    assert emulator.seen == 20


def test_settings_that_cannot_be_compiled(tmp_path: Path) -> None:
    model = gated_model("llama-gqa")
    with pytest.raises(ConfigError, match="keydiff compares keys, which a16w8 keeps as integers: use --precision fp16"):
        export_hexagon(job_for(model, CacheConfig(12, 4, 4, policy="keydiff"), tmp_path, "a16w8"))
    with pytest.raises(ConfigError, match="SoC 'sm9000' is not known: use one of sm8550"):
        find_soc("sm9000")
    assert not list(tmp_path.iterdir())


def test_damaged_artefacts(made: Callable[[str, str], Artefact], tmp_path: Path) -> None:
    artefact = made("llama-gqa", "a16w8")
    for path in artefact.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    broken = replace(artefact, folder=tmp_path)
    info = json.loads((tmp_path / "hexagon.json").read_text())
    for change, told in [
        ({"format": 2}, "has format 2"),
        ({"soc": "sm1"}, "SoC 'sm1' is not known"),
        ({"encodings": {}}, "of shape and type"),
    ]:
        (tmp_path / "hexagon.json").write_text(json.dumps({**info, **change}))
        with pytest.raises(ArtefactError, match=told):
            engine(broken)
    (tmp_path / "hexagon.json").write_text(json.dumps(info))
    context = tmp_path / artefact.target.files["decode_context"]
    context.write_bytes(context.read_bytes()[:1000])
    with pytest.raises(ArtefactError, match=r"hexagon_decode\.onnx does not load in onnxruntime-qnn with QAIRT"):
        engine(broken)
    context.unlink()
    with pytest.raises(ArtefactError, match="is missing"):
        engine(broken)
