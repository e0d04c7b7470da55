"""Slurm for this room: started when the first test asks for it, and gone after the last."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two nodes of 8 GPUs, without accounting."""
    with Cluster() as running:
        yield running
