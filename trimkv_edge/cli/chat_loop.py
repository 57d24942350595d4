"""The loop of ``trimkv-chat``: reads a line, answers it or does what it commands."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

from prompt_toolkit import PromptSession
from prompt_toolkit.formatted_text import HTML
from rich.console import Console
from rich.text import Text

from trimkv_edge.budget import format_bytes
from trimkv_edge.cli.common import one_line
from trimkv_edge.errors import ConfigError, PositionLimitError, TrimKVError
from trimkv_edge.runtime.conversation import Conversation
from trimkv_edge.runtime.kept import held_tokens
from trimkv_edge.runtime.sampling import SamplingParams

_SHOWN = 400  # tokens that /kept shows
_BAR = 20
# Of a model's positions: from here on the end is announced.
_EARLY = 0.95


class _Command(NamedTuple):
    do: Callable[[ChatLoop, str], None]
    takes: str
    help: str


class _End(Exception):
    """The user is done."""


class ChatLoop:
    """One chat in a terminal, or one message a line from a pipe.

    Args:
        conversation: to talk in; its session notes tokens.
        sampling, max_new_tokens, stops: of each answer.
    """

    def __init__(
        self, conversation: Conversation, sampling: SamplingParams, max_new_tokens: int, stops: list[str]
    ) -> None:
        self.talk = conversation
        self._sampling, self._count, self._stops = sampling, max_new_tokens, stops
        self._console = Console(stderr=True, highlight=False)
        self._announced = False

    def run(self) -> None:
        """Until the user ends it."""
        try:
            for line in self._lines():
                self._one(line)
        except _End:
            pass

    def _lines(self) -> Iterator[str]:
        if not sys.stdin.isatty():
            yield from (line.rstrip("\n") for line in sys.stdin)
            return
        self._note("/help lists the commands; Ctrl-C stops an answer, Ctrl-D ends the chat")
        prompt: PromptSession[str] = PromptSession(bottom_toolbar=self._toolbar)
        while True:
            try:
                yield prompt.prompt("> ")
            except KeyboardInterrupt:
                continue
            except EOFError:
                return

    def _one(self, line: str) -> None:
        text = line.strip()
        if not text:
            return
        try:
            if text.startswith("/"):
                self._command(text)
            else:
                self._answer(line)
        except KeyboardInterrupt:
            self._note("stopped")
        except PositionLimitError as error:
            self._note(f"{one_line(error)} (/save keeps this chat, /reset starts a new one)", "bold red")
        except TrimKVError as error:
            self._note(one_line(error), "red")

    def _answer(self, text: str) -> None:
        try:
            for piece in self.talk.ask(text, self._count, self._sampling, self._stops):
                sys.stdout.write(piece.text)
                sys.stdout.flush()
        finally:
            sys.stdout.write("\n")
            sys.stdout.flush()
        engine = self.talk.session.engine
        if not self._announced and engine.seen > _EARLY * engine.position_limit:
            self._announced = True
            self._note(
                f"{engine.position_limit - engine.seen:,} positions are left before the last one this model computes "
                "rightly: /save keeps this chat, /reset starts a new one",
                "yellow",
            )

    def _command(self, text: str) -> None:
        name, _, rest = text[1:].partition(" ")
        command = COMMANDS.get(name)
        if command is None:
            raise ConfigError(f"/{name} is not a command: use {', '.join('/' + known for known in COMMANDS)}")
        if rest and not command.takes:
            raise ConfigError(f"/{name} takes nothing, not {rest!r}")
        command.do(self, rest.strip())

    def _note(self, text: str, style: str = "dim") -> None:
        self._console.print(Text(text, style))

    def help(self, _: str) -> None:
        for name, command in COMMANDS.items():
            self._note(f"/{name} {command.takes}".ljust(14) + command.help)

    def stats(self, _: str) -> None:
        self._note(f"engine    {self.talk.session.engine.name}, {self.talk.turns} turns")
        for line in self.talk.session.statistics().lines():
            self._note(line)

    def kept(self, number: str) -> None:
        """The newest tokens that are held, brighter where more heads hold them; a dot for a gap."""
        session = self.talk.session
        most = _number(number or str(_SHOWN), "/kept")
        everything = held_tokens(session)
        held = everything[-most:]
        shown, last = Text(), None
        for token in held:
            if last is not None and token.position > last + 1:
                shown.append("·", "dim")
            grey = round(70 + 185 * token.share)
            shown.append(token.text, f"rgb({grey},{grey},{grey})")
            last = token.position
        self._console.print(shown)
        self._note(
            f"{len(everything):,} of {session.engine.seen:,} tokens are held by at least one of "
            f"{session.engine.num_layers * session.engine.num_kv_heads} heads; the last {len(held):,} are shown"
        )

    def undo(self, turns: str) -> None:
        self.talk.undo(_number(turns or "1", "/undo"))
        self._note(f"taken back; {self.talk.turns} turns are left")

    def save(self, file: str) -> None:
        if not file:
            raise ConfigError("/save needs a file name: /save FILE")
        self.talk.session.save(file)
        self._note(f"saved to {file}")

    def load(self, file: str) -> None:
        """Also what ``--load`` does."""
        if not file:
            raise ConfigError("/load needs a file name: /load FILE")
        self.talk.session.load(file)
        self.talk.resume(1)
        self._note(f"goes on after {self.talk.session.engine.seen:,} tokens")

    def reset(self, _: str) -> None:
        self.talk.reset()
        self._announced = False
        self._note("a new chat")

    def exit(self, _: str) -> None:
        raise _End

    def _toolbar(self) -> HTML:
        session = self.talk.session
        facts = session.statistics()
        full = min(_BAR, round(_BAR * facts.live_entries / facts.max_entries))
        speed = "" if facts.decode_tokens_per_s is None else f"  {facts.decode_tokens_per_s:.1f} tokens/s"
        return HTML(
            f" cache {'█' * full}{'░' * (_BAR - full)} {facts.live_entries:,}/{facts.max_entries:,} per head, "
            f"{format_bytes(facts.cache_bytes)}  memory {format_bytes(facts.rss_bytes)}  "
            f"position {facts.position:,} of {session.engine.position_limit:,}{speed}"
        )


def _number(text: str, command: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise ConfigError(f"{command} takes a whole number of at least 1, not {text!r}")
    return int(text)


COMMANDS = {
    "help": _Command(ChatLoop.help, "", "this list"),
    "stats": _Command(ChatLoop.stats, "", "speed and memory so far"),
    "kept": _Command(
        ChatLoop.kept, "[N]", "the newest tokens that are still held, brighter where more heads hold them"
    ),
    "undo": _Command(ChatLoop.undo, "[N]", "take back the last turn, or N turns"),
    "save": _Command(ChatLoop.save, "FILE", "write this chat to a file"),
    "load": _Command(ChatLoop.load, "FILE", "go on with a chat from a file"),
    "reset": _Command(ChatLoop.reset, "", "start a new chat with an empty cache"),
    "exit": _Command(ChatLoop.exit, "", "end (as Ctrl-D)"),
}
