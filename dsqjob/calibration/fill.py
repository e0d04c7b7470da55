"""The plan of data poured into a model's parameters: the second sink. No copy of the checkpoint is made."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

from dsqjob.checkpoint.header import TensorSpec
from dsqjob.dataplan.plan import Copy, FilePlan, Item, MultiplyOut, Region
from dsqjob.dataplan.sources import Sources
from dsqjob.errors import BugError, DataError
from dsqjob.formats.fp8 import multiply_out
from dsqjob.formats.mxfp4 import check_scales

_PIECE = 32 << 20
_READERS = 4
_BLOCK = 128
_RAW = {"F4": torch.float4_e2m1fn_x2, "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu}
_PLAIN = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "I32": torch.int32,
    "I64": torch.int64,
}


class _Piece(NamedTuple):
    """Rows of a tensor, and where they lie."""

    spec: TensorSpec
    row: int
    region: Region


def fill(
    plan: FilePlan, parameters: Mapping[str, torch.Tensor], sources: Sources, *, tick: Callable[[int], None]
) -> int:
    """Pour every tensor of ``plan`` into the parameter of its name, widening to the parameter's dtype; the bytes read.

    ``tick`` is told of bytes as they arrive, and may raise to stop. DataError ``model-tensor-missing`` for a parameter
    that the plan lacks, ``model-tensor-unknown`` for a tensor that the model lacks, ``model-tensor-shape``,
    ``model-tensor-dtype``.
    """
    _compare(plan, parameters)
    items = sorted(plan.items, key=_place)
    total = 0
    device = next(iter(parameters.values())).device
    with ThreadPoolExecutor(_READERS, initializer=_on_device, initargs=(device,)) as pool:
        for piece, data in _ahead(pool, _pieces(items, sources), sources, device.type == "cuda"):
            _store(parameters[piece.spec.name], piece, data)
            total += piece.region.nbytes
            tick(piece.region.nbytes)
    for item in items:
        if isinstance(item.op, MultiplyOut):
            total += _multiply_out(item.op, parameters[item.outputs[0].name], sources, tick)
    return total


def _place(item: Item) -> tuple[str, int]:
    match item.op:
        case Copy(region) | MultiplyOut(region, _):
            return region.file, region.offset
        case _:
            raise BugError("op-unknown", f"no way to pour {item.op!r} into a model")


def _pieces(items: list[Item], sources: Sources) -> Iterator[_Piece]:
    for item in items:
        if isinstance(item.op, Copy):
            for row, region in sources.chunks(item.op.region, _PIECE):
                yield _Piece(item.outputs[0], row, region)


def _on_device(device: torch.device) -> None:
    """Page-locked memory belongs to a thread's current device, which would be the first one."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _ahead(
    pool: ThreadPoolExecutor, pieces: Iterator[_Piece], sources: Sources, pinned: bool
) -> Iterator[tuple[_Piece, torch.Tensor]]:
    """Pieces in order with their bytes, a few of them read ahead on other threads."""
    waiting: deque[tuple[_Piece, Future[torch.Tensor]]] = deque()
    try:
        for piece in pieces:
            waiting.append((piece, pool.submit(_read, sources, piece.region, pinned)))
            if len(waiting) > _READERS:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        for _, future in waiting:
            future.cancel()


def _read(sources: Sources, region: Region, pinned: bool) -> torch.Tensor:
    """uint8 [rows, width], page-locked on its way to a GPU: torch keeps such blocks, so they are made once."""
    data = torch.empty((region.rows, region.width), dtype=torch.uint8, pin_memory=pinned, device="cpu")
    sources.read_into(region, data.numpy())
    return data


def _store(parameter: torch.Tensor, piece: _Piece, data: torch.Tensor) -> None:
    rows = slice(piece.row, piece.row + piece.region.rows)
    if piece.spec.dtype in _RAW:
        parameter.data.view(torch.uint8).view(-1, piece.region.width)[rows].copy_(data, non_blocking=True)
    else:
        values = data.view(_PLAIN[piece.spec.dtype])
        parameter.data.view(-1, values.shape[1])[rows].copy_(values, non_blocking=True)


def _multiply_out(op: MultiplyOut, parameter: torch.Tensor, sources: Sources, tick: Callable[[int], None]) -> int:
    scales = sources.read(op.scale)
    with sources.blaming(op.scale):
        check_scales(scales)
    for row, piece in sources.chunks(op.weight, _PIECE, multiple=_BLOCK):
        block = row // _BLOCK
        bits = multiply_out(sources.read(piece), scales[block : block + -(-piece.rows // _BLOCK)])
        values = torch.from_numpy(np.ascontiguousarray(bits).view(np.int16)).view(torch.bfloat16)
        parameter.data.view(-1, piece.width)[row : row + piece.rows].copy_(values.view(piece.rows, -1))
        tick(piece.nbytes)
    return op.weight.nbytes + op.scale.nbytes


def _compare(plan: FilePlan, parameters: Mapping[str, torch.Tensor]) -> None:
    specs = {spec.name: spec for item in plan.items for spec in item.outputs}
    for name in parameters:
        if name not in specs:
            raise _wrong("model-tensor-missing", "the model has this parameter, the checkpoint has it not", name)
    for name, spec in specs.items():
        if name not in parameters:
            raise _wrong("model-tensor-unknown", "the checkpoint has this tensor, the model has it not", name)
        parameter = parameters[name]
        shape = list(parameter.shape)
        if parameter.dtype == torch.float4_e2m1fn_x2:
            shape[-1] *= 2
        if shape != list(spec.shape):
            raise _wrong("model-tensor-shape", f"the model's is {shape}, the checkpoint's {list(spec.shape)}", name)
        raw = _RAW.get(spec.dtype)
        plain = _PLAIN.get(spec.dtype)
        fits = parameter.dtype == raw if raw else plain is not None and _widens(plain, parameter.dtype)
        if not fits:
            raise _wrong("model-tensor-dtype", f"{spec.dtype} cannot go into {parameter.dtype}", name)


def _widens(source: torch.dtype, target: torch.dtype) -> bool:
    """Integers into integers, floats into floats that hold at least as much; BF16 where the model wants it."""
    if source.is_floating_point != target.is_floating_point:
        return False
    return not source.is_floating_point or target.itemsize >= source.itemsize or target == torch.bfloat16


def _wrong(id: str, what: str, name: str) -> DataError:
    return DataError(
        id,
        what,
        where=name,
        way_out="release, inference code and inference_config must be of one model: check these three settings",
    )


def parameters_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter once, under its first name (tied ones have several)."""
    return dict(model.named_parameters())
