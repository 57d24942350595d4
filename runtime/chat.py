"""Chat messages -> prompt text, through the artefact's Jinja template in a sandbox."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from trimkv_edge.errors import ArtefactError, TrimKVError

TEMPLATE_FILE = "chat_template.jinja"


def render_chat(template: str, messages: Sequence[Mapping[str, Any]], tokens: Mapping[str, str] | None = None) -> str:
    """The prompt that asks for the assistant's next message.

    Args:
        template: text of a ``chat_template.jinja``.
        messages: ``{"role": "user", "content": "..."}`` and so on, oldest first; with pictures see :func:`content_of`.
        tokens: special tokens that templates name, such as ``{"bos_token": "<s>"}``.

    Raises:
        ArtefactError: the template is broken or refuses the messages.
        TrimKVError: jinja2 is not installed.
    """
    try:
        from jinja2.exceptions import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise TrimKVError(f"chat needs the jinja2 package ({error}): pip install jinja2") from error

    def refuse(message: str) -> NoReturn:
        raise TemplateError(message)

    # The names and settings that templates written for transformers rely on.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    try:
        compiled = environment.from_string(template)
        return compiled.render(messages=list(messages), add_generation_prompt=True, **(tokens or {}))
    except Exception as error:  # a template is a program: it can fail in any way
        raise ArtefactError(
            f"{TEMPLATE_FILE} fails for these messages ({error}): leave out --chat or repair the template"
        ) from error


def _tojson(value: Any, indent: int | None = None) -> str:
    # Jinja's own filter escapes HTML characters.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def content_of(kinds: Sequence[str], text: str, last: bool = False) -> str | list[dict[str, str]]:
    """The content of a message as templates of models that read pictures expect it; without pictures the plain text.

    Args:
        kinds: of its pictures: ``image`` or ``video``.
        text: its words.
        last: the pictures stand behind the words, not before them.
    """
    if not kinds:
        return text
    pictures, words = [{"type": kind} for kind in kinds], [{"type": "text", "text": text}]
    return words + pictures if last else pictures + words
