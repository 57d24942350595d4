"""The bounded cache of a host that drives a compiled graph: what an NPU cannot do well, in numpy (docs/npu.md).

The graph reads keys, values, a mask and rotary rows, and gives logits, the chunk's keys and values and its raw gate
logits. This class owns the slots; one step is ``mask``, the graph, ``append``, and ``evict`` when ``room`` is 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trimkv_edge.config import CacheConfig
from trimkv_edge.engine import FloatArray, IntArray
from trimkv_edge.errors import StateError
from trimkv_edge.host_eviction import HostEntries, leaving, log_sigmoid, moves, require_host, score

# Added to the attention logits of slots that a query must not see. float16 holds it, and float32's exp makes it 0.
MASKED = -1e4


@dataclass(frozen=True)
class Rotary:
    """Rotary embedding of a model, made by the host.

    Attributes:
        inverse_frequencies: float32 ``[rotated / 2]``, as the model has them (LongRoPE factors are in them).
        attention_scaling: what cosines and sines are multiplied with (LongRoPE, YaRN); 1 for others.
    """

    inverse_frequencies: FloatArray
    attention_scaling: float = 1.0

    def rows(self, positions: IntArray) -> tuple[FloatArray, FloatArray]:
        """Cosines and sines, float32 ``[1, T, rotated]``; both halves of a row are alike.

        Angles are rounded to float32, because the model's own code and all other engines compute them so: a stream may
        go on in another engine, whose keys must have the same rotation. Only cosine and sine are float64 inside.
        """
        angles = positions.astype(np.float32)[:, None] * self.inverse_frequencies
        both = np.concatenate([angles, angles], axis=-1)[None].astype(np.float64)
        scaling = np.float32(self.attention_scaling)
        return np.cos(both).astype(np.float32) * scaling, np.sin(both).astype(np.float32) * scaling


def padded(count: int, chunk: int) -> IntArray:
    """Which of ``count`` tokens each row of a graph for ``chunk`` tokens holds, int64 ``[chunk]``.

    The tokens are the last rows, so that the graph's last row is always the newest token. Rows before them repeat the
    first token: they are masked, and zeros could become NaN in a norm of few bits.
    """
    return np.maximum(np.arange(chunk, dtype=np.int64) - (chunk - count), 0)


class HostCache:
    """Live entries of every head in a prefix of its slots: ``[0, M)`` kept, ``[M, M + B)`` the ring of new tokens.

    Args:
        config: settings; a budget for each head.
        layers, kv_heads, head_dim: of the model.
        dtype: of keys and values, as the graph takes and gives them; rows are stored as they come.
        masked: what a slot that must not be seen gets in the mask; about -30 for a quantised mask, whose step it sets.

    Attributes:
        key, value: ``[layers, kv_heads, M + B, head_dim]``, C order; keys after RoPE. A graph reads
            layer i as ``key[i]``.
        log_beta: float32 ``[layers, kv_heads, M + B]``.
        positions: int64, same shape, absolute.
        seen: tokens read; live: filled slots, alike in every head.

    Raises:
        ConfigError: settings that a host does not run.
    """

    def __init__(
        self,
        config: CacheConfig,
        layers: int,
        kv_heads: int,
        head_dim: int,
        *,
        dtype: npt.DTypeLike = np.float32,
        masked: float = MASKED,
    ) -> None:
        require_host(config)
        self.config, self.masked = config, masked
        self.seen = self.live = 0
        rows = (layers, kv_heads, config.slots)
        self.key, self.value = (np.zeros((*rows, head_dim), dtype) for _ in range(2))
        self.log_beta = np.zeros(rows, np.float32)
        self.positions = np.zeros(rows, np.int64)
        self.reset()

    @property
    def room(self) -> int:
        """Tokens that fit before an event is due; 0 when it is due now."""
        return self.config.slots - self.live

    def mask(self, count: int, chunk: int) -> FloatArray:
        """The additive mask of the next ``count`` tokens in a graph for ``chunk`` tokens.

        Returns:
            float32 ``[1, 1, chunk, M + B + chunk]``: columns are the slots, then the chunk's own rows. 0 where a query
            sees an entry: live slots, and of the chunk itself and what is before it; ``masked`` elsewhere.

        Raises:
            StateError: ``count`` does not fit the chunk or the room.
        """
        self._check(count, chunk)
        slots, first = self.config.slots, chunk - count
        mask = np.full((1, 1, chunk, slots + chunk), self.masked, np.float32)
        mask[..., first:, : self.live] = 0
        for row in range(first, chunk):
            mask[..., row, slots + first : slots + row + 1] = 0
        return mask

    def append(
        self,
        key: npt.NDArray[np.generic],
        value: npt.NDArray[np.generic],
        gate_logits: FloatArray | None,
        count: int,
    ) -> None:
        """Writes what the graph gave for the newest ``count`` tokens at the live length of every head.

        Args:
            key, value: ``[layers, kv_heads, chunk, head_dim]``; the last ``count`` rows are taken.
            gate_logits: raw, ``[layers, chunk, kv_heads]``; None: the model has no gates, every log-beta is 0.
            count: tokens, at most ``room``.

        Raises:
            StateError: too many tokens, rows of another type, or a gate logit that is no number; nothing was written.
        """
        self._check(count, key.shape[2])
        if (key.dtype, value.dtype) != (self.key.dtype, self.value.dtype):
            raise StateError(f"rows of {key.dtype} and {value.dtype} given, but the cache stores {self.key.dtype}")
        new = slice(self.live, self.live + count)
        if gate_logits is None:
            self.log_beta[:, :, new] = 0
        else:
            if np.isnan(gate_logits[:, -count:]).any():
                raise StateError("the graph gave a gate logit that is no number (NaN): nothing can be ranked by it")
            self.log_beta[:, :, new] = log_sigmoid(gate_logits[:, -count:]).transpose(0, 2, 1)
        self.key[:, :, new], self.value[:, :, new] = key[:, :, -count:], value[:, :, -count:]
        self.positions[:, :, new] = np.arange(self.seen, self.seen + count)
        self.seen += count
        self.live += count

    def evict(self) -> int:
        """The event: every head keeps its best M entries, moved into the first M slots.

        Returns:
            rows that moved, of all heads together; at most B for each head.

        Raises:
            StateError: a slot is free.
        """
        if self.room:
            raise StateError(f"eviction runs when {self.config.slots} entries are live, now {self.live} are")
        scores = score(HostEntries(self.log_beta, self.positions, self.key, self.seen), self.config)
        row, to, source = moves(leaving(scores, self.positions, self.config.buffer), self.config.budget)
        for table in (self.key, self.value, self.log_beta, self.positions):
            flat = table.reshape(-1, *table.shape[2:])  # a view
            flat[row, to] = flat[row, source]
        self.live = self.config.budget
        return int(row.size)

    def reset(self) -> None:
        """Empties the cache; the next token is at position 0."""
        for table in (self.key, self.value, self.log_beta):
            table.fill(0)
        self.positions[:] = np.arange(self.config.slots)
        self.seen = 0
        self.live = 0

    def load(
        self, key: FloatArray, value: FloatArray, log_beta: FloatArray, kept: IntArray, seen: int, live: int
    ) -> None:
        """Takes over a state that another cache made.

        Args:
            key, value: ``[layers, kv_heads, live, head_dim]``; log_beta: ``[layers, kv_heads, live]``.
            kept: positions of slots ``[0, M)``, ``[layers, kv_heads, M]``.
            seen, live: as the attributes.
        """
        self.key[:, :, :live], self.value[:, :, :live], self.log_beta[:, :, :live] = key, value, log_beta
        budget = self.config.budget
        self.positions[..., :budget] = kept
        # The ring holds the newest tokens, in order.
        self.positions[..., budget:] = seen - live + np.arange(budget, self.config.slots)
        self.seen, self.live = seen, live

    def _check(self, count: int, chunk: int) -> None:
        if not 1 <= count <= min(chunk, self.room):
            hint = "evict first" if self.room == 0 else "split the chunk"
            raise StateError(f"{count} tokens given, but 1 to {min(chunk, self.room)} fit now: {hint}")
