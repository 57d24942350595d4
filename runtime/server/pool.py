"""A fixed number of sessions, and which conversation has which."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from itertools import count
from time import monotonic

from trimkv_edge.budget import check_fits
from trimkv_edge.errors import ConfigError, TrimKVError
from trimkv_edge.runtime.artefact import Artefact
from trimkv_edge.runtime.engines import choose_engine, engine_class, load_engine
from trimkv_edge.runtime.server.slot import Slot
from trimkv_edge.runtime.server.store import Store
from trimkv_edge.runtime.server.worker import Worker
from trimkv_edge.runtime.session import Session

_LOG = logging.getLogger(__name__)
# Python, numpy, the engine's library and the web server, before anything is loaded: 118 to 127 MiB were measured.
_PROCESS = 128 * 2**20


class BusyError(TrimKVError):
    """Every session is answering; the request may come again after ``retry_s`` seconds."""

    def __init__(self, message: str, retry_s: int = 1) -> None:
        super().__init__(message)
        self.retry_s = retry_s


class SlotPool:
    """N slots. A conversation keeps its slot until another one needs it more.

    Args:
        slots: each with an engine of its own, in order of first use.

    Attributes:
        on_release: called, in the thread that answered, when a slot has become free.
        answer_s: seconds that an answer takes, newer ones counting more; 0 before the first.
    """

    def __init__(self, slots: Sequence[Slot]) -> None:
        self.slots = list(slots)
        self.on_release: Callable[[], None] = lambda: None
        self.answer_s = 0.0
        self._lock, self._clock = threading.Lock(), count(1)

    @classmethod
    def open(
        cls,
        artefact: Artefact,
        sessions: int,
        engine: str | None = None,
        threads: int | None = None,
        *,
        undo: int = 0,
        store: Store | None = None,
    ) -> SlotPool:
        """Sessions on engines of ``artefact``, which share its weights where the engine can.

        Args:
            sessions: how many.
            engine, threads: see :func:`~trimkv_edge.runtime.engines.load_engine`.
            undo: newest turns of each chat that can be taken back; each may cost a copy of the cache.
            store: where chats go that no session has room for.

        Raises:
            ConfigError: fewer than one session, or ``undo`` below 0.
            BudgetError: they need more memory than is available; nothing was loaded.
            TrimKVError: see :func:`~trimkv_edge.runtime.engines.load_engine`.
        """
        if sessions < 1:
            raise ConfigError(f"sessions is {sessions}, but must be at least 1")
        if undo < 0:
            raise ConfigError(f"undo is {undo}, but must be 0 (no turn is kept) or more")
        engine = choose_engine(artefact, engine)
        needed = memory_to_serve(artefact, sessions, engine, undo)
        check_fits(needed, f"serving {artefact.folder} with {sessions} sessions")
        first, worker = load_engine(artefact, engine, threads), Worker()
        engines = [first, *(first.another() for _ in range(sessions - 1))]

        def slot(index: int) -> Slot:
            session = Session.over(engines[index], artefact, checkpoints=undo, note_tokens=True, warn=_LOG.warning)
            return Slot(artefact, session, worker, store, undo)

        return cls([slot(index) for index in range(sessions)])

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
                raise BusyError(f"conversation {conversation!r} is being answered")
            idle = sorted((slot for slot in self.slots if not slot.busy), key=lambda slot: slot.used)
            if not idle:
                raise BusyError(f"all {len(self.slots)} sessions are busy")
            if conversation is None and earlier is not None:
                own = [slot for slot in idle if slot.chat is not None and slot.chat == (None, earlier)]
            slot = own[0] if own else idle[0]
            slot.conversation, slot.busy, slot.claimed = conversation, True, monotonic()
            return slot

    def find(self, conversation: str) -> Slot | None:
        """The slot of a conversation, busy or not."""
        with self._lock:
            return next((slot for slot in self.slots if slot.conversation == conversation), None)

    def release(self, slot: Slot) -> None:
        """Gives a slot back."""
        with self._lock:
            slot.busy, slot.used = False, next(self._clock)
            taken = monotonic() - slot.claimed
            self.answer_s = taken if self.answer_s == 0 else 0.8 * self.answer_s + 0.2 * taken
        self.on_release()

    @property
    def busy(self) -> int:
        """Slots that are answering."""
        return sum(slot.busy for slot in self.slots)

    def close(self) -> None:
        """Waits for what runs, then saves all chats if there is a store."""
        for worker in {slot.worker for slot in self.slots}:
            worker.shutdown()
        for slot in self.slots:
            slot.save()


def memory_to_serve(artefact: Artefact, sessions: int, engine: str, undo: int = 0) -> int:
    """Estimated bytes of the server's process."""
    manifest = artefact.manifest
    model, size = manifest.model, manifest.bytes
    shared = engine_class(engine, manifest.cache, vision=manifest.vision is not None).shares_model
    # Copies of the cache are float32, whatever it stores.
    copy = 8 * model.num_layers * model.num_kv_heads * model.head_dim * manifest.cache.slots
    return _PROCESS + size.peak + (sessions - 1) * (size.cache if shared else size.peak) + sessions * undo * copy
