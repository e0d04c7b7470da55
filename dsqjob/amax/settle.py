"""From what was measured to what is written: shared maxima, derived weights, fallbacks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from dsqjob.amax.ledger import Ledger
from dsqjob.errors import DataError
from dsqjob.formats import FormatError, nvfp4


class Sharing(NamedTuple):
    """A projection, the projections (itself included) that share its scales, and the kind that lends a fallback."""

    path: str
    layer: str
    kind: str
    sharing: tuple[str, ...]


class Settled(NamedTuple):
    """Maxima to write. ``weight`` None: derive it from the weights. ``fallback``: the input amax is the largest
    calibrated value of the same kind, since this projection saw no token."""

    input: float
    weight: float | None
    fallback: bool


def settle(
    ledger: Ledger, targets: Iterable[Sharing], *, allow_uncalibrated: Collection[str] = (), where: object = ""
) -> Mapping[str, Settled]:
    """Settle every target (1-formats, section 4).

    Projections that share scales share the larger input and the larger weight amax. One without an input amax takes
    the largest of its kind over all targets, after sharing. A weight amax that is missing, in the projection or in
    one that it shares with, is left to be derived from the weights.

    Raises DataError ``amax-unknown`` for amax of a projection that is no target, ``amax-layer-missing`` for a layer
    without one input amax (unless allowed by name), and
    ``amax-missing`` where no projection of a kind has one.
    """
    targets = list(targets)
    if unknown := ledger.rows.keys() - {target.path for target in targets}:
        raise DataError(
            "amax-unknown",
            f"{len(unknown)} projections have amax, but the release does not have them",
            where=f"{where}: {min(unknown)}",
            way_out="the amax belong to another release; calibrate this one",
        )
    shared: dict[str, float | None] = {}
    weights: dict[str, float | None] = {}
    largest: dict[str, float] = {}
    measured: defaultdict[str, int] = defaultdict(int)
    for target in targets:
        rows = [ledger.rows.get(path) for path in target.sharing]
        inputs = [row.input_amax for row in rows if row is not None and row.input_amax is not None]
        known = [row.weight_amax if row is not None else None for row in rows]
        shared[target.path] = max(inputs, default=None)
        weights[target.path] = None if None in known else max(value for value in known if value is not None)
        measured[target.layer] += len(inputs)
        if inputs:
            largest[target.kind] = max(largest.get(target.kind, 0.0), *inputs)
    for layer, count in measured.items():
        if not count and layer not in allow_uncalibrated:
            raise DataError(
                "amax-layer-missing",
                f"no expert of {layer} has an input amax",
                where=where,
                way_out=f"calibrate with more data, or name it in export.allow_uncalibrated: [{layer}]",
            )
    settled = {}
    for target in targets:
        own = shared[target.path]
        value = own if own is not None else largest.get(target.kind)
        if value is None:
            raise DataError(
                "amax-missing",
                f"no projection {target.kind} of any expert has an input amax to fall back on",
                where=f"{where}: {target.path}",
                way_out="calibrate with more data",
            )
        try:
            nvfp4.input_scale(value)
        except FormatError as error:
            raise DataError(
                error.id, str(error), where=f"{where}: {target.path}", way_out="calibrate again with other data"
            ) from None
        settled[target.path] = Settled(value, weights[target.path], own is None)
    return settled
