"""What a Slurm job runs on its first node: starts the step, hears Slurm's signals, and decides how the job ends."""

from __future__ import annotations

import math
import os
import re
import signal
import stat
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from dsqjob.engine.events import EventLog, read_events
from dsqjob.engine.workspace import Workspace
from dsqjob.errors import EXIT_CODES, DataError, DsqjobError, Interrupted, PeerError
from dsqjob.job.schema import Job
from dsqjob.launchers.slurm.allocation import Allocation
from dsqjob.launchers.slurm.cause import Cause, Term, Verdict, decide, fields, read_cause, read_term
from dsqjob.launchers.slurm.client import Answer, ask
from dsqjob.launchers.slurm.faults import Faults
from dsqjob.launchers.slurm.handle import Handle, read_handle
from dsqjob.launchers.slurm.limits import EARLY, too_short
from dsqjob.launchers.slurm.refusals import explained
from dsqjob.launchers.slurm.script import SUBMITTED
from dsqjob.launchers.slurm.step import step

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
_TICK = 0.2
_PATIENCE = 60.0
"""Seconds between asking a step to stop and ending it: a gang's ranks are given ten, supervisors some more."""
_STEP_WAIT = 20.0
"""Seconds after which srun should have its step."""
_SETTLE = 2.0
"""Seconds in which events of other nodes become visible on a slow file server."""
_SEVERITY = (65, 64, 74, 70, 69, 75)
"""Of a step that nobody asked to stop: its 75 are those of workers that srun ended because another one had failed."""
_SEVERITY_STOPPED = (65, 64, 74, 75, 70, 69)
_OF_A_RANK = ("rank-died", "rank-silent")
_ENDED = re.compile(r"^srun: error: (\S+): tasks? [\d,-]+: ", re.M)
_REFUSAL = re.compile(r"^(srun: (error|fatal|unrecognized|invalid)|slurmstepd: error: pyxis)[^\n]*", re.M)
_REFUSED = re.compile("unrecognized option|unable to|error: invalid|container|pyxis", re.I)
_PASSES = re.compile("not available|busy|unable to contact|timed out|temporar|expired", re.I)
"""Refusals that the next try may not meet."""


class Batch:
    """One run of a job: of a gang (all nodes at once), or of one worker of a pooled stage."""

    def __init__(self, job: Job, stage: str, *, gang: bool, job_file: Path, here: Allocation) -> None:
        self._job, self._stage, self._gang, self._job_file, self._here = job, stage, gang, job_file, here
        self._workspace = Workspace(job.workspace)
        self._faults = Faults(self._workspace, stage)
        self._heard: list[signal.Signals] = []
        self._spoken = ""
        self._term = Term(math.inf, math.inf)
        self._log = EventLog(
            self._workspace.events, worker=f"{stage}-batch", host=here.host, of=stage, job=here.name,
            restarts=here.restarts,
        )  # fmt: skip

    def run(self) -> int:
        """Bring the stage forward; the exit code that this job ends with. UsageError ``allocation-nodes``,
        ``allocation-gpus``, and what the worker raised before it began."""
        for number in _SIGNALS:
            signal.signal(number, self._hear)
        self._log.write("batch", nodes=self._here.nodes)
        self._make_known()
        try:
            self._refuse_short()
            if self._gang:
                self._here.check(self._job)
            code = self._attempts()
        except DsqjobError as error:
            self._log.write("batch-end", code=error.exit_code, why=error.what)
            raise
        for number in _SIGNALS:  # what ends now must not be killed in the middle of it; children inherit this
            signal.signal(number, signal.SIG_IGN)
        return code

    def _attempts(self) -> int:
        for number in range(self._job.launcher.max_faults + 1):
            attempt = f"{self._here.name}-{self._here.restarts}-{number}"
            code, cause, said = self._attempt(attempt)
            verdict = decide(code, cause, faults=self._faults.count, max_faults=self._job.launcher.max_faults)
            if verdict.fault:
                self._faults.add(attempt, self._blamed(attempt))
            again = verdict.fault and verdict.requeue and not self._job.slurm.requeue
            if not again:
                break
            self._say(f"a fault ({said}); once more on the same nodes, since the site forbids requeue")
            self._end_steps()
        return self._end(verdict, cause, said)

    def _make_known(self) -> None:
        """A job that was sent by hand is watched and cancelled like the others from now on."""
        if SUBMITTED in os.environ:
            return
        own, logs = self._here.name.partition("_")[0], str(self._job.slurm.logs)
        with suppress(DataError):
            known = read_handle(self._workspace, self._stage)
            if known is None or own not in known.jobs:
                tasks, file = self._here.tasks, str(self._job_file)
                Handle(self._stage, (own,), "", time.time(), "", file, tasks, logs).keep(self._workspace)

    def _refuse_short(self) -> None:
        """UsageError ``time-too-short`` where the notice would come as the job begins, and so for ever."""
        self._term = read_term(self._shown())
        least = self._job.slurm.notice + EARLY
        if self._term.length <= least:
            raise too_short(self._term.length, self._job, gang=self._gang)

    def _overdue(self) -> bool:
        """Whether a notice must have been given, by Slurm's own word: it may have come before we listened."""
        if time.time() < self._term.end - self._job.slurm.notice:
            return False
        self._term = read_term(self._shown())  # somebody may have changed the limit
        return time.time() >= self._term.end - self._job.slurm.notice

    def _shown(self) -> dict[str, str]:
        """What Slurm says of this job; nothing where it cannot be asked here."""
        answer = _asked("scontrol", "show", "job", "-o", self._here.name)
        return {} if answer.code or not answer.out else fields(answer.out.splitlines()[0])

    def _hear(self, number: int, _: FrameType | None) -> None:
        self._heard.append(signal.Signals(number))

    def _attempt(self, attempt: str) -> tuple[int, Cause, str]:
        """Run the step once: its exit code as the workers meant it, why it was stopped, what was said."""
        work = step(self._job, self._stage, gang=self._gang, job_file=self._job_file, here=self._here, attempt=attempt)
        code, cause, srun = self._step(work.argv)
        self._spoken = srun
        if work.afterwards:
            _asked(*work.afterwards)
        now = self._look(signalled=False)
        if cause is Cause.NONE or now not in (Cause.NONE, Cause.LIMIT_NOTICE, Cause.PREEMPTION_NOTICE):
            cause = now
        if not code:
            return 0, cause, "done"
        said = self._said(attempt) or self._said(attempt, wait=_SETTLE)
        if said:
            order = _SEVERITY if cause is Cause.NONE else _SEVERITY_STOPPED
            worst = min(said, key=lambda event: order.index(event["code"]))
            silent = set(map(_short, self._here.nodes)) - {_short(event["host"]) for event in said}
            if self._gang and silent and cause is Cause.NONE and worst["code"] == Interrupted.exit_code:
                return PeerError.exit_code, cause, f"the supervisor on {', '.join(sorted(silent))} died without a word"
            return int(worst["code"]), cause, f"[{worst['id']}] {worst['what']}"
        refusal = "\n".join(match[0] for match in _REFUSAL.finditer(srun))
        if cause is Cause.NONE and _REFUSED.search(refusal) and not _PASSES.search(refusal):
            raise explained(refusal, gang=self._gang, where="srun")
        return (code if code in EXIT_CODES else PeerError.exit_code), cause, f"srun ended with {code}: {_gist(srun)}"

    def _step(self, argv: Sequence[str]) -> tuple[int, Cause, str]:
        """Run srun to its end; its code, the cause of a signal, and what it and its tasks said."""
        while (ended := self._srun(argv)) is None:
            self._say("Slurm has not made the step: srun is started once more")
            self._end_steps()  # one that was made just now
        return ended

    def _srun(self, argv: Sequence[str]) -> tuple[int, Cause, str] | None:
        """None where srun still waits for its step: it can do so for ever when a node came back a moment ago."""
        cause, asked, looked, before = Cause.NONE, math.inf, 0, _written()
        doubt = time.monotonic() + _STEP_WAIT
        with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT) as srun:
            while srun.poll() is None:
                time.sleep(_TICK)
                if not self._heard and self._overdue():
                    self._heard.append(signal.SIGUSR2)
                if len(self._heard) > looked:
                    looked = len(self._heard)
                    srun.send_signal(signal.SIGUSR2)  # passed on to the tasks; SIGTERM makes srun kill them at once
                    asked = min(asked, time.monotonic())
                    cause = self._look(signalled=True)
                    self._say(f"{self._heard[-1].name}: {cause.value}; the workers are asked to stop")
                if time.monotonic() - asked > _PATIENCE:
                    srun.terminate()
                if time.monotonic() > doubt and not self._heard:
                    doubt = math.inf
                    if not self._step_runs():
                        srun.terminate()
                        return None
            return srun.returncode, cause, _said_since(before)

    def _step_runs(self) -> bool:
        """Whether Slurm has made the step; also where it cannot be asked here."""
        steps = self._steps()
        return steps is None or bool(steps)

    def _steps(self) -> list[str] | None:
        """This job's steps but the batch script; None where Slurm cannot be asked here."""
        answer = _asked("squeue", "--noheader", "--steps", "--jobs", self._here.name, "--format=%i")
        return None if answer.code else [one for one in answer.out.split() if one.rpartition(".")[2].isdigit()]

    def _end_steps(self) -> None:
        """A killed srun leaves its step, which would hold the nodes."""
        if steps := self._steps():
            _asked("scancel", *steps)

    def _look(self, *, signalled: bool) -> Cause:
        """The cause, from Slurm; where it cannot be asked here, what the signal alone tells."""
        shown = self._shown()
        if not shown:
            guess = Cause.CANCELLED if signal.SIGTERM in self._heard else Cause.LIMIT_NOTICE
            return guess if signalled else Cause.NONE
        return read_cause(shown, self._here.restarts, signalled=signalled)

    def _said(self, attempt: str, wait: float = 0.0) -> list[Mapping[str, Any]]:
        """The errors of this attempt's workers: srun gives the highest of all codes, which names nobody."""
        time.sleep(wait)
        return [event for event in self._events(attempt) if event["event"] == "error" and event["code"] in _SEVERITY]

    def _events(self, attempt: str) -> Iterator[dict[str, Any]]:
        return (event for event in read_events(self._workspace.events) if event.get("run") == attempt)

    def _blamed(self, attempt: str) -> list[str]:
        """Nodes where a rank or a worker died; or else the one whose supervisor ended first, as srun saw it."""
        if not self._gang:
            return [self._here.host]
        ended = [event for event in self._events(attempt) if event["event"] == "rank-ended"]
        died = {_short(event["host"]) for event in ended if event["id"] in _OF_A_RANK}
        if not died and (first := _ENDED.search(self._spoken)) is not None:
            died = {_short(first[1])}
        return [node for node in self._here.nodes if _short(node) in died]

    def _end(self, verdict: Verdict, cause: Cause, said: str) -> int:
        """Say how it ends, and put the job back into the queue where that is the verdict."""
        slurm = self._job.slurm
        back = False
        if verdict.requeue and slurm.requeue:
            back = self._requeue()
        elif not slurm.requeue and verdict.code != 75:
            self._dismiss_spares(keep_last=verdict.code == 0)
        if verdict.code == 0:
            self._faults.forget()
        then = "back into the queue" if back or cause is Cause.REQUEUED else "the job ends"
        if verdict.code == 75 and not slurm.requeue:
            then = "the next spare job goes on"
        self._log.write("batch-end", code=verdict.code, cause=cause.name, why=cause.value, requeued=back, said=said)
        self._say(f"exit {verdict.code} ({EXIT_CODES[verdict.code]}): {said}; {then}")
        return verdict.code

    def _requeue(self) -> bool:
        """Back into the queue, without nodes that failed twice; they can be excluded only once the job is there."""
        for number in _SIGNALS:  # requeue sends SIGTERM to everything here, this command included
            signal.signal(number, signal.SIG_IGN)
        name = self._here.name
        answer = _asked("scontrol", "requeue", name)
        if answer.code:
            self._say(f"requeue was refused: {answer.said}; way out: slurm.requeue: false, with slurm.spares")
            return False
        if bad := self._faults.bad_nodes:
            before = self._shown().get("ExcNodeList", "(null)")
            listed = ",".join(dict.fromkeys([*([] if before == "(null)" else [before]), *bad]))
            answer = _asked("scontrol", "update", f"JobId={name}", f"ExcNodeList={listed}")
            self._say(f"nodes with two faults are left out: {listed} {answer.said}".strip())
        return True

    def _dismiss_spares(self, *, keep_last: bool) -> None:
        """Spare jobs that are not needed; the last one tells the next stage that this one is done."""
        handle = read_handle(self._workspace, self._stage)
        own = self._here.name.partition("_")[0]
        if handle is None or own not in handle.jobs:
            return
        left = handle.jobs[handle.jobs.index(own) + 1 :]
        left = left[:-1] if keep_last else left
        if left:
            _asked("scancel", *left)

    def _say(self, text: str) -> None:
        print(f"dsqjob {self._stage} {self._here.name}: {text}", flush=True)


def _asked(*argv: str) -> Answer:
    """A command of Slurm's, which some sites do not have on compute nodes."""
    try:
        return ask(*argv)
    except DsqjobError as error:
        return Answer(error.exit_code, "", error.what)


def _written() -> int:
    """Bytes that this job's output file holds."""
    return os.fstat(1).st_size


def _said_since(begin: int) -> str:
    """This job's output file from that byte on; empty where output goes elsewhere."""
    if not stat.S_ISREG(os.fstat(1).st_mode):
        return ""
    with Path("/proc/self/fd/1").open("rb") as stream:
        stream.seek(begin)
        return stream.read().decode(errors="replace")


def _gist(text: str) -> str:
    """The line that names the error, or else the last one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if line.startswith("[")), lines[-1] if lines else "no word")


def _short(host: object) -> str:
    return str(host).partition(".")[0]
