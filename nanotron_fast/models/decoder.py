"""One decoder for every family, assembled from a ModelSpec: the modules of one pipeline stage.

    x = embedding(ids);  for each layer: x = x + attention(norm(x)), x = x + mlp(norm(x)), or with
    norms elsewhere (`model.spec.Layer`);  norm, then the head's logits, or the loss without keeping
    them

Parameters have Nanotron's names and are this rank's shards, made from the family's table: what the
table has and no module computes with is refused, and so is the other way round. Tokens are
batch-major and flat between the modules: (rows * length, hidden).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanotron_fast.errors import ConfigError, TopologyError, UnsupportedModelError
from nanotron_fast.kernels.cross_entropy import vocab_parallel_cross_entropy
from nanotron_fast.kernels.embedding import vocab_parallel_embedding
from nanotron_fast.kernels.linear_cross_entropy import linear_cross_entropy
from nanotron_fast.kernels.runtime.collectives import Group
from nanotron_fast.model.spec import Dense
from nanotron_fast.model.spec import Layer as LayerSpec
from nanotron_fast.model.topology import Topology
from nanotron_fast.models.architecture import Architecture, Block
from nanotron_fast.models.attention import Attention
from nanotron_fast.models.batch import Batch, document_edges
from nanotron_fast.models.cache import Cache
from nanotron_fast.models.experts import Experts
from nanotron_fast.models.facts import params_of
from nanotron_fast.models.latent import LatentAttention
from nanotron_fast.models.mlp import Mlp
from nanotron_fast.models.names import names_of
from nanotron_fast.models.norm import Norm
from nanotron_fast.models.rotary import Rotary
from nanotron_fast.models.weights import Setting, Weights, place
from nanotron_fast.parallel import column_linear
from nanotron_fast.parallel.communication import check_mode
from nanotron_fast.parallel.whole import GatheredWhole

# A label that counts for nothing.
IGNORED = -100
RECOMPUTE = ("none", "products", "layer")


class _PpBlock(nn.Module):
    """What Nanotron's pipeline wraps around every block: a name in the middle."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.pp_block = block


class _Embedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token_embedding = Weights()


class Layer(nn.Module):
    """Takes the last block's output and the stream that it is to be added to, and gives both.

    So that the sum and the norm after it are one operation. The first layer of a stage gets the
    whole stream, and no residual. The modules are in the order of Nanotron's.
    """

    def __init__(
        self, layer: LayerSpec, setting: Setting, number: int, *, has_norms_first: bool
    ) -> None:
        super().__init__()
        of_kind = Attention if layer.attention.latent is None else LatentAttention
        names, places = setting.names, layer.norms
        before, after = names.norms if places != "after" else (None, None)
        outputs = names.output_norms if places in ("after", "around") else (None, None)
        # Nanotron's order: by it an optimizer's file numbers its states.
        norms = [before, None if places == "parallel" else after, *outputs]
        self._norms, self._mlp, self._scale = norms, names.mlp, setting.spec.residual_scale
        self._is_parallel, self._is_beside = places == "parallel", places == "beside"
        inner = [
            ("attn", of_kind(layer.attention, setting, number)),
            (norms[2], None),
            (norms[1], None),
            (
                names.mlp,
                Mlp(setting, is_gated=layer.mlp.is_gated)
                if isinstance(layer.mlp, Dense)
                else Experts(layer.mlp, setting),
            ),
            (norms[3], None),
        ]
        if has_norms_first:
            inner.insert(0, inner.pop(2))
        for name, module in [(norms[0], None), *inner]:
            if name is not None:
                self.add_module(name, module or Norm(setting))

    def forward(self, x: Tensor, residual: Tensor | None, batch: Batch) -> tuple[Tensor, Tensor]:
        before, after, attention_norm, mlp_norm = map(self._norm, self._norms)
        x, stream = _entered(before, x, residual)
        added = _left(attention_norm, self.attn(x, batch))
        if self._is_beside and after is not None:
            x = after.of(stream)
        if self._is_parallel or self._is_beside:
            return self._scaled(added + self._through_mlp(x, batch)), stream
        x, stream = _entered(after, self._scaled(added), stream)
        return self._scaled(_left(mlp_norm, self._through_mlp(x, batch))), stream

    def _norm(self, name: str | None) -> Norm | None:
        return None if name is None else cast(Norm, getattr(self, name))

    def _through_mlp(self, x: Tensor, batch: Batch) -> Tensor:
        mlp = getattr(self, self._mlp)
        return cast(Tensor, mlp(x) if isinstance(mlp, Mlp) else mlp(x, batch))

    def _scaled(self, added: Tensor) -> Tensor:
        return added if self._scale == 1 else added * self._scale


def _entered(norm: Norm | None, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """What a block takes, and the stream with x in it."""
    if norm is not None:
        return cast(tuple[Tensor, Tensor], norm(x, residual))
    stream = x if residual is None else x + residual
    return stream, stream


def _left(norm: Norm | None, x: Tensor) -> Tensor:
    return x if norm is None else norm.of(x)


class Decoder(nn.Module):
    """The modules of some blocks of a model: those of a pipeline stage, or of a part of one.

    Args:
        architecture: what is to be built.
        topology: sizes of the groups.
        stage: of the pipeline; its blocks are those of Nanotron's assignment.
        blocks: which blocks instead, in the words of `Architecture.blocks`: layers in one run,
            "embedding" before the first, "norm" and then "head" after the last.
        group: of tensor parallelism: a ProcessGroup, a DeviceMesh of one dimension, or None.
        expert_group: likewise, of the ranks that the experts of a layer are split over. Each has
            tokens of its own, and all of them call a layer equally often.
        mode: "all_reduce" or "reduce_scatter" (Nanotron's names in capitals are taken too).
        recompute: what backward computes again: "none"; "products", the projections of attention
            and MLP; "layer", whole layers, of which only the input is kept.
        z_loss, z_loss_mode: as of `kernels.linear_cross_entropy`.
        auxiliary_loss: the weight of the experts' balance, see `models.experts`; Nanotron and
            transformers leave it out, and so does 0. `spec.router_aux_loss_coef` is what a
            configuration asks for. What the caller divides the loss by, he divides this by.
        counts_load: routers count in `load` how many tokens each expert was chosen for, while
            gradients are taken.
        dtype: of the parameters; a router is in fp32.
        device: where they are made, without values; "meta" nowhere yet.

    Raises:
        TopologyError: something does not split over the group. ConfigError: the options.
        UnsupportedModelError: the family's table has what no module here computes with.
    """

    def __init__(
        self,
        architecture: Architecture,
        *,
        topology: Topology | None = None,
        stage: int = 0,
        blocks: Iterable[Block] | None = None,
        group: Group = None,
        expert_group: Group = None,
        mode: str = "all_reduce",
        recompute: str = "none",
        z_loss: float = 0.0,
        z_loss_mode: str = "nanotron",
        auxiliary_loss: float = 0.0,
        counts_load: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "meta",
    ) -> None:
        super().__init__()
        check_mode(mode.lower())
        if recompute not in RECOMPUTE:
            raise ConfigError(f"recompute {recompute!r}: choose {', '.join(RECOMPUTE)}")
        self.architecture = architecture
        self.topology = topology or Topology()
        chosen = architecture.blocks_of(self.topology, stage) if blocks is None else blocks
        self.blocks: tuple[Block, ...] = _in_order(architecture, chosen)
        self.mode = mode.lower()
        self.recompute = recompute
        self.z_loss, self.z_loss_mode = z_loss, z_loss_mode
        self.auxiliary_loss, self.counts_load = auxiliary_loss, counts_load
        spec = architecture.spec
        self.setting = Setting(
            spec,
            Rotary(spec),
            group,
            self.mode,
            architecture.rope_interleaved,
            recompute == "products",
            names_of(architecture.family),
            expert_group,
        )
        self.model = _modules(architecture, self.blocks, self.setting)
        self._fill_from_table(dtype)
        if torch.device(device).type != "meta":
            self.to_empty(device=device)

    def _fill_from_table(self, dtype: torch.dtype) -> None:
        family = self.architecture.family.name
        for name, param in params_of(self.architecture, self.blocks).items():
            shape = param.local_shape(self.topology.sizes)
            try:
                kept = torch.float32 if param.is_fp32 else dtype
                place(self, name, shape, kept, is_frozen=param.is_frozen)
            except AttributeError as error:
                raise UnsupportedModelError(
                    f"{name}: it is a parameter of a {family}, and no module of "
                    f"nanotron_fast.models computes with it: {error}"
                ) from None
        for path, module in self.named_modules():
            missing = [key for key, value in module._parameters.items() if value is None]
            if [key for key in missing if key != "bias"]:
                raise UnsupportedModelError(
                    f"{path}.{missing[0]}: the model computes with it, and the table of {family} "
                    "has no such parameter"
                )

    @property
    def is_first(self) -> bool:
        return "embedding" in self.blocks

    @property
    def is_last(self) -> bool:
        return "head" in self.blocks

    @property
    def layers(self) -> list[Layer]:
        """Of this stage, in their order."""
        return [
            cast(Layer, self.model.get_submodule(f"decoder.{block}.pp_block"))
            for block in self.blocks
            if isinstance(block, int)
        ]

    def _weight(self, path: str) -> Tensor:
        return cast(Weights, self.model.get_submodule(path)).weight

    @property
    def head_weight(self) -> Tensor:
        """(vocab / tp, hidden): the head's own matrix, or the embedding's of a tied model."""
        shares = self.architecture.spec.tie_word_embeddings and self.is_first
        return self._embedding_weight if shares else self._weight("lm_head.pp_block")

    @property
    def _embedding_weight(self) -> Tensor:
        return self._weight(f"{self.setting.names.embedding}.pp_block.token_embedding")

    def forward(
        self,
        x: Tensor,
        *,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        shape: tuple[int, int] | None = None,
        cache: Cache | None = None,
        last_alone: bool = False,
    ) -> Tensor:
        """Passes a micro-batch through this stage.

        Args:
            x: on the first stage token ids (rows, length) int64, else the residual stream
                (rows * length, hidden), of which a rank has its share in mode "reduce_scatter".
            labels: (rows, length) int64, each token's target; -100 counts for nothing. On the last
                stage alone.
            position_ids: (rows, length) int64 where rows hold several documents: counted from each
                document's start, so that 0 starts one. Attention stays within a document. In memory
                of the CPU nothing waits for the device, whose values have to be seen else.
            shape: (rows, length), where neither x nor labels nor position_ids say it: on a stage
                in the middle.
            cache: of keys and values, for generation: these tokens come after those in it, and are
                added to it. Not with position_ids.
            last_alone: the logits of each row's last token, (rows, 1, vocab / tp), and no others.

        Returns:
            The residual stream as the next stage takes it; on the last stage the loss, fp32 (), the
            mean over labels that count (0 where none does), or without labels the logits
            (rows, length, vocab / tp).

        Raises:
            ValueError: shapes do not fit, or arguments do not. TopologyError: tokens do not split,
            or the group has another size than the topology says.
        """
        self._check(x, labels, cache, position_ids, last_alone)
        rows, length = self._shape(x, labels, position_ids, shape)
        batch = Batch(
            rows,
            length,
            x.device,
            max_positions=length + (0 if cache is None else cache.length),
            cache=cache,
            auxiliary_loss=self.auxiliary_loss,
            counts_load=self.counts_load and torch.is_grad_enabled(),
        )
        if position_ids is not None:
            batch.cu_seqlens = document_edges(position_ids, x.device)
        if self.is_first:
            x = self._embedded(x)
        residual: Tensor | None = None
        for layer in self.layers:
            if self.recompute == "layer" and torch.is_grad_enabled():
                x, residual = checkpoint(
                    layer, x, residual, batch, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x, residual = layer(x, residual, batch)
        if cache is not None:
            cache.advance(length)
        if "norm" in self.blocks:
            x, _ = self.model.get_submodule("final_layer_norm.pp_block")(x, residual)
        elif residual is not None:
            x = x + residual
        if not self.is_last:
            return x
        if labels is not None:
            return self._loss(x, labels)
        if last_alone:
            x = x.unflatten(0, (rows, length))[:, -1]
        return self._logits(x).view(rows, 1 if last_alone else length, -1)

    def _embedded(self, ids: Tensor) -> Tensor:
        weight, group = self._embedding_weight, self.setting.group
        x = vocab_parallel_embedding(ids.reshape(-1), weight, group, mode=self.mode)
        scale = self.architecture.spec.embedding_scale
        # As transformers has it: the factor in the dtype of what it multiplies.
        return x if scale == 1 else x * float(torch.tensor(scale, dtype=x.dtype))

    def _loss(self, x: Tensor, labels: Tensor) -> Tensor:
        options: dict[str, Any] = {
            "ignore_index": IGNORED,
            "z_loss": self.z_loss,
            "z_loss_mode": self.z_loss_mode,
        }
        target, group = labels.reshape(-1), self.setting.group
        if self.architecture.spec.logit_softcap is not None:
            logits = self._logits(x)
            rows = logits.flatten(0, -2)
            loss = _mean(vocab_parallel_cross_entropy(rows, target, group, **options), target)
        else:
            if self.setting.is_scattered:
                x = GatheredWhole.apply(x, self.setting.ranks)
            x = self._before_head(x)
            loss = linear_cross_entropy(x, self.head_weight, target, group, **options)
        # With a z-loss its part comes along, to be looked at.
        return loss[0] if isinstance(loss, tuple) else loss

    def _logits(self, x: Tensor) -> Tensor:
        x = self._before_head(x)
        logits = column_linear(x, self.head_weight, group=self.setting.group, mode=self.mode)
        cap = self.architecture.spec.logit_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def _before_head(self, x: Tensor) -> Tensor:
        """The logits' factor, which is a number, goes before the product: that is smaller."""
        scale = self.architecture.spec.logit_scale
        return x if scale == 1 else x * scale

    def _check(
        self,
        x: Tensor,
        labels: Tensor | None,
        cache: Cache | None,
        position_ids: Tensor | None,
        last_alone: bool,
    ) -> None:
        size = self.setting.ranks.size
        if size != self.topology.tp:
            raise TopologyError(f"a group of {size} ranks for {self.topology}")
        size = self.setting.expert_ranks.size
        if size != self.topology.ep:
            raise TopologyError(f"an expert group of {size} ranks for {self.topology}")
        if self.is_first and (x.dim() != 2 or x.is_floating_point()):
            raise ValueError(
                f"the first stage takes token ids (rows, length), not {tuple(x.shape)} {x.dtype}"
            )
        if not self.is_first and (x.dim() != 2 or not x.is_floating_point()):
            raise ValueError(
                f"a later stage takes (tokens, hidden), not {tuple(x.shape)} {x.dtype}"
            )
        if labels is not None and not self.is_last:
            raise ValueError("labels are for the last stage alone")
        if cache is not None and (position_ids is not None or self.setting.is_scattered):
            raise ValueError("a cache goes with mode all_reduce and without position_ids")
        if last_alone and self.setting.is_scattered:
            raise ValueError("last_alone goes with mode all_reduce")

    def _shape(
        self,
        x: Tensor,
        labels: Tensor | None,
        position_ids: Tensor | None,
        shape: tuple[int, int] | None,
    ) -> tuple[int, int]:
        said = [tuple(each.shape) for each in (labels, position_ids) if each is not None]
        said += [tuple(x.shape)] if self.is_first else []
        said += [shape] if shape is not None else []
        if not said or len(set(said)) > 1:
            raise ValueError(f"the rows and the length of a micro-batch: {said or 'nothing said'}")
        rows, length = said[0]
        tokens = len(x) * (self.setting.ranks.size if self.setting.is_scattered else 1)
        if not self.is_first and tokens != rows * length:
            raise ValueError(f"{tokens} tokens for {rows} rows of {length}")
        return rows, length


def _mean(loss: Tensor | tuple[Tensor, Tensor], target: Tensor) -> Tensor | tuple[Tensor, ...]:
    """Over the tokens that count; with a z-loss of both."""
    if isinstance(loss, tuple):
        return tuple(cast(Tensor, _mean(each, target)) for each in loss)
    return loss.sum() / (target != IGNORED).sum().clamp_min(1)


def _in_order(architecture: Architecture, chosen: Iterable[Block]) -> tuple[Block, ...]:
    """Raises ConfigError."""
    wanted = set(chosen)
    known = architecture.blocks
    places = [place for place, block in enumerate(known) if block in wanted]
    if (
        not places
        or len(places) != len(wanted)
        or places != list(range(places[0], places[0] + len(places)))
    ):
        raise ConfigError(
            f"blocks {sorted(wanted, key=str)}: give some that follow each other of embedding, "
            f"0 to {architecture.spec.num_layers - 1}, norm, head"
        )
    return tuple(known[place] for place in places)


def _modules(architecture: Architecture, blocks: Iterable[Block], setting: Setting) -> nn.Module:
    """Modules without parameters, under the names that Nanotron has for them."""
    owned = list(blocks)
    model = nn.Module()
    if "embedding" in owned:
        model.add_module(setting.names.embedding, _PpBlock(_Embedding()))
    norms_first = architecture.model_class.has_norms_first
    specs = architecture.spec.layers
    layers = {
        str(number): _PpBlock(Layer(specs[number], setting, number, has_norms_first=norms_first))
        for number in owned
        if isinstance(number, int)
    }
    model.decoder = nn.ModuleDict(layers)
    if "norm" in owned:
        model.final_layer_norm = _PpBlock(Norm(setting))
    if "head" in owned and not (architecture.spec.tie_word_embeddings and "embedding" in owned):
        model.lm_head = _PpBlock(Weights())
    return model
