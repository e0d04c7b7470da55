"""One warm parent for all gangs of this room, small releases, and token ids that many jobs share."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsqjob.miniature import write
from tests.calibration.gangs import TEXT, Gang, Holds, calibration_job, write_holding_code
from tests.harness import worker, write_job
from tests.warm import Warm


@pytest.fixture(scope="session")
def warm() -> Iterator[Warm]:
    """What a cold supervisor imports in ten seconds, once."""
    with Warm(
        "modelopt.torch.quantization",
        "dsqjob.calibration.work",
        "dsqjob.gang.supervisor",
        "dsqjob.worker.node",
        "matplotlib.figure",
        "modelopt.torch.export",
        "huggingface_hub.hf_api",
    ) as parent:
        yield parent


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of four experts: a gang's run is mostly its start."""
    folder = tmp_path_factory.mktemp("small") / "release"
    write("deepseek-v4", folder, seed=3, layers=2, experts=4, ratios=(0, 4, 0), vocab=384)
    return folder


@pytest.fixture(scope="session")
def small_tokens(tmp_path_factory: pytest.TempPathFactory, small: Path) -> Path:
    """The shipped text as the ids of the small release: 24 samples of 64."""
    folder = tmp_path_factory.mktemp("small-tokens")
    make_tokens(folder, small)
    return folder / "tokens"


@pytest.fixture(scope="session")
def miniature_tokens(tmp_path_factory: pytest.TempPathFactory, miniature: Path) -> Path:
    folder = tmp_path_factory.mktemp("miniature-tokens")
    make_tokens(folder, miniature)
    return folder / "tokens"


def make_tokens(folder: Path, release: Path, samples: int | None = None) -> None:
    """``folder/tokens``, by the stage itself; all samples of the text, or the first ones."""
    source = {"jsonl": str(TEXT), **({"samples": samples} if samples else {})}
    settings = {"tokens__data": [source], "tokens__sequence_length": 64}
    job = write_job(folder, release, tokens__output=folder / "tokens", **settings)
    subprocess.run(worker("tokens", job), check=True, capture_output=True, timeout=120)


@pytest.fixture(scope="session")
def golden_release(tmp_path_factory: pytest.TempPathFactory, golden: Path, miniature: Path) -> Path:
    """The golden release; its ``inference/`` holds a configuration only, so the miniature's code comes beside it."""
    folder = tmp_path_factory.mktemp("golden") / "release"
    shutil.copytree(golden / "release", folder)
    for name in ("model.py", "kernel.py"):
        shutil.copyfile(miniature / "inference" / name, folder / "inference" / name)
    return folder


@pytest.fixture(scope="session")
def calm(tmp_path_factory: pytest.TempPathFactory, warm: Warm, small: Path, small_tokens: Path) -> Path:
    """Folder of a job that ran undisturbed: the small release, 2 nodes of a rank, 24 batches of one sample."""
    folder = tmp_path_factory.mktemp("calm")
    Gang(warm, calibration_job(folder, small, small_tokens, calibrate__batch_size=1)).end(0)
    return folder


@pytest.fixture(scope="session")
def holding(tmp_path_factory: pytest.TempPathFactory, small: Path) -> Path:
    """The small release's inference code, by which a test can hold a rank."""
    folder = tmp_path_factory.mktemp("holding") / "inference"
    write_holding_code(folder, small)
    return folder


@pytest.fixture
def job(tmp_path: Path, small: Path, small_tokens: Path, holding: Path) -> Path:
    """24 batches of one sample on two nodes, whose ranks can be held."""
    settings = {"calibrate__batch_size": 1, "inference_dir": holding}
    return calibration_job(tmp_path / "job", small, small_tokens, **settings)


@pytest.fixture
def holds(tmp_path: Path) -> Holds:
    return Holds(tmp_path / "holds")
