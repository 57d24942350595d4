"""Sessions on disk: what is in the file, going on from it, and everything that can go wrong with it."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import session_faults
from factories import gated_model, random_tokens
from numpy_engine import VOCAB, NumpyEngine
from onnx_artefact import make_manifest, spread_gates
from session_faults import ORIGIN, damages, record, same, second_process
from small_manifest import manifest as small_manifest
from text_artefact import text_artefact
from text_tokenizers import byte_level

from trimkv_edge.config import CacheConfig
from trimkv_edge.engine import CacheState, Engine
from trimkv_edge.errors import ConfigError, SessionError
from trimkv_edge.export.onnx import export_onnx
from trimkv_edge.kv_scales import KVScales
from trimkv_edge.manifest import FileInfo
from trimkv_edge.models.eager import eager_engine
from trimkv_edge.runtime import file_lock
from trimkv_edge.runtime.artefact import Artefact
from trimkv_edge.runtime.engines.onnx_pooled import OnnxPooledEngine
from trimkv_edge.runtime.sampling import SamplingParams
from trimkv_edge.runtime.session import Session
from trimkv_edge.runtime.session_file import Origin, SessionFile, artefact_scales, read_session

CONFIG = CacheConfig(budget=8, buffer=6, prefill_chunk=4)
HERE = Origin("numpy", "", "none float32", "rg random", "", "default", "", CONFIG)
DRAW = SamplingParams(temperature=20.0, top_p=0.95, repetition_penalty=1.1, seed=5)
TOKENIZER = byte_level(VOCAB)


def session(engine: Engine | None = None, origin: Origin | None = HERE, **settings: Any) -> Session:
    return Session(NumpyEngine(CONFIG) if engine is None else engine, TOKENIZER, origin=origin, **settings)


def tokens(count: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(3, VOCAB, count)]


def parse(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Metadata and tensors by the format's definition, without its library."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    metadata = header.pop("__metadata__")
    types = {"F32": np.float32, "F16": np.float16, "I64": np.int64, "I32": np.int32, "I8": np.int8, "U8": np.uint8}
    body = data[8 + size :]
    tensors = {
        name: np.frombuffer(body[slice(*entry["data_offsets"])], types[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in header.items()
    }
    return metadata, tensors


def test_the_file_holds_live_entries_only_and_its_numbers(tmp_path: Path) -> None:
    run = session(note_tokens=True)
    run.feed(tokens(31))
    (piece,) = run.generate(1)
    run.save(tmp_path / "s")
    metadata, tensors = parse(tmp_path / "s")
    state, live = run.engine.state(), 8 + (31 - 14) % 6
    assert run.engine.live == live
    for name in ("key", "value", "log_beta", "positions"):
        table = getattr(state, name)
        np.testing.assert_array_equal(tensors[name], table.reshape(-1, *table.shape[3:]))
    assert tensors["lengths"].tolist() == [[live, live], [live, live]]
    assert tensors["tokens"].tolist() == tokens(31)
    bits = np.unpackbits(tensors["seen_tokens"])[:VOCAB]
    assert set(np.flatnonzero(bits)) == set(tokens(31))
    np.testing.assert_array_equal(tensors["logits"], run.logits)
    said = json.loads(metadata["session"])
    assert (said["version"], said["seen"], said["pending"]) == (1, 31, piece.token)
    assert said["newest"] == tokens(31)[-8:]
    assert said["origin"]["cache"]["budget"] == 8
    data = (tmp_path / "s").read_bytes()
    blank = data.replace(metadata["sha256"].encode(), b"0" * 64)
    assert hashlib.sha256(blank).hexdigest() == metadata["sha256"]
    assert [file.name for file in tmp_path.iterdir()] == ["s"]


def test_float16_caches_take_half_the_bytes_where_nothing_is_lost(tmp_path: Path) -> None:
    origin = replace(ORIGIN, cache=replace(session_faults.CONFIG, kv_dtype="float16"))
    exact = record(1)
    half = [table.astype(np.float16).astype(np.float32) for table in (exact.state.key, exact.state.value)]
    rounded = replace(exact, state=replace(exact.state, key=half[0], value=half[1]))
    for what, kind in ((rounded, np.float16), (exact, np.float32)):
        SessionFile(tmp_path / "s").write(what, origin)
        assert parse(tmp_path / "s")[1]["key"].dtype == kind
        assert same(read_session(tmp_path / "s", origin), what)


def test_int8_caches_take_a_quarter_of_the_bytes(tmp_path: Path) -> None:
    model = spread_gates(gated_model("llama-gqa"))
    config = CacheConfig(14, 8, 8, kv_dtype="int8")
    shape = (model.config.num_hidden_layers, model.config.num_key_value_heads, model.head_dim)
    key, value = np.random.default_rng(0).uniform(0.005, 0.05, (2, *shape)).astype(np.float32)
    scales, origin = KVScales(key, value), replace(HERE, cache=config, kv_scales="ab")

    def open_(known: KVScales | None = scales) -> Session:
        return session(eager_engine(model, config, scales=scales), origin, scales=known)

    first, plain, second = open_(), open_(None), open_()
    stream = random_tokens(40)  # leaves as many entries as a head has dimensions
    for run, name in ((first, "small"), (plain, "large")):
        run.feed(stream)
        run.save(tmp_path / name)
        second.load(tmp_path / name)
        assert_equal(second.engine.state(), run.engine.state())
    assert first.engine.live == first.engine.head_dim
    small, large = parse(tmp_path / "small")[1], parse(tmp_path / "large")[1]
    assert (small["key"].dtype, large["key"].dtype) == (np.int8, np.float32)
    table = small["value"].reshape(*shape[:2], -1, shape[2]) * value[:, :, None].astype(np.float64)
    np.testing.assert_allclose(table, first.engine.state().value, rtol=1e-6)
    off = replace(scales, key=key * np.float32(1.01))  # not this cache's: nothing may be rounded
    other = open_(off)
    other.load(tmp_path / "small")
    other.save(tmp_path / "off")
    assert parse(tmp_path / "off")[1]["key"].dtype == np.float32


def test_scales_come_from_the_artefact(tmp_path: Path) -> None:
    artefact = Artefact.load(text_artefact())
    assert artefact_scales(artefact) is None
    assert Origin.of(artefact.manifest).kv_scales == ""
    model, target = artefact.manifest.model, artefact.manifest.targets["onnx"]
    shape = (model.num_layers, model.num_kv_heads, model.head_dim)
    KVScales(np.full(shape, 0.25, np.float32), np.full(shape, 0.5, np.float32)).save(tmp_path / "scales.npz")
    digest = hashlib.sha256((tmp_path / "scales.npz").read_bytes()).hexdigest()
    manifest = replace(
        artefact.manifest,
        targets={"onnx": replace(target, files={**target.files, "kv_scales": "scales.npz"})},
        files={"scales.npz": FileInfo(digest, 1)},
    )
    found = artefact_scales(replace(artefact, folder=tmp_path, manifest=manifest))
    assert found is not None
    assert (found.key == 0.25).all()
    assert Origin.of(manifest).kv_scales == digest


@pytest.mark.parametrize("sampling", [SamplingParams(), DRAW])
@pytest.mark.parametrize("cut", [0, 1, 9, 24])
def test_a_loaded_session_goes_on_as_the_one_that_was_saved(tmp_path: Path, sampling: SamplingParams, cut: int) -> None:
    whole = session()
    whole.feed(tokens(25))
    want = list(whole.generate(30, sampling))
    first = session()
    first.feed(tokens(25))
    begun = list(islice(first.generate(30, sampling), cut))
    first.save(tmp_path / "s")
    second = session()
    second.feed(tokens(40, 9))  # replaced by the load
    second.load(tmp_path / "s")
    assert second.pending == (begun[-1].token if begun else None)
    rest = list(second.generate(30 - cut, second.sampler or sampling))
    assert [piece.token for piece in begun + rest] == [piece.token for piece in want]
    np.testing.assert_array_equal(second.engine.survivors(), whole.engine.survivors())
    np.testing.assert_array_equal(second.engine.state().key, whole.engine.state().key)
    made = second.statistics()
    assert (made.prompt_tokens, made.new_tokens, made.position) == (0, 30 - cut, 25 + 29)


def test_noted_tokens_go_on(tmp_path: Path) -> None:
    first, plain = session(note_tokens=True), session()
    for run in (first, plain):
        run.feed(tokens(20))
        run.save(tmp_path / f"{run is first}")
    second = session()
    second.load(tmp_path / "True")
    second.feed(tokens(5, 1))
    assert second.tokens is not None
    assert second.tokens.tolist() == tokens(20) + tokens(5, 1)
    with pytest.raises(SessionError, match="no note of the tokens"):
        first.load(tmp_path / "False")
    assert plain.tokens is None


def test_budgets_that_heads_share_go_on_in_the_other_engine(tmp_path: Path) -> None:
    config = CacheConfig(22, 8, 8, "global", caps=((48, 16), (40, 24)))
    model = spread_gates(gated_model("qwen3-gqa", "rg10"))
    target = export_onnx(model, config, tmp_path, ops="standard")
    manifest = make_manifest(model, config, target)

    def open_(name: str) -> Session:
        onnx = name == "onnx"
        engine = OnnxPooledEngine(tmp_path, manifest, target, threads=1) if onnx else eager_engine(model, config)
        return session(engine, Origin.of(manifest))

    stream = random_tokens(90, 3)
    whole, relay = open_("eager"), open_("onnx")
    whole.feed(stream)
    for start, following in ((0, "eager"), (31, "onnx"), (64, "eager")):
        relay.feed(stream[start : {0: 31, 31: 64, 64: 90}[start]])
        relay.save(tmp_path / "s")
        assert parse(tmp_path / "s")[1]["key"].shape[0] == relay.engine.entries
        held = relay.engine.state()
        relay = open_(following)
        relay.load(tmp_path / "s")
        assert_equal(relay.engine.state(), held)
    np.testing.assert_array_equal(relay.engine.survivors(), whole.engine.survivors())
    assert relay.logits is not None
    assert whole.logits is not None
    np.testing.assert_allclose(relay.logits, whole.logits, atol=1e-3)


def assert_equal(one: CacheState, other: CacheState) -> None:
    assert (one.seen, one.fill) == (other.seen, other.fill)
    for name in ("key", "value", "log_beta", "positions", "lengths"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def changed(**parts: Any) -> Origin:
    return replace(ORIGIN, **parts)


@pytest.mark.parametrize(
    ("origin", "message"),
    [
        (changed(weights_sha256="ef" * 32), r"weights_sha256 = abababababab\.\.\., but this artefact is made up"),
        (changed(gates_sha256="ef" * 32), "gates_sha256"),
        (changed(kv_scales="ef" * 32), "kv_scales"),
        (changed(rope="long"), "rope = 'default', .* with 'long'"),
        (changed(weights="int4 float32"), "weights = 'none float32', .* with 'int4 float32'"),
        (changed(cache=replace(session_faults.CONFIG, budget=96)), "budget = 64, .* with 96"),
        (changed(cache=replace(session_faults.CONFIG, policy="streaming")), "policy = 'trimkv', .* with 'streaming'"),
    ],
)
def test_another_artefact_is_refused_and_what_differs_is_named(tmp_path: Path, origin: Origin, message: str) -> None:
    SessionFile(tmp_path / "s").write(record(1), ORIGIN)
    with pytest.raises(SessionError, match=message + ".*use the artefact that made it"):
        read_session(tmp_path / "s", origin)
    assert same(read_session(tmp_path / "s", changed(model="its other name")), record(1))


def test_artefacts_say_what_sessions_depend_on() -> None:
    manifest = small_manifest()
    origin = Origin.of(manifest)
    assert Origin.of(replace(manifest, targets={}, files={}, tools={}, bytes=replace(manifest.bytes, peak=5))) == origin
    assert Origin.of(replace(manifest, embedding_bits=8)) != origin
    moved = replace(manifest, gates=replace(manifest.gates, source="elsewhere"))
    assert Origin.of(moved) == origin
    random = replace(manifest, gates=replace(manifest.gates, sha256="", source="random (seed 1)"))
    other = replace(manifest, gates=replace(manifest.gates, sha256="", source="random (seed 2)"))
    assert Origin.of(random) != Origin.of(other)


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the JSON of a file and makes its checksum right again."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    said = json.loads(header["__metadata__"]["session"])
    change(said)
    header["__metadata__"] = {"session": json.dumps(said), "sha256": "0" * 64}
    text = json.dumps(header, separators=(",", ":")).encode()
    blank = struct.pack("<Q", len(text)) + text + data[8 + size :]
    digest = hashlib.sha256(blank).hexdigest().encode()
    path.write_bytes(blank.replace(b'"sha256":"' + b"0" * 64, b'"sha256":"' + digest))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda said: said.update(version=2), "format version 2, but this trimkv-edge reads version 1: install"),
        (lambda said: said.update(extra=1), "not valid at 'extra'"),
        (lambda said: said.update(seen="31"), "not valid at 'seen'"),
        (lambda said: said.pop("pending"), "not valid at 'pending'"),
        (lambda said: said.update(pending=VOCAB), "another vocabulary"),
        (lambda said: said.update(newest=[-1]), "another vocabulary"),
        (lambda said: said.update(seen=2**40), "another vocabulary or position limit"),
        (lambda said: said.update(seen=32), "does not fit this cache"),
        (lambda said: said.update(fill=1), "does not fit this cache: .*different lengths"),
        (lambda said: said["origin"]["cache"].update(budget=0), "not valid at 'origin"),
    ],
)
def test_a_header_that_cannot_be_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    run = session()
    run.feed(tokens(31))
    run.save(tmp_path / "s")
    rewrite(tmp_path / "s", lambda said: None)
    run.load(tmp_path / "s")
    before = run.engine.state()
    rewrite(tmp_path / "s", change)
    with pytest.raises(SessionError, match=message):
        run.load(tmp_path / "s")
    np.testing.assert_array_equal(run.engine.state().key, before.key)
    assert run.engine.seen == 31


@pytest.mark.parametrize("content", [None, b"", b"\x10", b"text of another kind " * 100])
def test_what_is_no_session_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "s"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SessionError, match="No such file" if content is None else "no session file"):
        read_session(path, ORIGIN)


def test_sessions_that_cannot_be_saved_say_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing was fed"):
        session().save(tmp_path / "s")
    plain = session(origin=None)
    plain.feed(tokens(3))
    with pytest.raises(ConfigError, match="give it an origin"):
        plain.save(tmp_path / "s")
    for bad in (tmp_path, tmp_path / "nowhere" / "s"):
        with pytest.raises(SessionError, match="is a folder or lies in none"):
            SessionFile(bad).write(record(1), ORIGIN)


def test_an_artefact_opens_sessions_that_can_be_saved(tmp_path: Path) -> None:
    artefact = Artefact.load(text_artefact())
    first, second = Session.open(artefact), Session.open(artefact)
    first.feed(tokens(70))
    first.save(tmp_path / "s")
    second.load(tmp_path / "s")
    np.testing.assert_array_equal(first.engine.survivors(), second.engine.survivors())
    assert list(first.generate(20, DRAW)) == list(second.generate(20, DRAW))


def test_damage_is_always_refused(tmp_path: Path) -> None:
    SessionFile(tmp_path / "s").write(record(1), ORIGIN)
    assert damages(tmp_path / "s", 200) == {"refused": 200, "accepted": 0, "other": 0}
    assert same(read_session(tmp_path / "s", ORIGIN), record(1))


def faulty(*arguments: object) -> dict[str, int]:
    command = [sys.executable, session_faults.__file__, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found: dict[str, int] = ast.literal_eval(done.stdout)
    return found


def test_a_killed_save_leaves_the_old_or_the_new_file(tmp_path: Path) -> None:
    found = faulty("kills", tmp_path / "s", 20, 1)
    assert (found["neither"], found["end"]) == (0, 0)
    assert found["old"] + found["new"] == 20
    assert found["beside"] > 0  # some came in the middle of writing


def test_a_full_disk_keeps_the_old_file(tmp_path: Path) -> None:
    sizes = [0, 1, 1000, 100_000, 200_000]
    assert faulty("full", tmp_path / "s", *sizes) == {"refused": 5, "kept": 5, "nothing": 5}


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="Linux")
def test_the_file_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a loss of power would show cannot be tried here, but the order of calls can."""
    steps: list[str] = []
    sync, rename = os.fsync, os.replace

    def fsync(handle: int) -> None:
        steps.append(f"sync {Path(os.readlink(f'/proc/self/fd/{handle}')).name}")
        sync(handle)

    def replace_(source: Path, target: Path) -> None:
        steps.append(f"rename {source.name} {target.name}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace_)
    SessionFile(tmp_path / "s").write(record(1), ORIGIN)
    assert steps == ["sync .s.tmp", "rename .s.tmp s", f"sync {tmp_path.name}"]


def test_a_second_process_is_told_who_has_the_file(tmp_path: Path) -> None:
    told = second_process(tmp_path / "s")
    assert f"is in use by process {os.getpid()}, which will save it: let it end first" in told
    assert list(tmp_path.iterdir()) == []
    with SessionFile(tmp_path / "s").open(), pytest.raises(SessionError, match="in use by this process"):
        SessionFile(tmp_path / "s").write(record(1), ORIGIN)
    SessionFile(tmp_path / "s").write(record(1), ORIGIN)


def test_a_system_without_locks_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with pytest.raises(SessionError, match="no flock"), file_lock.locked(tmp_path / "s"):
        pass
