"""Finding and ending the processes of one run."""

from __future__ import annotations

import os
import signal
from pathlib import Path


def of_job(job: Path) -> list[int]:
    """Process ids whose command line names this job file, this process apart."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            except (OSError, IndexError):
                continue
            if str(job).encode() in words and state != "Z":
                found.append(int(entry.name))
    return found


def kill_all(job: Path) -> int:
    """SIGKILL every process of the job; how many there were."""
    killed = 0
    while pids := of_job(job):
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
                killed += 1
            except ProcessLookupError:
                pass
    return killed
