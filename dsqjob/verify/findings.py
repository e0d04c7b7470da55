"""What verification finds, as data that survives JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

Severity = Literal["fail", "warn"]


class Finding(NamedTuple):
    """One thing that is not as it should be. ``id`` is stable, ``file`` is relative to the checkpoint."""

    id: str
    severity: Severity
    what: str
    file: str
    tensor: str = ""

    def __str__(self) -> str:
        place = f"{self.file}: {self.tensor}" if self.tensor else self.file
        return f"[{self.id}] {place}: {self.what}"


class ScaleFacts(NamedTuple):
    """What a projection's scale tensors hold. The FP32 scales as bits, None where there is no readable one;
    the block scales that are NaN, carry the sign bit, or are zero over values that are not."""

    weight_scale_2: int | None = None
    input_scale: int | None = None
    nan: int = 0
    negative: int = 0
    zero: int = 0


@dataclass(frozen=True)
class ShardReport:
    """All that a pass over one shard found.

    ``sha256`` is of the whole file; ``blocks`` and ``lossless`` count 32-element source blocks of cast projections
    (0 on other routes); ``projections`` maps projection paths to their scales.
    """

    shard: str
    nbytes: int
    sha256: str
    tensors: int
    findings: tuple[Finding, ...] = ()
    blocks: int = 0
    lossless: int = 0
    projections: Mapping[str, ScaleFacts] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; ``from_json`` gives back an equal report."""
        value = asdict(self)
        value["findings"] = [list(finding) for finding in self.findings]
        value["projections"] = {path: list(facts) for path, facts in self.projections.items()}
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ShardReport:
        """A report from what ``to_json`` gave."""
        return cls(
            **{
                **value,
                "findings": tuple(Finding(*finding) for finding in value["findings"]),
                "projections": {path: ScaleFacts(*facts) for path, facts in value["projections"].items()},
            }
        )


def failures(findings: Iterable[Finding]) -> list[Finding]:
    """Those that make a verification fail."""
    return [finding for finding in findings if finding.severity == "fail"]


def float_of(bits: int) -> float:
    """The FP32 value of 32 bits."""
    return float(np.array(bits, np.uint32).view(np.float32))


def bits_of(value: float | np.float32) -> int:
    """The bits of a value rounded to FP32."""
    return int(np.array(value, np.float32).view(np.uint32))
