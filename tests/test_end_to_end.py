"""The trained model, exported and driven as users do: it remembers what it should, in fixed memory, in both engines."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from trimkv_edge.export.pipeline import ExportRequest, plan_export, run_export
from trimkv_edge.models.eager import eager_engine
from trimkv_edge.models.loading import load_model
from trimkv_edge.models.source import find_source
from trimkv_edge.models.tiny.demo import Demo, demo_text
from trimkv_edge.runtime.artefact import Artefact
from trimkv_edge.runtime.sampling import SamplingParams
from trimkv_edge.runtime.session import Session
from trimkv_edge.runtime.session_file import Origin

ENGINES = ("executorch", "onnx")


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    output = tmp_path_factory.mktemp("tiny") / "artefact"
    request = ExportRequest("tiny", output, budget="96", buffer=32, prefill_chunk=32, gates="rg10")
    run_export(plan_export(request), lambda line: None)
    return Artefact.load(output)


@pytest.fixture(scope="module")
def demo() -> Demo:
    return demo_text(12_000)


def answers(session: Session, artefact: Artefact, demo: Demo) -> list[str]:
    """What the model says to each question after reading the text."""
    assert artefact.tokenizer is not None
    assert artefact.manifest.tokenizer is not None
    session.feed(artefact.tokenizer.encode(demo.text))
    said, before = [], ""
    for question in demo.questions:
        session.feed(artefact.tokenizer.encode(before + question))
        pieces = session.generate(24, stop_ids=artefact.manifest.tokenizer.eos_token_ids)
        said.append("".join(piece.text for piece in pieces))
        before = "\n"
    return said


def test_facts_survive_twelve_thousand_tokens_of_text(artefact: Artefact, demo: Demo) -> None:
    said, kept = {}, {}
    for name in ENGINES:
        session = Session.open(artefact, name)
        said[name] = answers(session, artefact, demo)
        kept[name] = np.sort(session.engine.survivors(), axis=-1)
        assert session.statistics().events > 370
        assert session.engine.live <= 128
    assert said["onnx"] == list(demo.answers)
    assert said["executorch"] == said["onnx"]
    np.testing.assert_array_equal(kept["executorch"], kept["onnx"])


@pytest.mark.parametrize("name", ENGINES)
def test_the_command_answers_with_the_updated_value(artefact: Artefact, name: str, tmp_path: Path) -> None:
    demo = demo_text(3_000, seed=3)
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(demo.text + demo.questions[0], encoding="utf-8")
    command = [sys.executable, "-m", "trimkv_edge.cli.run", str(artefact.folder), "--prompt-file", str(prompt)]
    shown = subprocess.run(
        [*command, "--engine", name, "--stats", "json", "--max-new-tokens", "24"],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert shown.stdout == demo.answers[0] + "\n"
    statistics = json.loads(shown.stderr.splitlines()[-1])
    assert statistics["engine"] == name
    assert statistics["prompt_tokens"] > 3_000
    assert statistics["live_entries"] <= statistics["max_entries"] == 128
    assert statistics["cache_bytes"] == artefact.manifest.bytes.cache


def test_a_stream_moves_between_engines(artefact: Artefact, demo: Demo) -> None:
    """Read half in one engine, half in the other: the same survivors as in one go."""
    assert artefact.tokenizer is not None
    tokens = artefact.tokenizer.encode(demo.text)[:3_000]
    onnx, executorch = (Session.open(artefact, name) for name in ENGINES[::-1])
    onnx.feed(tokens[:1_501])
    executorch.engine.load_state(onnx.engine.state())
    onnx.feed(tokens[1_501:])
    executorch.feed(tokens[1_501:])
    np.testing.assert_array_equal(onnx.engine.survivors(), executorch.engine.survivors())
    assert onnx.logits is not None
    assert executorch.logits is not None
    assert np.abs(onnx.logits - executorch.logits).max() < 2e-3
    assert onnx.logits.argmax() == executorch.logits.argmax()


@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(temperature=0.8, top_p=0.95, seed=7)])
def test_a_saved_session_goes_on_in_every_engine(
    artefact: Artefact, demo: Demo, sampling: SamplingParams, tmp_path: Path
) -> None:
    """ONNX, ExecuTorch, eager, ONNX: saved in the middle of a generation each time, against one engine in one go."""
    assert artefact.tokenizer is not None
    cache = artefact.manifest.cache
    model = load_model(find_source("tiny"), "rg10").model
    stream = artefact.tokenizer.encode(demo.text)[:2_000]
    whole = Session.open(artefact, "onnx")
    whole.feed(stream)
    want = [piece.token for piece in whole.generate(400, sampling)]

    def eager() -> Session:
        return Session(eager_engine(model, cache), origin=Origin.of(artefact.manifest))

    relay = Session.open(artefact, "onnx")
    relay.feed(stream)
    made = [piece.token for piece in islice(relay.generate(400, sampling), 100)]
    for following in (lambda: Session.open(artefact, "executorch"), eager, lambda: Session.open(artefact, "onnx")):
        relay.save(tmp_path / "session")
        relay = following()
        relay.load(tmp_path / "session")
        assert relay.sampler is not None
        made += [piece.token for piece in islice(relay.generate(400, relay.sampler), 100)]
    assert made == want
    np.testing.assert_array_equal(relay.engine.survivors(), whole.engine.survivors())
