"""An export with short LongRoPE factors says so, and both engines and the command refuse a stream past their length."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from factories import base_config, random_tokens
from text_tokenizers import byte_level

from trimkv_edge.errors import PositionLimitError
from trimkv_edge.export.pipeline import ExportRequest, plan_export, run_export
from trimkv_edge.manifest import load_manifest
from trimkv_edge.runtime.artefact import Artefact
from trimkv_edge.runtime.engines import load_engine
from trimkv_edge.runtime.session import Session

ORIGINAL = 32  # of the factories' LongRoPE model
HINT = "short LongRoPE factors; export again with --rope long"


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, output = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("out") / "artefact"
    base_config("phi3-longrope", num_hidden_layers=1).save_pretrained(model)
    byte_level().save(str(model / "tokenizer.json"))
    request = ExportRequest(
        str(model),
        output,
        "6",
        buffer=2,
        prefill_chunk=2,
        stream_length=ORIGINAL,
        random_weights=True,
        ops=("portable",),
    )
    run_export(plan_export(request), lambda _: None)
    return output


def test_the_manifest_says_what_was_chosen(artefact: Path) -> None:
    rope = load_manifest(artefact).rope
    assert (rope.variant, rope.position_limit) == ("short", ORIGINAL)


@pytest.mark.parametrize("name", ["onnx", "executorch"])
def test_engines_and_sessions_refuse(artefact: Path, name: str) -> None:
    loaded = Artefact.load(artefact)
    engine = load_engine(loaded, name, threads=1)
    for token in random_tokens(ORIGINAL):
        if engine.room == 0:
            engine.evict()
        engine.decode(token)
    if engine.room == 0:
        engine.evict()
    with pytest.raises(PositionLimitError, match=r"position 32 is past the last one .*\(31\)"):
        engine.decode(3)
    session = Session.open(loaded, name, threads=1)
    with pytest.raises(PositionLimitError, match=HINT):
        session.feed(random_tokens(ORIGINAL + 1))
    session.feed(random_tokens(ORIGINAL))
    generation = session.generate(5)
    next(generation)  # chosen after the last position, not read
    with pytest.raises(PositionLimitError, match=HINT):
        next(generation)


@pytest.mark.parametrize("name", ["onnx", "executorch"])
@pytest.mark.parametrize(("prompt", "count", "text"), [("the cat sat on the mat. " * 20, 8, False), ("the", 90, True)])
def test_the_command_refuses(artefact: Path, name: str, prompt: str, count: int, text: bool) -> None:
    command = [sys.executable, "-m", "trimkv_edge.cli.run", str(artefact), "--prompt", prompt, "--engine", name]
    done = subprocess.run(
        [*command, "--max-new-tokens", str(count), "--temperature", "1", "--seed", "1"],
        capture_output=True,
        text=True,
        timeout=120,
        env=dict(os.environ),
        cwd=artefact.parent,
    )
    assert done.returncode == 2
    assert bool(done.stdout.strip()) == text  # what was generated before the limit
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert HINT in errors[0]
    assert "Traceback" not in done.stderr
