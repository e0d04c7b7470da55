"""Every command that README shows runs as shown."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parent.parent.parent
README = (CHECKOUT / "README.md").read_text()
SLURM = "## On a Slurm cluster\n"  # its commands run in tests/slurm_gangs/test_page.py
SLOW_ELSEWHERE = {"make demo": "test_the_demo_runs_twice", "make test": "this very run"}


def shown() -> list[str]:
    """Commands of README: indented lines that begin with make, the program, or export."""
    before, _, rest = README.partition(SLURM)
    text = before + rest.partition("\n## ")[2]
    lines = [line.strip().partition("  #")[0].strip() for line in text.splitlines() if line.startswith("    ")]
    return [line for line in lines if re.match(r"(make |\.venv/bin/dsqjob |export )", line)]


def inline() -> list[str]:
    """Commands inside sentences and tables."""
    found = re.findall(r"`((?:make [a-z0-9-]+[^`]*|dsqjob [a-z]+[^`]*))`", README)
    return [command.replace("\\|", "|") for command in found]


@pytest.fixture
def shell(tmp_path: Path, miniature: Path) -> dict[str, str]:
    """The environment of README's reader, on a miniature."""
    return {**os.environ, "DS_V4": str(miniature), "HF_NVFP4_PATH": str(tmp_path / "nvfp4"), "AMAX": "", "MP": "8"}


def test_readme_commands_run(tmp_path: Path, shell: dict[str, str]) -> None:
    """In the order shown, with input scales of 1, so that not every command calibrates. What needs the Hub is refused in
    words; the supervisors of two hosts run on this one, at the same time."""
    commands = [command for command in shown() if command not in SLOW_ELSEWHERE and not command.startswith("export ")]
    assert len(commands) >= 5
    one = "--set export.input_scale=one --set memory=256MiB --set launcher.workers=2"
    hosts = [command for command in commands if "worker calibrate" in command]
    assert len(hosts) == 2
    for command in commands:
        if command in hosts:
            continue
        line = re.sub(r"--workers 16.*", "--workers 1", command)
        if "export.input_scale" not in line:
            line = line.replace("deepseek-v4-pro", f"deepseek-v4-pro {one}")
        line = line.replace("/data/calibration.jsonl", str(CHECKOUT / "dsqjob" / "jobs" / "miniature-v4.jsonl"))
        done = subprocess.run(line, shell=True, cwd=CHECKOUT, env=shell, capture_output=True, text=True,
                              timeout=300, check=False)  # fmt: skip
        if command == "make tokens-v4":
            assert done.returncode and re.search(r"hub-(packages|unreachable)", done.stderr), done.stderr
            continue
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    assert (tmp_path / "nvfp4" / "model.safetensors.index.json").exists()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        meet = f"127.0.0.1:{probe.getsockname()[1]}"
    small = f"--mp 2 --set device=cpu {one}"
    lines = [
        host.replace("node-a:29400", meet).replace("deepseek-v4-pro", f"deepseek-v4-pro {small}") for host in hosts
    ]
    started = [subprocess.Popen(line, shell=True, cwd=CHECKOUT, env=shell, stderr=subprocess.PIPE) for line in lines]
    for process in started:
        said = process.communicate(timeout=200)[1]
        assert process.returncode == 0, said.decode()
    assert (tmp_path / "nvfp4.work" / "amax" / "amax_dict_rank1-mp2.pt").exists()


def test_make_targets_run_the_commands(tmp_path: Path, shell: dict[str, str]) -> None:
    """convert, export, verify, pipeline, with overrides; NODES that does not divide is refused."""
    given = 'SET="export.input_scale=one memory=256MiB launcher.workers=2"'
    for target in ("convert-v4 MP=4 NODES=2", "export-v4", "verify-v4", "pipeline-v4 ON=local"):
        done = subprocess.run(f"make -s {target} {given}", shell=True, cwd=CHECKOUT, env=shell, capture_output=True,
                              text=True, timeout=300, check=False)  # fmt: skip
        assert done.returncode == 0, f"{target}\n{done.stdout}\n{done.stderr}"
    assert len(list((tmp_path / "nvfp4.work" / "mp").glob("model?-mp4.safetensors"))) == 4
    refused = subprocess.run("make -s convert-v4 MP=8 NODES=3", shell=True, cwd=CHECKOUT, env=shell, capture_output=True,
                             text=True, timeout=60, check=False)  # fmt: skip
    assert refused.returncode != 0 and "nodes-divide" in refused.stderr


def test_commands_in_sentences_exist(shell: dict[str, str]) -> None:
    """Targets and commands that README mentions are there."""
    targets = set(re.findall(r"^([a-z0-9-]+):", (CHECKOUT / "Makefile").read_text(), re.M))
    commands = subprocess.run(
        [CHECKOUT / ".venv/bin/dsqjob", "--help"], capture_output=True, text=True, check=True
    ).stdout
    mentioned = inline()
    assert len(mentioned) > 10
    for command in mentioned:
        program, name = command.split()[:2]
        assert name in targets if program == "make" else re.search(rf"^  {name}\b", commands, re.M), command


def test_the_demo_runs_twice(tmp_path: Path) -> None:
    """`make demo`'s script in a folder of its own; the second run finds everything done."""
    shutil.copytree(CHECKOUT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    command = [str(tmp_path / "tests" / "demo"), str(CHECKOUT / ".venv/bin/dsqjob"), "demo"]
    first = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "passed" in first.stdout and (tmp_path / "demo/nvfp4/model.safetensors.index.json").exists()
    for line in re.findall(r"(demo/\S+)", first.stdout.partition("The miniature release")[2]):
        assert (tmp_path / line.rstrip(",")).exists(), line
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
    assert again.returncode == 0 and again.stdout.count("already done") == 5
