"""Token streams to calibrate on, and others to check the caps on, which share no text."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trimkv_edge.errors import ConfigError
from trimkv_edge.evaluation.samples import SampleWriter
from trimkv_edge.evaluation.tasks import TASKS
from trimkv_edge.evaluation.words import WORDS
from trimkv_edge.models.mixed_sample import MixedSample
from trimkv_edge.models.source import ModelSource
from trimkv_edge.models.tiny.corpus import stdlib_texts
from trimkv_edge.runtime.chat import TEMPLATE_FILE, render_chat
from trimkv_edge.runtime.tokenizer import TOKENIZER_FILE, TextTokenizer
from trimkv_edge.training.records import Record, local_records

_CONVERSATIONS = ("multi-query", "updates", "dialogue")
Ids = list[int]
Stream = Ids | MixedSample


@dataclass(frozen=True)
class StreamPlan:
    """How much to read.

    Attributes:
        length: tokens of each stream.
        count: streams that the caps are made from.
        held_out: streams that they are checked on.
        seed: of places, facts and random tokens.

    Raises:
        ConfigError: a number is out of range.
    """

    length: int
    count: int = 8
    held_out: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in (("length", 2), ("count", 1), ("held_out", 1), ("seed", 0)):
            if getattr(self, name) < low:
                raise ConfigError(f"{name.replace('_', ' ')} of streams is {getattr(self, name)}, but must be >= {low}")


@dataclass(frozen=True)
class Streams:
    """Streams of equal length: to make caps from, and to check them on; and where they are from, in words."""

    calibration: Sequence[Stream]
    held_out: Sequence[Stream]
    text: str


def tokens_of(stream: Stream) -> Ids:
    """Token ids of a stream, placeholders of pictures among them."""
    return stream.tokens if isinstance(stream, MixedSample) else stream


def has_tokenizer(source: ModelSource) -> bool:
    """Whether the model reads words at all; random weights of a known shape do not."""
    return source.folder is not None and (source.folder / TOKENIZER_FILE).is_file()


def sample_streams(source: ModelSource, plan: StreamPlan) -> Streams:
    """What needs no files: by turns a conversation of the evaluation tasks with text between, and plain text (Python's
    standard library; files that the shipped model was not trained on). Calibration and held-out streams take their text
    from different files and their facts from different seeds. A model without a tokenizer gets random tokens.

    Raises:
        ConfigError: the streams are too short for a conversation.
        ModelError: weights without a tokenizer.
    """
    if source.folder is None or (source.random_weights and not has_tokenizer(source)):
        rng = random.Random(f"calibration {plan.seed}")
        every = [rng.choices(range(source.config.vocab_size), k=plan.length) for _ in range(plan.count + plan.held_out)]
        return Streams(every[: plan.count], every[plan.count :], f"random tokens (seed {plan.seed})")
    texts = stdlib_texts(held_out=True)
    parts = []
    for name, count, part in (("calibration", plan.count, texts[0::2]), ("held-out", plan.held_out, texts[1::2])):
        writer = SampleWriter(source.folder, WORDS, part)
        writer.set_special(_special_ids(source))
        parts.append([_sample(writer, plan, name, number) for number in range(count)])
    return Streams(parts[0], parts[1], f"sample: conversations and Python sources (seed {plan.seed})")


def _sample(writer: SampleWriter, plan: StreamPlan, part: str, number: int) -> Ids:
    rng = random.Random(f"{part} {plan.seed} {number}")
    if number % 2:
        return writer.filler(rng, plan.length)
    write = TASKS[_CONVERSATIONS[number // 2 % len(_CONVERSATIONS)]].write
    assert write is not None
    return list(writer.conversation(rng, write(rng, writer.words), plan.length).ids)


def text_streams(source: ModelSource, paths: Sequence[Path], plan: StreamPlan) -> Streams:
    """Streams of the user's own text: ``.txt`` and ``.jsonl`` files or folders of them, see
    :func:`~trimkv_edge.training.records.local_records`. Its end is held out; streams are spread evenly over each part
    and do not overlap.

    Raises:
        ConfigError: a file cannot be used, or there is too little text.
        ModelError: the model has no tokenizer.
    """
    if source.folder is None or not has_tokenizer(source):
        raise ConfigError(
            f"--text needs a tokenizer, and {source.name} has none: leave out --text, or give --weights DIR"
        )
    tokenizer = TextTokenizer(source.folder / TOKENIZER_FILE)
    template = source.folder / TEMPLATE_FILE
    special = {name: tokenizer.token(token) for name, token in _special_ids(source).items()}
    ids: Ids = []
    for path in paths:
        for record in local_records(path):
            ids += _encode(record, tokenizer, template, special)
    count = plan.count + plan.held_out
    if len(ids) < count * plan.length:
        raise ConfigError(
            f"the text has {len(ids)} tokens, but {plan.count} + {plan.held_out} held-out streams of {plan.length} "
            f"take {count * plan.length}: give more --text, or lower --streams or --tokens"
        )
    split = len(ids) * plan.count // count
    names = ", ".join(path.name or str(path) for path in paths)
    return Streams(_spread(ids[:split], plan.count, plan), _spread(ids[split:], plan.held_out, plan), names)


def _spread(ids: Ids, count: int, plan: StreamPlan) -> list[Ids]:
    starts = [number * len(ids) // count for number in range(count)]
    return [ids[start : start + plan.length] for start in starts]


def _encode(record: Record, tokenizer: TextTokenizer, template: Path, special: dict[str, str]) -> Ids:
    if record.kind == "rows":
        high = max(record.value.ids, default=0)
        if high >= tokenizer.vocab_size or min(record.value.ids, default=0) < 0:
            raise ConfigError(f"{record.where} has token ids outside the {tokenizer.vocab_size} of this model")
        return list(record.value.ids)
    if record.kind == "chat":
        if not template.is_file():
            raise ConfigError(f"{record.where} is a chat, but the model has no {TEMPLATE_FILE}: give plain text")
        text = render_chat(template.read_text(encoding="utf-8"), record.value, special)
    else:
        text = record.value
    return tokenizer.encode(text, add_special_tokens=False)


def _special_ids(source: ModelSource) -> dict[str, int]:
    tokens = {name: getattr(source.config, f"{name}_id", None) for name in ("bos_token", "eos_token")}
    return {name: token for name, token in tokens.items() if isinstance(token, int)}
