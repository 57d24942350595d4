"""From what a user calls gates (hub id, folder, file) to a file; and the import into our own form."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from trimkv_edge.errors import ConfigError, ModelError
from trimkv_edge.files import new_folder
from trimkv_edge.manifest import file_sha256
from trimkv_edge.models.gates import GATE_FILES, GateShape, check_declared, declared_shape, gate_file, load_gates
from trimkv_edge.models.published import TIED_COPIES, read_config, read_layers, settle_tied

_WANTED = ["config.json", "gates.json", *GATE_FILES]


@dataclass(frozen=True)
class Imported:
    """What an import found and wrote; ``info`` is the content of ``gates.json``."""

    folder: Path
    info: dict[str, Any]


def find_gates(given: str) -> Path:
    """The gate file that a file, a folder or a hub id (``owner/name``) names; a hub id is downloaded.

    Raises:
        ModelError: nothing there, or no download is possible now.
    """
    path = Path(given)
    if path.exists() or path.suffix in (".safetensors", ".pth", ".pt", ".bin"):
        return gate_file(path)
    if given.count("/") != 1 or given.startswith((".", "/", "~")):
        raise ModelError(f"gates {given!r}: no such file or folder, and not a hub id (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        return gate_file(Path(snapshot_download(given, allow_patterns=_WANTED, etag_timeout=5)))
    except ModelError:
        raise
    except Exception as error:  # the hub client's transport errors share no base class
        raise ModelError(
            f"gates {given!r} are neither in the local hub cache nor can they be downloaded now "
            f"({type(error).__name__}): download the repository elsewhere and give its folder"
        ) from error


def import_gates(
    given: str,
    output: Path,
    config: Path | None = None,
    shape: GateShape | None = None,
    base_sha256: str | None = None,
    tied_copy: str = "refuse",
    force: bool = False,
) -> Imported:
    """Writes published gates as ``gates.safetensors``, ``gates.json`` and ``README.md`` in ``output``.

    Args:
        given: hub id, folder or file.
        output: a new folder; it appears complete or not at all.
        config: the gates' ``config.json``; by default the one beside the file.
        shape: sizes of the real base model, where it is at hand; checked as well.
        base_sha256: hash of its weights, recorded so that other weights are refused later.
        tied_copy: ``refuse``, ``first`` or ``last``: whose copy of a shared tensor counts if copies differ.
        force: replace ``output``.

    Raises:
        ConfigError: ``output`` exists, or an unknown ``tied_copy``.
        ModelError: gates that cannot be read or do not fit.
    """
    if tied_copy not in TIED_COPIES:
        raise ConfigError(f"tied_copy is {tied_copy!r}, but must be one of {', '.join(TIED_COPIES)}")
    if output.exists() and not (force and (output / "gates.safetensors").is_file()):
        raise ConfigError(f"{output} exists: choose another -o, or --force to replace a folder of gates")
    source = find_gates(given)
    config = config or source.with_name("config.json")
    if not config.is_file():
        raise ModelError(
            f"{source} has no config.json beside it: give --config FILE, the gate repository's config.json"
        )
    fields = read_config(config)
    declared = declared_shape(fields, config)
    if shape is not None and shape != declared:
        raise ModelError(f"{config} describes gates for {declared}, but the model is {shape}: wrong gates")
    if fields.get("tie_retention_gate_layers") is False and tied_copy != "refuse":
        raise ModelError(
            f"{config} says that layers share nothing (tie_retention_gate_layers is false): one layer's copy cannot "
            "stand for all; such gates are not supported"
        )
    _, found = load_gates(source, declared, tied_copy=tied_copy)
    check_declared(fields, config, found.kind, found.intermediate_size, source)
    layers = read_layers(source)
    if found.kind == "rg10":
        settle_tied(layers, source, tied_copy)
    info: dict[str, Any] = {
        "kind": found.kind,
        "num_layers": declared.num_layers,
        "num_kv_heads": declared.num_kv_heads,
        "hidden_size": declared.hidden_size,
        "intermediate_size": found.intermediate_size,
        "hidden_act": declared.act,
        "dtype": str(layers[0]["bias"].dtype).removeprefix("torch."),
        "base_model": str(fields.get("base_model", "")),
        "memory": _memory(fields, config),
        "source": {"given": given, "file": source.name, "sha256": found.sha256},
        "tied_copy": tied_copy,
    }
    if base_sha256:
        info["base_sha256"] = base_sha256
    with new_folder(output) as folder:
        save_file(
            {
                f"model.layers.{layer}.self_attn.retention_gate.{name}": tensor.clone().contiguous()
                for layer, gate in layers.items()
                for name, tensor in gate.items()
            },
            folder / "gates.safetensors",
        )
        (folder / "gates.json").write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(_card(info), encoding="utf-8")
    info["sha256"] = file_sha256(output / "gates.safetensors")
    return Imported(output, info)


def _memory(fields: dict[str, Any], path: Path) -> int | None:
    value = fields.get("memory_size")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value < 10**9:
        raise ModelError(f"{path}: memory_size is {value!r}, but must be a number of entries per head, at least 1")
    return int(value)


def _card(info: dict[str, Any]) -> str:
    return (
        f"# Retention gates ({info['kind']}) for {info['base_model'] or 'an unnamed base model'}\n\n"
        f"{info['num_layers']} layers x {info['num_kv_heads']} KV heads, width {info['intermediate_size']}, "
        f"trained for {info['memory']} entries per head. Imported from `{info['source']['given']}` "
        f"(sha256 {info['source']['sha256']}). The licence is that of the source.\n"
    )
