"""A private Slurm of pretended nodes with pretended GPUs, which leaves nothing behind.

Everything that it writes lies in one folder under /tmp; every process that it starts, and every job, lives in
namespaces that the kernel ends with us. It uses a munge of its own and touches none that is already there.
"""

from __future__ import annotations

import os
import re
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.slurm.configuration import Layout, gres_conf, slurm_conf, slurmdbd_conf
from tests.slurm.machines import Machine, clean_environment, free_ports
from tests.waiting import wait_until

FINISHED = frozenset(
    {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT"}
)
_FIELD = re.compile(r"[A-Z][A-Za-z:/_]*")


class Cluster:
    """Slurm with ``nodes`` machines ``n1``, ``n2``... of 16 cores and ``gpus`` GPUs of type h200.

    Partitions: ``main`` (default), ``high`` (preempts ``low``), ``low`` (requeued, 5 s of grace), ``short`` (at most
    10 minutes), ``closed`` (down). A requeued job waits ``requeue_delay`` seconds (120 on real clusters). With
    ``accounting``: MariaDB, slurmdbd, account ``project`` and qos ``urgent`` for this user.
    ``settings`` are lines of slurm.conf.
    """

    def __init__(
        self,
        nodes: int = 2,
        gpus: int = 8,
        *,
        accounting: bool = False,
        requeue_delay: int = 10,
        settings: Mapping[str, object | None] | None = None,
    ) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # paths of sockets must be short
        ports = free_ports(nodes + 3)
        self.layout = Layout(
            self.root, [f"n{number + 1}" for number in range(nodes)], gpus, ports[3:], *ports[:3],
            accounting, requeue_delay, settings or {},
        )  # fmt: skip
        self.environment = clean_environment(SLURM_CONF=str(self.root / "slurm.conf"))
        self._machines: dict[str, Machine] = {}
        # Removes the folder when we let go of its input, which a kill of this process does too.
        self._janitor = subprocess.Popen(
            ["sh", "-c", 'cat >/dev/null; until rm -rf "$1"; do sleep 0.1; done', "sh", str(self.root)],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    @property
    def nodes(self) -> list[str]:
        return list(self.layout.nodes)

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    def __enter__(self) -> Self:
        try:
            self._write_files()
            self._start_head()
            for node in self.nodes:
                self.start_node(node, wait=False)
            for node in self.nodes:
                self.wait_node(node, {"IDLE"})
        except BaseException as error:
            error.add_note(self.said())
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End every process and remove every file; a second call does nothing."""
        for machine in self._machines.values():
            machine.stop()
        self._machines.clear()
        if self._janitor.poll() is None:
            self._janitor.communicate()

    def said(self, lines: int = 15) -> str:
        """The end of every daemon's log."""
        tails = [(log.name, log.read_text(errors="replace").splitlines()[-lines:]) for log in self.logs.glob("*")]
        return "\n".join("\n  ".join([f"{name}:", *tail]) for name, tail in sorted(tails) if tail)

    def run(self, *argv: str | Path, code: int | None = 0, cwd: Path | None = None, seconds: float = 60) -> str:
        """Run a client as a user on the login node would; its standard output (of a failure, its error text)."""
        done = subprocess.run(
            [str(word) for word in argv],
            env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=seconds, check=False,
        )  # fmt: skip
        assert code is None or done.returncode == code, f"{argv}: exit {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout if done.returncode == 0 else done.stderr

    def submit(self, script: str, *options: str, folder: Path) -> str:
        """Submit a bash script that writes ``<job id>.out`` in ``folder``; the job id."""
        file = folder / f"{time.monotonic_ns()}.sh"
        file.write_text(f"#!/bin/bash\n{script}\n")
        output = f"--output={folder}/%j.out"
        return self.run("sbatch", "--parsable", "--open-mode=append", output, *options, file, cwd=folder).strip()

    def job(self, job: str) -> dict[str, str]:
        """What ``scontrol show job`` says of a job (of an array: of its first record)."""
        return _fields(self.run("scontrol", "show", "job", "-o", job).splitlines()[0])

    def node(self, name: str) -> dict[str, str]:
        """What ``scontrol show node`` says of a node."""
        return _fields(self.run("scontrol", "show", "node", "-o", name))

    def wait(self, job: str, states: Collection[str] = FINISHED) -> dict[str, str]:
        """Wait until a job is in one of ``states``; what Slurm says of it then.

        The wait of a requeued job is not lifted: for that long a node still refuses its old credential, and a launch
        that comes sooner may be lost.
        """
        seen: dict[str, str] = {}

        def reached() -> bool:
            seen.update(self.job(job))
            return seen["JobState"] in states

        wait_until(reached, pause=0.1, what=lambda: f"job {job} is not {'/'.join(sorted(states))}, but {seen}")
        return seen

    def wait_node(self, name: str, states: Collection[str]) -> None:
        """Wait until a node is in one of ``states``, such as IDLE or DOWN."""

        def reached() -> bool:
            for machine in self._machines.values():
                machine.check()
            return self.node(name)["State"].split("+")[0].rstrip("*") in states

        wait_until(reached, what=f"node {name} is not {'/'.join(sorted(states))}")

    def kill_node(self, name: str) -> None:
        """Cut a node's power: slurmd and all that ran there are gone at once. Slurm notices within 10 s or so."""
        self._machines.pop(name).stop()

    def kill_slurmd(self, name: str) -> None:
        """Kill a node's slurmd only; its jobs go on."""
        self._machines[name].kill_daemon("slurmd")

    def start_node(self, name: str, *, wait: bool = True) -> None:
        """Start a node (again), or its slurmd only where the node still runs."""
        if name not in self._machines:
            self._machines[name] = Machine(name, self.root / "hosts", self.logs, self.environment)
        self._machines[name].start("slurmd", "-D", "-N", name)
        if wait:
            self.wait_node(name, {"IDLE", "ALLOCATED", "MIXED"})

    def on_node(self, name: str, *argv: str) -> str:
        """What a command prints that runs on a node."""
        return self._machines[name].run(*argv)

    def _write_files(self) -> None:
        for folder in ("munge", "state", "logs", "gpus", *(f"spool-{node}" for node in self.nodes)):
            (self.root / folder).mkdir(mode=0o700 if folder != "munge" else 0o755)
        self.root.chmod(0o755)
        key = self.root / "munge" / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        for number in range(self.layout.gpus):
            os.mknod(self.root / "gpus" / f"gpu{number}", stat.S_IFCHR | 0o600, os.makedev(1, 3))
        names = "".join(f"127.0.0.1 {node}\n" for node in self.nodes)
        (self.root / "hosts").write_text(Path("/etc/hosts").read_text() + names)
        (self.root / "plugstack.conf").touch()
        (self.root / "slurm.conf").write_text(slurm_conf(self.layout))
        (self.root / "gres.conf").write_text(gres_conf(self.layout))
        if self.layout.accounting:
            conf = self.root / "slurmdbd.conf"
            conf.touch(mode=0o600)
            conf.write_text(slurmdbd_conf(self.layout))

    def _start_head(self) -> None:
        (self.root / "head-hosts").write_text(Path("/etc/hosts").read_text() + "127.0.0.1 head\n")
        head = self._machines["head"] = Machine("head", self.root / "head-hosts", self.logs, self.environment)
        folder = self.root / "munge"
        head.start(
            "munged", "--foreground", "--force", f"--socket={self.layout.munge_socket}", f"--key-file={folder}/key",
            f"--pid-file={folder}/pid", f"--log-file={folder}/log", f"--seed-file={folder}/seed", "--num-threads=4",
        )  # fmt: skip
        self._until_ready(self.layout.munge_socket.exists, "munged has no socket")
        if self.layout.accounting:
            self._start_accounting(head)
        head.start("slurmctld", "-D", "-i")
        self._until_ready(lambda: self._answers("scontrol", "ping"), "slurmctld does not answer")

    def _start_accounting(self, head: Machine) -> None:
        data, socket = self.root / "sql", self.root / "sql.socket"
        head.run(
            "mariadb-install-db", "--no-defaults", f"--datadir={data}", "--user=root",
            "--auth-root-authentication-method=normal", "--skip-test-db",
        )  # fmt: skip
        head.start(
            "mariadbd", "--no-defaults", f"--datadir={data}", "--user=root", f"--socket={socket}", "--skip-networking",
            f"--pid-file={self.root}/sql.pid", "--innodb-buffer-pool-size=64M", "--innodb-lock-wait-timeout=900",
        )  # fmt: skip
        self._until_ready(socket.exists, "mariadbd has no socket")
        head.start("slurmdbd", "-D", environment={"MYSQL_UNIX_PORT": str(socket)})
        self._until_ready(lambda: self._answers("sacctmgr", "-n", "list", "cluster"), "slurmdbd does not answer")
        for what in (
            ("cluster", "private"),
            ("account", "project", "Cluster=private"),
            ("qos", "urgent"),
            ("user", self.run("id", "-un").strip(), "Account=project", "DefaultAccount=project", "QOS=normal,urgent"),
        ):
            self.run("sacctmgr", "-i", "add", *what)

    def _answers(self, *argv: str) -> bool:
        return subprocess.run(argv, env=self.environment, capture_output=True, timeout=60, check=False).returncode == 0

    def _until_ready(self, condition: Callable[[], bool], what: str) -> None:
        def ready() -> bool:
            self._machines["head"].check()
            return condition()

        wait_until(ready, what=what)


def _fields(line: str) -> dict[str, str]:
    """The ``Name=value`` words of a line of scontrol; a value may hold spaces."""
    found: dict[str, str] = {}
    last = ""
    for word in line.split(" "):
        name, separator, value = word.partition("=")
        if separator and _FIELD.fullmatch(name):
            found[name], last = value, name
        elif last:
            found[last] += f" {word}"
    return {name: value.strip() for name, value in found.items()}
