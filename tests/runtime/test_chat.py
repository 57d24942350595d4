"""Chat templates in the sandbox."""

from __future__ import annotations

import pytest

from trimkv_edge.errors import ArtefactError
from trimkv_edge.runtime.chat import render_chat

USER = [{"role": "user", "content": "<Hi> é"}]


def test_a_template_gets_messages_tokens_and_the_generation_prompt() -> None:
    template = (
        "{{ bos_token }}\n{%- for m in messages %}\n"
        "  {% if loop.index > 3 %}{% break %}{% endif %}\n"
        "<|{{ m.role }}|>{{ m['content'] | trim }}<|end|>\n{% endfor %}\n"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    assert render_chat(template, USER, {"bos_token": "<s>"}) == "<s><|user|><Hi> é<|end|>\n<|assistant|>"


def test_tojson_keeps_characters() -> None:
    assert render_chat("{{ messages | tojson }}", USER) == '[{"role": "user", "content": "<Hi> é"}]'


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for %}", "Expected an expression|expected token"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[5].content.x }}", "undefined|no element"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe|undefined"),
        ("{% set _ = messages.append(1) %}", "unsafe|not safely callable"),
    ],
)
def test_broken_refusing_and_hostile_templates_are_errors(template: str, message: str) -> None:
    with pytest.raises(ArtefactError, match=message):
        render_chat(template, USER)
