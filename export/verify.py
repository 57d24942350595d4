"""The last step of every export: the artefact must keep the same survivors and give the same greedy tokens as eager."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from trimkv_edge.config import CacheConfig
from trimkv_edge.engine import CacheState, Engine, IntArray
from trimkv_edge.errors import VerificationError
from trimkv_edge.eviction import find_policy, score_entries
from trimkv_edge.mixed_engine import MixedEngine
from trimkv_edge.policies.base import HEAD, LAYER, MODEL, Entries

MIN_EVENTS = 5
# Encoders stay in float32 whatever the decoder is rounded to; they differ in the order of their sums.
PICTURE_REL = 1e-4
Key = tuple[int, int, int]  # layer, KV head, position


@dataclass(frozen=True)
class Tolerance:
    """See ``tolerances.yaml``; the shares are of survivors and of greedy tokens that may differ.

    Attributes:
        close_abs: as ``logits_abs``, for a call that counts as close; None: calls are not told apart.
        close_share: of calls that have to be close and come with the artefact's own cache.
    """

    logits_abs: float
    score_rel: float
    survivors_share: float = 0.0
    greedy_share: float = 0.0
    close_abs: float | None = None
    close_share: float = 0.0


@dataclass
class ParityReport:
    """What was compared and how it came out; goes into the manifest.

    Attributes:
        tokens, steps, events: length of the stream, model calls, eviction events.
        survivors: kept entries compared, over all events, layers and heads.
        survivor_mismatches: entries that only one side kept, without a float32 excuse.
        undecidable: entries that only one side kept because their scores are equal within ``score_rel``.
        greedy_mismatches: calls whose greedy token differs.
        max_logit_diff: largest absolute difference of a logit; max_logit: largest absolute logit.
        close: calls with close logits that came with the artefact's own cache; None: calls were not told apart.
        pictures: that were encoded and read; None: the model reads text only.
        max_picture_diff: largest difference of a number that an encoder gave, relative to its largest one.
    """

    tokens: int = 0
    steps: int = 0
    events: int = 0
    survivors: int = 0
    survivor_mismatches: int = 0
    undecidable: int = 0
    greedy_mismatches: int = 0
    max_logit_diff: float = 0.0
    max_logit: float = 0.0
    close: int | None = None
    pictures: int | None = None
    max_picture_diff: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


def load_tolerance(row: str) -> Tolerance:
    """A row of ``tolerances.yaml``: a dtype, or ``dynamic`` for activations rounded to int8."""
    table = yaml.safe_load((Path(__file__).parent / "tolerances.yaml").read_text(encoding="utf-8"))
    return Tolerance(**table[row])


def stream_plan(
    budget: int, buffer: int, chunk: int, events: int = MIN_EVENTS, pooled: bool = False, singles: int | None = None
) -> list[int]:
    """Chunk lengths of a verification stream: full and odd prefill chunks, then one token at a time.

    Prefill (chunks of ``chunk`` and of other lengths, cut at each event) up to the second event of a full cache, then
    single tokens until ``events`` of them have run, and half a ring more.

    Args:
        pooled: heads share the budget, so there are events before the cache is full.
        singles: for large models: prefill up to the last event, then so many single tokens.
    """
    plan: list[int] = []
    seen = 0
    odd = [chunk, max(1, chunk // 3), max(1, chunk // 2)]
    while seen < budget + (2 if singles is None else events) * buffer:
        due = buffer - (seen - budget) % buffer
        if not pooled and seen < budget + buffer:
            due = budget + buffer - seen
        plan.append(min(odd[len(plan) % 3], due))
        seen += plan[-1]
    if singles is not None:
        return plan + [1] * singles
    return plan + [1] * ((events - 2) * buffer + max(1, buffer // 2))


def compare(
    reference: Engine,
    artefact: Engine,
    tokens: Sequence[int],
    plan: Sequence[int],
    score_rel: float,
    progress: Callable[[int], None] | None = None,
    *,
    scripted: bool = False,
    close_abs: float | None = None,
    show: Callable[[Engine], None] | None = None,
) -> ParityReport:
    """Drives both engines over one stream from an empty cache.

    The chunks of ``plan`` longer than 1 come from ``tokens``; single steps are fed the reference's greedy token, so
    that a late difference is not the echo of an early one. After an event that came out differently the artefact takes
    over the reference's state.

    Args:
        reference, artefact: engines of the same model and settings.
        tokens: at least as many as the plan's leading chunks hold.
        plan: see :func:`stream_plan`.
        score_rel: see ``tolerances.yaml``.
        progress: called with the number of tokens of each call.
        scripted: single steps come from ``tokens`` too.
        close_abs: after a call whose logits are not this close the artefact takes over the reference's state too, so
            that one rounding that went the other way does not blur what follows. See :class:`Tolerance`.
        show: gives an engine the pictures of the stream before it begins.
    """
    report = ParityReport(close=None if close_abs is None else 0)
    own = True
    for engine in (reference, artefact):
        engine.reset()
        if show:
            show(engine)
    if isinstance(reference, MixedEngine) and isinstance(artefact, MixedEngine):
        _compare_pictures(reference, artefact, report)
    feed = iter(tokens)
    greedy = 0
    for size in plan:
        ids = [next(feed) for _ in range(size)] if scripted or size > 1 or not report.steps else [greedy]
        want, got = reference.prefill(ids), artefact.prefill(ids)
        greedy = int(want.argmax())
        report.tokens += size
        report.steps += 1
        report.greedy_mismatches += int(got.argmax() != greedy)
        # Not Python's max, which drops NaN.
        report.max_logit_diff = float(np.maximum(report.max_logit_diff, np.abs(want - got).max()))
        largest = float(np.abs(want).max())
        report.max_logit = max(report.max_logit, largest)
        if reference.room == 0:
            _compare_event(reference, artefact, score_rel, report)
        if close_abs is not None and report.close is not None:
            close = float(np.abs(want - got).max()) <= close_abs * max(1.0, largest)
            report.close += int(close and own)
            own = close
            if not close:
                artefact.load_state(reference.state())
        if progress:
            progress(size)
    return report


def check(report: ParityReport, tolerance: Tolerance, what: str) -> None:
    """Raises :class:`VerificationError` if the report is not good enough to ship."""
    limit = tolerance.logits_abs * max(1.0, report.max_logit)
    faults = []
    if report.survivor_mismatches > tolerance.survivors_share * report.survivors:
        faults.append(f"{report.survivor_mismatches} of {report.survivors} survivors differ")
    if report.greedy_mismatches > tolerance.greedy_share * report.steps:
        faults.append(f"{report.greedy_mismatches} of {report.steps} greedy tokens differ")
    if not report.max_logit_diff <= limit:
        faults.append(f"logits differ by {report.max_logit_diff:.2e}, allowed {limit:.2e}")
    if report.close is not None and report.close < tolerance.close_share * report.steps:
        faults.append(f"logits of only {report.close} of {report.steps} calls are close")
    if report.max_picture_diff is not None and not report.max_picture_diff <= PICTURE_REL:
        faults.append(f"pictures differ by {report.max_picture_diff:.2e}, allowed {PICTURE_REL:.0e}")
    if report.events < MIN_EVENTS:
        faults.append(f"only {report.events} eviction events were compared, {MIN_EVENTS} are needed")
    if faults:
        raise VerificationError(f"{what} does not agree with the eager model: {'; '.join(faults)}; nothing was written")


def _compare_pictures(reference: MixedEngine, artefact: MixedEngine, report: ParityReport) -> None:
    report.pictures, report.max_picture_diff = len(reference.waiting), 0.0
    for want, got in zip(reference.waiting, artefact.waiting, strict=True):
        for one, other in ((want.embeddings, got.embeddings), (want.deepstack, got.deepstack)):
            if one.size:
                off = float(np.abs(one - other).max() / max(1e-6, np.abs(one).max()))
                report.max_picture_diff = float(np.maximum(report.max_picture_diff, off))


def compare_survivors(
    before: CacheState, config: CacheConfig, want: IntArray, got: IntArray, score_rel: float
) -> tuple[int, int]:
    """Compares what two engines kept at one event.

    Args:
        before: the reference's state just before the event.
        config: cache settings.
        want, got: positions kept, int64 ``[layers, kv_heads, most]``, in any order; negative numbers are padding.
        score_rel: see ``tolerances.yaml``.

    Returns:
        (mismatches, undecidable): entries that only one side kept, and those of them whose scores float32 cannot rank.
    """
    mismatches = undecidable = 0
    scores: dict[Key, float] | None = None
    policy = find_policy(config.policy)
    one, other = _groups(want, policy.scope), _groups(got, policy.scope)
    for group in one:
        lost, extra = one[group] - other[group], other[group] - one[group]
        if lost or extra:
            scores = _scores(before, config) if scores is None else scores
            count = _too_close(scores, lost, extra, score_rel, policy.scale)
            undecidable += count
            mismatches += max(len(lost), len(extra)) - count
    return mismatches, undecidable


def _groups(positions: IntArray, scope: str) -> dict[tuple[int, ...], set[Key]]:
    """Entries by what competes for one budget: each head, each layer, or all."""
    depth = {HEAD: 2, LAYER: 1, MODEL: 0}[scope]
    found: dict[tuple[int, ...], set[Key]] = {}
    for where in np.ndindex(*positions.shape[:2]):
        held = found.setdefault(where[:depth], set())
        held.update((*where, position) for position in positions[where].tolist() if position >= 0)
    return found


def _compare_event(reference: Engine, artefact: Engine, score_rel: float, report: ParityReport) -> None:
    before = _scored_part(reference.state(), reference.config)
    reference.evict()
    artefact.evict()
    want = reference.survivors()
    mismatches, undecidable = compare_survivors(before, reference.config, want, artefact.survivors(), score_rel)
    # Where heads share a budget, nothing leaves before the cache is full.
    held = int((want >= 0).sum())
    report.events += int(before.count > held)
    report.survivors += held
    report.survivor_mismatches += mismatches
    report.undecidable += undecidable
    if mismatches or undecidable:
        artefact.load_state(reference.state())


def _scored_part(state: CacheState, config: CacheConfig) -> CacheState:
    """Without the tables that no score looks at, which are hundreds of MB in large models."""
    nothing = np.broadcast_to(np.float32(0), state.key.shape)
    return replace(state, key=state.key if find_policy(config.policy).key_score else nothing, value=nothing)


def _scores(state: CacheState, config: CacheConfig) -> dict[Key, float]:
    """The policy's scores of all entries."""
    layers, heads = state.log_beta.shape[:2]
    log_beta, positions = (torch.from_numpy(x).flatten(0, 1) for x in (state.log_beta, state.positions))
    score = find_policy(config.policy).key_score
    key_score = score(torch.from_numpy(state.key).flatten(0, 1)) if score else None
    entries = Entries(log_beta, positions, state.seen, layers, heads, key_score=key_score)
    table = score_entries(entries, config).view(layers, heads, -1).tolist()
    return {
        (layer, head, int(position)): table[layer][head][slot]
        for (layer, head, slot), position in np.ndenumerate(state.positions)
    }


def _too_close(scores: dict[Key, float], lost: set[Key], extra: set[Key], score_rel: float, scale: float | None) -> int:
    """How many swapped pairs of one group have scores that float32 noise can reorder."""
    if len(lost) != len(extra) or not extra <= scores.keys():
        return 0
    pairs = zip(sorted(scores[key] for key in lost), sorted(scores[key] for key in extra), strict=True)
    return sum(0 < abs(a - b) <= score_rel * (max(abs(a), abs(b)) if scale is None else scale) for a, b in pairs)
