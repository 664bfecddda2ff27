"""Runs pytest with its arguments, and of each test function one case alone: the kernels' if any.

Where some of the tests are marked `versions`, exactly those run.

    python tests/versions/one_case_each.py tests/kernels -k test_matches_reference

Run by its path, so that the repository's root, whose kernels/ would hide transformers' package of
that name, is not where modules are looked for.
"""

from __future__ import annotations

import sys

import pytest


class OneCaseEach:
    def __init__(self) -> None:
        self.files_left_out: list[str] = []

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that skips itself lacks what this environment is there to test."""
        if report.skipped:
            self.files_left_out.append(report.nodeid)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.files_left_out:
            print(f"\nFAILED: left out whole: {', '.join(self.files_left_out)}")
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        chosen: dict[str, pytest.Item] = {}
        for item in items:
            function = item.nodeid.partition("[")[0]
            runs_kernels = "triton" in item.name and "triton" not in chosen.get(function, item).name
            if function not in chosen or runs_kernels:
                chosen[function] = item
        marked = {item for item in items if item.get_closest_marker("versions")}
        kept = marked or set(chosen.values())
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = [item for item in items if item in kept]


if __name__ == "__main__":
    sys.exit(pytest.main(sys.argv[1:], plugins=[OneCaseEach()]))
