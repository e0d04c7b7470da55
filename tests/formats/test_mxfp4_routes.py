"""From MXFP4: the cast keeps values, the requantize lookup is the arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dsqjob.formats import FormatError, cast, e2m1, e4m3, fp8, mxfp4, nvfp4, requantize

RNG = np.random.default_rng(6)


def dequantized(packed: np.ndarray, scales: np.ndarray, scale_2: float) -> np.ndarray:
    """NVFP4 values, exact in float64."""
    values = e2m1.VALUES.astype(np.float64)[e2m1.unpack(packed)]
    return values * e4m3.VALUES.astype(np.float64)[scales].repeat(16, -1) * float(scale_2)


def cast_whole(packed: np.ndarray, e8m0: np.ndarray, k_max: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nibbles, scales and lossless flags [rows, blocks] of a cast tensor."""
    new, lossless = packed.copy(), np.ones(e8m0.shape, bool)
    outside = cast.out_of_range(e8m0, k_max)
    rows, blocks = outside[:, 0], outside[:, 1]
    grouped = new.reshape(len(new), -1, 16)
    patched, kept = cast.cast_blocks(grouped[rows, blocks], e8m0[rows, blocks], k_max)
    grouped[rows, blocks], lossless[rows, blocks] = patched, kept
    return new, cast.cast_scales(e8m0, k_max), lossless


tensors = st.tuples(
    arrays(np.uint8, (3, 64), elements=st.one_of(st.just(0), st.just(0x80), st.just(0x08), st.integers(0, 255))),
    arrays(np.uint8, (3, 4), elements=st.one_of(st.just(0), st.integers(90, 130), st.integers(0, 252))),
)


@settings(max_examples=300, deadline=None)
@given(tensors)
def test_lossless_blocks_dequantize_to_the_same_values(tensor: tuple[np.ndarray, np.ndarray]) -> None:
    packed, e8m0 = tensor
    k_max = mxfp4.max_exponent(e8m0) or 0
    new, scales, lossless = cast_whole(packed, e8m0, k_max)
    before = mxfp4.dequantize(packed, e8m0).astype(np.float64)
    after = dequantized(new, scales, cast.cast_tensor_scale(k_max))
    same = (before == after).reshape(3, 4, 32).all(-1)
    in_range = k_max - (e8m0.astype(int) - 127) <= 17
    assert np.array_equal(same, lossless)
    assert lossless[in_range].all()
    untouched = (new == packed).reshape(3, 4, 16).all(-1)
    assert untouched[in_range].all()  # the sign of zero included
    assert (scales.reshape(3, 4, 2)[~in_range] == 1).all()


def test_out_of_range_blocks_are_not_copied_but_rounded() -> None:
    """A copy would be 2**23 times too large."""
    packed, e8m0 = np.full((1, 32), 0x22, np.uint8), np.array([[127, 87]], np.uint8)
    new, scales, lossless = cast_whole(packed, e8m0, 0)
    assert lossless.tolist() == [[True, False]]
    assert (new[0, 16:] == 0).all() and (new[0, :16] == 0x22).all()
    assert scales[0, 2:].tolist() == [1, 1]


def test_zero_blocks_keep_their_signs_out_of_range() -> None:
    packed, e8m0 = np.full((1, 32), 0x80, np.uint8), np.array([[127, 87]], np.uint8)
    new, _, lossless = cast_whole(packed, e8m0, 0)
    assert np.array_equal(new, packed) and lossless.all()


def test_byte_0_is_an_exponent_like_any_other() -> None:
    """-127 lies within the window of a largest exponent of -110, and outside of -109."""
    assert len(cast.out_of_range(np.array([[0]], np.uint8), -110)) == 0
    assert len(cast.out_of_range(np.array([[0]], np.uint8), -109)) == 1


def test_no_exponent_counts_as_0() -> None:
    assert mxfp4.max_exponent(np.zeros((2, 2), np.uint8)) is None
    assert cast.cast_tensor_scale(None) == np.float32(2.0**-8)


def test_the_largest_exponent_ignores_byte_0_and_refuses_255() -> None:
    assert mxfp4.max_exponent(np.array([0, 1], np.uint8)) == -126
    with pytest.raises(FormatError) as caught:
        mxfp4.max_exponent(np.array([0, 255], np.uint8))
    assert caught.value.id == "e8m0-nan"


def requantized(packed: np.ndarray, e8m0: np.ndarray, amax: float) -> tuple[np.ndarray, np.ndarray, bool]:
    out, scales = np.empty_like(packed), np.empty((len(packed), packed.shape[1] // 8), np.uint8)
    by_key = requantize.tables(amax, requantize.bytes_present(e8m0))
    return out, scales, requantize.requantize(packed, e8m0, by_key, out, scales)


@pytest.mark.parametrize("amax", [6 * 2.0**100, 448.0, 6.0, 1e-3, 4e-38])
def test_the_lookup_is_the_arithmetic_for_every_exponent_and_code(amax: float) -> None:
    """Each exponent byte with blocks whose largest code is each of the eight."""
    allowed = [b for b in range(255) if 6 * 2.0 ** (b - 127) <= amax * 1.001 or b == 0]
    e8m0 = np.repeat(np.array(allowed, np.uint8), 8)[:, None]
    largest = np.tile(np.arange(8), len(allowed))
    codes = RNG.integers(0, 16, (len(largest), 32), np.uint8)
    codes = np.where((codes & 7) > largest[:, None], (codes & 8) | largest[:, None], codes).astype(np.uint8)
    codes[:, 3] = largest
    packed = e2m1.pack(codes)
    out, scales, saturated = requantized(packed, e8m0, amax)
    expected, expected_scales, _ = nvfp4.quantize(mxfp4.dequantize(packed, e8m0), amax)
    assert np.array_equal(scales, expected_scales) and np.array_equal(out, expected) and not saturated


def test_the_lookup_equals_the_arithmetic_on_random_tensors() -> None:
    packed = RNG.integers(0, 256, (64, 512), np.uint8)
    e8m0 = RNG.integers(100, 130, (64, 32)).astype(np.uint8)
    amax = requantize.largest(packed, e8m0)
    w = mxfp4.dequantize(packed, e8m0)
    assert amax == np.abs(w).max()
    out, scales, saturated = requantized(packed, e8m0, amax)
    expected, expected_scales, _ = nvfp4.quantize(w, amax)
    assert np.array_equal(out, expected) and np.array_equal(scales, expected_scales) and not saturated
    assert requantized(packed, e8m0, amax / 2)[2]


def test_amax_is_a_magnitude_not_a_key() -> None:
    """6 * 2**0 is larger than 0.5 * 2**1, although its exponent is smaller."""
    packed, e8m0 = np.zeros((1, 32), np.uint8), np.array([[127, 128]], np.uint8)
    packed[0, 0], packed[0, 16] = 0x07, 0x01
    assert requantize.largest(packed, e8m0) == 6.0
    assert requantize.largest(np.zeros((1, 16), np.uint8), np.array([[130]], np.uint8)) == 0.0


def test_weights_beyond_bf16_are_refused() -> None:
    for byte, code in ((254, 4), (253, 6), (253, 7)):
        packed, e8m0 = np.full((1, 16), code, np.uint8), np.array([[byte]], np.uint8)
        with pytest.raises(FormatError) as caught:
            requantize.largest(packed, e8m0)
        assert caught.value.id == "weight-overflow"
    assert requantize.largest(np.full((1, 16), 3, np.uint8), np.array([[254]], np.uint8)) == 1.5 * 2.0**127


def test_fp8_is_multiplied_out_as_torch_does_with_partial_blocks() -> None:
    import torch

    weight = RNG.integers(0, 256, (200, 300), np.uint8)
    weight[(weight & 0x7F) == 0x7F] = 0
    e8m0 = RNG.integers(90, 140, (2, 3)).astype(np.uint8)
    scale = torch.tensor(np.exp2(e8m0.astype(np.float32) - 127)).repeat_interleave(128, 0).repeat_interleave(128, 1)
    values = torch.tensor(weight).view(torch.float8_e4m3fn).float() * scale[:200, :300]
    expected = values.to(torch.bfloat16).view(torch.uint16).numpy()
    assert np.array_equal(fp8.multiply_out(weight, e8m0), expected)
