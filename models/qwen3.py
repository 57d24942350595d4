"""Qwen3 (dense): GQA with per-head q/k norms."""

from trimkv_edge.models.family import Family, refuse_sliding_layers

FAMILY = Family(name="qwen3", model_type="qwen3", gate_intermediate_size=512, check=refuse_sliding_layers)
