"""Calibration: the exact policy over text, what heads hold there, and the cheapest caps that keep what it keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from trimkv_edge.budget import ModelShape
from trimkv_edge.calibration.levels import LADDER
from trimkv_edge.calibration.lifetimes import agreement
from trimkv_edge.calibration.mixed import mixed_streams
from trimkv_edge.calibration.recording import Progress, record
from trimkv_edge.calibration.replay import replay
from trimkv_edge.calibration.request import TARGET, check_request, default_length, stack_streams, streams_at_once
from trimkv_edge.calibration.search import Trade, first_that_holds, percent
from trimkv_edge.calibration.streams import Stream, StreamPlan, sample_streams, tokens_of
from trimkv_edge.caps import SCHEMA_VERSION, Calibration, Occupancy
from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import ConfigError
from trimkv_edge.manifest import VisionInfo
from trimkv_edge.models.loading import LoadedModel
from trimkv_edge.models.mixed_sample import MixedSample
from trimkv_edge.models.source import ModelSource

# How often the distance between a rung that fails and the one above is halved: replays are cheap, runs are not.
_REPLAY_HALVINGS, _RUN_HALVINGS = 6, 3


def calibrate(
    loaded: LoadedModel,
    shape: ModelShape,
    config: CacheConfig,
    streams: Sequence[Stream],
    held_out: Sequence[Stream],
    *,
    target: float = TARGET,
    dtype: str = "float32",
    text: str = "",
    report: Callable[[str], None] = lambda line: None,
    progress: Progress | None = None,
) -> Calibration:
    """Finds caps for a budget that heads share.

    The exact policy reads ``streams``; each head's occupancy there gives caps of any generosity. The smallest whose
    replay on ``held_out`` reaches the target are then run with the model itself and compared with the exact policy,
    and made more generous until they hold there too.

    Args:
        loaded: the model; its gates decide.
        shape: its sizes, for bytes.
        config: settings of the exact policy (``global`` or ``layer``), without caps.
        streams, held_out: token ids, all streams of one length; of a model that reads pictures, with pictures.
        target: share of the exact policy's survivors to keep, mean over events and streams, in (0, 1].
        dtype: of the cache whose bytes are counted.
        text: what the streams are, for the record.
        report: called with a line for each stage and each run of the model.
        progress: called with tokens done and tokens in all of the run under way.

    Returns:
        the calibration: ``trade`` holds agreements of replays, ``agreement`` is that of the model's own run.

    Raises:
        ConfigError: the settings or streams cannot be used, or no caps reach the target.
    """
    check_request(config, target, dtype)
    ids, other = (
        stack_streams([tokens_of(stream) for stream in part], config, loaded.rope.position_limit)
        for part in (streams, held_out)
    )
    shown, other_shown = (
        [one.pictures for one in part if isinstance(one, MixedSample)] for part in (streams, held_out)
    )
    batch = streams_at_once(shape, config)
    report(f"the exact policy reads {ids.numel()} tokens")
    seen = record(loaded.model, config, ids, batch, progress, shown)
    report(f"the exact policy reads {other.numel()} held-out tokens")
    exact = record(loaded.model, config, other, batch, progress, other_shown)

    def agree_replayed(capped: CacheConfig) -> float:
        return agreement(exact.lifetimes, replay(exact.log_beta, capped, progress), config).mean().item()

    def agree_run(capped: CacheConfig) -> float:
        run = record(loaded.model, capped, other, batch, progress, other_shown)
        return agreement(exact.lifetimes, run.lifetimes, config).mean().item()

    report("caps of every level are replayed on the held-out tokens")
    replays, runs = (Trade(seen.kept, config, shape, dtype, agree) for agree in (agree_replayed, agree_run))

    def measure_run(level: float) -> float:
        name, known = replays.point(level).level, len(runs.points())
        result = runs.measure(level)
        if len(runs.points()) > known:
            report(f"caps {name} run with the model: agreement {percent(result)}")
        return result

    for level in LADDER:
        if replays.measure(level) == 1:
            break
    start = first_that_holds(LADDER, replays.measure, target, _REPLAY_HALVINGS)
    found = None
    if start is not None:
        rungs = [start, *(rung for rung in LADDER if rung > start)]
        found = first_that_holds(rungs, measure_run, target, _RUN_HALVINGS)
    if found is None:
        best = max(point.agreement for point in runs.points() or replays.points())
        raise ConfigError(
            f"no caps keep {percent(target)} of what the exact policy keeps on held-out text; the best keep "
            f"{percent(best)}: calibrate on more text or text more like it (--text, --tokens, --streams), "
            "or lower --target"
        )
    return Calibration(
        schema_version=SCHEMA_VERSION,
        model=loaded.info.name,
        weights_sha256="" if loaded.info.random_weights else loaded.info.weights_sha256,
        gates_sha256=loaded.gates.sha256,
        cache=runs.capped(found),
        dtype=dtype,
        text=text,
        tokens=ids.numel(),
        held_out_tokens=other.numel(),
        target=target,
        agreement=runs.measure(found),
        occupancy=occupancy_of(seen.kept, shape.num_kv_heads),
        trade=replays.points(),
    )


def calibrate_sample(
    loaded: LoadedModel,
    source: ModelSource,
    config: CacheConfig,
    *,
    plan: StreamPlan | None = None,
    vision: VisionInfo | None = None,
    target: float = TARGET,
    dtype: str = "float32",
    report: Callable[[str], None] = lambda line: None,
    progress: Progress | None = None,
) -> Calibration:
    """:func:`calibrate` on the shipped sample: 8 + 4 streams of the default length, unless ``plan`` says otherwise.
    ``vision``: of a model that reads pictures, which are in the streams then."""
    check_request(config, target, dtype)
    plan = plan or StreamPlan(default_length(config))
    streams = sample_streams(source, plan) if vision is None else mixed_streams(source, plan, vision)
    return calibrate(
        loaded,
        source.shape(),
        config,
        streams.calibration,
        streams.held_out,
        target=target,
        dtype=dtype,
        text=streams.text,
        report=report,
        progress=progress,
    )


def occupancy_of(kept: npt.NDArray[np.int64], heads: int) -> Occupancy:
    """Mean, 95th percentile (a number that was seen) and maximum over the events of ``[events, rows]``."""
    p95 = np.quantile(kept, 0.95, axis=0, method="higher").astype(np.int64)
    mean = kept.mean(0).round(2)
    return Occupancy(
        mean=mean.reshape(-1, heads).tolist(),
        p95=p95.reshape(-1, heads).tolist(),
        max=kept.max(0).reshape(-1, heads).tolist(),
    )
