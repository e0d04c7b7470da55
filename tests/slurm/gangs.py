"""A calibration that lasts: many small batches, on CPU ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.harness import digests, events


def settings(folder: Path, *, samples: int, nodes: int, ranks: int) -> dict[str, Any]:
    """Settings of a job whose gang has ``nodes`` x ``ranks`` CPU ranks; a sample is a batch."""
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / f"text-{samples}.jsonl"
    lines = [json.dumps({"text": f"line {n} of a long story about wind and water, {n * n}"}) for n in range(samples)]
    text.write_text("\n".join(lines))
    return {
        "device": "cpu",
        "export__input_scale": "calibrated",
        "tokens__data": [{"jsonl": str(text)}],
        "tokens__sequence_length": 16,
        "calibrate__batch_size": 1,
        "parallel": {"model_parallel": nodes * ranks, "nodes": nodes, "gpus_per_node": ranks},
    }


def batches(workspace: Path) -> int:
    """How many batches were done, by all attempts."""
    return sum(event["event"] == "unit-done" and event.get("stage") == "calibrate" for event in events(workspace))


def amax(workspace: Path) -> dict[str, str]:
    """What calibration left, by digest; not whose it is."""
    return {name: digest for name, digest in digests(workspace / "amax").items() if name != ".dsqjob-owner"}
