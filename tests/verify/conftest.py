"""Pairs of a release and a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.verify.pairs import Pair, make_pair


@pytest.fixture(scope="session")
def pairs(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    """A good pair for each route. Not to be changed: take a copy."""
    folder = tmp_path_factory.mktemp("pairs")
    return {route: make_pair(golden, folder, route) for route in ("cast", "requantize")}
