"""``int4`` with float16 scales, arithmetic, keys and values, so that ONNX Runtime's CUDA runs it. Nothing is rounded to
int8 while running."""

from trimkv_edge.export.quantization.base import Scheme

SCHEME = Scheme("int4-fp16", 4, 8, 8, ("onnx",), kv_dtypes=("float16",), float_bits=16)
