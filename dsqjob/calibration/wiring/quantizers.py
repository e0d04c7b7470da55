"""A ModelOpt quantizer's running maximum. ModelOpt keeps it in a private place until calibration is finished; this is
the one module that knows where."""

from __future__ import annotations

from typing import cast

import torch
from modelopt.torch.quantization.nn import TensorQuantizer
from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

_BLOCK = 16
_LARGEST = 6 * 448.0
_LEAST = 1e-30
"""Keeps an all-zero input from a division by 0."""


def running_amax(quantizer: TensorQuantizer) -> torch.Tensor | None:
    """The maximum so far, 0-d, on the device of what was seen; None before the first value."""
    value: torch.Tensor | None = quantizer._calibrator._calib_amax
    return value


def set_running_amax(quantizer: TensorQuantizer, value: float, device: torch.device) -> None:
    """Continue from ``value``, as if it had been seen. ModelOpt's own are BF16, as its inputs are."""
    quantizer._calibrator._calib_amax = torch.tensor(value, dtype=torch.bfloat16, device=device)


def collecting(quantizer: TensorQuantizer) -> bool:
    """Whether the quantizer watches rather than quantizes."""
    return bool(quantizer._if_calib) and not quantizer._disabled


def summary_lines(model: torch.nn.Module) -> list[str]:
    """A line a quantizer, in the words and columns of ModelOpt's own summary."""
    return [f"{name:80} {module}" for name, module in model.named_modules() if isinstance(module, TensorQuantizer)]


def through(quantizer: TensorQuantizer, x: torch.Tensor) -> torch.Tensor:
    """``x`` [..., in] after the quantizer: itself while it collects or is off, its NVFP4 values otherwise.

    ModelOpt's simulated NVFP4 runs on GPUs only; on a CPU its real quantization and dequantization stand in.
    """
    if x.is_cuda or quantizer._disabled or collecting(quantizer):
        return cast(torch.Tensor, quantizer(x))
    amax = getattr(quantizer, "_amax", None)
    scale = (x.abs().amax() if amax is None else amax).float() / _LARGEST
    packed, block_scale, _ = NVFP4QTensor.quantize(x, _BLOCK, weights_scaling_factor_2=scale.clamp(min=_LEAST))
    values: torch.Tensor = packed.dequantize(
        dtype=x.dtype, scale=block_scale, double_scale=scale.clamp(min=_LEAST), block_sizes={-1: _BLOCK}
    )
    return values
