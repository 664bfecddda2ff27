"""The packer on random plans."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.packing import PATHS, check, choose_path, random_bytes

pytest.importorskip("nanotron_fast._C", reason="the native code is not built")
hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is not installed")
builders = pytest.importorskip("tests.plans").builders

# The interpreter adds signalling NaN, and numpy warns of it.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


@pytest.fixture(params=PATHS)
def place(request, monkeypatch) -> torch.device:
    return choose_path(request.param, monkeypatch)


def plans(max_examples):
    checks = hypothesis.HealthCheck
    return hypothesis.settings(
        deadline=None,
        max_examples=max_examples,
        suppress_health_check=[checks.function_scoped_fixture, checks.too_slow],
    )


def check_plan(build, device):
    sources = [random_bytes(size, seed) for seed, size in enumerate(build.source_sizes)]
    check(build.moves, sources, build.output_sizes, device, shift=len(build.moves) % 3)


@pytest.mark.slow
@plans(8)
@hypothesis.given(build=builders())
def test_random_plans(place, build) -> None:
    check_plan(build, place)


@plans(100)
@hypothesis.given(build=builders(max_size=40))
def test_random_plans_in_native_code(build) -> None:
    check_plan(build, torch.device("cpu"))
