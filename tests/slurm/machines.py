"""Pretended machines: namespaces of processes, so that a machine's death takes everything that ran on it."""

from __future__ import annotations

import os
import random
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

# The first process of a machine: sets up names, says so, and reaps orphans (a child of one that ignores CHLD
# leaves no zombie; Slurm would wait for it).
_BOOT = (
    'hostname "$1" && mount --no-mtab --bind "$2" /etc/hosts && echo up && exec env --ignore-signal=CHLD sleep infinity'
)


def clean_environment(**more: str) -> dict[str, str]:
    """This process's environment without what an outer Slurm left in it, and with the folders of daemons."""
    foreign = ("SLURM", "SBATCH", "SRUN", "SALLOC", "SACCT", "SCANCEL", "SQUEUE", "SUBMITIT")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    kept["PATH"] = os.pathsep.join([*kept.get("PATH", os.defpath).split(os.pathsep), "/usr/sbin", "/sbin"])
    return {**kept, **more}


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, below those that the kernel hands out."""
    found: list[int] = []
    while len(found) < count:
        port = random.randrange(18000, 32000)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        if port not in found:
            found.append(port)
    return found


class Machine:
    """A host of its own: processes, host name, mounts and /etc/hosts, but this machine's files and network.

    It dies with whoever made it, by SIGKILL too.
    """

    def __init__(self, name: str, hosts: Path, logs: Path, environment: Mapping[str, str]) -> None:
        self.name, self.logs, self.environment = name, logs, dict(environment)
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        boot = ["sh", "-c", _BOOT, "sh", name, str(hosts)]
        spaces = ["unshare", "--pid", "--mount", "--uts", "--mount-proc", "--fork", "--kill-child=KILL"]
        self._outer = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *spaces, *boot],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=self.environment,
        )  # fmt: skip
        assert self._outer.stdout is not None
        if self._outer.stdout.readline() != b"up\n":
            raise RuntimeError(f"machine {name} does not come up: exit {self._outer.wait()}")
        self.init = _children(self._outer.pid)[0]

    def _inside(self, argv: Sequence[str]) -> list[str]:
        return ["nsenter", f"--target={self.init}", "--pid", "--mount", "--uts", *argv]

    def run(self, *argv: str) -> str:
        """Run a command on it to its end and give what it printed."""
        return subprocess.run(
            self._inside(argv), env=self.environment, check=True, capture_output=True, text=True
        ).stdout

    def start(self, *argv: str, environment: Mapping[str, str] | None = None) -> None:
        """Start a daemon on it, named by its program; what it prints goes to its log."""
        daemon = Path(argv[0]).name
        with (self.logs / f"{self.name}-{daemon}.out").open("ab") as log:
            self._daemons[daemon] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *self._inside(argv)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**self.environment, **(environment or {})},
            )  # fmt: skip

    def check(self) -> None:
        """Raise with the end of its log if a daemon has died."""
        for daemon, process in self._daemons.items():
            if process.poll() is not None:
                said = (self.logs / f"{self.name}-{daemon}.out").read_text(errors="replace")[-2000:]
                raise RuntimeError(f"{daemon} on {self.name} exited with {process.returncode}: {said}")

    def kill_daemon(self, daemon: str) -> None:
        """Kill one daemon and leave what it started."""
        entered = self._daemons.pop(daemon)
        for pid in _children(entered.pid):
            os.kill(pid, 9)
        entered.wait()

    def stop(self) -> None:
        """Switch it off: everything on it is gone when this returns."""
        self._outer.kill()
        self._outer.wait()
        assert self._outer.stdout is not None
        self._outer.stdout.close()
        for process in self._daemons.values():
            process.wait(10)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
