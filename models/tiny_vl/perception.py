"""First stage of the training: the vision encoder alone learns to say what a picture shows, in words' embeddings."""

import argparse
import math
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimkv_edge.models.tiny_vl.network import encode, new_model
from trimkv_edge.models.tiny_vl.patches import cut_many
from trimkv_edge.models.tiny_vl.scenes import ATTRIBUTES, SIZES, Scene, frames, random_scene
from trimkv_edge.models.tiny_vl.tokenizer import load_tokenizer

QUIET = 0.3  # weight of what the other rows have to be silent about


def word_id(word: str) -> int:
    """Token id of a word with its leading space."""
    (found,) = load_tokenizer().encode(" " + word).ids
    return found


def make_pictures(rng: random.Random, size: tuple[int, int], count: int) -> tuple[Tensor, int, int, list[Scene]]:
    """`count` random scenes of one size, cut; a quarter of them are two frames of a video."""
    scenes = [random_scene(rng, size) for _ in range(count)]
    pixels = []
    for scene in scenes:
        shots = frames(scene, 2 if rng.random() < 0.25 else 1)
        pixels.append(np.stack([np.asarray(shot) for shot in (shots[0], shots[-1])]))
    return *cut_many(np.stack(pixels)), scenes


def row_loss(
    rows: Tensor, scenes: list[Scene], words: dict[str, Tensor], every: bool = False
) -> tuple[Tensor, dict[str, float]]:
    """The first row of a picture names all its attributes, and the others none: a gate can tell them apart.

    rows [N, R, hidden]. Cross-entropy of the first row (`every`: of all) and the others' distance from a uniform guess;
    the share that the first has right.
    """
    norm = F.rms_norm(rows, rows.shape[-1:])
    loss, right = rows.new_zeros(()), {}
    for name, table in words.items():
        target = torch.tensor([ATTRIBUTES[name].index(scene.answer(name)) for scene in scenes])
        logits = norm @ F.rms_norm(table, table.shape[-1:]).T / 4
        naming = rows.shape[1] if every else 1
        named = logits[:, :naming].flatten(0, 1)
        loss = loss + F.cross_entropy(named, target.repeat_interleave(naming))
        if not every:
            loss = loss - QUIET * (F.log_softmax(logits[:, 1:], -1).mean() + math.log(len(table)))
        right[name] = (logits[:, 0].argmax(-1) == target).float().mean().item()
    return loss, right


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--every-row", action="store_true", help="every row of a picture names its attributes")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--checkpoint", type=Path, required=True, help="continues from it when it exists")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = new_model().train()
    visual = model.model.visual
    table = model.model.language_model.embed_tokens.weight.detach()
    words = {name: table[[word_id(word) for word in ATTRIBUTES[name]]] for name in ATTRIBUTES}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in visual.parameters() if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in visual.parameters() if p.ndim == 1]},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    step, began = 0, time.time()
    if args.checkpoint.exists():
        saved = torch.load(args.checkpoint)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step = saved["step"]
    while step < args.steps:
        rng = random.Random(f"perception {step}")
        rate = args.lr * min(1.0, step / 100, 0.02 + 0.98 * (args.steps - step) / (0.5 * args.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        size = rng.choice(SIZES)
        patches, down, across, scenes = make_pictures(rng, size, args.batch)
        rows, _ = encode(visual, patches, down, across)
        loss, right = row_loss(rows, scenes, words, args.every_row)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(visual.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 25 == 0:
            shares = " ".join(f"{name} {share:.2f}" for name, share in right.items())
            print(
                f"step {step} size {size} loss {loss.item():.3f} {shares} seconds {time.time() - began:.0f}", flush=True
            )
        if step % 100 == 0 or step == args.steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            torch.save(state, args.checkpoint)


if __name__ == "__main__":
    main()
