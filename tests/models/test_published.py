"""Published gate files: read exactly, or refused with the reason; nothing in them runs."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from published_gates import TEXT, VISION, raw_gates, write_published
from safetensors.torch import load_file, save_file

from trimkv_edge.errors import ModelError, TrimKVError
from trimkv_edge.models.gate_source import import_gates
from trimkv_edge.models.gates import GateShape, load_gates

SIZES = (3, 16, 2, 8)  # layers, hidden, KV heads, width
SHAPE = GateShape(3, 16, 2, "silu")
KEY = "model.layers.1.self_attn.retention_gate."


def _numpy_log_beta(raw: dict[str, torch.Tensor], prefix: str, layer: int, kind: str, x: np.ndarray) -> np.ndarray:
    gate = {
        key.split("retention_gate.")[1]: tensor.double().numpy()
        for key, tensor in raw.items()
        if key.startswith(f"{prefix}layers.{layer}.")
    }
    h = x @ gate["linear1.weight"].T + gate["linear1.bias"]
    h = h / (1 + np.exp(-h))
    if kind == "rg10":
        h = h @ gate["linear2.weight"].T + gate["linear2.bias"]
        h = h / (1 + np.exp(-h))
    z = h @ gate["linear2.weight" if kind == "rg" else "linear3.weight"].T + gate["bias"]
    return -np.logaddexp(0, -z)


@pytest.mark.parametrize("prefix", [TEXT, VISION])
@pytest.mark.parametrize("kind", ["rg", "rg10"])
def test_log_betas_equal_numpy_before_and_after_import(kind: str, prefix: str, tmp_path: Path) -> None:
    raw = raw_gates(kind, *SIZES, prefix)
    folder = write_published(tmp_path / "in", raw, kind, *SIZES, nest=prefix == VISION)
    result = import_gates(str(folder), tmp_path / "out", base_sha256="ab" * 32)
    assert (result.info["kind"], result.info["memory"], result.info["dtype"]) == (kind, 512, "bfloat16")
    x = torch.randn(5, 16)
    for source in (folder, tmp_path / "out"):
        gates, info = load_gates(source, SHAPE, "ab" * 32)
        assert (info.kind, info.intermediate_size) == (kind, 8)
        for layer, gate in enumerate(gates):
            want = _numpy_log_beta(raw, prefix, layer, kind, x.double().numpy())
            np.testing.assert_allclose(gate(x).detach().numpy(), want, atol=2e-5, rtol=2e-5)
    with pytest.raises(ModelError, match="trained for base weights"):
        load_gates(tmp_path / "out", SHAPE, "cd" * 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lm_head.weight": torch.zeros(2)}, "not a retention gate's tensor"),
        ({KEY + "bias": torch.tensor([0.0, float("nan")])}, "NaN or infinite"),
        ({KEY + "bias": torch.zeros(3)}, "do not fit"),
        ({KEY + "bias": torch.zeros(2, dtype=torch.int64)}, "bfloat16, float16 or float32"),
        ({KEY + "bias": 3}, "is int, but must be a tensor"),
        ({KEY + "bias": {"nested": torch.zeros(2)}}, "is dict, but must be a tensor"),
        ({KEY + "bias": None}, "do not fit"),
    ],
)
def test_refuses_hostile_content(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    raw: dict[str, Any] = raw_gates("rg", *SIZES) | change
    if change.get(KEY + "bias", 0) is None:
        del raw[KEY + "bias"]
    folder = write_published(tmp_path / "in", raw, "rg", *SIZES, nest=False)
    with pytest.raises(ModelError, match=message):
        import_gates(str(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()


class _Attack:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def test_a_pickle_that_carries_code_does_not_run(tmp_path: Path) -> None:
    torch.save({KEY + "bias": _Attack(tmp_path / "marker")}, tmp_path / "x.pth")
    with pytest.raises(ModelError, match="not a readable file of tensors"):
        load_gates(tmp_path / "x.pth", SHAPE)
    assert not (tmp_path / "marker").exists()


def test_tied_copies_that_differ_need_a_choice(tmp_path: Path) -> None:
    raw = raw_gates("rg10", *SIZES)
    raw["model.layers.2.self_attn.retention_gate.bias"] += 1
    folder = write_published(tmp_path / "in", raw, "rg10", *SIZES, nest=False)
    with pytest.raises(ModelError, match=r"bias must be shared .* 1 of 3 copies .*--tied-copy last"):
        import_gates(str(folder), tmp_path / "no")
    for choice, layer in (("first", 0), ("last", 2)):
        import_gates(str(folder), tmp_path / choice, tied_copy=choice)
        gates, _ = load_gates(tmp_path / choice, SHAPE)
        want = raw[f"model.layers.{layer}.self_attn.retention_gate.bias"].float()
        assert all(torch.equal(gate.bias, want) for gate in gates)


def test_300_damaged_files_give_300_clean_errors(tmp_path: Path) -> None:
    folder = write_published(tmp_path / "in", raw_gates("rg", *SIZES), "rg", *SIZES, nest=False)
    good = (folder / "trimkv_weights.pth").read_bytes()
    payload = [key.numpy().tobytes() for key in (t.view(torch.int16) for t in raw_gates("rg", *SIZES).values())]
    spots = [good.index(data) + offset for data in payload for offset in range(len(data))]
    rng, path = random.Random(5), tmp_path / "bad.pth"
    for number in range(300):
        data = bytearray(good)
        if number % 3 == 0:  # a flipped byte of a tensor: only the checksum can tell
            data[rng.choice(spots)] ^= rng.randrange(1, 256)
        elif number % 3 == 1:
            del data[rng.randrange(len(data) - 1) :]
        else:
            start = rng.choice(spots)
            del data[start : start + rng.randrange(1, 64)]
        path.write_bytes(data)
        with pytest.raises(TrimKVError):
            load_gates(path, SHAPE)


@pytest.mark.parametrize("content", [b"", b"PK", b"not a zip at all", b"PK\x03\x04" + bytes(200)])
@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_files_that_are_nothing(content: bytes, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match="readable"):
        load_gates(tmp_path / name, SHAPE)


def test_damaged_safetensors_headers_and_sizes(tmp_path: Path) -> None:
    """Every length it can be cut to, and a byte of every field that says where tensors lie."""
    save_file(raw_gates("rg", *SIZES), tmp_path / "good.safetensors")
    good = (tmp_path / "good.safetensors").read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    path = tmp_path / "bad.safetensors"
    broken = [good[:size] for size in range(0, len(good), 37)]
    broken += [good + b"x", good[header:], (header * 1000).to_bytes(8, "little") + good[8:]]
    for part in (b"data_offsets", b"dtype", b"shape", b"BF16"):
        at = good.index(part)
        broken.append(good[:at] + b"#" + good[at + 1 :])
    for data in broken:
        path.write_bytes(data)
        with pytest.raises(ModelError):
            load_gates(path, SHAPE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(2, 64, 4, 24), (2, 64, 2, 24)])  # shapes of the small phi3, qwen3 and llama models
def test_dtypes_are_kept_and_read_as_float32(dtype: torch.dtype, sizes: tuple[int, ...], tmp_path: Path) -> None:
    raw = {key: tensor.to(dtype) for key, tensor in raw_gates("rg", *sizes).items()}
    folder = write_published(tmp_path / "in", raw, "rg", *sizes, nest=False)
    import_gates(str(folder), tmp_path / "out")
    held = load_file(tmp_path / "out" / "gates.safetensors")
    assert all(torch.equal(held[key], tensor) and held[key].dtype == dtype for key, tensor in raw.items())
    gates, _ = load_gates(tmp_path / "out", GateShape(sizes[0], sizes[1], sizes[2], "silu"))
    assert all(parameter.dtype == torch.float32 for parameter in gates.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 4}, "3 layers, but the model has 4"),
        ({"hidden_size": "16"}, "hidden_size is '16'"),
        ({"hidden_size": -1}, "hidden_size is -1"),
        ({"hidden_act": None}, "hidden_act is None"),
        ({"num_key_value_heads": True}, "num_key_value_heads is True"),
        ({"memory_size": 0.5}, "memory_size is 0.5"),
        ({"memory_size": "lots"}, "memory_size is 'lots'"),
        ({"retention_gate": "rg10"}, "retention_gate = 'rg10'"),
        ({"retention_gate_intermediate_size": 9}, "holds 8"),
        (None, "not a readable JSON object"),
        ([], "not a readable JSON object"),
    ],
)
def test_configurations_that_do_not_fit(change: Any, message: str, tmp_path: Path) -> None:
    folder = write_published(tmp_path / "in", raw_gates("rg", *SIZES), "rg", *SIZES, nest=False)
    path = folder / "config.json"
    fields = json.loads(path.read_text())
    path.write_text("{" if change is None else json.dumps({**fields, **change} if change else change))
    with pytest.raises(ModelError, match=message):
        import_gates(str(folder), tmp_path / "out")


def test_two_halves_of_two_files(tmp_path: Path) -> None:
    one, other = (raw_gates("rg", *sizes) for sizes in (SIZES, (3, 16, 2, 9)))
    for name, tensors in (("one", one), ("other", other)):
        torch.save(tensors, tmp_path / f"{name}.pth")
    first, second = ((tmp_path / f"{name}.pth").read_bytes() for name in ("one", "other"))
    for at in range(100, min(len(first), len(second)), 211):
        (tmp_path / "bad.pth").write_bytes(first[:at] + second[at:])
        with pytest.raises(ModelError):
            load_gates(tmp_path / "bad.pth", SHAPE)


def test_another_activation_is_refused_in_every_form(tmp_path: Path) -> None:
    folder = write_published(tmp_path / "in", raw_gates("rg", *SIZES), "rg", *SIZES, nest=False)
    import_gates(str(folder), tmp_path / "out")
    (folder / "trimkv_weights.pth").rename(folder / "mine.pth")
    for path in (folder / "mine.pth", tmp_path / "out"):
        with pytest.raises(ModelError, match="gelu"):
            load_gates(path, GateShape(3, 16, 2, "gelu"))


def test_a_config_that_names_another_kind_is_refused_without_import(tmp_path: Path) -> None:
    folder = write_published(tmp_path / "in", raw_gates("rg", *SIZES), "rg10", *SIZES, nest=False)
    with pytest.raises(ModelError, match="retention_gate = 'rg10'"):
        load_gates(folder, SHAPE)


def test_gates_that_are_not_tied_have_no_copy_to_choose(tmp_path: Path) -> None:
    raw = raw_gates("rg10", *SIZES)
    raw["model.layers.2.self_attn.retention_gate.bias"] += 1
    folder = write_published(tmp_path / "in", raw, "rg10", *SIZES, nest=False)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "tie_retention_gate_layers": False}))
    with pytest.raises(ModelError, match="tie_retention_gate_layers is false"):
        import_gates(str(folder), tmp_path / "out", tied_copy="last")


def test_a_whole_layer_is_missing(tmp_path: Path) -> None:
    raw = {key: tensor for key, tensor in raw_gates("rg", *SIZES).items() if ".layers.1." not in key}
    torch.save(raw, tmp_path / "x.pth")
    with pytest.raises(ModelError, match="gates for 2 layers, but the model has 3"):
        load_gates(tmp_path / "x.pth", SHAPE)
