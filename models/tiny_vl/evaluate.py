"""Reproduces the model card's tables: `python -m trimkv_edge.models.tiny_vl.evaluate --output FILE`."""

import argparse
import json
import random
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForImageTextToText

from trimkv_edge.config import CacheConfig
from trimkv_edge.models.gates import GateShape, load_gates
from trimkv_edge.models.pictures import GatedVisionModel
from trimkv_edge.models.tiny.data import ANSWER
from trimkv_edge.models.tiny_vl.dialogues import ROW, SEEN, Mixed
from trimkv_edge.models.tiny_vl.late import late_dialogue
from trimkv_edge.models.tiny_vl.patches import cut_many
from trimkv_edge.models.tiny_vl.tokenizer import WEIGHTS
from trimkv_edge.models.vision_engine import VisionEngine, vision_engine
from trimkv_edge.pictures import Picture

BUFFER = 32
SINKS = 4
GATES = ("rg10", "rg10-chat")
MODALITIES = {SEEN: "picture", ANSWER: "text"}
# Of a stream's first part: pictures and facts that are asked for; then pictures between the texts.
CONTENT = {1024: (5, 5, 6), 4096: (5, 5, 40)}
QUESTIONS = 10


def load(name: str = "rg10") -> GatedVisionModel:
    """The shipped model with its gates called `name`, float32."""
    base = AutoModelForImageTextToText.from_pretrained(WEIGHTS, dtype=torch.float32)
    gates, _ = load_gates(WEIGHTS.parent / "gates" / f"{name}.safetensors", GateShape.of(base.config))
    return GatedVisionModel(base, gates).eval().requires_grad_(False)


def stream(seed: int, length: int) -> Mixed:
    """A dialogue of `length` tokens whose text comes from files that training never saw."""
    pictures, facts, others = CONTENT[length]
    rng = random.Random(f"evaluate vl {seed} {length}")
    return late_dialogue(rng, length, pictures, facts, QUESTIONS, others, held_out=True)


def pictures_of(model: GatedVisionModel, dialogue: Mixed) -> list[Picture]:
    """The rows of its pictures, as the engine is shown them."""
    out = []
    for shown in dialogue.shown:
        video = dialogue.ids[shown.start] == model.base.config.video_token_id
        patches, down, across = cut_many(shown.pixels[None])
        encode = model.videos if video else model.images
        out += encode(patches[0], torch.tensor([[1, down, across]]))
    return out


def picture_share(engine: VisionEngine, rows: np.ndarray) -> float:
    """Share of the held entries of all heads that are rows of pictures; `rows` bool [tokens]."""
    held = engine.survivors()
    held = held[held >= 0]
    return float(rows[held].mean())


def read(
    engine: VisionEngine, dialogue: Mixed, pictures: list[Picture]
) -> tuple[dict[str, list[bool]], list[tuple[int, float]]]:
    """Reads a stream to its end: what was right, by modality, and the share of picture rows held after each event."""
    engine.reset()
    engine.show(pictures)
    rows = np.array(dialogue.kinds) == ROW
    right: dict[str, list[bool]] = {name: [] for name in MODALITIES.values()}
    shares: list[tuple[int, float]] = []
    ends = [at for at, kind in enumerate(dialogue.kinds) if kind in MODALITIES]
    for end in [*ends, len(dialogue.ids)]:
        logits = np.empty(0, np.float32)
        while engine.seen < end:
            if engine.room == 0:
                engine.evict()
                shares.append((engine.seen, picture_share(engine, rows)))
            step = min(engine.room, engine.config.prefill_chunk, end - engine.seen)
            logits = engine.prefill(dialogue.ids[engine.seen : engine.seen + step])
        if end < len(dialogue.ids):
            right[MODALITIES[dialogue.kinds[end]]].append(int(logits.argmax()) == dialogue.ids[end])
    return right, shares


def methods(length: int, budgets: list[int]) -> list[tuple[str, str, CacheConfig]]:
    """Name, gates and settings of each method and budget."""
    out = [("full cache", GATES[0], CacheConfig(length, 128, 128))]
    for budget in budgets:
        for gates in GATES:
            out.append((f"global ({gates})", gates, CacheConfig(budget, BUFFER, BUFFER, "global")))
        out.append((f"trimkv ({GATES[0]})", GATES[0], CacheConfig(budget, BUFFER, BUFFER)))
        out.append(("streaming", GATES[0], CacheConfig(budget, BUFFER, BUFFER, "streaming", sinks=SINKS)))
    return out


def over_time(shares: list[list[tuple[int, float]]], parts: int = 8) -> list[dict[str, float]]:
    """Mean share of picture rows at about `parts` places of the streams."""
    by_place: dict[int, list[float]] = defaultdict(list)
    for run in shares:
        for place, share in run:
            by_place[place].append(share)
    places = sorted(by_place)
    chosen = sorted({places[round(at)] for at in np.linspace(0, len(places) - 1, parts)}) if places else []
    return [{"tokens": place, "share": round(float(np.mean(by_place[place])), 4)} for place in chosen]


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", choices=tuple(CONTENT), default=list(CONTENT))
    parser.add_argument("--budgets", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    models = {name: load(name) for name in GATES}
    records: list[dict[str, Any]] = []
    for length in args.lengths:
        dialogues = [stream(args.seed + number, length) for number in range(args.rows)]
        shown = [pictures_of(models[GATES[0]], dialogue) for dialogue in dialogues]
        for method, gates, config in methods(length, args.budgets):
            began = time.time()
            engine = vision_engine(models[gates], config)
            runs = [read(engine, dialogue, pictures) for dialogue, pictures in zip(dialogues, shown, strict=True)]
            record: dict[str, Any] = {"length": length, "method": method}
            if method != "full cache":
                record["budget"] = config.budget
            for name in MODALITIES.values():
                answers = [answer for right, _ in runs for answer in right[name]]
                record[name] = {"right": sum(answers), "asked": len(answers), "share": round(np.mean(answers), 4)}
            if method != "full cache":
                record["picture_rows_held"] = over_time([shares for _, shares in runs])
            records.append(record)
            print(json.dumps(record), f"{time.time() - began:.0f} s", flush=True)
    rows = [kinds.count(ROW) / len(kinds) for kinds in (dialogue.kinds for dialogue in dialogues)]
    result = {
        "buffer": BUFFER,
        "window_sinks": SINKS,
        "rows": args.rows,
        "seed": args.seed,
        "content": {str(length): CONTENT[length] for length in args.lengths},
        "picture_rows_of_the_longest_streams": round(float(np.mean(rows)), 4),
        "table": records,
    }
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
