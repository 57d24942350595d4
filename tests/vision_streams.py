"""Mixed streams of text, images and videos for tests, and what plain transformers makes of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from factories import IMAGE_TOKEN, PATCH_VALUES, VIDEO_TOKEN, VISION_END, VISION_START
from oracle_model import OracleModel
from torch import Tensor
from transformers import PreTrainedModel

from trimkv_edge.models.attention import BACKEND_KEYWORD
from trimkv_edge.models.pictures import GatedVisionModel, Picture

_TYPE = {IMAGE_TOKEN: 1, VIDEO_TOKEN: 2}
MERGED = 4  # patches of one row


@dataclass
class Mixed:
    """A stream under construction; pixels are random."""

    seed: int = 0
    tokens: list[int] = field(default_factory=list)
    image_grids: list[list[int]] = field(default_factory=list)
    video_grids: list[list[int]] = field(default_factory=list)
    pixels: dict[str, list[Tensor]] = field(default_factory=lambda: {"image": [], "video": []})
    order: list[tuple[str, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = torch.Generator().manual_seed(self.seed)

    def text(self, count: int) -> Mixed:
        self.tokens += torch.randint(3, 310, (count,), generator=self._random).tolist()
        return self

    def image(self, down: int, across: int) -> Mixed:
        self.image_grids.append([1, down, across])
        self.order.append(("image", len(self.image_grids) - 1))
        self._add("image", down * across)
        self._frame(IMAGE_TOKEN, down * across)
        return self

    def video(self, frames: int, down: int, across: int) -> Mixed:
        """Frames as transformers' processor puts them: each between markers, behind a timestamp of 2 tokens."""
        self.video_grids.append([frames, down, across])
        self.order.append(("video", len(self.video_grids) - 1))
        self._add("video", frames * down * across)
        for _ in range(frames):
            self.text(2)
            self._frame(VIDEO_TOKEN, down * across)
        return self

    def _add(self, kind: str, patches: int) -> None:
        self.pixels[kind].append(torch.randn(patches, PATCH_VALUES, generator=self._random))

    def _frame(self, token: int, patches: int) -> None:
        self.tokens += [VISION_START, *[token] * (patches // MERGED), VISION_END]

    def inputs(self) -> dict[str, Tensor]:
        """Arguments of transformers' own forward pass over the whole stream."""
        given = {
            "input_ids": torch.tensor([self.tokens]),
            "mm_token_type_ids": torch.tensor([[_TYPE.get(token, 0) for token in self.tokens]]),
        }
        if self.image_grids:
            given |= {
                "pixel_values": torch.cat(self.pixels["image"]),
                "image_grid_thw": torch.tensor(self.image_grids),
            }
        if self.video_grids:
            given |= {
                "pixel_values_videos": torch.cat(self.pixels["video"]),
                "video_grid_thw": torch.tensor(self.video_grids),
            }
        return given

    def pictures(self, model: GatedVisionModel) -> list[Picture]:
        """Encoded one by one, in the order of the stream."""
        found: list[Picture] = []
        for kind, number in self.order:
            grids = self.image_grids if kind == "image" else self.video_grids
            encode = model.images if kind == "image" else model.videos
            found += encode(self.pixels[kind][number], torch.tensor([grids[number]]))
        return found


def plain_logits(base: PreTrainedModel, stream: Mixed) -> np.ndarray:
    """Of every token, from transformers in one pass without a cache."""
    with torch.no_grad():
        return base(**stream.inputs(), use_cache=False).logits[0].numpy()


class VisionOracle(OracleModel):
    """The list oracle on a mixed stream: the decoder's inputs are cut from what transformers makes of all of it."""

    def begin(self, plain: PreTrainedModel, stream: Mixed) -> None:
        """Takes the inputs of the decoder from one pass of the plain model with the same weights."""
        found: dict[str, object] = {}

        def keep(_: object, args: object, kwargs: dict[str, object]) -> None:
            found.update(kwargs)

        hook = plain.model.language_model.register_forward_pre_hook(keep, with_kwargs=True)
        with torch.no_grad():
            plain(**stream.inputs(), use_cache=False)
        hook.remove()
        self._hidden, self._positions = found["inputs_embeds"], found["position_ids"]
        self._mask, self._deepstack = found["visual_pos_masks"], found["deepstack_visual_embeds"]

    @torch.no_grad()
    def read(self, tokens: list[int]) -> np.ndarray:
        chunk = slice(self.seen, self.seen + len(tokens))
        before, inside = self._mask[0, : chunk.start].sum(), self._mask[0, chunk].sum()
        hidden = self.model.base.model.language_model(
            inputs_embeds=self._hidden[:, chunk],
            position_ids=self._positions[..., chunk],
            visual_pos_masks=self._mask[:, chunk],
            deepstack_visual_embeds=[rows[before : before + inside] for rows in self._deepstack],
            use_cache=False,
            **{BACKEND_KEYWORD: self},
        ).last_hidden_state
        self.seen += len(tokens)
        self.cache.end_step(self.seen)
        return self.model.base.lm_head(hidden[0, -1]).numpy()
