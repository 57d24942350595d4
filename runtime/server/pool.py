"""A fixed number of sessions, and which conversation has which."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from trimkv_edge.budget import check_fits
from trimkv_edge.errors import ArtefactError, ConfigError, PositionLimitError, TrimKVError
from trimkv_edge.runtime.artefact import Artefact
from trimkv_edge.runtime.chat import render_chat
from trimkv_edge.runtime.conversation import Conversation
from trimkv_edge.runtime.sampling import SamplingParams
from trimkv_edge.runtime.server.requests import Message
from trimkv_edge.runtime.session import Session
from trimkv_edge.runtime.streaming import StopStrings

_LOG = logging.getLogger(__name__)
T = TypeVar("T")


class BusyError(TrimKVError):
    """Every session is answering; the request may come again later."""


@dataclass(frozen=True)
class Prompt:
    """What is to be answered: the messages of a chat, or a text that goes on.

    Raises:
        ConfigError: both, or neither.
    """

    sampling: SamplingParams
    max_tokens: int
    stops: Sequence[str] = ()
    messages: Sequence[Message] = ()
    text: str | None = None

    def __post_init__(self) -> None:
        if bool(self.messages) == (self.text is not None):
            raise ConfigError("a prompt is either messages or a text: give one of them")

    @cached_property
    def earlier(self) -> str | None:
        """Digest of all messages but the newest; None for a text."""
        return digest(self.messages[:-1]) if self.messages else None


@dataclass
class Answer:
    """What a request was given; grows while it is made."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    text: list[str] = field(default_factory=list)
    finish: str = "length"


def digest(messages: Sequence[Message]) -> str:
    """Names a list of messages by what they say."""
    said = [[message.role, message.text] for message in messages]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


class Slot:
    """One session, its thread, and the chat that its cache holds.

    Attributes:
        known: digest of the messages in the cache, the newest answer included; None: nothing that can go on.
        conversation: id of the chat it belongs to, if the client gave one.
    """

    def __init__(self, artefact: Artefact, session: Session) -> None:
        self.session = session
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="trimkv-slot")
        self.known: str | None = None
        self.conversation: str | None = None
        self.busy = False
        self.used = 0
        self._artefact = artefact
        self._talk: Conversation | None = None
        self._looks: SimpleQueue[tuple[Callable[[Session], Any], Future[Any]]] = SimpleQueue()

    def look(self, make: Callable[[Session], T]) -> Future[T]:
        """What ``make`` says of the session, asked between two tokens if it is answering."""
        future: Future[T] = Future()
        self._looks.put((make, future))
        self.worker.submit(self._serve_looks)
        return future

    def _serve_looks(self) -> None:
        with suppress(Empty):
            while True:
                make, future = self._looks.get_nowait()
                try:
                    future.set_result(make(self.session))
                except Exception as error:
                    future.set_exception(error)

    def answer(self, prompt: Prompt, answer: Answer, check: Callable[[], None]) -> Iterator[str]:
        """Reads what the cache lacks of the prompt, then gives the answer's text piece by piece.

        Args:
            prompt: the request.
            answer: filled in on the way.
            check: called before each chunk and each token; what it raises ends the answer.

        Raises:
            PositionLimitError: the prompt does not fit before the last position.
            ArtefactError: there is no template, or it refuses the messages.
            Whenever it does not come to its end the slot forgets its chat: the next request reads everything.
        """
        known, self.known = self.known, None

        def between() -> None:
            self._serve_looks()
            check()

        tokens = self._new_tokens(prompt, known)
        self.session.feed(tokens, lambda done, total: between())
        answer.prompt_tokens = self.session.engine.seen
        answer.cached_tokens = answer.prompt_tokens - len(tokens)
        for text in self._generate(prompt, answer, between):
            if text:
                answer.text.append(text)
            yield text
        if prompt.messages:
            said = Message(role="assistant", content="".join(answer.text))
            self.known = digest([*prompt.messages, said])

    def _generate(self, prompt: Prompt, answer: Answer, check: Callable[[], None]) -> Iterator[str]:
        info = self._artefact.manifest.tokenizer
        stop_ids = [] if info is None else info.eos_token_ids
        stops = StopStrings(prompt.stops)
        pieces = self.session.generate(prompt.max_tokens, prompt.sampling, stop_ids)
        try:
            for piece in pieces:
                answer.completion_tokens += 1
                text = stops.push(piece.text)
                if stops.stopped or piece.token in stop_ids:
                    answer.finish = "stop"
                yield text
                if answer.finish == "stop":
                    break
                check()
        except PositionLimitError:
            pass  # the answer was given until here, as with any other limit of its length
        yield stops.flush()

    def _new_tokens(self, prompt: Prompt, known: str | None) -> list[int]:
        tokenizer = self._artefact.tokenizer
        if tokenizer is None:
            raise ArtefactError(f"{self._artefact.folder} has no tokenizer (random weights have none)")
        if prompt.text is not None:
            self._start()
            return tokenizer.encode(prompt.text)
        *earlier, last = prompt.messages
        if self._talk is not None and known == prompt.earlier:
            try:
                return self._talk.tokens_of(last.text)
            except ArtefactError as error:
                _LOG.info("the whole chat is read again: %s", error)
        self._start()
        system = earlier[0].text if earlier and earlier[0].role == "system" else None
        self._talk = Conversation.open(self._artefact, self.session, system)
        self._talk.resume(1)  # for what is asked next, some turn was before
        said = [{"role": message.role, "content": message.text} for message in prompt.messages]
        template = self._artefact.chat_template or ""  # Conversation.open refused None
        text = render_chat(template, said, self._artefact.special_tokens())
        return tokenizer.encode(text, add_special_tokens=False)

    def _start(self) -> None:
        self._talk = None
        self.session.reset()


class SlotPool:
    """N slots. A conversation keeps its slot until another one needs it more.

    Args:
        slots: at least one, each with an engine of its own.
    """

    def __init__(self, slots: Sequence[Slot]) -> None:
        self.slots = list(slots)
        self._lock, self._clock = threading.Lock(), count(1)

    @classmethod
    def open(cls, artefact: Artefact, sessions: int, engine: str | None = None, threads: int | None = None) -> SlotPool:
        """Sessions on engines of ``artefact``. Each engine loads the weights for itself, so memory is asked for all.

        Raises:
            ConfigError: fewer than one session.
            BudgetError: they need more memory than is available; nothing was loaded.
            TrimKVError: see :func:`~trimkv_edge.runtime.engines.load_engine`.
        """
        if sessions < 1:
            raise ConfigError(f"sessions is {sessions}, but must be at least 1")
        check_fits(memory_to_serve(artefact, sessions), f"serving {artefact.folder} with {sessions} sessions")

        def session() -> Session:
            return Session.open(artefact, engine, threads, checkpoints=0, note_tokens=True, warn=_LOG.warning)

        return cls([Slot(artefact, session()) for _ in range(sessions)])

    def claim(self, conversation: str | None = None, earlier: str | None = None) -> Slot:
        """A slot for one answer; :meth:`release` gives it back.

        Args:
            conversation: id of the chat. Its slot is taken, if it has one.
            earlier: digest of all messages but the newest. Without an id, a slot without an id whose cache holds just
                these is taken.

        Raises:
            BusyError: no slot is idle, or the conversation's own is not.
        """
        with self._lock:
            own = [slot for slot in self.slots if conversation is not None and slot.conversation == conversation]
            if own and own[0].busy:
                raise BusyError(f"conversation {conversation!r} is being answered: ask again when that is over")
            idle = sorted((slot for slot in self.slots if not slot.busy), key=lambda slot: slot.used)
            if not idle:
                raise BusyError(f"all {len(self.slots)} sessions are busy: ask again later or raise --sessions")
            if conversation is None and earlier is not None:
                own = [slot for slot in idle if slot.conversation is None and slot.known == earlier]
            slot = own[0] if own else idle[0]
            if not own:
                slot.known, slot.conversation = None, conversation
            slot.busy = True
            return slot

    def find(self, conversation: str) -> Slot | None:
        """The slot of a conversation, busy or not."""
        with self._lock:
            return next((slot for slot in self.slots if slot.conversation == conversation), None)

    def release(self, slot: Slot) -> None:
        """Gives a slot back."""
        with self._lock:
            slot.busy, slot.used = False, next(self._clock)

    @property
    def busy(self) -> int:
        """Slots that are answering."""
        return sum(slot.busy for slot in self.slots)

    def close(self) -> None:
        """Waits for what runs."""
        for slot in self.slots:
            slot.worker.shutdown()


def memory_to_serve(artefact: Artefact, sessions: int) -> int:
    """Estimated bytes of the process: engines share neither weights nor what their libraries make of them."""
    return sessions * artefact.manifest.bytes.peak
