"""Which stages ``--stage`` and ``--through`` mean."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsqjob.job.load import load
from dsqjob.pipeline import selected
from dsqjob.stages.inputs import Inputs
from tests.harness import write_job

MEASURED = ("tokens", "calibrate", "export", "finalize", "verify")
UNMEASURED = ("export", "finalize", "verify")


@pytest.mark.parametrize(
    ("scale", "stage", "through", "expected"),
    [
        ("one", None, None, UNMEASURED),
        ("one", None, "verify", UNMEASURED),
        ("one", "convert", "verify", ("convert", *UNMEASURED)),
        ("one", "convert", None, ("convert",)),
        ("one", None, "calibrate", ("tokens", "calibrate")),
        ("one", None, "tokens", ("tokens",)),
        ("one", "tokens", "verify", MEASURED),
        ("calibrated", None, None, MEASURED),
        ("calibrated", "convert", "calibrate", ("convert", "calibrate")),
        ("calibrated", "export", "finalize", ("export", "finalize")),
    ],
)
def test_named_stages_are_added_to_those_that_the_job_needs(
    tmp_path: Path, miniature: Path, scale: str, stage: str | None, through: str | None, expected: tuple[str, ...]
) -> None:
    job = write_job(tmp_path, miniature, export__input_scale=scale)
    loaded = load(str(job), environment={}, families=("deepseek-v4",), launchers=("local",))
    assert selected(Inputs(loaded), stage, through) == expected
