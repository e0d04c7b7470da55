"""What every projection's scales should be, derived anew from what calibration measured."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

PROJECTION = re.compile(r"(layers\.(\d+)\.ffn\.experts\.(\d+))\.(w[123])")
"""A routed expert's projection of a main layer: groups expert, layer number, expert number, kind."""

Measured = Mapping[str, tuple[float | None, float | None]]
"""Projection path -> (input amax, weight amax), None where nothing was measured."""


@dataclass(frozen=True)
class Expected:
    """How the checkpoint was to be made.

    ``weight_amax`` and ``input_amax`` are by projection path, after all merging; a weight amax that is None or absent
    is taken from the weights. ``input_amax`` is read with ``input_scale: calibrated`` only. ``recorded`` are the weight
    amax of each projection alone, as measured.
    """

    weights: Literal["cast", "requantize"]
    input_scale: Literal["calibrated", "one"]
    weight_amax: Mapping[str, float | None] = field(default_factory=dict)
    input_amax: Mapping[str, float] = field(default_factory=dict)
    recorded: Mapping[str, float] = field(default_factory=dict)


def peers(path: str) -> tuple[str, ...]:
    """The projections that share scales with ``path``, itself included: w1 and w3 of an expert; w2 alone."""
    expert, _, kind = path.rpartition(".")
    return (path,) if kind == "w2" else (f"{expert}.w1", f"{expert}.w3")


def settle(rows: Measured, projections: Iterable[str]) -> tuple[dict[str, float | None], dict[str, float]]:
    """(weight amax, input amax) of every projection.

    w1 and w3 of an expert share the larger value. A projection without an input amax takes the largest one of its
    kind over all projections, after that sharing; it is left out where there is none. A weight amax is None where a
    sharing projection lacks it.
    """
    weight: dict[str, float | None] = {}
    own: dict[str, float] = {}
    names = list(projections)
    for path in names:
        group = [rows.get(peer, (None, None)) for peer in peers(path)]
        inputs = [value for value, _ in group if value is not None]
        weights = [value for _, value in group if value is not None]
        weight[path] = max(weights) if len(weights) == len(group) else None
        if inputs:
            own[path] = max(inputs)
    fallback: dict[str, float] = {}
    for path, value in own.items():
        kind = path.rpartition(".")[2]
        fallback[kind] = max(value, fallback.get(kind, 0.0))
    settled = {path: own.get(path, fallback.get(path.rpartition(".")[2])) for path in names}
    return weight, {path: value for path, value in settled.items() if value is not None}
