"""README on Slurm, command by command, on the pretended cluster; `make calibrate-v4 NODES=2 ON=slurm` as typed."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.documents.test_readme import README, SLURM
from tests.slurm.gangs import settings
from tests.slurm.running import Login

CHECKOUT = Path(__file__).parent.parent.parent
pytestmark = [pytest.mark.needs("root"), pytest.mark.needs("slurmctld")]


def shown() -> list[str]:
    section = README.partition(SLURM)[2].partition("\n## ")[0]
    lines = [line.strip().partition("  #")[0].strip() for line in section.splitlines() if line.startswith("    ")]
    return [line for line in lines if not line.startswith("export ")]


def test_the_page_from_clone_to_a_job_on_two_nodes(login: Login, small: Path, tmp_path: Path) -> None:
    """The model is a miniature on CPU ranks, its text a file: settings that are added to every command."""
    given = settings(tmp_path, samples=6, nodes=2, ranks=1)
    text = given["tokens__data"][0]["jsonl"]
    added = ["device=cpu", "memory=256MiB", "tokens.sequence_length=16", "launcher.workers=2", "slurm.notice=30",
             f'tokens.data=[{{"jsonl":"{text}"}}]']  # fmt: skip
    shell = {
        **login.cluster.environment,
        "DS_V4": str(small), "HF_NVFP4_PATH": str(tmp_path / "nvfp4"), "MP": "2", "AMAX": "", "TORCH": "torch==2.13.0",
    }  # fmt: skip
    commands, jobs = shown(), {}
    assert "make calibrate-v4 NODES=2 ON=slurm" in commands and len(commands) == 7
    for command in commands:
        line = command
        if command.startswith("make"):
            line += f" SET='{' '.join(added)}'"
        elif " render " in command:
            line += "".join(f" --set '{one}'" for one in added)
        elif " logs " in command:
            assert login.wait(jobs["calibrate"]) == ["COMPLETED"], login.said(jobs["calibrate"])
        elif " cancel " in command:
            assert set(login.wait(jobs["verify"])) == {"COMPLETED"}
        done = subprocess.run(line, shell=True, cwd=CHECKOUT, env=shell, capture_output=True, text=True, timeout=120,
                              check=False)  # fmt: skip
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        jobs |= dict(re.findall(r"^(\w+): submitted, job (\d+)", done.stdout, re.M))
        if " render " in command:
            assert "#SBATCH --nodes=2" in done.stdout and "batch calibrate" in done.stdout
    assert list(jobs) == ["calibrate", "export", "finalize", "verify"]
    assert (tmp_path / "nvfp4" / "model.safetensors.index.json").exists()


def test_a_site_is_a_profile(login: Login, small: Path, tmp_path: Path) -> None:
    """SITE=NAME and SITE=PATH, by make; the profile asks for a partition that this cluster does not have."""
    shell = {**login.cluster.environment, "DS_V4": str(small), "HF_NVFP4_PATH": str(tmp_path / "out"), "MP": "2"}
    site = tmp_path / "site.yaml"
    site.write_text("slurm: {workers: {partition: nope}}\n")
    command = f"make -s convert-v4 ON=slurm SITE={site}"
    done = subprocess.run(command, shell=True, cwd=CHECKOUT, env=shell, capture_output=True, text=True, timeout=60,
                          check=False)  # fmt: skip
    assert "[slurm-refused]" in done.stderr and "slurm.workers.partition" in done.stderr
    command = "make -n convert-v4 ON=slurm SITE=2x4"
    told = subprocess.run(command, shell=True, cwd=CHECKOUT, env=shell, capture_output=True, text=True, timeout=60,
                          check=True)  # fmt: skip
    assert f"--set 'profile={CHECKOUT}/slurm/2x4.yaml'" in told.stdout
