"""The face of a wiring. Drivers speak to it and never ask which family it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from modelopt.torch.quantization.nn import TensorQuantizer
from numpy.typing import NDArray

from dsqjob.calibration.wiring.quantizers import running_amax, set_running_amax


class Measured(NamedTuple):
    """What a rank's routed experts have seen so far. FP32 [layers, local experts, kinds] maxima of inputs (0: none),
    int64 [layers, local experts] tokens."""

    input_amax: NDArray[np.float32]
    tokens: NDArray[np.int64]


class RoutedExpert(Protocol):
    """One routed expert under quantizers, as a driver sees it."""

    tokens: int

    def input_quantizers(self) -> Sequence[TensorQuantizer]:
        """One a kind, in the order of ``Wiring.kinds``."""

    def weight_amax(self) -> torch.Tensor:
        """BF16 [kinds]: max|weight| of each projection, from the weights themselves."""

    def weight_quantizers(self) -> Sequence[TensorQuantizer]:
        """One a kind."""


class Wiring(ABC):
    """The vendor's model of one rank under quantizers, and its forward in blocks.

    ``start`` makes a State of a batch of token ids, ``block`` carries it through one layer: what a State holds is the
    family's. A resident driver holds all layers, a streamed one fills and frees them one by one.
    """

    kinds: Sequence[str]
    """Names of an expert's projections."""

    def __init__(self, model: torch.nn.Module, args: Any) -> None:
        """``args`` are the vendor's ``ModelArgs`` that the model was built from."""
        self.model, self.args = model, args

    @staticmethod
    @abstractmethod
    def register(module: ModuleType) -> None:
        """Tell ModelOpt which of the vendor's classes get quantizers; once a process, before any is converted."""

    @staticmethod
    @abstractmethod
    def quant_config() -> Mapping[str, Any]:
        """ModelOpt's configuration: what is on, what is off, which format."""

    @property
    @abstractmethod
    def layers(self) -> int:
        """Blocks of the model."""

    @abstractmethod
    def start(self, ids: torch.Tensor) -> Any:
        """State of int64 token ids [B, S] before the first block."""

    @abstractmethod
    def block(self, index: int, state: Any) -> Any:
        """State after block ``index``; positions begin at 0."""

    @abstractmethod
    def experts(self) -> Sequence[Sequence[tuple[str, RoutedExpert]]]:
        """This rank's routed experts with their names, by layer; each layer has as many."""

    @property
    def shape(self) -> tuple[int, int]:
        """Layers, and routed experts of each that live on this rank."""
        return len(self.experts()), len(self.experts()[0])

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def measured(self) -> Measured:
        """Maxima and tokens so far, read from the device in one go."""
        found = [running_amax(q) for layer in self.experts() for _, expert in layer for q in expert.input_quantizers()]
        zero = torch.zeros((), dtype=torch.bfloat16, device=self.device)
        values = torch.stack([zero if value is None else value.to(torch.bfloat16) for value in found])
        tokens = np.array([[expert.tokens for _, expert in layer] for layer in self.experts()], np.int64)
        amax = values.float().cpu().numpy().reshape(*tokens.shape, len(self.kinds))
        return Measured(amax, tokens)

    def restore(self, measured: Measured) -> None:
        """Continue from what an earlier process measured, weights included, since those of reached experts are known.
        Inside ModelOpt's forward loop, which does not reset it."""
        for layer, amax, tokens in zip(self.experts(), measured.input_amax, measured.tokens, strict=True):
            for (_, expert), values, count in zip(layer, amax, tokens, strict=True):
                expert.tokens = int(count)
                seen = zip(expert.input_quantizers(), values.tolist(), strict=True)
                weights = expert.weight_amax().tolist() if count else []
                for quantizer, value in (*seen, *zip(expert.weight_quantizers(), weights, strict=False)):
                    if value > 0:
                        set_running_amax(quantizer, value, self.device)
