"""The order of stages: what is done, what to launch, what came of it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from dsqjob.engine.claims import Claims, whoami
from dsqjob.engine.events import EventLog
from dsqjob.engine.execute import StopRequest
from dsqjob.engine.stage import GangStage, Record, Stage, StageState
from dsqjob.engine.workspace import unique_token
from dsqjob.errors import EXIT_CODES, BugError, DsqjobError, UsageError
from dsqjob.launchers import LAUNCHERS
from dsqjob.stages import MEASURING, STAGES, build, pipeline
from dsqjob.stages.inputs import Inputs

_REMADE = frozenset(
    {
        "tokens-missing",
        "mp-missing",
        "amax-folder-empty",
        "export-unfinished",
        "checkpoint-missing",
        "fingerprint-changed",
    }
)
"""Refusals of a stage whose inputs an earlier one makes."""


@dataclass(frozen=True)
class Command:
    """How the workers of this job are started: command lines that any launcher runs somewhere."""

    job: str
    sets: tuple[str, ...] = ()

    def worker(self, stage: str, index: int, count: int, run: str) -> list[str]:
        return self._worker(stage, run, "--worker", str(index), "--workers", str(count))

    def node(self, stage: str, index: int, rendezvous: str, attempt: str, run: str) -> list[str]:
        """The supervisor of one node of a gang."""
        return self._worker(stage, run, "--node", str(index), "--rendezvous", rendezvous, "--attempt", attempt)

    def _worker(self, stage: str, run: str, *which: str) -> list[str]:
        argv = [sys.executable, "-P", "-m", "dsqjob", "worker", stage, *which, "--run", run, "--die-with-parent"]
        for item in self.sets:
            argv += ["--set", item]
        return [*argv, self.job]


@dataclass(frozen=True)
class StageResult:
    """A finished stage: its records in the order of its units, and whether anything had to be done."""

    stage: Stage
    records: tuple[Record, ...]
    worked: bool


class WorkersFailed(DsqjobError):
    """Workers already said what is wrong; their exit code is passed on."""

    def __init__(self, code: int, said: str, log: Path) -> None:
        super().__init__("workers-failed", said or EXIT_CODES[code], where=log)
        self.exit_code = code

    def __str__(self) -> str:
        return self.what


def selected(inputs: Inputs, stage: str | None, through: str | None) -> tuple[str, ...]:
    """The stages that ``--stage`` and ``--through`` ask for: those that the job needs, and the two that are named."""
    if stage is not None and through is None:
        return (stage,)
    first = STAGES.index(stage) if stage is not None else 0
    last = STAGES.index(through) if through is not None else len(STAGES)
    order = pipeline(inputs, always=not {stage, through}.isdisjoint(MEASURING))
    names = tuple(n for n in STAGES if first <= STAGES.index(n) <= last and (n == stage or n in order))
    if not names:
        raise UsageError(
            "nothing-selected",
            f"no stage of this job lies between --stage {stage} and --through {through}",
            where="--stage, --through",
            way_out=f"the order is {', '.join(STAGES)}",
        )
    return names


def restart(inputs: Inputs, names: Sequence[str]) -> list[Path]:
    """Forget these stages and those made from their output, last stage first; the files removed. What would refuse one
    of them to begin is raised before anything is removed."""
    follow = {"export": ("finalize", "verify"), "finalize": ("verify",)}
    wanted = {*names, *(later for name in names for later in follow.get(name, ()))}
    before = Inputs(inputs.job)  # what it reads changes with the restart
    for name in names:
        try:
            stage = build(name, before)
            stage.check()
            stage.fingerprint  # noqa: B018 (reads every input)
        except DsqjobError as error:
            if name == names[0] or error.id not in _REMADE:
                raise
    _refuse_launched(inputs)
    removed = []
    for name in reversed(STAGES):
        if name in wanted:
            state = StageState(inputs.workspace, build(name, inputs))
            removed += state.restart()
            EventLog(inputs.workspace.events, worker="restart", host=whoami()["host"]).write("restart", stage=name)
    return removed


def _refuse_launched(inputs: Inputs) -> None:
    """UsageError ``restart-while-running`` where another process launches workers of this job, or will."""
    claims = Claims(inputs.workspace.launches)
    for holder in claims.alive():
        if holder and not (claims.nearby(holder) and holder["pid"] == os.getpid()):
            raise UsageError(
                "restart-while-running",
                f"process {holder.get('pid')} on {holder.get('host')} runs this job",
                where=claims.folder,
                way_out="dsqjob cancel JOB first, or wait for it",
            )


@dataclass(frozen=True)
class Outstanding:
    """A stage that is not done: whether it needs a gang, and how many units are left (None: not known yet)."""

    name: str
    gang: bool
    units: int | None


def outstanding(inputs: Inputs, names: Sequence[str], *, queued: Collection[str] = ()) -> list[Outstanding]:
    """Those of these stages that are not done, for a launcher that submits; what can be refused now is.

    ``queued``: stages that others already work on, or will. What comes after an unfinished stage counts as not done,
    since its inputs are not known yet.
    """
    found: list[Outstanding] = []
    awaited = any(STAGES.index(name) < STAGES.index(names[0]) for name in queued)
    for name in names:
        if name in queued:
            awaited = True
            continue
        stage = build(name, inputs)
        state, units = StageState(inputs.workspace, stage), list(stage.units)
        if not awaited:
            begun = state.compare()
            units = state.missing()
            if begun and not units and not stage.wanted():
                stage.settle()
                continue
            stage.check()
        out = sum(unit.bytes_out for unit in units)
        state.refuse_disk(out)
        known = len(units) if out or not awaited else None  # what only reads, reads files that are not there yet
        found.append(Outstanding(name, isinstance(stage, GangStage), known))
        awaited = True
    return found


def run_stage(
    inputs: Inputs, name: str, command: Command, *, stop: StopRequest, watch: Callable[[Stage], None]
) -> StageResult:
    """Bring one stage to its end, or raise what stopped it. A finished one is recognised and left alone."""
    stage = build(name, inputs)
    state = StageState(inputs.workspace, stage)
    begun = state.compare()
    missing = state.missing()
    worked = bool(missing) or stage.wanted()
    if begun and not worked:
        state.sweep_all()  # what died between its record and its own sweep
        stage.settle()
    else:
        stage.check()
        if isinstance(stage, GangStage):
            state.refuse_running()
        state.check_disk()
        state.begin()
        if isinstance(stage, GangStage):
            _launch_gang(inputs, stage, command, stop, lambda: watch(stage))
        else:
            _launch_pool(inputs, stage, command, stop, lambda: watch(stage))
    records = tuple(record for unit in stage.units if (record := state.record(unit)) is not None)
    if len(records) < len(stage.units):
        raise BugError("stage-incomplete", f"workers of {name} ended well, yet units are missing", where=stage.folder)
    return StageResult(stage, records, worked)


def _launch_pool(inputs: Inputs, stage: Stage, command: Command, stop: StopRequest, watch: Callable[[], None]) -> None:
    launcher, run = inputs.job.launcher, unique_token()
    count = max(1, min(launcher.workers, len(StageState(inputs.workspace, stage).missing())))
    commands = [command.worker(stage.name, index, count, run) for index in range(count)]
    logs = [inputs.workspace.logs / f"{stage.name}-{index}.log" for index in range(count)]
    run_workers = import_module(LAUNCHERS["local"]).run_workers
    again = _teller(inputs, stage)
    code, said = run_workers(commands, logs, max_faults=launcher.max_faults, stop=stop, watch=watch, again=again)
    if code:
        raise WorkersFailed(code, said, inputs.workspace.logs)


def _launch_gang(
    inputs: Inputs, stage: GangStage, command: Command, stop: StopRequest, watch: Callable[[], None]
) -> None:
    launcher, run, nodes = inputs.job.launcher, unique_token(), range(stage.nodes)

    def commands(rendezvous: str, attempt: str) -> list[list[str]]:
        return [command.node(stage.name, index, rendezvous, attempt, run) for index in nodes]

    code, said = import_module(LAUNCHERS["local"]).run_gang(
        commands,
        [inputs.workspace.logs / f"{stage.name}-node{index}.log" for index in nodes],
        run=run,
        gpus_per_node=0 if inputs.job.device == "cpu" else stage.ranks_per_node,
        patience=stage.silence_seconds,
        max_faults=launcher.max_faults,
        stop=stop,
        watch=watch,
        again=_teller(inputs, stage),
    )
    if code:
        raise WorkersFailed(code, said, inputs.workspace.logs)


def _teller(inputs: Inputs, stage: Stage) -> Callable[[str], None]:
    """Tells people, and the event log, that workers are started again."""

    def tell(line: str) -> None:
        print(line, file=sys.stderr, flush=True)
        log = EventLog(inputs.workspace.events, worker="launcher", host=whoami()["host"])
        log.write("again", stage=stage.name, what=line)

    return tell
