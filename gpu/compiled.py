"""The graphs of the torch engine: a token of each stream, a chunk of each, and the eviction event, compiled once each.

They take and give nothing but what lies in the buffers beside them, so that CUDA graphs can be replayed as they are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.exc import InductorError

from trimkv_edge.errors import TrimKVError
from trimkv_edge.gpu.backend import BatchedAttention
from trimkv_edge.gpu.cache import BatchedCache
from trimkv_edge.models.gated import GatedModel


class Graphs:
    """A model over a batched cache.

    Args:
        model: on the device of ``cache``.
        cache: written in place.
        compiled: through ``torch.compile``; on CUDA the token and the event are replayed as CUDA graphs. False: step by
            step.

    Attributes:
        token: int64 ``[batch, 1]``, read by ``decode``.
        chunk: int64 ``[batch, prefill_chunk]``, right-aligned (see :class:`BatchedAttention`), read by ``prefill``.
        count: int64 ``[batch]``, tokens that each stream reads in this step, 0 to 1 or to ``prefill_chunk``.
        logits: float32 ``[batch, vocab_size]``, after the last token of the streams that read one.
        due: bool ``[batch]``, streams whose event ``evict`` runs; all their slots are live.
        decode, prefill, evict: the steps. In the first two every stream has a free slot, also one that reads nothing.
    """

    def __init__(self, model: GatedModel, cache: BatchedCache, compiled: bool = True) -> None:
        device, batch = cache.live.device, cache.batch
        self.model, self.cache, self.compiled = model, cache, compiled
        shapes = ((batch, 1), (batch, cache.config.prefill_chunk), (batch,))
        self.token, self.chunk, self.count = (torch.zeros(s, dtype=torch.int64, device=device) for s in shapes)
        self.logits = torch.zeros(batch, model.config.vocab_size, device=device)
        self.due = torch.zeros(batch, dtype=torch.bool, device=device)
        for tensor in (self.token, self.chunk, self.count, self.logits, self.due):
            torch._dynamo.mark_static_address(tensor)

        def step(tokens: Tensor, count: Tensor, logits: Tensor) -> None:
            attention = BatchedAttention(cache, count, tokens.shape[1])
            newest = model(tokens, attention.positions(), attention)[:, -1]
            logits.copy_(torch.where(count.unsqueeze(1) > 0, newest.float(), logits))
            cache.advance(count)

        def event(due: Tensor) -> None:
            cache.evict(due)

        replayed = cache.live.is_cuda
        token, event = once(step, compiled, replayed), once(event, compiled, replayed)
        # A chunk is bound by arithmetic, not by launches.
        chunk = token if cache.config.prefill_chunk == 1 else once(step, compiled, False)
        self.decode = lambda: token(self.token, self.count, self.logits)
        self.prefill = lambda: chunk(self.chunk, self.count, self.logits)
        self.evict = lambda: event(self.due)

    def warm_up(self) -> None:
        """Compiles all graphs now, and records CUDA graphs. Streams stay as they are; each has a free slot."""
        self.count.zero_()
        self.due.zero_()
        for _ in range(3 if self.due.is_cuda else 1):
            self.decode()
            self.evict()
        if self.cache.config.prefill_chunk > 1:
            self.prefill()


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
