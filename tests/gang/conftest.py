"""One warm parent for the room; gangs that a test leaves are killed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.gang.gangs import Gang
from tests.warm import Warm


@pytest.fixture(scope="session")
def temporary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The temporary folder of all gangs."""
    return tmp_path_factory.mktemp("temporary")


@pytest.fixture(scope="session")
def warm(temporary: Path) -> Iterator[Warm]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(temporary))
        patch.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")
        with Warm("torch", "dsqjob.gang.supervisor", "tests.gang.works") as parent:
            yield parent


@pytest.fixture
def gang(warm: Warm, tmp_path: Path) -> Iterator[Callable[..., Gang]]:
    """Makes gangs; of several in one test each has a folder of its own, unless it names one."""
    made: list[Gang] = []

    def make(what: str, nodes: int, ranks: int, folder: str = "", **more: Any) -> Gang:
        made.append(Gang(warm, tmp_path / (folder or f"gang{len(made)}"), what, nodes, ranks, **more))
        return made[-1]

    yield make
    for one in made:
        one.kill_all()
