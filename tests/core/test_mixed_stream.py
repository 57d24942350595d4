"""M-RoPE positions chunk by chunk are transformers' of the whole stream; what fits no picture is refused."""

from __future__ import annotations

import numpy as np
import pytest
from factories import IMAGE_TOKEN, VIDEO_TOKEN, vision_base
from vision_streams import Mixed

from trimkv_edge.engine import Cursor
from trimkv_edge.errors import ModelError, StateError
from trimkv_edge.mixed_stream import place
from trimkv_edge.pictures import Picture

KINDS = {IMAGE_TOKEN: "image", VIDEO_TOKEN: "video"}


def picture(kind: str, height: int, width: int) -> Picture:
    rows = np.arange(height * width, dtype=np.float32)[:, None]
    return Picture(kind, height, width, rows, np.stack([rows + 100, rows + 200]))


def shown(stream: Mixed) -> list[Picture]:
    found = []
    for kind, number in stream.order:
        frames, down, across = (stream.image_grids if kind == "image" else stream.video_grids)[number]
        found += [picture(kind, down // 2, across // 2) for _ in range(frames)]
    return found


def random_stream(seed: int) -> Mixed:
    rng, stream = np.random.default_rng(seed), Mixed(seed)
    for _ in range(6):
        stream.text(int(rng.integers(0, 6)))
        down, across = (2 * rng.integers(1, 6, 2)).tolist()
        if rng.random() < 0.5:
            stream.image(down, across)
        else:
            stream.video(int(rng.integers(1, 4)), down, across)
    return stream.text(3)


@pytest.mark.parametrize("seed", range(8))
def test_positions_equal_transformers_for_any_cut(seed: int) -> None:
    stream = random_stream(seed)
    given = {name: value for name, value in stream.inputs().items() if not name.startswith("pixel")}
    want, delta = vision_base().model.get_rope_index(**given)
    rng, cursor, waiting, done = np.random.default_rng(seed), Cursor(), shown(stream), 0
    found, rows = [], []
    while done < len(stream.tokens):
        size = int(rng.integers(1, 12))
        placed = place(np.array(stream.tokens[done : done + size]), cursor, waiting, KINDS)
        cursor, waiting, done = placed.cursor, waiting[placed.finished :], done + size
        found.append(placed.rows.positions)
        embeddings = placed.rows.embeddings.flatten().tolist()
        assert placed.rows.deepstack.flatten().tolist() == [n + m for m in (100, 200) for n in embeddings]
        rows += embeddings
    np.testing.assert_array_equal(np.concatenate(found, 1), want[:, 0].numpy())
    assert cursor.position == len(stream.tokens) + int(delta)
    assert rows == [n for each in shown(stream) for n in range(each.rows)]
    assert not waiting


def test_the_text_goes_on_behind_the_longer_side() -> None:
    """By hand: two tokens, an image of 2 x 3 rows, two tokens."""
    placed = place(np.array([5, 6, *[IMAGE_TOKEN] * 6, 7, 8]), Cursor(), [picture("image", 2, 3)], KINDS)
    assert placed.rows.positions.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],
    ]
    assert (placed.cursor, placed.finished) == (Cursor(7), 1)
    cut = place(np.array([5, 6, *[IMAGE_TOKEN] * 4]), Cursor(), [picture("image", 2, 3)], KINDS)
    assert (cut.cursor, cut.finished) == (Cursor(2, row=4), 0)


@pytest.mark.parametrize(
    ("tokens", "pictures", "message"),
    [
        ([5, IMAGE_TOKEN], [], "a placeholder for an image, but none waits"),
        ([VIDEO_TOKEN], [picture("image", 1, 1)], "a placeholder for a video, but an image comes next"),
        ([IMAGE_TOKEN, 5], [picture("image", 1, 2)], "has 2 rows, but its placeholders end after 1"),
        ([IMAGE_TOKEN, VIDEO_TOKEN], [picture("image", 1, 2)], "has 2 rows, but its placeholders end after 1"),
        (
            [IMAGE_TOKEN] * 2,
            [picture("image", 1, 1)],
            "more image placeholders in a row than the image before has",
        ),
        ([IMAGE_TOKEN] * 2, [picture("image", 1, 1)] * 2, "a token between two images"),
        ([IMAGE_TOKEN, 5, IMAGE_TOKEN], [picture("image", 1, 1)], "none waits"),
    ],
)
def test_placeholders_that_fit_no_picture_are_refused(tokens: list[int], pictures: list[Picture], message: str) -> None:
    with pytest.raises(StateError, match=message) as whole:
        place(np.array(tokens), Cursor(), pictures, KINDS)
    with pytest.raises(StateError) as cut:
        place_singly(tokens, pictures)
    assert str(cut.value) == str(whole.value)


def place_singly(tokens: list[int], waiting: list[Picture]) -> None:
    cursor = Cursor()
    for token in tokens:
        placed = place(np.array([token]), cursor, waiting, KINDS)
        cursor, waiting = placed.cursor, waiting[placed.finished :]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(kind="audio"), "kind 'audio'"),
        (dict(height=0), "0 x 3 rows"),
        (dict(width=2), "needs 4 rows"),
        (dict(deepstack=np.zeros((2, 5, 1))), r"DeepStack features \(2, 5, 1\)"),
    ],
)
def test_a_picture_checks_itself(change: dict, message: str) -> None:
    fields = dict(kind="image", height=2, width=3, embeddings=np.zeros((6, 1)), deepstack=np.zeros((2, 6, 1)))
    with pytest.raises(ModelError, match=message):
        Picture(**{**fields, **change})
