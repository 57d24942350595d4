"""Pictures in requests: where they may come from, how many and how large, and what tells one from another."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

from trimkv_edge.budget import format_bytes
from trimkv_edge.errors import ConfigError
from trimkv_edge.manifest import VisionInfo
from trimkv_edge.runtime.picture import PictureLimits, checked_file
from trimkv_edge.runtime.picture_header import PictureError
from trimkv_edge.runtime.server.requests import ImagePart, Message
from trimkv_edge.runtime.vision import PictureReader, Shown

MOST_PICTURES = 32
LIMITS = PictureLimits(file_bytes=8 * 2**20)


class Gallery:
    """The pictures of one request, by their URLs.

    Args:
        reader: of the model; None: a text model.
        files: what each picture's file holds.
    """

    def __init__(self, reader: PictureReader | None = None, files: Mapping[str, bytes] | None = None) -> None:
        self._reader, self._files = reader, dict(files or {})
        self._names = {url: hashlib.sha256(data).hexdigest() for url, data in self._files.items()}
        self._shown: dict[str, Shown] = {}

    def content(self, message: Message) -> str | list[dict[str, str]]:
        """What templates are given."""
        if not message.images:
            return message.text
        return [
            {"type": kind, "text": text} if kind == "text" else {"type": kind} for kind, text in self._parts(message)
        ]

    def shown(self, messages: Sequence[Message]) -> list[Shown]:
        """Their pictures in order, each decoded once.

        Raises:
            PictureError: a damaged file.
        """
        urls = [url for message in messages for url in message.images]
        for url in urls:
            if url not in self._shown:
                assert self._reader is not None  # who made the gallery saw to it
                number = list(self._files).index(url) + 1
                self._shown[url] = self._reader.image(self._files[url], f"image {number}")
        return [self._shown[url] for url in urls]

    def digest(self, messages: Sequence[Message]) -> str:
        """Names a list of messages by what they say and show: the same words about another picture are others."""
        said = [[one.said_by, self._parts(one) if one.images else one.text] for one in messages]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()

    def _parts(self, message: Message) -> list[tuple[str, str]]:
        """``text`` and words, or ``image`` and the sha256 of its file, in order."""
        assert not isinstance(message.content, str)  # it shows images
        return [
            ("image", self._names[part.image_url.url]) if isinstance(part, ImagePart) else ("text", part.text)
            for part in message.content
        ]


class PictureSource:
    """Where requests may take pictures from: themselves, and perhaps one folder.

    Args:
        vision: of the artefact; None: a text model, whose requests show none.
        folder: whose files may be named; None: no files.

    Raises:
        ConfigError: no such folder, or one for a text model.
    """

    def __init__(self, vision: VisionInfo | None = None, folder: Path | None = None) -> None:
        if folder is not None and vision is None:
            raise ConfigError("an image folder is for models that read pictures, and this one reads text only")
        if folder is not None and not folder.is_dir():
            raise ConfigError(f"image folder {folder} does not exist: make it first")
        self._refusal = ""
        if vision is None:
            self._refusal = "this model reads text only: leave images out"
        elif find_spec("PIL") is None:
            self._refusal = "this server has no Pillow to read images with: leave them out"
        self._reader = None if vision is None or self._refusal else PictureReader(vision, LIMITS)
        self._folder = None if folder is None else folder.resolve()

    def gallery(self, messages: Sequence[Message]) -> Gallery:
        """The pictures of a request; those of its newest message are decoded, which takes a moment.

        Raises:
            ConfigError: a text model, too many, or a URL that is not served.
            PictureError: no picture, damaged or too large.
        """
        urls = list(dict.fromkeys(url for message in messages for url in message.images))
        if not urls:
            return Gallery()
        if self._reader is None:
            raise ConfigError(self._refusal)
        if len(urls) > MOST_PICTURES:
            raise ConfigError(f"{len(urls)} images in one request, but at most {MOST_PICTURES} are read: send fewer")
        files: dict[str, bytes] = {}
        for number, url in enumerate(urls, 1):
            try:
                files[url], _ = checked_file(self._fetched(url), LIMITS)
            except PictureError as error:
                raise PictureError(f"image {number} {error}") from error
        gallery = Gallery(self._reader, files)
        gallery.shown(messages[-1:])
        return gallery

    def _fetched(self, url: str) -> bytes | Path:
        scheme, _, rest = url.partition(":") if ":" in url else ("", "", url)
        scheme = scheme.lower()
        if scheme == "data":
            return _decoded(rest)
        if scheme in ("http", "https"):
            raise PictureError("lies on another server, and nothing is fetched from there: send a data: URL")
        if scheme not in ("", "file"):
            raise PictureError(f"has a URL of kind {scheme[:20]!r}: send a data: URL")
        if self._folder is None:
            raise PictureError("is a file, and this server was started without --image-folder: send a data: URL")
        return _inside(self._folder, url, scheme)


def _decoded(rest: str) -> bytes:
    """What stands behind ``data:``."""
    head, comma, data = rest.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise PictureError("has a data: URL of another form than data:image/png;base64,...")
    if len(data) // 4 * 3 > LIMITS.file_bytes + 3:
        raise PictureError(f"is larger than {format_bytes(LIMITS.file_bytes)}: make it smaller")
    try:
        return base64.b64decode(data, validate=True)
    except ValueError as error:
        raise PictureError("has a data: URL that is not base64") from error


def _inside(folder: Path, url: str, scheme: str) -> Path:
    """The file that a URL or path means, behind all links."""
    try:
        parts = urlsplit(url)
        if scheme and parts.netloc not in ("", "localhost"):
            raise PictureError("lies on another server: send a data: URL")
        path = (folder / (unquote(parts.path) if scheme else url)).resolve()
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, PictureError):
            raise
        raise PictureError("has a path that is none") from error
    if not path.is_relative_to(folder):
        raise PictureError("lies outside the folder of --image-folder")
    return path
