"""The model card that lies beside trained gates."""

from __future__ import annotations

from typing import Any


def model_card(info: dict[str, Any]) -> str:
    """Markdown with the hub's metadata header.

    Args:
        info: what `gates.json` holds: see :func:`trimkv_edge.training.finish.gate_info`.
    """
    base, training = info["base_model"], info["training"]
    settings = {
        "kind": info["kind"],
        "gate width": info["intermediate_size"],
        "budget M per KV head": info["memory"],
        "capacity": f"{training['scope']}, {training['capacity_form']} form, weight {training['capacity_weight']}",
        "data": ", ".join(training["data"]),
        "rows in the data": training["data_rows"],
        "tokens per row": training["length"],
        "rows per step": training["batch"],
        "steps": info["steps"],
        "learning rate": f"{training['lr']} to {training['min_lr']}, warm-up {training['warmup']:.0%} of the steps",
        "weight decay": training["weight_decay"],
        "base in": training["dtype"],
        "seed": training["seed"],
    }
    rows = [f"| {name} | {value} |" for name, value in settings.items()]
    measured = [
        f"| {where} | {values['ce']:.4f} | {values['kl']:.4f} | {values['capacity']:.4f} |"
        for where, values in (("training, end", info["metrics"]), ("held out", info.get("eval_metrics")))
        if values
    ]
    named = "/" in base and not base.startswith((".", "/"))
    header = ["---", *([f"base_model: {base}"] if named else []), "library_name: trimkv-edge", "tags:", "- trim-kv"]
    return "\n".join(
        [
            *header,
            "- kv-cache",
            "---",
            f"# Retention gates for {base}",
            "",
            f"`{info['kind']}` gates, trained with trimkv-edge on the frozen base. They decide which entries of the KV "
            "cache stay when it is full (TRIM-KV, [arXiv 2512.03324](https://arxiv.org/abs/2512.03324)"
            + (
                "; DBTrimKV, [arXiv 2605.09649](https://arxiv.org/abs/2605.09649))." if info["kind"] == "rg10" else ")."
            ),
            "",
            f"Base weights: SHA-256 `{info['base_sha256']}`. Other weights need other gates.",
            "",
            "## Use",
            "",
            "```sh",
            f"trimkv-export --model {base} --gates gates.safetensors --budget {max(1, round(info['memory']))}",
            "```",
            "",
            "## Training",
            "",
            "| setting | value |",
            "|---|---|",
            *rows,
            "",
            "Cross-entropy and KL (to the vanilla pass of the same weights) in nats per weighted token.",
            "",
            "| rows | cross-entropy | KL | capacity |",
            "|---|---|---|---|",
            *measured,
            "",
        ]
    )
