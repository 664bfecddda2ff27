"""How far a result may be from its reference, by what the result itself is rounded to.

Two measures, and both must hold. The first is ||ours - reference|| / ||reference||. It is blind to
what is small beside the rest: of a cross entropy's gradient it sees the targets alone. The second
is therefore that of elements, |ours - reference| / |reference|, which three quarters of them keep
to; what rounding leaves of numbers that cancel is in the last quarter.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

# Of the dtype that a result is given in, computed in fp32 and rounded once or twice.
TOLERANCES = {torch.bfloat16: 6e-3, torch.float16: 1e-3, torch.float32: 1e-5, torch.float64: 1e-12}
# Each element's own error may be so many times that of the whole: bf16's largest rounding is 2.4
# times the usual one, and so is the third quartile where the error is independent of the element.
_OF_ELEMENTS = 4.0
_SHARE = 0.75
_MOST_ELEMENTS = 1 << 20


def error_of(ours: Tensor, reference: Tensor) -> float:
    """Relative, in norm; infinite for a wrong shape or a number that is none."""
    if ours.shape != reference.shape:
        return float("inf")
    if ours.numel() == 0:
        return 0.0
    difference = (ours.to(reference.dtype) - reference).norm().item()
    scale = reference.norm().item()
    error = difference / scale if scale else difference
    return error if error == error else float("inf")


def error_of_elements(ours: Tensor, reference: Tensor) -> float:
    """What three quarters of the elements keep to, of those that are not 0; shapes are the same.

    Of many elements some are looked at, evenly spread.
    """
    step = ours.numel() // _MOST_ELEMENTS + 1 | 1  # odd, so that it meets every column
    mine, wanted = ours.flatten()[::step].to(reference.dtype), reference.flatten()[::step]
    errors = ((mine - wanted).abs() / wanted.abs())[wanted != 0]
    if errors.numel() == 0:
        return 0.0
    errors = errors.nan_to_num(nan=float("inf"), posinf=float("inf"))
    return errors.kthvalue(max(1, int(_SHARE * errors.numel()))).values.item()


def excess(
    ours: Tensor, reference: Tensor, tolerances: Mapping[torch.dtype, float]
) -> tuple[float, float, str]:
    """(error, what is allowed, what is wrong): of the measure that is worse, empty if none is.

    `tolerances` by the dtype of the result, where it is not the usual one.
    """
    tolerance = tolerances.get(ours.dtype, TOLERANCES.get(ours.dtype, 0.0))
    error = error_of(ours, reference)
    if not error <= tolerance:
        return error, tolerance, f"is off by {error:.3g} of its norm, allowed {tolerance:.3g}"
    allowed = _OF_ELEMENTS * tolerance
    of_elements = error_of_elements(ours, reference)
    if not of_elements <= allowed:
        wrong = f"has a quarter of its elements off by {of_elements:.3g}, allowed {allowed:.3g}"
        return of_elements, allowed, wrong
    return error, tolerance, ""
