"""The checking formulas against ModelOpt, and against each format's definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from modelopt.torch.quantization.qtensor import NVFP4QTensor

from dsqjob.verify import plain
from dsqjob.verify.settled import settle

VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def mxfp4(seed: int, low: int, high: int, rows: int = 64, columns: int = 512) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    packed = rng.integers(0, 256, (rows, columns // 2), dtype=np.uint8)
    packed[0] = 0
    packed[1] = 0x88
    return packed, rng.integers(low, high, (rows, columns // 32), dtype=np.uint8)


def dequantized(packed: np.ndarray, e8m0: np.ndarray) -> np.ndarray:
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)
    return VALUES[codes] * np.repeat(np.ldexp(np.float32(1), e8m0.astype(np.int32) - 127), 32, axis=1)


def against_modelopt(packed: np.ndarray, e8m0: np.ndarray, scale_2: np.float32) -> plain.Outcome:
    w = torch.from_numpy(dequantized(packed, e8m0)).to(torch.bfloat16)
    quantized, scales, _ = NVFP4QTensor.quantize(w, 16, weights_scaling_factor_2=torch.tensor(scale_2))
    nibbles, blocks = quantized._quantized_data.numpy(), scales.view(torch.uint8).numpy()
    return plain.check_requantize(packed, e8m0, nibbles, blocks, scale_2)


@pytest.mark.parametrize(("low", "high"), [(118, 124), (90, 128), (0, 200), (0, 30)])
@pytest.mark.parametrize("shrink", [1.0, 1.37, 700.0])
def test_requantizing_agrees_with_modelopt(low: int, high: int, shrink: float) -> None:
    """Also where the recorded amax is not the weight's own."""
    packed, e8m0 = mxfp4(low + high, low, high)
    scale_2 = np.float32(np.abs(dequantized(packed, e8m0)).max() * shrink) / np.float32(2688)
    assert against_modelopt(packed, e8m0, scale_2)[:2] == (None, None)


@pytest.mark.parametrize("odd", [1, 3, 5, 7, *range(17, 33, 2)])
def test_ties_agree_with_modelopt(odd: int) -> None:
    """Tensor scales under which block scales and elements fall between two codes."""
    packed, e8m0 = mxfp4(odd, 112, 128, rows=24)
    packed[:, ::16] &= 0x77
    packed[2:8] &= 0x33
    for k in (-6, 3, 12):
        for divisor in (odd, odd / 3, 6 * odd):
            assert against_modelopt(packed, e8m0, np.float32(2.0**k / divisor))[:2] == (None, None)


def test_the_first_difference_is_named_and_all_are_counted() -> None:
    packed, e8m0 = mxfp4(1, 118, 124)
    scales = np.repeat((e8m0 - int(e8m0.max()) + 8 + 7) << 3, 2, axis=1).astype(np.uint8)
    k_max = int(e8m0.max()) - 127
    assert plain.check_cast(packed, e8m0, packed, scales, k_max) == (None, None, e8m0.size)
    damaged, wrong = packed.copy(), scales.copy()
    damaged[5, 7] ^= 0x20
    damaged[9, 0] ^= 0x01
    wrong[3, 4] ^= 1
    outcome = plain.check_cast(packed, e8m0, damaged, wrong, k_max)
    assert outcome.nibbles == (2, 5, 15, packed[5, 7] >> 4, damaged[5, 7] >> 4)
    assert outcome.scales == (1, 3, 4, scales[3, 4], wrong[3, 4])


@pytest.mark.parametrize("distance", [17, 18, 19, 30])
def test_the_cast_keeps_values_inside_the_window_and_rounds_outside(distance: int) -> None:
    """One block far below the largest exponent; 0.5 of it survives up to the value 6 of the smallest scale."""
    packed = np.zeros((1, 48), np.uint8)
    packed[0, :16], packed[0, 16:32], packed[0, 32:] = 0x77, 0x88, [0x10, 0x32, 0x54, 0x76] * 4
    e8m0 = np.array([[130, 130 - distance, 130 - distance]], np.uint8)
    step = 2.0 ** (3 - 17)
    w = dequantized(packed, e8m0)[0, 64:] / step
    want = packed.copy()
    if distance > 17:
        codes = [int(np.argmin(np.where(np.arange(8) % 2 == 0, 0, 1e-9) + np.abs(VALUES[:8] - abs(x)))) for x in w]
        want[0, 32:] = [a | b << 4 for a, b in zip(codes[::2], codes[1::2], strict=True)]
    smallest = 1
    scales = np.array([[0x78, 0x78, smallest, smallest, smallest, smallest]], np.uint8)
    outcome = plain.check_cast(packed, e8m0, want, scales, 3)
    assert outcome[:2] == (None, None)
    kept = np.array_equal(dequantized(want, np.array([[0, 0, 113]], np.uint8))[0, 64:], w * step)
    assert outcome.lossless == (3 if kept else 2)


def test_amax_is_the_largest_dequantized_magnitude() -> None:
    for low, high in ((118, 124), (0, 5), (0, 250)):
        packed, e8m0 = mxfp4(high, low, high)
        assert plain.amax_of(packed, e8m0) == np.abs(dequantized(packed, e8m0)).max()
    assert plain.amax_of(np.full((2, 16), 0x88, np.uint8), np.full((2, 1), 130, np.uint8)) == 0


def test_unusable_scales_are_counted() -> None:
    nibbles = np.full((2, 16), 0x80, np.uint8)
    nibbles[1] = 0x01
    scales = np.array([[0x00, 0x7F], [0x80, 0x00]], np.uint8)
    assert plain.sanity_of(nibbles, scales) == (1, 1, 1)
    assert plain.sanity_of(nibbles, np.full((2, 2), 0xFF, np.uint8)) == (4, 0, 0)


def test_gate_and_up_projection_share_the_larger_amax() -> None:
    paths = [f"layers.0.ffn.experts.{expert}.{kind}" for expert in (0, 1) for kind in ("w1", "w2", "w3")]
    rows = {paths[0]: (1.0, 5.0), paths[1]: (7.0, 2.0), paths[2]: (3.0, 4.0)}
    weight, inputs = settle(rows, paths)
    assert [weight[path] for path in paths] == [5.0, 2.0, 5.0, None, None, None]
    assert [inputs[path] for path in paths] == [3.0, 7.0, 3.0, 3.0, 7.0, 3.0]


def test_a_fallback_is_taken_after_sharing_and_of_the_same_kind() -> None:
    paths = [f"layers.{layer}.ffn.experts.0.{kind}" for layer in (0, 1, 2) for kind in ("w1", "w2", "w3")]
    rows = {paths[0]: (1.0, None), paths[2]: (9.0, None), paths[4]: (2.0, 1.0)}
    weight, inputs = settle(rows, paths)
    assert inputs == {path: 2.0 if path.endswith("w2") else 9.0 for path in paths}
    assert [path for path, value in weight.items() if value is not None] == [paths[4]]


def test_where_nothing_of_a_kind_was_measured_there_is_no_value() -> None:
    paths = [f"layers.0.ffn.experts.0.{kind}" for kind in ("w1", "w2", "w3")]
    assert settle({paths[0]: (1.0, 1.0)}, paths)[1] == {paths[0]: 1.0, paths[2]: 1.0}
