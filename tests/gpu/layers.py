"""CPU and GPU side by side on a miniature, in one process: layers.py RELEASE. What differs is printed, and judged.

The GPU's experts get exactly what the CPU's got (the state before each MoE, and its routing), so that differences do
not grow from layer to layer; an end-to-end run is compared, too, but only reported.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsqjob.calibration.fill import fill, parameters_of
from dsqjob.calibration.resident import forward, measure
from dsqjob.calibration.snapshot import empty_snapshot
from dsqjob.calibration.vendor import build_model, import_code, model_args
from dsqjob.calibration.wiring import wiring_class
from dsqjob.calibration.wiring.face import Wiring
from dsqjob.checkpoint.release import open_release
from dsqjob.dataplan.sources import Sources
from dsqjob.families import family
from dsqjob.families.known_code import code_digests

FAMILY = "deepseek-v4"


def wired(release: Path, device: torch.device) -> Wiring:
    code = release / "inference"
    module = import_code(FAMILY, code, code_digests(code))
    if device.type == "cpu":
        wiring_class(FAMILY).register(module)
    module.precompute_freqs_cis.cache_clear()  # it remembers tensors of the device that came first
    args = model_args(module, code / "config.json", batch_size=4, sequence_length=160)
    model = build_model(module, args, device)
    with Sources(release) as sources:
        fill(family(FAMILY).mp_file(open_release(release), 0, 1), parameters_of(model), sources, tick=lambda _: None)
    return wiring_class(FAMILY)(model, args)


def calibrate(wiring: Wiring, batches: list[torch.Tensor]) -> np.ndarray:
    torch.set_default_device(wiring.device)
    begin = empty_snapshot(*wiring.shape, len(wiring.kinds))
    return measure(wiring, batches, begin, before=lambda _: None, after=lambda *_: None).input_amax


def keep(kept: list[Any]) -> Callable[..., None]:
    return lambda _module, inputs, output: kept.append((inputs, output))


def main(release: Path) -> None:
    ids = torch.randint(0, 512, (8, 150), generator=torch.Generator().manual_seed(3))
    batches = list(ids.split(4))
    cpu = wired(release, torch.device("cpu"))
    moe_inputs: list[Any] = []
    routings: list[Any] = []
    for block in cpu.model.layers:
        block.ffn.register_forward_hook(keep(moe_inputs))
        block.ffn.gate.register_forward_hook(keep(routings))
    expected = calibrate(cpu, batches)

    gpu = wired(release, torch.device("cuda"))
    end_to_end = calibrate(gpu, batches)
    again = wired(release, torch.device("cuda"))
    steps = iter(range(len(moe_inputs)))
    at = [0]

    def given_input(_module: Any, _inputs: Any) -> Any:
        at[0] = next(steps)
        return tuple(one.to("cuda") for one in moe_inputs[at[0]][0])

    def given_routing(_module: Any, _inputs: Any, _output: Any) -> Any:
        return tuple(one.to("cuda") for one in routings[at[0]][1])

    for block in again.model.layers:
        block.ffn.register_forward_pre_hook(given_input)
        block.ffn.gate.register_forward_hook(given_routing)
    forced = calibrate(again, batches)

    weights = [
        torch.equal(one.weight_amax().cpu(), other.weight_amax().cpu())
        for mine, theirs in zip(cpu.experts(), gpu.experts(), strict=True)
        for (_, one), (_, other) in zip(mine, theirs, strict=True)
    ]
    report = {
        "device": torch.cuda.get_device_name(),
        "weight_amax_equal": f"{sum(weights)} of {len(weights)} experts",
        "input_amax_forced": differences(expected, forced),
        "input_amax_end_to_end": differences(expected, end_to_end),
    }
    print(json.dumps(report))
    assert all(weights)
    assert report["input_amax_forced"]["largest_ulp"] <= 2, report
    with torch.inference_mode():
        forward(gpu, batches[0])  # the quantized model runs


def differences(expected: np.ndarray, found: np.ndarray) -> dict[str, Any]:
    """In units of the last BF16 bit; values of both are BF16."""
    bits = [(values.astype(np.float32).view(np.uint32) >> 16).astype(np.int64) for values in (expected, found)]
    both = (expected > 0) & (found > 0)
    ulp = np.abs(bits[0] - bits[1])[both]
    relative = (np.abs(expected - found) / np.maximum(expected, 1e-30))[both]
    return {
        "compared": int(both.sum()),
        "in_one_only": int(((expected > 0) != (found > 0)).sum()),
        "equal": int((ulp == 0).sum()),
        "largest_ulp": int(ulp.max()),
        "largest_relative": float(relative.max()),
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
