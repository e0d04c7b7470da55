"""One MoE layer of V4-Pro's geometry with made-up weights, calibrating: moe_layer.py EXPERTS. Prints a line of JSON.

Baseline for kernels: tokens/s, the share of dequantization, memory against what `plan` predicts for it.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import modelopt.torch.quantization as mtq
import torch

from dsqjob.calibration.dequantize import bf16_weight
from dsqjob.calibration.dummy import make_up
from dsqjob.calibration.fill import parameters_of
from dsqjob.calibration.vendor import import_code
from dsqjob.calibration.wiring import wiring_class
from dsqjob.families.known_code import code_digests
from dsqjob.miniature import write

BATCH = (4, 512)
DIM, INTER, ACTIVE = 7168, 3072, 6
REPEAT = 6


def seconds(what: Callable[[], object], repeat: int) -> float:
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(repeat):
        what()
    torch.cuda.synchronize()
    return (time.perf_counter() - begun) / repeat


def main(experts: int) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        write("deepseek-v4", Path(scratch) / "release", seed=1)
        code = Path(scratch) / "release" / "inference"
        module = import_code("deepseek-v4", code, code_digests(code))
    wiring = wiring_class("deepseek-v4")
    wiring.register(module)
    torch.set_default_dtype(torch.bfloat16)
    module.default_dtype = torch.float8_e4m3fn
    module.scale_fmt, module.scale_dtype = "ue8m0", torch.float8_e8m0fnu
    args = module.ModelArgs(
        dim=DIM, moe_inter_dim=INTER, n_routed_experts=experts, n_activated_experts=ACTIVE, n_hash_layers=0,
        expert_dtype="fp4", swiglu_limit=10.0, route_scale=2.5,
    )  # fmt: skip
    with torch.device("cuda"):
        layer = torch.nn.Module()
        layer.ffn = module.MoE(3, args)
        nbytes = make_up(parameters_of(layer), experts, 1)
        x = torch.randn(*BATCH, DIM, dtype=torch.bfloat16)
        ids = torch.randint(0, 100, BATCH)
    torch.set_default_device("cuda")
    report: dict[str, object] = {}

    def loop(model: torch.nn.Module) -> None:
        with torch.inference_mode():
            model.ffn(x, ids)
            torch.cuda.reset_peak_memory_stats()
            begun = torch.cuda.memory_allocated()
            whole = seconds(lambda: model.ffn(x, ids), REPEAT)
            report["peak_above_weights_gib"] = round((torch.cuda.max_memory_allocated() - begun) / 2**30, 3)
            projections = [getattr(expert, kind) for expert in model.ffn.experts for kind in ("w1", "w2", "w3")]
            dequantize = seconds(lambda: [bf16_weight(one) for one in projections], 2)
            report["layer_seconds"] = round(whole, 4)
            report["tokens_per_second"] = round(BATCH[0] * BATCH[1] / whole)
            report["dequantize_seconds"] = round(dequantize, 4)
            report["dequantize_share"] = round(dequantize / whole, 3)
            report["dequantize_us_a_projection"] = round(dequantize / len(projections) * 1e6, 1)

    mtq.quantize(layer, wiring.quant_config(), loop)
    print(json.dumps({"device": torch.cuda.get_device_name(), "experts": experts, "batch": BATCH,
                      "weights_gib": round(nbytes / 2**30, 2), **report}))  # fmt: skip


if __name__ == "__main__":
    main(int(sys.argv[1]))
