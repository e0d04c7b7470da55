"""A prompt continued through the quantized model: a smoke test, not a server. Every token is a prefill of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


def continue_prompt(
    model: torch.nn.Module, prompt: Sequence[int], count: int, device: torch.device, tick: Callable[[int], None]
) -> list[int]:
    """``count`` greedy tokens after the prompt's ids, the same on every rank."""
    ids = torch.tensor([list(prompt)], dtype=torch.long, device=device)
    with torch.inference_mode():
        for number in range(count):
            tick(number)
            logits = model(ids, 0)
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return [int(one) for one in ids[0, len(prompt) :].tolist()]
