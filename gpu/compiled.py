"""The graphs of the torch engine: a token of each stream, a chunk of each, and the eviction event, compiled once each.

They take and give nothing but what lies in the buffers beside them, so that CUDA graphs can be replayed as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.exc import InductorError

from trimkv_edge.engine import FloatArray, IntArray
from trimkv_edge.errors import TrimKVError
from trimkv_edge.gpu.backend import BatchedAttention
from trimkv_edge.gpu.cache import BatchedCache
from trimkv_edge.gpu.placement import home
from trimkv_edge.models.attention import AttentionBackend
from trimkv_edge.models.gated import GatedModel


class ChunkAttention(AttentionBackend, Protocol):
    """A backend of one forward pass over a cache that lies on the device."""

    def positions(self) -> Tensor:
        """Absolute positions of the chunk, int64 ``[batch, T]``."""

    def advance(self) -> None:
        """Counts the chunk, which every layer has written."""


class Steps:
    """A model over a cache: a token of each stream, and a chunk of each.

    Args:
        model: on its device.
        attention: ``(count, T)`` -> the backend of a chunk.
        batch: streams.
        longest: tokens of a chunk.
        compiled: through ``torch.compile``; on CUDA the token is replayed as a CUDA graph. False: step by step.

    Attributes:
        token: int64 ``[batch, 1]``, read by ``decode``.
        chunk: int64 ``[batch, longest]``, read by ``prefill``; see :class:`~trimkv_edge.gpu.chunk.RightAligned`.
        count: int64 ``[batch]``, tokens that each stream reads in this step, 0 to 1 or to ``longest``.
        logits: float32 ``[batch, vocab_size]``, after the last token of the streams that read one.
        decode, prefill: the steps. In both every stream has a free slot, also one that reads nothing.
    """

    def __init__(
        self,
        model: GatedModel,
        attention: Callable[[Tensor, int], ChunkAttention],
        batch: int,
        longest: int,
        compiled: bool,
    ) -> None:
        device, _ = home(model)
        self.model, self.compiled = model, compiled
        shapes = ((batch, 1), (batch, longest), (batch,))
        self.token, self.chunk, self.count = (torch.zeros(s, dtype=torch.int64, device=device) for s in shapes)
        self.logits = torch.zeros(batch, model.config.vocab_size, device=device)
        for tensor in (self.token, self.chunk, self.count, self.logits):
            torch._dynamo.mark_static_address(tensor)

        def step(tokens: Tensor, count: Tensor, logits: Tensor) -> None:
            chunk = attention(count, tokens.shape[1])
            newest = model(tokens, chunk.positions(), chunk)[:, -1]
            logits.copy_(torch.where(count.unsqueeze(1) > 0, newest.float(), logits))
            chunk.advance()

        token = once(step, compiled, device.type == "cuda")
        # A chunk is bound by arithmetic, not by launches.
        chunk = token if longest == 1 else once(step, compiled, False)
        self.decode: Callable[[], None] = lambda: token(self.token, self.count, self.logits)
        self.prefill: Callable[[], None] = lambda: chunk(self.chunk, self.count, self.logits)

    def run(self, row: int, ids: IntArray) -> FloatArray:
        """Reads a token or a chunk of stream ``row`` alone and waits for its logits, ``[vocab_size]``."""
        self.count.zero_()
        self.count[row] = ids.size
        if ids.size == 1:
            self.token[row] = int(ids[0])
            self.decode()
        else:
            self.chunk[row, -ids.size :] = torch.from_numpy(ids).to(self.chunk)
            self.prefill()
        return np.asarray(self.logits[row].cpu().numpy()).copy()

    def warm_up(self) -> None:
        """Compiles all graphs now, and records CUDA graphs. Streams stay as they are; each has a free slot."""
        self.count.zero_()
        for _ in range(3 if self.count.is_cuda else 1):
            self._warm_up_once()
        if self.chunk.shape[1] > 1:
            self.prefill()

    def _warm_up_once(self) -> None:
        self.decode()


class Graphs(Steps):
    """A model over a batched cache, and the event of the streams that are due.

    Args:
        model: on the device of ``cache``.
        cache: written in place.
        compiled: see :class:`Steps`; the event is replayed as the token is.

    Attributes:
        due: bool ``[batch]``, streams whose event ``evict`` runs; all their slots are live.
        evict: the event.
    """

    def __init__(self, model: GatedModel, cache: BatchedCache, compiled: bool = True) -> None:
        super().__init__(
            model,
            lambda count, length: BatchedAttention(cache, count, length),
            cache.batch,
            cache.config.prefill_chunk,
            compiled,
        )
        self.cache = cache
        self.due = torch.zeros(cache.batch, dtype=torch.bool, device=cache.live.device)
        torch._dynamo.mark_static_address(self.due)

        def event(due: Tensor) -> None:
            cache.evict(due)

        event = once(event, compiled, cache.live.is_cuda)
        self.evict: Callable[[], None] = lambda: event(self.due)

    def warm_up(self) -> None:
        self.due.zero_()
        super().warm_up()

    def _warm_up_once(self) -> None:
        self.decode()
        self.evict()


def once(function: Callable[..., None], compiled: bool, replayed: bool) -> Callable[..., None]:
    """Compiles at the first call for its shapes; other shapes are an error, not a second compilation."""
    if compiled:
        function = torch.compile(  # type: ignore[call-overload]  # its overloads lack the last two
            function,
            fullgraph=True,
            dynamic=False,
            options={
                "triton.cudagraphs": replayed,
                # The model never changes, and what transformers keeps in globals does not matter: without this a model
                # of another family that is loaded later would have the graph compiled again, and every step would
                # check each parameter.
                "guard_filter_fn": torch.compiler.keep_tensor_guards_unsafe,
            },
            # Other engines of this process have functions of the same code.
            isolate_recompiles=True,
            recompile_limit=1,
        )

    def run(*buffers: Tensor) -> None:
        if replayed and compiled:
            torch.compiler.cudagraph_mark_step_begin()
        try:
            with torch.no_grad():
                function(*buffers)
        except (TorchDynamoException, InductorError) as error:
            lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            raise TrimKVError(
                f"torch.compile failed ({lines[0].strip()}): it needs a C++ compiler (g++), and on CUDA Triton; "
                "--model NAME --no-compile runs without"
            ) from error

    return run
