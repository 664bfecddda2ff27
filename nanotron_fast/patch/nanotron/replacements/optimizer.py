"""What follows backward: accumulation in fp32, clipping, AdamW, and the copy back to bf16."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW

from nanotron_fast.kernels.optimizer import accumulate_, adamw_step_
from nanotron_fast.kernels.optimizer.grad_norm import clip_grads_with_norm_, get_total_norm
from nanotron_fast.patch.nanotron.targets import ON_DISABLE, DropInOptions

logger = logging.getLogger(__name__)


def has_own_memory(tensor: Tensor) -> bool:
    """A tensor with memory of its own: the slices of Nanotron's ZeRO only look like one."""
    return type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__


# --- Accumulation

# A backward that knows parameters whose gradients are in their `main_grad` already has this.
_TAKES_MAIN_GRADS = "__nanotron_fast_main_grads__"


def takes_main_grads(kind: type) -> bool:
    """Whether the backward of a class of accumulators is ours."""
    return getattr(getattr(kind, "backward", None), _TAKES_MAIN_GRADS, False)


def backward(original: Callable[..., Any], options: DropInOptions) -> Callable[..., Any]:
    """`FP32GradientAccumulator.backward`: all gradients are added in one launch.

    A parameter whose `main_grad` is its buffer may have no gradient beside that.
    """

    def replacement(self: Any, loss: Tensor) -> Any:
        result = loss.backward()
        gradients, buffers = [], []
        for name, element in self.fp32_grad_buffers.items():
            parameter, buffer = element["half"], element["fp32_grad"]
            if parameter.grad is None:
                is_added = getattr(parameter, "main_grad", None) is buffer
                assert is_added, f"Expected param {name} to have gradient."
            elif self._is_accumulation_sync_step is False:  # else the hook of DDP has added it
                gradients.append(parameter.grad.contiguous())
                buffers.append(buffer)
            parameter.grad = None
            _assign(self, name, buffer)
        if buffers:
            accumulate_(buffers, gradients)
        return result

    setattr(replacement, _TAKES_MAIN_GRADS, True)
    return replacement


def _assign(self: Any, name: str, buffer: Tensor) -> None:
    """Shows the optimizer its part of a buffer: an optimizer may have set its gradient to None."""
    if name not in self.parameters:
        return
    gradient = buffer
    if hasattr(self, "param_name_to_offsets"):
        if name not in self.param_name_to_offsets:
            return  # this rank's slice is empty
        first, end = self.param_name_to_offsets[name]
        gradient = buffer.view(-1)[first:end]
    self.parameters[name]["fp32"].grad = gradient


def copy_back(original: Callable[..., Any], options: DropInOptions) -> Callable[..., Any]:
    """`FP32GradientAccumulator.step`: masters to the model's own dtype, in one call.

    What AdamW has written already in its pass is left out.
    """

    @torch.inference_mode()
    def replacement(self: Any) -> None:
        written = vars(self).get(_WRITTEN, ())
        pairs = [
            (element["half"], element["fp32"])
            for element in self.parameters.values()
            if id(element["fp32"]) not in written
        ]
        plain = [pair for pair in pairs if has_own_memory(pair[0])]
        if plain:
            halves, masters = zip(*plain, strict=True)
            torch._foreach_copy_(halves, masters)
        for half, master in pairs:
            if not has_own_memory(half):
                half.copy_(master)

    return replacement


# --- Clipping


def clip(original: Callable[..., Any], options: DropInOptions) -> Callable[..., Any]:
    """`clip_grad_norm`: the norm over the model-parallel group and the scaling, a launch each."""

    def clip_grad_norm(
        mp_pg: Any,
        named_parameters: Iterable[tuple[str, Any]],
        max_norm: float,
        grad_accumulator: Any,
        norm_type: float = 2.0,
    ) -> Tensor:
        gradients, counted = [], []
        rank = torch.distributed.get_rank()
        for name, parameter in named_parameters:
            assert parameter.requires_grad, f"clip_grad_norm: {name} requires no gradient"
            found = parameter.grad
            if grad_accumulator is not None:
                found = grad_accumulator.get_grad_buffer(name)
            gradients.append(found.detach())
            # One of the ranks that hold a tied parameter counts it; all of them scale it.
            if not parameter.is_tied or parameter.get_tied_info().global_ranks[0] == rank:
                counted.append(found.detach())
        device = gradients[0].device if gradients else torch.device("cuda")
        total_norm = get_total_norm(counted, norm_type, mp_pg, device=device)
        clip_grads_with_norm_(gradients, max_norm, total_norm)
        return total_norm

    return clip_grad_norm


# --- AdamW

# An accumulator holds by this name the ids of the masters whose copies AdamW has just written.
_WRITTEN = "_nanotron_fast_written"
_made: weakref.WeakSet[AdamW] = weakref.WeakSet()


def _torch_step(optimizer: AdamW, closure: Callable[[], float] | None) -> float | None:
    """torch's step, without the hooks around it: those around ours are running."""
    step: Any = AdamW.step
    step = step.__wrapped__ if getattr(step, "hooked", False) else step
    return step(optimizer, closure)


class FusedAdamW(AdamW):
    """torch's AdamW, whose step is one launch for each group. Its state is torch's.

    `copies` maps the id of a parameter to the low-precision tensor that is written with it. What is
    copied or pickled is torch's AdamW again.
    """

    copies: Mapping[int, Tensor] = MappingProxyType({})

    def __reduce_ex__(self, protocol: Any) -> Any:
        function, arguments, *rest = super().__reduce_ex__(protocol)
        return function, tuple(AdamW if x is FusedAdamW else x for x in arguments), *rest

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in super().__getstate__().items() if key != "copies"}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step. What our kernel does not serve is torch's own step."""
        # It may have been turned back, while a scheduler still holds this step.
        if type(self) is not FusedAdamW:
            return _torch_step(self, closure)
        if not all(map(self._is_served, self.param_groups)):
            _say_once(
                "torch's AdamW steps: ours wants plain dense tensors, and fused=True on a GPU"
            )
            self.copies = {}
            return _torch_step(self, closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _is_served(self, group: dict[str, Any]) -> bool:
        steps_beside = group["fused"] or group["capturable"]  # on the parameters' device
        return not (group["amsgrad"] or group["differentiable"]) and all(
            has_own_memory(p)
            and p.is_contiguous()
            and (steps_beside or p.device.type == "cpu")
            and (p.grad is None or (p.grad.is_contiguous() and not p.grad.is_sparse))
            for p in group["params"]
        )

    def _step_group(self, group: dict[str, Any]) -> None:
        params: list[Tensor] = []
        grads: list[Tensor] = []
        averages: list[Tensor] = []
        squares: list[Tensor] = []
        steps: list[Tensor] = []
        self._init_group(group, params, grads, averages, squares, [], steps)
        lists = [*zip(params, grads, averages, squares, steps, strict=True)]
        options = {
            "lr": group["lr"],
            "betas": tuple(group["betas"]),
            "eps": group["eps"],
            "weight_decay": group["weight_decay"],
            "maximize": group["maximize"],
            "grad_scale": getattr(self, "grad_scale", None),
            "found_inf": getattr(self, "found_inf", None),
        }
        with_copy = [row for row in lists if id(row[0]) in self.copies]
        without = [row for row in lists if id(row[0]) not in self.copies]
        if with_copy:
            copies = [self.copies[id(row[0])] for row in with_copy]
            adamw_step_(*map(list, zip(*with_copy, strict=True)), copies=copies, **options)
        if without:
            adamw_step_(*map(list, zip(*without, strict=True)), **options)


def named(original: Callable[..., Any], options: DropInOptions) -> Callable[..., Any]:
    """`NamedOptimizer.__init__`: an AdamW of torch's that it builds becomes ours.

    So do those that were ours before. One that was built while the drop-in was off stays torch's:
    its scheduler has wrapped torch's step.
    """

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if type(self.optimizer) is AdamW:
            _made.add(self.optimizer)
            _make_ours(self.optimizer)

    for optimizer in [*_made]:
        _make_ours(optimizer)
    return __init__


def _make_ours(optimizer: AdamW) -> None:
    optimizer.__class__ = FusedAdamW
    optimizer._patch_step_function()  # torch's hooks around the step of this class


def _turn_back() -> None:
    for optimizer in [*_made]:
        optimizer.__class__ = AdamW
        vars(optimizer).pop("copies", None)


@cache
def _say_once(what: str) -> None:
    logger.warning("nanotron_fast: %s", what)


ON_DISABLE.append(_turn_back)


def step(original: Callable[..., Any], options: DropInOptions) -> Callable[..., Any]:
    """`OptimizerFromGradientAccumulator.step`: the step writes the model's own weights too."""

    def replacement(self: Any, closure: Callable[[], float] | None = None) -> float | None:
        optimizer, accumulator = self.get_base_optimizer(), self.gradient_accumulator
        if type(optimizer) is not FusedAdamW:
            if type(optimizer) is AdamW:
                _say_once("torch's AdamW steps: it was built before the drop-in was enabled")
            return original(self, closure)
        optimizer.copies = {
            id(element["fp32"]): element["half"].detach()
            for element in accumulator.parameters.values()
            if has_own_memory(element["half"]) and element["fp32"].grad is not None
        }
        loss = self.optimizer.step(closure=closure)
        vars(accumulator)[_WRITTEN] = frozenset(optimizer.copies)
        try:
            accumulator.step()
        finally:
            vars(accumulator).pop(_WRITTEN, None)
        return loss

    return replacement
