"""The encoder of a static size gives what transformers gives, and so does the form of the decoder that is traced."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from factories import PATCH_VALUES, gated_vision_model, vision_base

from trimkv_edge.models.picture_encoder import PictureEncoder

SIZES = [(2, 2), (4, 6), (10, 4)]


@pytest.mark.parametrize(("down", "across"), SIZES)
def test_equals_transformers(down: int, across: int) -> None:
    base, pixels = vision_base(), torch.randn(down * across, PATCH_VALUES, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = base.model.get_image_features(pixels, torch.tensor([[1, down, across]]), return_dict=True)
        rows, features = PictureEncoder(base.model.visual, down, across)(pixels)
    np.testing.assert_allclose(rows, want.pooler_output[0], atol=1e-5)
    np.testing.assert_allclose(features, torch.stack([each[0] for each in want.deepstack_features]), atol=1e-5)


def test_patches_see_each_other_and_know_their_place() -> None:
    encoder = PictureEncoder(vision_base().model.visual, 4, 4)
    pixels = torch.randn(16, PATCH_VALUES, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        rows, _ = encoder(pixels)
        other = pixels.clone()
        other[0] += 1
        assert (encoder(other)[0] - rows).abs().amax(-1).min() > 1e-4
        assert (encoder(pixels.roll(4, 0))[0].roll(-1, 0) - rows).abs().max() > 1e-2


def test_frames_of_a_video_are_encoded_one_by_one() -> None:
    model, pixels = gated_vision_model(), torch.randn(3 * 24, PATCH_VALUES, generator=torch.Generator().manual_seed(3))
    whole = model.videos(pixels, torch.tensor([[3, 4, 6]]))
    with torch.no_grad():
        for number, picture in enumerate(whole):
            rows, features = PictureEncoder(model.base.model.visual, 4, 6)(pixels[24 * number : 24 * (number + 1)])
            np.testing.assert_allclose(rows, picture.embeddings, atol=1e-5)
            np.testing.assert_allclose(features, picture.deepstack, atol=1e-5)
