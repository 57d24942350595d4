"""Engines ``torch:int8`` and ``torch:int4``: an artefact's ``torch`` target whose weights are rounded while they load.

What the export verified are the stored weights, so a line on stderr says that these are others.
"""

from __future__ import annotations

import sys

from trimkv_edge.gpu.artefact import FromArtefact, TorchArtefactEngine, TorchPooledArtefactEngine
from trimkv_edge.gpu.quantize import quantize
from trimkv_edge.models.gated import GatedModel


class _Rounded(FromArtefact):
    """``scheme``: of :func:`~trimkv_edge.gpu.quantize.quantize`, whose errors the constructors raise too."""

    scheme: str

    def _rounded(self, model: GatedModel) -> GatedModel:
        model = quantize(model, self.scheme)
        print(f"weights are rounded to {self.scheme} while loading: the export did not verify these", file=sys.stderr)
        return model


class Int8Engine(_Rounded, TorchArtefactEngine):
    """8-bit weights."""

    scheme = "int8"


class Int8PooledEngine(_Rounded, TorchPooledArtefactEngine):
    """The same where heads share a budget."""

    scheme = "int8"


class Int4Engine(_Rounded, TorchArtefactEngine):
    """4-bit weights."""

    scheme = "int4"


class Int4PooledEngine(_Rounded, TorchPooledArtefactEngine):
    """The same where heads share a budget."""

    scheme = "int4"
