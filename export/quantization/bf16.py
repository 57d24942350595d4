"""bfloat16: weights, arithmetic and the cache's keys and values, for GPUs and for models that float16 does not hold.

Gates are float32: it has 8 bits, and betas near 1 would tie.
"""

from trimkv_edge.export.quantization.base import Scheme

SCHEME = Scheme("bf16", 16, 16, 32, ("onnx", "torch"), kv_dtypes=("bfloat16",), float_bits=16, half="bfloat16")
