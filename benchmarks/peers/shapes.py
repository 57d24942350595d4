"""The models that peers are compared on: shapes only, weights are random."""

from __future__ import annotations

from typing import Any, NamedTuple

POSITIONS = 40960  # every shape has plain rotary positions up to here, so that 32k contexts are within its range


class Shape(NamedTuple):
    """A Phi-3 configuration. ``key_value_bytes`` is what one token adds to a full cache."""

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    vocabulary: int
    reference: str = "float32"  # what transformers computes the check in: bfloat16 where float32 would not fit

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def parameters(self) -> int:
        qkv = self.hidden * (self.heads + 2 * self.kv_heads) * self.head_dim
        layer = qkv + self.hidden * self.hidden + 3 * self.hidden * self.inner + 2 * self.hidden
        return self.layers * layer + 2 * self.vocabulary * self.hidden + self.hidden

    def key_value_bytes(self, element: int) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * element

    def config(self) -> dict[str, Any]:
        """The content of ``config.json``."""
        return {
            "architectures": ["Phi3ForCausalLM"],
            "model_type": "phi3",
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": POSITIONS,
            "original_max_position_embeddings": POSITIONS,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "tie_word_embeddings": False,
            "sliding_window": None,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "torch_dtype": "bfloat16",
        }


SHAPES = {
    "phi3-54m": Shape(4, 1024, 2688, 16, 8, 4096),
    "phi3-500m": Shape(16, 1536, 4096, 24, 8, 32064),
    "phi3-mini": Shape(32, 3072, 8192, 32, 32, 32064, "bfloat16"),  # Phi-3-mini-4k's, without its window
}
