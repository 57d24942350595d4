"""Compares every target of a finished artefact with the eager model of the same numbers."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch.nn import Linear

from trimkv_edge.config import CacheConfig
from trimkv_edge.engine import Engine
from trimkv_edge.export.layerwise import LayerwiseReference
from trimkv_edge.export.layerwise_vision import LayerwiseVisionReference
from trimkv_edge.export.quantization import find_scheme
from trimkv_edge.export.quantization.base import Scheme
from trimkv_edge.export.quantization.bits import module_bits
from trimkv_edge.export.reference import ReferenceWeights
from trimkv_edge.export.speed import measure_speed
from trimkv_edge.export.targets import TARGETS, TargetSpec
from trimkv_edge.export.tokenizer import sample_tokens
from trimkv_edge.export.verify import ParityReport, check, compare, load_tolerance, stream_plan
from trimkv_edge.kv_scales import KVScales
from trimkv_edge.manifest import Manifest, Target
from trimkv_edge.models.eager import eager_engine
from trimkv_edge.models.loading import LoadedModel
from trimkv_edge.models.mixed_sample import MixedSample, mixed_sample
from trimkv_edge.models.pictures import GatedVisionModel
from trimkv_edge.models.vision_engine import vision_engine
from trimkv_edge.runtime.engines import engine_class, engine_of
from trimkv_edge.runtime.engines.base import ArtefactEngine

# Above so many bytes of float32 weights the reference holds one layer at a time, and few single tokens are compared.
IN_MEMORY = 2 * 2**30
_SINGLES = 16
# Numbers that an engine rounds for each token: with more, most calls have one that float noise moves over a step.
_ROUNDINGS = 30_000
Report = Callable[[str], None]
Progress = Callable[[int, int], None]


def is_large(parameters: int, config: CacheConfig) -> bool:
    """Whether the reference holds one layer at a time; where heads share a budget, layers cannot be run one by one."""
    return 4 * parameters > IN_MEMORY and config.caps is None


@dataclass(frozen=True)
class _Check:
    """What all comparisons of an artefact share."""

    manifest: Manifest
    loaded: LoadedModel
    folder: Path
    report: Report
    progress: Progress | None
    scales: KVScales | None
    sample: MixedSample | None = None

    @property
    def large(self) -> bool:
        return is_large(self.loaded.info.parameters, self.manifest.cache)

    @property
    def plan(self) -> list[int]:
        cache = self.manifest.cache
        return stream_plan(
            cache.budget,
            cache.buffer,
            cache.prefill_chunk,
            pooled=cache.caps is not None,
            singles=_SINGLES if self.large else None,
        )

    def with_float_cache(self) -> _Check:
        """The same where the cache holds float32."""
        return replace(self, manifest=replace(self.manifest, cache=replace(self.manifest.cache, kv_dtype="float32")))

    def reference(self, weights: ReferenceWeights, tokens: Sequence[int], scratch: Path) -> Engine:
        cache = self.manifest.cache
        if self.large:
            self.report("  the eager model, layer by layer")
            rest = (self.plan, scratch, self.progress, self.scales)
            if self.sample is not None:
                return LayerwiseVisionReference(weights, cache, self.sample, *rest)
            return LayerwiseReference(weights, cache, tokens, *rest)
        model, limit = weights.fill(weights.model), self.manifest.rope.position_limit
        if isinstance(model, GatedVisionModel):
            return vision_engine(model, cache, limit, self.scales)
        return eager_engine(model, cache, limit, self.scales)

    def rounded_reference(self, spec: TargetSpec, scheme: Scheme) -> Engine | None:
        """The eager model that rounds activations as the target does, where that can be compared closely."""
        model, make = self.loaded.model, spec.with_rounded_activations
        bits = module_bits(model, scheme)
        rounded = sum(
            part.in_features for part in model.modules() if isinstance(part, Linear) and bits.get(id(part)) == 4
        )
        if make is None or self.large or self.sample is not None or rounded > _ROUNDINGS:
            return None
        limit = self.manifest.rope.position_limit
        return eager_engine(make(model, self.loaded.weights, scheme), self.manifest.cache, limit, self.scales)

    def run(
        self, name: str, target: Target, reference: Engine, tokens: Sequence[int], row: str
    ) -> tuple[ParityReport, ArtefactEngine]:
        """Compares one target; ``row`` of the tolerances decides."""
        plan = self.plan
        tolerance = load_tolerance(row)
        kind = engine_class(engine_of(name, target), self.manifest.cache, vision=self.manifest.vision is not None)
        artefact = kind(self.folder, self.manifest, target)
        done = 0

        def count(size: int) -> None:
            nonlocal done
            done += size
            if self.progress:
                self.progress(done, sum(plan))

        result = compare(
            reference,
            artefact,
            tokens,
            plan,
            tolerance.score_rel,
            count,
            scripted=self.large or self.sample is not None,
            close_abs=tolerance.close_abs,
            show=None if self.sample is None else self.sample.show,
        )
        if self.loaded.info.random_weights and row in ("dynamic", "rounded", "float16", "bfloat16"):
            # Random logits are nearly flat: rounding decides which one is the largest. Random layers pass it on, the
            # more of them the farther: Phi-3-mini's 32 in bfloat16 by 0.1 of the largest logit.
            limit = {"float16": tolerance.logits_abs, "bfloat16": 4 * tolerance.logits_abs}.get(row, 1.0)
            tolerance = replace(tolerance, greedy_share=1.0, logits_abs=limit)
        if target.ops not in TARGETS[name].rounds:
            check(result, tolerance, f"the {name} artefact")
        return result, artefact


def verify_targets(
    manifest: Manifest,
    loaded: LoadedModel,
    folder: Path,
    report: Report,
    progress: Progress | None = None,
    scales: KVScales | None = None,
) -> Manifest:
    """Compares each target with the eager model and returns the manifest with the parity reports in it.

    Where an engine rounds activations while it runs, results cannot be equal. Such a target is compared twice where it
    can be: first its graph with float32 activations, which must keep the same survivors and give the same greedy
    tokens, or the eager model with activations rounded in the same way; then as it is with the eager model, and must
    agree as ``tolerances.yaml`` says. That report is under ``dynamic``.

    Raises:
        VerificationError: a target does not agree.
    """
    scheme = find_scheme(manifest.quantization, embedding_bits=manifest.embedding_bits)
    job = _Check(manifest, loaded, folder, report, progress, scales)
    # Where a key lies between two int8 levels, the last bit of float32 decides.
    row = "int8_cache" if scales else "large" if job.large and manifest.dtype == "float32" else manifest.dtype
    tokens = sample_tokens(folder, manifest.tokenizer, manifest.model.vocab_size, sum(job.plan))
    if manifest.vision is not None:
        sample = mixed_sample(tokens, manifest.vision)
        job, tokens = replace(job, sample=sample), sample.tokens
    targets = {}
    for name, target in manifest.targets.items():
        spec = TARGETS[name]
        if not spec.runs:
            report(f"{name} is compiled for its device: nothing here runs it, so it is not verified")
            targets[name] = target
            continue
        report(f"verifying {name}: {sum(job.plan)} tokens, every survivor and greedy token against the eager model")
        weights = ReferenceWeights(loaded.model, loaded.weights, scheme, spec.rounding)
        with tempfile.TemporaryDirectory(prefix=".verify-", dir=folder) as scratch:
            parity: dict[str, Any] = {}
            # Before the other reference: one model in memory at a time.
            if name in scheme.dynamic and (rounded := job.rounded_reference(spec, scheme)) is not None:
                report("  with the same rounding of activations")
                parity = job.run(name, target, rounded, tokens, "rounded")[0].as_dict()
                del rounded
                report("  as it is, against float32 activations")
            reference = job.reference(weights, tokens, Path(scratch))
            emulate = spec.emulated if scheme.dtype == "bfloat16" else None
            if emulate is not None:
                report("  on this CPU, with float32 operators and every result rounded to bfloat16")
                exact = emulate(folder, target, Path(scratch))
                result, artefact = job.with_float_cache().run(name, exact, reference, tokens, row)
                parity = result.as_dict()
            elif name not in scheme.dynamic:
                # Of a compiler's target: its arithmetic is float16 whatever the model's is.
                own = "float16" if target.ops == "fp16" else row
                result, artefact = job.run(name, target, reference, tokens, own)
                parity = result.as_dict()
            else:
                if spec.with_float_activations is not None:
                    report("  with float32 activations")
                    exact = spec.with_float_activations(folder, target, Path(scratch))
                    parity = job.run(name, exact, reference, tokens, row)[0].as_dict()
                    report("  as it is")
                result, artefact = job.run(name, target, reference, tokens, "dynamic")
                parity = {**(parity or result.as_dict()), "dynamic": result.as_dict()}
        speed = {} if emulate or artefact.emulates else measure_speed(artefact)
        targets[name] = replace(target, parity=parity, speed=speed)
    return replace(manifest, targets=targets)
