"""lm-evaluation-harness drives a bounded cache: known facts are recalled, probabilities are those of transformers."""

from __future__ import annotations

import json
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest
import torch
from harness_tasks import CHAT_DOCS, evaluate, write_tasks
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from onnx_artefact import make_artefact
from text_artefact import save_manifest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import ArtefactError, BudgetError, ConfigError, ModelError
from trimkv_edge.evaluation import harness
from trimkv_edge.evaluation.harness_model import TrimKVLM
from trimkv_edge.evaluation.reader import EngineReader
from trimkv_edge.evaluation.samples import Answer, Sample
from trimkv_edge.export.tokenizer import copy_tokenizer
from trimkv_edge.models.eager import EagerEngine
from trimkv_edge.models.gated import GatedModel
from trimkv_edge.models.loading import load_model
from trimkv_edge.models.source import find_source
from trimkv_edge.models.tiny.demo import demo_text
from trimkv_edge.models.tiny.tokenizer import WEIGHTS

CONTEXT = demo_text(200, facts=3).text
BOUNDED = {"model": "tiny", "budget": 64, "buffer": 32}
EVERYTHING = {"model": "tiny", "budget": 512, "buffer": 128}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> TaskManager:
    return write_tasks(tmp_path_factory.mktemp("tasks"), tokens=400)


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    model = tiny()
    made = make_artefact(folder, model, CacheConfig(64, 32, 32))
    save_manifest(folder, made.manifest, tokenizer=copy_tokenizer(WEIGHTS, folder, model.config))
    return folder


@pytest.fixture(scope="module")
def everything() -> TrimKVLM:
    return TrimKVLM(**EVERYTHING)


def tiny() -> GatedModel:
    return load_model(find_source("tiny"), "rg").model


def requests(kind: str, *args: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, each, number) for number, each in enumerate(args)]


def full_log_probs(ids: list[int]) -> torch.Tensor:
    """``[tokens - 1, vocab]``: plain transformers, one forward pass, no cache of ours."""
    base = AutoModelForCausalLM.from_pretrained(WEIGHTS, dtype=torch.float32)
    with torch.no_grad():
        return base(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)


def test_eager_model_recalls_facts_from_beyond_its_budget(tasks: TaskManager) -> None:
    found = evaluate(tasks, ["recall", "choice"], "model=tiny,budget=64,buffer=32,gates=rg")
    assert found["results"]["recall"]["exact_match,none"] == 1.0
    assert found["results"]["choice"]["acc,none"] == 1.0
    config = found["config"]
    assert (config["engine"], config["cache"]["budget"], config["gates"]["kind"]) == ("eager", 64, "rg")


def test_a_window_of_the_same_size_has_forgotten_them(tasks: TaskManager) -> None:
    found = evaluate(tasks, ["recall"], {**BOUNDED, "policy": "streaming"})
    assert found["results"]["recall"]["exact_match,none"] < 0.5
    assert found["config"]["cache"]["sinks"] == 4


def test_onnx_artefact_recalls_them_too(tasks: TaskManager, artefact: Path) -> None:
    found = evaluate(tasks, ["recall", "choice"], f"artefact={artefact},engine=onnx,threads=1")
    assert found["results"]["recall"]["exact_match,none"] == 1.0
    assert found["results"]["choice"]["acc,none"] == 1.0
    assert found["config"]["engine"] == "onnx"


def test_chat_template_and_few_shots(tasks: TaskManager) -> None:
    found = evaluate(
        tasks, ["chat"], {**BOUNDED}, apply_chat_template=True, fewshot_as_multiturn=True, log_samples=True
    )
    assert found["results"]["chat"]["exact_match,none"] == 1.0
    assert found["samples"]["chat"][0]["arguments"][0][0] == (
        "<|im_start|>user\nRemember: the gate is lion; the fabric is pumpkin.<|im_end|>\n"
        "<|im_start|>assistant\nNoted.<|im_end|>\n"
        f"<|im_start|>user\n{CHAT_DOCS[0]['question']}<|im_end|>\n<|im_start|>assistant\n"
    )


def test_an_open_last_message_is_continued(everything: TrimKVLM) -> None:
    history = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "The gate"}]
    prompt = everything.apply_chat_template(history, add_generation_prompt=False)
    assert prompt == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nThe gate"


def test_loglikelihood_is_that_of_transformers_when_the_budget_holds_everything(everything: TrimKVLM) -> None:
    pairs = [(CONTEXT, "import sys\n"), (CONTEXT, " x"), (CONTEXT, "What is the gate?"), ("", "Remember: the gate")]
    found = everything.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    for (context, continuation), (total, greedy) in zip(pairs, found, strict=True):
        ids = everything.tok_encode(context) or [2]  # 2 ends a text and stands for an empty context
        start = len(ids)
        ids = ids + everything.tok_encode(continuation)
        each = full_log_probs(ids)[start - 1 :]
        target = torch.tensor(ids[start:])
        assert total == pytest.approx(each.gather(1, target[:, None]).sum().item(), abs=2e-3)
        assert greedy == bool((each.argmax(-1) == target).all())


def test_the_right_answer_is_greedy(everything: TrimKVLM) -> None:
    demo = demo_text(100, facts=2, seed=3)
    prompt = demo.text + demo.questions[0]
    stem, _, value = demo.answers[0].rpartition(" ")
    pairs = [(prompt + stem, f" {value}"), (prompt + stem, " zzz")]
    right, wrong = everything.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    assert right[1]
    assert not wrong[1]
    assert right[0] > -0.2 > wrong[0]


def test_rolling_loglikelihood_reads_the_whole_text_after_an_end_token(everything: TrimKVLM) -> None:
    (found, empty) = everything.loglikelihood_rolling(
        requests("loglikelihood_rolling", (CONTEXT[:150],), ("",)), disable_tqdm=True
    )
    ids = [2, *everything.tok_encode(CONTEXT[:150])]
    each = full_log_probs(ids)
    assert found == pytest.approx(each.gather(1, torch.tensor(ids[1:])[:, None]).sum().item(), rel=1e-4)
    assert empty == 0.0


@pytest.mark.parametrize("policy", ["trimkv", "h2o"])  # h2o's state cannot be saved: its contexts are read again
def test_bounded_loglikelihood_is_that_of_one_stream_per_continuation(policy: str) -> None:
    lm = TrimKVLM(**BOUNDED, policy=policy)
    continuations = ["import sys\nimport os\n", "return None", " x", "def main(argv):\n" * 8]
    found = lm.loglikelihood(
        requests("loglikelihood", *((CONTEXT, continuation) for continuation in continuations)), disable_tqdm=True
    )
    context = lm.tok_encode(CONTEXT)
    reader = EngineReader(EagerEngine(tiny(), CacheConfig(64, 32, 32, policy=policy)))
    for continuation, (total, greedy) in zip(continuations, found, strict=True):
        ids = (*context, *lm.tok_encode(continuation))
        ((hit, nats),) = reader.score([Sample(ids, (Answer(len(context), len(ids)),))])
        assert total == pytest.approx(-nats[0], abs=2e-3)
        assert greedy == bool(hit[0])


def test_a_begin_token_comes_first_and_only_once(tmp_path: Path) -> None:
    shutil.copytree(WEIGHTS, tmp_path, dirs_exist_ok=True)
    tokenizer = Tokenizer.from_file(str(WEIGHTS / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = json.loads((WEIGHTS / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, "bos_token_id": 0}), encoding="utf-8")
    lm = TrimKVLM(model=str(tmp_path), gates=str(WEIGHTS.parent / "gates" / "rg.safetensors"))
    plain = Tokenizer.from_file(str(WEIGHTS / "tokenizer.json")).encode("return None").ids
    assert lm.tok_encode("return None") == lm.tok_encode("<|endoftext|>return None") == [0, *plain]
    assert lm.tok_encode("return None", add_special_tokens=False) == plain
    (found,) = lm.loglikelihood(requests("loglikelihood", ("", "return None")), disable_tqdm=True)
    each = full_log_probs([0, *plain])
    assert found[0] == pytest.approx(each.gather(1, torch.tensor(plain)[:, None]).sum().item(), abs=2e-3)


def test_generation_stops_where_it_is_told(everything: TrimKVLM) -> None:
    demo = demo_text(100, facts=2, seed=3)
    prompt, answer = demo.text + demo.questions[0], demo.answers[0]
    given = [
        {"until": ["<|im_end|>"], "max_gen_toks": 16},
        {"until": " is", "max_gen_toks": 16},
        {"until": [], "max_gen_toks": 2},
    ]
    found = everything.generate_until(
        requests("generate_until", *((prompt, options) for options in given)), disable_tqdm=True
    )
    assert found[0] == answer
    assert found[1] == answer.partition(" is")[0]
    assert answer.startswith(found[2])
    assert len(everything.tok_encode(found[2])) == 2


def test_a_special_token_in_until_stops(everything: TrimKVLM) -> None:
    # Nothing but the token itself shows in the text, so as plain text it would never be found.
    assert everything._stop_ids(["<|im_start|>", "Question:"]) == {1, 2}


def test_samples_differ_between_repeats_and_are_the_same_in_every_run() -> None:
    options = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 2.0}

    def run(seed: int) -> list[str]:
        lm = TrimKVLM(**BOUNDED, seed=seed)
        return lm.generate_until(requests("generate_until", ("Hello", options), ("Hello", options)), disable_tqdm=True)

    first = run(1)
    assert first[0] != first[1]
    assert run(1) == first
    assert run(7) != first


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"do_sample": True, "temperature": 0.0}, "contradiction"),
        ({"num_beams": 4}, "num_beams"),
        ({"length_penalty": 2.0}, "length_penalty"),
        ({"do_sample": True, "top_p": 1.5}, "top-p"),
    ],
)
def test_generation_options_are_honoured_or_refused(everything: TrimKVLM, options: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        everything.generate_until(requests("generate_until", ("Hello", options)), disable_tqdm=True)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({}, ConfigError, "give one of"),
        ({"artefact": "a", "model": "tiny"}, ConfigError, "give one of"),
        ({"artefact": "a", "budget": 3}, ConfigError, "'budget' is not an option of artefact="),
        ({"model": "tiny", "engine": "onnx"}, ConfigError, "'engine' is not an option of model="),
        ({"model": "tiny", "batch_size": 8}, ConfigError, "batch_size is 8"),
        ({"model": "tiny", "device": "cuda"}, ConfigError, "device 'cuda'"),
        ({"model": "tiny", "buffer": "many"}, ConfigError, "buffer is 'many'"),
        ({"model": "tiny", "gates": None}, ConfigError, "ranks by retention gates"),
        ({"model": "tiny", "policy": "best"}, ConfigError, "'best' is not known"),
        ({"model": "tiny", "budget": 16, "buffer": 32}, BudgetError, "budget of 16"),
        ({"model": "qwen3-4b", "weights": "/nowhere"}, ModelError, "/nowhere"),
        ({"artefact": "/nowhere"}, ArtefactError, "/nowhere"),
    ],
)
def test_model_args_are_honoured_or_refused(arguments: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        TrimKVLM(**arguments)


def test_a_policy_without_gates_needs_none() -> None:
    assert TrimKVLM(**BOUNDED, policy="keydiff", gates=None).model.gates.kind == "none"


def test_the_full_cache_refuses_what_it_cannot_hold() -> None:
    lm = TrimKVLM(**BOUNDED, policy="full")
    with pytest.raises(BudgetError, match="raise the budget"):
        lm.loglikelihood(requests("loglikelihood", (CONTEXT, " x")), disable_tqdm=True)


def test_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["harness", "--help"])
    harness.main()
    assert "--model_args artefact=" in capsys.readouterr().out
    # The index of the harness's own 13,000 task files takes half a minute.
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(TaskManager, include_defaults=False))
    write_tasks(tmp_path, tokens=50)
    command = ["harness", "--model", "trimkv", "--include_path", str(tmp_path), "--tasks", "recall", "--model_args"]
    monkeypatch.setattr(
        sys, "argv", [*command, "model=tiny,budget=64,buffer=32", "--output_path", str(tmp_path / "out")]
    )
    harness.main()
    (written,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(written.read_text(encoding="utf-8"))
    assert found["results"]["recall"]["exact_match,none"] == 1.0
    assert found["config"]["cache"]["budget"] == 64
    monkeypatch.setattr(sys, "argv", [*command, "artefact=/nowhere"])
    with pytest.raises(SystemExit) as stopped:
        harness.main()
    assert stopped.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert "/nowhere" in last


@pytest.mark.parametrize(
    ("given", "added"),
    [
        (["--model", "trimkv"], True),
        (["--model=trimkv"], True),
        (["--model", "trimkv", "--device", "cuda"], False),
        (["--model", "trimkv", "--config", "run.yaml"], False),
        (["--model", "hf"], False),
    ],
)
def test_the_harness_is_told_that_there_is_no_gpu_unless_the_user_says_something(given: list[str], added: bool) -> None:
    argv = ["harness", *given]
    assert harness._on_cpu(argv) == argv + ["--device", "cpu"] * added
