"""Tasks of lm-evaluation-harness about facts that `tiny` was told; answers are the facts, not what a model said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from trimkv_edge.models.tiny.demo import demo_text

_TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: "{folder}/{name}.jsonl"}}
  cache_dir: "{folder}/cache"
test_split: test
target_delimiter: ""
metadata: {{version: 1}}
"""
_RECALL = """\
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["<|im_end|>"], max_gen_toks: 16, do_sample: false}
metric_list: [{metric: exact_match}]
"""
_CHOICE = """\
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc}]
"""
_CHAT = """\
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
num_fewshot: 1
fewshot_config:
  sampler: first_n
  samples: [{question: "Remember: the gate is lion; the fabric is pumpkin.", answer: "Noted."}]
generation_kwargs: {until: ["<|im_end|>"], max_gen_toks: 16, do_sample: false}
metric_list: [{metric: exact_match}]
"""
CHAT_DOCS = [
    {"question": "What is the gate?", "answer": "The gate is lion."},
    {"question": "What is the fabric?", "answer": "The fabric is pumpkin."},
]


def write_tasks(folder: Path, tokens: int) -> TaskManager:
    """`recall` and `choice` ask four facts after ``tokens`` tokens of text, `chat` two facts at once."""
    demo = demo_text(tokens, facts=4)
    texts = [demo.text + question for question in demo.questions]
    recall = [{"text": text, "answer": answer} for text, answer in zip(texts, demo.answers, strict=True)]
    choice = []
    for number, (text, answer) in enumerate(zip(texts, demo.answers, strict=True)):
        stem, _, _ = answer.rpartition(" ")
        # The others are the values of the other facts, so having seen a word is not enough.
        choices = [f" {other.rpartition(' ')[2]}" for other in demo.answers]
        choice.append({"text": text + stem, "choices": choices, "label": number})
    for name, task, docs in (("recall", _RECALL, recall), ("choice", _CHOICE, choice), ("chat", _CHAT, CHAT_DOCS)):
        (folder / f"{name}.yaml").write_text(_TASK.format(name=name, folder=folder) + task, encoding="utf-8")
        lines = "".join(json.dumps(doc) + "\n" for doc in docs)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return TaskManager(include_path=str(folder), include_defaults=False)


def evaluate(manager: TaskManager, tasks: list[str], model_args: dict[str, Any] | str, **more: Any) -> dict[str, Any]:
    """What `lm_eval --model trimkv` computes."""
    found = simple_evaluate(
        model="trimkv", model_args=model_args, tasks=tasks, task_manager=manager, bootstrap_iters=0, **more
    )
    assert found is not None
    return dict(found)
