"""What a finished training leaves: gates, what they are, and their card; and how they get to the hub."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from trimkv_edge.errors import ModelError
from trimkv_edge.files import replace_durably, sync
from trimkv_edge.training.card import model_card
from trimkv_edge.training.config import TrainConfig
from trimkv_edge.training.rows import Rows

GATES, INFO, CARD = "gates.safetensors", "gates.json", "README.md"


def gate_info(
    config: TrainConfig,
    base: Any,
    base_model: str,
    base_sha256: str,
    rows: Rows,
    data: tuple[str, ...],
    processes: int,
    metrics: dict[str, float],
    eval_metrics: dict[str, float] | None,
) -> dict[str, Any]:
    """What `gates.json` says.

    Args:
        config: settings.
        base: the base's transformers configuration.
        base_model, base_sha256: name and hash of the base weights.
        rows, data: what it was trained on.
        processes: how many trained it.
        metrics, eval_metrics: losses at the end, on training and on held-out rows.
    """
    training = config.fixed(processes)
    for name in ("kind", "memory", "intermediate_size", "steps"):
        del training[name]
    info = {
        "kind": config.kind,
        "intermediate_size": config.intermediate_size,
        "hidden_act": base.hidden_act,
        "num_layers": base.num_hidden_layers,
        "num_kv_heads": base.num_key_value_heads,
        "hidden_size": base.hidden_size,
        "base_model": base_model,
        "base_sha256": base_sha256,
        "memory": config.memory,
        "steps": config.steps,
        "training": {**training, "data": list(data), "data_rows": len(rows), "data_sha256": rows.sha256()},
        "metrics": metrics,
    }
    return info if eval_metrics is None else {**info, "eval_metrics": eval_metrics}


def write_gates(
    output: Path,
    gates: nn.ModuleList,
    info: dict[str, Any],
    save: Callable[[nn.ModuleList, Path, dict[str, Any]], None],
) -> None:
    """Writes gates, JSON and card: each beside, then renamed.

    Args:
        output: folder.
        gates: on any device.
        info: from `gate_info`.
        save: `trimkv_edge.models.gates.save_gates`; writes the file and its JSON.
    """
    beside = output / f".partial-{GATES}"
    save(gates.cpu(), beside, info)
    for made, name in ((beside, GATES), (beside.with_suffix(".json"), INFO)):
        sync(made)
        os.replace(made, output / name)
    replace_durably(output / CARD, lambda beside: beside.write_text(model_card(info), encoding="utf-8"))


def push_to_hub(output: Path, repo: str) -> str:
    """Uploads gates, JSON and card; returns where they are.

    Raises:
        ModelError: offline, not logged in, or refused; the files stay in `output`.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repo, exist_ok=True)
        api.upload_folder(
            repo_id=repo, folder_path=output, allow_patterns=[GATES, INFO, CARD], commit_message="Retention gates"
        )
    except Exception as error:  # the hub client's transport errors share no base class
        detail = " ".join(str(error).split())[:200]
        raise ModelError(
            f"the gates are in {output}, but could not be pushed to {repo!r} ({type(error).__name__}: {detail}): "
            f"check the connection and `hf auth login`, then run: hf upload {repo} {output} "
            f"--include {GATES} --include {INFO} --include {CARD}"
        ) from error
    return f"https://huggingface.co/{repo}"
