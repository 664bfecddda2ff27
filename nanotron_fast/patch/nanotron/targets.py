"""What the drop-in replaces in Nanotron, all of it: one line for each function or method.

A replacement is made by a factory, `factory(original, options) -> replacement`, so that each can
fall back to the function it stands for. A module that main alone has tells which Nanotron is
installed: main and the released 0.4 say the same version of themselves.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

RELEASED, MAIN = "0.4", "main"
BOTH = (RELEASED, MAIN)

# What `disable` calls after everything is back: it undoes what replacements left on live objects.
ON_DISABLE: list[Callable[[], None]] = []


@dataclass(frozen=True, slots=True)
class DropInOptions:
    """How replacements behave where Nanotron's own way is wrong; the default is Nanotron's.

    Args:
        z_loss_mode: "nanotron" leaves the largest logit out of the z-loss's log-sum-exp; "correct"
            adds it back.
        ignore_index: a target without loss and gradient; None: none is left out, as in Nanotron.
        rope_scaling: honour `rope_scaling` of the model's configuration, which Nanotron ignores.
        padding_idx: "nanotron" takes the padding token's id for a row of every rank's shard;
            "global" for a row of the whole embedding. They differ at tp > 1 alone.
        assume_full_masks: take every sequence mask of Llama's for all true, as they are in
            pretraining, and never wait for the device to say so. One that was not is reported
            once the device has come that far.
        fused: whole blocks as single functions besides, the operations of FUSED.
    """

    z_loss_mode: Literal["nanotron", "correct"] = "nanotron"
    ignore_index: int | None = None
    rope_scaling: bool = False
    padding_idx: Literal["nanotron", "global"] = "nanotron"
    assume_full_masks: bool = False
    fused: bool = False


# Whole blocks in one function each, which nobody has measured yet: only who asks has them. Where a
# block has hooks, or is not what Nanotron defines, the single operations run: `status` says why.
FUSED = ("fused_loss", "fused_mlp", "fused_attention", "main_grad")


@dataclass(frozen=True, slots=True)
class Target:
    """One function or method of Nanotron, and the factory in `patch.replacements` that serves it.

    Args:
        op: the operation it belongs to, as `enable(ops=...)` names it.
        module: its home.
        attribute: its name there; `Class.method` for a method.
        factory: `module.function` in `patch.replacements`.
        versions: of Nanotron that have it.
        needs: operations all of whose targets, as far as there are any, must be replaced before.
    """

    op: str
    module: str
    attribute: str
    factory: str
    versions: tuple[str, ...] = BOTH
    needs: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Full name, for people; a fused operation may stand on another's target."""
        name = f"{self.module}.{self.attribute}"
        return f"{name} ({self.op})" if self.op in FUSED else name


_FUNCTIONAL = "nanotron.parallel.tensor_parallel.functional"
_LLAMA, _QWEN = "nanotron.models.llama", "nanotron.models.qwen"
_ACCUMULATOR = "nanotron.optim.gradient_accumulator"
_FROM_ACCUMULATOR = "nanotron.optim.optimizer_from_gradient_accumulator"

_LOSS_NEEDS = ("cross_entropy", "linear")
_MLP_NEEDS = ("linear", "glu")
_ATTENTION_NEEDS = ("linear", "rope", "attention")

TARGETS = (
    Target("cross_entropy", _FUNCTIONAL, "sharded_cross_entropy", "loss.cross_entropy"),
    Target("cross_entropy", _LLAMA, "LlamaModel.forward", "loss.without_cast"),
    Target("rms_norm", "nanotron.nn.layer_norm", "TritonRMSNorm.forward", "norm.triton_rms_norm"),
    Target(
        "rms_norm", "nanotron.nn.layer_norm", "LlamaRMSNorm.forward", "norm.llama_rms_norm", (MAIN,)
    ),
    Target("residual", _LLAMA, "LlamaDecoderLayer.forward", "norm.llama_layer_0_4", (RELEASED,)),
    Target("residual", _LLAMA, "LlamaDecoderLayer._core_forward", "norm.llama_layer", (MAIN,)),
    Target("residual", _QWEN, "Qwen2DecoderLayer._core_forward", "norm.qwen2_layer", (MAIN,)),
    Target("glu", _LLAMA, "GLUActivation.forward", "mlp.glu_activation"),
    Target("glu", _QWEN, "Qwen2MLP.forward", "mlp.qwen2_mlp", (MAIN,)),
    Target("rope", _LLAMA, "CausalSelfAttention.__init__", "attention.llama_init"),
    Target("rope", _LLAMA, "CausalSelfAttention.forward", "attention.llama_forward"),
    Target("rope", _QWEN, "Qwen2Attention._forward_packed", "attention.qwen2_forward", (MAIN,)),
    Target("attention", _LLAMA, "CoreAttention.forward", "attention.core_attention"),
    Target("linear", _FUNCTIONAL, "column_linear", "linear.column"),
    Target("linear", _FUNCTIONAL, "row_linear", "linear.row"),
    Target(
        "embedding",
        "nanotron.parallel.tensor_parallel.nn",
        "TensorParallelEmbedding.forward",
        "embedding.embedding",
    ),
    Target("accumulation", _ACCUMULATOR, "FP32GradientAccumulator.backward", "optimizer.backward"),
    Target("accumulation", _ACCUMULATOR, "FP32GradientAccumulator.step", "optimizer.copy_back"),
    Target("clip", "nanotron.optim.clip_grads", "clip_grad_norm", "optimizer.clip"),
    Target("adamw", "nanotron.optim.named_optimizer", "NamedOptimizer.__init__", "optimizer.named"),
    Target("adamw", _FROM_ACCUMULATOR, "OptimizerFromGradientAccumulator.step", "optimizer.step"),
    Target("save_weights", "nanotron.serialize.weights", "save_weights", "checkpoints.save"),
    Target("load_weights", "nanotron.serialize.weights", "load_weights", "checkpoints.load"),
    # Last, for they stand on what is above: they fall back to it.
    Target("fused_loss", _LLAMA, "LlamaForTraining.forward", "fused_loss.model", BOTH, _LOSS_NEEDS),
    Target(
        "fused_loss", _QWEN, "Qwen2ForTraining.forward", "fused_loss.model", (MAIN,), _LOSS_NEEDS
    ),
    Target("fused_mlp", _LLAMA, "MLP.forward", "fused_blocks.llama_mlp", BOTH, _MLP_NEEDS),
    Target("fused_mlp", _QWEN, "Qwen2MLP.forward", "fused_blocks.qwen2_mlp", (MAIN,), _MLP_NEEDS),
    Target(
        "fused_attention",
        _LLAMA,
        "CausalSelfAttention.forward",
        "fused_blocks.llama_attention",
        BOTH,
        _ATTENTION_NEEDS,
    ),
    Target(
        "fused_attention",
        _QWEN,
        "Qwen2Attention.forward",
        "fused_blocks.qwen2_attention",
        (MAIN,),
        _ATTENTION_NEEDS,
    ),
    Target(
        "main_grad",
        _ACCUMULATOR,
        "FP32GradientAccumulator.zero_grad",
        "main_grad.zero_grad",
        BOTH,
        ("accumulation",),
    ),
)
OPS = tuple(dict.fromkeys(target.op for target in TARGETS if target.op not in FUSED))


def installed_version() -> str:
    """Which of the two Nanotrons is installed: main is the one that has Qwen2.

    Raises ModuleNotFoundError where there is none.
    """
    return MAIN if importlib.util.find_spec("nanotron.models.qwen") is not None else RELEASED
