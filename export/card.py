"""The model card of an artefact: ``README.md``, rendered from the manifest alone."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from trimkv_edge.budget import ModelShape, format_bytes, full_cache_bytes
from trimkv_edge.config import POSITION_LIMIT
from trimkv_edge.files import replace_text
from trimkv_edge.manifest import FileInfo, Manifest, file_sha256
from trimkv_edge.models.registry import MODELS
from trimkv_edge.runtime.engines import ENGINES, engines_of

CARD_FILE = "README.md"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
_AT = 32768
_PARITY = {
    "tokens": "tokens in the stream",
    "steps": "model calls",
    "events": "eviction events",
    "survivors": "kept entries compared",
    "survivor_mismatches": "kept entries that differ",
    "undecidable": "kept entries that differ, with scores too close for float32 to rank",
    "greedy_mismatches": "greedy tokens that differ",
    "close": "calls with logits that are equal but for float noise",
    "max_logit_diff": "largest difference of a logit",
    "max_logit": "largest logit",
    "pictures": "pictures encoded and read",
    "max_picture_diff": "largest difference of an encoded number, relative to the largest",
}


def write_card(manifest: Manifest, folder: Path) -> Manifest:
    """Writes ``README.md`` into ``folder`` and returns the manifest that lists it.

    Args:
        manifest: complete: targets verified, the other files listed.
        folder: the artefact that is being made.
    """
    path = folder / CARD_FILE
    replace_text(path, model_card(manifest))
    card = FileInfo(file_sha256(path), path.stat().st_size)
    return replace(manifest, files=dict(sorted({**manifest.files, CARD_FILE: card}.items())))


def base_model(manifest: Manifest) -> str | None:
    """Hub id of the model whose weights the artefact holds; None if it is not known, or the weights are random."""
    model = manifest.model
    if model.random_weights:
        return None
    known = MODELS.get(model.name)
    if known is not None:
        return known.repo or None
    return model.name if _HUB_ID.fullmatch(model.name) else None


def model_card(manifest: Manifest) -> str:
    """Markdown with the hub's metadata header; one text per manifest, before and after it lists the card."""
    model = manifest.model
    sections = [
        [f"# {_short(model.name)} with a KV cache of {format_bytes(manifest.bytes.cache)}"],
        _introduction(manifest),
        ["## Run", "", *_snippets(manifest)],
        ["## What it was made from", "", *_table(("", ""), _sources(manifest))],
        ["## Memory", "", *_table(("", ""), _memory(manifest))],
        ["## Targets", "", *_targets(manifest)],
        ["## Agreement with the eager model", "", *_agreement(manifest)],
        _speed(manifest),
        ["## Limits", "", *[f"- {line}" for line in _limits(manifest)]],
        ["## Made with", "", ", ".join(f"{name} {version}" for name, version in sorted(manifest.tools.items()))],
    ]
    body = "\n\n".join("\n".join(lines) for lines in sections if lines)
    return "\n".join(["---", *_header(manifest), "---", body, ""])


def _header(manifest: Manifest) -> list[str]:
    base = base_model(manifest)
    lines = ["library_name: trimkv-edge"]
    if base:
        # The weights are the base's, and so are their terms.
        lines += [f"base_model: {base}"]
        lines += ["base_model_relation: quantized"] if manifest.quantization != "none" else []
        lines += [
            "license: other",
            "license_name: same-as-base-model",
            f"license_link: https://huggingface.co/{base}",
        ]
    elif manifest.model.source == "shipped":
        lines.append("license: apache-2.0")
    if manifest.tokenizer is not None and not manifest.model.random_weights:
        lines.append(f"pipeline_tag: {'text-generation' if manifest.vision is None else 'image-text-to-text'}")
    return [*lines, "tags:", *(f"- {tag}" for tag in ("trim-kv", "kv-cache", "on-device", *manifest.targets))]


def _introduction(manifest: Manifest) -> list[str]:
    cache = manifest.cache
    lines = [
        f"Reads and writes streams of any length in a fixed amount of memory: each KV head keeps {cache.budget} "
        f"entries {'on average ' if cache.caps else ''}and up to {cache.buffer} new ones. What leaves is chosen by the "
        f"policy `{cache.policy}` of trimkv-edge"
        + (
            "; its retention gates are those of TRIM-KV ([arXiv 2512.03324](https://arxiv.org/abs/2512.03324))."
            if manifest.gates.kind != "none"
            else "."
        )
    ]
    if manifest.model.random_weights:
        lines += ["", "**The weights are random**: good for shapes, memory and speed. The text means nothing."]
    return lines


def needed_engine(manifest: Manifest) -> str | None:
    """What ``--engine`` has to say for the first target to run; None: it may be left out."""
    # ONNX Runtime has bfloat16 for CUDA alone.
    return "onnx:cuda" if next(iter(manifest.targets)) == "onnx" and manifest.dtype == "bfloat16" else None


def _snippets(manifest: Manifest) -> list[str]:
    # An engine's extra has its name.
    lines = ["In the folder that holds this file (from the hub: `hf download OWNER/NAME --local-dir .`):", "", "```sh"]
    if not (runnable := [name for name in engines_of(manifest) if name in ENGINES]):
        compiled = ", ".join(f"`{name}`" for name in manifest.targets)
        return [f"Compiled for {compiled}. Nothing ran it so far; docs/npu.md of trimkv-edge says what its host does."]
    engine = needed_engine(manifest)
    lines.append(f"pip install 'trimkv-edge[{'onnx-gpu' if engine else ','.join(runnable)}]'")
    opened = f'artefact, "{engine}"' if engine else "artefact"
    code = ['artefact = Artefact.load(".")', f"session = Session.open({opened})"]
    if manifest.tokenizer is None:
        lines.append("# there is no tokenizer here: give token ids, from Python")
        code += ["session.feed([1, 2, 3])  # any length", "print([piece.token for piece in session.generate(8)])"]
    else:
        chat = " --chat" if "chat_template.jinja" in manifest.files else ""
        picture = "" if manifest.vision is None else " --image picture.png"
        options = f"{f' --engine {engine}' if engine else ''}{chat}{picture}"
        lines.append(f'trimkv-run .{options} --prompt "What is a gate?" --max-new-tokens 64 --stats text')
        code += [
            'session.feed(artefact.tokenizer.encode("Once upon a time"))  # any length, in any number of parts',
            f"for piece in session.generate(64, stop_ids={manifest.tokenizer.eos_token_ids}):",
            '    print(piece.text, end="", flush=True)',
        ]
    imports = [
        "from trimkv_edge.runtime.artefact import Artefact",
        "from trimkv_edge.runtime.session import Session",
    ]
    return [*lines, "```", "", "```python", *imports, "", *code, "```"]


def _sources(manifest: Manifest) -> Iterable[tuple[str, ...]]:
    model, gates, rope = manifest.model, manifest.gates, manifest.rope
    weights = "random" if model.random_weights else _short(model.source)
    yield "model", f"{_short(model.name)} ({model.family}, {model.parameters / 1e6:.1f} M parameters with gates)"
    yield "weights", f"{weights}, SHA-256 `{model.weights_sha256}`"
    yield (
        "shape",
        f"{model.num_layers} layers, {model.num_attention_heads} heads, {model.num_kv_heads} KV heads, head_dim "
        f"{model.head_dim}, vocabulary {model.vocab_size}",
    )
    if gates.kind == "none":
        yield "gates", "none: the policy needs none"
    else:
        digest = f", SHA-256 `{gates.sha256}`" if gates.sha256 else ""
        yield "gates", f"`{gates.kind}`, {_short(gates.source)}, width {gates.intermediate_size}{digest}"
    if (vision := manifest.vision) is not None:
        side = vision.patch_size
        sizes = [
            f"{across * side} x {down * side} ({rows * columns} rows)"
            for (down, across), (rows, columns) in ((size, vision.rows(size)) for size in vision.sizes)
        ]
        yield "pictures", f"resized to {', '.join(sizes)} pixels, width x height; the encoder computes in float32"
    yield "cache and computation in", manifest.dtype
    embedding = f", embedding in {manifest.embedding_bits} bits" if manifest.embedding_bits else ""
    yield "quantisation", manifest.quantization + embedding
    yield "RoPE", f"`{rope.variant}`, refuses position {rope.position_limit} and beyond"


def _memory(manifest: Manifest) -> Iterable[tuple[str, ...]]:
    cache, model, size = manifest.cache, manifest.model, manifest.bytes
    yield "policy", f"`{cache.policy}`"
    yield "budget", f"{cache.budget} entries per KV head{' on average' if cache.caps else ''}"
    if cache.caps:
        every = [cap for heads in cache.caps for cap in heads]
        yield "caps", f"{min(every)} to {max(every)} entries for a head"
    yield "ring buffer", f"{cache.buffer} new entries between eviction events"
    yield "prefill chunk", f"at most {cache.prefill_chunk} tokens"
    for name in ("sinks", "recent", "min_per_head", "threshold"):
        if value := getattr(cache, name):
            yield name.replace("_", " "), f"{value:g}"
    full = full_cache_bytes(
        ModelShape(model.num_layers, 0, 0, 0, model.num_kv_heads, model.head_dim, 0, 0), _AT, manifest.dtype
    )
    yield "cache, for ever", f"{size.cache:,} bytes ({format_bytes(size.cache)})"
    yield (
        f"a full cache after {_AT:,} tokens",
        f"{full:,} bytes ({format_bytes(full)}): {full / max(1, size.cache):.1f} times as much",
    )
    yield "weights", format_bytes(size.weights)
    yield "a process that runs it", f"about {format_bytes(size.peak)}, and its libraries"


def _targets(manifest: Manifest) -> list[str]:
    rows = [
        (f"`{name}`", f"`{target.ops}`", ", ".join(f"`{file}`" for file in target.files.values()))
        for name, target in manifest.targets.items()
    ]
    files = [
        (f"`{name}`", f"{info.bytes:,}", f"`{info.sha256[:16]}`")
        for name, info in sorted(manifest.files.items())
        if name != CARD_FILE
    ]
    return [
        *_table(("engine", "operators", "files"), rows),
        "",
        *_table(("file", "bytes", "SHA-256 begins"), files),
    ]


def _flat(parity: dict[str, Any]) -> dict[str, Any]:
    """With the rows of what rounds its activations below the others."""
    rows = {key: value for key, value in parity.items() if key != "dynamic"}
    for key, value in parity.get("dynamic", {}).items():
        if key not in ("tokens", "steps", "events", "survivors"):
            rows[f"activations in int8: {_PARITY.get(key, key.replace('_', ' '))}"] = value
    return rows


def _agreement(manifest: Manifest) -> list[str]:
    """One column per target; reports may hold more than the names known here."""
    found = {name: _flat(target.parity) for name, target in manifest.targets.items() if target.parity}
    keys = list(dict.fromkeys(key for parity in found.values() for key in parity))
    if not keys:
        return ["Not verified."]
    same = "of the same weights" if manifest.quantization == "none" else "of the same quantised weights"
    rows = [
        (_PARITY.get(key, key.replace("_", " ")), *(_value(parity.get(key, "-")) for parity in found.values()))
        for key in keys
    ]
    return [
        f"Checked when it was made, against the eager model {same}: both read one stream, and what each keeps at every "
        "event and its greedy token after every call were compared.",
        "",
        *_table(("", *found), rows),
    ]


def _speed(manifest: Manifest) -> list[str]:
    measured = [(name, target.speed) for name, target in manifest.targets.items() if target.speed]
    if not measured:
        return []
    rows = [
        (
            f"`{name}`",
            _value(speed["decode_ms"]),
            _value(speed["event_ms"]) if speed["event_ms"] else "none fell due",
            _value(speed["steps"]),
            _value(speed["entries"]),
            _value(speed["threads"] or "-"),
            speed["device"],
        )
        for name, speed in measured
    ]
    heads = ("engine", "ms per token", "ms per eviction event", "tokens", "entries per head", "threads", "processor")
    return [
        "## Speed",
        "",
        "Medians of one short measurement where it was made, right after verification, decoding with a full cache.",
        "",
        *_table(heads, rows),
    ]


def _limits(manifest: Manifest) -> Iterable[str]:
    model, rope = manifest.model, manifest.rope
    if manifest.gates.kind != "none":
        yield "Gates decide what is kept before they know what will be asked."
    yield (
        f"The model was trained for {model.max_position_embeddings:,} positions; past them the runtime warns once and "
        "goes on."
    )
    if rope.position_limit < POSITION_LIMIT:
        yield f"With the `{rope.variant}` RoPE factors a stream ends at {rope.position_limit:,} tokens."
    else:
        yield f"A stream ends at {rope.position_limit:,} tokens, where float32 angles stop being exact."
    yield "Batch 1, one stream per engine."
    if base_model(manifest):
        yield "The weights come from the base model: its licence and its limits apply."


def _table(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    lines = [heads, ("---",) * len(heads), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in lines]


def _value(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _short(source: str) -> str:
    """A hub id as it is; of a path only the last part, since the rest is nobody's business."""
    return source if _HUB_ID.fullmatch(source) else Path(source).name or source
