"""With CI=true a skip, an expected failure or a deselection fails the run; without it, nothing does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
TESTS = """
import pytest
def test_good(): pass
{mark}
def test_other(): assert {holds}
"""
SKIP, XFAIL = "@pytest.mark.skip", "@pytest.mark.xfail"


def run(folder: Path, mark: str, holds: bool, ci: bool, *options: str) -> int:
    (folder / "test_it.py").write_text(TESTS.format(mark=mark, holds=holds))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "tests.conftest", f"--rootdir={folder}", folder, *options],
        env={**environment, "CI": str(ci).lower(), "PYTHONPATH": str(CHECKOUT)},
        cwd=folder, capture_output=True, timeout=60, check=False,
    ).returncode  # fmt: skip


@pytest.mark.parametrize(
    ("mark", "holds", "options"),
    [(SKIP, True, ()), (SKIP, True, ("-n", "2")), (XFAIL, False, ()), ("", True, ("-k", "good", "-n", "2"))],
    ids=str,
)
def test_in_ci_nothing_is_left_out(tmp_path: Path, mark: str, holds: bool, options: tuple[str, ...]) -> None:
    assert run(tmp_path, mark, holds, True, *options) == 1


def test_a_skip_passes_elsewhere_and_a_whole_run_in_ci(tmp_path: Path) -> None:
    assert run(tmp_path, SKIP, True, False) == run(tmp_path, "", True, True, "-n", "2") == 0
