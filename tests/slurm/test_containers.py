"""Containers and site profiles: what srun gets."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

from dsqjob.errors import UsageError
from dsqjob.job.load import load
from dsqjob.job.schema import Container, Job
from dsqjob.launchers.slurm.container import inside
from dsqjob.launchers.slurm.script import Need
from dsqjob.launchers.slurm.submit import render, resolved
from tests.harness import error_id, write_job
from tests.slurm.running import Login

CHECKOUT = Path(__file__).parent.parent.parent
SITES = sorted((CHECKOUT / "slurm").glob("*.yaml"))

SHIM = f"""#!{sys.executable}
# Stands for srun with pyxis 0.20, which cannot be installed here: refuses container options that it does not have,
# writes down those that it has, and starts the real srun without them.
import json, os, sys
HAS = {{"image", "mounts", "workdir", "name", "save", "mount-home", "remap-root", "entrypoint", "entrypoint-log",
       "writable", "readonly", "env"}}
NO = {{"mount-home", "remap-root", "entrypoint"}}
kept, taken = [], []
for word in sys.argv[1:]:
    name = word.partition("=")[0]
    if name.startswith("--container-") or name.startswith("--no-container-"):
        bare = name.removeprefix("--no-").removeprefix("--").removeprefix("container-")
        if bare not in (NO if name.startswith("--no-") else HAS):
            sys.exit(f"srun: unrecognized option '{{word}}'")
        taken.append(word)
    else:
        kept.append(word)
with open(os.environ["SHIM_LOG"], "a") as log:
    log.write(json.dumps(taken) + "\\n")
os.execv("/usr/bin/srun", ["srun", *kept])
"""


def read(path: Path, *sets: str, **environment: str) -> Job:
    return load(str(path), sets=sets, environment=environment, families=["deepseek-v4"], launchers=["local", "slurm"])


@pytest.mark.parametrize("site", SITES, ids=lambda path: path.stem)
def test_every_profile_is_read_and_rendered(site: Path) -> None:
    """With the shipped job; a field that nobody has would be refused."""
    places = {"DS_V4": "/models/r", "HF_NVFP4_PATH": "/models/o"}
    assert read(Path("deepseek-v4-pro"), f"profile={site}", **places).launcher.kind == "local"  # until ON=slurm
    job = read(Path("deepseek-v4-pro"), f"profile={site}", "launcher.kind=slurm", **places)
    gang, array = render(job, [Need("calibrate", True), Need("export", False, 8)])
    assert "#SBATCH --nodes=1\n" in gang.text and f"#SBATCH --time={job.slurm.gang.time}\n" in gang.text
    assert f"--array=0-7%{job.slurm.throttle}" in array.text and "gpu" not in array.text.partition("# command")[0]
    assert f"{job.slurm.python or sys.executable} -P -m dsqjob batch" in gang.text


def test_a_typo_names_the_profiles_file(tmp_path: Path) -> None:
    job = write_job(tmp_path, tmp_path / "release")
    site = tmp_path / "site.yaml"
    for text, error_name, field in (
        ("slurm: {acount: x}", "job-unknown-key", "slurm.acount"),
        ("slurm: {gang: {exclusive: maybe}}", "job-invalid", "slurm.gang.exclusive"),
    ):
        site.write_text(text)
        with pytest.raises(UsageError) as error:
            read(job, f"profile={site}")
        assert (error.value.id, error.value.where) == (error_name, f"{site}: {field}")


def test_the_resolved_job_is_the_same_job(tmp_path: Path) -> None:
    """Without variables, profile and overrides, dollars and all."""
    file = write_job(tmp_path, tmp_path / "release", slurm__environment={"A": "$${B}"}, name="${NAME}")
    job = read(file, "export.weights=cast", NAME="a-name")
    path, data = resolved(job)
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    assert read(path) == job and job.slurm.environment == {"A": "${B}"}
    assert "profile" not in yaml.safe_load(data)


@pytest.mark.parametrize(
    ("kind", "gpus", "options", "words"),
    [
        ("none", True, "", "python3 x"),
        (
            "pyxis", True,
            "--container-image=i --container-mounts=/a:/a,/b:/b:ro --container-workdir=/a --container-env=P,Q",
            "python3 x",
        ),
        ("apptainer", True, "", "apptainer exec --nv --bind /a:/a,/b:/b:ro --pwd /a i python3 x"),
        ("apptainer", False, "", "apptainer exec --bind /a:/a,/b:/b:ro --pwd /a i python3 x"),
        (
            "docker", True, "",
            "docker run --rm --name n --user U --network host --ipc host --gpus all -v /a:/a -v /b:/b:ro -w /a "
            "-e SLURM_JOB_ID -e SLURM_NODEID -e SLURM_PROCID -e SLURMD_NODENAME -e CUDA_VISIBLE_DEVICES "
            "-e P -e Q i python3 x",
        ),
    ],
)  # fmt: skip
def test_a_command_in_each_kind_of_container(kind: str, gpus: bool, options: str, words: str) -> None:
    settings = {"kind": kind, "image": "i", "mounts": ["/a:/a", "/b:/b:ro"], "workdir": "/a", "environment": ["P"]}
    made = inside(Container.model_validate(settings), ["python3", "x"], name="n", gpus=gpus, environment=["Q"])
    argv = list(made.argv)
    if kind == "docker":
        argv[argv.index("--user") + 1] = "U"
        assert made.afterwards == ("docker", "rm", "--force", "n")
    assert (" ".join(made.options), " ".join(argv)) == (options, words)


@pytest.mark.needs("root")
@pytest.mark.needs("slurmctld")
def test_pyxis_gets_only_options_that_it_has(login: Login, small: Path, tmp_path: Path) -> None:
    """Through the recording shim; the worker itself runs outside of any container."""
    shim = tmp_path / "bin" / "srun"
    shim.parent.mkdir()
    shim.write_text(SHIM)
    shim.chmod(0o755)
    job = login.job(
        tmp_path / "a", small,
        slurm__container={"kind": "pyxis", "image": "/images/d.sqsh", "mounts": [f"{tmp_path}:{tmp_path}"],
                          "workdir": "/", "environment": ["HOME"], "python": sys.executable},
        slurm__setup=[f"export PATH={shim.parent}:$PATH SHIM_LOG={tmp_path}/log"],
        slurm__srun=["--no-container-mount-home"],
    )  # fmt: skip
    sent = login.run(job, "--through", "finalize")
    assert login.wait(sent["finalize"][0]) == ["COMPLETED"], login.said(sent["export"][0])
    taken = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert len(taken) == 3 and taken[0] == [
        "--container-image=/images/d.sqsh", f"--container-mounts={tmp_path}:{tmp_path}", "--container-workdir=/",
        "--container-env=HOME", "--no-container-mount-home",
    ]  # fmt: skip


@pytest.mark.needs("root")
@pytest.mark.needs("slurmctld")
def test_a_bad_image_gives_sruns_reason_and_the_setting(login: Login, small: Path, tmp_path: Path) -> None:
    """This cluster has no pyxis: the job ends with 64, in Slurm's words, and status shows them."""
    container = {"kind": "pyxis", "image": "/images/none.sqsh"}
    job = login.job(tmp_path, small, launcher__workers=1, slurm__container=container)
    (export,) = login.run(job, "--stage", "export")["export"]
    assert login.wait(export) == ["FAILED"]
    said = login.said(export)
    assert "[slurm-refused]" in said and "slurm.container" in said and "container-image=/images/none.sqsh" in said
    assert "exit 64" in login.dsqjob("status", job).stdout
    done = login.dsqjob("run", job, "--set", "slurm.container={kind: apptainer}", code=64)
    assert error_id(done) == "container-image"
