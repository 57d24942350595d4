"""A decode step that fails after its work is done, shared by tests of engines on a device."""

from __future__ import annotations

from typing import Any

import pytest


def decode_and_fail(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads a token; the step runs, and then raises."""
    decode = engine.graphs.decode

    def fails() -> None:
        decode()
        raise RuntimeError("after the step")

    with monkeypatch.context() as patch:
        patch.setattr(engine.graphs, "decode", fails)
        with pytest.raises(RuntimeError, match="after the step"):
            engine.decode(5)
