"""What is tried before hours are spent: the storage on every node, and whether all ranks mean the same work."""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from dsqjob.engine.execute import TRANSIENT_ERRORS
from dsqjob.engine.publish import create_exclusively
from dsqjob.engine.workspace import unique_token
from dsqjob.errors import DsqjobError, PeerError, StorageError, UsageError
from dsqjob.gang.rank import Rank

_LEAST_INODES = 1000
_ELEMENTS = 1 << 18


def probe_storage(folder: Path, need: int) -> None:
    """Write, rename and claim in ``folder`` as the work will, with ``need`` bytes and some inodes free.

    UsageError ``workspace-probe``, StorageError ``storage-full``, ``storage-fault``; they name host and folder.
    """
    host, name = socket.gethostname(), f".probe-{unique_token()}"
    first, second = folder / name, folder / f"{name}.renamed"
    try:
        first.write_bytes(b"probe")
        first.rename(second)
        exclusive = create_exclusively(first, b"probe", unique_token()) and not create_exclusively(
            first, b"again", unique_token()
        )
        first.unlink()
        second.unlink()
    except OSError as error:
        raise _refused(error, host, folder) from None
    if not exclusive:
        raise UsageError(
            "workspace-probe",
            f"on {host} two processes could claim one file",
            where=folder,
            way_out="put the workspace on a file system with hard links or O_EXCL",
        )
    status = os.statvfs(folder)
    if status.f_bavail * status.f_frsize < need or (status.f_files and status.f_favail < _LEAST_INODES):
        raise StorageError(
            "storage-full",
            f"{host} finds {status.f_bavail * status.f_frsize:,} bytes and {status.f_favail:,} inodes free",
            where=folder,
            way_out="free space; the same command resumes",
        )


def _refused(error: OSError, host: str, folder: Path) -> DsqjobError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or error.errno in TRANSIENT_ERRORS:
        return StorageError(
            "storage-full" if full else "storage-fault",
            f"{host} cannot write there: {error.strerror}",
            where=folder,
            way_out=("free space" if full else "check the file system") + "; the same command resumes",
        )
    return UsageError(
        "workspace-probe",
        f"{host} cannot write there: {error.strerror}",
        where=folder,
        way_out="mount the same file system on all nodes, writable for this user",
    )


def agree(rank: Rank, facts: Mapping[str, str], device: torch.device) -> None:
    """All ranks must have the same ``facts``; then an all-reduce, checked and timed.

    UsageError ``gang-disagrees`` naming the first fact that differs, and two hosts; PeerError ``all-reduce``.
    """
    if not dist.is_initialized():
        return
    said: list[tuple[str, dict[str, str]]] = [("", {})] * rank.size
    dist.all_gather_object(said, (rank.host, dict(facts)))
    for number, (host, theirs) in enumerate(said):
        for name, value in said[0][1].items():
            if theirs.get(name) != value:
                raise UsageError(
                    "gang-disagrees",
                    f"{name} is {value!r} on {said[0][0]} (rank 0) and {theirs.get(name)!r} on {host} (rank {number})",
                    where=name,
                    way_out="give all nodes the same software, files and settings",
                )
    values = torch.full((_ELEMENTS,), float(rank.index + 1), device=device)
    begun = time.monotonic()
    dist.all_reduce(values)
    total = float(values[-1].item())
    seconds = time.monotonic() - begun
    if total != rank.size * (rank.size + 1) / 2:
        raise PeerError("all-reduce", f"an all-reduce over all ranks gave {total}", way_out="check the network")
    if rank.index == 0:
        rank.log.write("preflight", stage=rank.stage, all_reduce_seconds=round(seconds, 4), ranks=rank.size)
