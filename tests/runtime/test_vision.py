"""Images and videos as patches: pixel by pixel as transformers cut them, and not before the stream gets there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from vision_text_artefact import noise, png, vision_text_artefact

from trimkv_edge.errors import ConfigError
from trimkv_edge.manifest import VisionInfo
from trimkv_edge.runtime.artefact import Artefact
from trimkv_edge.runtime.picture import PictureLimits
from trimkv_edge.runtime.picture_header import PictureError
from trimkv_edge.runtime.vision import PictureReader

INFO = VisionInfo(
    image_token_id=316,
    video_token_id=317,
    start_token_id=318,
    end_token_id=319,
    features=2,
    sizes=((4, 4), (4, 6), (6, 4)),
    patch_size=4,
    merge_size=2,
    temporal_patch_size=2,
    mean=(0.5, 0.4, 0.3),
    std=(0.5, 0.6, 0.7),
)


def patches_of(frames: list[np.ndarray]) -> np.ndarray:
    """Number by number: rows of 2 x 2 patches, line by line; in a patch channels, frames, lines, pixels."""
    height, width, _ = frames[0].shape
    out = []
    for block_y in range(height // 8):
        for block_x in range(width // 8):
            for inner_y in range(2):
                for inner_x in range(2):
                    top, left = block_y * 8 + inner_y * 4, block_x * 8 + inner_x * 4
                    out.append(
                        [
                            (frame[top + y, left + x, channel] / 255 - INFO.mean[channel]) / INFO.std[channel]
                            for channel in range(3)
                            for frame in frames
                            for y in range(4)
                            for x in range(4)
                        ]
                    )
    return np.array(out)


def folder_of(path: Path, count: int, names: str = "{}.png", width: int = 24, height: int = 16) -> Path:
    path.mkdir()
    for number in range(count):
        noise(number, width, height).save(path / names.format(number))
    return path


def test_an_image_stands_in_all_frames_of_its_patches() -> None:
    shown = PictureReader(INFO).image(png(noise(7)))
    (made,) = shown.patches()
    frame = np.asarray(noise(7))
    np.testing.assert_allclose(made.pixel_values, patches_of([frame, frame]), atol=1e-6)
    assert (shown.kind, shown.rows, shown.seconds, shown.groups) == ("image", 6, (), 1)
    assert made.grid_thw.tolist() == [[1, 4, 6]]
    np.testing.assert_array_equal(next(shown.patches()).pixel_values, made.pixel_values)  # again


def test_a_picture_takes_the_size_of_its_shape() -> None:
    shapes = {(16, 16): 4, (100, 100): 4, (30, 20): 6, (20, 30): 6}
    for (width, height), rows in shapes.items():
        assert PictureReader(INFO).image(png(noise(1, width, height))).rows == rows


def test_frames_in_pairs_and_the_last_one_twice(tmp_path: Path) -> None:
    # 10 comes behind 9: names are sorted by their numbers.
    video = PictureReader(INFO).video(folder_of(tmp_path / "video", 11, "frame-{}.png"))
    made = list(video.patches())
    frames = [np.asarray(noise(number)) for number in range(11)]
    assert (video.kind, video.rows, video.groups, len(made)) == ("video", 6, 6, 6)
    for group, (first, second) in enumerate([(0, 1), (2, 3), (4, 5), (6, 7), (8, 9), (10, 10)]):
        np.testing.assert_allclose(
            made[group].pixel_values, patches_of([frames[first], frames[second]]), atol=1e-6, err_msg=str(group)
        )
        assert made[group].grid_thw.tolist() == [[1, 4, 6]]
    assert video.seconds == (0.25, 1.25, 2.25, 3.25, 4.25, 5.0)


def test_seconds_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

    for count, fps in ((1, 2.0), (5, 2.0), (6, 0.5), (7, 3.0)):
        video = PictureReader(INFO).video(folder_of(tmp_path / f"{count}", count), fps)
        want = Qwen3VLProcessor._calculate_timestamps(None, list(range(count)), fps, 2)
        np.testing.assert_allclose(video.seconds, want)


def test_a_video_is_decoded_as_it_is_read(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "video", 6)
    patches = PictureReader(INFO).video(folder).patches()
    next(patches)
    (folder / "3.png").unlink()
    with pytest.raises(PictureError, match=r"3\.png does not exist"):
        next(patches)


def test_limits_and_shapes_are_refused(tmp_path: Path) -> None:
    small = PictureReader(INFO, PictureLimits(pixels=24 * 16))
    small.image(png(noise(1)))
    with pytest.raises(PictureError, match=r"a\.png has 25 x 16 pixels"):
        small.image(png(noise(1, 25)), "a.png")
    with pytest.raises(PictureError, match="25 x 16 pixels"):
        small.video(folder_of(tmp_path / "large", 2, width=25))
    with pytest.raises(PictureError, match="the picture: a picture of 402 x 2 pixels is too narrow"):
        PictureReader(INFO).image(png(noise(1, 402, 2)))
    with pytest.raises(PictureError, match="does not exist"):
        PictureReader(INFO).image(tmp_path / "nowhere.png")


def test_text_models_read_no_pictures() -> None:
    from text_artefact import text_artefact

    with pytest.raises(ConfigError, match="is of a text model, which reads no pictures"):
        PictureReader.of(Artefact.load(text_artefact()))
    assert PictureReader.of(Artefact.load(vision_text_artefact())).image(png(Image.new("L", (9, 9)))).rows == 4
