"""Patches against transformers' own processor, settings of the hub, and static sizes by a hand-made table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from trimkv_edge.errors import ConfigError
from trimkv_edge.runtime.picture import PictureError
from trimkv_edge.runtime.picture_patches import PatchSettings, choose_bucket, cut, smart_size

# The file of Qwen/Qwen3-VL-4B-Instruct.
HUB = {
    "size": {"longest_edge": 16777216, "shortest_edge": 65536},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "Qwen3VLProcessor",
    "image_processor_type": "Qwen2VLImageProcessorFast",
}
SIZES = [(256, 256), (1, 1), (1, 200), (31, 33), (48, 80), (300, 500), (777, 613), (1080, 40), (16, 16)]


def noise(height: int, width: int, channels: int = 3) -> Image.Image:
    raw = np.random.default_rng(height * 7919 + width).integers(0, 256, (height, width, channels), np.uint8)
    return Image.fromarray(raw)


def write(folder: Path, **changes: Any) -> Path:
    path = folder / "preprocessor_config.json"
    found = {name: value for name, value in {**HUB, **changes}.items() if value != "absent"}
    path.write_text(json.dumps(found), encoding="utf-8")
    return path


def transformers_processor(**changes: Any) -> Qwen2VLImageProcessorPil:
    settings = {**HUB, **changes}
    del settings["processor_class"], settings["image_processor_type"]
    return Qwen2VLImageProcessorPil(**settings)


def assert_equal(image: Image.Image, settings: PatchSettings, processor: Qwen2VLImageProcessorPil) -> None:
    want = processor(images=[image], return_tensors="np")
    got = cut(image, settings)
    assert got.pixel_values.dtype == np.float32
    assert got.grid_thw.dtype == np.int64
    np.testing.assert_array_equal(got.grid_thw, want["image_grid_thw"])
    np.testing.assert_array_equal(got.pixel_values, want["pixel_values"])


@pytest.mark.parametrize("size", SIZES)
def test_patches_equal_those_of_transformers(size: tuple[int, int]) -> None:
    assert_equal(noise(*size), PatchSettings(), transformers_processor())


def test_patches_equal_with_other_settings() -> None:
    edges = {"shortest_edge": 3136, "longest_edge": 20_000}
    changes = {
        "size": edges,
        "patch_size": 14,
        "temporal_patch_size": 3,
        "merge_size": 1,
        "image_mean": [0.48, 0.45, 0.4],
        "image_std": [0.26, 0.27, 0.28],
    }
    settings = PatchSettings(14, 1, 3, 3136, 20_000, (0.48, 0.45, 0.4), (0.26, 0.27, 0.28))
    for size in ((300, 500), (20, 30), (150, 100)):
        assert_equal(noise(*size), settings, transformers_processor(**changes))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "P", "1", "CMYK"])
def test_decoded_files_of_other_modes_give_what_transformers_make_of_them(mode: str, tmp_path: Path) -> None:
    from trimkv_edge.runtime.picture import read_picture

    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    source = noise(70, 90, 4)
    (source if mode in ("RGBA", "LA") else source.convert("RGB")).convert(mode).save(path)
    with Image.open(path) as image:
        want = transformers_processor()(images=[image], return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(cut(read_picture(path).image, PatchSettings()).pixel_values, want)


def test_sizes_equal_those_of_transformers() -> None:
    settings = PatchSettings(min_pixels=4096, max_pixels=100_000)
    sides = [1, 2, 15, 16, 17, 31, 32, 48, 80, 199, 200, 333, 1024, 5000]
    for height in sides:
        for width in sides:
            if max(height, width) <= 200 * min(height, width):
                assert smart_size(height, width, settings) == smart_resize(height, width, 32, 4096, 100_000)


def test_narrow_pictures_and_other_modes_are_refused() -> None:
    smart_size(200, 1, PatchSettings())
    with pytest.raises(PictureError, match="200 times"):
        smart_size(201, 1, PatchSettings())
    with pytest.raises(PictureError, match="200 times"):
        cut(noise(1, 201), PatchSettings(), [(2, 2)])
    with pytest.raises(PictureError, match="empty"):
        smart_size(0, 5, PatchSettings())
    for mode in ("L", "RGBA", "CMYK", "I;16"):
        with pytest.raises(PictureError, match="3 channels"):
            cut(Image.new(mode, (64, 64)), PatchSettings())


def test_the_hubs_file_gives_the_defaults(tmp_path: Path) -> None:
    assert PatchSettings.load(write(tmp_path)) == PatchSettings()
    assert PatchSettings.load(tmp_path) == PatchSettings()


def test_what_transformers_saves_is_read(tmp_path: Path) -> None:
    transformers_processor(patch_size=14).save_pretrained(tmp_path)
    assert PatchSettings.load(tmp_path) == PatchSettings(patch_size=14)


def test_older_names_of_sizes_win_as_in_transformers(tmp_path: Path) -> None:
    path = write(tmp_path, min_pixels=5000)
    processor = Qwen2VLImageProcessorPil(size=dict(HUB["size"]), min_pixels=5000)  # type: ignore[call-overload]
    assert PatchSettings.load(path).min_pixels == processor.size["shortest_edge"] == 5000
    assert PatchSettings.load(path).max_pixels == processor.size["longest_edge"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"patch_size": 0}, "patch_size is 0"),
        ({"patch_size": "absent"}, "no patch_size"),
        ({"patch_size": True}, "patch_size is True"),
        ({"merge_size": 2.0}, "merge_size is 2.0"),
        ({"size": {"longest_edge": 100}}, "no shortest_edge"),
        ({"size": {"longest_edge": 65535, "shortest_edge": 65536}}, "above max_pixels"),
        ({"size": {"longest_edge": 1023, "shortest_edge": 1}}, "raise it"),
        ({"size": 7}, "cannot be used"),
        ({"image_mean": [0.5, 0.5]}, "three numbers"),
        ({"image_mean": [0.5, 0.5, float("nan")]}, "three numbers"),
        ({"image_std": [0.5, 0.0, 0.5]}, "above 0"),
        ({"do_normalize": False}, "do_normalize is False"),
        ({"resample": 2}, "resample is 2"),
        ({"rescale_factor": 1.0}, "rescale_factor is 1.0"),
        ({"image_processor_type": "CLIPImageProcessor"}, "CLIPImageProcessor"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        PatchSettings.load(write(tmp_path, **changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "\xff"])
def test_damaged_settings_are_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "preprocessor_config.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match="cannot be used"):
        PatchSettings.load(path)
    with pytest.raises(ConfigError, match="cannot be used"):
        PatchSettings.load(tmp_path / "missing.json")


SQUARE, WIDE, TALL = (16, 16), (12, 20), (20, 12)


@pytest.mark.parametrize(
    ("height", "width", "buckets", "chosen"),
    [
        (100, 100, [WIDE, SQUARE, TALL], SQUARE),
        (600, 1000, [WIDE, SQUARE, TALL], WIDE),
        (1000, 600, [WIDE, SQUARE, TALL], TALL),
        (100, 120, [WIDE, SQUARE, TALL], SQUARE),  # stretched by 1.20, or by 1.39
        (100, 130, [WIDE, SQUARE, TALL], WIDE),  # by 1.30, or by 1.28
        (1, 200, [WIDE, SQUARE, TALL], WIDE),
        (100, 100, [WIDE, TALL], WIDE),  # both by 1.67: the first
        (100, 100, [TALL, WIDE], TALL),
        (200, 200, [(32, 32), (16, 16), (64, 64)], (16, 16)),  # 256 pixels a side hold it
        (257, 257, [(64, 64), (16, 16), (32, 32)], (32, 32)),
        (3000, 3000, [(16, 16), (64, 64), (32, 32)], (64, 64)),  # none holds it: the largest
        (10, 10, [(2, 200)], (2, 200)),
    ],
)
def test_the_bucket_keeps_the_aspect_ratio_best(
    height: int, width: int, buckets: list[tuple[int, int]], chosen: tuple[int, int]
) -> None:
    assert choose_bucket(height, width, buckets, PatchSettings()) == chosen


def test_a_picture_is_resized_to_its_bucket() -> None:
    image = noise(100, 150)
    got = cut(image, PatchSettings(), [(8, 8), (8, 12)])
    assert got.grid_thw.tolist() == [[1, 8, 12]]
    assert got.pixel_values.shape == (96, 1536)
    # A size that transformers do not change again, so only patches are cut there.
    resized = image.resize((192, 128), Image.Resampling.BICUBIC)
    want = transformers_processor(size={"shortest_edge": 1024, "longest_edge": 10**6})(images=[resized])
    np.testing.assert_array_equal(got.pixel_values, want["pixel_values"])


@pytest.mark.parametrize(
    ("buckets", "said"), [([], "no picture size"), ([(2, 3)], "multiples of 2"), ([(0, 2)], "0 x")]
)
def test_buckets_are_checked(buckets: list[tuple[int, int]], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        choose_bucket(10, 10, buckets, PatchSettings())
