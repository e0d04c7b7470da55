"""What happened, one JSON object a line, a file a process; ``status`` is a function of it and of nothing else."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any


class EventLog:
    """Appends events of one process. An event that cannot be written is lost, work goes on."""

    def __init__(self, folder: Path, *, worker: str, **about: Any) -> None:
        self._about = {"worker": worker, "pid": os.getpid(), **about}
        self._fd = -1
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            name = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{about.get('host', '')}-{os.getpid()}.jsonl"
            self._fd = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)

    def write(self, event: str, **fields: Any) -> None:
        """Append one event with the time (seconds since 1970) and this process's worker, host and pid."""
        line = json.dumps({"time": round(time.time(), 3), "event": event, **self._about, **fields}) + "\n"
        with suppress(OSError):
            os.write(self._fd, line.encode())


def read_events(folder: Path) -> Iterator[dict[str, Any]]:
    """Every event of every process, by file; a torn last line is passed over."""
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(errors="replace").splitlines():
            with suppress(ValueError):
                event = json.loads(line)
                if isinstance(event, dict) and "event" in event:
                    yield event
