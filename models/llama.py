"""Llama 3.x and models of its architecture (R1-Distill-Llama)."""

from trimkv_edge.models.family import Family

FAMILY = Family(name="llama", model_type="llama", gate_intermediate_size=512)
