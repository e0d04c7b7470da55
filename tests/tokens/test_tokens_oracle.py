"""Token ids equal those of ModelOpt's own data loader on the same lines with the release's tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from modelopt.torch.utils.dataset_utils import get_dataset_dataloader
from tokenizers import Tokenizer

from dsqjob.tokens.tokenizer import ReleaseTokenizer
from tests.tokens.releases import BOS_BEFORE, light, lines
from tests.tokens.test_tokens import SHIPPED, run, stage


class Called:
    """What ModelOpt calls of a Hugging Face tokenizer, by the tokenizers library's own truncation and padding."""

    def __init__(self, release: Path, side: str) -> None:
        self._path, self.padding_side = str(release / "tokenizer.json"), side
        self.eos_token_id = self.pad_token_id = 1

    def __call__(self, texts: list[str], *, max_length: int, **asked: Any) -> dict[str, torch.Tensor]:
        assert asked == {"return_tensors": "pt", "padding": True, "truncation": True}
        inner = Tokenizer.from_file(self._path)
        inner.enable_truncation(max_length)
        inner.enable_padding(direction=self.padding_side, pad_id=1, pad_token="<|end|>")  # noqa: S106
        found = inner.encode_batch(texts)
        return {
            "input_ids": torch.tensor([one.ids for one in found]),
            "attention_mask": torch.tensor([one.attention_mask for one in found]),
        }

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return Tokenizer.from_file(self._path).encode(text, add_special_tokens=add_special_tokens).ids


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("post_processor", [None, BOS_BEFORE], ids=["plain", "begin-token"])
@pytest.mark.parametrize(("length", "counts"), [(512, [24, 2]), (64, [7, 1]), (32, [30, 5])])
def test_order_truncation_and_padding_are_the_references(
    tmp_path: Path, miniature: Path, side: str, post_processor: Any, length: int, counts: list[int]
) -> None:
    release = light(miniature, tmp_path / "r", post_processor=post_processor, padding_side=side)
    second = lines(tmp_path / "b.jsonl", "", {"text": "naïve <|end|> \n\n fog"}, {"text": "x" * 900, "other": 1})
    loader = get_dataset_dataloader(
        [str(SHIPPED), str(second)], Called(release, side), batch_size=5, num_samples=counts, max_sample_length=length
    )
    theirs = torch.cat([batch["input_ids"] for batch in loader])
    data = [{"jsonl": file, "samples": count} for file, count in zip((SHIPPED, second), counts, strict=True)]
    ours, _, _ = run(stage(tmp_path / "j", release, data, sequence_length=length))
    assert ours.tolist() == theirs.tolist()
    assert ReleaseTokenizer(release).padding_side == side


def test_full_packed_rows_are_the_references(tmp_path: Path, miniature: Path) -> None:
    release = light(miniature, tmp_path / "r", post_processor=BOS_BEFORE)
    loader = get_dataset_dataloader(
        str(SHIPPED), Called(release, "right"), batch_size=5, num_samples=999, max_sample_length=48, pack=True
    )
    theirs = torch.cat([batch["input_ids"] for batch in loader])
    ours, _, _ = run(stage(tmp_path / "j", release, [{"jsonl": SHIPPED}], sequence_length=48, packing=True))
    assert len(theirs) == len(ours) + 1  # theirs pads the last piece, ours drops it
    assert ours.tolist() == theirs[: len(ours)].tolist()
