"""Names of compilers' targets: those that are there, and those that are not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from export_request import request_for
from factories import base_config

from trimkv_edge.errors import ConfigError, TrimKVError
from trimkv_edge.export.backends import BACKENDS, UNSUPPORTED, Backend
from trimkv_edge.export.pipeline import plan_export
from trimkv_edge.export.targets import TARGETS, check_ops
from trimkv_edge.runtime.engines import ENGINES, RUNS


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    base_config("llama-gqa").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_an_unsupported_name_gives_its_reason_in_one_line(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_ops((name,), ())
    assert str(caught.value).startswith(f"target {name} is not supported: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


def test_what_people_ask_for_is_listed() -> None:
    assert {"npu:qnn-executorch", "npu:mediatek", "npu:samsung", "npu:vgf"} <= set(UNSUPPORTED)
    assert not set(UNSUPPORTED) & set(TARGETS)


def test_a_target_that_runs_has_an_engine_and_others_have_none() -> None:
    for name, backend in BACKENDS.items():
        assert (name in ENGINES or name in RUNS.values()) == backend.runs
        assert TARGETS[name].runs == backend.runs
        assert set(TARGETS[name].rounds) <= set(TARGETS[name].ops)


@pytest.mark.parametrize(
    ("chosen", "told"),
    [
        (dict(ops=("c4w",)), None),
        (dict(ops=("int8",)), "operator set int8 fits no chosen target"),
        (dict(quant="int8"), "npu:coreml cannot run int8 weights: use one of none"),
        (dict(kv_dtype="int8"), "npu:coreml keeps float32 keys and values"),
        (dict(policy="global"), "a budget that heads share"),
    ],
)
def test_settings_are_checked_before_anything_is_built(
    chosen: dict[str, Any], told: str | None, model: Path, tmp_path: Path
) -> None:
    request = request_for(model, tmp_path / "new", targets=("npu:coreml",), **chosen)
    if told is None:
        assert plan_export(request).ops == {"npu:coreml": "c4w"}
        return
    with pytest.raises(ConfigError, match=told):
        plan_export(request)


def test_a_missing_package_is_one_line_with_the_command(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = Backend("none:none", ("fp16",), ("json", "no_such_compiler"), "pip install no-such-compiler")
    assert backend.missing() == ["no_such_compiler"]
    with pytest.raises(TrimKVError, match=r"^--target npu:x needs no_such_compiler: pip install no-such-compiler$"):
        backend.require("npu:x")
    real = TARGETS["npu:coreml"]

    def check(config: Any) -> None:
        backend.require("npu:coreml")

    monkeypatch.setitem(TARGETS, "npu:coreml", replace(real, check=check))
    with pytest.raises(TrimKVError, match="no_such_compiler"):
        plan_export(request_for(model, tmp_path / "new", targets=("npu:coreml",)))
