"""The resident driver: the whole model lies on the gang, batches pass through all blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from io import StringIO

import modelopt.torch.quantization as mtq
import torch

from dsqjob.calibration.snapshot import Snapshot
from dsqjob.calibration.wiring.face import Measured, Wiring


def measure(
    wiring: Wiring,
    batches: Sequence[torch.Tensor],
    begin: Snapshot,
    *,
    before: Callable[[int], None],
    after: Callable[[Snapshot, Snapshot], None],
) -> Snapshot:
    """Quantizers are put in, batches from ``begin.cursor`` on pass through, quantizers are settled; the last snapshot.

    ``before(k)`` is called ahead of batch k and may raise to stop; ``after(now, earlier)`` once it is measured. Batches
    are int64 [B, S] on the CPU, the same on every rank. DataError ``activation-nan`` naming the projection.
    """
    snapshot = begin

    def loop(_: torch.nn.Module) -> None:
        nonlocal snapshot
        wiring.restore(Measured(begin.input_amax, begin.tokens))
        with torch.inference_mode():
            for number in range(begin.cursor, len(batches)):
                before(number)
                forward(wiring, batches[number])
                earlier, snapshot = snapshot, snapshot.after(*wiring.measured())
                after(snapshot, earlier)

    with redirect_stdout(StringIO()):  # ModelOpt prints a line a call; ranks would print it each
        mtq.quantize(wiring.model, wiring.quant_config(), loop)
    return snapshot


def forward(wiring: Wiring, ids: torch.Tensor) -> object:
    """The State of a batch after the last block."""
    state = wiring.start(ids.to(wiring.device))
    for index in range(wiring.layers):
        state = wiring.block(index, state)
    return state
