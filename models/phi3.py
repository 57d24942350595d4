"""Phi-3: fused qkv, partial rotary and LongRoPE. Its optional sliding window is not applied: retention replaces it."""

from trimkv_edge.models.family import Family

FAMILY = Family(name="phi3", model_type="phi3", gate_intermediate_size=1024)
