"""One session of the server, and the chat that its cache holds."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

from trimkv_edge.errors import ArtefactError, ConfigError, PositionLimitError, SessionError
from trimkv_edge.runtime.artefact import Artefact
from trimkv_edge.runtime.chat import render_chat
from trimkv_edge.runtime.conversation import Conversation
from trimkv_edge.runtime.server.prompt import Answer, Part, Prompt
from trimkv_edge.runtime.server.requests import Message
from trimkv_edge.runtime.server.scores import score
from trimkv_edge.runtime.server.store import Chat, Store
from trimkv_edge.runtime.server.worker import Worker
from trimkv_edge.runtime.session import Session
from trimkv_edge.runtime.streaming import StopStrings
from trimkv_edge.runtime.vision_text import PictureText, Reading

_LOG = logging.getLogger(__name__)
T = TypeVar("T")


class Slot:
    """A session.

    Args:
        artefact: with a tokenizer.
        session: of its own.
        worker: computes for all slots.
        store: where a chat goes when the slot is given to another one; None: nowhere.
        undo: checkpoints that the session keeps: with one, a turn that breaks off or is asked again does not make the
            chat be read again.

    Attributes:
        conversation: id of the chat that the slot was last given to, if the client gave one.
        chat: what the cache holds; None: nothing that can go on.
        read_for: id of the chat whose text the cache holds, one that was broken off included.
    """

    def __init__(
        self,
        artefact: Artefact,
        session: Session,
        worker: Worker,
        store: Store | None = None,
        undo: int = 0,
    ) -> None:
        if artefact.tokenizer is None:
            raise ArtefactError(f"{artefact.folder} has no tokenizer (random weights have none): there is no text")
        self.session = session
        self.worker = worker
        self.conversation: str | None = None
        self.chat: Chat | None = None
        self.read_for: str | None = None
        self.busy = False
        self.used = 0
        self.claimed = 0.0
        self._artefact, self._tokenizer = artefact, artefact.tokenizer
        self._texts = PictureText(artefact.tokenizer, artefact.manifest.vision)
        self._store = store
        # Digests of the messages at the session's checkpoints.
        self._marks: deque[str] = deque(maxlen=undo)

    def look(self, make: Callable[[Session], T]) -> Future[T]:
        """What ``make`` says of the session, asked between two tokens if it is answering."""
        return self.worker.submit(make, self.session)

    def answer(self, prompt: Prompt, answer: Answer, check: Callable[[], None]) -> Iterator[Part | None]:
        """Reads what the cache lacks of the prompt, then gives the answer part by part; a step of the engine each.

        Args:
            prompt: the request.
            answer: filled in on the way.
            check: called before each chunk and each token; what it raises ends the answer.

        Yields:
            None after a chunk of the prompt.

        Raises:
            PositionLimitError: the prompt does not fit before the last position.
            ArtefactError: there is no template, or it refuses the messages.
            ConfigError: a text that would make a place for a picture by itself, or a damaged picture.
            Whenever it does not come to its end the session goes back to where it was, if it has a checkpoint;
            otherwise the chat is forgotten and the next request reads everything.
        """
        reading, goes_on = self._new_tokens(prompt)
        self.read_for = self.conversation
        try:
            for _ in reading.feeding(self.session):
                check()
                yield None
            answer.prompt_tokens = self.session.engine.seen
            answer.cached_tokens = answer.prompt_tokens - len(reading.tokens)
            for part in self._generate(prompt, answer, check):
                answer.parts.append(part)
                yield part
        except BaseException:
            if goes_on and self._marks:
                with suppress(SessionError):
                    self.chat = Chat(self.conversation, self._go_back())
            raise
        if prompt.messages:
            said = Message(role="assistant", content=answer.text)
            self.chat = Chat(self.conversation, prompt.gallery.digest([*prompt.messages, said]))

    def save(self) -> None:
        """Puts the chat into the store, if there are both."""
        if self._store is not None and self.chat is not None:
            self._store.save(self.session, self.chat)

    def _generate(self, prompt: Prompt, answer: Answer, check: Callable[[], None]) -> Iterator[Part]:
        info = self._artefact.manifest.tokenizer
        stop_ids = [] if info is None else info.eos_token_ids
        stops = StopStrings(prompt.stops)
        pieces = self.session.generate(prompt.max_tokens, prompt.sampling, stop_ids, constraint=prompt.constraint)
        try:
            for piece in pieces:
                answer.completion_tokens += 1
                text = stops.push(piece.text)
                ended = piece.token in stop_ids
                if stops.stopped or ended:
                    answer.finish = "stop"
                yield Part(text, self._scores(prompt, piece.token, ended))
                if answer.finish == "stop":
                    break
                check()
        except PositionLimitError:
            pass  # the answer was given until here, as with any other limit of its length
        yield Part(stops.flush())

    def _scores(self, prompt: Prompt, token: int, ended: bool) -> tuple[Any, ...]:
        if prompt.logprobs is None or ended:
            return ()
        logits = self.session.logits
        assert logits is not None  # the token was drawn from them
        return (score(logits, token, prompt.logprobs, self._tokenizer.shown),)

    def _new_tokens(self, prompt: Prompt) -> tuple[Reading, bool]:
        """What the cache lacks, and whether it goes on from a checkpoint."""
        held, self.chat = self.chat, None
        if held is not None and not self._is_own(held, prompt):
            if self._store is not None:
                self._store.save(self.session, held)
            held = None
        if prompt.text is not None:
            self._start()
            return self._texts.encode(prompt.text, begins=True), False
        *earlier, last = prompt.messages
        if earlier and self._stands_behind(held, prompt):
            talk = self._conversation(prompt)
            talk.resume(1)  # for what is asked next, some turn was before
            try:
                reading = talk.reading_of(prompt.gallery.content(last), prompt.gallery.shown([last]))
            except ArtefactError as error:
                _LOG.info("the whole chat is read again: %s", error)
            except ConfigError:
                self.chat = Chat(self.conversation, str(prompt.earlier))  # as it was: only the message is wrong
                raise
            else:
                self.session.checkpoint()
                self._marks.append(str(prompt.earlier))
                return reading, True
        self._start()
        self._conversation(prompt)  # refuses artefacts that cannot chat
        gallery = prompt.gallery
        for message in prompt.messages:
            self._texts.check_plain(message.text)
        said = [{"role": message.said_by, "content": gallery.content(message)} for message in prompt.messages]
        text = render_chat(self._artefact.chat_template or "", said, self._artefact.special_tokens())
        return self._texts.encode(text, gallery.shown(prompt.messages)), False

    def _is_own(self, held: Chat, prompt: Prompt) -> bool:
        """Whether the cache's chat is the one that is to go on; without an id only its messages can tell."""
        if self.conversation is None and held.known != prompt.earlier:
            return False
        return prompt.text is None and held.conversation == self.conversation

    def _stands_behind(self, held: Chat | None, prompt: Prompt) -> bool:
        """Brings the session behind all messages but the newest, if it or the store knows that place."""
        wanted = Chat(self.conversation, str(prompt.earlier))
        if held == wanted:
            return True
        if held is not None and wanted.known in self._marks:
            # A turn is asked again, or was changed: back to where it began.
            with suppress(SessionError):
                self._go_back(len(self._marks) - self._marks.index(wanted.known))
                return True
        self._marks.clear()
        return self._store is not None and self._store.load(self.session, wanted)

    def _go_back(self, turns: int = 1) -> str:
        """Returns the digest of the messages that the cache holds then."""
        self.session.rewind(turns)
        return [self._marks.pop() for _ in range(turns)][-1]

    def _conversation(self, prompt: Prompt) -> Conversation:
        first = prompt.messages[0]
        return Conversation.open(self._artefact, self.session, first.text if first.said_by == "system" else None)

    def _start(self) -> None:
        self._marks.clear()
        self.session.reset()
