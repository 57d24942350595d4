"""Pictures as rows of a stream: encoded once, then read by the gated decoder chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from trimkv_edge.errors import ModelError
from trimkv_edge.models.attention import BACKEND_KEYWORD, AttentionBackend
from trimkv_edge.models.family import text_decoder
from trimkv_edge.models.gated import GatedModel
from trimkv_edge.pictures import IMAGE, VIDEO, ChunkRows, Picture


class Embed(nn.Module):
    """``input_ids`` int64 ``[1, T]`` -> float32 ``[1, T, hidden_size]``, as a graph of its own."""

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, input_ids: Tensor) -> Tensor:
        rows: Tensor = self.embedding(input_ids)
        return rows


class GatedVisionModel(GatedModel):
    """A transformers vision-language model with retention gates in its text decoder."""

    @property
    def features(self) -> int:
        """DeepStack features of a picture."""
        return len(self.base.config.vision_config.deepstack_visual_indexes)

    @property
    def placeholders(self) -> dict[int, str]:
        """Kind of picture by the token id that holds its place."""
        config = self.base.config
        return {config.image_token_id: IMAGE, config.video_token_id: VIDEO}

    @torch.no_grad()
    def images(self, pixel_values: Tensor, grid_thw: Tensor) -> list[Picture]:
        """Encodes images.

        Args:
            pixel_values: ``[patches, values]`` of all images, as transformers' image processor makes them.
            grid_thw: int64 ``[images, 3]``: frame groups (1), patches down, patches across.

        Raises:
            ModelError: sizes that do not fit each other or the model.
        """
        if grid_thw.ndim == 2 and (grid_thw[:, :1] != 1).any():
            raise ModelError(
                f"image grid {grid_thw.tolist()}: an image has 1 frame group; give more of them as a video"
            )
        return list(self._encode(IMAGE, pixel_values, grid_thw))

    @torch.no_grad()
    def videos(self, pixel_values: Tensor, grid_thw: Tensor) -> list[Picture]:
        """Encodes videos into one picture for each frame group, which have their placeholders apart (timestamps between
        them); arguments and errors as of :meth:`images`, with any number of frame groups."""
        return list(self._encode(VIDEO, pixel_values, grid_thw))

    def _encode(self, kind: str, pixel_values: Tensor, grid_thw: Tensor) -> Iterator[Picture]:
        self._check(kind, pixel_values, grid_thw)
        merge = self.base.config.vision_config.spatial_merge_size
        out = self.base.model.get_image_features(pixel_values, grid_thw, return_dict=True)
        for number, (frames, down, across) in enumerate(grid_thw.tolist()):
            height, width = down // merge, across // merge
            deepstack = torch.stack([feature[number] for feature in out.deepstack_features])
            for frame in range(frames):
                rows = slice(frame * height * width, (frame + 1) * height * width)
                # Copies: a view would keep the rows of all the others.
                made = (out.pooler_output[number][rows], deepstack[:, rows])
                yield Picture(kind, height, width, *(tensor.float().numpy(force=True).copy() for tensor in made))

    def _check(self, kind: str, pixel_values: Tensor, grid_thw: Tensor) -> None:
        config = self.base.config.vision_config
        if grid_thw.ndim != 2 or grid_thw.shape[1] != 3 or grid_thw.dtype != torch.int64 or not len(grid_thw):
            raise ModelError(f"{kind} grid {list(grid_thw.shape)} of {grid_thw.dtype}: give int64 [pictures, 3]")
        merge = config.spatial_merge_size
        if (grid_thw < 1).any() or (grid_thw[:, 1:] % merge).any():
            raise ModelError(
                f"{kind} grid {grid_thw.tolist()}: numbers of patches must be positive, and multiples of {merge} "
                "down and across"
            )
        values = config.in_channels * config.temporal_patch_size * config.patch_size**2
        want = (int(grid_thw.prod(-1).sum()), values)
        if tuple(pixel_values.shape) != want:
            raise ModelError(
                f"{kind} pixels {list(pixel_values.shape)}: grid {grid_thw.tolist()} and {config.in_channels} channels "
                f"need {list(want)}"
            )

    def read(self, input_ids: Tensor, rows: ChunkRows, backend: AttentionBackend, last_only: bool = True) -> Tensor:
        """Reads a chunk of a mixed stream.

        Args:
            input_ids: int64 ``[1, T]``; ids of placeholders count for nothing.
            rows: of the same T tokens.
            backend: takes each layer's entries and attends.
            last_only: logits of the last token only.

        Returns:
            logits ``[1, 1 or T, vocab_size]``.
        """
        decoder = text_decoder(self.base)
        positions, visual, embeddings, deepstack = map(torch.from_numpy, rows)
        visual = visual[None]
        hidden = decoder.embed_tokens(input_ids).masked_scatter(visual[..., None], embeddings)
        out = decoder(
            inputs_embeds=hidden,
            position_ids=positions[:, None],
            use_cache=False,
            visual_pos_masks=visual,
            deepstack_visual_embeds=list(deepstack),
            **{BACKEND_KEYWORD: backend},
        ).last_hidden_state
        logits: Tensor = self.base.lm_head(out[:, -1:] if last_only else out)
        return logits

    def decode_rows(
        self, embeddings: Tensor, positions: Tensor, deepstack: Tensor, backend: AttentionBackend
    ) -> Tensor:
        """:meth:`read` for tracing: without masks, since a text token is a row with DeepStack features of 0.

        Args:
            embeddings: float32 ``[1, T, hidden_size]``.
            positions: int64 ``[3, T]``, M-RoPE positions.
            deepstack: float32 ``[features, T, hidden_size]``.
            backend: takes each layer's entries and attends.

        Returns:
            logits ``[1, 1, vocab_size]`` of the last token.
        """
        decoder = text_decoder(self.base)
        angles = decoder.rotary_emb(embeddings, positions[:, None])
        hidden = embeddings
        for number, layer in enumerate(decoder.layers):
            hidden = layer(hidden, position_embeddings=angles, attention_mask=None, **{BACKEND_KEYWORD: backend})
            if number < deepstack.shape[0]:
                hidden = hidden + deepstack[number]
        logits: Tensor = self.base.lm_head(decoder.norm(hidden[:, -1:]))
        return logits
