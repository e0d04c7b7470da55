"""Gangs whose supervisors are forked from the warm parent."""

from __future__ import annotations

import re
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.harness import events, write_job
from tests.waiting import wait_until
from tests.warm import CHECKOUT, Started, Warm

TEXT = CHECKOUT / "dsqjob" / "jobs" / "miniature-v4.jsonl"
AMAX_FILES = (".quant_summary.txt", "amax-ledger.safetensors", "convergence.json", "coverage.json")


def calibration_job(
    folder: Path, release: Path, tokens: Path, shape: tuple[int, int] = (2, 1), **settings: Any
) -> Path:
    """A job for the CPU whose gang has ``shape`` (nodes, ranks of each); ``tokens`` were made before."""
    nodes, each = shape
    whole: dict[str, Any] = {
        "device": "cpu",
        "parallel": {"model_parallel": nodes * each, "nodes": nodes, "gpus_per_node": each},
        "tokens__data": [{"jsonl": str(TEXT)}],
        "tokens__sequence_length": 64,
        "tokens__output": tokens,
        "export__input_scale": "calibrated",
        "launcher__max_faults": 0,
    }
    return write_job(folder, release, **{**whole, **settings})


class Gang:
    """The supervisors of a job, all started here."""

    def __init__(
        self,
        warm: Warm,
        job: Path,
        nodes: int = 2,
        *more: object,
        attempt: str = "1",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = job.parent
        rendezvous = f"127.0.0.1:{_free_port()}"
        self.supervisors: list[Started] = []
        for index in range(nodes):
            words = ("--node", index, "--nodes", nodes, "--rendezvous", rendezvous, "--attempt", attempt, *more)
            said = self.folder / f"said-{attempt}-{index}"
            self.supervisors.append(warm.start("worker", "calibrate", job, *words, said=said, environment=environment))

    def end(self, code: int, seconds: float = 120) -> str:
        """Every supervisor ends with ``code`` and leaves nothing; what they said."""
        codes = [one.wait(seconds) for one in self.supervisors]
        said = "\n".join(one.said() for one in self.supervisors)
        assert codes == [code] * len(codes), f"{codes}\n{said}\n{self.logs()}"
        assert not re.search("^Traceback", said, re.MULTILINE), said
        wait_until(lambda: not any(one.processes() for one in self.supervisors), 5)
        return said

    def ranks(self) -> list[int]:
        """Process ids, in the order of nodes and of their starts."""
        return [pid for one in self.supervisors for pid in one.children()]

    def until(self, event: str, **fields: Any) -> dict[str, Any]:
        """The first event of that kind with these fields, waited for."""
        found: list[dict[str, Any]] = []

        def there() -> bool:
            found[:] = seen(self.folder, event, **fields)
            return bool(found) or any(not one.processes() for one in self.supervisors)

        wait_until(there)
        assert found, "\n".join(one.said() for one in self.supervisors) + self.logs()
        return found[0]

    def logs(self) -> str:
        """What the ranks said."""
        files = sorted((self.folder / "work" / "logs" / "calibrate-ranks").glob("*.log"))
        return "\n".join(f"{path.name}: {path.read_text()}" for path in files)


def seen(folder: Path, event: str, **fields: Any) -> list[dict[str, Any]]:
    """Events of that kind, with these fields, of the job in ``folder``, in order of time."""
    wanted = {"event": event, **fields}
    found = [one for one in events(folder / "work") if all(one.get(name) == value for name, value in wanted.items())]
    return sorted(found, key=lambda one: one["time"])


def amax_of(folder: Path) -> dict[str, bytes]:
    """Every file of a job's amax folder, hidden ones too, but the mark of its owner."""
    files = sorted((folder / "work" / "amax").iterdir())
    assert not list(folder.rglob("*.partial-*"))
    return {path.name: path.read_bytes() for path in files if path.name != ".dsqjob-owner"}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


_HOLDS = '''

import os as _os
import time as _time


def _hold(name):
    """Wait while HOLD/NAME.RANK exists, and say so."""
    path = _os.path.join(_os.environ.get("HOLD", "/nonexistent"), f"{name}.{_os.environ.get('RANK', 0)}")
    if _os.path.exists(path):
        open(path + ".here", "w").close()
        while _os.path.exists(path):
            _time.sleep(0.01)


_hold("load")
_embed = ParallelEmbedding.forward


def _held_embed(self, x):
    self.calls = getattr(self, "calls", -1) + 1
    _hold(f"forward-{self.calls}")
    return _embed(self, x)


ParallelEmbedding.forward = _held_embed
'''


def write_holding_code(folder: Path, release: Path) -> None:
    """The release's inference code with a few lines at its end, by which a test can hold a rank at a known place."""
    shutil.copytree(release / "inference", folder)
    with (folder / "model.py").open("a") as code:
        code.write(_HOLDS)


class Holds:
    """Places where ranks of a gang started with ``environment`` wait: ``load``, ``forward-N`` (N counts from the
    process's first batch)."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self._folder = folder
        self.environment = {"HOLD": str(folder)}

    def set(self, name: str, rank: int) -> None:
        (self._folder / f"{name}.{rank}").touch()

    def reached(self, name: str, rank: int) -> bool:
        return (self._folder / f"{name}.{rank}.here").exists()

    def release(self) -> None:
        for path in self._folder.iterdir():
            path.unlink()


BATCHES = [f"batch-{number}" for number in range(24)]
"""Those of the fixture ``job``."""


def done(job: Path) -> list[str]:
    """Batches in the order in which they were finished, those that ran twice too."""
    return [event["unit"] for event in seen(job.parent, "unit-done", stage="calibrate")]
