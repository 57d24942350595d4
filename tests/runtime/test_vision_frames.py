"""Which frames of a video are shown, and when; what is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from vision_text_artefact import noise, png

from trimkv_edge.errors import ConfigError
from trimkv_edge.runtime import vision_frames
from trimkv_edge.runtime.picture import PictureLimits, read_picture
from trimkv_edge.runtime.picture_header import PictureError
from trimkv_edge.runtime.vision_frames import Video, open_video, spread


def animation(path: Path, count: int, duration: int | list[int], **settings: object) -> Path:
    noise(0).save(path, save_all=True, append_images=[noise(n) for n in range(1, count)], duration=duration, **settings)
    return path


def numbers(video: Video) -> list[int]:
    """Which frames of :func:`noise` a video shows."""
    known = [np.asarray(noise(n)) for n in range(40)]
    return [
        next(n for n, pixels in enumerate(known) if np.array_equal(pixels, np.asarray(frame)))
        for frame in video.frames()
    ]


@pytest.mark.parametrize("suffix", [".png", ".webp"])
@pytest.mark.parametrize(
    ("count", "duration", "fps", "most", "want", "seconds"),
    [
        # 20 frames in 2 s: as transformers, 2 x 2 = 4 evenly spread ones of 0 to 19.
        (20, 100, 2.0, 768, [0, 6, 13, 19], [0, 0.6, 1.3, 1.9]),
        (20, 100, 3.0, 768, [0, 4, 8, 11, 15, 19], [0, 0.4, 0.8, 1.1, 1.5, 1.9]),
        (20, 100, 10.0, 3, [0, 10, 19], [0, 1.0, 1.9]),
        # At least 4, and never more than there are.
        (20, 10, 2.0, 768, [0, 6, 13, 19], [0, 0.06, 0.13, 0.19]),
        (3, 1000, 2.0, 768, [0, 1, 2], [0, 1, 2]),
        # Moments 0, 1.13, 2.27 and 3.4 s: the second is nearer to the long frame's beginning, which is there already.
        (4, [3000, 200, 200, 200], 1.0, 768, [0, 1, 3], [0, 3.0, 3.4]),
    ],
)
def test_an_animation_is_sampled_by_its_own_times(
    tmp_path: Path,
    suffix: str,
    count: int,
    duration: int | list[int],
    fps: float,
    most: int,
    want: list[int],
    seconds: list[float],
) -> None:
    settings = {"lossless": True} if suffix == ".webp" else {}
    video = open_video(animation(tmp_path / f"a{suffix}", count, duration, **settings), fps, most)
    assert numbers(video) == want == numbers(video)  # twice
    np.testing.assert_allclose(video.seconds, seconds, atol=1e-9)
    assert (video.width, video.height) == (24, 16)


def test_frames_without_a_time_take_a_tenth_of_a_second(tmp_path: Path) -> None:
    video = open_video(animation(tmp_path / "a.gif", 20, 0))
    np.testing.assert_allclose(video.seconds, [0, 0.6, 1.3, 1.9])


def test_spread_takes_both_ends() -> None:
    assert spread([0.0, 1.0, 2.0, 3.0, 4.0], 3) == [0, 2, 4]
    assert spread([0.0], 1) == [0]


def test_a_folder_shows_all_frames_up_to_the_most(tmp_path: Path) -> None:
    for number in range(7):
        noise(number).save(tmp_path / f"{number}.PNG")
    (tmp_path / "notes.txt").write_text("not a frame")
    assert numbers(open_video(tmp_path)) == [0, 1, 2, 3, 4, 5, 6]
    assert open_video(tmp_path, 4.0).seconds == (0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
    few = open_video(tmp_path, 2.0, 3)
    assert (numbers(few), few.seconds) == ([0, 3, 6], (0, 1.5, 3.0))


def test_other_pictures_may_be_read_between_two_frames(tmp_path: Path) -> None:
    frames = open_video(animation(tmp_path / "a.png", 6, 100)).frames()
    next(frames)
    assert read_picture(png(noise(1))).image.size == (24, 16)
    next(frames)


def still(path: Path) -> Path:
    noise(1).save(path / "still.gif")
    return path / "still.gif"


def container(path: Path) -> Path:
    (path / "film.mp4").write_bytes(b"\0\0\0\x18ftypmp42")
    return path / "film.mp4"


def text(path: Path) -> Path:
    (path / "text.gif").write_text("no animation")
    return path / "text.gif"


def empty(path: Path) -> Path:
    (path / "empty").mkdir()
    return path / "empty"


def two_sizes(path: Path) -> Path:
    noise(1).save(path / "1.png")
    noise(2, 16, 24).save(path / "2.png")
    return path


def broken_frame(path: Path) -> Path:
    noise(1).save(path / "1.png")
    (path / "2.png").write_bytes(png(noise(2))[:200])
    return path


def cut_short(path: Path) -> Path:
    file = animation(path / "a.png", 9, 100)
    file.write_bytes(file.read_bytes()[:-900])
    return file


def many(path: Path) -> Path:
    return animation(path / "many.gif", 12, 100)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (still, r"still\.gif holds one picture and no video"),
        (container, r"film\.mp4 is a video file, which is not read: make a folder .* ffmpeg -i film\.mp4 -vf fps=2 "),
        (text, r"text\.gif is not PNG, JPEG, WebP, GIF or BMP"),
        (empty, "empty holds no frames"),
        (two_sizes, r"2\.png has 16 x 24 pixels, but the frames before have 24 x 16"),
        (broken_frame, r"2\.png is damaged"),
        (cut_short, r"a\.png is damaged"),
        (many, r"many\.gif has 12 frames of 24 x 16 pixels, but at most 10 "),
        (lambda path: path / "nowhere", "nowhere does not exist"),
    ],
)
def test_what_is_no_video_is_refused(
    tmp_path: Path, make: Callable[[Path], Path], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vision_frames, "_MOST_IN_FILE", 10)
    with pytest.raises(PictureError, match=told) as found:
        open_video(make(tmp_path))
    assert "\n" not in str(found.value)


def test_settings_out_of_range(tmp_path: Path) -> None:
    for fps, most, told in ((0.0, 768, "0.0 frames"), (float("nan"), 768, "nan"), (2.0, 1, "at most 1 frames")):
        with pytest.raises(ConfigError, match=told):
            open_video(tmp_path, fps, most)
    file = animation(tmp_path / "a.gif", 9, 100)
    with pytest.raises(PictureError, match="24 x 16 pixels"):
        open_video(file, limits=PictureLimits(side=20))
