"""The reference's amax folder: found and identified here without torch, read by ``reference_import`` once."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from pathlib import Path

from dsqjob.amax.ledger import LEDGER, Ledger, file_digest, load_ledger
from dsqjob.errors import BugError, DataError, DsqjobError, UsageError

_FILE = re.compile(r"amax_dict_rank(\d+)-mp(\d+)\.pt")


def rank_files(folder: Path) -> list[Path]:
    """``amax_dict_rank{r}-mp{n}.pt`` of all ranks of one n. DataError ``amax-mixed-worlds``, ``amax-rank-missing``;
    an empty list where the folder has none."""
    found = {
        path: (int(match[1]), int(match[2])) for path in folder.glob("*.pt") if (match := _FILE.fullmatch(path.name))
    }
    worlds = {world for _, world in found.values()}
    if len(worlds) > 1:
        raise DataError(
            "amax-mixed-worlds",
            f"the amax files are of several world sizes: {sorted(worlds)}",
            where=folder,
            way_out="keep the files of one calibration run only",
        )
    if surplus := [path for path, (rank, world) in found.items() if rank >= world]:
        raise DataError(
            "amax-mixed-worlds",
            "a rank is not of its file's world size",
            where=surplus[0],
            way_out="keep the files of one calibration run only",
        )
    by_rank = {rank: path for path, (rank, _) in found.items()}
    for world in worlds:
        if absent := sorted(set(range(world)) - by_rank.keys()):
            raise DataError(
                "amax-rank-missing",
                f"the amax file of rank {absent[0]} of {world} is missing",
                where=folder / f"amax_dict_rank{absent[0]}-mp{world}.pt",
                way_out="copy it from the node that ran this rank, or calibrate again",
            )
    return [by_rank[rank] for rank in sorted(by_rank)]


def amax_identity(folder: Path) -> str:
    """Digest of an amax folder's content: its ledger, or the reference's files. UsageError ``amax-folder-empty``."""
    if (folder / LEDGER).is_file():
        return file_digest(folder / LEDGER)
    files = rank_files(folder)
    if not files:
        raise UsageError(
            "amax-folder-empty",
            f"the folder holds neither {LEDGER} nor amax_dict_rank*.pt",
            where=folder,
            way_out="calibrate first, point export.amax at a folder of amax, or set export.input_scale to one",
        )
    digest = hashlib.sha256("".join(f"{path.name}\0{file_digest(path)}\n" for path in files).encode())
    return digest.hexdigest()


def load_amax(folder: Path, imports: Path) -> Ledger:
    """The folder's ledger; one is imported from the reference's files into ``imports`` first where there is none.

    Importing needs torch, once; the process that imports is another one, so that this one stays light.
    """
    if (folder / LEDGER).is_file():
        return load_ledger(folder / LEDGER)
    target = imports / amax_identity(folder) / LEDGER
    if not target.is_file():
        _import(rank_files(folder), target)
    return load_ledger(target)


def _import(files: list[Path], target: Path) -> None:
    command = [sys.executable, "-P", "-m", "dsqjob.amax.reference_import", *map(str, files), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return
    cause, _, rest = done.stderr.strip().rpartition("\n")[2].partition("\t")
    what, _, where = rest.partition("\t")
    if done.returncode == UsageError.exit_code:
        raise UsageError(cause, what, where=where, way_out="run it where torch is: pip install 'dsqjob[worker]'")
    if done.returncode == DataError.exit_code:
        raise DataError(cause, what, where=where, way_out="calibrate again, or use the amax of an intact run")
    error: DsqjobError = BugError("amax-import", f"importing failed:\n{done.stderr}", where=files[0].parent)
    raise error
