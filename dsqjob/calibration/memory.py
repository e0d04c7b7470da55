"""A device that is too small, said in words: what a rank needs, what there is, what to change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from dsqjob.errors import UsageError

_GIB = 1 << 30
_WAY_OUT = (
    "take a larger model_parallel over more GPUs, a smaller calibrate.batch_size or tokens.sequence_length, or free"
    " the device of other processes"
)


def refuse_full_device(rank: int, device: torch.device, need: Mapping[str, int]) -> None:
    """UsageError ``device-memory`` where the GPU has less free than the rank needs; before any weight is read."""
    if device.type != "cuda":
        return
    free, total = torch.cuda.mem_get_info(device)
    if free < sum(need.values()):
        raise UsageError(
            "device-memory",
            f"rank {rank} needs {_in_words(need)}; of {total / _GIB:.1f} GiB, {free / _GIB:.1f} are free",
            where=f"{device}: {torch.cuda.get_device_name(device)}",
            way_out=_WAY_OUT,
        )


@contextmanager
def out_of_memory_in_words(rank: int, need: Mapping[str, int]) -> Iterator[None]:
    """UsageError ``out-of-memory`` for an allocation that failed, on a GPU or in host memory."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        first = (str(error).splitlines() or [""])[0]
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in first:
            raise
        raise UsageError(
            "out-of-memory",
            f"rank {rank} needs about {_in_words(need)}, and did not get it ({first[:200]})",
            where="parallel, calibrate, tokens",
            way_out=_WAY_OUT,
        ) from None


def _in_words(need: Mapping[str, int]) -> str:
    parts = ", ".join(f"{name} {size / _GIB:.2f}" for name, size in need.items())
    return f"{sum(need.values()) / _GIB:.2f} GiB ({parts})"
