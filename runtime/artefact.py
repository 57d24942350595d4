"""An artefact folder, checked before anything large is loaded."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from trimkv_edge.budget import check_fits
from trimkv_edge.errors import ArtefactError
from trimkv_edge.manifest import Manifest, load_manifest
from trimkv_edge.runtime.chat import TEMPLATE_FILE
from trimkv_edge.runtime.tokenizer import TOKENIZER_FILE, TextTokenizer


@dataclass(frozen=True)
class Artefact:
    """What an export made.

    Attributes:
        folder: where it lies.
        manifest: its checked manifest.
        tokenizer: None if the model came without one (random weights).
        chat_template: text of ``chat_template.jinja``, None if there is none.
    """

    folder: Path
    manifest: Manifest
    tokenizer: TextTokenizer | None
    chat_template: str | None

    @classmethod
    def load(cls, folder: str | os.PathLike[str], verify: bool = True) -> Artefact:
        """Reads the small files of an artefact; engines are opened by :func:`~trimkv_edge.runtime.engines.load_engine`.

        Args:
            folder: the folder that ``trimkv-export`` made.
            verify: compare size and sha256 of every file with the manifest (reads the weights once).

        Raises:
            ArtefactError: missing or damaged folder, unknown schema version, or a tokenizer of another model.
            TrimKVError: the tokenizers package is not installed.
        """
        root = Path(folder)
        manifest = load_manifest(root, verify_files=verify)
        _check_targets(root, manifest)
        return cls(root, manifest, _load_tokenizer(root, manifest), _load_template(root))

    def special_tokens(self) -> dict[str, str]:
        """What chat templates name ``bos_token`` and ``eos_token``; empty where the tokenizer has none."""
        info = self.manifest.tokenizer
        ids = (None, None) if info is None else (info.bos_token_id, next(iter(info.eos_token_ids), None))
        names = ("bos_token", "eos_token")
        return {
            name: "" if token is None or self.tokenizer is None else self.tokenizer.token(token)
            for name, token in zip(names, ids, strict=True)
        }

    def check_fits(self) -> None:
        """Raises :class:`~trimkv_edge.errors.BudgetError` if the artefact needs more memory than is available."""
        check_fits(self.manifest.bytes.peak, f"running {self.folder}")


def _check_targets(folder: Path, manifest: Manifest) -> None:
    for engine, target in manifest.targets.items():
        for name in target.files.values():
            # A file that the manifest does not list was never compared with a hash, and could lie anywhere.
            if name not in manifest.files:
                raise ArtefactError(
                    f"the {engine} target of {folder} names {name!r}, which is not among the artefact's files: "
                    "export it again"
                )
            if not (folder / name).is_file():
                raise ArtefactError(f"{folder / name} is missing: export the artefact again or copy the whole folder")


def _load_tokenizer(folder: Path, manifest: Manifest) -> TextTokenizer | None:
    path = folder / TOKENIZER_FILE
    if manifest.tokenizer is None:
        if path.is_file():
            raise ArtefactError(f"tokenizer mismatch: the manifest says there is none, but {path} exists: remove it")
        return None
    tokenizer = TextTokenizer(path)
    if tokenizer.vocab_size != manifest.tokenizer.vocab_size:
        raise ArtefactError(
            f"tokenizer mismatch: {path} has {tokenizer.vocab_size} tokens, but the manifest says "
            f"{manifest.tokenizer.vocab_size}: put the model's own tokenizer back or export again"
        )
    return tokenizer


def _load_template(folder: Path) -> str | None:
    path = folder / TEMPLATE_FILE
    if not path.is_file():
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArtefactError(f"{path} cannot be read ({error}): copy or export the artefact again") from error
