"""The decoder-only transformers of the Llama, Qwen3, Qwen3-MoE and DeepSeek-V3 families, for mixed steps over a paged KV pool.

Three things differ from the way the models are usually written; none changes what is computed:

- Queries and keys have their dimensions reordered per head, so that the pairs that rotary embedding turns lie side by side and
  turning is one complex product. Keys lie in the pool in that order.
- Normalisation takes fewer passes (`norms.py`).
- The residual stream is float32 in every dtype.

A layer is two halves. The first (`_Layer.attend`) ends with the rows that the second takes; the second (`mlp.Ffn`) is begun and
finished, so that it may be computed elsewhere while the first half of other rows is computed here.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional

from orchestrator.profiles.model_config import Architecture
from workers.engines.adapters import AdaptedRows, Adapters
from workers.engines.batch import StepBatch
from workers.engines.experts import ExpertMlp, TurnRouter
from workers.engines.grouped import GroupedAttention
from workers.engines.kvpool import KvPool
from workers.engines.latent import LatentAttention
from workers.engines.linear import make_linear
from workers.engines.loader import Loader, scaled
from workers.engines.mlp import Ffn, Finish
from workers.engines.rotary import Rotations
from workers.engines.split.ffn import RemoteFfn, SplitGroup
from workers.engines.weights import Weights


class Model:
    """One loaded model: tokens in, logits out."""

    def __init__(
        self,
        weights: Weights,
        shape: Architecture,
        dtype: torch.dtype,
        device: torch.device,
        split: SplitGroup | None = None,
        adapters: Adapters | None = None,
    ) -> None:
        """Load a model and what is added to it; with `split` its FFNs are left to the ranks of a group."""
        self._dtype = dtype
        loader = Loader(weights, shape, dtype, device, adapters)
        embedding = weights.take("model.embed_tokens.weight", (shape.vocabulary, shape.hidden))
        self._embedding = embedding.to(device, dtype)
        self._layers = [_Layer(loader, number, split) for number in range(shape.layers)]
        self._norm, gain = loader.norm("model.norm.weight")
        tied = shape.tied and not weights.has("lm_head.weight")
        head = embedding if tied else weights.take("lm_head.weight", (shape.vocabulary, shape.hidden))
        self._head = make_linear(scaled(head, gain), None, dtype, device)
        self._row_operations = _row_operations(shape)
        self._rotations = Rotations(shape.rope, shape.rotated_dim, device)
        weights.check_all_taken()
        if adapters is not None:
            adapters.check_all_taken()

    @property
    def row_operations(self) -> int:
        """Multiply-adds of one row, attention aside."""
        return self._row_operations

    @contextmanager
    def routed(self, experts: Sequence[int]) -> Iterator[None]:
        """Send rows to these experts in turn, in every layer and until the context ends, whatever is in them."""
        ffns = [layer.ffn for layer in self._layers if isinstance(layer.ffn, (ExpertMlp, RemoteFfn))]
        routers = [(ffn, ffn.router) for ffn in ffns if ffn.router is not None]
        for ffn, router in routers:
            ffn.router = TurnRouter(router, experts)
        try:
            yield
        finally:
            for ffn, router in routers:
                ffn.router = router

    def logits(self, batches: Sequence[StepBatch], pool: KvPool) -> Tensor | None:
        """Compute a step; return [sampled rows, vocabulary] in the model's dtype, None if none is sampled.

        Writes the rows' keys and values into the pool. Of several batches each is a part of the step's sequences: while other
        processes compute one's FFN, this one goes on with the next.
        """
        states = [functional.embedding(batch.token_ids, self._embedding).float() for batch in batches]
        rotations = [self._rotations.at(batch.positions, batch.positions_max) for batch in batches]
        finishes: list[Finish] = [_unchanged] * len(batches)
        for layer in self._layers:
            for place, batch in enumerate(batches):
                state = finishes[place](states[place])
                states[place], rows, adapted = layer.attend(state, rotations[place], batch, pool)
                finishes[place] = layer.ffn.begin(rows, adapted) if len(rows) else _unchanged
        states = [finish(state) for finish, state in zip(finishes, states, strict=True)]
        last = states[0] if len(states) == 1 else torch.cat(states)
        return self._head(self._norm(last)) if len(last) else None


def _unchanged(state: Tensor) -> Tensor:
    return state


def _row_operations(shape: Architecture) -> int:
    """Return the weights that one token is multiplied with in all layers."""
    counted = shape.shape(shape.family)
    return counted.active_parameters - counted.head_parameters


class _Layer:
    """Attention and MLP, each behind a normalisation and added to the residual stream."""

    def __init__(self, loader: Loader, number: int, split: SplitGroup | None) -> None:
        prefix, shape = f"model.layers.{number}.", loader.shape
        self._number = number
        self._attention_norm, gain = loader.norm(prefix + "input_layernorm.weight")
        attention = GroupedAttention if shape.latent is None else LatentAttention
        self._attention = attention(loader, prefix + "self_attn.", gain)
        self._output = loader.linear(prefix + "self_attn.o_proj", shape.hidden, shape.attended_width, shape.attention_bias)
        self._mlp_norm, gain = loader.norm(prefix + "post_attention_layernorm.weight")
        self.ffn = _ffn(loader, number, prefix + "mlp.", gain, split)
        self._last = number == shape.layers - 1

    def attend(self, state: Tensor, rotation: Tensor, batch: StepBatch, pool: KvPool) -> tuple[Tensor, Tensor, AdaptedRows]:
        """Return the residual stream after the first half, and the normalised rows that the second takes, with their adapters."""
        adapted = batch.adapted
        attended = self._attention.attend(self._attention_norm(state), rotation, batch, pool, self._number)
        if self._last and batch.sampled_rows is not None:
            # Nobody looks at the other rows any more; most of a prompt is spared the last MLP.
            state, attended = state[batch.sampled_rows], attended[batch.sampled_rows]
            adapted = batch.adapted_sampled
        state = self._output.add_to(state, attended, adapted)
        return state, self._mlp_norm(state), adapted


def _ffn(loader: Loader, number: int, prefix: str, gain: Tensor | None, split: SplitGroup | None) -> Ffn:
    """Return a layer's FFN; of one with experts, the router and what all rows visit are here in either case."""
    experts = loader.shape.experts
    routed = experts is not None and number in experts.layers
    router, shared = (loader.router(prefix, gain), loader.shared(prefix, gain)) if routed else (None, None)
    if split is not None:
        loader.leave_ffn(prefix)
        return RemoteFfn(split, number, router, shared)
    if experts is None or router is None:
        return loader.mlp(prefix, gain)
    return ExpertMlp(router, loader.bank(prefix, gain, range(experts.count)), shared)
