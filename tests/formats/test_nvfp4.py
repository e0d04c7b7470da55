"""NVFP4 equals ModelOpt bit for bit, over every BF16 pattern."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

from dsqjob.formats import FormatError, e2m1, e4m3, nvfp4

RNG = np.random.default_rng(5)


@pytest.fixture(scope="module")
def modelopt() -> Any:
    """ModelOpt's own quantizer: importing it takes seconds, so once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor
    return NVFP4QTensor


def bf16(values: np.ndarray) -> np.ndarray:
    """Values that BF16 holds."""
    return (np.ascontiguousarray(values, np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)


def every_pattern() -> np.ndarray:
    patterns = (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32)
    finite = patterns[np.isfinite(patterns)]
    return finite[: len(finite) // 128 * 128]


def assert_equal(modelopt: Any, w: np.ndarray, amax: float) -> None:
    import torch

    widened = torch.tensor(amax).to(torch.bfloat16).float()
    theirs, scales, _ = modelopt.quantize(
        torch.tensor(w).to(torch.bfloat16), 16, weights_scaling_factor_2=widened / (6 * 448)
    )
    ours, our_scales, scale_2 = nvfp4.quantize(w, float(widened))
    assert scale_2 == np.float32(float(widened / (6 * 448)))
    assert np.array_equal(our_scales, scales.view(torch.uint8).numpy())
    assert np.array_equal(ours, theirs._quantized_data.numpy())


@pytest.mark.parametrize("amax", [3.3895e38, 448.0, 1.0, 0.0123, 1e-30, 2e-40])
def test_every_bf16_pattern_in_order_and_shuffled(modelopt: Any, amax: float) -> None:
    patterns = every_pattern()
    assert_equal(modelopt, patterns.reshape(8, -1), amax)
    for _ in range(3):
        assert_equal(modelopt, RNG.permutation(patterns).reshape(8, -1), amax)


@pytest.mark.parametrize("scale", [2e-39, 1e-20, 0.02, 1.0, 1e30])
def test_random_tensors_with_their_own_amax(modelopt: Any, scale: float) -> None:
    w = bf16(RNG.standard_normal((64, 256)) * scale)
    assert_equal(modelopt, w, float(np.abs(w).max()))


def test_ties_and_zeros(modelopt: Any) -> None:
    """Every half-way point between codes, under scales that are powers of two, with zeros of both signs."""
    middles = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, 0.0, -0.0], np.float32)
    w = RNG.choice(np.concatenate([middles, -middles]), (32, 64)) * np.exp2(RNG.integers(-8, 8, (32, 4))).repeat(16, 1)
    w[:, 0::16] = 6 * np.exp2(RNG.integers(-8, 8, (32, 4)))
    w[3] = 0.0
    assert_equal(modelopt, w.astype(np.float32), 6.0 * 2**8)


def test_a_negative_zero_is_code_0_and_a_negative_that_rounds_to_zero_is_code_8() -> None:
    x = np.array([-0.0, -1e-9, -0.25, 0.25, -0.2500001], np.float32)
    assert e2m1.encode(x).tolist() == [0, 8, 8, 0, 9]


@pytest.mark.parametrize(("amax", "id"), [(0.0, "amax-value"), (float("nan"), "amax-value"), (-1.0, "amax-value"),
                                          (float("inf"), "amax-value"), (1e-42, "amax-underflow")])  # fmt: skip
def test_an_amax_that_makes_no_scale_is_refused(amax: float, id: str) -> None:
    with pytest.raises(FormatError) as caught:
        nvfp4.weight_scale_2(amax)
    assert caught.value.id == id


def test_e4m3_is_torchs() -> None:
    import torch

    codes = torch.arange(256, dtype=torch.uint8)
    assert np.array_equal(codes.view(torch.float8_e4m3fn).float().numpy(), e4m3.VALUES, equal_nan=True)
    middles = (e4m3.VALUES[1:127] + e4m3.VALUES[:126]) / 2
    s = np.concatenate([RNG.random(100_000) * 448, RNG.random(100_000) * 0.1, e4m3.VALUES[:127], middles])
    s = np.clip(s, 2**-9, 448).astype(np.float32)
    assert np.array_equal(torch.tensor(s).to(torch.float8_e4m3fn).view(torch.uint8).numpy(), e4m3.encode_scale(s))


def test_powers_of_two_are_exact_in_the_window() -> None:
    k = np.arange(-9, 9)
    assert np.array_equal(e4m3.VALUES[e4m3.power_of_two(k)], np.exp2(k).astype(np.float32))
