"""A whole artefact folder with a tokenizer, exported to ONNX from a small random model; shared by tests."""

from __future__ import annotations

import atexit
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from factories import gated_model
from onnx_artefact import make_artefact, spread_gates
from text_tokenizers import byte_level

from trimkv_edge.config import CacheConfig
from trimkv_edge.manifest import ByteInfo, Manifest, TokenizerInfo, describe_files

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
CONFIG = CacheConfig(budget=24, buffer=8, prefill_chunk=8)


@cache
def text_artefact() -> Path:
    """The artefact, exported once per test run: copy it before changing it."""
    folder = Path(mkdtemp(prefix="text-artefact-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    _export(folder)
    return folder


def _export(folder: Path) -> None:
    made = make_artefact(folder, spread_gates(gated_model("llama-gqa")), CONFIG)
    tokenizer = byte_level(made.manifest.model.vocab_size)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    save_manifest(
        folder,
        made.manifest,
        tokenizer=TokenizerInfo(tokenizer.get_vocab_size(), [2], 1),
        bytes=ByteInfo(1000, 100_000, 1_000_000),
    )


def save_manifest(folder: Path, manifest: Manifest, **changes: Any) -> Manifest:
    """Saves ``manifest`` with ``changes`` and the folder's files as they are now."""
    manifest = replace(manifest, files=describe_files(folder), **changes)
    manifest.save(folder)
    return manifest
