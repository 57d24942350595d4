"""The model ``trimkv`` of lm-evaluation-harness: one stream at a time through a bounded cache."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm import tqdm

from trimkv_edge.errors import ConfigError, ModelError
from trimkv_edge.evaluation.reader import score_token
from trimkv_edge.evaluation.text_model import open_artefact, open_model
from trimkv_edge.policies import POLICIES
from trimkv_edge.policies.base import MASS, WINDOW
from trimkv_edge.runtime.sampling import SamplingParams

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_WHOLE = ("threads", "buffer", "prefill_chunk", "sinks", "recent", "lookahead", "min_per_head")
_LONG = 2048  # tokens of a prompt that gets a progress bar of its own

Tokens = list[int]
Scored = tuple[float, bool]


@dataclass(frozen=True)
class _Generation:
    max_new_tokens: int
    sampling: SamplingParams
    stop_strings: tuple[str, ...]


@register_model("trimkv")
class TrimKVLM(TemplateLM):  # type: ignore[misc]
    """One stream at a time through a bounded cache.

    Args:
        artefact: folder of an export; exclusive with ``model``.
        model: name, hub id or folder of a model for the eager engine.
        seed: of sampling; the n-th sampled request of a run uses ``seed + n``.
        enable_thinking: passed to the chat template.
        batch_size, max_batch_size: 1 or ``auto`` (which is 1): an engine holds one stream.
        device: ``cpu``.
        options: of :func:`~trimkv_edge.evaluation.text_model.open_artefact` or ``open_model``.

    Raises:
        ConfigError: an option is unknown, out of range or cannot be honoured.
        TrimKVError: what was asked for cannot be opened.
    """

    def __init__(
        self,
        artefact: str | None = None,
        model: str | None = None,
        *,
        seed: int = 0,
        enable_thinking: bool | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | str | None = None,
        device: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        _check_whole("seed", seed)
        for name, value in (("batch_size", batch_size), ("max_batch_size", max_batch_size)):
            if str(value) not in ("None", "1", "auto"):
                raise ConfigError(f"{name} is {value}, but an engine holds one stream: use 1")
        if device not in (None, "cpu"):
            raise ConfigError(f"device {device!r} is not supported, engines run on the CPU: give --device cpu")
        if (artefact is None) == (model is None):
            raise ConfigError("give one of artefact=DIR and model=NAME in --model_args")
        if artefact is not None:
            _check_options(open_artefact, "artefact", options)
            self.model = open_artefact(str(artefact), **options)
        else:
            _check_options(open_model, "model", options)
            self.model = open_model(str(model), **options)
        self.session = self.model.session
        self.tokenizer = self.model.hub
        self._name = str(artefact or model)
        self._seed, self._draws = seed, 0
        self._thinking = enable_thinking
        # Any other special tokens would stand between a context and its continuation.
        bos = self.model.bos_id
        self._starts = [bos] if bos is not None and self.model.text.encode("a")[:1] == [bos] else []
        # A saved state does not hold the attention that these policies rank by.
        policy = POLICIES.get(self.model.config.policy)  # an artefact may come from a later version
        self._restorable = policy is None or not policy.reads & {MASS, WINDOW}

    @property
    def eot_token_id(self) -> int:
        return self.model.eos_ids[0] if self.model.eos_ids else self.prefix_token_id

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is replaced by."""
        return self.model.eos_ids[0] if self.model.bos_id is None else self.model.bos_id

    @property
    def max_gen_toks(self) -> int:
        """Where a task does not say."""
        return 256

    @property
    def tokenizer_name(self) -> str:
        return self._name.replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """Cache, engine, weights and gates, for the results file."""
        return self.model.record()

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt of a conversation; without a generation prompt its last message is left open.

        Raises:
            ModelError: there is no template, or it refuses the messages.
        """
        if not self.tokenizer.chat_template:
            raise ModelError(f"{self._name} has no chat template: leave out --apply_chat_template")
        more = {} if self._thinking is None else {"enable_thinking": self._thinking}
        try:
            prompt: str = self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
                **more,
            )
        except Exception as error:  # a template is a program: it can fail in any way
            raise ModelError(f"the chat template of {self._name} fails for these messages ({error})") from error
        return prompt

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> Tokens:
        """Token ids; the begin token comes first where the tokenizer wants it and the text does not bring it."""
        ids = self.model.text.encode(string, add_special_tokens=False)
        bare = add_special_tokens is False or ids[:1] == self._starts
        return ids if bare else [*self._starts, *ids]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], Tokens, Tokens]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[Scored]:
        for (_, continuation), _, tokens in requests:
            if not tokens:
                raise ConfigError(f"the continuation {continuation!r} has no tokens of its own: nothing can be scored")
        groups = [list(group) for _, group in groupby(requests, key=_context if self._restorable else id)]
        total = sum(len(group[0][1]) + sum(len(tokens) - 1 for _, _, tokens in group) for group in groups)
        results: list[Scored] = []
        with tqdm(total=total, desc="loglikelihood", unit="tok", unit_scale=True, disable=disable_tqdm) as bar:
            for group in groups:
                found = self._score(group[0][1], [tokens for _, _, tokens in group], bar.update)
                for (request, _, _), scored in zip(group, found, strict=True):
                    self.cache_hook.add_partial("loglikelihood", request, scored)
                results += found
        return results

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts. Each is one stream, read token by token: no windows, nothing truncated."""
        texts = [self.tok_encode(request.args[0], add_special_tokens=False) for request in requests]
        results: list[float] = []
        with tqdm(
            total=sum(map(len, texts)), desc="loglikelihood", unit="tok", unit_scale=True, disable=disable_tqdm
        ) as bar:
            for request, ids in zip(requests, texts, strict=True):
                results.append(self._score([self.prefix_token_id], [ids], bar.update)[0][0] if ids else 0.0)
                self.cache_hook.add_partial("loglikelihood_rolling", request.args, results[-1])
        return results

    def _score(self, context: Tokens, continuations: Sequence[Tokens], progress: Callable[[int], Any]) -> list[Scored]:
        """Reads ``context`` once; continuations of one token need no step, others start from its saved state."""
        session = self.session
        self._read(context or [self.prefix_token_id], progress)
        after = session.logits
        assert after is not None  # something was fed
        several = sum(len(tokens) > 1 for tokens in continuations) > 1
        saved = session.engine.state() if several else None
        results = []
        for tokens in continuations:
            total, greedy = score_token(after, tokens[0])
            if len(tokens) > 1 and saved is not None:
                session.engine.load_state(saved)
            for read, token in pairwise(tokens):
                session.feed([read])
                assert session.logits is not None
                one, best = score_token(session.logits, token)
                total, greedy = total + one, greedy and best
                progress(1)
            results.append((total, greedy))
        return results

    def _read(self, ids: Tokens, progress: Callable[[int], Any]) -> None:
        done = 0

        def step(read: int, total: int) -> None:
            nonlocal done
            progress(read - done)
            done = read

        self.session.reset()
        self.session.feed(ids, step)

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy or sampled text up to a stop string, an end token or ``max_gen_toks``.

        Raises:
            ConfigError: a generation option is not known or cannot be honoured; nothing was read.
        """
        for request in requests:
            if len(request.args) > 2:
                raise ConfigError(f"task {request.task_name} has images or sound, and this model reads text only")
        plans = [self._plan(request.args[1]) for request in requests]
        # Bars inside the bar only make sense where they can be erased.
        inner: bool | None = True if disable_tqdm else None
        texts = []
        for request, plan in zip(
            tqdm(requests, desc="generate_until", unit="req", disable=disable_tqdm), plans, strict=True
        ):
            ids = self.tok_encode(request.args[0]) or [self.prefix_token_id]
            hidden = True if len(ids) < _LONG else inner
            with tqdm(total=len(ids), desc="prompt", unit="tok", leave=False, disable=hidden) as bar:
                self._read(ids, bar.update)
            pieces = self.session.generate(
                plan.max_new_tokens, plan.sampling, self._stop_ids(plan.stop_strings), plan.stop_strings
            )
            long = tqdm(pieces, total=plan.max_new_tokens, desc="answer", unit="tok", leave=False, disable=inner)
            texts.append("".join(piece.text for piece in long))
            self.cache_hook.add_partial("generate_until", request.args, texts[-1])
        return texts

    def _stop_ids(self, stops: Sequence[str]) -> set[int]:
        """End tokens, and stop strings that are special tokens: those never appear in the text."""
        added = self.tokenizer.get_added_vocab()
        return {*self.model.eos_ids, *(added[stop] for stop in stops if stop in added)}

    def _plan(self, given: dict[str, Any]) -> _Generation:
        options: dict[str, Any] = {**normalize_gen_kwargs(given, self.max_gen_toks)}
        count, stops, sample = options.pop("max_gen_toks"), options.pop("until"), options.pop("do_sample")
        if options.pop("num_beams", 1) != 1:
            raise ConfigError(f"num_beams is {given['num_beams']}, but beam search is not supported: leave it out")
        unknown = sorted(set(options) - set(_SAMPLING))
        if unknown:
            allowed = ", ".join(("until", "max_gen_toks", "do_sample", *_SAMPLING))
            raise ConfigError(f"generation option {unknown[0]!r} is not supported; use {allowed}")
        sampling = {name: value for name, value in options.items() if value is not None}
        seed = None
        if sample:
            # transformers' default, which tasks that only say do_sample rely on
            if sampling.setdefault("temperature", 1.0) == 0:
                raise ConfigError("do_sample with a temperature of 0 is a contradiction: drop one of them")
            seed = self._seed + self._draws
            self._draws += 1
        return _Generation(count, SamplingParams(**sampling, seed=seed), tuple(stop for stop in stops if stop))


def _check_options(opener: Callable[..., Any], what: str, options: dict[str, Any]) -> None:
    allowed = [name for name, p in inspect.signature(opener).parameters.items() if p.kind is p.KEYWORD_ONLY]
    for name, value in options.items():
        if name not in allowed:
            raise ConfigError(f"{name!r} is not an option of {what}=; use some of {', '.join(allowed)}")
        if name in _WHOLE and value is not None:
            _check_whole(name, value)


def _check_whole(name: str, value: object) -> None:
    """model_args are guessed from text, so any type may come."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigError(f"{name} is {value!r}, but must be a whole number of at least 0")


def _context(request: tuple[tuple[str, str], Tokens, Tokens]) -> Tokens:
    return request[1]
