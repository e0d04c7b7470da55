"""Release and checkpoint pairs for verification, made from the goldens and put right where ours differs on purpose."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsqjob.checkpoint.header import TensorSpec, encode, read_header
from dsqjob.checkpoint.release import INDEX, Release, open_release
from dsqjob.verify.facts import gather_facts
from dsqjob.verify.findings import Finding, ShardReport
from dsqjob.verify.folder import check_folder, read_shards
from dsqjob.verify.report import Report, conclude
from dsqjob.verify.servers import SERVERS, judge
from dsqjob.verify.settled import Expected, Measured, settle
from dsqjob.verify.shard import check_shard, routed_projections
from tests.harness import Tensor, read_shard

CHUNK = 1 << 20
Shard = dict[str, Tensor]


class Pair(NamedTuple):
    """A release, a checkpoint made from it, and how."""

    release: Path
    checkpoint: Path
    expected: Expected

    def copy(self, folder: Path) -> Pair:
        """The same with a checkpoint of its own to damage."""
        return self._replace(checkpoint=Path(shutil.copytree(self.checkpoint, folder / "damaged")))


def unheard(nbytes: int) -> None:
    """A tick that nobody waits for."""


def write_shard(path: Path, tensors: Shard, metadata: dict[str, str] | None) -> None:
    specs = [TensorSpec(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]
    path.write_bytes(encode(specs, metadata) + b"".join(tensor.data for tensor in tensors.values()))


def edit_shard(path: Path, edit: Callable[[Shard], object]) -> None:
    """Rewrite a shard after ``edit`` changed its tensors; wider dtypes stay first."""
    tensors, metadata = read_shard(path), read_header(path).metadata
    edit(tensors)
    width = {"F32": 0, "I64": 0, "I32": 0, "BF16": 1}
    write_shard(path, dict(sorted(tensors.items(), key=lambda item: width.get(item[1].dtype, 2))), metadata)


def edit_json(path: Path, edit: Callable[[Any], object]) -> None:
    value = json.loads(path.read_bytes())
    edit(value)
    path.write_text(json.dumps(value, indent=2))


def index_again(folder: Path) -> None:
    """An index that is true of the shards as they are."""
    names, total = {}, 0
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in read_shard(path).items():
            names[name] = path.name
            total += len(tensor.data)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": names}, indent=2))


def sums_again(folder: Path) -> None:
    """SHA256SUMS that are true of the files as they are."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "SHA256SUMS")
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(folder)}\n" for path in files]
    (folder / "SHA256SUMS").write_text("".join(lines))


def flip(path: Path, bit: int) -> None:
    """Flip one bit of a file."""
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(data)


def flip_tensor(folder: Path, name: str, bit: int) -> str:
    """Flip one bit of a tensor; its shard."""
    for path in sorted(folder.glob("*.safetensors")):
        header = read_header(path)
        if name in header.tensors:
            flip(path, header.offset(name) * 8 + bit)
            return path.name
    raise KeyError(name)


def measured(folder: Path) -> Measured:
    """The reference's amax files as rows."""
    import torch

    rows: dict[str, dict[str, float]] = {}
    for path in sorted(folder.glob("amax_dict_rank*.pt")):
        for key, value in torch.load(path, map_location="cpu", weights_only=True).items():
            projection, _, what = key.removesuffix("_quantizer._amax").rpartition("_")
            if projection.startswith("layers."):
                rows.setdefault(projection, {})[what] = float(value.float())
    return {path: (row.get("input"), row.get("weight")) for path, row in rows.items()}


def make_pair(golden: Path, folder: Path, route: str) -> Pair:
    """The golden export of ``route``, with what the reference leaves out: metadata, zero's sign, papers."""
    release, checkpoint = golden / "release", folder / route
    shutil.copytree(golden / f"nvfp4-{route}", checkpoint)
    for path in checkpoint.glob("*.safetensors"):
        tensors = read_shard(path)
        if route == "cast":
            restore_zero_signs(tensors, read_shard(release / path.name))
        write_shard(path, tensors, read_header(release / path.name).metadata)
    shutil.copytree(release / "inference", checkpoint / "inference")
    (checkpoint / "README.md").write_text("# A model card\n")
    index_again(checkpoint)
    opened = open_release(release)
    rows = measured(golden / "amax-mp2")
    weight, inputs = settle(rows, routed_projections(opened))
    recorded = {path: value for path, (_, value) in rows.items() if value is not None}
    papers: dict[str, Any] = {"release": opened.identity(), "weights": route, "input_scale": "calibrated"}
    papers["cast"] = {"blocks": 73728, "lossless": 73726} if route == "cast" else None
    (checkpoint / "dsqjob.json").write_text(json.dumps(papers, indent=2))
    sums_again(checkpoint)
    expected = Expected(route, "calibrated", weight, inputs, recorded)  # type: ignore[arg-type]
    return Pair(release, checkpoint, expected)


def restore_zero_signs(ours: Shard, source: Shard) -> None:
    """Blocks whose values the reference kept get the release's bytes, which differ in the sign of zeros only."""
    for name, tensor in source.items():
        if name.startswith("layers.") and ".experts." in name and tensor.dtype == "I8":
            mine, theirs = (one.bytes_2d().reshape(-1, 16) for one in (ours[name], tensor))
            same = (_without_zero_signs(mine) == _without_zero_signs(theirs)).all(axis=1)
            data = np.where(same[:, None], theirs, mine).astype(np.uint8).tobytes()
            ours[name] = ours[name]._replace(data=data)


def _without_zero_signs(packed: np.ndarray) -> np.ndarray:
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)
    return np.where(codes == 8, 0, codes)


def check_shards(
    pair: Pair, release: Release | None, *, chunk_bytes: int = CHUNK, only: str | None = None
) -> Iterator[ShardReport]:
    expected = pair.expected if release is not None else None
    for name, header in read_shards(pair.checkpoint).headers.items():
        if only in (None, name):
            path = pair.checkpoint / name
            yield check_shard(path, header, release, expected, chunk_bytes=chunk_bytes, tick=unheard)


def verify(pair: Pair, *, alone: bool = False, required: tuple[str, ...] = (), tp: int | None = None) -> Report:
    """A whole verification; ``alone`` without the release."""
    release = None if alone else open_release(pair.release)
    expected = None if alone else pair.expected
    shards = read_shards(pair.checkpoint)
    reports = list(check_shards(pair, release))
    folder = check_folder(pair.checkpoint, release, expected, shards, reports, tick=unheard)
    facts = gather_facts(folder, shards, reports, release)
    verdicts = [judge(facts, server, tp) for server in SERVERS]
    return conclude(pair.checkpoint, reports, folder, facts, verdicts, required=required)


def places(findings: tuple[Finding, ...]) -> set[tuple[str, str, str]]:
    return {(finding.id, finding.file, finding.tensor) for finding in findings}
