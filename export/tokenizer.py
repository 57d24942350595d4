"""Tokenizer files of an artefact, and the token stream that verification reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from trimkv_edge.errors import ModelError
from trimkv_edge.manifest import TokenizerInfo

_COPIED = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def copy_tokenizer(source: Path | None, folder: Path, config: Any) -> TokenizerInfo | None:
    """Copies the tokenizer of a model folder into the artefact; None if the model has none (random weights).

    A chat template inside ``tokenizer_config.json`` is written out as ``chat_template.jinja``.

    Raises:
        ModelError: the tokenizer is unreadable or has more tokens than the model's embedding.
    """
    if source is None or not (source / "tokenizer.json").is_file():
        return None
    for name in _COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises plain Exception
        raise ModelError(f"{source / 'tokenizer.json'} cannot be read: {error}") from error
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    if size > config.vocab_size:
        raise ModelError(
            f"tokenizer mismatch: {source / 'tokenizer.json'} has {size} tokens, but the model only "
            f"{config.vocab_size}: "
            "use the tokenizer that belongs to the model"
        )
    if not (folder / "chat_template.jinja").is_file():
        template = _json(source / "tokenizer_config.json").get("chat_template")
        if isinstance(template, str):
            (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    eos = _json(source / "generation_config.json").get("eos_token_id", config.eos_token_id)
    ids = [eos] if isinstance(eos, int) else list(eos or [])
    bos = config.bos_token_id if isinstance(config.bos_token_id, int) else None
    return TokenizerInfo(size, [token for token in ids if token < config.vocab_size], bos)


def sample_tokens(folder: Path, tokenizer_info: TokenizerInfo | None, vocab_size: int, count: int) -> list[int]:
    """``count`` tokens to verify with: this package's own sources if the artefact has a tokenizer, else seeded ids."""
    if tokenizer_info is not None:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        ids: list[int] = []
        for path in sorted(Path(__file__).parent.glob("*.py")):
            ids += tokenizer.encode(path.read_text(encoding="utf-8"), add_special_tokens=False).ids
        if ids:
            return (ids * (count // len(ids) + 1))[:count]
    rng = np.random.default_rng(0)
    return [int(token) for token in rng.integers(0, vocab_size, count)]


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON ({error})") from error
    return loaded if isinstance(loaded, dict) else {}
