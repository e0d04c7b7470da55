"""A stage whose units write a file each: run as ``python -m tests.engine.toy WORKSPACE INDEX COUNT [SECONDS]``."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from dsqjob.engine.events import EventLog
from dsqjob.engine.execute import StopRequest, Worker
from dsqjob.engine.fingerprint import Fingerprint
from dsqjob.engine.publish import publishing, write_all
from dsqjob.engine.stage import Context, Done, Output, PooledStage, StageState, Unit
from dsqjob.engine.workspace import Workspace
from dsqjob.errors import Interrupted


class Toy(PooledStage):
    """Unit ``u3`` writes 3 pieces of a kilobyte, ``seconds`` apart."""

    name = "toy"
    owner = "toy"

    def __init__(self, root: Path, seconds: float = 0.0, units: int = 6, version: str = "1") -> None:
        self.folder = root / "out"
        self.seconds = seconds
        self.units = [Unit(f"u{n}", (f"u{n}.bin",), 1024 * n, 1024 * n) for n in range(1, units + 1)]
        self.parts = {"version": version, "units": str(units)}
        self.begun: list[str] = []

    @property
    def fingerprint(self) -> Fingerprint:
        return Fingerprint(self.parts)

    def do(self, unit: Unit, context: Context) -> Done:
        self.begun.append(unit.id)
        with publishing(self.folder / unit.outputs[0], context.token) as fd:
            for n in range(unit.bytes_out // 1024):
                time.sleep(self.seconds)
                write_all(fd, bytes([n]) * 1024, n * 1024)
                context.tick(1024)
        return Done((Output(unit.outputs[0], unit.bytes_out),), {"pieces": unit.bytes_out // 1024})


def content(n: int) -> bytes:
    """What unit ``n`` must leave."""
    return b"".join(bytes([k]) * 1024 for k in range(n))


def work(root: Path, toy: Toy, index: int = 0, count: int = 1, stop: StopRequest | None = None) -> StageState:
    """Run a worker in this process."""
    workspace = Workspace(root / "work")
    state = StageState(workspace, toy)
    log = EventLog(workspace.events, worker=f"toy-{index}/{count}", host="here")
    stop = stop or StopRequest()
    Worker(index, count, chunk_bytes=1024, log=log, stop=stop, poll_seconds=0.02, retry_seconds=0.01).work(state)
    return state


def main() -> None:
    root, index, count, seconds = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
    stop = StopRequest()
    with stop.listening():
        try:
            work(root, Toy(root, seconds), index, count, stop)
        except Interrupted as error:
            sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
