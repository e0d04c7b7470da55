"""A stage's sbatch script: the job file's settings as submitit writes them down."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from submitit.slurm.slurm import SlurmExecutor

from dsqjob.engine.fingerprint import digest_of
from dsqjob.errors import UsageError
from dsqjob.job.schema import Job, Resources, Slurm

_SLURMS = ("SLURM_", "SLURMD_", "SBATCH_", "SRUN_")
SUBMITTED = "DSQJOB_SUBMITTED"
"""Tells the batch process that who sent it keeps its handle."""
_ALWAYS_KEPT = {"SLURM_CONF", "SLURM_CLUSTERS"}
_DEFAULTS = {"SBATCH_ACCOUNT": "account", "SBATCH_PARTITION": "partition", "SBATCH_QOS": "qos"}
"""A user's own defaults, and the parameters that they stand in for."""
_OWNED = frozenset(
    {"array", "chdir", "dependency", "error", "job-name", "kill-on-invalid-dep", "nodes", "no-requeue", "ntasks",
     "ntasks-per-node", "output", "parsable", "requeue", "signal", "wrap"}
)  # fmt: skip


@dataclass(frozen=True)
class Need:
    """What a stage needs: a gang of all nodes at once, or an array of ``tasks`` workers (1: a single job)."""

    stage: str
    gang: bool
    tasks: int = 1


@dataclass(frozen=True)
class Script:
    """A script as it is sent, and the file of the resolved job that it names."""

    need: Need
    name: str
    text: str
    job_file: Path
    logs: Path
    command: str
    parameters: Mapping[str, Any]


class Executor(SlurmExecutor):  # type: ignore[misc]
    """submitit's, sending a command instead of a pickle, with a dependency beside the script and not in it."""

    dependency = ""
    sent: Path | None = None
    """The script as written for sbatch; submitit leaves it behind where sbatch refuses."""

    @classmethod
    def affinity(cls) -> int:
        """A script can be written where there is no Slurm."""
        return 2

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        self.sent = submission_file_path
        hidden = [word for name in hidden_names(os.environ, self.parameters) for word in ("-u", name)]
        depend = [f"--dependency={self.dependency}"] if self.dependency else []
        return ["env", *hidden, f"{SUBMITTED}=1", "sbatch", *depend, str(submission_file_path)]

    def text(self, command: str) -> str:
        """The script for a shell command."""
        return str(self._make_submission_file_text(command, ""))

    def send(self, command: str, dependency: str) -> str:
        """Submit it; the job's id. submitit's FailedJobError holds what sbatch said."""
        self.dependency = dependency
        return str(self._submit_command(command).job_id)


def hidden_names(environment: Iterable[str], parameters: Mapping[str, Any]) -> list[str]:
    """Variables that sbatch must not see: those of a job that we run in, and those that would win over the script."""
    kept = {name for name, setting in _DEFAULTS.items() if parameters.get(setting) is None}
    return sorted(name for name in environment if name.startswith(_SLURMS) and name not in kept | _ALWAYS_KEPT)


def executor(logs: Path, parameters: Mapping[str, Any]) -> Executor:
    """submitit's executor with these parameters."""
    made = Executor(logs)
    given = dict(parameters)
    count = given.pop("map_count", None)
    made.update_parameters(**given)
    if count is not None:
        made.parameters["map_count"] = count
    return made


def write_script(job: Job, need: Need, job_file: Path) -> Script:
    """The script of a stage. UsageError ``job-invalid`` for sbatch options that are none."""
    name = job_name(job, need.stage)
    python = job.slurm.python or sys.executable
    command = shlex.join(["exec", python, "-P", "-m", "dsqjob", "batch", need.stage, str(job_file)])
    parameters = _parameters(job, need, name)
    text = executor(job.slurm.logs, parameters).text(command)
    return Script(need, name, text, job_file, job.slurm.logs, command, parameters)


def job_name(job: Job, stage: str) -> str:
    """Spare jobs wait for those of the same name, so that of another workspace must be another one."""
    apart = "" if job.slurm.requeue else f".{digest_of(str(job.workspace))[:8]}"
    return f"{job.name}.{stage}{apart}"


def _parameters(job: Job, need: Need, name: str) -> dict[str, Any]:
    slurm = job.slurm
    asked = slurm.gang if need.gang else slurm.workers
    more = {
        "signal": f"B:USR2@{slurm.notice}",
        "kill-on-invalid-dep": "yes",
        "chdir": str(job.workspace),
        ("requeue" if slurm.requeue else "no-requeue"): True,
        **({"reservation": slurm.reservation} if slurm.reservation else {}),
        **({"mem": asked.memory} if asked.memory else {}),
        **_exclusive(asked),
        **(_gpus(job) if need.gang else {}),
        **({"segment": slurm.segment} if need.gang and slurm.segment else {}),
        **_options(asked.sbatch, "slurm.gang.sbatch" if need.gang else "slurm.workers.sbatch"),
    }
    parameters = {
        "job_name": name,
        "partition": asked.partition,
        "time": asked.time,
        "nodes": job.parallel.nodes if need.gang else 1,
        "ntasks_per_node": 1,
        "cpus_per_task": _cores(job, need),
        "account": slurm.account,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
        "wckey": None,
        "stderr_to_stdout": True,
        "use_srun": False,
        "setup": _setup(slurm, array=need.tasks > 1),
        "additional_parameters": more,
    }
    if need.tasks > 1:
        parameters |= {"map_count": need.tasks, "array_parallelism": slurm.throttle or need.tasks}
    return parameters


def _cores(job: Job, need: Need) -> int | None:
    if need.gang:
        cores = job.slurm.gang.cpus
        return None if cores is None else cores * job.parallel.gpus_per_node
    return job.slurm.workers.cpus or 1


def _gpus(job: Job) -> dict[str, str]:
    slurm, count = job.slurm, job.parallel.gpus_per_node
    if job.device == "cpu" or slurm.gpus == "none":
        return {}
    kind = f"{slurm.gpu_type}:" if slurm.gpu_type else ""
    if slurm.gpus == "gres":
        return {"gres": f"gpu:{kind}{count}"}
    return {"gpus-per-node": f"{kind}{count}"}


def _exclusive(asked: Resources) -> dict[str, Any]:
    how: dict[str, dict[str, Any]] = {"no": {}, "node": {"exclusive": True}, "topo": {"exclusive": "topo"}}
    return how[asked.exclusive]


def _setup(slurm: Slurm, *, array: bool) -> list[str]:
    """A notice must not end the shell: the batch process asks Slurm whether it missed one."""
    inherited = [] if array else ["unset SLURM_ARRAY_JOB_ID SLURM_ARRAY_TASK_ID SLURM_ARRAY_TASK_COUNT"]
    exports = [f"export {name}={shlex.quote(value)}" for name, value in slurm.environment.items()]
    own = ["set -e", *slurm.setup, "set +e"] if slurm.setup else []
    return ["trap '' USR2", *inherited, *exports, *own]


def _options(words: list[str], setting: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not name.startswith("--") or len(name) < 3 or " " in name:
            raise UsageError(
                "job-invalid",
                f"{word!r} is no option of sbatch",
                where=setting,
                way_out="write one option an item, as --name=value",
            )
        if name[2:] in _OWNED:
            raise UsageError(
                "job-invalid",
                f"{name} is decided by dsqjob",
                where=setting,
                way_out="leave it out; `dsqjob schema` lists the settings that shape a job",
            )
        options[name[2:]] = value if equals else True
    return options
