"""Which device ranks calibrate on, found out without initialising CUDA, which a fork would not survive."""

from __future__ import annotations

import os

import torch

from dsqjob.errors import UsageError


def device_kind(setting: str) -> str:
    """``cuda`` or ``cpu`` for the job's ``device``."""
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    if setting != "auto":
        return setting
    return "cuda" if torch.cuda.is_available() else "cpu"


def claim_device(setting: str, rank: int, local: int) -> torch.device:
    """The device of a rank, made current. UsageError ``gpu-missing``."""
    if device_kind(setting) == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local >= count:
        raise UsageError(
            "gpu-missing",
            f"this node has {count} GPUs, rank {rank} is its number {local}",
            where="parallel.gpus_per_node",
            way_out="ask for that many GPUs a node, or change nodes and gpus_per_node",
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)
