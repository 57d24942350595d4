"""Training rows for the gates."""

import random

import torch
from torch import Tensor

from trimkv_edge.models.tiny_vl.batches import Batch, to_batch
from trimkv_edge.models.tiny_vl.dialogues import Mixed
from trimkv_edge.models.tiny_vl.late import crowded_dialogue, late_dialogue, rounds_dialogue

QUESTIONS = 6


def make_rows(
    rng: random.Random, rows: int, length: int, longest: int, rounds: float, crowded: float
) -> tuple[Batch, Tensor, Tensor]:
    """A batch, each token's place in its stream [B,T], and the skips [B,4] of `training.retained`.

    Shares of `rounds` and `crowded` of the rows are such dialogues, the others late ones. Three quarters of the rows
    skip a stretch, log-uniform up to `longest` tokens (a tenth of it in rounds, a fifth in crowded ones): text like one
    of the row's, but in crowded ones pictures and facts too.
    """
    dialogues: list[Mixed] = []
    index, skips = [], []
    places = torch.arange(length)
    for _ in range(rows):
        draw = rng.random()
        if draw < rounds:
            dialogue, texts = rounds_dialogue(rng, length)
            start, end = rng.choice(texts)
            resume, most = (start + end) // 2, longest / 10
        elif draw < rounds + crowded:
            dialogue, (start, resume, end) = crowded_dialogue(rng, length, QUESTIONS)
            most = longest / 5
        else:
            dialogue = late_dialogue(rng, length, rng.randint(2, 8), rng.randint(2, 6), QUESTIONS)
            start, resume, end = dialogue.text
            most = longest
        gap = int(16 * (most / 16) ** rng.random()) if rng.random() < 0.75 else 0
        dialogues.append(dialogue)
        index.append(places + gap * (places >= resume))
        skips.append([start, end, resume, gap])
    batch = to_batch(rng, dialogues, 0.0)
    later = torch.stack(index) - places
    return batch._replace(positions=batch.positions + later), torch.stack(index), torch.tensor(skips)
