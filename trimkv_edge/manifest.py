"""``manifest.json`` of an artefact: versioned, validated, readable without torch (DESIGN section 6)."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from trimkv_edge.config import POSITION_LIMIT, CacheConfig
from trimkv_edge.errors import ArtefactError, ConfigError, TrimKVError
from trimkv_edge.files import replace_text

SCHEMA_VERSION = 1
MANIFEST_FILE = "manifest.json"
_STRICT = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True)
class ModelInfo:
    """The source model. ``weights_sha256`` is over the safetensors files; ``random_weights`` marks shape work."""

    __pydantic_config__ = _STRICT
    name: str
    source: str
    family: str
    weights_sha256: str
    random_weights: bool
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    parameters: int
    max_position_embeddings: int


@dataclass(frozen=True)
class GateInfo:
    """The retention gates. ``sha256`` is of the gate file, empty for random gates."""

    __pydantic_config__ = _STRICT
    kind: str
    source: str
    sha256: str
    intermediate_size: int


@dataclass(frozen=True)
class RopeInfo:
    """``variant``: ``default``, ``short`` or ``long`` (LongRoPE factor set); ``position_limit``: first one refused."""

    __pydantic_config__ = _STRICT
    variant: str = "default"
    position_limit: int = POSITION_LIMIT


@dataclass(frozen=True)
class TokenizerInfo:
    """``vocab_size`` is the tokenizer's own (at most the model's)."""

    __pydantic_config__ = _STRICT
    vocab_size: int
    eos_token_ids: list[int]
    bos_token_id: int | None = None


@dataclass(frozen=True)
class VisionInfo:
    """How pictures enter a stream.

    Attributes:
        image_token_id, video_token_id: placeholders, one for each row of a picture.
        start_token_id, end_token_id: what stands around the placeholders of one picture.
        features: DeepStack features of a picture.
        sizes: (patches down, patches across) that the encoder was exported for.
        patch_size: side of a patch in pixels; merge_size: patches a side of a row; temporal_patch_size: frames in a
            patch.
        mean, std: of the red, green and blue values in [0, 1], which are shifted and divided by them.
    """

    __pydantic_config__ = _STRICT
    image_token_id: int
    video_token_id: int
    start_token_id: int
    end_token_id: int
    features: int
    sizes: tuple[tuple[int, int], ...]
    patch_size: int
    merge_size: int
    temporal_patch_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        least = ("patch_size", "merge_size", "temporal_patch_size")
        wrong = next((name for name in least if getattr(self, name) < 1), None)
        if wrong or self.features < 0:
            wrong = wrong or "features"
            raise ConfigError(f"{wrong} of a vision encoder is {getattr(self, wrong)}, which no model has")
        if not self.sizes or any(side < 1 or side % self.merge_size for size in self.sizes for side in size):
            raise ConfigError(
                f"picture sizes {self.sizes} in patches: give at least one, sides being multiples of {self.merge_size}"
            )
        if len(set(self.sizes)) < len(self.sizes):
            raise ConfigError(f"picture sizes {self.sizes} in patches: one is given twice")

    def rows(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows down and across of a picture of so many patches."""
        return size[0] // self.merge_size, size[1] // self.merge_size

    @property
    def patch_values(self) -> int:
        """Numbers of one patch: 3 channels of all its frames."""
        return 3 * self.temporal_patch_size * self.patch_size**2


@dataclass(frozen=True)
class ByteInfo:
    """Exact cache and weight bytes, estimated peak bytes of a process that runs the artefact."""

    __pydantic_config__ = _STRICT
    cache: int
    weights: int
    peak: int


@dataclass(frozen=True)
class FileInfo:
    __pydantic_config__ = _STRICT
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Target:
    """One exported form. ``files`` maps a role (``program``, ``decoder``, ``evict``) to a file of the folder; ``speed``
    is what :mod:`trimkv_edge.export.speed` measured."""

    __pydantic_config__ = _STRICT
    engine: str
    ops: str
    files: dict[str, str]
    parity: dict[str, Any] = field(default_factory=dict)
    speed: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """Everything a runtime has to know before it loads an artefact. ``embedding_bits``: as asked for; None: the
    scheme's. ``vision``: of models that read pictures."""

    __pydantic_config__ = _STRICT
    schema_version: int
    model: ModelInfo
    gates: GateInfo
    cache: CacheConfig
    rope: RopeInfo
    tokenizer: TokenizerInfo | None
    dtype: str
    quantization: str
    bytes: ByteInfo
    targets: dict[str, Target]
    files: dict[str, FileInfo]
    tools: dict[str, str]
    embedding_bits: int | None = None
    vision: VisionInfo | None = None

    def save(self, folder: Path) -> None:
        """Writes ``manifest.json`` atomically."""
        replace_text(folder / MANIFEST_FILE, json.dumps(asdict(self), indent=2) + "\n")


_ADAPTER = TypeAdapter(Manifest)


def load_manifest(folder: Path, *, verify_files: bool = True) -> Manifest:
    """Reads and checks an artefact's manifest.

    Args:
        folder: the artefact.
        verify_files: also compare size and sha256 of every listed file.

    Raises:
        ArtefactError: no such folder, no or broken manifest, unknown schema version, missing or changed file.
    """
    path = folder / MANIFEST_FILE
    if not folder.is_dir():
        raise ArtefactError(f"no artefact at {folder}: give the folder that trimkv-export made")
    if not path.is_file():
        raise ArtefactError(f"{folder} holds no {MANIFEST_FILE}: give the folder that trimkv-export made")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtefactError(f"{path} cannot be read as JSON ({error}): export the artefact again") from error
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version != SCHEMA_VERSION:
        raise ArtefactError(
            f"{path} has schema version {version!r}, but this trimkv-edge reads version {SCHEMA_VERSION}: "
            "install the version that made it, or export again"
        )
    try:
        # As JSON: strict dataclasses refuse dicts in Python mode.
        manifest = _ADAPTER.validate_json(json.dumps(raw))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ArtefactError(f"{path} is not valid at {where!r}: {first['msg']}: export it again") from error
    except TrimKVError as error:
        raise ArtefactError(f"{path} is not valid: {error}: export it again") from error
    for name in manifest.files:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ArtefactError(f"{path} lists {name!r}, outside the artefact: export it again")
    if verify_files:
        for name, info in manifest.files.items():
            check_file(folder / name, info)
    return manifest


def check_file(path: Path, info: FileInfo) -> None:
    """Compares a file with its manifest entry; raises :class:`ArtefactError` if it is missing or differs."""
    if not path.is_file():
        raise ArtefactError(f"{path} is missing: export the artefact again or copy the whole folder")
    size = path.stat().st_size
    if size != info.bytes:
        raise ArtefactError(f"{path} has {size} bytes, but the manifest says {info.bytes}: copy or export it again")
    digest = file_sha256(path)
    if digest != info.sha256:
        raise ArtefactError(
            f"{path} has sha256 {digest[:12]}..., but the manifest says {info.sha256[:12]}...: it was changed; "
            "copy or export it again"
        )


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def describe_files(folder: Path) -> dict[str, FileInfo]:
    """Size and sha256 of every file in ``folder`` except the manifest."""
    return {
        path.relative_to(folder).as_posix(): FileInfo(file_sha256(path), path.stat().st_size)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST_FILE
    }
