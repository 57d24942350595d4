"""A residual sum and the RMSNorm that reads it as one ``com.microsoft::SkipSimplifiedLayerNormalization``."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import pattern


class _SkipNorm(pattern.RewriteRuleClassBase):
    """The sum and the norm as transformers writes it; the next layer adds to the sum, so it is an output too."""

    def pattern(self, op: Any, x: Any, skip: Any, two: Any, axis: Any, epsilon: Any, weight: Any) -> Any:
        total = op.Add(x, skip)
        mean = op.ReduceMean(op.Pow(total, two), axis, _allow_other_attributes=True)
        normed = op.Mul(total, op.Reciprocal(op.Sqrt(op.Add(mean, epsilon))))
        return op.Mul(weight, normed), total

    def check(self, *context: Any, **values: ir.Value) -> Any:
        result, x, skip = pattern.MatchResult(), values["x"], values["skip"]
        if x.shape is None or skip.shape is None or len(x.shape) != 3 or x.shape != skip.shape:
            return result.fail("not a sum of two hidden states")
        if x.dtype != ir.DataType.FLOAT:
            return result.fail("not float32")
        if _number(values["two"]) != 2 or _number(values["axis"]) != -1 or _number(values["epsilon"]) is None:
            return result.fail("not an RMSNorm")
        return result

    def rewrite(self, op: Any, x: ir.Value, skip: ir.Value, epsilon: ir.Value, weight: ir.Value, **_: ir.Value) -> Any:
        normed, _mean, _inverse, total = op.SkipSimplifiedLayerNormalization(
            x, skip, weight, epsilon=_number(epsilon), _outputs=4, _domain="com.microsoft"
        )
        return normed, total


def _number(value: ir.Value) -> float | None:
    tensor = value.const_value
    return float(tensor.numpy().reshape(-1)[0]) if tensor is not None and tensor.size == 1 else None


def fuse_skip_norms(model: ir.Model) -> int:
    """Rewrites ``model`` in place.

    Returns:
        how many were fused.
    """
    rules = pattern.RewriteRuleSet([_SkipNorm.rule()])
    return int(rules.apply_to_model(model))
