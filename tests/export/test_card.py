"""The model card: what it says is what the manifest says, and its commands run as they stand."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_manifest import manifest, small_artefact
from text_artefact import save_manifest, text_artefact

from trimkv_edge.config import CacheConfig
from trimkv_edge.export.card import model_card, write_card
from trimkv_edge.manifest import GateInfo, Manifest, RopeInfo, Target, VisionInfo, load_manifest


def header(card: str) -> dict[str, Any]:
    match = re.match(r"---\n(.*?)\n---\n# ", card, re.DOTALL)
    assert match
    found: dict[str, Any] = yaml.safe_load(match[1])
    return found


def rows(card: str) -> dict[str, list[str]]:
    """First cell of each table row -> the others."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in card.splitlines() if line[:1] == "|"]
    return {first: rest for first, *rest in cells}


def random_weights(made: Manifest, **changes: Any) -> Manifest:
    return replace(made, model=replace(made.model, random_weights=True, **changes))


def test_header_of_a_named_model() -> None:
    assert header(model_card(manifest())) == {
        "library_name": "trimkv-edge",
        "base_model": "Qwen/Qwen3-4B",
        "license": "other",
        "license_name": "same-as-base-model",
        "license_link": "https://huggingface.co/Qwen/Qwen3-4B",
        "pipeline_tag": "text-generation",
        "tags": ["trim-kv", "kv-cache", "on-device", "executorch", "onnx"],
    }


@pytest.mark.parametrize(
    ("name", "source", "base"),
    [
        ("Qwen/Qwen3-4B-Base", "Qwen/Qwen3-4B-Base", "Qwen/Qwen3-4B-Base"),
        ("phi-3-mini-4k", "./phi", "microsoft/Phi-3-mini-4k-instruct"),
        ("/models/mine", "/models/mine", None),
        ("./mine", "./mine", None),
        ("mine", "mine", None),
    ],
)
def test_the_base_is_named_if_it_has_a_hub_id(name: str, source: str, base: str | None) -> None:
    made = manifest()
    found = header(model_card(replace(made, model=replace(made.model, name=name, source=source))))
    assert found.get("base_model") == base
    assert ("license" in found) == (base is not None)


def test_the_shipped_model_has_our_licence_and_no_base() -> None:
    made = manifest()
    found = header(model_card(replace(made, model=replace(made.model, name="tiny", source="shipped"))))
    assert (found["license"], "base_model" in found) == ("apache-2.0", False)


def test_quantised_weights_say_so() -> None:
    card = model_card(manifest(quantization="int4"))
    assert header(card)["base_model_relation"] == "quantized"
    assert rows(card)["quantisation"] == ["int4"]
    assert "against the eager model of the same quantised weights:" in card
    assert "quantised weights" not in model_card(manifest())


def test_random_weights_are_named_first_and_have_no_base() -> None:
    card = model_card(random_weights(manifest()))
    assert {"base_model", "license", "pipeline_tag"}.isdisjoint(header(card))
    assert "**The weights are random**" in card.partition("\n## ")[0]
    assert "The weights are random" not in model_card(manifest())


def test_the_numbers() -> None:
    found = rows(model_card(manifest()))
    # 36 layers x 8 heads x 2 x 128 x 4 bytes x 32,768 tokens.
    assert found["a full cache after 32,768 tokens"] == ["9,663,676,416 bytes (9.00 GiB): 28.0 times as much"]
    assert found["cache, for ever"] == ["345,000,000 bytes (329.0 MiB)"]
    assert found["budget"] == ["1024 entries per KV head"]
    assert found["ring buffer"] == ["128 new entries between eviction events"]
    assert found["prefill chunk"] == ["at most 64 tokens"]
    assert found["sinks"] == ["4"]
    assert found["weights"] == ["15.27 GiB"]
    assert found["`model.pte`"] == ["76,800", "`1212121212121212`"]
    assert found["kept entries compared"] == ["5,120", "5,120"]
    assert found["kept entries that differ"] == ["0", "0"]
    assert found["largest difference of a logit"] == ["1.34e-05", "1.34e-05"]
    assert found["gates"] == [f"`rg10`, gates.safetensors, width 512, SHA-256 `{'cd' * 32}`"]
    assert found["shape"] == ["36 layers, 32 heads, 8 KV heads, head_dim 128, vocabulary 151936"]
    assert found["RoPE"] == ["`default`, refuses position 16777216 and beyond"]
    assert "executorch 1.5.1, torch 2.13.0" in model_card(manifest())


def test_speed_is_shown_where_it_was_measured() -> None:
    made = manifest()
    speed = ["1.46", "3.02", "64", "130", "2", "Some CPU, 2 CPUs"]
    card = model_card(made)
    assert "## Speed" in card
    assert [line for line in card.splitlines() if line == f"| `onnx` | {' | '.join(speed)} |"]
    targets = {name: replace(target, speed={}) for name, target in made.targets.items()}
    assert "## Speed" not in model_card(replace(made, targets=targets))
    targets["onnx"] = replace(targets["onnx"], speed={**made.targets["onnx"].speed, "event_ms": 0.0, "threads": 0})
    card = model_card(replace(made, targets=targets))
    assert "| `onnx` | 1.46 | none fell due | 64 | 130 | - | Some CPU, 2 CPUs |" in card


def test_reports_with_other_names_are_shown_too() -> None:
    target = Target("onnx", "gqa", {}, {"events": 5, "survivor_agreement": 0.991})
    found = rows(model_card(manifest(targets={"onnx": target})))
    assert found["survivor agreement"] == ["0.991"]
    assert "Not verified." in model_card(manifest(targets={"onnx": replace(target, parity={})}))


def test_shared_budgets_and_gateless_policies() -> None:
    caps = tuple(tuple(range(8, 16)) for _ in range(36))
    cache = CacheConfig(8, 8, 8, policy="global", min_per_head=2, threshold=0.25, caps=caps)
    found = rows(model_card(manifest(cache=cache)))
    assert found["budget"] == ["8 entries per KV head on average"]
    assert found["caps"] == ["8 to 15 entries for a head"]
    assert (found["min per head"], found["threshold"]) == (["2"], ["0.25"])
    card = model_card(manifest(gates=GateInfo("none", "", "", 0), cache=CacheConfig(8, 8, 8, policy="streaming")))
    assert rows(card)["gates"] == ["none: the policy needs none"]
    assert "Gates decide" not in card


def test_short_rope_names_its_end() -> None:
    card = model_card(manifest(rope=RopeInfo("short", 4096)))
    assert "With the `short` RoPE factors a stream ends at 4,096 tokens." in card


def test_paths_of_the_machine_stay_there() -> None:
    assert "/home/ada" not in model_card(manifest())


def test_the_card_is_listed_and_renders_the_same_from_the_saved_manifest(tmp_path: Path) -> None:
    made = small_artefact(tmp_path)
    loaded = load_manifest(tmp_path)  # compares every hash
    assert loaded == made
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert model_card(loaded) == text == model_card(replace(made, files=dict(reversed(made.files.items()))))
    assert write_card(loaded, tmp_path) == made


def code_blocks(card: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", card, re.DOTALL)


@pytest.fixture
def artefact(tmp_path: Path) -> Path:
    folder = tmp_path / "artefact"
    shutil.copytree(text_artefact(), folder)
    return folder


def run(command: list[str], folder: Path) -> str:
    shown = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=120, check=False)
    assert shown.returncode == 0, shown.stderr
    return shown.stdout


def test_the_snippets_run_as_they_stand(artefact: Path) -> None:
    write_card(load_manifest(artefact), artefact).save(artefact)
    card = (artefact / "README.md").read_text(encoding="utf-8")
    (shell,), (python,) = code_blocks(card, "sh"), code_blocks(card, "python")
    install, command = shell.splitlines()
    assert install == "pip install 'trimkv-edge[onnx]'"
    assert command.startswith('trimkv-run . --chat --prompt "')
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    run(["env", f"PATH={path}", "sh", "-c", command], artefact)
    assert len([line for line in python.splitlines() if line]) <= 7
    assert run([sys.executable, "-c", python], artefact)


def test_without_a_tokenizer_the_snippet_gives_token_ids(artefact: Path) -> None:
    for name in ("tokenizer.json", "chat_template.jinja"):
        (artefact / name).unlink()
    bare = save_manifest(artefact, load_manifest(artefact, verify_files=False), tokenizer=None)
    write_card(bare, artefact).save(artefact)
    card = (artefact / "README.md").read_text(encoding="utf-8")
    assert "trimkv-run" not in card
    (python,) = code_blocks(card, "python")
    assert re.fullmatch(r"\[\d+(, \d+){7}\]\n", run([sys.executable, "-c", python], artefact))


def test_a_model_that_reads_pictures() -> None:
    half = (0.5, 0.5, 0.5)
    vision = VisionInfo(1, 2, 3, 4, 2, ((32, 32), (26, 40)), 16, 2, 2, half, half)
    card = model_card(replace(manifest(), vision=vision))
    assert header(card)["pipeline_tag"] == "image-text-to-text"
    assert rows(card)["pictures"] == [
        "resized to 512 x 512 (256 rows), 640 x 416 (260 rows) pixels, width x height; the encoder computes in float32"
    ]
    assert "--image picture.png" in card
    assert "picture" not in model_card(manifest())
