"""A stream of tokens over an engine: reading prompts, generating, evicting when due."""

from __future__ import annotations

import os
import warnings
from array import array
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from time import perf_counter
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from trimkv_edge.engine import CacheState, Engine, FloatArray, IntArray
from trimkv_edge.errors import ConfigError, PositionLimitError, SessionError, StateError
from trimkv_edge.kv_scales import KVScales
from trimkv_edge.mixed_engine import MixedEngine
from trimkv_edge.runtime.artefact import Artefact
from trimkv_edge.runtime.constraint import Constraint
from trimkv_edge.runtime.engines import load_engine
from trimkv_edge.runtime.interrupts import Uninterrupted
from trimkv_edge.runtime.place import Checkpoints, Place
from trimkv_edge.runtime.sampling import Sampler, SamplingParams
from trimkv_edge.runtime.session_file import Origin, Record, SessionFile, artefact_scales, check_fits, read_session
from trimkv_edge.runtime.statistics import SessionStatistics, float32_cache, peak_rss_bytes, per_second, rss_bytes
from trimkv_edge.runtime.streaming import TextDecoder, TextStream

Progress = Callable[[int, int], None]
_CHECKPOINTS = 8
_CONTEXT = 8  # newest tokens that the detokeniser sees of what came before
_GREEDY = SamplingParams()
_SHORT_FACTORS = "it was exported with the short LongRoPE factors; export again with --rope long for longer streams, "


class Piece(NamedTuple):
    """A generated token and the text that became final with it; empty while a character or a stop string is open."""

    token: int
    text: str


class Session:
    """One stream. It attends first and evicts after: an event runs right after the step that fills the ring.

    Every token that was fed or generated belongs to the stream. The newest generated one is *pending*: the engine reads
    it only when the stream goes on, with the next ``feed`` or ``generate``. So a generation may end, or be abandoned,
    at any token, and costs no step more than it needs.

    Args:
        engine: read and written by this session only.
        tokenizer: for text; without one, pieces have no text.
        trained_positions: stream length the model was trained for; passing it warns once per stream.
        limit_hint: what sets the engine's position limit and how to lift it, for the message of the error.
        cache_size: bytes of the cache for the statistics; default: computed for float32.
        origin: what the cache depends on; without one, the session is neither saved nor loaded.
        scales: of an int8 cache, so that saved files are as small.
        checkpoints: most places that :meth:`checkpoint` keeps; 0 keeps none.
        note_tokens: keep the tokens of the stream, 4 bytes each, for :attr:`tokens` and saved files.
        warn: called with the text of a warning; default: ``warnings.warn``.

    Raises:
        ConfigError: checkpoints below 0.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: TextDecoder | None = None,
        *,
        trained_positions: int | None = None,
        limit_hint: str = "",
        cache_size: int | None = None,
        origin: Origin | None = None,
        scales: KVScales | None = None,
        checkpoints: int = _CHECKPOINTS,
        note_tokens: bool = False,
        warn: Callable[[str], None] = warnings.warn,
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self._trained_positions = trained_positions
        self._limit_hint = limit_hint
        # They stand for rows that no picture has.
        self._never = tuple(engine.placeholders) if isinstance(engine, MixedEngine) else ()
        self._cache_bytes = float32_cache(engine) if cache_size is None else cache_size
        self._origin, self._scales = origin, scales
        self._checkpoints = Checkpoints(checkpoints)
        self._note_tokens = note_tokens
        self._warn = warn
        self._clear()

    @classmethod
    def open(
        cls,
        artefact: Artefact,
        engine: str | None = None,
        threads: int | None = None,
        *,
        profile: bool = False,
        checkpoints: int = _CHECKPOINTS,
        note_tokens: bool = False,
        warn: Callable[[str], None] = warnings.warn,
    ) -> Session:
        """A session on an engine of ``artefact``; see :func:`~trimkv_edge.runtime.engines.load_engine`."""
        loaded = load_engine(artefact, engine, threads, profile=profile)
        return cls.over(loaded, artefact, checkpoints=checkpoints, note_tokens=note_tokens, warn=warn)

    @classmethod
    def over(
        cls,
        engine: Engine,
        artefact: Artefact,
        *,
        checkpoints: int = _CHECKPOINTS,
        note_tokens: bool = False,
        warn: Callable[[str], None] = warnings.warn,
    ) -> Session:
        """A session on ``engine``, which was loaded from ``artefact``."""
        manifest = artefact.manifest
        return cls(
            engine,
            artefact.tokenizer,
            trained_positions=manifest.model.max_position_embeddings,
            limit_hint=_SHORT_FACTORS if manifest.rope.variant == "short" else "",
            cache_size=manifest.bytes.cache,
            origin=Origin.of(manifest),
            scales=artefact_scales(artefact),
            checkpoints=checkpoints,
            note_tokens=note_tokens,
            warn=warn,
        )

    def _clear(self) -> None:
        self._logits: FloatArray | None = None
        self._pending: int | None = None
        self._seen_tokens = np.zeros(self.engine.vocab_size, np.bool_)
        self._newest: deque[int] = deque(maxlen=_CONTEXT)
        self._sampler: Sampler | None = None
        self._tokens = array("i") if self._note_tokens else None
        self._checkpoints.clear()
        self._clear_statistics()

    def _clear_statistics(self) -> None:
        self._warned = False
        self._prompt_tokens = self._new_tokens = self._prefilled = self._decoded = self._events = 0
        self._prefill_s = self._decode_s = self._event_s = 0.0
        self._waited_s: float | None = None
        self._ttft_s: float | None = None

    def reset(self) -> None:
        """Starts a new stream with an empty cache; statistics start again too."""
        self.engine.reset()
        self._clear()

    @property
    def pending(self) -> int | None:
        """The newest generated token while the engine has not read it."""
        return self._pending

    @property
    def logits(self) -> FloatArray | None:
        """Logits ``[vocab_size]`` after the last token the engine read; None at the start of a stream."""
        return self._logits

    @property
    def sampler(self) -> Sampler | None:
        """The newest generation's. Given to :meth:`generate` it goes on drawing where it stopped, also after
        :meth:`load` and :meth:`rewind`."""
        return self._sampler

    @property
    def tokens(self) -> IntArray | None:
        """Tokens that the engine has read, int64 ``[seen]``; None without ``note_tokens``."""
        return None if self._tokens is None else np.array(self._tokens, np.int64)

    def checkpoint(self) -> None:
        """Marks this place, a turn's beginning, for :meth:`rewind`.

        That costs some numbers and one bit for each token of the vocabulary. The first event after it copies the cache,
        once for all places marked since the event before (``checkpoint_bytes`` of the statistics counts it).
        """
        self._checkpoints.mark(self._place())

    def rewind(self, turns: int = 1) -> None:
        """Goes back to the place that was marked ``turns`` checkpoints ago and forgets it and those after it.

        What follows is what followed then: the same entries, logits and draws. Statistics count on.

        Raises:
            ConfigError: ``turns`` below 1.
            SessionError: that place is not held any more.
            StateError: the policy needs the attention of the past, which no state holds (eager engines only).
            In all cases nothing changed.
        """
        place, state = self._checkpoints.find(turns, self.engine)
        with Uninterrupted():
            self._go_to(place, state)
            self._checkpoints.drop(turns)
            if self._tokens is not None:
                del self._tokens[place.seen :]

    def save(self, file: str | os.PathLike[str] | SessionFile) -> None:
        """Writes the session to a file, whole or not at all: see :mod:`trimkv_edge.runtime.session_file`.

        Checkpoints and statistics are not part of it.

        Raises:
            ConfigError: nothing was read yet, or the session has no origin.
            SessionError: the file cannot be written, or another process has it.
        """
        if self.engine.seen == 0:
            raise ConfigError("nothing was fed: there is no session to save")
        target = file if isinstance(file, SessionFile) else SessionFile(file)
        record = Record(self._place(), self.engine.state(), self.tokens, self._scales)
        target.write(record, self._known_origin())

    def load(self, path: str | os.PathLike[str]) -> None:
        """Goes on from a file that a session of the same artefact wrote, in whatever engine. Statistics and checkpoints
        start again.

        Raises:
            ConfigError: the session has no origin.
            SessionError: the file is missing, damaged, or of another artefact or version, or lacks the tokens that
                this session has to note. Nothing changed.
        """
        record = read_session(path, self._known_origin())
        self._check(record, path)
        try:
            with Uninterrupted():
                self._go_to(record.place, record.state)
                self._checkpoints.clear()
                self._clear_statistics()
                if record.tokens is not None:
                    self._note_tokens, self._tokens = True, array("i", record.tokens.astype(np.intc).tobytes())
        except StateError as error:
            raise SessionError(f"session file {path} does not fit this cache: {error}") from error

    def _check(self, record: Record, path: str | os.PathLike[str]) -> None:
        check_fits(path, record, self.engine.vocab_size, self.engine.position_limit)
        if self._note_tokens and record.tokens is None:
            raise SessionError(
                f"session file {path} has no note of the tokens read so far: open this session without note_tokens"
            )

    def _known_origin(self) -> Origin:
        if self._origin is None:
            raise ConfigError("the session does not say what its cache depends on: give it an origin (Origin.of)")
        return self._origin

    def _place(self) -> Place:
        return Place(
            self.engine.seen,
            self._pending,
            tuple(self._newest),
            self._logits,
            np.packbits(self._seen_tokens),
            None if self._sampler is None else self._sampler.state,
            self.engine.cursor,
        )

    def _go_to(self, place: Place, state: CacheState) -> None:
        if place.seen:
            self.engine.load_state(state)
        else:
            self.engine.reset()
        self._pending, self._logits = place.pending, place.logits
        self._newest = deque(place.newest, _CONTEXT)
        self._seen_tokens = np.unpackbits(place.seen_tokens, count=self.engine.vocab_size).astype(np.bool_)
        self._sampler = None if place.sampler is None else Sampler.resume(place.sampler)
        self._waited_s = None

    def feed(self, tokens: npt.ArrayLike, progress: Progress | None = None) -> None:
        """Reads tokens (after a pending one) in chunks of at most ``prefill_chunk`` that end where the ring is full.

        Args:
            tokens: token ids, at least one. How a text is spread over calls does not change the result.
            progress: called after each chunk with (tokens read, tokens in all); with 0 first.

        Raises:
            ConfigError: no tokens, or ids that are not whole numbers below the vocabulary size.
            PositionLimitError: they would pass the engine's last position.
            In both cases nothing was read.
        """
        for done, total in self.feeding(tokens):
            if progress:
                progress(done, total)

    def feeding(
        self, tokens: npt.ArrayLike, before: Mapping[int, Callable[[], None]] | None = None
    ) -> Iterator[tuple[int, int]]:
        """:meth:`feed` step by step: reads a chunk whenever the next (tokens read, tokens in all) is asked for.

        ``before``: what to call when the engine has come to these places in ``tokens``, counted as reading.
        """
        ids = self._checked(tokens)
        given = ids.size
        if self._pending is not None:
            ids = np.concatenate([[self._pending], ids])
        self._check_limit(ids.size)
        calls = {place + ids.size - given: call for place, call in (before or {}).items()}
        self._waited_s, done = 0.0, 0
        yield 0, ids.size
        while done < ids.size:
            started = perf_counter()
            if done in calls:
                calls.pop(done)()
            count = self._step(ids[done : min(calls, default=ids.size)])
            done += count
            spent = perf_counter() - started
            self._prefilled += count
            self._prefill_s += spent
            self._waited_s += spent
            yield done, ids.size
        self._prompt_tokens += given

    def _check_limit(self, count: int) -> None:
        if self.engine.seen + count > self.engine.position_limit:
            raise PositionLimitError(
                f"{count} more after {self.engine.seen} tokens pass the last position this model computes rightly "
                f"({self.engine.position_limit - 1}): {self._limit_hint}shorten the text or start a new stream (reset)"
            )

    def _checked(self, tokens: npt.ArrayLike) -> IntArray:
        ids = np.asarray(tokens).reshape(-1)
        if ids.size == 0:
            raise ConfigError("the prompt is empty: give at least one token")
        if ids.dtype.kind not in "iu":
            raise ConfigError(f"token ids are {ids.dtype}, but must be whole numbers")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.engine.vocab_size:
            raise ConfigError(
                f"token id {low if low < 0 else high} is outside the vocabulary of {self.engine.vocab_size}: "
                "use the tokenizer of this artefact"
            )
        return ids.astype(np.int64)

    def _step(self, ids: IntArray) -> int:
        """Reads the largest chunk at the front of ``ids`` that fits, then evicts if that filled the ring."""
        engine = self.engine
        if engine.room == 0:  # only after a state was loaded at this very moment
            self._evict()
        chunk = ids[: min(engine.room, engine.config.prefill_chunk)]
        self._logits = engine.prefill(chunk)
        self._pending = None
        self._seen_tokens[chunk] = True
        self._newest.extend(chunk[-_CONTEXT:].tolist())
        if self._tokens is not None:
            self._tokens.extend(chunk.tolist())
        if engine.room == 0:
            self._evict()
        if self._trained_positions is not None and engine.seen > self._trained_positions and not self._warned:
            self._warned = True
            self._warn(
                f"the stream is longer than the {self._trained_positions} positions the model was trained for: "
                "the text may get worse from here on"
            )
        return chunk.size

    def _evict(self) -> None:
        started = perf_counter()
        with Uninterrupted():
            self._checkpoints.before_event(self.engine)
            self.engine.evict()
        self._event_s += perf_counter() - started
        self._events += 1

    def generate(
        self,
        max_new_tokens: int,
        sampling: SamplingParams | Sampler = _GREEDY,
        stop_ids: Collection[int] = (),
        stop_strings: Sequence[str] = (),
        constraint: Constraint | None = None,
    ) -> Iterator[Piece]:
        """Continues the stream, one :class:`Piece` per token.

        Args:
            max_new_tokens: most tokens; 0 gives none.
            sampling: how tokens are chosen; a seed makes each call start from it. A sampler (:attr:`sampler`) goes on
                from where it is.
            stop_ids: tokens that end the generation. The one met is given as a piece, and its own text is left out.
            stop_strings: text that ends it, wherever tokens divide it. The text is cut before it; the tokens that
                made it stay in the stream.
            constraint: which tokens may follow which; new for each generation.

        Raises:
            ConfigError: at the call: nothing was fed, a setting is out of range, or stop strings without a tokenizer.
            PositionLimitError: while iterating, when the next token would pass the engine's last position. All text was
                given before; the stream is as after any other end.
        """
        if self._logits is None:
            raise ConfigError("nothing was fed: feed a prompt before generating")
        if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 0:
            raise ConfigError(f"max new tokens is {max_new_tokens!r}, but must be a whole number of at least 0")
        context = [*self._newest] if self._pending is None else [*self._newest, self._pending]
        text = TextStream(self.tokenizer, stop_strings, context)
        self._sampler = sampling if isinstance(sampling, Sampler) else Sampler(sampling)
        return self._generate(max_new_tokens, self._sampler, frozenset(stop_ids), text, constraint)

    def _generate(
        self, count: int, sampler: Sampler, stop_ids: frozenset[int], text: TextStream, constraint: Constraint | None
    ) -> Iterator[Piece]:
        for left in reversed(range(count)):
            started = perf_counter()
            if self._pending is not None:
                self._check_limit(1)
                self._step(np.array([self._pending], np.int64))
                self._decoded += 1
                self._decode_s += perf_counter() - started
            assert self._logits is not None  # generate() checked it
            allowed = None if constraint is None else constraint.allowed()
            token = sampler.sample(self._logits, self._seen_tokens, allowed, self._never)
            if constraint is not None:
                constraint.accept(token)
            self._pending = token
            self._new_tokens += 1
            stop = token in stop_ids
            out = "" if stop else text.push(token)
            if stop or left == 0 or self.engine.seen >= self.engine.position_limit:
                out += text.flush()
            self._count_first(perf_counter() - started)
            yield Piece(token, out)
            if stop or text.stopped:
                return

    def _count_first(self, seconds: float) -> None:
        if self._waited_s is not None:
            self._ttft_s, self._waited_s = self._waited_s + seconds, None

    def statistics(self) -> SessionStatistics:
        """What happened since the last reset."""
        return SessionStatistics(
            prompt_tokens=self._prompt_tokens,
            new_tokens=self._new_tokens,
            position=self.engine.seen,
            ttft_s=self._ttft_s,
            prefill_tokens_per_s=per_second(self._prefilled, self._prefill_s),
            decode_tokens_per_s=per_second(self._decoded, self._decode_s),
            events=self._events,
            event_s=self._event_s,
            live_entries=round(self.engine.entries / (self.engine.num_layers * self.engine.num_kv_heads)),
            max_entries=self.engine.config.slots,
            cache_bytes=self._cache_bytes,
            checkpoint_bytes=self._checkpoints.nbytes,
            rss_bytes=rss_bytes(),
            peak_rss_bytes=peak_rss_bytes(),
        )
