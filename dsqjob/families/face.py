"""The face of a family. Stages speak to it and never ask which one it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsqjob.amax.settle import Settled, Sharing
from dsqjob.checkpoint.release import Release
from dsqjob.dataplan.plan import FilePlan, Mxfp4


@dataclass(frozen=True, slots=True)
class Target:
    """A projection to quantize: where it lies, and which projections must share its scales."""

    sharing: Sharing
    shard: str
    out_features: int
    in_features: int

    @property
    def path(self) -> str:
        return self.sharing.path


class Family(ABC):
    """Everything that a stage needs to know about a family, as plans and tables."""

    name: str

    @abstractmethod
    def check(self, release: Release) -> None:
        """Refuse a release that is not of this family or cannot be quantized (DataError)."""

    @abstractmethod
    def check_model_parallel(self, release: Release, n: int) -> None:
        """Refuse a model-parallel degree that does not divide (UsageError ``model-parallel-divide``)."""

    @abstractmethod
    def containers(self, release: Release) -> Sequence[str]:
        """Names of the lists of routed experts, such as ``layers.7.ffn.experts``, in order."""

    @abstractmethod
    def check_tokens(self, release: Release, ids: NDArray[np.int64], where: str) -> None:
        """Refuse token ids [N, S] that the model has not (DataError ``token-id``), and samples longer than it can
        take (UsageError ``sequence-too-long``)."""

    @abstractmethod
    def rank_memory(self, release: Release, n: int, batch_size: int, length: int) -> Mapping[str, int]:
        """Bytes that a calibrating rank needs on its device, by what for: ``weights`` and others."""

    @abstractmethod
    def mp_file(self, release: Release, rank: int, n: int) -> FilePlan:
        """The model-parallel checkpoint file of ``rank``."""

    @abstractmethod
    def mp_side_files(self, release: Release) -> Sequence[str]:
        """Files that go along with a model-parallel checkpoint."""

    @abstractmethod
    def targets(self, release: Release) -> Iterator[Target]:
        """All projections to quantize, in the order of their names' numbers."""

    @abstractmethod
    def projection(self, release: Release, path: str) -> Mxfp4:
        """Where a projection to quantize lies."""

    @abstractmethod
    def routes(self, release: Release) -> Sequence[str]:
        """The values of ``export.weights`` that the release's dtypes allow, the default first."""

    @abstractmethod
    def export_file(self, release: Release, shard: str, route: str, amax: Mapping[str, Settled] | None) -> FilePlan:
        """A shard of the NVFP4 checkpoint; without ``amax`` every input scale is 1."""

    @abstractmethod
    def config_files(self, release: Release, producer: Mapping[str, str]) -> Mapping[str, Mapping[str, Any]]:
        """``config.json`` and the like, which are written anew."""
