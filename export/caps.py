"""Where the caps of a shared budget come from: a file of ``trimkv-calibrate``, or a calibration at export."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

from trimkv_edge.budget import ModelShape, cache_bytes, format_bytes, parse_size
from trimkv_edge.caps import Calibration, load_calibration
from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import BudgetError, ConfigError
from trimkv_edge.eviction import check_caps
from trimkv_edge.manifest import VisionInfo
from trimkv_edge.models.loading import LoadedModel
from trimkv_edge.models.source import ModelSource

AUTO = "auto"
_TRIES = 6
_RANDOM_TARGET = 0.9


def caps_from_file(path: Path, config: CacheConfig, source: ModelSource) -> Calibration:
    """The calibration of a file, if it was made for these settings and this model.

    Raises:
        ConfigError: no such file, or it is for other settings, another shape or other weights.
    """
    found = load_calibration(path)
    made = replace(found.cache, caps=None)
    for field in fields(CacheConfig):
        want, have = getattr(config, field.name), getattr(made, field.name)
        if want != have:
            option = "--" + field.name.replace("_", "-")
            raise ConfigError(
                f"caps file {path} was made for {field.name.replace('_', ' ')} {have}, but {want} is wanted: "
                f"give {option} {have} or calibrate again"
            )
    check_caps(found.cache, source.text_config.num_hidden_layers, source.text_config.num_key_value_heads)
    weights = "" if source.random_weights else source.weights_sha256()
    if weights != found.weights_sha256:
        raise ConfigError(f"caps file {path} was made for other weights ({found.model}): calibrate {source.name} again")
    return found


def check_gates(calibration: Calibration, loaded: LoadedModel) -> None:
    """Raises :class:`ConfigError` if the caps were made with other gates."""
    if calibration.gates_sha256 != loaded.gates.sha256:
        raise ConfigError(
            f"the caps were made with other gates than {loaded.gates.source}: calibrate again with these, "
            "or give --gates those they were made with"
        )


def calibrate_within(
    loaded: LoadedModel,
    source: ModelSource,
    shape: ModelShape,
    config: CacheConfig,
    *,
    budget: str,
    vision: VisionInfo | None = None,
    target: float | None,
    report: Callable[[str], None],
) -> Calibration:
    """Calibrates on the shipped sample; a budget given in bytes is what the static cache may take, so the number of
    entries is lowered until it fits.

    Args:
        vision: of a model that reads pictures.
        target: share of the exact policy's survivors to keep; None is 99 %, and 90 % for random weights, whose heads
            hold now this and now that.

    Raises:
        BudgetError: the bytes do not hold a cache of this model.
        ConfigError: the calibration failed.
    """
    from trimkv_edge.calibration.calibrate import calibrate_sample
    from trimkv_edge.calibration.request import TARGET, check_request

    if target is None:
        target = _RANDOM_TARGET if source.random_weights else TARGET
    check_request(config, target, "float32")
    limit = parse_size(budget)
    for _ in range(_TRIES):
        found = calibrate_sample(loaded, source, config, vision=vision, target=target, report=report)
        needed = cache_bytes(shape, found.cache, "float32")
        if limit is None or needed <= limit:
            return found
        # A little lower than proportional: what does not shrink with the budget is the ring.
        entries = int(config.budget * limit / needed * 0.98) // 8 * 8
        if entries < max(config.prefill_chunk, config.min_per_head, config.sinks + config.recent, 8):
            break
        report(
            f"caps need {format_bytes(needed)} of {format_bytes(limit)}: trying {entries} entries per head instead of "
            f"{config.budget}"
        )
        config = replace(config, budget=entries)
    raise BudgetError(
        f"no shared budget fits {budget} with a buffer of {config.buffer}: raise --budget or lower --buffer"
    )
