"""A model-parallel checkpoint, ours or the vendor's, read back: each tensor of a plan as its file holds it."""

from __future__ import annotations

from pathlib import Path

from dsqjob.checkpoint.header import Header, TensorSpec, read_header
from dsqjob.dataplan.plan import Copy, FilePlan, Item, region_of
from dsqjob.engine.fingerprint import digest_of
from dsqjob.errors import DataError


def as_written(plan: FilePlan, folder: Path) -> FilePlan:
    """``plan`` with every tensor copied from ``folder/plan.name``.

    DataError ``mp-missing`` where the file is not there, ``mp-tensor-missing``, ``mp-tensor-unknown``, ``mp-format``
    where it is of another model or model-parallel degree.
    """
    header = open_mp_file(folder, plan.name)
    wanted = {spec.name: spec for item in plan.items for spec in item.outputs}
    path = folder / plan.name
    for name in wanted:
        if name not in header.tensors:
            raise _wrong("mp-tensor-missing", "the file lacks this tensor", path, name)
    for name, entry in header.tensors.items():
        if name not in wanted:
            raise _wrong("mp-tensor-unknown", "the release has no such tensor for this rank", path, name)
        spec = wanted[name]
        if not _same(spec, entry.dtype, entry.shape):
            said = f"should be {spec.dtype} {list(spec.shape)}, is {entry.dtype} {list(entry.shape)}"
            raise _wrong("mp-format", said, path, name)
    items = tuple(
        Item((TensorSpec(entry.name, entry.dtype, entry.shape),), Copy(region_of(header, plan.name, entry.name)))
        for entry in header.tensors.values()
    )
    return FilePlan(plan.name, header.metadata, items)


def open_mp_file(folder: Path, name: str) -> Header:
    """The header of a rank's file. DataError ``mp-missing``."""
    if not (folder / name).is_file():
        raise DataError(
            "mp-missing",
            "the model-parallel checkpoint lacks this file",
            where=folder / name,
            way_out="convert with the same model_parallel (--stage convert), or set calibrate.source to release",
        )
    return read_header(folder / name)


def mp_identity(folder: Path, names: list[str]) -> str:
    """Digest of the headers and sizes of a model-parallel checkpoint."""
    found = {}
    for name in names:
        header = open_mp_file(folder, name)
        tensors = [[e.name, e.dtype, list(e.shape), header.offset(e.name)] for e in header.tensors.values()]
        found[name] = [header.file_size, tensors]
    return digest_of(found)


def _same(spec: TensorSpec, dtype: str, shape: tuple[int, ...]) -> bool:
    return spec.dtype == dtype and tuple(spec.shape) == tuple(shape)


def _wrong(id: str, what: str, path: Path, tensor: str) -> DataError:
    return DataError(
        id,
        what,
        where=f"{path}: {tensor}",
        way_out="use the checkpoint of this release and model_parallel, or convert again",
    )
