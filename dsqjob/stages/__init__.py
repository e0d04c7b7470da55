"""The stages: what each reads, writes and refuses. Their names are light to import; they are not."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dsqjob.engine.stage import Stage
    from dsqjob.stages.inputs import Inputs

STAGES = ("tokens", "convert", "calibrate", "export", "finalize", "verify")
"""In the order of the pipeline."""
GANGS = ("calibrate",)
"""Those whose workers are the supervisors of a gang, one a node."""
MEASURING = ("tokens", "calibrate")
"""Those that a job without calibration has no need of."""


def build(name: str, inputs: Inputs) -> Stage:
    """The stage of that name for a job: from headers and configs alone."""
    stage: Stage = import_module(f"dsqjob.stages.{name}").build(inputs)
    return stage


def pipeline(inputs: Inputs, *, always: bool = False) -> tuple[str, ...]:
    """The stages that the whole job needs: calibration only where its amax are the ones that export reads, or
    ``always``; convert only where a gang reads its output."""
    job = inputs.job
    measured = always or (job.export.input_scale == "calibrated" and job.export.amax == job.calibrate.output)
    converted = measured and job.calibrate.source == "mp" and job.calibrate.mp_checkpoint == job.convert.output
    left_out = set() if measured else set(MEASURING)
    left_out |= set() if converted else {"convert"}
    return tuple(name for name in STAGES if name not in left_out)
