"""Exports of small models of random weights, as a user would ask for them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from trimkv_edge.export.pipeline import ExportRequest


def request_for(model: Path, output: Path, **more: Any) -> ExportRequest:
    """16 entries per head, events every 8 tokens; ``model`` is a folder with a ``config.json``."""
    base = ExportRequest(str(model), output, "16", buffer=8, prefill_chunk=8, random_weights=True)
    return replace(base, **more)
