"""The Trainer: losses worked out by hand, exact normalisation, bf16, recomputing, tied gates, what is written."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import base_model
from safetensors.torch import load_file
from training_runs import LENGTH, arguments, history, ready_rows, train, write_model, write_rows
from transformers import AutoModelForCausalLM

from trimkv_edge.errors import ConfigError
from trimkv_edge.models.gated import GatedModel
from trimkv_edge.models.gates import GateShape, load_gates
from trimkv_edge.models.rope import fix_rope
from trimkv_edge.retention import build_gates
from trimkv_edge.training.config import TrainConfig
from trimkv_edge.training.module import GateModule
from trimkv_edge.training.rows import Row, Rows, Shuffled
from trimkv_edge.training.trainer import GateTrainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("trainer")
    write_model(made / "model")
    write_rows(made / "rows.jsonl", [{k: v for k, v in row.items() if k != "skip"} for row in plain_rows()])
    return made


def plain_rows() -> list[dict[str, Any]]:
    return [{"input_ids": row["input_ids"], "weight": row["weight"]} for row in ready_rows()]


def test_losses_of_a_step_are_those_worked_out_by_hand(folder: Path) -> None:
    # One step of all 13 rows in four uneven batches, with gates that forget nothing (beta = 1): the gated pass is the
    # vanilla one, so KL is 0, cross-entropy is transformers' own, and t + 1 entries are held at place t.
    more = ("--steps", "1", "--rows", "4", "--accumulation", "4", "--bias-init", "60", "--memory", "4")
    train(arguments(folder, "hand", *more, "--eval-data", f"{folder}/rows.jsonl"))
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    total = weights = 0.0
    over = []
    rows = plain_rows()
    for number in [*range(13), *order_of_second_pass(3)]:
        ids = torch.tensor([rows[number]["input_ids"]])
        with torch.no_grad():
            log_p = model(ids).logits[0, :-1].log_softmax(-1)
        for place, weight in enumerate(rows[number]["weight"][1:]):
            total -= weight * float(log_p[place, ids[0, place + 1]])
            weights += weight
        held = range(1, ids.shape[1] + 1)
        over.append(sum(max(0, entries - 4) / entries for entries in held) / len(held))
    logged = history(folder / "hand")[0]
    assert logged["ce"] == pytest.approx(total / weights, rel=1e-5)
    assert logged["kl"] == pytest.approx(0.0, abs=1e-6)
    assert logged["capacity"] == pytest.approx(sum(over) / len(over), rel=1e-5)
    assert logged["loss"] == pytest.approx(logged["ce"] + logged["kl"] + logged["capacity"], rel=1e-6)
    # The learning rate of the first step is 0: at the end the gates are what they were.
    measured = json.loads((folder / "hand" / "gates.json").read_text())["eval_metrics"]
    assert measured["capacity"] == pytest.approx(sum(over[:13]) / 13, rel=1e-5)


def order_of_second_pass(count: int) -> list[int]:
    """Rows 13, 14, 15 of the step come from the second shuffled pass over 13 rows."""
    generator = torch.Generator().manual_seed(1)
    return torch.randperm(13, generator=generator).tolist()[:count]


def test_training_lowers_the_loss_and_leaves_the_base_alone(folder: Path) -> None:
    train(arguments(folder, "learns", "--steps", "20", "--rows", "4", "--lr", "0.05", "--bias-init", "6"))
    logged = history(folder / "learns")
    first, last = (sum(entry["loss"] for entry in part) / 5 for part in (logged[:5], logged[-5:]))
    assert last < first - 0.05
    assert logged[-1]["capacity"] < 0.5 * logged[0]["capacity"]


def test_rg10_shares_stay_shared_and_load(folder: Path) -> None:
    train(arguments(folder, "shared", "--kind", "rg10"))
    tensors = load_file(folder / "shared" / "gates.safetensors")
    prefix = "model.layers.{}.self_attn.retention_gate.linear3.weight"
    assert torch.equal(tensors[prefix.format(0)], tensors[prefix.format(1)])
    base = base_model("qwen3-gqa")
    gates, info = load_gates(folder / "shared" / "gates.safetensors", GateShape.of(base.config))
    assert (info.kind, info.intermediate_size) == ("rg10", 16)
    assert gates[0].linear3 is gates[1].linear3
    checkpoint = folder / "shared" / "checkpoints" / "checkpoint-5"
    state = torch.load(checkpoint / "optimizer.pt")["state"]
    # linear1 and linear2 with biases in two layers, linear3 and bias once.
    assert len(state) == 2 * 4 + 2 == len(load_file(checkpoint / "gates.safetensors"))


def test_bfloat16_base_trains_float32_gates(folder: Path) -> None:
    more = ("--dtype", "bfloat16", "--steps", "20", "--rows", "4", "--lr", "0.05", "--bias-init", "6")
    train(arguments(folder, "bf16", *more))
    logged = history(folder / "bf16")
    assert all(math.isfinite(entry["loss"]) for entry in logged)
    first, last = (sum(entry["loss"] for entry in part) / 5 for part in (logged[:5], logged[-5:]))
    assert last < first - 0.05
    assert {t.dtype for t in load_file(folder / "bf16" / "gates.safetensors").values()} == {torch.float32}
    module = small_module(dtype="bfloat16")
    kinds = {name.split(".")[-1]: buffer.dtype for name, buffer in module.base.named_buffers()}
    assert kinds["inv_freq"] == torch.float32
    assert module.base.lm_head.weight.dtype == torch.bfloat16


def small_module(case: str = "qwen3-gqa", bias_init: float = 2.0, **more: Any) -> GateModule:
    base = base_model(case)
    fix_rope(base, "auto")
    torch.manual_seed(0)
    gates = build_gates("rg", 2, 64, base.config.num_key_value_heads, 16, bias_init=bias_init)
    settings = {"kind": "rg", "memory": 4.0, "length": LENGTH, "steps": 1, "intermediate_size": 16, **more}
    return GateModule(GatedModel(base, gates).base, gates, TrainConfig(**settings))


@pytest.mark.parametrize("case", ["rg", "rg10"])
def test_recomputing_layers_changes_nothing(folder: Path, case: str) -> None:
    for name, more in ((f"kept-{case}", []), (f"again-{case}", ["--gradient-checkpointing", "--block", "7"])):
        train(arguments(folder, name, "--kind", case, "--rows", "2", *more))
    for one, two in zip(history(folder / f"kept-{case}"), history(folder / f"again-{case}"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)


def test_recomputing_really_recomputes() -> None:
    calls = []
    module = small_module(gradient_checkpointing=True)
    module.base.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    rows = Rows(LENGTH, "rows")
    rows.add(Row(list(range(3, 3 + LENGTH))))
    batch = {name: tensor[None] for name, tensor in rows.item(0).items()}
    parts = module(**batch)
    assert len(calls) == 2  # teacher and student
    sum(parts.values()).backward()
    assert len(calls) == 3


@pytest.mark.parametrize("case", ["llama-gqa", "llama3-rope", "phi3-mha", "phi3-partial-rotary"])
def test_every_family_trains_from_its_own_vanilla_pass(case: str) -> None:
    rows = Rows(LENGTH, "rows")
    rows.add(Row(list(range(3, 3 + LENGTH))))
    batch = {name: tensor[None] for name, tensor in rows.item(0).items()}
    parts = small_module(case, bias_init=60.0)(**batch)
    with torch.no_grad():
        log_p = base_model(case)(batch["input_ids"]).logits[0, :-1].log_softmax(-1)
    expected = -log_p.gather(1, batch["input_ids"][0, 1:, None]).sum()
    assert float(parts["ce"]) == pytest.approx(float(expected), rel=1e-5)
    assert float(parts["kl"]) == pytest.approx(0.0, abs=1e-4)
    module = small_module(case, bias_init=1.0)
    module(**batch)["kl"].backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in module.parameters())


def test_padding_and_zero_weights_change_nothing() -> None:
    module = small_module()
    short, padded = Rows(20, "rows"), Rows(LENGTH, "rows")
    for rows in (short, padded):
        rows.add(Row(list(range(5, 25)), weight=[1.0] * 20))
    with torch.no_grad():
        parts = [module(**{k: v[None] for k, v in rows.item(0).items()}) for rows in (short, padded)]
    for name, value in parts[0].items():
        assert float(parts[1][name]) == pytest.approx(float(value), rel=1e-5), name


def test_order_is_whole_shuffled_passes() -> None:
    rows = Rows(4, "rows")
    for number in range(7):
        rows.add(Row([number, 1]))
    drawn = [int(item["input_ids"][0]) for item in (Shuffled(rows, 21, 3)[place] for place in range(21))]
    passes = [drawn[start : start + 7] for start in (0, 7, 14)]
    assert all(sorted(one) == list(range(7)) for one in passes)
    assert passes[0] != passes[1] != passes[2]
    again = Shuffled(rows, 21, 3)
    assert [int(again[place]["input_ids"][0]) for place in reversed(range(21))] == drawn[::-1]
    assert drawn != [int(Shuffled(rows, 21, 4)[place]["input_ids"][0]) for place in range(21)]


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    module = small_module(steps=2)
    with torch.no_grad():
        module.gates[0].linear1.weight.fill_(float("nan"))
    rows = Rows(LENGTH, "rows")
    rows.add(Row(list(range(3, 3 + LENGTH))))
    trainer = GateTrainer(module, rows, module.settings, tmp_path)
    with pytest.raises(ConfigError, match=r"the loss is nan at step 1: lower --lr"):
        trainer.train()


def test_tensorboard_holds_the_losses(folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(arguments(folder, "board", "--log-every", "3"))  # steps 1, 3, and 5: the first and the last always
    assert [entry["step"] for entry in history(folder / "board")] == [1, 3, 5]
    events = EventAccumulator(str(folder / "board" / "logs"))
    events.Reload()
    for part in ("loss", "ce", "kl", "capacity"):
        shown = [event.value for event in events.Scalars(f"train/{part}")]
        assert shown == pytest.approx([entry[part] for entry in history(folder / "board")], rel=1e-6)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"kind": "rg9"}, "kind 'rg9' is not known; use one of rg, rg10"),
        ({"memory": 0}, "memory is 0, but must be above 0"),
        ({"steps": 0}, "steps is 0, but must be at least 1"),
        ({"length": 1}, "length is 1, but must be at least 2"),
        ({"lr": math.nan}, "lr is nan"),
        ({"warmup": 1.0}, "warm-up is 1.0"),
        ({"min_lr": 1.0}, "min lr 1.0 is above lr"),
        ({"scope": "layer"}, "scope 'layer' is not known"),
        ({"dtype": "float16"}, "dtype 'float16' is not known"),
        ({"ce_weight": 0.0, "kl_weight": 0.0}, "are both 0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_settings_out_of_range(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        TrainConfig(**{"kind": "rg", "memory": 8.0, "length": 16, "steps": 1, "intermediate_size": 4, **setting})


def test_published_defaults_of_the_scope() -> None:
    given = {"memory": 8.0, "length": 16, "steps": 1, "intermediate_size": 4}
    assert TrainConfig(kind="rg", **given).scope == "head"
    assert TrainConfig(kind="rg10", **given).scope == "global"
    assert TrainConfig(kind="rg10", scope="head", **given).scope == "head"


def test_a_skipped_stretch_is_charged_as_if_it_were_in_the_row() -> None:
    # Gates that forget nothing hold all of the stream: t + 1 entries at place t of the row, and the gap after the jump.
    gap, resume = 1000, 10
    rows = Rows(LENGTH, "rows")
    index = [place + gap * (place >= resume) for place in range(LENGTH)]
    rows.add(Row(list(range(3, 3 + LENGTH)), index=index, skip=(4, 16, resume, gap)))
    with torch.no_grad():
        parts = small_module(bias_init=60.0)(**{name: tensor[None] for name, tensor in rows.item(0).items()})
    held = [place + 1 + gap * (place >= resume) for place in range(LENGTH)]
    expected = sum(max(0, entries - 4) / (place + 1) for place, entries in enumerate(held)) / LENGTH
    assert float(parts["capacity"]) == pytest.approx(expected, rel=1e-3)
