"""float32 weights."""

from trimkv_edge.export.backends import BACKENDS
from trimkv_edge.export.quantization.base import Scheme

SCHEME = Scheme("none", 32, 32, 32, ("executorch", "onnx", "torch", "host-evicted", *BACKENDS))
