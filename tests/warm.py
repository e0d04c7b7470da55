"""A warm parent: a process that imported what is slow once, and forks children that begin where it stands.

It is started fresh, does no tensor work, and has one thread, so that its children may start threads and gangs of their
own. A child is the whole command line of dsqjob, or a named function; it leads a session, by which everything that it
started can be found and killed.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).parent.parent


class Started:
    """A child of the warm parent. ``pid`` is also its session's number."""

    def __init__(self, warm: Warm, pid: int, said: Path) -> None:
        self._warm, self.pid, self._said = warm, pid, said

    def wait(self, seconds: float = 120) -> int:
        """Its exit code, negative for a signal; AssertionError after ``seconds``."""
        code = self._warm.ask(wait=self.pid, seconds=seconds)["code"]
        assert code is not None, f"still running after {seconds} s:\n{self.said()}"
        return int(code)

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def said(self) -> str:
        """Standard output and error so far."""
        return self._said.read_text(errors="replace")

    def processes(self) -> list[int]:
        """Living processes of its session."""
        return [pid for pid, (session, state, _) in _table().items() if session == self.pid and state not in "ZX"]

    def children(self) -> list[int]:
        """Living processes that it started itself, such as a supervisor's ranks, in the order of their starts."""
        found = [
            (begun, pid)
            for pid, (_, state, begun) in _table().items()
            if state not in "ZX" and _parent(pid) == self.pid
        ]
        return [pid for _, pid in sorted(found)]

    def kill_all(self) -> None:
        """SIGKILL the whole session."""
        while living := self.processes():
            for pid in living:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)


class Warm:
    """The parent; ``modules`` are imported once. A context manager."""

    def __init__(self, *modules: str) -> None:
        ours, theirs = socket.socketpair()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(CHECKOUT)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.warm", str(theirs.fileno()), *modules],
            pass_fds=[theirs.fileno()], env=environment, cwd=CHECKOUT, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        theirs.close()
        self._wire = ours.makefile("rw")
        assert json.loads(self._wire.readline()) == {"ready": True}

    def __enter__(self) -> Warm:
        return self

    def __exit__(self, *_: object) -> None:
        self._wire.close()
        self._process.kill()
        self._process.wait()

    def ask(self, **what: Any) -> dict[str, Any]:
        self._wire.write(json.dumps(what) + "\n")
        self._wire.flush()
        answer: dict[str, Any] = json.loads(self._wire.readline())
        return answer

    def start(
        self, *argv: object, said: Path, environment: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> Started:
        """``dsqjob ARGV...``; what it prints goes to the file ``said``."""
        what = {
            "argv": [str(word) for word in argv],
            "environment": dict(environment or {}),
            "cwd": str(cwd or CHECKOUT),
        }
        return Started(self, self.ask(start=what, said=str(said))["pid"], said)

    def call(self, function: str, *arguments: Any, said: Path, seconds: float = 120) -> None:
        """Run ``module:function`` with JSON arguments; it must end well."""
        what = {"function": function, "arguments": list(arguments), "environment": {}, "cwd": str(CHECKOUT)}
        started = Started(self, self.ask(start=what, said=str(said))["pid"], said)
        assert started.wait(seconds) == 0, started.said()

    def begin(self, function: str, *arguments: Any, said: Path) -> Started:
        """The same, without waiting for its end."""
        what = {"function": function, "arguments": list(arguments), "environment": {}, "cwd": str(CHECKOUT)}
        return Started(self, self.ask(start=what, said=str(said))["pid"], said)


def _table() -> dict[int, tuple[int, str, int]]:
    """Process -> (session, state, start time)."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            found[int(entry.name)] = (int(fields[3]), fields[0], int(fields[19]))
    return found


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _serve(fd: int, modules: Sequence[str]) -> None:
    for module in modules:
        __import__(module)
    wire = socket.socket(fileno=fd)
    stream = wire.makefile("rw")
    stream.write(json.dumps({"ready": True}) + "\n")
    stream.flush()
    codes: dict[int, int] = {}
    for line in stream:
        asked = json.loads(line)
        if "start" in asked:
            answer: dict[str, Any] = {"pid": _fork(asked["start"], asked["said"], wire)}
        else:
            answer = {"code": _reap(asked["wait"], asked["seconds"], codes)}
        stream.write(json.dumps(answer) + "\n")
        stream.flush()


def _reap(pid: int, seconds: float, codes: dict[int, int]) -> int | None:
    deadline = time.monotonic() + seconds
    while pid not in codes:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            codes[pid] = os.waitstatus_to_exitcode(status)
        elif time.monotonic() > deadline:
            return None
        else:
            time.sleep(0.02)
    return codes[pid]


def _fork(what: dict[str, Any], said: str, wire: socket.socket) -> int:
    begun, begin = os.pipe()
    pid = os.fork()
    if pid:
        os.close(begin)
        os.read(begun, 1)  # until it is a session of its own and its output goes to its file
        os.close(begun)
        return pid
    wire.close()
    os.close(begun)
    os.setsid()
    os.chdir(what["cwd"])
    os.environ.update(what["environment"])
    out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (out, 1), (out, 2)):
        os.dup2(source, target)
    os.close(begin)
    code = 70
    try:
        _run(what)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run(what: dict[str, Any]) -> None:
    if "argv" in what:
        from dsqjob.cli.main import main

        main(what["argv"])
    else:
        module, _, function = what["function"].partition(":")
        getattr(__import__(module, fromlist=[function]), function)(*what["arguments"])


if __name__ == "__main__":
    _serve(int(sys.argv[1]), sys.argv[2:])
