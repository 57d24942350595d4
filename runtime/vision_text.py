"""Where a text shows pictures: placeholders in texts and token ids, and what a session reads at them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from trimkv_edge.engine import Engine
from trimkv_edge.errors import ConfigError
from trimkv_edge.manifest import VisionInfo
from trimkv_edge.mixed_engine import MixedEngine
from trimkv_edge.pictures import IMAGE, VIDEO
from trimkv_edge.runtime.picture_patches import PicturePatches
from trimkv_edge.runtime.session import Session
from trimkv_edge.runtime.tokenizer import TextTokenizer
from trimkv_edge.runtime.vision import Shown


@dataclass(frozen=True)
class Reading:
    """Token ids, a placeholder for each row of a picture, and the pictures.

    Attributes:
        tokens: ids.
        starts: where each picture's rows begin; of a video, each frame group's.
        shown: images and videos, in order.
    """

    tokens: list[int]
    starts: tuple[int, ...] = ()
    shown: tuple[Shown, ...] = ()

    def feeding(self, session: Session) -> Iterator[tuple[int, int]]:
        """As :meth:`Session.feeding`. Each picture is encoded when the stream has come to its first row, so that one
        frame group of a video waits at a time.

        Raises:
            ConfigError: also an engine that reads no pictures.
            PictureError: a file that was changed meanwhile.
        """
        return session.feeding(self.tokens, self._before(session.engine))

    def _before(self, engine: Engine) -> Mapping[int, Callable[[], None]]:
        if not self.shown:
            return {}
        if not isinstance(engine, MixedEngine):
            raise ConfigError(f"engine {engine.name} reads text only: use one that reads pictures, or leave them out")
        if not engine.cursor.row:
            engine.waiting.clear()  # of a reading that was broken off
        steps = (partial(_show, engine, one.kind, patches) for one in self.shown for patches in _each(one))
        return dict(zip(self.starts, steps, strict=True))


def _each(shown: Shown) -> Iterator[Iterator[PicturePatches]]:
    """The same iterator for each of its pictures."""
    patches = shown.patches()
    return (patches for _ in range(shown.groups))


def _show(engine: MixedEngine, kind: str, patches: Iterator[PicturePatches]) -> None:
    made = next(patches)
    engine.show(engine.encode(kind, made.pixel_values, made.grid_thw))


def finish_picture(session: Session) -> None:
    """Reads a picture to its end that a reading was broken off in: nothing else can follow there."""
    engine = session.engine
    if isinstance(engine, MixedEngine) and engine.cursor.row:
        picture = engine.waiting[0]
        token = next(token for token, kind in engine.placeholders.items() if kind == picture.kind)
        session.feed([token] * (picture.rows - engine.cursor.row))


class PictureText:
    """Texts -> token ids with pictures.

    Args:
        tokenizer: of the artefact.
        vision: of its manifest; None: a text model, which no picture can be shown to.
    """

    def __init__(self, tokenizer: TextTokenizer, vision: VisionInfo | None = None) -> None:
        self._tokenizer = tokenizer
        self._kinds = {} if vision is None else {vision.image_token_id: IMAGE, vision.video_token_id: VIDEO}
        self._pads = {kind: tokenizer.token(token) for token, kind in self._kinds.items()}
        ends = () if vision is None else (vision.start_token_id, vision.end_token_id)
        self._around = [tokenizer.token(token) for token in ends]

    def check_plain(self, text: str) -> None:
        """Raises :class:`ConfigError` for a text that would make a place for a picture by itself."""
        for kind, pad in self._pads.items():
            if pad and pad in text:
                raise ConfigError(f"the text contains {pad}, which stands for a row of {_a(kind)}: leave it out")

    def has_places(self, text: str) -> bool:
        """Whether the text itself says where pictures are shown."""
        return any(pad and pad in text for pad in self._pads.values())

    def before(self, shown: Sequence[Shown], text: str) -> str:
        """The text behind places for pictures."""
        return "".join(self._place(one.kind) for one in shown) + text

    def encode(
        self, text: str, shown: Sequence[Shown] = (), *, begins: bool = False, drop: int | None = None
    ) -> Reading:
        """Token ids of a text with one place (as in chat templates) for each image and video.

        Args:
            text: a whole one.
            shown: images in the order of their places, and so videos.
            begins: add the tokens that begin a text.
            drop: leave out this token if it comes first.

        Raises:
            ConfigError: more or fewer places than pictures.
        """
        ids = self._tokenizer.encode(self._with_times(text, shown), add_special_tokens=begins)
        if drop is not None and ids[:1] == [drop]:
            del ids[0]
        if not shown and not self._kinds.keys() & set(ids):
            return Reading(ids)
        return self._spread(ids, shown)

    def _place(self, kind: str) -> str:
        if kind not in self._pads:
            raise ConfigError(f"a text model reads no {kind}s: leave them out, or use a model of family qwen3_vl")
        return self._pads[kind].join(self._around)

    def _with_times(self, text: str, shown: Sequence[Shown]) -> str:
        """Each video's place becomes one for each frame group, with its time before."""
        videos = [one for one in shown if one.kind == VIDEO]
        if not videos:
            return text
        place = self._place(VIDEO)
        parts = text.split(place)
        if len(parts) != len(videos) + 1:
            raise self._wrong(VIDEO, len(parts) - 1, len(videos))
        marks = ("".join(f"<{seconds:.1f} seconds>{place}" for seconds in one.seconds) for one in videos)
        return parts[0] + "".join(mark + part for mark, part in zip(marks, parts[1:], strict=True))

    def _spread(self, ids: list[int], shown: Sequence[Shown]) -> Reading:
        """One placeholder for each row instead of one for each picture."""
        for kind in (IMAGE, VIDEO):
            found = sum(self._kinds.get(token) == kind for token in ids)
            given = sum(one.groups for one in shown if one.kind == kind)
            if found != given:
                raise self._wrong(kind, found, given)
        waiting = {
            kind: iter([(one, group) for one in shown if one.kind == kind for group in range(one.groups)])
            for kind in self._pads
        }
        tokens: list[int] = []
        starts: list[int] = []
        order: list[Shown] = []
        for token in ids:
            if token not in self._kinds:
                tokens.append(token)
                continue
            one, group = next(waiting[self._kinds[token]])
            if group == 0:
                order.append(one)
            starts.append(len(tokens))
            tokens += [token] * one.rows
        return Reading(tokens, tuple(starts), tuple(order))

    def _wrong(self, kind: str, places: int, given: int) -> ConfigError:
        pad = self._pads.get(kind, "")
        if not pad:
            return ConfigError(f"{given} {kind}s were given, but a text model reads none: leave them out")
        advice = (
            f"give one for each, or leave {pad} out of the text"
            if places > given
            else "leave some out, or use a chat template that shows them"
        )
        return ConfigError(f"the text has {places} places for {kind}s ({pad}), but {given} were given: {advice}")


def _a(kind: str) -> str:
    return "an image" if kind == IMAGE else f"a {kind}"
