"""The cluster of tests/slurm."""

from __future__ import annotations

from tests.slurm.conftest import cluster, login, small

__all__ = ["cluster", "login", "small"]
