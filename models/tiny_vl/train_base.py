"""Train the whole network: `python -m trimkv_edge.models.tiny_vl.train_base --start FILE --checkpoint FILE`."""

import argparse
import random
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trimkv_edge.models.tiny import data as tiny
from trimkv_edge.models.tiny_vl.batches import Batch, to_batch
from trimkv_edge.models.tiny_vl.corpus import random_text
from trimkv_edge.models.tiny_vl.dialogues import ROW, SEEN, Mixed, mixed_dialogue
from trimkv_edge.models.tiny_vl.forward import embed, last_hidden
from trimkv_edge.models.tiny_vl.late import late_dialogue
from trimkv_edge.models.tiny_vl.network import new_model
from trimkv_edge.models.tiny_vl.patches import save_settings
from trimkv_edge.models.tiny_vl.tokenizer import WEIGHTS

KIND_WEIGHTS = (1.0, 0.1, 10.0, 3.0, 10.0, 0.0)  # ORDINARY, RANDOM, ANSWER, ECHO, SEEN, ROW


class Lesson(NamedTuple):
    """One step of the curriculum: the most pictures and facts of a row, the share of text in it, of rows of plain text,
    and of rows whose positions jump."""

    length: int
    pictures: int
    facts: int
    filler: float
    text: float
    jumps: float


LESSONS = (
    Lesson(96, 1, 2, 0.1, 0.05, 0.2),
    Lesson(192, 3, 4, 0.2, 0.1, 0.4),
    Lesson(384, 6, 6, 0.4, 0.1, 0.6),
    Lesson(768, 10, 9, 0.5, 0.1, 0.6),
)
TOKENS_PER_STEP = 2304


def make_batch(rng: random.Random, lesson: Lesson, rows: int, text: bool = True) -> Batch:
    """One batch of a lesson."""
    dialogues = []
    for _ in range(rows):
        if text and rng.random() < lesson.text:
            ids = random_text(rng, lesson.length)
            dialogues.append(Mixed(ids, [tiny.ORDINARY] * len(ids), list(range(16, lesson.length, 16))))
        else:
            pictures, facts = rng.randint(0, lesson.pictures), rng.randint(0, lesson.facts)
            if lesson.length >= 384 and rng.random() < 0.3:
                few = lesson.length // 128
                dialogues.append(late_dialogue(rng, lesson.length, rng.randint(1, few), rng.randint(0, few), 2 * few))
                continue
            if pictures + facts == 0:
                pictures = 1
            dialogues.append(mixed_dialogue(rng, lesson.length, pictures, facts, rng.uniform(0, lesson.filler)))
    return to_batch(rng, dialogues, lesson.jumps)


def loss_and_recall(model: Any, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    """Weighted next-token loss; shares of answers right (from text, from pictures) and loss of ordinary tokens."""
    hidden = last_hidden(model, batch, embed(model, batch))
    target, kind = batch.ids[:, 1:].flatten(), batch.kinds[:, 1:].flatten()
    used = kind != ROW
    target, kind = target[used], kind[used]
    logits = model.lm_head(hidden[:, :-1].flatten(0, 1)[used])
    each = F.cross_entropy(logits, target, reduction="none")
    weight = torch.tensor(KIND_WEIGHTS)[kind]
    right = (logits.argmax(-1) == target).float()
    measured = {
        "ordinary": each[kind == tiny.ORDINARY].mean().item(),
        "text": right[kind == tiny.ANSWER].mean().item(),
        "seen": right[kind == SEEN].mean().item(),
    }
    return (each * weight).sum() / weight.sum(), measured


def save_base(model: Any, folder: Path = WEIGHTS) -> None:
    """Write configurations and float16 weights in transformers' layout (the tied output matrix once)."""
    state = {name: tensor.to(torch.float16) for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    model.save_pretrained(folder, state_dict=state)
    save_settings(folder)


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--visual-rate", type=float, default=0.05, help="of the encoder, as a share of --lr")
    parser.add_argument("--stage", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--start", type=Path, help="checkpoint to begin with")
    parser.add_argument("--encoder", type=Path, help="another one to take the vision encoder from")
    parser.add_argument("--checkpoint", type=Path, required=True, help="continues from it when it exists")
    parser.add_argument("--output", type=Path, default=WEIGHTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = new_model().train()
    if args.start and not args.checkpoint.exists():
        model.load_state_dict(torch.load(args.start)["model"])
        if args.encoder:
            prefix = "model.visual."
            state = torch.load(args.encoder)["model"].items()
            model.model.visual.load_state_dict({k.removeprefix(prefix): v for k, v in state if k.startswith(prefix)})
    # A few pictures a step would undo at full rate what the encoder learnt from many.
    parts = ((model.model.visual, args.visual_rate), (model.model.language_model, 1.0))
    groups: list[dict[str, Any]] = [
        {
            "params": [p for p in part.parameters() if (p.ndim > 1) == decayed],
            "weight_decay": 0.05 * decayed,
            "rate": rate,
        }
        for part, rate in parts
        for decayed in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    step, stage, seconds = 0, args.stage, 0.0
    if args.checkpoint.exists():
        saved = torch.load(args.checkpoint)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step, stage, seconds = saved["step"], max(stage, saved["stage"]), saved["seconds"]
    began = time.time() - seconds
    while step < args.steps:
        rng = random.Random(f"base {step}")
        lesson = LESSONS[stage if rng.random() < 0.75 else rng.randint(0, stage)]
        rate = args.lr * min(1.0, (step + 1) / 50, 0.02 + 0.98 * max(0.0, (args.steps - step) / (0.35 * args.steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate * group["rate"]
        loss, _ = loss_and_recall(model, make_batch(rng, lesson, TOKENS_PER_STEP // lesson.length))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 25 == 0:
            lesson = LESSONS[stage]
            with torch.no_grad():
                measured = loss_and_recall(
                    model, make_batch(rng, lesson, 2 * TOKENS_PER_STEP // lesson.length, text=False)
                )[1]
            seconds = time.time() - began
            shares = " ".join(f"{name} {value:.3f}" for name, value in measured.items())
            print(f"step {step} lesson {stage} loss {loss.item():.3f} {shares} seconds {seconds:.0f}", flush=True)
            if min(measured["text"], measured["seen"]) > 0.9 and stage < len(LESSONS) - 1:
                stage += 1
        if step % 50 == 0 or step == args.steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**state, "step": step, "stage": stage, "seconds": seconds}, args.checkpoint)
            save_base(model, args.output)


if __name__ == "__main__":
    main()
