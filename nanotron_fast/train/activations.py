"""What one micro batch leaves behind for the backward pass, in bytes of one rank.

By what the operations save (`parallel.attention`, `parallel.mlp`, `kernels.rms_norm`), with h the
hidden size, b bytes of a value, t tokens of the micro batch, t' = t / tp where tp_mode is
REDUCE_SCATTER (else t), H and d heads and their size, all of a rank's heads H / tp:

    n norms             n t' (h b + 4)                    what they take, and 1 / rms
    attention           t' h b + t (H d b + 4 H) / tp     its input, output and log-sum-exp
                        + t (H + 2 K) d b / tp            and q, k and v, of which K heads
    a dense MLP         t' h b + 2 t i b / tp             its input, gate and up
      in steps          t' h b + t (i + j) b / tp         the activation too; j = 2 i with a gate
    experts             t (h b + 4 E) + t k (h + 3 m) b   their input, the router's probabilities;
                                                          of k experts a token: input, gate and up,
                                                          activation (m wide)
    recompute_layer     t' h b                            in place of all these: the layer's input

There are two norms, four around attention and MLP, or one before both side by side, which then have
one input.

Experts that are split over ranks have as many rows as where they are not, if all are chosen equally
often: routers that are out of balance leave some ranks with more.

An MLP without a gate or with biases is computed in steps, which keep what they make; so is
attention with norms of q and k, or packed by key-value head: before those norms it keeps q and k
once more, 1 / rms of each head, and each token's sines and cosines.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from nanotron_fast.model.spec import Attention, Experts, Layer

# Norms of a layer where they are in other places than before or after attention and MLP.
_NUM_NORMS = {"around": 4, "parallel": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """The sizes that activations depend on.

    Args:
        tokens: of a micro batch.
        hidden_size: of the model.
        value_bytes: of a parameter, and so of an activation.
        tp: ranks that share a layer.
        is_scattered: tp_mode is REDUCE_SCATTER.
        recomputes_layers: parallelism.recompute_layer.
        packs_by_kv_head: as of `models.names`.
        ep: ranks that experts are split over.
    """

    tokens: int
    hidden_size: int
    value_bytes: int
    tp: int
    is_scattered: bool
    recomputes_layers: bool
    packs_by_kv_head: bool = False
    ep: int = 1

    @property
    def stream_bytes(self) -> int:
        """The residual stream between two layers, on one rank."""
        tokens = self.tokens // self.tp if self.is_scattered else self.tokens
        return tokens * self.hidden_size * self.value_bytes

    @property
    def _norm_bytes(self) -> int:
        tokens = self.tokens // self.tp if self.is_scattered else self.tokens
        return self.stream_bytes + 4 * tokens

    def kept(self, layer: Layer) -> int:
        """What a layer keeps until its backward pass."""
        return self.stream_bytes if self.recomputes_layers else self._saved(layer)

    def kept_at_end(self) -> int:
        """What the last norm keeps, and the head, whose input it is."""
        return self._norm_bytes + self.stream_bytes

    def working(self, layers: Iterable[Layer]) -> int:
        """The most that a layer's backward pass has beside all that is kept."""
        return max(map(self._working, layers), default=0)

    def _saved(self, layer: Layer) -> int:
        attention = layer.attention
        heads = attention.num_heads * (attention.head_dim * self.value_bytes + 4)
        saved = _NUM_NORMS.get(layer.norms, 2) * self._norm_bytes
        saved += self.stream_bytes + self.tokens * heads // self.tp
        saved += self.tokens * self._products(layer) * self.value_bytes // self.tp
        if attention.qk_norm or self.packs_by_kv_head:
            saved += self.tokens * attention.head_dim * 4
        if attention.qk_norm == "apart":  # each twice in fp32
            rows = (attention.num_heads + attention.num_kv_heads) * attention.head_dim
            saved += self.tokens * 8 * rows // self.tp
        if attention.qk_norm == "head":
            saved += self.tokens * 4 * (attention.num_heads + self._kv_heads(attention)) // self.tp
        mlp = layer.mlp
        if not isinstance(mlp, Experts):
            return saved if layer.norms in ("parallel", "beside") else saved + self.stream_bytes
        routed = mlp.top_k * (self.hidden_size + 3 * mlp.intermediate_size) * self.value_bytes
        saved += self.tokens * (self.hidden_size * self.value_bytes + 4 * mlp.num_experts + routed)
        return saved + (self.stream_bytes if mlp.has_shared_expert else 0)

    def _products(self, layer: Layer) -> int:
        """Values of a token that attention and MLP keep of their products, over all ranks of tp."""
        attention, mlp = layer.attention, layer.mlp
        kv_heads = self._kv_heads(attention)
        rows = attention.num_heads + 2 * kv_heads
        if attention.qk_norm:
            rows += attention.num_heads + kv_heads
        rows *= attention.head_dim
        if isinstance(mlp, Experts):
            return rows + 2 * mlp.shared_intermediate_size
        is_in_steps = mlp.has_bias or not mlp.is_gated
        return rows + (3 if mlp.is_gated and is_in_steps else 2) * mlp.intermediate_size

    def _kv_heads(self, attention: Attention) -> int:
        """Over all ranks of tp, with their copies."""
        return attention.num_kv_heads * attention.copies_of_kv_heads(self.tp)

    def _working(self, layer: Layer) -> int:
        attention, mlp = layer.attention, layer.mlp
        # q, k and v, their gradients in one piece and apart; gate and up, the activation, and the
        # gradients of both.
        rows = (attention.num_heads + 2 * self._kv_heads(attention)) * attention.head_dim
        wide = mlp.shared_intermediate_size if isinstance(mlp, Experts) else mlp.intermediate_size
        if isinstance(mlp, Experts):
            wide = max(wide, mlp.top_k * mlp.intermediate_size * self.tp)
        widest = max(3 * rows, 6 * wide) * self.value_bytes // self.tp
        gathered = self.hidden_size * self.value_bytes if self.is_scattered else 0
        again = self._saved(layer) if self.recomputes_layers else 0
        if isinstance(mlp, Experts) and self.ep > 1:
            # Rows as they leave and as they arrive.
            gathered += 2 * mlp.top_k * self.hidden_size * self.value_bytes
        return self.tokens * (widest + gathered) + again


def in_flight(engine: str, *, rank: int, pp: int, chunks: int, num_micro_batches: int) -> float:
    """How many micro batches a pipeline rank keeps at most, in units of all its layers.

    Source: the schedules of torch.distributed.pipelining. 1f1b with fewer micro batches than stages
    runs as afab.
    """
    if pp == 1:
        return 1
    if engine == "afab" or (engine == "1f1b" and num_micro_batches < pp):
        return num_micro_batches
    if engine == "1f1b":
        return min(num_micro_batches, pp - rank)
    rounds = max(1, num_micro_batches // pp)
    ahead = (chunks - 1) * (num_micro_batches // rounds) + 2 * (pp - 1 - rank)
    return min(ahead + 1, num_micro_batches * chunks) / chunks
