"""Train the `tiny` base model on a CPU: `python -m trimkv_edge.models.tiny.train_base --checkpoint base.pt`.

Short contexts with dense questions come first; a lesson ends when recall on fresh data passes 93 %.
"""

import argparse
import random
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from trimkv_edge.models.tiny import data
from trimkv_edge.models.tiny.network import new_model
from trimkv_edge.models.tiny.tokenizer import WEIGHTS

KIND_WEIGHTS = (1.0, 0.1, 10.0, 3.0)  # ORDINARY, RANDOM, ANSWER, ECHO


class Lesson(NamedTuple):
    """One step of the curriculum. Shares are fractions of the rows; the remaining rows are mixed dialogues."""

    length: int
    facts: int
    drill: float
    text: float
    late: float
    filler: float
    jumps: float


LESSONS = (
    Lesson(48, 5, drill=1.0, text=0.0, late=0.0, filler=0.0, jumps=0.1),
    Lesson(96, 5, drill=0.2, text=0.1, late=0.0, filler=0.1, jumps=0.3),
    Lesson(192, 7, drill=0.0, text=0.2, late=0.1, filler=0.3, jumps=0.5),
    Lesson(384, 9, drill=0.0, text=0.2, late=0.2, filler=0.5, jumps=0.6),
    Lesson(768, 12, drill=0.0, text=0.1, late=0.3, filler=0.6, jumps=0.6),
)
TOKENS_PER_STEP = 2304


def rows_of(lesson: Lesson) -> int:
    """Rows of one step; short lessons take smaller steps, because learning to recall takes steps rather than tokens."""
    return min(TOKENS_PER_STEP // lesson.length, 40)


def make_batch(rng: random.Random, lesson: Lesson, rows: int, text: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """One batch of a lesson: ids, kinds, positions, each [rows, length]."""
    dialogues = []
    for _ in range(rows):
        draw = rng.random()
        if text and draw < lesson.text:
            ids = data.random_text(rng, lesson.length)
            dialogues.append(data.Dialogue(ids, [data.ORDINARY] * len(ids), list(range(16, lesson.length, 16))))
        elif draw < lesson.text + lesson.drill:
            dialogues.append(data.drill(rng, lesson.length, lesson.facts))
        elif draw < lesson.text + lesson.drill + lesson.late:
            facts = max(2, lesson.facts // 2)
            dialogues.append(data.late_dialogue(rng, lesson.length, facts, facts, updates=rng.randint(0, facts // 2)))
        else:
            dialogues.append(data.mixed_dialogue(rng, lesson.length, rng.randint(2, lesson.facts), lesson.filler))
    return data.to_batch(rng, dialogues, lesson.length, lesson.jumps)


def loss_and_recall(model: torch.nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted next-token loss, share of answers right, and mean loss of ordinary tokens in nats."""
    ids, kinds, positions = batch
    logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, :-1].flatten(0, 1)
    target, kind = ids[:, 1:].flatten(), kinds[:, 1:].flatten()
    each = F.cross_entropy(logits, target, reduction="none")
    weight = torch.tensor(KIND_WEIGHTS)[kind]
    answers = kind == data.ANSWER
    right = (logits.argmax(-1) == target)[answers].float().mean()
    return (each * weight).sum() / weight.sum(), right.detach(), each[kind == data.ORDINARY].mean().detach()


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 50 steps, constant, then linear decay to 5 % over the last 30 %."""
    return peak * min(1.0, step / 50, 0.05 + 0.95 * max(0.0, (steps - step) / (0.3 * steps)))


def save_base(model: PreTrainedModel, folder: Path = WEIGHTS) -> None:
    """Write config and float16 weights in transformers' layout (the tied output matrix once)."""
    state = {name: tensor.to(torch.float16) for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    model.save_pretrained(folder, state_dict=state)


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--checkpoint", type=Path, default=Path("tiny_base.pt"), help="continues from it when it exists"
    )
    parser.add_argument("--output", type=Path, default=WEIGHTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    model = new_model().train()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1]},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    step, stage, seconds, recall = 0, 0, 0.0, 0.0
    if args.checkpoint.exists():
        saved = torch.load(args.checkpoint)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step, stage, seconds = saved["step"], saved["stage"], saved["seconds"]
    began = time.time() - seconds
    print(sum(p.numel() for p in model.parameters()), "parameters", flush=True)
    while step < args.steps:
        rng = random.Random(f"{args.seed} {step}")
        # Earlier lessons stay in the mix, so that short and dense recall is not forgotten.
        lesson = LESSONS[stage if rng.random() < 0.75 else rng.randint(0, stage)]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        loss, _, ordinary = loss_and_recall(model, make_batch(rng, lesson, rows_of(lesson)))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 25 == 0:
            lesson = LESSONS[stage]
            with torch.no_grad():
                batch = make_batch(rng, lesson, TOKENS_PER_STEP // lesson.length, text=False)
                recall = loss_and_recall(model, batch)[1].item()
            seconds = time.time() - began
            line = (
                f"step {step} lesson {stage} loss {loss.item():.3f} ordinary {ordinary.item():.3f} recall {recall:.3f}"
            )
            print(f"{line} seconds {seconds:.0f}", flush=True)
            if recall > 0.93 and stage < len(LESSONS) - 1:
                stage += 1
        if step % 50 == 0 or step == args.steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**state, "step": step, "stage": stage, "seconds": seconds}, args.checkpoint)
            save_base(model, args.output)


if __name__ == "__main__":
    main()
