"""The `tiny` network: transformers' own Qwen3 with plain causal attention that trusts the position ids it is given."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, Qwen3Config, Qwen3ForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from trimkv_edge.models.tiny.data import MAX_POSITIONS
from trimkv_edge.models.tiny.tokenizer import VOCAB_SIZE

ATTENTION = "tiny_causal"


def causal_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: "Tensor | None", scaling: float, **_: object
) -> tuple[Tensor, None]:
    """Causal attention by index. query [B,Hq,T,D], key and value [B,H,T,D] -> [B,T,Hq,D].

    transformers' own masks take a jump in `position_ids` for the start of another packed document.
    """
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2), None


AttentionInterface.register(ATTENTION, causal_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, lambda *args, **kwargs: None)


def config() -> Qwen3Config:
    """About one million parameters: 4 layers, 4 query heads on 2 KV heads of 64, tied embeddings."""
    return Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 1e8},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.05,
    )


def new_model() -> Qwen3ForCausalLM:
    """A network that attends through `causal_attention`, initialised so that recall is learnt in minutes on a CPU.

    Embeddings start larger and the layers' outputs smaller than by default, so that a token's identity is not drowned
    by the first layers' noise. And one circuit is laid out (`_lay_out_induction`), because 600 steps from a random
    start did not find it: heads that carry the last tokens along, and one that looks a carried token up.
    """
    model = Qwen3ForCausalLM(config())
    model.set_attn_implementation(ATTENTION)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(2.0)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.35)
            layer.mlp.down_proj.weight.mul_(0.35)
        _lay_out_induction(model)
    return model


def _orthonormal(size: int) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size)).Q


def _lay_out_induction(model: Qwen3ForCausalLM, fast_pairs: int = 2, lookup_from_pair: int = 8) -> None:
    """In `the <key> is <value>`: carry the last two tokens along, look the key up, copy the value.

    Layer 0's heads 0 and 1 carry the tokens one and two places back into their own subspaces, by the fastest rotary
    pairs and one direction that all embeddings share. Layer 1's head 0 asks, at `is`, for the place whose token two
    back is the key, by the slow pairs, and copies what stands there.
    """
    width = model.config.head_dim
    back, lookup = model.model.layers[0].self_attn, model.model.layers[1].self_attn
    frequency = model.model.rotary_emb.inv_freq[:fast_pairs]
    model.model.embed_tokens.weight[:, 0] = 0.4
    for attention in (back, lookup):
        attention.q_norm.weight.fill_(1.5)
        attention.k_norm.weight.fill_(1.5)
    back.k_proj.weight[:width].mul_(0.2)
    back.k_proj.weight[:fast_pairs, 0] = 1.0
    for head, offset in enumerate((1, 2)):
        query = back.q_proj.weight[head * width : (head + 1) * width]
        query.mul_(0.2)
        query[:fast_pairs, 0] = torch.cos(offset * frequency)
        query[width // 2 : width // 2 + fast_pairs, 0] = -torch.sin(offset * frequency)
    carried = _orthonormal(2 * width)
    back.v_proj.weight[:width] = 0.4 * _orthonormal(2 * width)[:width]
    back.v_proj.weight[:, 0] = 0.0
    back.o_proj.weight[:, : 2 * width] = 0.3 * carried
    slow = (torch.arange(width) % (width // 2) >= lookup_from_pair).float()[:, None]
    lookup.q_proj.weight[:width] = slow * carried[:, :width].T
    lookup.k_proj.weight[:width] = slow * carried[:, width:].T
    copied = _orthonormal(2 * width)[:width]
    lookup.v_proj.weight[:width] = 0.4 * copied
    lookup.o_proj.weight[:, :width] = 0.3 * copied.T
