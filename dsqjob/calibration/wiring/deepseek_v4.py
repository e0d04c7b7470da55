"""DeepSeek-V4 under ModelOpt (2-deepseek-interface, section 3; 2a-deepseek-v4, section 3): every expert has six
quantizers, the routed ones' are on. Nothing else of the vendor's model changes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from types import ModuleType
from typing import Any, NamedTuple, cast

import modelopt.torch.quantization as mtq
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own abbreviation)
from modelopt.torch.quantization.nn import TensorQuantizer
from modelopt.torch.utils.distributed import ParallelState

from dsqjob.calibration.dequantize import bf16_weight
from dsqjob.calibration.wiring.face import RoutedExpert, Wiring
from dsqjob.calibration.wiring.quantizers import collecting, running_amax, through
from dsqjob.errors import DataError

_KINDS = ("w1", "w2", "w3")
_NVFP4 = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}
_NO_GROUP = -1
_ROUTED = re.compile(r"layers\.\d+\.ffn\.experts\.\d+")


class State(NamedTuple):
    """Between blocks: hidden states BF16 [B, S, hyper-connections, dim], token ids int64 [B, S] for hash routing."""

    hidden: torch.Tensor
    ids: torch.Tensor


def under_quantizers(expert_class: type) -> type:
    """A subclass of the vendor's ``Expert`` whose projections pass through quantizers; a ``RoutedExpert``.

    It adds no base: ModelOpt assigns it as the class of living experts, whose layout must stay.
    """

    class QuantizedExpert(expert_class):  # type: ignore[misc]
        name = "shared_experts"
        tokens = 0

        def _setup(self) -> None:
            """Called by ModelOpt where it converts an expert in place."""
            for kind in _KINDS:
                setattr(self, f"{kind}_input_quantizer", TensorQuantizer())
                setattr(self, f"{kind}_weight_quantizer", TensorQuantizer())
            # An expert lives on one rank: maxima that other ranks lack must not be waited for.
            self._parallel_state = ParallelState(data_parallel_group=_NO_GROUP, tensor_parallel_group=_NO_GROUP)

        def forward(self, x: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
            """SwiGLU with clamps; routing weights [tokens, 1] are multiplied in before the second matrix."""
            self.tokens += x.shape[0]
            gate, up = (self._project(kind, x).float() for kind in ("w1", "w3"))
            if self.swiglu_limit > 0:
                gate = gate.clamp(max=self.swiglu_limit)
                up = up.clamp(-self.swiglu_limit, self.swiglu_limit)
            inner = F.silu(gate) * up
            if weights is not None:
                inner = weights * inner
            return self._project("w2", inner.to(x.dtype))

        def _project(self, kind: str, x: torch.Tensor) -> torch.Tensor:
            weight = bf16_weight(getattr(self, kind))
            x = _watched(self._quantizer(kind, "input"), x, f"{self.name}.{kind}")
            quantizer = self._quantizer(kind, "weight")
            known = collecting(quantizer) and running_amax(quantizer) is not None
            if not known:  # a weight's maximum does not change
                weight = through(quantizer, weight)
            return F.linear(x, weight)

        def _quantizer(self, kind: str, what: str) -> TensorQuantizer:
            return getattr(self, f"{kind}_{what}_quantizer")

        def input_quantizers(self) -> Sequence[TensorQuantizer]:
            return [self._quantizer(kind, "input") for kind in _KINDS]

        def weight_amax(self) -> torch.Tensor:
            return torch.stack([bf16_weight(getattr(self, kind)).abs().amax() for kind in _KINDS])

        def weight_quantizers(self) -> Sequence[TensorQuantizer]:
            return [self._quantizer(kind, "weight") for kind in _KINDS]

    return QuantizedExpert


def _watched(quantizer: TensorQuantizer, x: torch.Tensor, where: str) -> torch.Tensor:
    try:
        return through(quantizer, x)
    except AssertionError:  # how ModelOpt's calibrator says NaN and Inf
        if not collecting(quantizer):
            raise
        raise DataError(
            "activation-nan",
            "the input of this projection holds NaN or Inf",
            where=where,
            way_out="look at the layers before it: damaged weights, or tokens that the model never saw",
        ) from None


class DeepSeekV4Wiring(Wiring):
    """Resident or not, a State passes through ``model.layers``; the draft layers and the head are never called."""

    kinds = _KINDS

    @staticmethod
    def register(module: ModuleType) -> None:
        mtq.register(original_cls=module.Expert, quantized_cls=under_quantizers(module.Expert))

    @staticmethod
    def quant_config() -> Mapping[str, Any]:
        off = [{"quantizer_name": f"*{what}_quantizer", "enable": False} for what in ("input", "weight")]
        routed = [f"*ffn.experts.*.w*_{what}_quantizer" for what in ("weight", "input")]
        on = [{"quantizer_name": name, "enable": True, "cfg": dict(_NVFP4)} for name in routed]
        others = [{"quantizer_name": name, "enable": False} for name in ("*shared_experts*", "*mtp.*")]
        return {"quant_cfg": [*off, *on, *others], "algorithm": "max"}

    @property
    def layers(self) -> int:
        return len(self._blocks)

    @property
    def _blocks(self) -> Sequence[Any]:
        return cast(Sequence[Any], self.model.layers)

    def start(self, ids: torch.Tensor) -> State:
        embedded = cast(Any, self.model).embed(ids)
        return State(embedded.unsqueeze(2).repeat(1, 1, self.args.hc_mult, 1), ids)

    def block(self, index: int, state: State) -> State:
        return State(self._blocks[index](state.hidden, 0, state.ids), state.ids)

    def experts(self) -> Sequence[Sequence[tuple[str, RoutedExpert]]]:
        return self._experts

    @cached_property
    def _experts(self) -> list[list[tuple[str, RoutedExpert]]]:
        found: list[list[tuple[str, RoutedExpert]]] = []
        for index, block in enumerate(self._blocks):
            found.append([])
            for number, expert in enumerate(block.ffn.experts):
                if expert is not None:
                    expert.name = f"layers.{index}.ffn.experts.{number}"
                    found[index].append((expert.name, expert))
        return found


WIRING = DeepSeekV4Wiring
