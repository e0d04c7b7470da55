"""The job file: strict YAML, environment, overrides, derived paths, errors that name the field."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from dsqjob.errors import UsageError
from dsqjob.job.load import load, shipped, workspace_of
from dsqjob.job.manual import manual
from dsqjob.job.schema import Job, size
from dsqjob.job.yaml12 import parse

GOOD = """
name: small
family: deepseek-v4
release: /data/release
workspace: /data/work
export: {output: /data/out}
"""
SHELL = {"DS_V4": "/data/DeepSeek-V4-Pro", "HF_NVFP4_PATH": "/data/out"}


def read(path: Path, text: str, *sets: str, **environment: str) -> Job:
    path.mkdir(parents=True, exist_ok=True)
    file = path / "job.yaml"
    file.write_text(text)
    return load(str(file), sets=sets, environment=environment, families=("deepseek-v4",), launchers=("local",))


def refused(path: Path, text: str, *sets: str, **environment: str) -> UsageError:
    with pytest.raises(UsageError) as caught:
        read(path, text, *sets, **environment)
    assert caught.value.exit_code == 64 and caught.value.way_out
    return caught.value


def test_defaults_and_derived_paths(tmp_path: Path) -> None:
    job = read(tmp_path, GOOD)
    assert job.inference_dir == Path("/data/release/inference")
    assert job.inference_config == Path("/data/release/inference/config.json")
    assert job.convert.output == job.calibrate.mp_checkpoint == Path("/data/work/mp")
    assert job.calibrate.output == job.export.amax == Path("/data/work/amax")
    assert (job.memory, job.parallel.model_parallel, job.launcher.workers) == (2 << 30, 8, 2)
    assert (job.export.weights, job.export.input_scale, job.calibrate.source) == ("auto", "calibrated", "release")


def test_relative_paths_count_from_the_job_file(tmp_path: Path) -> None:
    job = read(tmp_path, GOOD.replace("/data/release", "../release"))
    assert job.release == tmp_path.parent / "release"


def test_variables_and_defaults_are_filled_in(tmp_path: Path) -> None:
    text = GOOD.replace("/data/out", "'${OUT}/nvfp4'").replace("/data/work", "${WORK:-${OUT}.work}")
    job = read(tmp_path, text + "parallel: {model_parallel: '${MP:-4}', gpus_per_node: '${MP:-4}'}\n", OUT="/o")
    assert job.export.output == Path("/o/nvfp4") and job.workspace == Path("/o.work")
    assert job.parallel.model_parallel == 4
    assert read(tmp_path, GOOD.replace("/data/out", "'/a/$${x}'")).export.output == Path("/a/${x}")


def test_an_empty_variable_counts_as_the_default(tmp_path: Path) -> None:
    job = read(tmp_path, GOOD + "calibrate: {output: '${AMAX:-}'}\n", AMAX="")
    assert job.calibrate.output == Path("/data/work/amax")


def test_a_missing_variable_is_named(tmp_path: Path) -> None:
    error = refused(tmp_path, GOOD.replace("/data/release", "${DS_V4}"))
    assert error.id == "variable-missing" and "DS_V4" in error.what and error.where.endswith("release")


@pytest.mark.parametrize("text", ["${A", "${A:-", "${A:-${B}", "${1}", "${}"])
def test_half_a_variable_is_refused(tmp_path: Path, text: str) -> None:
    error = refused(tmp_path, GOOD.replace("/data/release", f"'{text}'"), A="x", B="y")
    assert error.id in ("variable-syntax", "variable-missing")


def test_overrides_by_set(tmp_path: Path) -> None:
    job = read(
        tmp_path, GOOD, "export.weights=requantize", "launcher.workers=7", "memory=512MiB", "tokens.data=[{jsonl: x}]"
    )
    assert (job.export.weights, job.launcher.workers, job.memory) == ("requantize", 7, 512 << 20)
    assert job.tokens.data[0].jsonl == tmp_path / "x"
    assert refused(tmp_path, GOOD, "export.weights").id == "set-syntax"
    error = refused(tmp_path, GOOD, "export.wieghts=cast")
    assert error.id == "job-unknown-key" and "weights" in error.way_out


@pytest.mark.parametrize(
    ("text", "id", "place", "word"),
    [
        (GOOD + "exprot: {}\n", "job-unknown-key", "exprot", "export"),
        (GOOD + "tokens: {data: [{dataste: x}]}\n", "job-unknown-key", "tokens.data.dataste", "dataset"),
        (GOOD + "name: again\n", "job-doubled-key", ":7", "remove"),
        (GOOD.replace("{output: /data/out}", "{output: /a, output: /b}"), "job-doubled-key", ":6", "remove"),
        (GOOD.replace("deepseek-v4", "deepseek-v5"), "family-unknown", "family", "deepseek-v4"),
        (GOOD + "launcher: {kind: slurm}\n", "launcher-unknown", "launcher.kind", "launcher.kind"),
        (GOOD + "parallel: {model_parallel: 8, nodes: 2, gpus_per_node: 2}\n", "job-invalid", "parallel", "schema"),
        (GOOD + "memory: 64MiB\n", "job-invalid", "memory", "schema"),
        (GOOD + "memory: lots\n", "job-invalid", "memory", "schema"),
        (GOOD + "tokens: {data: [{dataset: x, jsonl: y}]}\n", "job-invalid", "tokens.data.0", "schema"),
        (GOOD + "tokens: {data: [{tokens: y, samples: 3}]}\n", "job-invalid", "tokens.data.0", "schema"),
        (GOOD + "launcher: {workers: 0}\n", "job-invalid", "launcher.workers", "schema"),
        (GOOD + "launcher: {workers: 012}\n", "job-invalid", "launcher.workers", "schema"),
        (GOOD.replace("name: small", "name: Not A Name"), "job-invalid", "name", "schema"),
        (GOOD.replace("release: /data/release\n", ""), "job-invalid", "release", "schema"),
        (GOOD + "checksums: no\n", "job-invalid", "checksums", "schema"),
        ("[1, 2]\n", "job-yaml", "job.yaml", "schema"),
        ("", "job-yaml", "job.yaml", "schema"),
        ("a: [1\n", "job-yaml", "job.yaml:", "schema"),
        ("a: !!python/object/apply:os.system ['touch x']\n", "job-yaml", "job.yaml:1", "schema"),
    ],
)  # fmt: skip
def test_a_wrong_job_file_is_refused_in_words(tmp_path: Path, text: str, id: str, place: str, word: str) -> None:
    error = refused(tmp_path, text)
    assert (error.id, place in error.where, word in error.way_out) == (id, True, True), str(error)
    assert "pydantic" not in str(error) and "Traceback" not in str(error)


def test_a_missing_file_and_a_misspelt_name(tmp_path: Path) -> None:
    for name in (str(tmp_path / "none.yaml"), str(tmp_path), "deepseek-v4-por"):
        with pytest.raises(UsageError) as caught:
            load(name, environment={}, families=("deepseek-v4",), launchers=("local",))
        assert caught.value.id == "job-missing"
    assert "deepseek-v4-pro" in caught.value.way_out


def test_yaml_means_what_people_mean() -> None:
    value = parse("a: 12:00:00\nb: no\nc: 0o17\nd: 1e3\ne: ~\nf: on\ng: 0x10\nh: 010\ni: true\nj: -5\nk:\n", "x")
    assert value == {
        "a": "12:00:00", "b": "no", "c": 15, "d": 1000.0, "e": None, "f": "on", "g": 16, "h": "010", "i": True, "j": -5,
        "k": None,
    }  # fmt: skip


def test_the_shipped_job_takes_the_references_environment() -> None:
    def shipped_job(**more: str) -> Job:
        environment = {**SHELL, **more}
        return load("deepseek-v4-pro", environment=environment, families=("deepseek-v4",), launchers=("local",))

    job = shipped_job()
    assert job.release == Path("/data/DeepSeek-V4-Pro") and job.parallel.model_parallel == 8
    assert job.workspace == Path("/data/out.work") and job.convert.output == Path("/data/out.work/mp")
    job = shipped_job(MP="16", MP_CKPT="/mp", AMAX="/amax")
    assert (job.parallel.model_parallel, job.parallel.gpus_per_node) == (16, 16)
    assert job.convert.output == job.calibrate.mp_checkpoint == Path("/mp")
    assert job.calibrate.output == job.export.amax == Path("/amax")
    assert shipped() == ["deepseek-v4-pro", "miniature-v4"]


def test_the_workspace_is_found_without_pydantic(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(GOOD.replace("/data/release", "${NOT_SET}"))
    assert workspace_of(str(tmp_path / "job.yaml"), environment={}) == Path("/data/work")
    code = "import sys, dsqjob.job.load; sys.exit('pydantic' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@given(st.integers(0, 1 << 40), st.sampled_from(["", "B", "KiB", "MiB", "GiB", " MiB", "gib", "MB"]))
def test_sizes(number: int, unit: str) -> None:
    factor = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "mb": 10**6}[unit.strip().lower()]
    assert size(f"{number}{unit}") == number * factor


def fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}", field
        annotations = [field.annotation, *getattr(field.annotation, "__args__", ())]
        for inner in annotations:
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from fields(inner, f"{prefix}{name}.")


def test_every_field_has_its_line_in_the_manual() -> None:
    text = manual()
    for path, field in fields(Job):
        assert field.description, f"{path} has no docstring"
        assert f"{path.rpartition('.')[2]}:" in text
        assert " ".join(field.description.split())[:40] in " ".join(text.split())


def test_the_fields_are_a_contract() -> None:
    """Names may be added, not changed."""
    golden = Path(__file__).parent / "golden" / "fields.txt"
    assert set(golden.read_text().split()) <= {path for path, _ in fields(Job)}
