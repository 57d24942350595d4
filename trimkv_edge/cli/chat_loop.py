"""The loop of ``trimkv-chat``: reads a line, answers it or does what it commands."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from prompt_toolkit import PromptSession
from prompt_toolkit.formatted_text import HTML
from rich.console import Console
from rich.text import Text

from trimkv_edge.budget import format_bytes
from trimkv_edge.cli.common import one_line
from trimkv_edge.errors import ConfigError, PositionLimitError, TrimKVError
from trimkv_edge.pictures import IMAGE
from trimkv_edge.runtime.conversation import Conversation
from trimkv_edge.runtime.kept import held_tokens
from trimkv_edge.runtime.sampling import SamplingParams
from trimkv_edge.runtime.vision import PictureReader, Shown

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
        reader: of the model's pictures, made when it is needed first; raises what tells why there is none.
        video: frames for a second and most frames of a video.
        pictures_last: they stand behind the words of their message.
    """

    def __init__(
        self,
        conversation: Conversation,
        sampling: SamplingParams,
        max_new_tokens: int,
        stops: list[str],
        reader: Callable[[], PictureReader],
        video: tuple[float, int],
        pictures_last: bool = False,
    ) -> None:
        self.talk = conversation
        self._sampling, self._count, self._stops = sampling, max_new_tokens, stops
        self._reader, self._video, self._last = reader, video, pictures_last
        self._shown: list[Shown] = []  # with the next message
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
            pieces = self.talk.ask(text, self._count, self._sampling, self._stops, self._shown, self._last)
            self._shown = []  # a message that was not read may be sent again with them
            for piece in pieces:
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
            self._note(f"/{name} {command.takes}".ljust(17) + command.help)

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

    def image(self, files: str) -> None:
        self._show([self._reader().image(Path(name)) for name in _names(files, "/image")])

    def video(self, path: str) -> None:
        fps, most = self._video
        self._show([self._reader().video(Path(name), fps, most) for name in _names(path, "/video")])

    def _show(self, shown: list[Shown]) -> None:
        self._shown += shown
        images = sum(one.kind == IMAGE for one in self._shown)
        videos = len(self._shown) - images
        rows = sum(one.rows * one.groups for one in self._shown)
        self._note(f"with the next message: {images} images, {videos} videos, {rows:,} tokens (/drop forgets them)")

    def drop(self, _: str) -> None:
        self._shown = []
        self._note("no pictures with the next message")

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
        self._announced, self._shown = False, []
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


def _names(text: str, command: str) -> list[str]:
    """Words as in a shell, so that names may have spaces."""
    try:
        names = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"{command} {text}: a quotation mark is not closed") from error
    if not names:
        raise ConfigError(f"{command} needs a file name")
    return names


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
    "image": _Command(ChatLoop.image, "FILE ...", "show images with the next message"),
    "video": _Command(ChatLoop.video, "PATH", "show a folder of frames or an animation with the next message"),
    "drop": _Command(ChatLoop.drop, "", "show no pictures with the next message"),
    "undo": _Command(ChatLoop.undo, "[N]", "take back the last turn, or N turns"),
    "save": _Command(ChatLoop.save, "FILE", "write this chat to a file"),
    "load": _Command(ChatLoop.load, "FILE", "go on with a chat from a file"),
    "reset": _Command(ChatLoop.reset, "", "start a new chat with an empty cache"),
    "exit": _Command(ChatLoop.exit, "", "end (as Ctrl-D)"),
}
