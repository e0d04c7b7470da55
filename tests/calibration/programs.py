"""What tests run in a process of its own, since a process can hold one family's code once: NAME ARGUMENTS."""

from __future__ import annotations

import re
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import modelopt.torch.quantization as mtq
import numpy as np
import torch

from dsqjob.calibration.dequantize import bf16_weight
from dsqjob.calibration.fill import fill, parameters_of
from dsqjob.calibration.resident import forward, measure
from dsqjob.calibration.snapshot import empty_snapshot
from dsqjob.calibration.vendor import build_model, import_code, model_args
from dsqjob.calibration.wiring import wiring_class
from dsqjob.calibration.wiring.face import Wiring
from dsqjob.checkpoint.release import Release, open_release
from dsqjob.dataplan.mp_checkpoint import as_written
from dsqjob.dataplan.sources import Sources
from dsqjob.errors import DsqjobError
from dsqjob.families import family
from dsqjob.families.known_code import code_digests

FAMILY = "deepseek-v4"


def _module(release: Path) -> Any:
    torch.set_num_threads(1)
    code = release / "inference"
    module = import_code(FAMILY, code, code_digests(code))
    wiring_class(FAMILY).register(module)
    return module


def _model(module: Any, release: Release, length: int = 160) -> tuple[torch.nn.Module, Any]:
    config = release.root / "inference" / "config.json"
    args = model_args(module, config, batch_size=2, sequence_length=length)
    model = build_model(module, args, torch.device("cpu"))
    with Sources(release.root) as sources:
        fill(family(FAMILY).mp_file(release, 0, 1), parameters_of(model), sources, tick=lambda _: None)
    return model, args


def _ids(args: Any, count: int = 4, length: int = 150) -> torch.Tensor:
    return torch.randint(0, args.vocab_size, (count, length), generator=torch.Generator().manual_seed(3))


def _input_amax(wiring: Wiring) -> np.ndarray:
    return wiring.measured().input_amax


def blocks_equal_the_vendors_forward(release: str) -> None:
    """The State after our last block, and every amax, against the vendor's own forward under the same quantizers."""
    module, opened = _module(Path(release)), open_release(Path(release))
    ours, args = _model(module, opened)
    theirs, _ = _model(module, opened)
    ids = _ids(args)
    last: list[torch.Tensor] = []
    theirs.layers[-1].register_forward_hook(lambda _module, _inputs, output: last.append(output))
    wiring = wiring_class(FAMILY)(ours, args)
    theirs_wired = wiring_class(FAMILY)(theirs, args)

    def loop(model: torch.nn.Module) -> None:
        for batch in ids.split(2):
            model(batch)

    mtq.quantize(theirs, wiring.quant_config(), loop)
    begin = empty_snapshot(*wiring.shape, len(wiring.kinds))
    snapshot = measure(wiring, ids.split(2), begin, before=lambda _: None, after=lambda *_: None)
    assert np.array_equal(_input_amax(theirs_wired), snapshot.input_amax) and (snapshot.input_amax > 0).any()
    assert snapshot.grown.shape == (2, 4) and snapshot.reached[-1].sum() == (snapshot.tokens > 0).sum()
    for batch, expected in zip(ids.split(2), last, strict=True):
        with torch.inference_mode():
            for layer in ours.layers:
                for expert in layer.ffn.experts:
                    for quantizer in (*expert.input_quantizers(), *expert.weight_quantizers()):
                        quantizer.disable()  # as they are while they only watch
            assert torch.equal(forward(wiring, batch).hidden, expected)


def experts_equal_the_vendors(release: str) -> None:
    """Our expert against the vendor's own, on BF16 weights that both multiply alike: clamps, routing weights."""
    module = _module(Path(release))
    torch.set_default_dtype(torch.bfloat16)
    generator = torch.Generator().manual_seed(5)
    theirs = module.Expert(256, 128, torch.bfloat16, 0.5)
    for parameter in theirs.parameters():
        parameter.data.normal_(0, 0.2, generator=generator)
    holder = torch.nn.Module()
    holder.expert = module.Expert(256, 128, torch.bfloat16, 0.5)
    holder.expert.load_state_dict(theirs.state_dict())
    off = {"quant_cfg": [{"quantizer_name": "*", "enable": False}], "algorithm": "max"}
    mtq.quantize(holder, off, lambda _: None)
    assert type(holder.expert) is not type(theirs)
    x = torch.randn(9, 256, generator=generator, dtype=torch.float32).to(torch.bfloat16)
    routing = torch.rand(9, 1, generator=generator, dtype=torch.float32)
    with torch.inference_mode():
        for weights in (None, routing):
            assert torch.equal(theirs(x, weights), holder.expert(x, weights))


def resuming_equals_one_run(release: str, cursor: int) -> None:
    """A second process's worth of quantizers, continued from a snapshot, ends with the same maxima and summaries."""
    module, opened = _module(Path(release)), open_release(Path(release))
    model, args = _model(module, opened)
    batches = _ids(args).split(1)
    wiring = wiring_class(FAMILY)(model, args)
    kept = [empty_snapshot(*wiring.shape, len(wiring.kinds))]
    whole = measure(wiring, batches, kept[0], before=lambda _: None, after=lambda now, _: kept.append(now))
    again, _ = _model(module, opened)
    second = wiring_class(FAMILY)(again, args)
    seen: list[int] = []
    rest = measure(second, batches, kept[cursor], before=seen.append, after=lambda *_: None)
    assert seen == list(range(cursor, len(batches)))
    for name in ("input_amax", "tokens", "grown", "reached"):
        assert np.array_equal(getattr(whole, name), getattr(rest, name)), name
    assert str(model) == str(again)


def weights_are_their_formats_values(release: str) -> None:
    """MXFP4 and FP8 weights as BF16 against plain arithmetic on the release's bytes."""
    from tests.harness import read_checkpoint

    module, opened = _module(Path(release)), open_release(Path(release))
    model, _ = _model(module, opened)
    tensors = {name: tensor for name, (_, tensor) in read_checkpoint(Path(release)).items()}
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    for layer, block in enumerate(model.layers):
        for number, expert in enumerate(block.ffn.experts):
            for kind in ("w1", "w2", "w3"):
                path = f"layers.{layer}.ffn.experts.{number}.{kind}"
                packed = tensors[f"{path}.weight"].bytes_2d()
                codes = np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1)
                powers = np.exp2(tensors[f"{path}.scale"].bytes_2d().astype(np.float64) - 127)
                expected = values[codes] * np.repeat(powers, 32, 1)
                assert np.array_equal(bf16_weight(getattr(expert, kind)).double().numpy(), expected), path
        shared = block.ffn.shared_experts.w1
        path = f"layers.{layer}.ffn.shared_experts.w1"
        raw = torch.from_numpy(tensors[f"{path}.weight"].bytes_2d().copy()).view(torch.float8_e4m3fn).double()
        powers = np.exp2(tensors[f"{path}.scale"].bytes_2d().astype(np.float64) - 127)
        expected = raw.numpy() * np.repeat(np.repeat(powers, 128, 0), 128, 1)[: raw.shape[0], : raw.shape[1]]
        assert np.array_equal(bf16_weight(shared).double().numpy(), expected), path


def both_sources_fill_the_same(release: str, checkpoint: str, rank: int, n: int) -> None:
    """Parameters of a rank from slices of the release and from a model-parallel file; the model need not run."""
    module, opened = _module(Path(release)), open_release(Path(release))
    config = opened.root / "inference" / "config.json"
    args = model_args(module, config, batch_size=1, sequence_length=64)
    plan = family(FAMILY).mp_file(opened, rank, n)
    module.dist.is_initialized = lambda: True  # stands for a gang: only the constructor asks, nothing is sent
    module.dist.get_world_size = lambda: n
    module.dist.get_rank = lambda: rank
    filled = []
    for source, root in ((plan, opened.root), (as_written(plan, Path(checkpoint)), Path(checkpoint))):
        model = build_model(module, args, torch.device("cpu"))
        for parameter in model.parameters():
            raw = parameter.data.view(torch.uint8) if parameter.data.ndim else parameter.data
            raw.fill_(0)
        with Sources(root) as sources:
            fill(source, parameters_of(model), sources, tick=lambda _: None)
        filled.append({name: _bytes(value) for name, value in model.named_parameters()})
    assert filled[0] == filled[1]


def _bytes(value: torch.Tensor) -> bytes:
    return value.detach().contiguous().view(torch.uint8).numpy().tobytes()


def _refused(what: Any, id: str, where: str) -> None:
    try:
        what()
    except DsqjobError as error:
        assert error.id == id and where in error.where, error
    else:
        raise AssertionError(f"{id} was not raised")


def nan_names_the_expert(release: str) -> None:
    module, opened = _module(Path(release)), open_release(Path(release))
    model, args = _model(module, opened)
    model.layers[2].ffn_norm.weight.data[7] = float("nan")
    wiring = wiring_class(FAMILY)(model, args)
    begin = empty_snapshot(*wiring.shape, len(wiring.kinds))
    _refused(
        lambda: measure(wiring, [_ids(args)[:1]], begin, before=lambda _: None, after=lambda *_: None),
        "activation-nan",
        "layers.2.ffn.experts.",
    )


def wrong_models_are_refused(release: str, scratch: str) -> None:
    """A second family's code, changed code, an unknown field, a tensor of another shape."""
    module, opened = _module(Path(release)), open_release(Path(release))
    _refused(lambda: import_code("other", Path(release), {}), "two-families", release)
    _refused(lambda: import_code(FAMILY, Path(release) / "inference", {}), "vendor-code-changed", "inference")
    config = Path(scratch) / "config.json"
    config.write_text((Path(release) / "inference" / "config.json").read_text().replace('"dim"', '"dimension"'))
    _refused(lambda: model_args(module, config, batch_size=1, sequence_length=8), "inference-config", str(config))
    text = (Path(release) / "inference" / "config.json").read_text()
    for old, new, cause in (
        ('"n_layers": 4', '"n_layers": 4, "n_mtp_layers": 0', "model-tensor-unknown"),
        ('"n_routed_experts": 16', '"n_routed_experts": 8', "model-tensor-shape"),
        ('"q_lora_rank": 128', '"q_lora_rank": 256', "model-tensor-shape"),
        ('"n_hash_layers": 1', '"n_hash_layers": 2', "model-tensor-missing"),
    ):
        config.write_text(text.replace(old, new))
        model = build_model(module, model_args(module, config, batch_size=1, sequence_length=8), torch.device("cpu"))
        with Sources(opened.root) as sources:
            plan, parameters = family(FAMILY).mp_file(opened, 0, 1), parameters_of(model)
            _refused(partial(fill, plan, parameters, sources, tick=lambda _: None), cause, ".")


def another_module_of_that_name_is_refused(release: str, scratch: str) -> None:
    """A library that brought a ``kernel`` of its own is there before the vendor's."""
    elsewhere = ModuleType("kernel")
    elsewhere.__file__ = f"{scratch}/kernel.py"
    code = Path(release) / "inference"
    names = re.findall(r"^def (\w+)", (code / "kernel.py").read_text(), re.MULTILINE)
    vars(elsewhere).update(dict.fromkeys(names))
    sys.modules["kernel"] = elsewhere
    _refused(lambda: import_code(FAMILY, code, code_digests(code)), "vendor-code-shadowed", f"{code}/kernel.py")
