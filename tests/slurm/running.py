"""Jobs of dsqjob on the pretended cluster, as a user on its login node has them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

from tests.harness import dsqjob, write_job
from tests.slurm.cluster import Cluster
from tests.waiting import wait_until


class Login:
    """A shell on the login node; every job is submitted with a low limit of time and memory."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster

    def job(self, folder: Path, release: Path, **settings: Any) -> Path:
        """A job file for Slurm."""
        asked = {"launcher__kind": "slurm", "launcher__workers": 2, "slurm__notice": 30}
        return write_job(folder, release, **{**asked, **settings})

    def dsqjob(self, *arguments: object, code: int | None = 0, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run dsqjob there."""
        return dsqjob(*arguments, code=code, environment={**self.cluster.environment, **environment})

    def run(self, job: Path, *arguments: object) -> dict[str, list[str]]:
        """``dsqjob run``: stage -> ids of the jobs that it submitted."""
        said = self.dsqjob("run", job, *arguments).stdout
        found = re.findall(r"^(\w+): submitted, job ([\d, ]+)", said, re.M)
        return {stage: ids.strip().split(", ") for stage, ids in found}

    def tasks(self, job: str) -> list[dict[str, str]]:
        """What Slurm says of every task of an array, or of a job."""
        lines = self.cluster.run("scontrol", "show", "job", "-o", job).splitlines()
        return [dict(re.findall(r"(\w+)=(\S*)", line)) for line in lines if line]

    def wait(self, job: str, seconds: float = 450, states: tuple[str, ...] = ()) -> list[str]:
        """Wait until all tasks of a job are over (or in ``states``); their states.

        The wait of a requeued job is not lifted (see Cluster.wait).
        """
        found: list[str] = []

        def reached() -> bool:
            found[:] = [task["JobState"] for task in self.tasks(job)]
            busy = ("PENDING", "RUNNING", "COMPLETING", "REQUEUED")
            return all(state in states if states else state not in busy for state in found)

        wait_until(reached, seconds, lambda: f"job {job} is {found}\n{self.said(job)}", pause=0.3)
        return found

    def said(self, job: str) -> str:
        """What a job wrote."""
        out = [Path(task["StdOut"]) for task in self.tasks(job)]
        return "\n".join(path.read_text(errors="replace") for path in out if path.is_file())


def processes(mark: str, host: str = "") -> list[int]:
    """Living processes of dsqjob's workers whose command line has ``mark``, on one of the pretended nodes or any."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            node = re.search(r"SLURMD_NODENAME=(\w+)", (folder / "environ").read_bytes().decode(errors="replace"))
        except OSError:
            continue
        ours = Path(words[0]).name.startswith("python") and "worker" in words and mark in words and state not in "ZX"
        if ours and (not host or (node is not None and node[1] == host)):
            found.append(int(folder.name))
    return found
