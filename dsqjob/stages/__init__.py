"""The stages: what each reads, writes and refuses. Their names are light to import; they are not."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dsqjob.engine.stage import Stage
    from dsqjob.stages.inputs import Inputs

STAGES = ("convert", "export", "finalize", "verify")
"""In the order of the pipeline."""


def build(name: str, inputs: Inputs) -> Stage:
    """The stage of that name for a job: from headers and configs alone."""
    stage: Stage = import_module(f"dsqjob.stages.{name}").build(inputs)
    return stage


def pipeline(inputs: Inputs) -> tuple[str, ...]:
    """The stages that the whole job needs."""
    job = inputs.job
    calibrates = job.export.input_scale == "calibrated"
    return STAGES if calibrates and job.calibrate.source == "mp" else STAGES[1:]
