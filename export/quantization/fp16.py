"""float16: weights, arithmetic and the cache's keys and values. For GPUs; a CPU computes it by way of float32."""

from trimkv_edge.export.quantization.base import Scheme

SCHEME = Scheme("fp16", 16, 16, 16, ("onnx", "torch"), kv_dtypes=("float16",), float_bits=16)
