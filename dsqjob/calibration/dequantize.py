"""Weights as BF16 tensors, on any device (1-formats, section 1). Every value of these formats is exact in BF16."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from dsqjob.formats import e2m1

_FP4_BLOCK = 32
_FP8_BLOCK = 128


@lru_cache(8)
def _pairs(device: torch.device) -> torch.Tensor:
    """int32 [256]: the two BF16 values of a byte of E2M1 codes, the low nibble's first."""
    values = torch.from_numpy(e2m1.VALUES).to(torch.bfloat16)
    codes = torch.arange(256, device="cpu")
    return torch.stack([values[codes & 15], values[codes >> 4]], -1).view(torch.int32).flatten().to(device)


def _powers(scale: torch.Tensor) -> torch.Tensor:
    """BF16 of E8M0 bytes: 2^(b - 127); byte 0 is the subnormal 2^-127."""
    byte = scale.view(torch.uint8).to(torch.int16)
    return torch.where(byte == 0, 1 << 6, byte << 7).to(torch.int16).view(torch.bfloat16)


def mxfp4(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """BF16 [out, in] of packed E2M1 ``weight`` [out, in/2] with E8M0 ``scale`` [out, in/32]."""
    packed = weight.view(torch.uint8)
    values = _pairs(packed.device)[packed.int()].view(torch.bfloat16)
    blocks = values.unflatten(-1, (-1, _FP4_BLOCK))
    return blocks.mul_(_powers(scale).unsqueeze(-1)).flatten(-2)


def fp8_blocks(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """BF16 [out, in] of E4M3 ``weight`` with E8M0 ``scale`` [ceil(out/128), ceil(in/128)]."""
    rows = _powers(scale).repeat_interleave(_FP8_BLOCK, 0)[: weight.shape[0]]
    return weight.to(torch.bfloat16) * rows.repeat_interleave(_FP8_BLOCK, 1)[:, : weight.shape[1]]


def bf16_weight(linear: Any) -> torch.Tensor:
    """The weight of one of the vendor's linear layers as BF16 [out, in], by its dtype and its sibling ``scale``."""
    weight: torch.Tensor = linear.weight
    if weight.dtype == torch.float4_e2m1fn_x2:
        return mxfp4(weight.data, linear.scale.data)
    if weight.dtype == torch.float8_e4m3fn:
        return fp8_blocks(weight.data, linear.scale.data)
    return weight
