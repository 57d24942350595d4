"""``torch.onnx.export`` as this project uses it: dynamo, inference, quiet."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch
from onnxscript.optimizer import optimize_ir
from torch import nn
from torch.onnx import ONNXProgram


def trace(
    module: nn.Module,
    args: tuple[Any, ...],
    inputs: list[str],
    outputs: list[str],
    opset: int,
    dynamic_shapes: dict[str, Any] | None = None,
    fold_limit: int | None = None,
) -> ONNXProgram:
    """Exports ``module`` called with ``args``; the graph's inputs and outputs get the given names, in order.

    Constants of up to ``fold_limit`` elements are folded; None: whatever their size.
    """
    noisy = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = noisy.level
    noisy.setLevel(logging.ERROR)  # one warning per torchvision operator that is not installed
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module,
                args,
                input_names=inputs,
                output_names=outputs,
                opset_version=opset,
                dynamic_shapes=dynamic_shapes,
                dynamo=True,
                optimize=fold_limit is None,
                verbose=False,
            )
    finally:
        noisy.setLevel(level)
    assert program is not None
    if fold_limit is not None:
        optimize_ir(program.model, output_size_limit=fold_limit)
    return program
