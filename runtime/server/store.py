"""Chats on disk, while no session has room for them and while the server is off."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import NamedTuple

from trimkv_edge.errors import ConfigError, TrimKVError
from trimkv_edge.runtime.session import Session

_LOG = logging.getLogger(__name__)
_SUFFIX = ".session"


class Chat(NamedTuple):
    """A chat that a cache holds: its id if the client gave one, and the digest of its messages, answers included."""

    conversation: str | None
    known: str


class Store:
    """A folder of saved sessions, at most ``limit`` of them; the oldest go first.

    A chat's file is named by its id and its messages, so what is found is what goes on; ids are hashed, since they are
    the clients' own text. Only the user who runs the server may read the folder. One server at a time may use it.

    Args:
        folder: made if it is missing.
        limit: most files.

    Raises:
        ConfigError: a limit below 1.
        OSError: the folder cannot be made.
    """

    def __init__(self, folder: Path, limit: int = 64) -> None:
        if limit < 1:
            raise ConfigError(f"at most {limit} saved sessions were asked for, but at least 1 is needed")
        self.folder, self.limit = folder, limit
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def save(self, session: Session, chat: Chat) -> None:
        """Writes a chat; a failure is logged, since the chat can be read again from its messages."""
        try:
            session.save(self._path(chat))
        except (TrimKVError, OSError) as error:
            _LOG.warning("a session was not saved: %s", error)
            return
        for path in self.files()[self.limit :]:
            path.unlink(missing_ok=True)

    def load(self, session: Session, chat: Chat) -> bool:
        """Goes on from a chat's file, which is then gone; False if there is none that fits."""
        path = self._path(chat)
        if not path.is_file():
            return False
        try:
            session.load(path)
        except TrimKVError as error:
            _LOG.warning("a saved session is left out: %s", error)
            return False
        finally:
            path.unlink(missing_ok=True)
        return True

    def files(self) -> list[Path]:
        """All saved sessions, the newest first."""
        return sorted(self.folder.glob(f"*{_SUFFIX}"), key=lambda path: path.stat().st_mtime_ns, reverse=True)

    def _path(self, chat: Chat) -> Path:
        name = "anonymous" if chat.conversation is None else hashlib.sha256(chat.conversation.encode()).hexdigest()[:32]
        return self.folder / f"{name}.{chat.known[:32]}{_SUFFIX}"
