"""200 pictures and 20,000 tokens of text in one stream: the same survivors in every engine, what is answered, and RSS.

    python benchmarks/mixed_stream.py                                                        # parts: global and trimkv
    python benchmarks/mixed_stream.py --talk --gates rg10-chat --budget 64 --policies global --streams 2

A stream of parts is never reset. Each part shows 5 pictures and states 5 facts, then comes text with 35 more pictures
in it, and then 10 questions about the part's first pictures and facts, about 4,500 tokens later; the true answers are
read. ``--talk`` is the conversation of ``models/tiny_vl/conversation.py``, in which the model gives the answers itself:
rounds of 4 pictures, 4 facts and 8 questions, 41,000 tokens.

Every engine reads in a process of its own and encodes its pictures itself, one by one as the stream comes to them.
Survivors are compared after every eviction event, answers one by one. Rows are added to those stored.
"""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import exported, parser, rss, save

from trimkv_edge.manifest import load_manifest
from trimkv_edge.mixed_engine import MixedEngine
from trimkv_edge.models.loading import load_model
from trimkv_edge.models.source import find_source
from trimkv_edge.models.tiny.data import ANSWER
from trimkv_edge.models.tiny_vl.conversation import QUESTIONS as QUESTIONS_OF_BOTH
from trimkv_edge.models.tiny_vl.conversation import converse
from trimkv_edge.models.tiny_vl.dialogues import ROW, SEEN, Mixed
from trimkv_edge.models.tiny_vl.late import late_dialogue
from trimkv_edge.models.tiny_vl.patches import cut_many
from trimkv_edge.models.tiny_vl.tokenizer import IMAGE_PAD, load_tokenizer
from trimkv_edge.models.vision_engine import vision_engine
from trimkv_edge.pictures import IMAGE, VIDEO, Picture
from trimkv_edge.runtime.artefact import Artefact
from trimkv_edge.runtime.engines import load_engine

PARTS, EARLY, FACTS, OTHERS, QUESTIONS, LENGTH = 5, 5, 5, 35, 10, 4750
SIZES = ("64x64", "96x64", "64x96", "64x32", "32x32")
EVERY = 1000  # tokens between two looks at the process's memory


@dataclass
class Stream:
    """Ids, their kinds, and the pictures by where their rows begin."""

    ids: list[int]
    kinds: list[int]
    shown: dict[int, Any]


def stream(seed: int) -> Stream:
    """All parts of one stream."""
    out = Stream([], [], {})
    for part in range(PARTS):
        rng = random.Random(f"mixed stream {seed} {part}")
        dialogue: Mixed = late_dialogue(rng, LENGTH, EARLY, FACTS, QUESTIONS, OTHERS, held_out=True)
        out.shown |= {len(out.ids) + shown.start: shown for shown in dialogue.shown}
        out.ids += dialogue.ids
        out.kinds += dialogue.kinds
    return out


class Notes:
    """What is noted along a stream, in memory that was taken before it began: the stream must not make it grow."""

    def __init__(self) -> None:
        self._numbers = {name: np.full((2**14, 2), -1, np.int64) for name in ("digests", "answers", "rss")}
        self._count = dict.fromkeys(self._numbers, 0)

    def add(self, name: str, one: int, other: int = 0) -> None:
        """One row of a table."""
        self._numbers[name][self._count[name]] = one, other
        self._count[name] += 1

    def event(self, engine: MixedEngine) -> None:
        """A digest of who survived."""
        held = np.sort(engine.survivors(), -1)
        digest = hashlib.blake2b(held.tobytes(), digest_size=7).digest()
        self.add("digests", int.from_bytes(digest, "little"))

    def rows(self) -> dict[str, list[list[int]]]:
        """All tables."""
        return {name: table[: self._count[name]].tolist() for name, table in self._numbers.items()}


def read(engine: MixedEngine, text: Stream) -> dict[str, Any]:
    """Reads a stream to its end."""
    image = load_tokenizer().token_to_id(IMAGE_PAD)
    engine.reset()
    starts = sorted(text.shown)
    asked = [at for at, kind in enumerate(text.kinds) if kind in (SEEN, ANSWER)]
    notes = Notes()
    for end in [*asked, len(text.ids)]:
        logits = np.empty(0)
        while engine.seen < end:
            if engine.room == 0:
                engine.evict()
                notes.event(engine)
            step = min(engine.room, engine.config.prefill_chunk, end - engine.seen)
            while starts and starts[0] < engine.seen + step:
                shown = text.shown[starts[0]]
                patches, down, across = cut_many(shown.pixels[None])
                kind = IMAGE if text.ids[starts.pop(0)] == image else VIDEO
                engine.show(engine.encode(kind, patches[0].numpy(), np.array([[1, down, across]])))
            if engine.seen // EVERY != (engine.seen + step) // EVERY:
                notes.add("rss", engine.seen, rss())
            logits = engine.prefill(text.ids[engine.seen : engine.seen + step])
        if end < len(text.ids):
            notes.add("answers", text.kinds[end] == SEEN, int(logits.argmax()) == text.ids[end])
    return {
        "tokens": len(text.ids),
        "picture_rows": text.kinds.count(ROW),
        "pictures": len(text.shown),
        **notes.rows(),
    }


def talk(engine: MixedEngine, seed: int) -> dict[str, Any]:
    """A conversation of so many pictures, never reset."""
    engine.reset()
    notes, rows = Notes(), 0
    evict, show = engine.evict, engine.show

    def noted() -> None:
        evict()
        notes.event(engine)

    def counted(pictures: Sequence[Picture]) -> None:
        nonlocal rows
        rows += sum(picture.rows for picture in pictures)
        show(pictures)

    engine.evict, engine.show = noted, counted  # type: ignore[method-assign]
    pictures = 0
    for kind, good in converse(engine, seed, 200, 40):
        pictures += kind == "picture"
        notes.add("rss", engine.seen, rss())
        if kind in QUESTIONS_OF_BOTH:
            notes.add("answers", kind == QUESTIONS_OF_BOTH[0], good)
    engine.evict, engine.show = evict, show  # type: ignore[method-assign]
    return {
        "tokens": engine.seen,
        "picture_rows": rows,
        "pictures": pictures,
        **notes.rows(),
    }


def slope(memory: list[list[int]]) -> float:
    """Bytes per token of the line through all looks at the memory but the first quarter's."""
    later = np.array(memory[len(memory) // 4 :], np.float64)
    return float(np.polyfit(later[:, 0], later[:, 1], 1)[0])


def inside(folder: Path, name: str, args: Any) -> list[dict[str, Any]]:
    """All streams in one engine, in this process."""
    torch.set_num_threads(args.threads)
    artefact = Artefact.load(folder, verify=False)
    engine: Any
    if name == "eager":
        source = find_source("tiny-vl", vision=True)
        engine = vision_engine(load_model(source, args.gates).model, artefact.manifest.cache)
    else:
        engine = load_engine(artefact, name, args.threads)
    if args.talk:
        return [talk(engine, seed) for seed in range(args.streams)]
    return [read(engine, stream(seed)) for seed in range(args.streams)]


def alike(runs: list[dict[str, Any]], others: list[dict[str, Any]], what: str) -> int:
    """How many of the things of one kind are the same in both."""
    pairs = (zip(run[what], own[what], strict=True) for run, own in zip(runs, others, strict=True))
    return sum(one == other for pair in pairs for one, other in pair)


def summary(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """What all engines did."""
    first = next(iter(found.values()))
    rows: dict[str, Any] = {
        "streams": len(first),
        "tokens": [run["tokens"] for run in first],
        "pictures": [run["pictures"] for run in first],
        "picture_rows": [run["picture_rows"] for run in first],
        "events": sum(len(run["digests"]) for run in first),
        "engines": {},
    }
    for name, runs in found.items():
        answers = [tuple(answer) for run in runs for answer in run["answers"]]
        rows["engines"][name] = {
            "events_with_the_same_survivors": alike(runs, first, "digests"),
            "answers_as_eager": alike(runs, first, "answers"),
            "picture": [sum(r for seen, r in answers if seen), sum(seen for seen, _ in answers)],
            "text": [sum(r for seen, r in answers if not seen), sum(not seen for seen, _ in answers)],
            # The first stream warms allocators up.
            "rss_slope_bytes_per_token": [round(slope(run["rss"]), 2) for run in runs[1:] or runs],
            "rss_mib": [round(run["rss"][-1][1] / 2**20, 1) for run in runs],
        }
    return rows


def main() -> None:
    """Command line entry."""
    options = parser(__doc__, "mixed_stream")
    options.add_argument("--engines", nargs="+", default=["onnx", "executorch"])
    options.add_argument("--policies", nargs="+", default=["global", "trimkv"])
    options.add_argument("--gates", default="rg10", help="of tiny-vl: rg10 (default) or rg10-chat")
    options.add_argument("--budget", type=int, default=128)
    options.add_argument("--streams", type=int, default=3)
    options.add_argument("--talk", action="store_true", help="a conversation instead of parts")
    options.add_argument(
        "--inside", nargs=3, metavar=("ARTEFACT", "ENGINE", "FILE"), help="one engine, in this process"
    )
    args = options.parse_args()
    if args.inside:
        folder, name, file = args.inside
        Path(file).write_text(json.dumps(inside(Path(folder), name, args)), encoding="utf-8")
        return
    rows = []
    for policy in args.policies:
        settings = {"model": "tiny-vl", "gates": args.gates, "policy": policy, "budget": str(args.budget), "buffer": 32}
        with exported(**settings, prefill_chunk=32, targets=tuple(args.engines), image_sizes=SIZES) as folder:
            cache = load_manifest(folder, verify_files=False).bytes.cache
            found = {}
            for name in ["eager", *args.engines]:
                with tempfile.NamedTemporaryFile(suffix=".json") as out:
                    command = [sys.executable, __file__, "--inside", str(folder), name, out.name]
                    command += ["--streams", str(args.streams), "--threads", str(args.threads), "--gates", args.gates]
                    command += ["--talk"] if args.talk else []
                    subprocess.run(command, check=True)
                    found[name] = json.loads(Path(out.name).read_text(encoding="utf-8"))
        row = {
            "kind": "talk" if args.talk else "parts",
            "policy": policy,
            "gates": args.gates,
            "budget": args.budget,
            "buffer": 32,
            "cache_bytes": cache,
            **summary(found),
        }
        print(json.dumps(row, indent=1))
        rows.append(row)
    key = ("kind", "policy", "gates", "budget")
    old = json.loads(args.output.read_text(encoding="utf-8"))["results"] if args.output.is_file() else []
    new = {tuple(row[name] for name in key) for row in rows}
    save(args.output, "mixed_stream", [row for row in old if tuple(row[name] for name in key) not in new] + rows)


if __name__ == "__main__":
    main()
