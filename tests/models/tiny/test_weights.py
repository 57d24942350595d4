"""What ships with `tiny`: loads everywhere it has to, is small, and really recalls in bounded memory."""

import json
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from trimkv_edge.config import CacheConfig
from trimkv_edge.manifest import file_sha256
from trimkv_edge.models.tiny import bounded, data, demo, evaluate
from trimkv_edge.models.tiny.tokenizer import WEIGHTS
from trimkv_edge.models.tiny.words import KEYS, VALUES

FOLDER = WEIGHTS.parent


@pytest.fixture(scope="module", params=evaluate.GATES)
def model(request: pytest.FixtureRequest):
    return evaluate.load(request.param)


def test_everything_shipped_is_small() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert sum(path.stat().st_size for path in files) <= 12 * 2**20


def test_transformers_loads_model_and_tokenizer() -> None:
    model = AutoModelForCausalLM.from_pretrained(WEIGHTS, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS)
    assert model.config.model_type == "qwen3"
    assert model.config.num_key_value_heads >= 2
    assert model.config.max_position_embeddings == data.MAX_POSITIONS
    assert len(tokenizer) == model.config.vocab_size
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert (
        tokenizer.convert_tokens_to_ids("<|im_end|>") == tokenizer.eos_token_id == model.generation_config.eos_token_id
    )


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_tokenizer_round_trips_any_text(text: str) -> None:
    plain = Tokenizer.from_file(str(WEIGHTS / "tokenizer.json"))
    ids = plain.encode(text).ids
    assert plain.decode(ids, skip_special_tokens=False) == text
    assert all(0 <= i < plain.get_vocab_size() for i in ids)


@pytest.mark.parametrize(("name", "kind"), [("rg", "rg"), ("rg10", "rg10"), ("rg-chat", "rg")])
def test_gates_belong_to_the_base(name: str, kind: str) -> None:
    info = json.loads(Path(FOLDER / "gates" / f"{name}.json").read_text())
    assert info["base_sha256"] == file_sha256(WEIGHTS / "model.safetensors")
    assert info["kind"] == kind
    gates = evaluate.load(name).gates
    assert len(gates) == info["num_layers"]
    for gate in gates:
        assert gate.linear1.weight.shape == (info["intermediate_size"], info["hidden_size"])
        assert gate.bias.shape == (info["num_kv_heads"],)
    shared = kind == "rg10"
    assert (gates[0].bias is gates[1].bias) == shared


def test_recall_in_bounded_memory(model) -> None:
    ids, kinds = evaluate.recall_streams(seed=7, rows=6, length=1024)
    full = evaluate.recall(model, bounded.full_cache(model, 1024, 6), ids, kinds)
    kept = evaluate.recall(model, bounded.make_cache(model, CacheConfig(64, 32, 32), 6), ids, kinds)
    window = evaluate.recall(
        model, bounded.make_cache(model, CacheConfig(64, 32, 32, "streaming", sinks=4), 6), ids, kinds
    )
    assert full > 0.9
    assert kept > 0.8
    assert window < 0.4


def many_rounds(seed: int, rounds: int = 10) -> data.Dialogue:
    """Rounds of eight facts, two updates, four texts and eight questions, each with keys of its own."""
    rng = random.Random(f"many rounds {seed}")
    dialogue, names = data.Dialogue(), rng.sample(KEYS, 8 * rounds)
    for first in range(0, len(names), 8):
        keys = names[first : first + 8]
        for some in (keys[:4], keys[4:]):
            dialogue.state({key: rng.choice(VALUES) for key in some})
        for key in rng.sample(keys, 2):
            dialogue.state({key: rng.choice(VALUES)}, update=True)
        for _ in range(4):
            dialogue.read(data.random_text(rng, 32, held_out=True))
        for key in rng.sample(keys, 8):
            dialogue.ask(key)
    return dialogue


def test_gates_of_conversations_recall_where_values_crowd_the_others() -> None:
    """180 values are said to a cache that keeps 32 entries a head; answers of the later half count."""
    dialogues = [many_rounds(seed) for seed in range(4)]
    ids, kinds, _ = data.to_batch(random.Random(0), dialogues, len(dialogues[0].ids), jump_share=0.0)
    late = kinds.clone()
    late[:, : kinds.shape[1] // 2] = data.ORDINARY
    recalls = {}
    for name in ("rg", "rg-chat"):
        model = evaluate.load(name)
        recalls[name] = evaluate.recall(model, bounded.make_cache(model, CacheConfig(32, 32, 32), 4), ids, late)
    assert recalls["rg"] < 0.75
    assert recalls["rg-chat"] > 0.9


def test_demo_text_is_long_and_asks_for_its_facts() -> None:
    made = demo.demo_text(3000)
    tokens = data.load_tokenizer().encode(made.text).ids
    assert len(tokens) >= 3000
    assert made == demo.demo_text(3000) != demo.demo_text(3000, seed=1)
    head = made.text[:1500]
    for question, answer in zip(made.questions, made.answers, strict=True):
        assert answer[len("The ") : -1] in head
        assert question.endswith("<|im_start|>assistant\n")


def test_newest_value_wins_with_full_cache() -> None:
    model = evaluate.load("rg")
    rng = random.Random(11)
    dialogues = [data.late_dialogue(rng, 400, 4, 4, updates=4, held_out=True) for _ in range(8)]
    ids, kinds, _ = data.to_batch(rng, dialogues, 400, jump_share=0.0)
    assert evaluate.recall(model, bounded.full_cache(model, 400, 8), ids, kinds) > 0.85
