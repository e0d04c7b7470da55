"""What a calibration saw: tokens per expert, and how its amax converged over the batches. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

PROJECTIONS = 3
_LITTLE, _MUCH = 0.25, 1.5
_NAMED = 4


@dataclass(frozen=True)
class History:
    """What the ranks counted, merged."""

    tokens: NDArray[np.int64]
    """[layers, experts]: tokens that each routed expert saw."""
    grown: NDArray[np.int32]
    """[batches, layers]: projections whose input amax grew in that batch."""
    reached: NDArray[np.int32]
    """[batches, layers]: experts that had seen a token after that batch."""
    batch_tokens: NDArray[np.int64]
    """[batches]: tokens of each batch, padding included."""


def coverage(history: History, containers: Sequence[str]) -> dict[str, Any]:
    """Tokens per layer and expert as a JSON value; ``containers[l]`` is such as ``layers.7.ffn.experts``.

    A routed slot is one token given to one expert; ``unreached`` names the experts that had none.
    """
    layers = [_layer(row, name) for row, name in zip(history.tokens, containers, strict=True)]
    experts = history.tokens.size
    reached = int(np.count_nonzero(history.tokens))
    return {
        "layers": layers,
        "totals": {
            "layers": len(layers),
            "experts": experts,
            "reached": reached,
            "reached_share": reached / experts if experts else 0.0,
            "unreached": experts - reached,
            "routed_slots": int(history.tokens.sum()),
            "batches": len(history.batch_tokens),
            "tokens": int(history.batch_tokens.sum()),
        },
    }


def _layer(row: NDArray[np.int64], container: str) -> dict[str, Any]:
    slots, busiest = int(row.sum()), int(row.argmax())
    unreached = [f"{container}.{expert}" for expert in np.flatnonzero(row == 0).tolist()]
    return {
        "container": container,
        "experts": row.size,
        "reached": row.size - len(unreached),
        "tokens": {"min": int(row.min()), "median": float(np.median(row)), "max": int(row.max())},
        "routed_slots": slots,
        "busiest": {
            "expert": f"{container}.{busiest}",
            "share_of_routed_slots": int(row[busiest]) / slots if slots else 0.0,
        },
        "unreached": unreached,
    }


def convergence(history: History) -> dict[str, Any]:
    """How the input amax converged, as a JSON value. Batches count from 1; ``last_growth`` is 0 where nothing grew.

    ``tail`` is the last tenth of the batches. A projection that grew in several of them counts once a batch, so
    ``share_grown`` is an upper bound (exact for one batch). ``chance`` is its size where every batch is alike: the
    largest of all tokens lies in the tail as often as the tail has tokens.
    """
    grown = history.grown.sum(axis=1, dtype=np.int64)
    reached = history.reached.sum(axis=1, dtype=np.int64)
    tokens = history.batch_tokens.cumsum()
    tail = _tail(history, reached)
    rows = zip(tokens.tolist(), grown.tolist(), reached.tolist(), strict=True)
    return {
        "batches": [
            {"batch": number, "tokens": seen, "grown": growing, "reached": experts}
            for number, (seen, growing, experts) in enumerate(rows, 1)
        ],
        "last_growth": max((np.flatnonzero(grown) + 1).tolist(), default=0),
        "tail": tail,
        "verdict": _verdict(tail, len(grown)),
    }


def expected_growth(history: History) -> NDArray[np.float64]:
    """[batches]: projections that would grow in each batch by chance, were every batch alike."""
    reached = history.reached.sum(axis=1, dtype=np.int64)
    cumulative = np.maximum(history.batch_tokens.cumsum(), 1)
    expected: NDArray[np.float64] = PROJECTIONS * reached * history.batch_tokens / cumulative
    return expected


def _tail(history: History, reached: NDArray[np.int64]) -> dict[str, Any]:
    batches = len(reached)
    size = math.ceil(batches / 10)
    before = int(reached[-size - 1]) if batches > size else 0
    final = history.reached[-1] if batches else np.zeros(0, np.int32)
    measured = PROJECTIONS * final.astype(np.int64)
    once = np.minimum(history.grown[batches - size :].sum(axis=0, dtype=np.int64), measured) if batches else measured
    tokens = int(history.batch_tokens.sum())
    return {
        "batches": size,
        "projections": int(measured.sum()),
        "grown": int(once.sum()),
        "share_grown": int(once.sum()) / max(int(measured.sum()), 1),
        "chance": int(history.batch_tokens[batches - size :].sum()) / max(tokens, 1),
        "experts_first_reached": int(final.sum()) - before,
    }


def _verdict(tail: dict[str, Any], batches: int) -> str:
    if batches < 2:
        return f"{_count(batches, 'batch', 'batches')} cannot show whether more data would change the amax"
    share, chance, size = tail["share_grown"], tail["chance"], tail["batches"]
    where = f"the last {size} of {batches} batches" if size > 1 else f"the last of {batches} batches"
    if not tail["grown"]:
        return f"no projection's input amax grew in {where}: more data of this kind would change little"
    if share <= _LITTLE * chance:
        outlook = "more data of this kind would change little"
    elif share <= _MUCH * chance:
        outlook = "more data of this kind would go on raising some"
    else:
        outlook = "it has not settled, more data would change much"
    first = tail["experts_first_reached"]
    return (
        f"the input amax of {'up to ' if size > 1 else ''}{_percent(share)} of the measured projections grew in "
        f"{where}, where chance alone gives {_percent(chance)}"
        + (f", and {_count(first, 'expert')} saw a first token" if first else "")
        + f": {outlook}"
    )


def summary_lines(history: History, containers: Sequence[str]) -> list[str]:
    """Four or five lines for the terminal."""
    seen, course = coverage(history, containers), convergence(history)
    totals = seen["totals"]
    names = [name for layer in seen["layers"] for name in layer["unreached"]]
    lines = [
        f"calibrated on {_count(totals['tokens'], 'token')} in {_count(totals['batches'], 'batch', 'batches')}",
        unreached_text(history),
    ]
    if names:
        more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
        lines.append(f"no token: {', '.join(names[:_NAMED])}{more}")
    if history.tokens.size:
        busiest = max((layer["busiest"] for layer in seen["layers"]), key=lambda one: one["share_of_routed_slots"])
        lines.append(
            f"tokens per expert: {int(history.tokens.min()):,} to {int(history.tokens.max()):,}, median "
            f"{float(np.median(history.tokens)):,.0f}; the busiest, {busiest['expert']}, took "
            f"{_percent(busiest['share_of_routed_slots'])} of its layer's"
        )
    return [*lines, course["verdict"]]


def unreached_text(history: History) -> str:
    """Such as ``17 of 23,424 routed experts saw no token, in 5 of 61 layers``."""
    missing = history.tokens == 0
    if not missing.any():
        return f"all of {_count(missing.size, 'routed expert')} saw a token"
    layers = f"{int(missing.any(axis=1).sum())} of {_count(len(missing), 'layer')}"
    return f"{int(missing.sum()):,} of {_count(missing.size, 'routed expert')} saw no token, in {layers}"


def _percent(share: float) -> str:
    return "under 0.1%" if 0 < share < 0.001 else f"{100 * share:.3g}%"


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"
