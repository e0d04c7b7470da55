"""What sbatch and srun say when they refuse, and the setting that it is about."""

from __future__ import annotations

import re
from typing import NamedTuple

from dsqjob.errors import UsageError


class Refusal(NamedTuple):
    """Text of Slurm (a pattern), the settings to look at, and the way out."""

    pattern: str
    setting: str
    way_out: str


_TABLE = tuple(
    Refusal(*row)
    for row in (
        ("invalid partition", "{jobs}.partition", "`sinfo -s` lists partitions"),
        (
            "invalid account|account/partition combination",
            "slurm.account",
            "`sacctmgr show associations user=$USER` lists accounts",
        ),
        ("invalid qos", "slurm.qos", "`sacctmgr show qos` lists them"),
        ("reservation is invalid|invalid reservation", "slurm.reservation", "`scontrol show reservation` lists them"),
        ("invalid feature", "slurm.constraint", "`sinfo -o '%n %f'` lists the nodes' features"),
        (
            "invalid generic resource|gres",
            "slurm.gpus, slurm.gpu_type, parallel.gpus_per_node",
            "`sinfo -o '%n %G'` lists the nodes' GPUs",
        ),
        (
            "requested node configuration is not available",
            "parallel.nodes, parallel.gpus_per_node, slurm.gpu_type, {jobs}.cpus, {jobs}.memory",
            "`sinfo -o '%n %c %m %G'` says what a node has",
        ),
        (
            "time limit is invalid|invalid --time|invalid time limit",
            "{jobs}.time",
            "`scontrol show partition` says MaxTime",
        ),
        ("invalid job array", "launcher.workers, slurm.throttle", "`scontrol show config` says MaxArraySize"),
        ("node count specification invalid", "parallel.nodes", "`sinfo` counts the nodes"),
        ("more processors requested", "{jobs}.cpus, parallel.nodes", "`sinfo -o '%n %c'` says what a node has"),
        ("invalid node name", "{jobs}.sbatch", "correct --nodelist or --exclude"),
        ("exclusive", "{jobs}.exclusive", "sites differ: no, node or topo"),
        ("segment|topology", "slurm.segment", "leave it out where the topology is no block"),
        ("(memory|mem).*(invalid|specification|not available|exceeds)", "{jobs}.memory", "ask for less"),
        (
            "container-|pyxis",
            "slurm.container",
            "this cluster has no pyxis, or cannot get the image: set slurm.container.image, or another "
            "slurm.container.kind",
        ),
        ("unrecognized option|invalid option|unknown option", "{jobs}.sbatch, slurm.srun", "remove that option"),
        ("job violates accounting|limit", "slurm.account, slurm.qos", "a limit of your account or qos; ask for less"),
        ("dependency problem", "slurm", "`dsqjob cancel JOB`, then run again"),
        (
            "unable to contact|connect failure|connection refused|timed out",
            "slurm",
            "the controller is down: try again",
        ),
    )
)


def explained(said: str, *, gang: bool, where: str = "") -> UsageError:
    """sbatch's own words, the setting to change, and how to find a valid value."""
    jobs = "slurm.gang" if gang else "slurm.workers"
    reason = " ".join(
        line.strip() for line in said.splitlines() if re.search("error|srun:|sbatch:|invalid", line, re.I)
    )
    for row in _TABLE:
        if re.search(row.pattern, said, re.I):
            return UsageError(
                "slurm-refused",
                reason or said.strip(),
                where=row.setting.format(jobs=jobs) + (f" ({where})" if where else ""),
                way_out=row.way_out,
            )
    return UsageError(
        "slurm-refused", reason or said.strip(), where=where or "slurm", way_out="see `dsqjob render slurm JOB`"
    )
