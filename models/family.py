"""What a model family has to say about itself. One family = one short file + one line in ``models/registry.py``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trimkv_edge.errors import ModelError


def _accept(config: Any) -> None:
    """A family without special cases."""


@dataclass(frozen=True)
class Family:
    """A supported architecture.

    Attributes:
        name: ours.
        model_type: ``config.model_type`` of transformers.
        gate_intermediate_size: width I of the published gates.
        auto_class: transformers' class that builds it from a configuration.
        vision: whether it reads pictures.
        check: raises :class:`ModelError` for configurations whose maths the bounded cache cannot keep.
    """

    name: str
    model_type: str
    gate_intermediate_size: int
    check: Callable[[Any], None] = _accept
    auto_class: str = "AutoModelForCausalLM"
    vision: bool = False

    @property
    def auto(self) -> Any:
        """transformers' class of that name."""
        import transformers  # the list of families is read where no model is

        return getattr(transformers, self.auto_class)


def text_config(config: Any) -> Any:
    """The decoder's part of a transformers configuration: ``text_config`` where it is nested, else all of it."""
    return config.get_text_config()


def text_decoder(base: Any) -> Any:
    """The module of a transformers model that has ``embed_tokens``, ``layers``, ``norm`` and ``rotary_emb``."""
    return getattr(base.model, "language_model", base.model)


def vision_encoder(base: Any) -> Any | None:
    """The module of a transformers model that encodes pictures; None: it reads text only."""
    return getattr(base.model, "visual", None)


def refuse_sliding_layers(config: Any) -> None:
    """Refuses models that mix full and sliding-window layers: their windows are not applied by the bounded cache."""
    layer_types = getattr(config, "layer_types", None) or []
    if any(kind != "full_attention" for kind in layer_types):
        raise ModelError(
            f"this {config.model_type} model has sliding-window layers, which are not supported: "
            "use a checkpoint with full attention in every layer"
        )
