"""Made-up weights for a model of any size: the wiring runs, the values mean nothing, none is NaN."""

from __future__ import annotations

from collections.abc import Mapping

import torch

_SCALE_BYTES = (118, 122)
"""E8M0: 2^-9 to 2^-6."""
_LARGEST_E4M3 = 0x60
"""Codes below are numbers; the largest ones are NaN."""


def make_up(parameters: Mapping[str, torch.Tensor], choices: int, seed: int) -> int:
    """Fill every parameter; integers are below ``choices`` (expert numbers of routing tables). Bytes filled."""
    total = 0
    for number, parameter in enumerate(parameters.values()):
        data = parameter.data
        generator = torch.Generator(device=data.device).manual_seed(seed * 1_000_003 + number)
        if data.dtype == torch.float4_e2m1fn_x2:
            data.view(torch.uint8).random_(0, 256, generator=generator)
        elif data.dtype == torch.float8_e8m0fnu:
            data.view(torch.uint8).random_(*_SCALE_BYTES, generator=generator)
        elif data.dtype == torch.float8_e4m3fn:
            raw = data.view(torch.uint8)
            raw.random_(0, 256, generator=generator).bitwise_and_(0x80 | (_LARGEST_E4M3 - 1))
        elif data.dtype.is_floating_point:
            if data.ndim > 1:
                data.normal_(0, data.shape[-1] ** -0.5, generator=generator)
            else:
                data.fill_(1)
        else:
            data.random_(0, choices, generator=generator)
        total += data.numel() * data.itemsize
    return total
