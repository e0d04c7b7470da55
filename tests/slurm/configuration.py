"""The files of a private Slurm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Layout:
    """What the files say; ``settings`` win over what is chosen here (None leaves a line out)."""

    root: Path
    nodes: Sequence[str]
    gpus: int
    node_ports: Sequence[int]
    controller_port: int
    database_port: int
    sql_port: int
    accounting: bool
    requeue_delay: int
    settings: Mapping[str, object | None]

    @property
    def munge_socket(self) -> Path:
        return self.root / "munge" / "socket"


def slurm_conf(layout: Layout) -> str:
    """slurm.conf: daemons as root, nodes bigger than this machine, partitions that preempt."""
    root = layout.root
    values: dict[str, object | None] = {
        "ClusterName": "private",
        "SlurmctldHost": "localhost(127.0.0.1)",
        "SlurmctldPort": layout.controller_port,
        "FirstJobId": layout.controller_port,  # ports of gangs follow from it: two clusters must not give the same ids
        "SlurmUser": "root",
        "SlurmdUser": "root",
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={layout.munge_socket},cred_expire={layout.requeue_delay}",
        "StateSaveLocation": root / "state",
        "SlurmdSpoolDir": f"{root}/spool-%n",
        "SlurmctldPidFile": root / "slurmctld.pid",
        "SlurmdPidFile": f"{root}/slurmd-%n.pid",
        "SlurmctldLogFile": root / "logs" / "slurmctld.log",
        "SlurmdLogFile": f"{root}/logs/slurmd-%n.log",
        "PlugStackConfig": root / "plugstack.conf",
        "CommunicationParameters": "NoCtldInAddrAny",
        "SlurmdParameters": "config_overrides",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "MpiDefault": "none",
        "MailProg": "/bin/true",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core_Memory",
        "DefMemPerCPU": 1000,
        "GresTypes": "gpu",
        "ReturnToService": 2,
        "KillWait": 5,
        "SlurmdTimeout": 9,
        "MessageTimeout": 5,
        "TCPTimeout": 2,
        "UnkillableStepTimeout": 60,
        "SchedulerParameters": "sched_interval=2,sched_min_interval=100000,bf_interval=2,batch_sched_delay=0",
        "PreemptType": "preempt/partition_prio",
        "PreemptMode": "REQUEUE",
        "JobRequeue": 1,
        "EnforcePartLimits": "ALL",
        "MinJobAge": 3600,
        "AccountingStorageType": "accounting_storage/none",
        "JobAcctGatherType": "jobacct_gather/none",
    }
    if layout.accounting:
        values |= {
            "AccountingStorageType": "accounting_storage/slurmdbd",
            "AccountingStorageHost": "127.0.0.1",
            "AccountingStoragePort": layout.database_port,
            "AccountingStoragePass": layout.munge_socket,
            "AccountingStorageTRES": "gres/gpu",
            "AccountingStorageEnforce": "associations,limits,qos",
        }
    values |= layout.settings
    lines = [f"{name}={value}" for name, value in values.items() if value is not None]
    for node, port in zip(layout.nodes, layout.node_ports, strict=True):
        lines.append(
            f"NodeName={node} NodeHostname={node} NodeAddr=127.0.0.1 Port={port} CPUs=16 RealMemory=256000 "
            f"Gres=gpu:h200:{layout.gpus} Feature=h200 State=UNKNOWN"
        )
    everywhere = f"Nodes={','.join(layout.nodes)} DefaultTime=10"
    lines += [
        f"PartitionName=main {everywhere} Default=YES PriorityTier=10 PreemptMode=OFF",
        f"PartitionName=high {everywhere} PriorityTier=100 PreemptMode=OFF",
        f"PartitionName=low {everywhere} PriorityTier=1 PreemptMode=REQUEUE GraceTime=5",
        f"PartitionName=short {everywhere} PriorityTier=10 PreemptMode=OFF MaxTime=10",
        f"PartitionName=closed {everywhere} PriorityTier=10 PreemptMode=OFF State=DOWN",
    ]
    return "\n".join(lines) + "\n"


def gres_conf(layout: Layout) -> str:
    """gres.conf: a GPU is a device file (a null), without which Slurm refuses the count."""
    files = layout.root / "gpus" / f"gpu[0-{layout.gpus - 1}]"
    return f"NodeName={','.join(layout.nodes)} Name=gpu Type=h200 File={files}\n"


def slurmdbd_conf(layout: Layout) -> str:
    """slurmdbd.conf: its database is reached through a socket, named by MYSQL_UNIX_PORT."""
    values = {
        "DbdHost": "localhost",
        "DbdAddr": "127.0.0.1",
        "DbdPort": layout.database_port,
        "SlurmUser": "root",
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={layout.munge_socket}",
        "StorageType": "accounting_storage/mysql",
        "StorageHost": "localhost",
        "StorageUser": "root",
        "StorageLoc": "slurm_accounts",
        "PidFile": layout.root / "slurmdbd.pid",
        "LogFile": layout.root / "logs" / "slurmdbd.log",
    }
    return "".join(f"{name}={value}\n" for name, value in values.items())
