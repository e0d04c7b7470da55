"""Slurm for this room: started when the first test asks for it, and gone after the last."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.running import Login


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two nodes of 8 GPUs, without accounting."""
    with Cluster() as running:
        yield running


@pytest.fixture(scope="session")
def login(cluster: Cluster) -> Login:
    """A user of that cluster."""
    return Login(cluster)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release of two layers, so that a gang takes little time."""
    from dsqjob.miniature import write

    folder = tmp_path_factory.mktemp("small") / "release"
    write("deepseek-v4", folder, seed=1, layers=2, experts=4, ratios=(0, 4, 0), vocab=384)
    return folder
