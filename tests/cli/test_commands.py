"""The commands as users type them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dsqjob.engine.events import EventLog
from dsqjob.engine.execute import StopRequest, Worker, in_words
from dsqjob.engine.stage import StageState
from dsqjob.gang.node import check_meeting
from dsqjob.job.load import load
from dsqjob.stages import build
from dsqjob.stages.inputs import Inputs
from tests.harness import digests, dsqjob, error_id, worker, write_job


def imported(*arguments: object) -> set[str]:
    """Top-level modules that a command imports."""
    command = [sys.executable, "-X", "importtime", "-m", "dsqjob", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}


def test_help_names_every_command_and_is_light() -> None:
    text = dsqjob("--help").stdout
    for name in ("plan", "run", "worker", "status", "verify", "clean", "miniature", "schema"):
        assert re.search(rf"^  {name} ", text, re.M), name
    assert not imported("--help") & {"rich", "numpy", "pydantic", "torch", "numba", "yaml"}


def test_status_is_light_and_says_where_things_stand(tmp_path: Path, miniature: Path) -> None:
    job = write_job(tmp_path, miniature)
    assert error_id(dsqjob("status", job, code=64)) == "workspace-missing"
    dsqjob("run", job, "--stage", "export", "--through", "finalize")
    assert not imported("status", job) & {"rich", "numpy", "pydantic", "torch", "numba"}
    text = dsqjob("status", job).stdout
    assert re.search(r"export +done +6/6 units", text) and "finalize" in text
    stages = json.loads(dsqjob("status", job, "--json").stdout)["stages"]
    assert [(stage["stage"], stage["state"], stage["units_done"]) for stage in stages] == [
        ("export", "done", 6), ("finalize", "done", 1),
    ]  # fmt: skip


def test_a_worker_of_the_cast_needs_no_compiler_no_torch(tmp_path: Path, miniature: Path) -> None:
    job = write_job(tmp_path, miniature)
    modules = imported(*worker("export", job)[3:])
    assert "numpy" in modules and not modules & {"numba", "torch", "modelopt", "rich", "safetensors"}


def test_plan_reads_headers_only_and_writes_nothing(tmp_path: Path, miniature: Path) -> None:
    job = write_job(tmp_path, miniature)
    log = tmp_path / "trace"
    before = digests(tmp_path)
    command = ["strace", "-f", "-qq", "-y", "-o", str(log), "-e", "trace=openat,read,pread64,preadv"]
    subprocess.run([*command, sys.executable, "-m", "dsqjob", "plan", str(job)], check=True, capture_output=True)
    trace = log.read_text()
    log.unlink()
    assert digests(tmp_path) == before
    for shard in sorted(miniature.glob("*.safetensors")):
        header = 8 + int.from_bytes(shard.read_bytes()[:8], "little")
        opens = re.findall(rf'openat\([^\n]*{shard.name}"[^\n]*= \d+', trace)
        reads = [int(n) for n in re.findall(rf"p?read(?:64|v)?\(\d+<[^>]*{shard.name}>.*= (\d+)", trace)]
        assert (len(opens), sum(reads)) == (1, header), shard.name


test_plan_reads_headers_only_and_writes_nothing = pytest.mark.needs("strace")(
    test_plan_reads_headers_only_and_writes_nothing
)


def test_plan_after_a_changed_checkpoint_writes_nothing(tmp_path: Path, miniature: Path) -> None:
    job = write_job(tmp_path, miniature)
    dsqjob("run", job, "--through", "verify")
    os.utime(tmp_path / "out" / "config.json", (1, 1))
    before = digests(tmp_path)
    dsqjob("plan", job)
    assert digests(tmp_path) == before
    assert "verify: 6 units" in dsqjob("run", job, "--through", "verify").stdout


def test_a_shard_that_vanishes_is_named(tmp_path: Path, miniature: Path) -> None:
    """Between the plan and the work."""
    shutil.copytree(miniature, tmp_path / "release", copy_function=shutil.copy)
    job = write_job(tmp_path, tmp_path / "release")
    inputs = Inputs(load(str(job), environment={}, families=("deepseek-v4",), launchers=("local",)))
    stage = build("export", inputs)
    inputs.workspace.prepare()
    (tmp_path / "release" / "model-00002-of-00006.safetensors").unlink()
    state = StageState(inputs.workspace, stage)
    log = EventLog(inputs.workspace.events, worker="w")
    with pytest.raises(FileNotFoundError) as caught:
        Worker(0, 1, chunk_bytes=1 << 20, log=log, stop=StopRequest()).work(state)
    worded = in_words(caught.value)
    assert worded is not None and (worded.id, worded.exit_code) == ("file-vanished", 65)
    assert "model-00002" in worded.where and not list((tmp_path / "out").glob("*.partial-*"))


def test_plan_with_the_references_amax_writes_nothing(tmp_path: Path, golden: Path) -> None:
    settings = {"export__amax": golden / "amax-mp2", "export__input_scale": "calibrated"}
    job = write_job(tmp_path, golden / "release", **settings)
    assert "6 of 72 projections by fallback" in dsqjob("plan", job).stdout
    assert [path.name for path in tmp_path.iterdir()] == ["job.yaml"]


def test_plan_tells_sizes_route_and_growth(tmp_path: Path, miniature: Path) -> None:
    text = dsqjob("plan", write_job(tmp_path, miniature)).stdout
    assert "192 expert projections become NVFP4 by cast" in text
    assert "+198,144" in text and "input scales: 1 everywhere" in text
    assert not (tmp_path / "work").exists()


def test_convert_belongs_to_the_pipeline_for_source_mp_only(tmp_path: Path, miniature: Path, golden: Path) -> None:
    """And only where a gang reads its output: not with amax of elsewhere, not without any."""
    calibrated = {"export__input_scale": "calibrated"}
    for source, expected in (("release", False), ("mp", True)):
        job = write_job(tmp_path / source, miniature, calibrate__source=source, **calibrated)
        text = dsqjob("plan", job).stdout
        assert ("\nconvert: " in text) is expected and "\ncalibrate: " in text
    foreign = {"export__amax": golden / "amax-mp2", "calibrate__source": "mp", **calibrated}
    text = dsqjob("plan", write_job(tmp_path / "foreign", golden / "release", **foreign)).stdout
    assert "\nconvert: " not in text and "\ncalibrate: " not in text
    job = write_job(tmp_path / "one", miniature, calibrate__source="mp")
    assert "\nconvert: " not in dsqjob("plan", job).stdout


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        (("--nodes", 3), "nodes-divide"),
        (("--on", "kubernetes"), "launcher-unknown"),
        (("--set", "nonsense"), "set-syntax"),
        (("--set", "memory=1MiB"), "job-invalid"),
    ],
)
def test_wrong_overrides_are_refused(tmp_path: Path, miniature: Path, options: tuple, cause: str) -> None:
    assert error_id(dsqjob("plan", write_job(tmp_path, miniature), *options, code=64)) == cause


def test_mp_and_nodes_shape_the_gang(tmp_path: Path, miniature: Path) -> None:
    job = write_job(tmp_path, miniature)
    dsqjob("run", job, "--stage", "convert", "--mp", 4, "--nodes", 2)
    assert len(list((tmp_path / "work" / "mp").glob("model*-mp4.safetensors"))) == 4


def test_a_worker_number_beyond_the_count_is_refused(tmp_path: Path, miniature: Path) -> None:
    job = write_job(tmp_path, miniature)
    done = dsqjob("worker", "export", job, "--worker", 2, "--workers", 2, code=64)
    assert error_id(done) == "worker-number"
    done = dsqjob("worker", "export", job, "--node", 0, code=64)
    assert error_id(done) == "worker-number" and "--worker 0 --workers N" in done.stderr


@pytest.mark.parametrize(
    ("rendezvous", "attempt", "id"),
    [
        ("node-a", "1", "rendezvous-invalid"),
        ("node-a:http", "1", "rendezvous-invalid"),
        ("node-a:99999", "1", "rendezvous-invalid"),
        (":29400", "1", "rendezvous-invalid"),
        ("", "1", "rendezvous-invalid"),
        ("node-a:0", "1", "rendezvous-invalid"),
        ("node-a:29400", "../../evil", "attempt-invalid"),
        ("node-a:29400", "", "attempt-invalid"),
    ],
)
def test_a_meeting_that_cannot_be_is_refused(
    tmp_path: Path, miniature: Path, rendezvous: str, attempt: str, id: str
) -> None:
    job = write_job(tmp_path, miniature)
    words = ("--nodes", 2, "--node", 0, "--rendezvous", rendezvous, "--attempt", attempt)
    assert error_id(dsqjob("worker", "calibrate", job, *words, code=64)) == id
    assert not (tmp_path / "work").exists()


def test_addresses_that_can_be_met() -> None:
    for good in ("node-a:29400", "10.0.0.1:1", "[fe80::1%eth0]:29400"):
        check_meeting(good, "123_4-0-1", 2)
    check_meeting("127.0.0.1:0", "0", 1)


@pytest.mark.parametrize("arguments", [("nothing",), ("run",), ("run", "x", "--stage", "bake"), ("verify",), ()])
def test_usage_errors_exit_64(arguments: tuple) -> None:
    done = dsqjob(*arguments, code=64)
    assert done.stderr and "Traceback" not in done.stderr


def test_finalize_and_verify_need_what_comes_before(tmp_path: Path, miniature: Path) -> None:
    job = write_job(tmp_path, miniature)
    assert error_id(dsqjob("run", job, "--stage", "finalize", code=64)) == "export-unfinished"
    assert error_id(dsqjob("run", job, "--stage", "verify", code=64)) == "checkpoint-missing"
    assert error_id(dsqjob("verify", job, code=64)) == "checkpoint-missing"


def test_clean_removes_what_the_dead_left_and_nothing_else(tmp_path: Path, miniature: Path) -> None:
    job = write_job(tmp_path, miniature)
    dsqjob("run", job, "--stage", "export", "--through", "finalize")
    before = digests(tmp_path)
    claims = tmp_path / "work" / "state" / "export" / "claims"
    (claims / "model-00001-of-00006.safetensors.0").write_text("")

    os.utime(claims / "model-00001-of-00006.safetensors.0", (1, 1))
    (tmp_path / "out" / "model-00001-of-00006.safetensors.partial-dead").write_text("half")
    (tmp_path / "work" / "state" / "export" / "records" / "x.json.partial-dead").write_text("half")
    text = dsqjob("clean", job).stdout
    assert "3 leftovers removed" in text and digests(tmp_path) == before
    assert "nothing to clean" in dsqjob("clean", job).stdout


def test_verify_finds_and_names_a_flipped_bit(tmp_path: Path, miniature: Path) -> None:
    job = write_job(tmp_path, miniature)
    dsqjob("run", job, "--through", "verify")
    assert "Verification: passed" in dsqjob("verify", job).stdout
    assert "Verification: passed" in dsqjob("verify", tmp_path / "out").stdout
    shard = tmp_path / "out" / "model-00003-of-00006.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 4
    shard.write_bytes(raw)
    for target in (job, tmp_path / "out"):
        done = dsqjob("verify", target, code=65)
        assert error_id(done) == "verification-failed"
        assert shard.name in done.stdout and "FAILED" in done.stdout
    assert dsqjob("run", job, "--through", "verify", code=65).stderr.startswith("[verification-failed]")
    report = json.loads((tmp_path / "work" / "reports" / "report.json").read_text())
    assert report["passed"] is False and report["findings"][0]["file"] == shard.name


@pytest.mark.parametrize(("server", "code"), [("sglang", 65), ("trtllm", 65)])
def test_verify_for_a_server_fails_where_it_would(tmp_path: Path, miniature: Path, server: str, code: int) -> None:
    job = write_job(tmp_path, miniature)
    dsqjob("run", job, "--stage", "export", "--through", "finalize")
    dsqjob("verify", tmp_path / "out", "--for", server)
    config = tmp_path / "out" / "config.json"
    value = json.loads(config.read_text())
    value["quantization_config"]["quant_algo"] = "NVFP4"
    config.write_text(json.dumps(value))
    done = dsqjob("verify", tmp_path / "out", "--for", server, code=code)
    assert "B3" in done.stdout


def test_verify_for_names_the_tensor_parallel_size(tmp_path: Path, miniature: Path) -> None:
    job = write_job(tmp_path, miniature)
    dsqjob("run", job, "--stage", "export", "--through", "finalize")
    assert "E2" in dsqjob("verify", job, "--for", "trtllm").stdout
    done = dsqjob("verify", job, "--for", "trtllm", "--tensor-parallel", 8, code=65)
    assert "E2" in done.stdout and "fails" in done.stdout


def test_miniature_refuses_unknown_families_and_full_folders(tmp_path: Path) -> None:
    assert error_id(dsqjob("miniature", "deepseek-v9", tmp_path / "x", code=64)) == "family-unknown"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert error_id(dsqjob("miniature", "deepseek-v4", tmp_path / "full", code=64)) == "folder-not-empty"


def test_miniature_gives_the_same_bytes_for_the_same_seed(tmp_path: Path) -> None:
    for folder, seed in (("a", 7), ("b", 7), ("c", 8)):
        dsqjob("miniature", "deepseek-v4", tmp_path / folder, "--seed", seed)
    assert digests(tmp_path / "a") == digests(tmp_path / "b") != digests(tmp_path / "c")


def test_schema_prints_manual_and_json() -> None:
    assert "weights: auto | cast | requantize, default auto" in dsqjob("schema").stdout
    assert "properties" in json.loads(dsqjob("schema", "--json").stdout)


def test_the_base_install_runs_the_whole_job(tmp_path: Path, miniature: Path, base_python: Path) -> None:
    """Without torch: plan, export by lookup, finalize, verify."""
    job = write_job(tmp_path, miniature, export__weights="requantize")
    code = "import importlib.util as u, sys; sys.exit(any(map(u.find_spec, ('torch', 'modelopt', 'safetensors'))))"
    assert subprocess.run([base_python, "-c", code], check=False).returncode == 0
    done = subprocess.run([base_python, "-m", "dsqjob", "run", job, "--through", "verify"], capture_output=True,
                          text=True, timeout=200, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
