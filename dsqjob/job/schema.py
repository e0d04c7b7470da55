"""The job file's fields. Their docstrings are its manual (``dsqjob schema``)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict, model_validator

_UNITS = {"": 1, "B": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_SIZE = re.compile(r"(\d+)\s*([A-Za-z]*)")
_LEAST_MEMORY = 192 << 20
DERIVED = Path()
"""Stands for a path that the loader derives from other settings."""


def size(value: Any) -> int:
    """Bytes of ``2GiB``, ``512MiB`` or a number. ValueError in words."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = _SIZE.fullmatch(str(value).strip())
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError("write a size such as 2GiB or 512MiB")
    return int(match[1]) * _UNITS[match[2].upper()]


def _memory(value: Any) -> int:
    found = size(value)
    if found < _LEAST_MEMORY:
        raise ValueError(f"at least {_LEAST_MEMORY >> 20}MiB: a worker holds interpreter, headers and a few pieces")
    return found


Count = Annotated[int, Strict(), Field(ge=1)]
"""At least 1; text that looks like a number is none."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)


class Parallel(_Section):
    """The shape of a gang: how many ranks hold one model."""

    model_parallel: Count = 8
    """Ranks that share the model; must divide heads, o_groups, vocabulary and experts. 8 needs H200-class GPUs, 80 GB
    cards need 16."""
    nodes: Count = 1
    """Machines that the ranks are spread over."""
    gpus_per_node: Count = 8
    """Ranks on each machine; nodes times gpus_per_node is model_parallel."""

    @model_validator(mode="after")
    def _fits(self) -> Parallel:
        if self.nodes * self.gpus_per_node != self.model_parallel:
            raise ValueError(
                f"{self.nodes} nodes x {self.gpus_per_node} GPUs are not model_parallel {self.model_parallel}"
            )
        return self


class TokenSource(_Section):
    """Where calibration text comes from: one of dataset, jsonl and tokens."""

    dataset: str | None = None
    """A named data set of ModelOpt's loader (needs network)."""
    jsonl: Path | None = None
    """A file of JSON lines."""
    tokens: Path | None = None
    """Token ids made before: safetensors, `input_ids` int64 or int32 [N, S]."""
    samples: Count | None = None
    """How many samples to take of a data set (must be said) or a file of lines (by default all)."""

    @model_validator(mode="after")
    def _one_kind(self) -> TokenSource:
        if sum(value is not None for value in (self.dataset, self.jsonl, self.tokens)) != 1:
            raise ValueError("name exactly one of dataset, jsonl and tokens")
        if self.tokens is not None and self.samples is not None:
            raise ValueError("samples goes with dataset or jsonl; tokens are taken whole")
        if self.dataset is not None and self.samples is None:
            raise ValueError("say how many samples to take of the data set: samples")
        return self


def _default_tokens() -> list[TokenSource]:
    names = ("cnn_dailymail", "nemotron-post-training-dataset-v2")
    return [TokenSource(dataset=name, samples=64) for name in names]


class Tokens(_Section):
    """Calibration data."""

    output: Path = DERIVED
    """Folder for the token ids. Default: `<workspace>/tokens`."""
    data: list[TokenSource] = Field(default_factory=_default_tokens, min_length=1)
    """Sources in order; by default 64 samples each of cnn_dailymail and nemotron-post-training-dataset-v2."""
    sequence_length: Count = 512
    """Tokens a sample, at most; longer texts are cut on the right."""
    packing: Annotated[bool, Strict()] = False
    """Join all texts, each ended by EOS, and cut full rows of sequence_length: no padding, the last piece is dropped.
    Otherwise, as the reference does, a row is a sample, padded to the longest of all."""

    @model_validator(mode="after")
    def _packs_texts(self) -> Tokens:
        if self.packing and any(source.tokens is not None for source in self.data):
            raise ValueError("packing joins texts; a source of tokens is rows already")
        return self


class Convert(_Section):
    """Release to model-parallel checkpoint."""

    output: Path = DERIVED
    """Folder for the model-parallel files. Default: `<workspace>/mp`."""


class Timeouts(_Section):
    """Seconds after which a gang that does not get on is given up, with exit code 69."""

    rendezvous: Count = 300
    """Until every node has arrived."""
    load: Count = 3600
    """Until every rank holds its weights."""
    batch: Count = 1200
    """A batch through the whole model."""
    save: Count = 300
    """Leaving the files at the end."""
    silence: Count = 30
    """A rank, or a node, that gives no sign of life."""


class Calibrate(_Section):
    """How amax are measured."""

    source: Literal["release", "mp"] = "release"
    """Where ranks read weights: slices of the release, or a model-parallel checkpoint (then `run` converts first)."""
    mp_checkpoint: Path = DERIVED
    """The model-parallel checkpoint. Default: convert.output."""
    batch_size: Count = 4
    """Samples a forward."""
    output: Path = DERIVED
    """Folder for the amax. Default: `<workspace>/amax`."""
    threads: Count = 1
    """CPU threads of a rank; on a CPU another number may give another last bit."""
    require_known_code: Annotated[bool, Strict()] = False
    """Refuse vendor code whose SHA-256 is neither in dsqjob's table nor in known_code."""
    known_code: list[Annotated[str, Field(pattern="^[0-9a-f]{64}$")]] = Field(default_factory=list)
    """SHA-256 of vendor files that you vouch for, as `sha256sum` prints them."""
    timeouts: Timeouts = Timeouts()
    """When a gang is given up."""
    dummy_weights: Annotated[bool, Strict()] = False
    """Made-up weights instead of the release's, to try the wiring at full size; export refuses such amax."""
    generate: str | None = None
    """A prompt to continue through the quantized model after calibration, as a smoke test (`run --generate`)."""
    max_new_tokens: Count = 16
    """How many tokens `generate` makes."""


class Export(_Section):
    """Release to NVFP4 checkpoint."""

    output: Path
    """Folder for the checkpoint. New, empty, or begun by this job; outside the release."""
    amax: Path = DERIVED
    """Folder of amax: ours, or one of the reference's with `amax_dict_rank*.pt`. Default: calibrate.output."""
    weights: Literal["auto", "cast", "requantize"] = "auto"
    """cast keeps MXFP4 values where NVFP4 can hold them; requantize rounds anew by amax, as the reference does by
    default. auto: cast where the source is MXFP4."""
    input_scale: Literal["calibrated", "one"] = "calibrated"
    """one writes 1.0 everywhere: no calibration, no GPU at all."""
    allow_uncalibrated: list[str] = Field(default_factory=list)
    """Routed layers, such as `layers.3.ffn.experts`, that may be without a single input amax."""


class Launcher(_Section):
    """What starts the workers."""

    kind: str = "local"
    """local: processes of this machine; slurm: jobs of a cluster."""
    workers: Count = 2
    """Processes that share a data-parallel stage."""
    max_faults: Annotated[int, Strict(), Field(ge=0)] = 3
    """How often, in all, a worker or a gang that died is started again."""


class Resources(_Section):
    """What one kind of Slurm job asks for."""

    model_config = ConfigDict(coerce_numbers_to_str=True)

    partition: str | None = None
    """Partition; the site's default where nothing is said."""
    time: str | None = None
    """Time limit as Slurm writes it: `04:00:00`, or minutes. Every limit can be hit: the job resumes."""
    memory: str | None = None
    """Memory of a node, such as `200G`; `0` is all of it."""
    cpus: Count | None = None
    """Cores of a task: of a rank for gangs (passed on to srun, which does not inherit them), of a worker for others."""
    exclusive: Literal["no", "node", "topo"] = "no"
    """Whole nodes for ourselves: node for `--exclusive`, topo for `--exclusive=topo`."""
    sbatch: list[str] = Field(default_factory=list)
    """Further sbatch options, such as `--mail-type=FAIL`."""


class Container(_Section):
    """What commands run in on compute nodes."""

    kind: Literal["none", "pyxis", "apptainer", "docker"] = "none"
    """pyxis: options of srun; apptainer: `apptainer exec --nv`; docker: `docker run`; none: the node's own programs."""
    image: str | None = None
    """pyxis: a `.sqsh` file or `registry#image:tag`; apptainer: a `.sif` file; docker: an image."""
    mounts: list[str] = Field(default_factory=list)
    """`SOURCE:TARGET[:FLAGS]`; the release, the workspace and the outputs must be among them."""
    workdir: str | None = None
    """Working folder inside."""
    environment: list[str] = Field(default_factory=list)
    """Names of variables whose outer value wins over the image's."""
    python: str = "python3"
    """Interpreter inside, with dsqjob installed."""


class Slurm(_Section):
    """How the job asks a Slurm cluster (`launcher.kind: slurm`). A site profile usually says all of this."""

    model_config = ConfigDict(coerce_numbers_to_str=True)

    account: str | None = None
    """Account to charge."""
    qos: str | None = None
    """Quality of service."""
    reservation: str | None = None
    """Reservation to run in."""
    constraint: str | None = None
    """Node features, such as `h200`."""
    gpus: Literal["gpus-per-node", "gres", "none"] = "gpus-per-node"
    """How GPUs are asked for; none where nodes are handed out whole."""
    gpu_type: str | None = None
    """Type in that request: `h200` gives `--gpus-per-node=h200:8` or `--gres=gpu:h200:8`."""
    segment: Count | None = None
    """Nodes that must share a block of an NVL72 rack (`--segment`); refused where the topology is no block."""
    gang: Resources = Resources()
    """Jobs that calibrate: all nodes at once."""
    workers: Resources = Resources()
    """Jobs of the other stages: an array of workers, one node each, no GPU."""
    throttle: Count | None = None
    """At most so many tasks of an array at a time; by default all of launcher.workers."""
    notice: Count = 120
    """Seconds between the signal that announces the time limit and the limit; Slurm may give it a minute earlier."""
    requeue: Annotated[bool, Strict()] = True
    """Jobs put themselves back into the queue. Where a site forbids that: false, and spare jobs take over."""
    spares: Count = 3
    """With `requeue: false`: jobs submitted beforehand, one after the other (`--dependency=singleton`)."""
    port: Annotated[int, Strict(), Field(ge=1024, le=65535)] | None = None
    """Rendezvous port; by default derived from the job's number."""
    setup: list[str] = Field(default_factory=list)
    """Shell lines at the job's beginning, such as `module load cuda`; what they export goes along to every node. One
    that fails ends the job: add `|| true` where that does not matter."""
    environment: dict[Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")], str] = Field(default_factory=dict)
    """Variables of the job, such as `NCCL_SOCKET_IFNAME: eth0`."""
    srun: list[str] = Field(default_factory=list)
    """Further srun options."""
    container: Container = Container()
    """What commands run in on compute nodes."""
    python: str | None = None
    """Interpreter of the batch host, with dsqjob installed; by default the one that submits. Name another one where
    login and compute nodes differ in processor."""
    logs: Path = DERIVED
    """Folder for Slurm's output files. Default: `<workspace>/logs/slurm`."""


class Job(_Section):
    """One model, one workspace, one way to run. Relative paths count from the job file's folder; `${VAR}` and
    `${VAR:-default}` are filled in from the environment."""

    profile: Path | None = None
    """A site profile: a YAML file with some of these fields, which the job file and `--set` override."""
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")
    """For people and schedulers: lower-case letters, digits, dots and dashes."""
    family: str
    """The family of the release, such as deepseek-v4."""
    release: Path
    """The Hugging Face release as downloaded."""
    inference_dir: Path = DERIVED
    """The vendor's inference code. Default: `<release>/inference`."""
    inference_config: Path = DERIVED
    """Its model configuration. Default: `<inference_dir>/config.json`."""
    workspace: Path
    """Folder for state, logs, reports and default outputs; on a file system that all workers share."""
    memory: Annotated[int, BeforeValidator(_memory)] = 2 << 30
    """Peak of one data-parallel worker process, file cache aside: `2GiB`, `512MiB`."""
    checksums: Annotated[bool, Strict()] = True
    """SHA-256 of every output file, made beside the writing, and SHA256SUMS in the checkpoint."""
    parallel: Parallel = Parallel()
    """The shape of a gang."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where calibration runs."""
    tokens: Tokens = Tokens()
    """Calibration data."""
    convert: Convert = Convert()
    """Release to model-parallel checkpoint."""
    calibrate: Calibrate = Calibrate()
    """How amax are measured."""
    export: Export
    """Release to NVFP4 checkpoint."""
    launcher: Launcher = Launcher()
    """What starts the workers."""
    slurm: Slurm = Slurm()
    """How to ask a Slurm cluster."""
