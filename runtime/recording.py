"""Reads a stream and notes after each eviction event what every head still holds."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import NamedTuple, TypeVar

import numpy as np

from trimkv_edge.errors import ConfigError
from trimkv_edge.manifest import VisionInfo
from trimkv_edge.runtime.lifetimes import LEFT_NEVER, Lifetimes
from trimkv_edge.runtime.sampling import Sampler, SamplingParams
from trimkv_edge.runtime.seen_pictures import SeenPicture, noting
from trimkv_edge.runtime.session import Progress, Session
from trimkv_edge.runtime.statistics import rss_bytes
from trimkv_edge.runtime.vision_text import Reading

_GREEDY = SamplingParams()
_T = TypeVar("_T")


class Chunk(NamedTuple):
    """One call of the engine.

    ``seen``: stream length after it; ``seconds`` it took, with its event and the pictures encoded before it; ``rss``:
    resident bytes of the process and ``entries``: live entries of all layers and heads, both after it.
    """

    seen: int
    seconds: float
    rss: int
    entries: int


@dataclass(frozen=True)
class Recording:
    """A stream that was read with its lifetimes.

    Attributes:
        tokens: ids of the tokens that the engine read.
        prompt_tokens: how many of them were given; the others were generated.
        chunks: what each call of the engine took, in order.
        pictures: those that were read, in the order of the stream.
    """

    lifetimes: Lifetimes
    tokens: list[int]
    prompt_tokens: int
    chunks: list[Chunk]
    pictures: tuple[SeenPicture, ...] = ()


def record(
    session: Session,
    prompt: Sequence[int] | Reading,
    max_new_tokens: int = 0,
    *,
    sampling: SamplingParams | Sampler = _GREEDY,
    stop_ids: Collection[int] = (),
    stop_strings: Sequence[str] = (),
    heads: Sequence[int] | None = None,
    vision: VisionInfo | None = None,
    progress: Progress | None = None,
) -> Recording:
    """Reads ``prompt`` and generates; tokens and survivors are those of ``session.feed`` and ``session.generate``. See
    there for the other arguments and errors.

    Args:
        session: one that has read nothing yet.
        prompt: token ids, at least one, or a reading with pictures.
        heads: which KV heads of each layer to note; None: all. Each takes four bytes per layer and token.
        vision: of the manifest, for pictures.
        progress: called after each call of the engine with (tokens read, most tokens).

    Raises:
        ConfigError: the session has read something, ``heads`` are not distinct heads of the model, or pictures without
            ``vision``.
    """
    most = session.engine.num_kv_heads
    if session.engine.seen:
        raise ConfigError(f"the session has read {session.engine.seen} tokens already: record with a new one")
    noted = tuple(range(most)) if heads is None else tuple(heads)
    if not noted or len(set(noted)) < len(noted) or min(noted) < 0 or max(noted) >= most:
        raise ConfigError(f"heads are {list(noted)}, but must be distinct and from 0 to {most - 1}")
    reading, pictures = prompt if isinstance(prompt, Reading) else Reading(list(prompt)), list[SeenPicture]()
    tokens, given = list(reading.tokens), len(reading.tokens)
    if not given or given > session.engine.position_limit:
        session.feed(tokens)  # refuses it and says why
    if reading.shown:
        if vision is None:
            raise ConfigError("pictures are recorded with the manifest's vision settings: give vision")
        reading, pictures = noting(reading, vision)
    recorder = _Recorder(session, noted, given + max_new_tokens, progress)
    for _ in recorder.watch(reading.feeding(session)):
        pass
    if max_new_tokens:
        # A token is read when the next one is chosen, hence one more than asked for.
        pieces = session.generate(max_new_tokens + 1, sampling, stop_ids, stop_strings)
        tokens += [piece.token for piece in recorder.watch(pieces)]
    return Recording(recorder.lifetimes(), tokens[: session.engine.seen], given, recorder.chunks, tuple(pictures))


class _Recorder:
    """Notes the last event that each token outlived. Nothing returns once it left, so that says when it left."""

    def __init__(self, session: Session, heads: tuple[int, ...], total: int, progress: Progress | None) -> None:
        self.chunks: list[Chunk] = []
        self._session = session
        self._heads = heads
        self._total, self._progress = total, progress
        self._events: list[int] = []
        # One column more: positions of -1, behind a head's last, fall on it.
        self._outlived = np.full((session.engine.num_layers, len(heads), total + 1), -1, np.int32)

    def watch(self, steps: Iterator[_T]) -> Iterator[_T]:
        """Gives what ``steps`` gives, each of which calls the engine once or not at all."""
        engine = self._session.engine
        while True:
            seen, room = engine.seen, engine.room
            started = perf_counter()
            try:
                step = next(steps)
            except StopIteration:
                return
            seconds = perf_counter() - started
            if engine.seen > seen:
                if engine.seen - seen == room:
                    self._note_event()
                self.chunks.append(Chunk(engine.seen, seconds, rss_bytes(), engine.entries))
                if self._progress:
                    self._progress(engine.seen, self._total)
            yield step

    def _note_event(self) -> None:
        held = self._session.engine.survivors()[:, list(self._heads)]
        np.put_along_axis(self._outlived, held, np.int32(len(self._events)), axis=-1)
        self._events.append(self._session.engine.seen)

    def lifetimes(self) -> Lifetimes:
        events = np.array(self._events, np.int64)
        position = np.arange(self._session.engine.seen)
        first = np.searchsorted(events, position, side="right")
        leaves = np.maximum(self._outlived[..., : position.size] + 1, first)
        return Lifetimes(np.append(events, LEFT_NEVER).astype(np.int32)[leaves], events, self._heads)
