"""Texts with pictures: where placeholders stand, and that the engine reads there what it should."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from factories import IMAGE_TOKEN, gated_vision_model
from vision_text_artefact import CONFIG, IMAGE_PLACE, VIDEO_PLACE, noise, png, vision_text_artefact

from trimkv_edge.engine import FloatArray, IntArray
from trimkv_edge.errors import ConfigError, PositionLimitError
from trimkv_edge.mixed_engine import MixedEngine
from trimkv_edge.models.vision_engine import EagerVisionEngine
from trimkv_edge.pictures import ChunkRows
from trimkv_edge.runtime.artefact import Artefact
from trimkv_edge.runtime.picture_patches import PatchSettings, cut
from trimkv_edge.runtime.sampling import SamplingParams
from trimkv_edge.runtime.session import Session
from trimkv_edge.runtime.vision import PictureReader, Shown
from trimkv_edge.runtime.vision_text import PictureText, finish_picture

START, END, VIDEO_TOKEN = 318, 319, 317


@pytest.fixture(scope="module")
def artefact() -> Artefact:
    return Artefact.load(vision_text_artefact())


@pytest.fixture
def reader(artefact: Artefact) -> PictureReader:
    return PictureReader.of(artefact)


@pytest.fixture
def texts(artefact: Artefact) -> PictureText:
    assert artefact.tokenizer is not None
    return PictureText(artefact.tokenizer, artefact.manifest.vision)


def ids(artefact: Artefact, text: str) -> list[int]:
    assert artefact.tokenizer is not None
    return artefact.tokenizer.encode(text, add_special_tokens=False)


def video_of(folder: Path, reader: PictureReader, count: int) -> Shown:
    for number in range(count):
        noise(number).save(folder / f"{number}.png")
    return reader.video(folder)


def test_places_become_rows(artefact: Artefact, reader: PictureReader, texts: PictureText, tmp_path: Path) -> None:
    small, video = reader.image(png(noise(1, 16, 16))), video_of(tmp_path, reader, 5)
    reading = texts.encode(f"the cat{IMAGE_PLACE} sat{VIDEO_PLACE} on {IMAGE_PLACE}the mat", [video, small, small])
    image = [START, *[IMAGE_TOKEN] * 4, END]
    group = [START, *[VIDEO_TOKEN] * 6, END]
    want = [*ids(artefact, "the cat"), *image]
    starts = [len(want) - 5]
    for before in (" sat<0.2 seconds>", "<1.2 seconds>", "<2.0 seconds>"):
        want += [*ids(artefact, before), *group]
        starts.append(len(want) - 7)
    want += [*ids(artefact, " on "), *image, *ids(artefact, "the mat")]
    starts.append(len(want) - len(ids(artefact, "the mat")) - 5)
    assert (reading.tokens, list(reading.starts)) == (want, starts)
    assert reading.shown == (small, video, small)
    assert texts.before([small, video], "the") == IMAGE_PLACE + VIDEO_PLACE + "the"


def test_what_is_read_is_what_the_engine_reads_by_hand(
    artefact: Artefact, reader: PictureReader, texts: PictureText
) -> None:
    shown = [reader.image(png(noise(1))), reader.image(png(noise(2, 16, 24)))]
    reading = texts.encode(f"{'the cat ' * 9}{IMAGE_PLACE} sat{IMAGE_PLACE} on the mat", shown)
    session, engine = Session.open(artefact), Session.open(artefact).engine
    assert isinstance(engine, MixedEngine)
    steps = list(reading.feeding(session))
    settings = PatchSettings(patch_size=4)
    for picture, size in ((noise(1), (4, 6)), (noise(2, 16, 24), (6, 4))):
        made = cut(picture, settings, [size])
        engine.show(engine.encode("image", made.pixel_values, made.grid_thw))
    logits = None
    for token in reading.tokens:
        logits = engine.prefill([token])
        if not engine.room:
            engine.evict()
    np.testing.assert_allclose(session.logits, logits, atol=2e-4)
    np.testing.assert_array_equal(session.engine.survivors(), engine.survivors())
    assert session.engine.cursor == engine.cursor
    assert steps[0] == (0, len(reading.tokens))
    assert steps[-1] == (len(reading.tokens), len(reading.tokens))
    statistics = session.statistics()
    assert statistics.prompt_tokens == len(reading.tokens)
    assert statistics.events > 0


def test_one_frame_group_waits_at_a_time(
    artefact: Artefact, reader: PictureReader, texts: PictureText, tmp_path: Path
) -> None:
    video = video_of(tmp_path, reader, 24)
    session = Session.open(artefact)
    assert isinstance(session.engine, MixedEngine)
    reading = texts.encode(texts.before([video], "the cat"), [video])
    waiting = [len(session.engine.waiting) for _ in reading.feeding(session)]
    assert max(waiting) == 1
    assert (len(reading.starts), session.engine.waiting) == (12, [])


@pytest.mark.parametrize(
    ("text", "images", "told"),
    [
        (f"a{IMAGE_PLACE}b", 2, r"the text has 1 places for images \(<\|image_pad\|>\), but 2 were given: leave some"),
        (f"{IMAGE_PLACE}b<|image_pad|>", 1, r"2 places for images \(<\|image_pad\|>\), but 1 were given: give one"),
        ("a", 1, "0 places for images"),
        ("a<|image_pad|>", 0, "1 places for images"),
        (f"a{VIDEO_PLACE}", 0, "1 places for videos"),
        (f"a{VIDEO_PLACE}", 1, "0 places for images"),
    ],
)
def test_places_and_pictures_must_agree(
    reader: PictureReader, texts: PictureText, text: str, images: int, told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        texts.encode(text, [reader.image(png(noise(1)))] * images)


def test_videos_need_their_places_too(reader: PictureReader, texts: PictureText, tmp_path: Path) -> None:
    video = video_of(tmp_path, reader, 4)
    for text in ("a", f"{VIDEO_PLACE}{VIDEO_PLACE}", f"{VIDEO_PLACE} <|video_pad|>", "<|video_pad|>"):
        with pytest.raises(ConfigError, match="places for videos"):
            texts.encode(text, [video])


def test_words_of_people_make_no_places(texts: PictureText) -> None:
    for pad in ("<|image_pad|>", "<|video_pad|>"):
        with pytest.raises(ConfigError, match=r"the text contains .*which stands for a row of a"):
            texts.check_plain(f"what is {pad}?")
    texts.check_plain("what is <|im_end|> <image_pad>?")


def test_text_models_take_text_only(artefact: Artefact, reader: PictureReader) -> None:
    assert artefact.tokenizer is not None
    texts = PictureText(artefact.tokenizer)
    assert texts.encode("a<|image_pad|>").tokens == [*ids(artefact, "a"), IMAGE_TOKEN]  # a token like others
    texts.check_plain("<|image_pad|>")
    image = reader.image(png(noise(1)))
    with pytest.raises(ConfigError, match="a text model reads no"):
        texts.before([image], "a")
    with pytest.raises(ConfigError, match="a text model reads none"):
        texts.encode("a", [image])
    reading = PictureText(artefact.tokenizer, artefact.manifest.vision).encode(IMAGE_PLACE, [image])
    from numpy_engine import NumpyEngine

    with pytest.raises(ConfigError, match="reads text only"):
        reading.feeding(Session(NumpyEngine(CONFIG)))


def test_a_reading_that_breaks_off_leaves_no_picture_behind(
    artefact: Artefact, reader: PictureReader, texts: PictureText
) -> None:
    one, other = reader.image(png(noise(1))), reader.image(png(noise(2)))
    session = Session.open(artefact, checkpoints=2)
    engine = session.engine
    assert isinstance(engine, MixedEngine)
    # Shown and then not begun, as after Ctrl-C between the two.
    made = next(one.patches())
    engine.show(engine.encode("image", made.pixel_values, made.grid_thw))
    reading = texts.encode(IMAGE_PLACE + "the", [other])
    list(reading.feeding(session))
    fresh = Session.open(artefact)
    list(reading.feeding(fresh))
    np.testing.assert_array_equal(session.logits, fresh.logits)

    # In the middle of its rows, which an event divides here: nothing else could be read there.
    session.feed([5] * (engine.room - 3))
    steps = texts.encode(IMAGE_PLACE + "the", [other]).feeding(session)
    while not engine.cursor.row:
        next(steps)
    del steps
    assert engine.cursor.row == 2
    before = engine.seen
    finish_picture(session)
    assert (engine.seen - before, engine.cursor.row, engine.waiting) == (4, 0, [])
    finish_picture(session)
    session.feed(ids(artefact, "the"))
    assert engine.seen - before == 5


class Wanting(EagerVisionEngine):
    """Wants nothing so much as pictures."""

    def _forward_rows(self, given: IntArray, rows: ChunkRows, live: int) -> FloatArray:
        logits = super()._forward_rows(given, rows, live)
        logits[[IMAGE_TOKEN, VIDEO_TOKEN]] = 1e6
        return logits


@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(temperature=1.0, seed=1)])
def test_placeholders_are_never_drawn(sampling: SamplingParams) -> None:
    session = Session(Wanting(gated_vision_model(), CONFIG))
    session.feed([3, 4, 5])
    tokens = [piece.token for piece in session.generate(20, sampling)]
    assert len(tokens) == 20
    assert not {IMAGE_TOKEN, VIDEO_TOKEN} & set(tokens)


def test_what_does_not_fit_is_refused_before_a_picture_is_encoded(
    artefact: Artefact, reader: PictureReader, texts: PictureText
) -> None:
    session = Session.open(artefact)
    session.engine.position_limit = 7
    reading = texts.encode(IMAGE_PLACE, [reader.image(png(noise(1)))])
    with pytest.raises(PositionLimitError):
        list(reading.feeding(session))
    assert (session.engine.seen, session.engine.waiting) == (0, [])  # type: ignore[attr-defined]
