"""The shape of a model as far as time and memory depend on it: how many numbers are read, multiplied and cached for a token."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Latent:
    """Multi-head latent attention: one compressed vector a token is cached for all heads (DeepSeek-V2, arXiv 2405.04434)."""

    #: Width of the compressed queries; 0: queries are projected directly.
    query_rank: int
    #: Width of what is cached for keys and values together.
    kv_rank: int
    #: Per head: key width without and with rotary position, value width.
    nope_dim: int
    rope_dim: int
    value_dim: int


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder-only transformer with gated FFNs (three matrices each), dense or with routed and shared experts."""

    name: str
    layers: int
    hidden: int
    vocab: int
    heads: int
    kv_heads: int
    head_dim: int
    context_tokens_max: int
    latent: Latent | None = None
    #: Layers that attend to the last `window_tokens` tokens only.
    windowed_layers: int = 0
    window_tokens: int = 0
    #: Layers with one dense FFN; all others route to experts.
    dense_layers: int = 0
    dense_intermediate: int = 0
    experts: int = 0
    experts_per_token: int = 0
    expert_intermediate: int = 0
    #: Width of the experts that every token visits, together.
    shared_intermediate: int = 0
    #: Input embeddings and output head are one matrix.
    tied_embeddings: bool = False

    @property
    def expert_layers(self) -> int:
        """Layers that route to experts."""
        return self.layers - self.dense_layers

    @property
    def full_layers(self) -> int:
        """Layers that attend to the whole context."""
        return self.layers - self.windowed_layers

    @property
    def attention_parameters(self) -> int:
        """Weights of one layer's attention projections."""
        if self.latent is None:
            return self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        latent = self.latent
        query_width = self.heads * (latent.nope_dim + latent.rope_dim)
        query = self.hidden * query_width
        if latent.query_rank:
            query = latent.query_rank * (self.hidden + query_width)
        compress = self.hidden * (latent.kv_rank + latent.rope_dim)
        expand = latent.kv_rank * self.heads * (latent.nope_dim + latent.value_dim)
        return query + compress + expand + self.heads * latent.value_dim * self.hidden

    @property
    def dense_parameters(self) -> int:
        """Weights of one dense FFN."""
        return 3 * self.hidden * self.dense_intermediate

    @property
    def expert_parameters(self) -> int:
        """Weights of one routed expert."""
        return 3 * self.hidden * self.expert_intermediate

    @property
    def shared_parameters(self) -> int:
        """Weights of one layer's shared experts."""
        return 3 * self.hidden * self.shared_intermediate

    @property
    def head_parameters(self) -> int:
        """Weights of the output head; the input embeddings are as large."""
        return self.hidden * self.vocab

    @property
    def parameters(self) -> int:
        """All weights; norms and biases, well under a thousandth, are left out."""
        embeddings = 0 if self.tied_embeddings else self.head_parameters
        return self._multiplied_parameters(self.expert_layers * self.experts) + embeddings

    @property
    def active_parameters(self) -> int:
        """Weights that one token is multiplied with."""
        return self._multiplied_parameters(self.expert_layers * self.experts_per_token)

    def _multiplied_parameters(self, routed: int) -> int:
        every_layer = self.layers * self.attention_parameters + self.dense_layers * self.dense_parameters
        router = self.expert_layers * self.hidden * self.experts
        experts = routed * self.expert_parameters + self.expert_layers * self.shared_parameters
        return every_layer + router + experts + self.head_parameters

    @property
    def layer_kv_elements(self) -> int:
        """Numbers one layer caches for a token."""
        if self.latent is not None:
            return self.latent.kv_rank + self.latent.rope_dim
        return 2 * self.kv_heads * self.head_dim

    @property
    def kv_elements(self) -> int:
        """Numbers cached for a token of context, in the layers that keep all of it."""
        return self.full_layers * self.layer_kv_elements

    @property
    def prefill_pair_flops(self) -> int:
        """FLOPs of one layer for a prompt token and one token before it: scores and weighted sum over all heads."""
        if self.latent is not None:
            return 2 * self.heads * (self.latent.nope_dim + self.latent.rope_dim + self.latent.value_dim)
        return 4 * self.heads * self.head_dim

    @property
    def decode_pair_flops(self) -> int:
        """The same for a decoded token; latent attention then works on the compressed vectors of all heads."""
        if self.latent is not None:
            return 2 * self.heads * (2 * self.latent.kv_rank + self.latent.rope_dim)
        return 4 * self.heads * self.head_dim
