"""What a quantisation scheme says about itself. One scheme = one short file + one line in the registry."""

from __future__ import annotations

from dataclasses import dataclass

from trimkv_edge.errors import ConfigError


@dataclass(frozen=True)
class Scheme:
    """How the weights of an artefact are stored.

    Attributes:
        name: as in ``--quant``.
        weight_bits: of the linear layers, the output layer included.
        embedding_bits: of the token embedding; an export may ask for others.
        gate_bits: of the retention gates' linear layers; 32 leaves them in float32. Chosen by survivor agreement, see
            docs/quantization.md. 16 is ``half``, biases and norms included; other numbers are packed integers.
        targets: those that can build it.
        dynamic: targets whose engine rounds activations to int8 while it runs, so that it agrees with float32
            activations closely, not exactly.
        kv_dtypes: how keys and values can be stored; the first is the default.
        float_bits: of the arithmetic and of what is not packed, scales of packed weights included: 32 or 16.
        half: what floats of 16 bits are, ``float16`` or ``bfloat16``.
    """

    name: str
    weight_bits: int
    embedding_bits: int
    gate_bits: int
    targets: tuple[str, ...]
    dynamic: tuple[str, ...] = ()
    kv_dtypes: tuple[str, ...] = ("float32", "int8")
    float_bits: int = 32
    half: str = "float16"

    def __post_init__(self) -> None:
        for field in ("weight_bits", "embedding_bits", "gate_bits"):
            if getattr(self, field) not in (4, 8, 16, 32):
                raise ConfigError(f"{field} of {self.name} is {getattr(self, field)}, but must be 4, 8, 16 or 32")
        if self.float_bits not in (16, 32):
            raise ConfigError(f"float_bits of {self.name} is {self.float_bits}, but must be 16 or 32")
        if self.half not in ("float16", "bfloat16"):
            raise ConfigError(f"half of {self.name} is {self.half!r}, but must be float16 or bfloat16")

    @property
    def dtype(self) -> str:
        """What the model computes in; gates' log-betas are float32 always."""
        return self.half if self.float_bits == 16 else "float32"
