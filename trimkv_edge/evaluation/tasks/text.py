"""Perplexity on plain text."""

from __future__ import annotations

from trimkv_edge.evaluation.tasks.base import Task

TEXT = Task("text", "next-token loss on plain text (nats per token, bits per byte)", None)
