"""Three steps of every family of the zoo beside a loop over transformers' model."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.families.zoo import ZOO, save
from tests.train.test_against_transformers import check_steps


@pytest.mark.parametrize("name", ZOO)
def test_three_steps_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    check_steps(save(name, tmp_path / "hf"), tmp_path / "run", 3, ZOO[name].tolerance)
