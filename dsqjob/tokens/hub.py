"""Named data sets: a process of its own fetches their texts through ModelOpt's loader, so that this one stays light."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from dsqjob.errors import BugError, DsqjobError, PeerError, UsageError

_POLL = 0.2


def fetch(name: str, count: int, release: Path, target: Path, alive: Callable[[], None]) -> None:
    """Write the first ``count`` samples of a data set into ``target``, lines of ``{"text": ...}``.

    ``alive()`` is called all the while; what it raises stops the process. UsageError ``hub-packages``,
    ``hub-dataset``; PeerError ``hub-unreachable``; BugError ``hub-import``.
    """
    command = [sys.executable, "-P", "-m", "dsqjob.tokens.hub_import", name, str(count), str(release), str(target)]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said)
        try:
            while not _ended(process):
                alive()
        finally:
            process.kill()
            process.wait()
        said.seek(0)
        if process.returncode:
            raise _error(process.returncode, said.read(), f"tokens.data: dataset {name}")


def _ended(process: subprocess.Popen[bytes]) -> bool:
    try:
        process.wait(_POLL)
    except subprocess.TimeoutExpired:
        return False
    return True


def _error(code: int, said: str, where: str) -> DsqjobError:
    cause, _, what = said.strip().rpartition("\n")[2].partition("\t")
    kinds = {kind.exit_code: kind for kind in (UsageError, PeerError)}
    if code not in kinds or not what:
        return BugError("hub-import", f"fetching a data set ended with {code}:\n{said[-2000:]}", where=where)
    way_out = {
        "hub-packages": "pip install 'dsqjob[worker,hub]' where this stage runs, or give the samples as jsonl",
        "hub-unreachable": "run `--stage tokens` where there is network, or give the samples as jsonl",
    }
    return kinds[code](cause, what, where=where, way_out=way_out.get(cause, "name another data set, or give a jsonl"))
