"""The custom ops on the CPU: events against the oracle, attention against a brute force, and their contracts."""

from __future__ import annotations

import sys

import pytest
import torch
from gpu_attention import CASES, Chunk, Pool, chunks, pools
from gpu_events import Event, event, events
from hypothesis import given, settings

from trimkv_edge.errors import TrimKVError
from trimkv_edge.gpu import ops


@settings(max_examples=150, deadline=None)
@given(events(3))
def test_events_equal_the_oracle(case: Event) -> None:
    case.check(ops.evict)


@settings(max_examples=100, deadline=None)
@given(chunks())
def test_chunks_equal_the_brute_force(case: Chunk) -> None:
    case.check(ops.attend)


@settings(max_examples=60, deadline=None)
@given(pools())
def test_pools_equal_the_brute_force(case: Pool) -> None:
    case.check(ops.attend_pool)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fake_kernels_and_mutated_arguments(dtype: torch.dtype) -> None:
    case = event((2, 3, 2, 4), 8, 4, 0, "levels", dtype=dtype)
    torch.library.opcheck(ops.evict, (*case.tables, case.seen, case.due, case.budget, 1, 1))
    torch.library.opcheck(ops.attend, CASES["chunk"].to(dtype).arguments)
    torch.library.opcheck(ops.attend, CASES["token"].to(dtype).arguments)
    torch.library.opcheck(ops.attend_pool, CASES["pool"].to(dtype).arguments)


def test_one_node_each_in_an_exported_program() -> None:
    class Step(torch.nn.Module):
        def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, live: torch.Tensor) -> object:
            return ops.attend(query, key, value, live, 0.5) + 1.0

    exported = torch.export.export(Step(), CASES["token"].arguments[:4])
    called = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert called == ["trimkv.attend.default", "aten.add.Tensor"]


def test_compiled_event_writes_the_tables_in_place() -> None:
    case = event((2, 3, 2, 4), 8, 4, 0, "levels")
    case.due[:] = True
    case.check(torch.compile(ops.evict, backend="aot_eager"))


@pytest.mark.parametrize("name", ["evict", "attend", "attend_pool"])
def test_each_op_has_a_kernel_for_cuda(name: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"trimkv::{name}", "CUDA")
    assert hasattr(torch.ops.trimkv, name)


def test_cuda_without_triton_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "trimkv_edge.gpu.kernels.evict", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(TrimKVError, match=r"^running on CUDA needs Triton .*: pip install 'trimkv-edge\[triton\]'$"):
        ops.load_kernels("evict")
