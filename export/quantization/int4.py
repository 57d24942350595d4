"""4-bit weights in blocks of 32 with a scale each; ONNX Runtime multiplies them with activations rounded to int8."""

from trimkv_edge.export.quantization.base import Scheme

SCHEME = Scheme("int4", 4, 8, 8, ("onnx",), dynamic=("onnx",))
