"""One rank of a miniature's model, as a program: forward.py INFERENCE FOLDER RANK WORLD [STATES].

Loads ``FOLDER/work/mp/model{rank}-mp{world}.safetensors``, strictly; writes ``FOLDER/states{rank}.npz``: the logits and
what attention and each block give. With STATES, another run's file, each block starts from what the one before it gave
there: differences do not grow, and routing does not flip.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

PLAIN = {"BF16": torch.bfloat16, "F32": torch.float32, "I32": torch.int32}
BYTES = {"F4": torch.float4_e2m1fn_x2, "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu}
TIED = {"mtp.0.embed.weight", "mtp.0.head.weight"}


def load(model: torch.nn.Module, path: Path) -> None:
    """Copy into the parameters; every name, shape and FP4/FP8 dtype must fit, and none be left."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    for name, item in json.loads(raw[8:start]).items():
        begin, end = item["data_offsets"]
        data = torch.frombuffer(bytearray(raw[start + begin : start + end]), dtype=torch.uint8)
        parameter = parameters.pop(name).data
        if item["dtype"] in PLAIN:
            assert list(parameter.shape) == item["shape"], name
            parameter.copy_(data.view(PLAIN[item["dtype"]]).view(item["shape"]))
        else:
            assert parameter.dtype == BYTES[item["dtype"]], name
            halves = 2 if parameter.dtype == torch.float4_e2m1fn_x2 else 1
            assert [*parameter.shape[:-1], parameter.shape[-1] * halves] == item["shape"], name
            parameter.view(torch.uint8).copy_(data.view(parameter.shape))
    assert set(parameters) == TIED, sorted(parameters)


def watch(net: torch.nn.Module, forced: Path | None) -> dict[str, np.ndarray]:
    states: dict[str, np.ndarray] = {}
    given = np.load(forced) if forced else None

    def keep(name: str) -> Callable[..., None]:
        return lambda _module, _inputs, output: states.update({name: output.float().numpy()})

    def start(name: str) -> Callable[..., tuple[object, ...]]:
        assert given is not None
        state = torch.from_numpy(given[name]).to(torch.bfloat16)
        return lambda _module, inputs: (state, *inputs[1:])

    for number, block in enumerate(net.layers):
        block.attn.register_forward_hook(keep(f"attn{number}"))
        block.register_forward_hook(keep(f"block{number}"))
        if given is not None and number:
            block.register_forward_pre_hook(start(f"block{number - 1}"))
    return states


def main(inference: Path, folder: Path, rank: int, world: int, forced: Path | None = None) -> None:
    sys.dont_write_bytecode = True  # the release is shared by all tests
    sys.path.insert(0, str(inference))
    import model  # type: ignore[import-not-found]

    torch.set_num_threads(1)
    if world > 1:
        rendezvous = f"file://{folder / 'rendezvous'}"
        torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world)
    torch.set_default_dtype(torch.bfloat16)
    args = model.ModelArgs(**json.loads((inference / "config.json").read_text()))
    net = model.Transformer(args)
    load(net, folder / "work" / "mp" / f"model{rank}-mp{world}.safetensors")
    states = watch(net, forced)
    ids = torch.randint(0, args.vocab_size, (2, 140), generator=torch.Generator().manual_seed(0))
    states["logits"] = net(ids).numpy()
    np.savez(folder / f"states{rank}.npz", **states)
    if world > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), *map(Path, sys.argv[5:]))
