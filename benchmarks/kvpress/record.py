"""What kvpress keeps, recorded once, so that our policies can be compared where kvpress is not installed.

Runs in an environment of its own, because kvpress needs an older transformers (docs/baselines.md has the commands):

    python benchmarks/kvpress/record.py --case small --output tests/policies/data/kvpress
    python benchmarks/kvpress/record.py --case tiny --output build/recordings/tiny

A recording is ``<output>.safetensors`` (the model's weights, tokens, keys; each press's scores and survivors) and
``<output>.json`` (the model's configuration, settings, versions). Two stages:

- *prompt*: one prefill of ``T`` tokens, compressed to ``M`` entries at its end.
- *stream*: ``M`` tokens, then single ones; every ``B`` of them ``DecodingPress`` compresses back to ``M``.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import kvpress
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

TINY = Path(__file__).parents[2] / "models" / "tiny" / "weights"


@dataclass(frozen=True)
class Case:
    """A model (``shape`` is its configuration; None is the shipped ``tiny``) and the settings of both stages."""

    family: str
    shape: dict[str, Any] | None
    tokens: int
    budget: int
    buffer: int
    events: int


def _shape(
    vocabulary: int, hidden: int, inner: int, layers: int, heads: int, kv_heads: int, dim: int
) -> dict[str, Any]:
    return dict(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=dim,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


CASES = {
    "small": Case("qwen3", _shape(64, 32, 48, 2, 4, 2, 16), tokens=96, budget=32, buffer=32, events=4),
    "qwen3": Case("qwen3", _shape(512, 128, 256, 4, 8, 4, 32), tokens=512, budget=128, buffer=64, events=6),
    "llama": Case("llama", _shape(512, 128, 256, 4, 8, 2, 32), tokens=512, budget=128, buffer=64, events=6),
    "tiny": Case("qwen3", None, tokens=512, budget=128, buffer=64, events=6),
}


def build(case: Case, seed: int) -> tuple[PreTrainedModel, Tensor]:
    """The model, and tokens for the longer of both stages, ``[1, N]``."""
    count = max(case.tokens, case.budget + case.buffer * case.events)
    if case.shape is None:
        text = Path(textwrap.__file__).read_text(encoding="utf-8")
        ids = Tokenizer.from_file(str(TINY / "tokenizer.json")).encode(text).ids
        model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="eager")
        return model.eval(), torch.tensor([ids[:count]])
    torch.manual_seed(seed)
    config = AutoConfig.for_model(case.family, **case.shape)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:  # wide enough that attention is far from uniform
            torch.nn.init.normal_(parameter, std=1.5 * parameter.shape[1] ** -0.5)
    return model, torch.randint(1, case.shape["vocab_size"], (1, count))


class Recorder:
    """Follows one press: which entries each of its compressions kept, in absolute positions."""

    def __init__(self, press: Any, model: PreTrainedModel) -> None:
        config = model.config
        self.scores: dict[int, Tensor] = {}
        self.kept: dict[int, list[Tensor]] = {layer: [] for layer in range(config.num_hidden_layers)}
        self._held = {layer: torch.empty(config.num_key_value_heads, 0, dtype=torch.int64) for layer in self.kept}
        self._seen = dict.fromkeys(self.kept, 0)
        self._score, self._compress = press.score, press.compress
        press.score, press.compress = self.score, self.compress

    def score(self, module: Any, *args: Any) -> Tensor:
        self.scores[module.layer_idx] = self._score(module, *args)
        return self.scores[module.layer_idx]

    def compress(self, module: Any, hidden: Tensor, keys: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        layer = module.layer_idx
        held, seen = self._held[layer], self._seen[layer]
        fresh = torch.arange(seen, seen + keys.shape[2] - held.shape[1]).expand(held.shape[0], -1)
        positions = torch.cat([held, fresh], 1)
        out = self._compress(module, hidden, keys, *args)
        same = (out[0][0].unsqueeze(2) == keys[0].unsqueeze(1)).all(-1)  # heads, kept, slots
        assert (same.sum(-1) == 1).all(), "two keys of a head are equal: who was kept cannot be told"
        self._held[layer] = positions.gather(1, same.int().argmax(-1))
        self._seen[layer] = int(positions.max()) + 1
        self.kept[layer].append(self._held[layer].sort(-1).values)
        return out

    def survivors(self) -> Tensor:
        """int32 ``[events, layers, kv_heads, M]``."""
        return torch.stack([torch.stack(events) for events in self.kept.values()], 1).to(torch.int32)


def presses(case: Case, ratio: float) -> dict[str, Any]:
    return {
        "streaming": kvpress.StreamingLLMPress(ratio, n_sink=4),
        "keydiff": kvpress.KeyDiffPress(ratio),
        # Our window is at most half of the budget (Policy.observes), and kvpress takes any.
        "snapkv": kvpress.SnapKVPress(ratio, window_size=min(32, case.budget // 2), kernel_size=5),
        "tova": kvpress.TOVAPress(ratio),
        "observed": kvpress.ObservedAttentionPress(ratio),
    }


def read(model: PreTrainedModel, tokens: Tensor, cache: DynamicCache, start: int) -> None:
    """Reads tokens at their absolute positions, however many entries the cache still holds."""
    places = torch.arange(start, start + tokens.shape[1])
    model(tokens, past_key_values=cache, cache_position=places, position_ids=places.unsqueeze(0))


@torch.no_grad()
def record(case: Case, seed: int) -> tuple[dict[str, Tensor], PreTrainedModel]:
    model, ids = build(case, seed)
    prompt = ids[:, : case.tokens]
    cache = DynamicCache()
    read(model, prompt, cache, 0)
    tensors = {f"weights/{name}": tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    tensors |= {"tokens": ids[0], "keys": torch.stack([layer.keys[0] for layer in cache.layers])}
    # Half an entry more: kvpress rounds down, and the product of a float ratio may fall just below M.
    for name, press in presses(case, 1 - (case.budget + 0.5) / case.tokens).items():
        recorder = Recorder(press, model)
        with press(model):
            read(model, prompt, DynamicCache(), 0)
        tensors[f"{name}/scores"] = torch.stack([recorder.scores[layer][0] for layer in recorder.kept])
        tensors[f"{name}/prompt"] = recorder.survivors()[0]
        assert tensors[f"{name}/prompt"].shape[-1] == case.budget
    for name, press in presses(case, 0.0).items():
        recorder = Recorder(press, model)
        decoding = kvpress.DecodingPress(press, case.buffer, case.budget, hidden_states_buffer_size=case.buffer)
        cache = DynamicCache()
        with decoding(model):
            read(model, ids[:, : case.budget], cache, 0)
            for at in range(case.budget, case.budget + case.buffer * case.events):
                read(model, ids[:, at : at + 1], cache, at)
        tensors[f"{name}/stream"] = recorder.survivors()
    return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}, model


def main() -> None:
    options = argparse.ArgumentParser(description="records what kvpress keeps")
    options.add_argument("--case", choices=CASES, default="small")
    options.add_argument("--seed", type=int, default=0, help="of random weights and tokens")
    options.add_argument("--output", type=Path, required=True, help="file name without its ending")
    args = options.parse_args()
    case = CASES[args.case]
    tensors, model = record(case, args.seed)
    about = {
        "case": args.case,
        "seed": args.seed,
        "versions": {name: version(name) for name in ("kvpress", "transformers", "torch")},
        "settings": {name: getattr(case, name) for name in ("tokens", "budget", "buffer", "events")},
        "model": json.loads(model.config.to_json_string(use_diff=False)),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, args.output.with_suffix(".safetensors"))
    args.output.with_suffix(".json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    print(f"recorded {args.output}: {sum(tensor.nbytes for tensor in tensors.values())} bytes")


if __name__ == "__main__":
    main()
