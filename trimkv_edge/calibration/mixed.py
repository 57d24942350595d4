"""Streams of text and pictures to calibrate on, and how a model reads one into a cache."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trimkv_edge.calibration.streams import StreamPlan, Streams, has_tokenizer
from trimkv_edge.engine import Cursor
from trimkv_edge.errors import ModelError, TrimKVError
from trimkv_edge.manifest import VisionInfo
from trimkv_edge.mixed_stream import place
from trimkv_edge.models.mixed_sample import MixedSample, Pixels, mixed_sample
from trimkv_edge.models.pictures import GatedVisionModel
from trimkv_edge.models.source import ModelSource
from trimkv_edge.models.tiny.corpus import stdlib_texts
from trimkv_edge.pictures import IMAGE, VIDEO, Picture
from trimkv_edge.pool import PooledCache
from trimkv_edge.runtime.chat import TEMPLATE_FILE, render_chat
from trimkv_edge.runtime.picture_patches import PatchSettings, cut
from trimkv_edge.runtime.tokenizer import TOKENIZER_FILE, TextTokenizer

if TYPE_CHECKING:
    from trimkv_edge.models.tiny_vl.data import Turn

_PICTURES, _FACTS, _QUESTIONS = 3, 2, 4  # of a round
_TEXT = 400  # characters between rounds


def mixed_streams(source: ModelSource, plan: StreamPlan, vision: VisionInfo) -> Streams:
    """What needs no files: conversations about drawn pictures and stated facts, with text between. Calibration and
    held-out streams take other pictures, facts and text. A model without a tokenizer gets random tokens and noise.

    Raises:
        ModelError: weights without a tokenizer or a chat template.
        TrimKVError: Pillow is not installed.
    """
    if source.folder is None or (source.random_weights and not has_tokenizer(source)):
        rng = random.Random(f"calibration {plan.seed}")
        size = source.text_config.vocab_size
        every = [
            mixed_sample(rng.choices(range(size), k=plan.length), vision, seed)
            for seed in range(plan.count + plan.held_out)
        ]
        return Streams(every[: plan.count], every[plan.count :], f"random tokens and noise (seed {plan.seed})")
    if not has_tokenizer(source) or not (source.folder / TEMPLATE_FILE).is_file():
        raise ModelError(f"{source.name} has no tokenizer or no {TEMPLATE_FILE}: calibration needs both")
    writer = _Writer(source, vision)
    texts = stdlib_texts(held_out=True)
    parts: list[list[MixedSample]] = []
    for name, count, text in (("calibration", plan.count, texts[0::2]), ("held-out", plan.held_out, texts[1::2])):
        parts.append([writer.stream(f"{name} {plan.seed} {number}", text, plan.length) for number in range(count)])
    return Streams(parts[0], parts[1], f"sample: conversations about drawn pictures (seed {plan.seed})")


class _Writer:
    """Conversations as tokens and pixels."""

    def __init__(self, source: ModelSource, vision: VisionInfo) -> None:
        assert source.folder is not None
        self.vision = vision
        self.tokenizer = TextTokenizer(source.folder / TOKENIZER_FILE)
        self.template = (source.folder / TEMPLATE_FILE).read_text(encoding="utf-8")
        self.settings = PatchSettings.of(vision)

    def stream(self, seed: str, texts: Sequence[str], length: int) -> MixedSample:
        """``length`` tokens; a picture at its end may be cut."""
        try:
            from trimkv_edge.models.tiny_vl.data import rounds
        except ImportError as error:
            raise TrimKVError(f"drawing pictures needs Pillow ({error}): pip install 'trimkv-edge[vision]'") from error
        rng, ids, pictures = random.Random(seed), list[int](), list[Pixels]()
        turns = rounds(rng.randrange(2**31), _PICTURES, _FACTS, _QUESTIONS)
        while len(ids) < length:
            messages = [_message("user", "Read this:\n" + _piece(rng, texts)), _message("assistant", "Noted.")]
            for _ in range(_PICTURES + _FACTS + _QUESTIONS):
                turn = next(turns)
                messages += [_message("user", turn.content), _message("assistant", turn.reply)]
                pictures += [self._pixels(turn)] if turn.image is not None else []
            ids += self._spread(render_chat(self.template, messages), pictures)
        return MixedSample(ids[:length], pictures)

    def _pixels(self, turn: Turn) -> Pixels:
        assert turn.image is not None
        made = cut(turn.image.convert("RGB"), self.settings, self.vision.sizes)
        return IMAGE, made.pixel_values, made.grid_thw

    def _spread(self, text: str, pictures: list[Pixels]) -> list[int]:
        """Ids with a placeholder for each row of the newest pictures."""
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        newest = iter(pictures[len(pictures) - ids.count(self.vision.image_token_id) :])
        out: list[int] = []
        for token in ids:
            count = 1
            if token == self.vision.image_token_id:
                down, across = self.vision.rows(tuple(next(newest)[2][0, 1:].tolist()))
                count = down * across
            out += [token] * count
        return out


def _message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def _piece(rng: random.Random, texts: Sequence[str]) -> str:
    text = rng.choice([text for text in texts if len(text) > _TEXT])
    start = rng.randrange(len(text) - _TEXT)
    return text[start : start + _TEXT]


class MixedReader:
    """Reads one stream chunk by chunk.

    Args:
        model: encodes the pictures at once.
        pictures: of the stream.
    """

    def __init__(self, model: GatedVisionModel, pictures: list[Pixels]) -> None:
        self.model = model
        self.waiting: list[Picture] = []
        for kind, pixels, grid in pictures:
            encode = model.videos if kind == VIDEO else model.images
            self.waiting += encode(torch.from_numpy(pixels), torch.from_numpy(grid))
        self.cursor = Cursor()

    def read(self, ids: Tensor, cache: PooledCache) -> None:
        """``ids``: int64 ``[1, T]``, the next of the stream."""
        placed = place(ids[0].numpy(), self.cursor, self.waiting, self.model.placeholders)
        self.model.read(ids, placed.rows, cache)
        self.cursor = placed.cursor
        del self.waiting[: placed.finished]
