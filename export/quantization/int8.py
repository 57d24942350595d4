"""8-bit weights: in ONNX in blocks of 32, in ExecuTorch one scale for each output channel."""

from trimkv_edge.export.quantization.base import Scheme

SCHEME = Scheme("int8", 8, 8, 8, ("executorch", "onnx"), dynamic=("onnx",))
