"""Decayed attention in blocks and through FlexAttention against the dense form in float64, values and gradients."""

from __future__ import annotations

from collections.abc import Callable

import dense_training as dense
import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode

from trimkv_edge.training.attention import blockwise_form, causal_blocks, decayed_attention, flex_form
from trimkv_edge.training.retained import retained, skipped

SCALE = 0.37


def run(form: Callable[..., Tensor], inputs: dict[str, Tensor]) -> list[Tensor]:
    """Value and the four gradients."""
    leaves = {name: inputs[name].clone().requires_grad_() for name in ("q", "k", "v", "log_beta")}
    out = form(*leaves.values(), inputs["index"], SCALE)
    seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    (out.double() * seed).sum().backward()
    return [out.detach(), *[leaf.grad for leaf in leaves.values()]]


@pytest.mark.parametrize("length", [1, 7, 33, 150])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("jump", [0, 10**6])
def test_blocks_equal_the_dense_form(length: int, groups: int, jump: int) -> None:
    inputs = dense.case(length, groups=groups, jump=jump)
    for got, want in zip(run(blockwise_form, inputs), run(dense.attention, inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-8)


def test_gradients_by_finite_differences() -> None:
    inputs = dense.case(9, dim=3, jump=5)
    leaves = [inputs[name].requires_grad_() for name in ("q", "k", "v", "log_beta")]
    assert torch.autograd.gradcheck(lambda *x: blockwise_form(*x, inputs["index"], SCALE), leaves)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("jump", [0, 1000])
def test_flex_attention_equals_the_dense_form(groups: int, jump: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's reference of FlexAttention, forward and backward; on CUDA the same ``score_mod`` is compiled.

    torch refuses the backward pass on CPUs by a check of the device, not for want of an implementation.
    """
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    inputs = dense.case(150, groups=groups, dim=16, jump=jump)
    single = {name: t.float() if t.is_floating_point() else t for name, t in inputs.items()}
    for got, want in zip(run(flex_form, single), run(dense.attention, inputs), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("log_beta", [0.0, -1e-8, -1e-3, -50.0])
def test_extreme_retention(log_beta: float) -> None:
    inputs = dense.case(24, jump=10**6)
    inputs["log_beta"] = torch.full_like(inputs["log_beta"], log_beta)
    for got, want in zip(run(blockwise_form, inputs), run(dense.attention, inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-8)


def test_no_decay_is_ordinary_attention() -> None:
    inputs = dense.case(24)
    q, k, v = (inputs[name] for name in "qkv")
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE, enable_gqa=True)
    got = decayed_attention(q, k, v, torch.zeros(2, 24, 2), inputs["index"], SCALE)
    torch.testing.assert_close(got, want.transpose(1, 2))


def test_bfloat16_stays_near() -> None:
    inputs = dense.case(48, jump=500)
    low = {name: inputs[name].bfloat16() for name in "qkv"}
    want = dense.attention(*(low[name].double() for name in "qkv"), inputs["log_beta"], inputs["index"], SCALE)
    got = blockwise_form(*low.values(), inputs["log_beta"].float(), inputs["index"], SCALE)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), want, rtol=0.05, atol=0.05)


def test_grouped_heads_are_an_error_when_they_do_not_divide() -> None:
    inputs = dense.case(8)
    with pytest.raises(RuntimeError):
        decayed_attention(inputs["q"][:, :3], inputs["k"], inputs["v"], inputs["log_beta"], inputs["index"], SCALE)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operator made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_no_tensor_is_quadratic_in_the_row() -> None:
    """Attention, retained sums, a skipped stretch and CUDA's block mask: a few numbers per token and dimension."""
    length = 2048
    inputs = dense.case(length, heads=1, groups=2, rows=1)
    with Largest() as seen:
        run(blockwise_form, inputs)
        log_beta = inputs["log_beta"].requires_grad_()
        held = retained(log_beta, inputs["index"]) + skipped(log_beta, torch.tensor([[0, 1500, 1500, 9000]]))
        held.sum().backward()
        causal_blocks.__wrapped__(length, torch.device("cpu"))
    assert length <= seen.elements <= 16 * length


@pytest.mark.parametrize("length", [1, 128, 300, 1024])
def test_block_mask_is_causal(length: int) -> None:
    mask = causal_blocks(length, torch.device("cpu"))
    blocks = -(-length // 128)
    assert torch.equal(mask.to_dense()[0, 0].bool(), torch.ones(blocks, blocks).tril().bool())
