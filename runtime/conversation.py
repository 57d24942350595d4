"""A chat on one session: every turn reads only what is new, whatever was said before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from trimkv_edge.errors import ArtefactError, ConfigError, SessionError
from trimkv_edge.manifest import VisionInfo
from trimkv_edge.runtime.artefact import Artefact
from trimkv_edge.runtime.chat import TEMPLATE_FILE, content_of, render_chat
from trimkv_edge.runtime.sampling import SamplingParams
from trimkv_edge.runtime.session import Piece, Session
from trimkv_edge.runtime.tokenizer import TextTokenizer
from trimkv_edge.runtime.vision import Shown
from trimkv_edge.runtime.vision_text import PictureText, Reading, finish_picture

# Stands for an answer in a rendered template: the stream has the answer's own tokens.
_ANSWER = "\ue000answer\ue001"
_GREEDY = SamplingParams()


class Conversation:
    """Turns between a user and the model.

    The template is rendered for two turns only, with a mark in the place of the answer between them: what stands behind
    the mark is what the stream lacks. So a turn costs the same after ten turns and after ten thousand, and templates
    that rewrite earlier answers (dropping thoughts, say) cannot make the stream and the text disagree.

    Args:
        session: at the start of a stream, or one that :meth:`resume` is told about.
        tokenizer: the artefact's.
        template: text of its ``chat_template.jinja``.
        stop_ids: tokens that end an answer.
        special_tokens: names that templates use, see :meth:`Artefact.special_tokens`.
        system: the system prompt; None: the template's own, if it has one.
        vision: of the artefact's manifest; None: a text model.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: TextTokenizer,
        template: str,
        stop_ids: Sequence[int],
        special_tokens: Mapping[str, str] | None = None,
        system: str | None = None,
        vision: VisionInfo | None = None,
    ) -> None:
        self.session = session
        self._texts, self._template = PictureText(tokenizer, vision), template
        self._stop_ids, self._special = list(stop_ids), dict(special_tokens or {})
        self._system: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
        self.turns = 0

    @classmethod
    def open(cls, artefact: Artefact, session: Session, system: str | None = None) -> Conversation:
        """A conversation through an artefact's template.

        Raises:
            ArtefactError: it has no tokenizer or no template.
        """
        info = artefact.manifest.tokenizer
        if artefact.tokenizer is None or info is None:
            raise ArtefactError(f"{artefact.folder} has no tokenizer (random weights have none), so it cannot chat")
        if artefact.chat_template is None:
            raise ArtefactError(f"{artefact.folder} has no {TEMPLATE_FILE}, so it cannot chat: use trimkv-run")
        return cls(
            session,
            artefact.tokenizer,
            artefact.chat_template,
            info.eos_token_ids,
            artefact.special_tokens(),
            system,
            artefact.manifest.vision,
        )

    def ask(
        self,
        text: str,
        max_new_tokens: int = 512,
        sampling: SamplingParams = _GREEDY,
        stop_strings: Sequence[str] = (),
        shown: Sequence[Shown] = (),
        pictures_last: bool = False,
    ) -> Iterator[Piece]:
        """Reads a message, with the pictures that it shows before its words or behind them, and answers it, one piece
        per token.

        The iterator may be left at any token: what was said until then is the answer. Before a message is read the
        place is marked, so that :meth:`undo` finds it.

        Raises:
            ConfigError: at the call: an empty message, a setting out of range, pictures for a text model, or a message
                that contains the token of a picture's place.
            ArtefactError: the template fails, or does not show answers.
            PositionLimitError: the message does not fit before the last position; nothing was read.
        """
        if not text.strip():
            raise ConfigError("the message is empty: say something")
        reading = self.reading_of(content_of([one.kind for one in shown], text, pictures_last), shown)
        self.session.checkpoint()
        try:
            for _ in reading.feeding(self.session):
                pass
            pieces = self.session.generate(max_new_tokens, sampling, self._stop_ids, stop_strings)
        except BaseException:
            # Half a turn is worse than none; without checkpoints it stays.
            with suppress(SessionError):
                self.session.rewind()
            finish_picture(self.session)
            raise
        self.turns += 1
        return pieces

    def reading_of(self, content: str | list[dict[str, str]], shown: Sequence[Shown] = ()) -> Reading:
        """What the stream lacks before the answer to a message can be given; errors as of :meth:`ask`.

        Args:
            content: of the message, see :func:`~trimkv_edge.runtime.chat.content_of`.
            shown: its pictures, in order.
        """
        for text in [content] if isinstance(content, str) else [part.get("text", "") for part in content]:
            self._texts.check_plain(text)
        user = {"role": "user", "content": content}
        if not self.turns:
            return self._texts.encode(self._render([*self._system, user]), shown)
        earlier = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER}]
        head, mark, rest = self._render([*self._system, *earlier, user]).rpartition(_ANSWER)
        if not mark or _ANSWER in head:
            raise ArtefactError(f"{TEMPLATE_FILE} does not show an earlier answer once, so turns cannot be added to it")
        # An answer that the model ended itself has its closing token already.
        return self._texts.encode(rest, shown, drop=self.session.pending)

    def undo(self, turns: int = 1) -> None:
        """Takes back the newest turns; raises what :meth:`Session.rewind` does, and then nothing changed."""
        if turns > self.turns:
            raise ConfigError(f"{turns} turns cannot be taken back: there were {self.turns}")
        self.session.rewind(turns)
        self.turns -= turns

    def reset(self) -> None:
        """Starts again with an empty cache."""
        self.session.reset()
        self.turns = 0

    def resume(self, turns: int) -> None:
        """Says that the session was loaded and holds ``turns`` turns of this chat."""
        self.turns = turns

    def _render(self, messages: list[dict[str, Any]]) -> str:
        return render_chat(self._template, messages, self._special)
