"""A release of V4-Pro's geometry with few layers and made-up bytes: real_geometry.py FOLDER LAYERS [EXPERTS].

Sizes, names and dtypes are real, so reading, memory and speed are; the values mean nothing, but none is NaN.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dsqjob.checkpoint.header import encode
from dsqjob.miniature import deepseek_v4
from dsqjob.miniature.deepseek_v4 import Drawn

TILE = 1 << 22


class Fast(deepseek_v4._Drawer):
    """The miniature's tensors, with one stretch of noise used over and over."""

    def _normal(self, shape: tuple[int, ...], sigma: float) -> np.ndarray:
        if not hasattr(self, "tile"):
            self.tile = self._rng.standard_normal(TILE, np.float32)
        return np.resize(self.tile * np.float32(sigma), shape)

    def _bf16(self, name: str, shape: tuple[int, ...], sigma: float, mean: float = 0.0) -> Drawn:
        small = super()._bf16(name, (min(TILE, int(np.prod(shape))),), sigma, mean)
        return small._replace(shape=shape, data=np.resize(small.data, shape))

    def _expert(self, path: str, kind: str) -> Iterator[Drawn]:
        rows, columns = self._ffn_shape(kind)
        if not hasattr(self, "bytes"):
            self.bytes = self._rng.integers(0, 256, self.g.dim * self.g.inter // 2, np.uint8)
        packed = np.roll(self.bytes, hash(path) % 997)
        scale = self._rng.integers(116, 121, (rows, columns // 32), np.uint8)
        yield Drawn(f"{path}.weight", "I8", (rows, columns // 2), packed.reshape(rows, columns // 2))
        yield Drawn(f"{path}.scale", "F8_E8M0", scale.shape, scale)

    def _fp8(self, path: str, shape: tuple[int, int]) -> Iterator[Drawn]:
        codes = np.resize(self._rng.integers(0, 0x50, 1 << 20, np.uint8), shape)
        blocks = tuple(-(-n // 128) for n in shape)
        yield Drawn(f"{path}.weight", "F8_E4M3", shape, codes)
        yield Drawn(f"{path}.scale", "F8_E8M0", blocks, np.full(blocks, 115, np.uint8))


def write(folder: Path, layers: int, experts: int = 384) -> None:
    folder.mkdir(parents=True)
    deepseek_v4._Drawer, kept = Fast, deepseek_v4._Drawer
    deepseek_v4._make_edges = lambda *_: None  # type: ignore[assignment]
    small = deepseek_v4.tokenizer_files(512)  # a vocabulary of 129280 would take minutes to learn
    deepseek_v4.tokenizer_files = lambda _: small  # type: ignore[assignment]
    try:
        deepseek_v4.write_files(
            folder, seed=1, vocab=129280, dim=7168, inter=3072, layers=layers, hash_layers=0, mtp_layers=0, heads=128,
            head_dim=512, q_lora=1536, o_groups=16, o_lora=1024, window=128, index_heads=64, index_topk=1024,
            experts=experts, active=6, ratios=(128, 4)[:layers], max_seq_len=512,
        )  # fmt: skip
    finally:
        deepseek_v4._Drawer = kept


def write_tokens(path: Path, samples: int, length: int) -> None:
    from dsqjob.checkpoint.header import TensorSpec

    ids = np.random.Generator(np.random.PCG64(1)).integers(0, 129280, (samples, length), np.int64)
    path.write_bytes(encode([TensorSpec("input_ids", "I64", ids.shape)], None) + ids.tobytes())


if __name__ == "__main__":
    write(Path(sys.argv[1]), int(sys.argv[2]), *map(int, sys.argv[3:]))
