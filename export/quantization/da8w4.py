"""``8da4w``: 4-bit weights in groups of 32, activations rounded to int8 while running. In ONNX the same as ``int4``."""

from trimkv_edge.export.quantization.base import Scheme

SCHEME = Scheme("8da4w", 4, 8, 8, ("executorch", "onnx"), dynamic=("executorch", "onnx"))
