"""Choosing the next token from logits, with numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from trimkv_edge.errors import ConfigError, StateError

DoubleArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen.

    Attributes:
        temperature: divides the logits; 0 is greedy and switches all filters but the penalty off.
        top_k: keep the k best tokens (and those equal to the k-th); 0 keeps all.
        top_p: keep the smallest set of best tokens whose probability reaches p; 1 keeps all.
        min_p: drop tokens less probable than min_p times the best; 0 keeps all.
        repetition_penalty: above 1, makes tokens that the stream already holds less likely; 1 is off.
        seed: of the random generator; None differs from run to run.

    Raises:
        ConfigError: a value is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        # Written so that NaN fails every check.
        if not 0.0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature is {self.temperature}, but must be 0 (greedy) or more")
        if not isinstance(self.top_k, int) or self.top_k < 0:
            raise ConfigError(f"top-k is {self.top_k}, but must be 0 (off) or a positive whole number")
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"top-p is {self.top_p}, but must be above 0 and at most 1 (off)")
        if not 0.0 <= self.min_p <= 1.0:
            raise ConfigError(f"min-p is {self.min_p}, but must be from 0 (off) to 1")
        if not 0.0 < self.repetition_penalty < float("inf"):
            raise ConfigError(f"repetition penalty is {self.repetition_penalty}, but must be above 0; 1 is off")
        if self.seed is not None and self.seed < 0:
            raise ConfigError(f"seed is {self.seed}, but must be 0 or more")

    @classmethod
    def asked(cls, source: object) -> SamplingParams | None:
        """What attributes of these names say, None standing for not given; None if nothing was given.

        Raises:
            ConfigError: a value is out of range.
        """
        given = {field.name: getattr(source, field.name) for field in fields(cls)}
        given = {name: value for name, value in given.items() if value is not None}
        return cls(**given) if given else None


@dataclass(frozen=True)
class SamplerState:
    """Where a sampler stands: its parameters and the two 128-bit words of its PCG64 generator.

    Raises:
        ConfigError: words that no generator has.
    """

    params: SamplingParams
    state: int
    increment: int

    def __post_init__(self) -> None:
        if not (0 <= self.state < 2**128 and 0 <= self.increment < 2**128 and self.increment % 2):
            raise ConfigError("the state of the random generator is none of PCG64: start a new sampler")


class Sampler:
    """Draws tokens; two samplers with the same parameters and a seed draw the same ones.

    Filters run in the order of transformers: repetition penalty, temperature, top-k, top-p, min-p.
    """

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self._random = np.random.Generator(np.random.PCG64(params.seed))

    @property
    def state(self) -> SamplerState:
        """A copy, from which :meth:`resume` goes on."""
        words = self._random.bit_generator.state["state"]
        return SamplerState(self.params, int(words["state"]), int(words["inc"]))

    @classmethod
    def resume(cls, state: SamplerState) -> Sampler:
        """A sampler that draws what the one with this state would draw next."""
        sampler = cls(state.params)
        # Draws take whole 64-bit words, so nothing else is ever left over.
        words = {"state": state.state, "inc": state.increment}
        sampler._random.bit_generator.state = {"bit_generator": "PCG64", "state": words, "has_uint32": 0, "uinteger": 0}
        return sampler

    def sample(
        self,
        logits: npt.ArrayLike,
        seen: npt.NDArray[np.bool_] | None = None,
        allowed: npt.NDArray[np.bool_] | None = None,
        never: Sequence[int] = (),
    ) -> int:
        """The next token.

        Args:
            logits: ``[vocab_size]``.
            seen: bool ``[vocab_size]``, tokens that the repetition penalty applies to.
            allowed: bool ``[vocab_size]``, tokens to choose from; None: all.
            never: tokens that are not chosen, whatever is allowed.

        Raises:
            StateError: the logits hold NaN or no finite value, or nothing is allowed.
        """
        scores = np.array(logits, dtype=np.float64)
        best = float(scores.max())
        if not np.isfinite(best):  # max() passes NaN on
            raise StateError(f"the model's highest logit is {best}: the artefact or the engine is broken")
        if seen is not None and self.params.repetition_penalty != 1.0:
            scores = penalise(scores, seen, self.params.repetition_penalty)
        if allowed is not None:
            scores[~allowed] = -np.inf
        if never:
            scores[list(never)] = -np.inf
        if (allowed is not None or never) and not np.isfinite(scores.max()):
            raise StateError("no token is allowed to follow: the constraint leaves nothing to choose from")
        if self.params.temperature == 0.0:
            return int(scores.argmax())  # the first, that is lowest, of equal ones
        probabilities = filter_logits(scores, self.params)
        cumulative = probabilities.cumsum()
        # side="right" never lands on a token of probability 0, and the draw is below 1.
        token = int(cumulative.searchsorted(self._random.random() * cumulative[-1], side="right"))
        return min(token, int(probabilities.nonzero()[0][-1]))


def penalise(scores: DoubleArray, seen: npt.NDArray[np.bool_], penalty: float) -> DoubleArray:
    """Makes ``seen`` tokens less likely: positive logits are divided by ``penalty``, negative ones multiplied."""
    return np.where(seen, np.where(scores < 0, scores * penalty, scores / penalty), scores)


def filter_logits(scores: DoubleArray, params: SamplingParams) -> DoubleArray:
    """Probabilities ``[vocab_size]`` after temperature, top-k, top-p and min-p; dropped tokens have 0.

    Equal scores at the border: top-k keeps them all, top-p keeps the lower ids.
    """
    scores = scores / params.temperature
    if 0 < params.top_k < scores.size:
        threshold = np.partition(scores, -params.top_k)[-params.top_k]
        scores = np.where(scores < threshold, -np.inf, scores)
    if params.top_p < 1.0:
        order = np.argsort(-scores, kind="stable")
        ordered = softmax(scores)[order]
        before = np.concatenate([[0.0], ordered.cumsum()[:-1]])
        scores[order[before >= params.top_p]] = -np.inf
    if params.min_p > 0.0:
        likely = softmax(scores)
        scores = np.where(likely < params.min_p * likely.max(), -np.inf, scores)
    return softmax(scores)


def softmax(scores: DoubleArray) -> DoubleArray:
    """Probabilities of float64 scores; ``-inf`` gives 0."""
    weights = np.exp(scores - scores.max())
    result: DoubleArray = weights / weights.sum()
    return result
