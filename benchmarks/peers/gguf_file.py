"""A GGUF of a Phi-3 folder, without torch: tensors are read and written one at a time. Needs the gguf package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tensors import bfloat16_tensors, read_tensor

_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OUTER = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm", "lm_head.weight": "output"}


def gguf_name(name: str) -> str:
    """What llama.cpp calls a tensor of transformers' Phi-3."""
    if name in _OUTER:
        return f"{_OUTER[name]}.weight"
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{_NAMES[rest.removesuffix('.weight')]}.weight"


def write_gguf(folder: Path, output: Path, dtype: Any) -> None:
    """Writes matrices as ``dtype`` (float16 or float32) and norms as float32; the file has no vocabulary."""
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(output, "phi3")
    head = config["hidden_size"] // config["num_attention_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_rope_scaling_orig_ctx_len(config["original_max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_sliding_window(0)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32 if dtype == np.float32 else gguf.LlamaFileType.MOSTLY_F16)
    tensors = bfloat16_tensors(folder)
    for name, (_, _, shape) in tensors.items():
        kind = np.dtype(dtype if len(shape) > 1 else np.float32)
        writer.add_tensor_info(gguf_name(name), shape, kind, int(np.prod(shape)) * kind.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for path, offset, shape in tensors.values():
        tensor = read_tensor(path, offset, shape)
        writer.write_tensor_data(tensor.astype(dtype) if len(shape) > 1 else tensor)
    writer.close()
