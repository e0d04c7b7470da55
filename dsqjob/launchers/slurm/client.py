"""The one place where Slurm's own commands are run."""

from __future__ import annotations

import subprocess
from typing import NamedTuple

from dsqjob.errors import PeerError, UsageError

_PATIENCE = 20.0


class Answer(NamedTuple):
    """How a command ended and what it printed."""

    code: int
    out: str
    said: str


def ask(*argv: str, seconds: float = _PATIENCE) -> Answer:
    """Run a command of Slurm. UsageError ``slurm-missing`` where it is not installed; PeerError ``slurm-silent``
    where it does not come back."""
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=seconds,
            check=False,
        )  # fmt: skip
    except FileNotFoundError:
        raise missing(argv[0]) from None
    except subprocess.TimeoutExpired:
        raise PeerError(
            "slurm-silent",
            f"{argv[0]} does not come back within {seconds:g} s",
            where=" ".join(argv),
            way_out="Slurm's controller may be down: try again later; jobs go on meanwhile",
        ) from None
    return Answer(done.returncode, done.stdout, done.stderr.strip())


def missing(program: str) -> UsageError:
    """A command of Slurm that is not installed here."""
    return UsageError(
        "slurm-missing",
        f"there is no {program} on this machine",
        where="PATH",
        way_out="run this on a login node of the cluster, or choose --on local",
    )
