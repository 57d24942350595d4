"""The ExecuTorch target where heads share a budget: the modules against lists, programs against the eager engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
from executorch.exir.passes import MemoryPlanningPass
from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  (registers the operators)
from executorch_pooled_artefact import CAPS, CONFIGS, PooledArtefact, pooled_artefact
from factories import gated_model, random_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_artefact import feed, same
from oracle import OracleCache

from trimkv_edge.config import CacheConfig
from trimkv_edge.engine import CacheState
from trimkv_edge.errors import ConfigError, VerificationError
from trimkv_edge.export.executorch import FORMS, export_executorch
from trimkv_edge.export.executorch_check import check_program, operators, portable_kernels
from trimkv_edge.export.executorch_pooled import PooledExportCache

LAYERS, HEADS, GROUP, DIM, SCALE = 2, 2, 3, 4, 0.5
ROWS = LAYERS * HEADS
SIZES = (3, 1, 2, 1, 1, 3)


class ModuleStream:
    """The buffers and steps that are traced, run as they are, beside lists over all heads."""

    def __init__(self, config: CacheConfig, ops: str, seed: int) -> None:
        form = FORMS[ops][True]
        cache = form.cache(config, LAYERS, HEADS, DIM)
        assert isinstance(cache, PooledExportCache)
        self.cache, self.make_step, self.config = cache, form.step, config
        shared = (config.policy, config.min_per_head, config.threshold, config.caps)
        self.oracle = OracleCache(LAYERS, HEADS, config.budget, config.buffer, config.sinks, config.recent, 1, *shared)
        self.rng = np.random.default_rng(seed)
        self.pace = self.rng.exponential(0.5, (LAYERS, HEADS))
        self.seen = self.fill = 0
        cache.reset()

    def feed(self, count: int) -> None:
        step, log_betas = self.make_step(self.cache, torch.tensor([self.fill]), count), []
        for layer in range(LAYERS):
            key, value = self.rng.standard_normal((2, HEADS, count, DIM)).astype(np.float32)
            # Few levels, so that scores are often equal.
            log_beta = -np.ceil(self.rng.exponential(4, (count, HEADS)) * self.pace[layer]).astype(np.float32) / 8
            for i, head in np.ndindex(count, HEADS):
                row = (float(log_beta[i, head]), key[head, i], value[head, i])
                self.oracle.append(layer, head, self.seen + i, *row)
            query = self.rng.standard_normal((HEADS * GROUP, count, DIM)).astype(np.float32)
            log_betas.append(torch.from_numpy(log_beta)[None])
            out = step.attend(layer, *(torch.from_numpy(x)[None] for x in (query, key, value)), SCALE)
            assert out.shape == (1, count, HEADS * GROUP, DIM)
            for i, head in np.ndindex(count, HEADS * GROUP):
                want = self.oracle.attend(layer, head // GROUP, query[head, i], SCALE, up_to=self.seen + i)
                np.testing.assert_allclose(out[0, i, head], want, atol=2e-6)
        self.cache.retain(torch.tensor([self.fill]), torch.cat(log_betas, -1))
        self.seen, self.fill = self.seen + count, self.fill + count

    def end_step(self) -> None:
        ran = self.oracle.end_step(self.seen)
        if ran:
            lengths = self.cache.evict(torch.tensor([self.seen]), torch.tensor([self.fill]))
            assert torch.equal(lengths, self.cache.lengths)
            self.fill = 0
            self.check()

    def check(self) -> None:
        """Every head's kept prefix holds the oracle's entries with their rows."""
        log_betas = self.cache.log_beta.reshape(ROWS, -1)
        for row in range(ROWS):
            entries = self.oracle.entries(*divmod(row, HEADS))
            count = int(self.cache.lengths[row])
            positions = self.cache.kept[row, :count]
            order = positions.argsort()
            assert positions[order].tolist() == [entry.position for entry in entries]
            assert log_betas[row, :count][order].tolist() == [entry.log_beta for entry in entries]
            for table, part in ((self.cache.key(row), "key"), (self.cache.value(row), "value")):
                want = np.array([getattr(entry, part) for entry in entries], np.float32).reshape(-1, DIM)
                assert np.array_equal(table.reshape(-1, DIM)[:count][order].numpy(), want)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_stream_gives_the_oracles_entries_and_attention(data: st.DataObject) -> None:
    buffer = data.draw(st.sampled_from([1, 2, 5]))
    budget = data.draw(st.integers(1, 9))
    sinks = data.draw(st.integers(0, min(2, budget)))
    recent = data.draw(st.integers(0, min(2, budget - sinks)))
    floor = data.draw(st.integers(0, budget))
    caps = [data.draw(st.integers(max(floor, sinks + recent, 1), budget + 9)) for _ in range(ROWS)]
    caps[data.draw(st.integers(0, ROWS - 1))] += max(0, budget * ROWS - sum(caps))
    config = CacheConfig(
        budget,
        buffer,
        1,
        data.draw(st.sampled_from(["global", "layer"])),
        sinks,
        recent,
        min_per_head=floor,
        threshold=data.draw(st.sampled_from([0.0, 0.3])),
        caps=(tuple(caps[:2]), tuple(caps[2:])),
    )
    stream = ModuleStream(config, data.draw(st.sampled_from(list(FORMS))), data.draw(st.integers(0, 99)))
    while stream.seen < budget + 4 * buffer:
        room = config.segment(stream.seen == stream.fill) - stream.fill
        stream.feed(data.draw(st.integers(1, room)))
        stream.end_step()


@pytest.fixture(params=["xnnpack", "portable"])
def artefact(request: pytest.FixtureRequest) -> PooledArtefact:
    return pooled_artefact(request.param)


def test_same_survivors_tokens_and_logits(artefact: PooledArtefact) -> None:
    """Against eager, and against lists that are given eager's log-betas."""
    eager, exported, config = artefact.eager(), artefact.engine(), artefact.manifest.cache
    shared = (config.policy, config.min_per_head, config.threshold, config.caps)
    oracle = OracleCache(2, 2, config.budget, config.buffer, config.sinks, config.recent, 1, *shared)
    tokens = random_tokens(70)
    seen = turn = 0
    lengths = set()
    while seen < len(tokens):
        count = min(SIZES[turn % len(SIZES)], eager.room, len(tokens) - seen)
        want, got = (engine.prefill(tokens[seen : seen + count]) for engine in (eager, exported))
        assert np.abs(want - got).max() <= 1e-4
        assert want.argmax() == got.argmax()
        state = eager.state()
        assert state.lengths is not None
        for layer, head, i in np.ndindex(2, 2, count):
            slot = state.lengths[layer, head] - count + i
            oracle.append(layer, head, seen + i, float(state.log_beta[layer, head, slot]))
        seen, turn = seen + count, turn + 1
        oracle.end_step(seen)
        if eager.room == 0:
            eager.evict()
            exported.evict()
        np.testing.assert_array_equal(eager.kept, exported.kept)
        assert eager.entries == exported.entries
        for where, held in oracle.heads.items():
            want_here = sorted(entry.position for entry in held)
            assert sorted(p for p in exported.survivors()[where].tolist() if p >= 0) == want_here
            assert sorted(p for p in eager.survivors()[where].tolist() if p >= 0) == want_here
        lengths.add(tuple(exported.kept.ravel().tolist()))
    assert oracle.events >= 12
    assert len(lengths) >= 6, "the budget did not move between heads"
    a, b = eager.state(), exported.state()
    for name in ("key", "value", "log_beta"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=1e-4, atol=1e-5)


def test_reset_replays_bit_identically(artefact: PooledArtefact) -> None:
    engine = artefact.engine()
    first, kept = feed(engine, random_tokens(50), SIZES), engine.survivors()
    engine.reset()
    assert (engine.seen, engine.entries) == (0, 0)
    assert same(first, feed(engine, random_tokens(50), SIZES))
    np.testing.assert_array_equal(kept, engine.survivors())


def test_reset_needs_no_zeroed_memory(artefact: PooledArtefact) -> None:
    """A runtime may hand out arenas with anything in them, even NaN."""
    engine = artefact.engine()
    clean = feed(engine, random_tokens(40), SIZES)
    engine.kept[:] = CAPS
    width = 24
    key = np.full((2, 2, width, 32), np.nan, np.float32)
    engine._write(key, key, key[..., 0], np.full((2, 2, width), -7), 0, 0)
    engine.reset()
    assert same(clean, feed(engine, random_tokens(40), SIZES))


@pytest.mark.parametrize("early", [0, 2, 3, 9, 40], ids="after-{}".format)
def test_state_moves_between_engines(artefact: PooledArtefact, early: int) -> None:
    tokens = random_tokens(early + 30)
    straight, eager, exported = artefact.eager(), artefact.eager(), artefact.engine()
    feed(straight, tokens, (1,))
    feed(eager, tokens[:early], (3,))
    feed(exported, random_tokens(33, seed=1), (3,))  # leftovers of another stream must not matter
    exported.load_state(eager.state())
    assert_equal_states(exported.state(), eager.state())
    feed(exported, tokens[early : early + 15], (3, 1))
    eager.reset()
    eager.load_state(exported.state())
    feed(eager, tokens[early + 15 :], (2,))
    np.testing.assert_array_equal(straight.survivors(), eager.survivors())
    np.testing.assert_allclose(straight.state().value, eager.state().value, atol=1e-5)


def test_reading_state_changes_nothing(artefact: PooledArtefact) -> None:
    plain, watched = artefact.engine(), artefact.engine()
    want, got = [], []
    for token in random_tokens(40):
        for engine, out in ((plain, want), (watched, got)):
            if engine.room == 0:
                engine.evict()
            out.append(engine.decode(token))
        watched.load_state(watched.state())
    assert same(want, got)


def test_equal_scores_the_oldest_leave_first(artefact: PooledArtefact) -> None:
    eager, engine = artefact.eager(), artefact.engine()
    feed(eager, random_tokens(11 + 4 * 4), (3,))
    state = eager.state()
    state = replace(state, log_beta=np.where(state.positions >= 0, np.float32(-1e-38), np.float32(0)))
    for each in (eager, engine):
        each.load_state(state)
        each.evict()
    np.testing.assert_array_equal(eager.survivors(), engine.survivors())


def test_a_step_goes_head_by_head_and_copies_nothing() -> None:
    counts = operators(pooled_artefact("xnnpack").program)["forward"]
    assert counts["llama::custom_sdpa.out"] == 4
    assert counts["llama::update_cache.out"] == 8
    assert counts["llama::update_cache_with_indices.out"] == 0
    assert not [name for name in counts if name.startswith(("aten::copy", "aten::index_put"))]


@pytest.mark.parametrize("ops", FORMS)
def test_tables_have_each_heads_slots_and_only_the_chunk_is_dynamic(ops: str) -> None:
    program = pooled_artefact(ops).program
    placeholders = program.exported_program("forward").graph_module.graph.find_nodes(op="placeholder")
    specs = {node.name: node.meta["spec"] for node in placeholders}
    for layer, head in np.ndindex(2, 2):
        for kind in ("key", "value"):
            table = specs[f"b_cache_{kind}_{layer}_{head}"]
            assert np.prod(table.shape) == (CAPS[layer][head] + 4) * 32
    assert [name for name, spec in specs.items() if spec.is_dynamic_shape_tensor] == ["input_ids"]


def test_portable_needs_portable_kernels_only() -> None:
    by_method = operators(pooled_artefact("portable").program)
    names = {name for counts in by_method.values() for name in counts if name.startswith(("aten::", "llama::"))}
    assert names - portable_kernels() <= {"aten::sym_size.int", "aten::_local_scalar_dense"}
    assert not any(counts["delegate"] for counts in by_method.values())


def test_metadata_methods() -> None:
    program = pooled_artefact("portable").engine()._program
    names = ("caps", "pools", "min_per_head", "threshold", "buffer")
    value = {name: program.load_method(f"get_trimkv_{name}").call(()) for name in names}
    assert value == {"caps": [20, 5, 16, 9], "pools": [2], "min_per_head": [0], "threshold": [0.02], "buffer": [4]}


Change = Callable[[torch.Tensor], torch.Tensor]


class _Attention(torch.nn.Module):
    """One head's table, read as ``read`` says; what ``also`` makes of it is added to the result."""

    def __init__(self, read: Change, also: Change) -> None:
        super().__init__()
        self.read, self.also = read, also
        self.register_buffer("key", torch.zeros(1, 8, 1, 4))
        self.register_buffer("value", torch.zeros(1, 8, 1, 4))

    def forward(self, new: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        at = start[0].item()
        torch._check(at >= 0)
        torch._check(at <= 7)
        for table in (self.key, self.value):
            torch.ops.llama.update_cache(new, table, at)
        keys, values = self.read(self.key), self.read(self.value)
        return torch.ops.llama.custom_sdpa(new, keys, values, at, None, 0.0, True, 1.0) + self.also(self.key)


def as_it_is(table: torch.Tensor) -> torch.Tensor:
    return table


def nothing(table: torch.Tensor) -> torch.Tensor:
    return torch.zeros(1)


def scaled(table: torch.Tensor) -> torch.Tensor:
    return table * 1.5


def summed(table: torch.Tensor) -> torch.Tensor:
    return table.flip(1).sum()


@pytest.mark.parametrize(
    ("read", "also", "fault"),
    [(as_it_is, nothing, ""), (scaled, nothing, "reads the cache from arenas"), (as_it_is, summed, "copies b_key")],
    ids=["in place", "attention over a copy", "a copy beside attention"],
)
def test_the_check_refuses_a_program_that_copies(read: Change, also: Change, fault: str) -> None:
    example = (torch.zeros(1, 1, 1, 4), torch.zeros(1, dtype=torch.int64))
    exported = torch.export.export(_Attention(read, also), example, strict=False)
    lowered = to_edge_transform_and_lower(
        {"forward": exported},
        compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
    )
    planning = MemoryPlanningPass(share_mutable_buffers=True)
    program = lowered.to_executorch(ExecutorchBackendConfig(memory_planning_pass=planning))
    if not fault:
        check_program(program, "xnnpack")
        return
    with pytest.raises(VerificationError, match=fault):
        check_program(program, "xnnpack")


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    model = gated_model("qwen3-gqa")
    config = CONFIGS["xnnpack"]
    with pytest.raises(ConfigError, match="graphs need a cap for each"):
        export_executorch(model, replace(config, caps=None), tmp_path)
    with pytest.raises(ConfigError, match="caps are for 1 layers x 4 KV heads, but the model has 2 x 2"):
        export_executorch(model, replace(config, caps=((20, 5, 16, 9),)), tmp_path)
    with pytest.raises(ConfigError, match="lookahead is 3"):
        export_executorch(model, replace(config, lookahead=3), tmp_path)
    assert not list(tmp_path.iterdir())


def assert_equal_states(one: CacheState, other: CacheState) -> None:
    for a, b in zip(vars(one).values(), vars(other).values(), strict=True):
        np.testing.assert_array_equal(a, b)
