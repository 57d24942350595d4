"""A session on disk: one safetensors file, its settings as JSON in the file's metadata. Any engine reads any engine's.

Tensors (only entries that live): ``key``, ``value`` float32 ``[entries, head_dim]``, or as the cache stores them, where
that is exact: float16, or int8 with ``key_scale``, ``value_scale`` float32 ``[layers, kv_heads, head_dim]``;
``log_beta`` float32 ``[entries]``; ``positions`` int64 ``[entries]``; head by head, layer by layer, in slot order.
``lengths`` int64 ``[layers, kv_heads]``; ``seen_tokens`` uint8, a bit for each token of the vocabulary; ``logits``
float32 ``[vocab_size]``; ``tokens`` int32 ``[seen]``, if the stream was noted.

Metadata: ``session``, the JSON of :class:`Header`; ``sha256``, over the whole file with zeros in its own place.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load, save

from trimkv_edge.config import CacheConfig
from trimkv_edge.engine import CacheState, Cursor, IntArray
from trimkv_edge.errors import SessionError, TrimKVError, reason
from trimkv_edge.files import replace_durably
from trimkv_edge.kv_scales import KVScales, from_int8, load_scales, to_int8
from trimkv_edge.manifest import Manifest
from trimkv_edge.runtime.artefact import Artefact
from trimkv_edge.runtime.file_lock import locked
from trimkv_edge.runtime.place import Place
from trimkv_edge.runtime.sampling import SamplerState

VERSION = 1
_STRICT = ConfigDict(extra="forbid", strict=True)
_CHECKSUM = re.compile(rb'"sha256":"([0-9a-f]{64})"')
_NO_CHECKSUM = "0" * 64
_LONGEST_HEADER = 2**20
_BY_ENTRY = ("key", "value", "log_beta", "positions")
_ALWAYS = {*_BY_ENTRY, "lengths", "seen_tokens"}
_SCALES = {"key_scale", "value_scale"}


@dataclass(frozen=True)
class Origin:
    """What a cache depends on, and so what has to be alike where it goes on: everything but the engine.

    Attributes:
        model: name, for messages.
        weights_sha256, gates_sha256: as in the manifest; gates: their kind, and where random ones are from.
        weights: scheme and bits of the stored weights, and the type of activations.
        rope: LongRoPE factor set.
        kv_scales: sha256 of the scales of an int8 cache, else empty.
        cache: all settings of the cache.
    """

    __pydantic_config__ = _STRICT
    model: str
    weights_sha256: str
    weights: str
    gates: str
    gates_sha256: str
    rope: str
    kv_scales: str
    cache: CacheConfig

    @classmethod
    def of(cls, manifest: Manifest) -> Origin:
        """The origin of sessions that run on an artefact."""
        model, gates, bits = manifest.model, manifest.gates, manifest.embedding_bits
        return cls(
            model.name,
            model.weights_sha256,
            f"{manifest.quantization} {manifest.dtype}" + ("" if bits is None else f", embedding {bits} bits"),
            gates.kind if gates.sha256 else f"{gates.kind} {gates.source}",
            gates.sha256,
            manifest.rope.variant,
            "" if (name := _scales_file(manifest)) is None else manifest.files[name].sha256,
            manifest.cache,
        )


@dataclass(frozen=True)
class Header:
    """Numbers of a session, beside its tensors; see :class:`~trimkv_edge.runtime.place.Place` and ``CacheState``."""

    __pydantic_config__ = _STRICT
    version: int
    origin: Origin
    seen: int
    fill: int | None
    pending: int | None
    newest: tuple[int, ...]
    sampler: SamplerState | None
    cursor: Cursor | None = None


@dataclass(frozen=True)
class Record:
    """A whole session.

    Attributes:
        place: where it stands; state: its cache.
        tokens: int64 ``[seen]``, the stream so far, if it was noted.
        scales: of an int8 cache; without them its numbers are stored as float32.
    """

    place: Place
    state: CacheState
    tokens: IntArray | None = None
    scales: KVScales | None = None


_HEADER = TypeAdapter(Header)


class SessionFile:
    """The right to save a session under a name, for as long as a ``with`` block has it.

    Args:
        path: of the file, which need not exist.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()
        self._held = False

    @contextmanager
    def open(self) -> Iterator[SessionFile]:
        """Takes the lock.

        Raises:
            SessionError: another process has it, or nothing can be written there.
        """
        if not self.path.parent.is_dir() or self.path.is_dir():
            raise SessionError(f"session file {self.path} is a folder or lies in none: name a file in a folder")
        with locked(self.path):
            self._held = True
            try:
                yield self
            finally:
                self._held = False

    def write(self, record: Record, origin: Origin) -> None:
        """Replaces the file, if it can be written in full.

        Raises:
            SessionError: it cannot; an old file is as it was.
        """
        if not self._held:
            with self.open():
                return self.write(record, origin)
        tensors = _tensors(record, origin)
        metadata = {"session": _header_text(record, origin), "sha256": _NO_CHECKSUM}

        # Not save_file: that one writes under a random name first, and a killed process would leave it for ever.
        data = memoryview(save(tensors, metadata))
        found = _CHECKSUM.search(data, 0, _LONGEST_HEADER)
        assert found is not None  # it is in the metadata
        digest = hashlib.sha256(data).hexdigest().encode()

        def write(beside: Path) -> None:
            with beside.open("wb") as stream:
                stream.writelines((data[: found.start(1)], digest, data[found.end(1) :]))

        try:
            replace_durably(self.path, write)
        except OSError as error:
            raise SessionError(
                f"{self.path} cannot be saved ({reason(error)}): it needs {len(data)} bytes; free space or choose "
                "another place; a file that was there is as it was"
            ) from error


def read_session(path: str | os.PathLike[str], origin: Origin) -> Record:
    """Reads a file and checks all of it.

    Args:
        path: of a file that :meth:`SessionFile.write` made.
        origin: of the session that is to go on from it.

    Raises:
        SessionError: missing, damaged, of another format version, or of another origin.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SessionError(
            f"session file {path} cannot be read ({reason(error)}): give a file that was saved as a session"
        ) from error
    _check_sum(path, data)
    header, tensors = _parse(path, data)
    _check_origin(path, header.origin, origin)
    try:
        return _record(header, tensors)
    except (ValueError, TrimKVError) as error:
        raise SessionError(f"session file {path} contradicts itself ({error}): it was not made by a session") from error


def _header_text(record: Record, origin: Origin) -> str:
    place, state = record.place, record.state
    header = Header(VERSION, origin, state.seen, state.fill, place.pending, place.newest, place.sampler, place.cursor)
    fields = asdict(header)
    if header.cursor is None:  # versions without pictures refuse what they do not know
        del fields["cursor"]
    return json.dumps(fields)


def _tensors(record: Record, origin: Origin) -> dict[str, npt.NDArray[Any]]:
    state, place = record.state, record.place
    rows = state.key.shape[:2]
    lengths = np.full(rows, state.live) if state.lengths is None else state.lengths
    live = np.arange(state.live) < lengths[..., None]
    tensors: dict[str, npt.NDArray[Any]] = {
        **_stored(state, origin.cache.kv_dtype, record.scales),
        "log_beta": state.log_beta,
        "positions": state.positions,
        "lengths": lengths.astype(np.int64),
        "seen_tokens": place.seen_tokens,
    }
    if place.logits is not None:
        tensors["logits"] = place.logits
    if record.tokens is not None:
        tensors["tokens"] = record.tokens.astype(np.int32)
    for name in _BY_ENTRY:
        tensors[name] = tensors[name][live]
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


def _stored(state: CacheState, kv_dtype: str, scales: KVScales | None) -> dict[str, npt.NDArray[Any]]:
    """Keys and values as the cache stores them, if no number changes: an eager float16 cache holds any numbers."""
    small: dict[str, npt.NDArray[Any]]
    tables: dict[str, npt.NDArray[Any]] = {"key": state.key, "value": state.value}
    if kv_dtype == "float16":
        with np.errstate(over="ignore"):
            small = {name: table.astype(np.float16) for name, table in tables.items()}
        if all(np.array_equal(small[name].astype(np.float32), table) for name, table in tables.items()):
            return small
    if scales is not None:
        factors = {"key": scales.key, "value": scales.value}
        small = {name: to_int8(table, factors[name]) for name, table in tables.items()}
        if all(np.array_equal(from_int8(small[name], factors[name]), table) for name, table in tables.items()):
            return {**small, "key_scale": scales.key, "value_scale": scales.value}
    return tables


def _check_sum(path: Path, data: bytes) -> None:
    found = _CHECKSUM.search(data, 0, _LONGEST_HEADER)
    if found is None:
        raise SessionError(f"{path} is no session file, or its beginning is damaged: give a file that was saved as one")
    digest = hashlib.sha256(memoryview(data)[: found.start(1)])
    digest.update(_NO_CHECKSUM.encode())
    digest.update(memoryview(data)[found.end(1) :])
    if digest.hexdigest().encode() != found[1]:
        raise SessionError(
            f"session file {path} is damaged (its sha256 differs): it was cut short or changed; use another copy, or "
            "read the text again"
        )


def _parse(path: Path, data: bytes) -> tuple[Header, dict[str, npt.NDArray[Any]]]:
    size = int.from_bytes(data[:8], "little")
    try:
        text = json.loads(data[8 : 8 + size])["__metadata__"]["session"]
        version = json.loads(text)["version"]
        if version != VERSION:
            raise SessionError(
                f"session file {path} has format version {version!r}, but this trimkv-edge reads version {VERSION}: "
                "install the version that made it, or read the text again"
            )
        return _HEADER.validate_json(text), load(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise SessionError(f"session file {path} is not valid at {where!r}: {first['msg']}: save it again") from error
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise SessionError(f"{path} is no session file ({error}): give a file that was saved as one") from error


def _check_origin(path: Path, found: Origin, wanted: Origin) -> None:
    made, now = ({**asdict(origin.cache), **asdict(origin)} for origin in (found, wanted))
    for name in made:
        if name not in ("model", "cache") and made[name] != now[name]:
            raise SessionError(
                f"session file {path} was made with {found.model}, {name} = {_short(made[name])}, but this artefact is "
                f"{wanted.model} with {_short(now[name])}: use the artefact that made it, or read the text again"
            )


def _short(value: object) -> str:
    text = str(value)
    return repr(value) if len(text) <= 40 else f"{text[:12]}..."


def _record(header: Header, tensors: dict[str, npt.NDArray[Any]]) -> Record:
    names = set(tensors)
    if not _ALWAYS <= names <= _ALWAYS | _SCALES | {"logits", "tokens"} or names & _SCALES not in (set(), _SCALES):
        raise ValueError(f"its tensors are {sorted(names)}")
    lengths = tensors["lengths"]
    if lengths.ndim != 2 or lengths.size == 0 or lengths.min() < 0:
        raise ValueError("its lengths are no table of layers and heads")
    most = int(lengths.max())
    if header.fill is None and lengths.min() != most:
        raise ValueError("heads of different lengths need a fill")
    live = np.arange(most) < lengths[..., None]
    shape = (*live.shape, *tensors["key"].shape[1:])
    key, value, log_beta = np.zeros(shape, np.float32), np.zeros(shape, np.float32), np.zeros(live.shape, np.float32)
    positions = np.full(live.shape, -1, np.int64)
    for table, name in ((key, "key"), (value, "value"), (log_beta, "log_beta"), (positions, "positions")):
        table[live] = tensors[name]
    if "key_scale" in names:
        key, value = from_int8(key, tensors["key_scale"]), from_int8(value, tensors["value_scale"])
    state = CacheState(
        header.seen,
        key,
        value,
        log_beta,
        positions,
        None if header.fill is None else lengths,
        header.fill,
        header.cursor,
    )
    tokens = tensors.get("tokens")
    if tokens is not None and tokens.shape != (header.seen,):
        raise ValueError(f"it notes {tokens.size} tokens of {header.seen}")
    place = Place(
        header.seen,
        header.pending,
        header.newest,
        tensors.get("logits"),
        tensors["seen_tokens"],
        header.sampler,
        header.cursor,
    )
    return Record(place, state, None if tokens is None else tokens.astype(np.int64))


def check_fits(path: str | os.PathLike[str], record: Record, vocab_size: int, position_limit: int) -> None:
    """Raises :class:`SessionError` if a record's numbers are of another model than its origin says."""
    place, logits = record.place, record.place.logits
    known = [*place.newest, *([] if place.pending is None else [place.pending])]
    if (
        not 0 < place.seen <= position_limit
        or any(not 0 <= token < vocab_size for token in known)
        or place.seen_tokens.shape != (-(-vocab_size // 8),)
        or logits is None
        or logits.shape != (vocab_size,)
    ):
        raise SessionError(f"session file {path} is of another vocabulary or position limit: read the text again")


def artefact_scales(artefact: Artefact) -> KVScales | None:
    """Of an int8 cache.

    Raises:
        ArtefactError: its file is missing or damaged.
    """
    name, model = _scales_file(artefact.manifest), artefact.manifest.model
    if name is None:
        return None
    return load_scales(artefact.folder / name, (model.num_layers, model.num_kv_heads, model.head_dim))


def _scales_file(manifest: Manifest) -> str | None:
    names = (target.files.get("kv_scales") for target in manifest.targets.values())
    return next((name for name in names if name), None)
