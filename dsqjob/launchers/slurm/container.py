"""What a command runs in on a compute node: an argument list, and options of srun, for each kind of container."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from dsqjob.job.schema import Container

_SLURM_NAMES = ("SLURM_JOB_ID", "SLURM_NODEID", "SLURM_PROCID", "SLURMD_NODENAME")


@dataclass(frozen=True)
class Inside:
    """A command as srun gets it: options of srun, then the words of the command."""

    options: tuple[str, ...]
    argv: tuple[str, ...]
    afterwards: tuple[str, ...] = ()
    """A command for every node once the step has ended: removes what outlives a killed client."""


def inside(container: Container, argv: Sequence[str], *, name: str, gpus: bool, environment: Sequence[str]) -> Inside:
    """``argv`` in the container. ``name`` is the step's own; ``environment`` are names of the job's variables."""
    names = [*dict.fromkeys([*container.environment, *environment])]
    match container.kind:
        case "none":
            return Inside((), tuple(argv))
        case "pyxis":
            return Inside(_pyxis(container, names), tuple(argv))
        case "apptainer":
            return Inside((), (*_apptainer(container, gpus), *argv))
        case "docker":
            return Inside((), (*_docker(container, names, name, gpus), *argv), ("docker", "rm", "--force", name))


def _pyxis(container: Container, names: Sequence[str]) -> tuple[str, ...]:
    options = [f"--container-image={container.image}"]
    if container.mounts:
        options.append(f"--container-mounts={','.join(container.mounts)}")
    if container.workdir:
        options.append(f"--container-workdir={container.workdir}")
    if names:
        options.append(f"--container-env={','.join(names)}")
    return tuple(options)


def _apptainer(container: Container, gpus: bool) -> list[str]:
    words = ["apptainer", "exec", *(["--nv"] if gpus else [])]
    if container.mounts:
        words += ["--bind", ",".join(container.mounts)]
    if container.workdir:
        words += ["--pwd", container.workdir]
    return [*words, str(container.image)]


def _docker(container: Container, names: Sequence[str], name: str, gpus: bool) -> list[str]:
    """Killing the client leaves the container running, so it has a name to remove it by."""
    words = ["docker", "run", "--rm", "--name", name, "--user", f"{os.getuid()}:{os.getgid()}"]
    words += ["--network", "host", "--ipc", "host", *(["--gpus", "all"] if gpus else [])]
    for mount in container.mounts:
        words += ["-v", mount]
    if container.workdir:
        words += ["-w", container.workdir]
    for variable in (*_SLURM_NAMES, *(("CUDA_VISIBLE_DEVICES",) if gpus else ()), *names):
        words += ["-e", variable]
    return [*words, str(container.image)]
