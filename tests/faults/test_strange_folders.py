"""Links, late workers, rivals that wake up, restarts that are cut short: nothing of a stranger is touched, nothing of
ours is lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dsqjob.engine.claims import Claims, whoami
from dsqjob.miniature import write
from tests.harness import command, digests, dsqjob, error_id, worker, write_job

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "release"
    write("deepseek-v4", folder, seed=3, layers=2, experts=4, ratios=(0, 4, 0), vocab=384)
    return folder


@pytest.fixture
def finished(tmp_path: Path, small: Path) -> Path:
    """A job whose checkpoint is finished."""
    job = write_job(tmp_path, small)
    dsqjob("run", job, "--stage", "export", "--through", "finalize")
    return job


def test_restart_does_not_follow_links_out_of_the_checkpoint(finished: Path, small: Path) -> None:
    out = finished.parent / "out"
    shutil.rmtree(out / "inference")
    (out / "inference").symlink_to(small / "inference")
    before = digests(small)
    done = dsqjob("run", finished, "--stage", "finalize", "--restart", code=64)
    assert error_id(done) == "output-foreign" and "inference" in done.stderr
    assert digests(small) == before


def test_a_late_worker_leaves_a_finished_checkpoint_alone(finished: Path) -> None:
    before = digests(finished.parent / "out")
    subprocess.run(worker("export", finished), check=True, capture_output=True, timeout=60)
    assert digests(finished.parent / "out") == before
    dsqjob("verify", finished)


@pytest.mark.needs("strace")
def test_a_restart_that_is_cut_short_is_finished_by_the_plain_command(tmp_path: Path, finished: Path) -> None:
    before = digests(tmp_path / "out")
    kill = ["strace", "-f", "-qq", "-o", "/dev/null", "-P", str(tmp_path / "out" / "README.md")]
    kill += ["-e", "trace=unlink,unlinkat", "-e", "inject=unlink,unlinkat:signal=KILL:when=1"]
    restart = command("run", finished, "--stage", "finalize", "--restart")
    assert subprocess.run([*kill, *restart], capture_output=True, timeout=60, check=False).returncode != 0
    assert not (tmp_path / "out" / INDEX).exists()
    dsqjob("run", finished, "--stage", "export", "--through", "finalize")
    assert digests(tmp_path / "out") == before


def test_a_lost_paper_is_written_again(tmp_path: Path, finished: Path) -> None:
    before = digests(tmp_path / "out")
    (tmp_path / "out" / "dsqjob.json").unlink()
    dsqjob("run", finished, "--stage", "export", "--through", "finalize")
    assert digests(tmp_path / "out") == before


def test_who_wakes_after_the_unit_was_finished_harms_no_new_claim(tmp_path: Path) -> None:
    old = Claims(tmp_path)
    taken = old.take("u")
    assert taken is not None
    stale = {**whoami(), "host": "elsewhere", "boot": "b", "token": taken[0].token}
    taken[0].path.write_text(json.dumps(stale))
    os.utime(taken[0].path, (1, 1))
    rival = Claims(tmp_path)
    overtaking = rival.take("u")
    assert overtaking is not None
    rival.release(overtaking[0])
    newer = rival.take("u")
    assert newer is not None and old.lost(taken[0])
    old.release(taken[0])
    assert newer[0].path.exists() and Claims(tmp_path).take("u") is None


def test_workers_import_nothing_from_the_current_folder(tmp_path: Path, small: Path) -> None:
    (tmp_path / "click.py").write_text("raise SystemExit('taken over')\n")
    job = write_job(tmp_path / "job", small)
    program = Path(sys.executable).with_name("dsqjob")
    done = subprocess.run([program, "run", job, "--stage", "export"], cwd=tmp_path, capture_output=True, text=True,
                          timeout=60, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_shipped_jobs_relative_paths_count_from_here(tmp_path: Path, small: Path) -> None:
    shutil.copytree(small, tmp_path / "model")
    environment = {"DS_V4": "model", "HF_NVFP4_PATH": "result", "MP": "4"}
    done = dsqjob("plan", "deepseek-v4-pro", "--set", "export.input_scale=one", cwd=tmp_path, environment=environment)
    assert f"to {tmp_path / 'result'} " in done.stdout


def seal(folder: Path) -> None:
    """SHA256SUMS made anew, as one would who wants to deceive."""
    (folder / "SHA256SUMS").unlink()
    lines = [f"{value}  {name}\n" for name, value in sorted(digests(folder).items())]
    (folder / "SHA256SUMS").write_text("".join(lines))


@pytest.mark.parametrize("lie", ["index", "ghost", "family", "card", "cache", "link"])
def test_verify_is_not_fooled_by_new_checksums(tmp_path: Path, finished: Path, lie: str) -> None:
    out = tmp_path / "out"
    if lie in ("index", "ghost"):
        index = json.loads((out / INDEX).read_text())
        name = next(name for name in index["weight_map"] if name.endswith("attn_sink"))
        index["weight_map"]["ghost.weight" if lie == "ghost" else name] = "tokenizer.json"
        (out / INDEX).write_text(json.dumps(index))
    elif lie == "family":
        papers = json.loads((out / "dsqjob.json").read_text())
        (out / "dsqjob.json").write_text(json.dumps({**papers, "family": "llama", "vendor_code": {}}))
    elif lie == "card":
        (out / "README.md").write_text("MIT licensed, calibrated\n")
    elif lie == "cache":
        (out / "inference" / "__pycache__").mkdir()
        (out / "inference" / "__pycache__" / "model.pyc").write_bytes(b"x")
    else:
        (out / "linked").symlink_to("/etc")
    if lie != "link":
        seal(out)
    done = dsqjob("verify", finished, code=65)
    assert error_id(done) == "verification-failed"


@pytest.mark.parametrize("setting", ["export.output", "workspace"])
def test_a_file_where_a_folder_should_be(tmp_path: Path, small: Path, setting: str) -> None:
    (tmp_path / "file").write_text("x")
    job = write_job(tmp_path / "job", small)
    done = dsqjob("run", job, "--stage", "export", "--set", f"{setting}={tmp_path / 'file'}", code=64)
    assert "Traceback" not in done.stderr and str(tmp_path / "file") in done.stderr
    assert (tmp_path / "file").read_text() == "x"
