"""The command line. Exit codes are those of ``dsqjob.errors``; what is slow to import is imported by its command."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from dsqjob import __version__
from dsqjob.errors import BugError, DsqjobError, Interrupted, UsageError
from dsqjob.stages import GANGS, STAGES

if TYPE_CHECKING:
    from dsqjob.job.schema import Job

F = TypeVar("F", bound=Callable[..., Any])
_SERVERS = ("vllm", "sglang", "trtllm")


def _overrides(command: F) -> F:
    """Options that change the job for one command."""
    for option in (
        click.option(
            "--set", "sets", multiple=True, metavar="K=V", help="Override a setting, e.g. export.weights=cast."
        ),
        click.option("--nodes", type=click.IntRange(1), help="Nodes; GPUs per node = model_parallel / nodes."),
        click.option("--mp", type=click.IntRange(1), help="Model-parallel degree."),
        click.option("--on", "launcher", help="Launcher: local, or slurm, which submits."),
    ):
        command = option(command)
    return command


_ALONE = "127.0.0.1:0"
"""The rendezvous of a single node, which meets nobody."""


class _NodeNumber(click.IntRange):
    """A number, or ``slurm``: the number that Slurm gave to this task."""

    def __init__(self) -> None:
        super().__init__(min=0)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(os.environ.get("SLURM_PROCID", value) if value == "slurm" else value, param, ctx)


@click.group(no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="dsqjob")
def cli() -> None:
    """DeepSeek releases become NVFP4 checkpoints: resumable at any instant, verified bit by bit.

    JOB is a job file, or the name of one that ships with dsqjob (deepseek-v4-pro, miniature-v4).
    """


@cli.command()
@click.argument("job")
@_overrides
def plan(job: str, **overrides: Any) -> None:
    """What would be done: sizes, disk, refusals. Reads headers only and writes nothing."""
    from tempfile import TemporaryDirectory

    from dsqjob.cli.view import print_plan
    from dsqjob.stages.inputs import Inputs

    with TemporaryDirectory(prefix="dsqjob-plan-") as aside:
        print_plan(Inputs(_load(job, **overrides)[0], aside=Path(aside)))


@cli.command()
@click.argument("job")
@click.option("--stage", type=click.Choice(STAGES), help="This stage only, or the first one with --through.")
@click.option("--through", type=click.Choice(STAGES), help="The last stage.")
@click.option("--restart", is_flag=True, help="Remove what the selected stages made, and begin again.")
@click.option("--generate", metavar="PROMPT", help="Continue PROMPT through the quantized model after calibration.")
@click.option("--dummy-weights", is_flag=True, help="Calibrate made-up weights: tries the wiring at full size.")
@click.option("--require-known-code", is_flag=True, help="Refuse vendor code that nobody vouches for.")
@_overrides
def run(job: str, stage: str | None, through: str | None, restart: bool, **options: Any) -> None:
    """Run the stages that are not done yet; the same command resumes."""
    import json

    from dsqjob.cli.view import run_pipeline

    prompt = options.pop("generate")
    extra = [f"calibrate.{name}=true" for name in ("dummy_weights", "require_known_code") if options.pop(name)]
    if prompt is not None:
        text = json.dumps(prompt.replace("$", "$$"), ensure_ascii=False)
        extra.append(f"calibrate.generate={text}")
    options["sets"] = (*options["sets"], *extra)
    loaded, sets = _load(job, **options)
    if loaded.launcher.kind == "slurm":
        from dsqjob.cli.submission import submit_pipeline

        submit_pipeline(loaded, stage=stage, through=through, restart_first=restart)
        return
    run_pipeline(loaded, job, sets, stage=stage, through=through, restart_first=restart)


@cli.command()
@click.argument("stage", type=click.Choice(STAGES))
@click.argument("job")
@click.option("--worker", "index", type=click.IntRange(0), help="This worker's number, from 0.")
@click.option("--workers", "count", type=click.IntRange(1), help="How many workers there are.")
@click.option(
    "--node", type=_NodeNumber(), help="calibrate: this node's number, from 0, of --nodes; slurm: as it says."
)
@click.option("--rendezvous", metavar="HOST:PORT", help="calibrate: where nodes meet; HOST is node 0.")
@click.option("--attempt", default="0", show_default=True, help="calibrate: the same on all nodes, new for each start.")
@click.option("--run", "run_id", default="", help="Marks the events of one launch.")
@click.option("--die-with-parent", is_flag=True, help="Stop when the starting process is gone (Linux).")
@_overrides
def worker(stage: str, job: str, run_id: str, die_with_parent: bool, **options: Any) -> None:
    """One worker: what launchers start, on any number of machines.

    Of a data-parallel stage: --worker I --workers N. Of calibrate: the supervisor of one node, --node I --nodes N
    --rendezvous HOST:PORT.
    """
    from dsqjob import worker as work
    from dsqjob.gang.node import check_meeting

    if die_with_parent:
        work.die_with_parent()
    _cache_compiled_code()
    given = {name: options.pop(name) for name in ("index", "count", "node", "rendezvous", "attempt")}
    loaded = _load(job, **options)[0]
    if stage in GANGS:
        nodes, rendezvous = loaded.parallel.nodes, given["rendezvous"]
        if given["node"] is None or given["node"] >= nodes or (rendezvous is None and nodes > 1):
            raise UsageError(
                "node-number",
                f"{stage} is started once a node, with --node 0 to --node {nodes - 1} and one --rendezvous HOST:PORT",
                where="--node, --nodes, --rendezvous",
                way_out=f"dsqjob worker {stage} JOB --node 0 --nodes {nodes} --rendezvous HOST:PORT",
            )
        rendezvous = _ALONE if rendezvous is None else rendezvous
        check_meeting(rendezvous, given["attempt"], nodes)
        work.run_node(stage, given["node"], rendezvous, given["attempt"], loaded, run=run_id)
        return
    if given["index"] is None or given["count"] is None or given["index"] >= given["count"]:
        said = None not in (given["index"], given["count"])
        raise UsageError(
            "worker-number",
            f"worker {given['index']} of {given['count']} does not exist" if said else f"which worker of {stage}?",
            where="--worker, --workers",
            way_out="count from 0" if said else f"dsqjob worker {stage} JOB --worker 0 --workers N",
        )
    work.run_worker(stage, given["index"], given["count"], loaded, run=run_id)


@cli.command()
@click.argument("job")
@click.option("--json", "as_json", is_flag=True, help="For machines.")
@click.option("--set", "sets", multiple=True, metavar="K=V", hidden=True)
def status(job: str, as_json: bool, sets: tuple[str, ...]) -> None:
    """Where the job stands, from its event log alone."""
    from dsqjob.cli.status import print_status
    from dsqjob.job.load import workspace_of

    print_status(workspace_of(job, sets=sets, environment=os.environ), as_json)


@cli.command()
@click.argument("job")
@click.option("--stage", type=click.Choice(STAGES), help="This stage's; by default the latest one's.")
@click.option("--rank", type=click.IntRange(0), help="calibrate: of this rank.")
@click.option("--follow", "-f", is_flag=True, help="Go on until the run is over, or --stage.")
@click.option("--set", "sets", multiple=True, metavar="K=V", hidden=True)
def logs(job: str, sets: tuple[str, ...], **which: Any) -> None:
    """What workers, supervisors and ranks said."""
    from dsqjob.cli.following import print_logs
    from dsqjob.job.load import workspace_of

    print_logs(workspace_of(job, sets=sets, environment=os.environ), **which)


@cli.command()
@click.argument("job")
@click.option("--set", "sets", multiple=True, metavar="K=V", hidden=True)
def cancel(job: str, sets: tuple[str, ...]) -> None:
    """Stop what waits or runs; `run` goes on from there later."""
    from dsqjob.cli.following import cancel_jobs
    from dsqjob.job.load import workspace_of

    cancel_jobs(workspace_of(job, sets=sets, environment=os.environ))


@cli.command()
@click.argument("scheduler", type=click.Choice(["slurm"]))
@click.argument("job")
@click.option("--stage", type=click.Choice(STAGES), help="This stage only, or the first one with --through.")
@click.option("--through", type=click.Choice(STAGES), help="The last stage.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the scripts to this folder.")
@_overrides
def render(scheduler: str, job: str, stage: str | None, through: str | None, out: Path | None, **options: Any) -> None:
    """Print exactly what `run` would send to the scheduler."""
    from dsqjob.cli.submission import print_scripts

    options["launcher"] = scheduler
    print_scripts(_load(job, **options)[0], stage=stage, through=through, out=out)


@cli.command(hidden=True)
@click.argument("stage", type=click.Choice(STAGES))
@click.argument("job")
@_overrides
def batch(stage: str, job: str, **overrides: Any) -> None:
    """What a Slurm job runs on its first node."""
    from dsqjob.launchers.slurm.allocation import Allocation
    from dsqjob.launchers.slurm.batch import Batch

    loaded = _load(job, **overrides)[0]
    here = Allocation.of(os.environ)
    sys.exit(Batch(loaded, stage, gang=stage in GANGS, job_file=Path(job).absolute(), here=here).run())


@cli.command()
@click.argument("target", metavar="JOB|CHECKPOINT")
@click.option("--for", "server", type=click.Choice(_SERVERS), help="Judge the conditions of this server only.")
@click.option("--tensor-parallel", type=click.IntRange(1), help="The server's tensor-parallel size (condition E2).")
@_overrides
def verify(target: str, server: str | None, tensor_parallel: int | None, **overrides: Any) -> None:
    """Recompute everything and report; exits 65 where anything is wrong.

    With a job: against release and amax. With a checkpoint folder: what its own papers allow.
    """
    from dsqjob.cli.verification import verify_folder, verify_job

    _cache_compiled_code()

    if Path(target).is_dir():
        verify_folder(Path(target), server, tensor_parallel)
    else:
        loaded, sets = _load(target, **overrides)
        verify_job(loaded, target, sets, server, tensor_parallel)


@cli.command()
@click.argument("job")
@_overrides
def clean(job: str, **overrides: Any) -> None:
    """Remove what dead workers left: partials and claims. Finished files stay."""
    from dsqjob.cli.view import clean_workspace
    from dsqjob.stages.inputs import Inputs

    clean_workspace(Inputs(_load(job, **overrides)[0]))


@cli.command()
@click.argument("family")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--seed", type=int, default=1, show_default=True, help="The same seed, the same bytes.")
@click.option("--text", type=click.Path(path_type=Path), help="Also write a few lines to calibrate with (JSON lines).")
def miniature(family: str, folder: Path, seed: int, text: Path | None) -> None:
    """Write a complete release, scaled down to a few MB."""
    from dsqjob.miniature import write, write_text

    write(family, folder, seed=seed)
    click.echo(f"miniature {family} release (seed {seed}): {folder}")
    if text is not None:
        write_text(text)
        click.echo(f"calibration text: {text}")


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="As JSON Schema.")
def schema(as_json: bool) -> None:
    """The job file's manual."""
    import json

    from dsqjob.job.manual import manual
    from dsqjob.job.schema import Job

    click.echo(json.dumps(Job.model_json_schema(), indent=2) if as_json else manual())


def _cache_compiled_code() -> None:
    """Keep compiled loops in a private folder of this node: the package's own may be read-only, or on a file server."""
    from dsqjob.worker import private_cache

    if (cache := private_cache()) is not None:
        os.environ.setdefault("NUMBA_CACHE_DIR", str(cache / "numba"))


def _load(
    job: str, sets: tuple[str, ...] = (), nodes: int | None = None, mp: int | None = None, launcher: str | None = None
) -> tuple[Job, tuple[str, ...]]:
    """The job with every override, and the overrides as ``K=V`` for workers."""
    from dsqjob.families import FAMILIES
    from dsqjob.job.load import load
    from dsqjob.launchers import LAUNCHERS

    def read(extra: tuple[str, ...]) -> Job:
        return load(job, sets=extra, environment=os.environ, families=tuple(FAMILIES), launchers=tuple(LAUNCHERS))

    if launcher is not None:
        sets = (*sets, f"launcher.kind={launcher}")
    if mp is not None:
        sets = (*sets, f"parallel.model_parallel={mp}", "parallel.nodes=1", f"parallel.gpus_per_node={mp}")
    if nodes is not None:
        degree = read(sets).parallel.model_parallel
        if degree % nodes:
            raise UsageError(
                "nodes-divide",
                f"{nodes} nodes do not divide model_parallel {degree}",
                where="--nodes",
                way_out="choose a number of nodes that divides it, or another --mp",
            )
        sets = (*sets, f"parallel.nodes={nodes}", f"parallel.gpus_per_node={degree // nodes}")
    return read(sets), sets


def main(arguments: list[str] | None = None) -> None:
    """Entry point: one place where errors become words and exit codes."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    for number in (signal.SIGTERM, signal.SIGUSR2):  # until a stage listens for itself
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda *_: sys.exit(Interrupted.exit_code))
    try:
        cli(arguments, standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(UsageError.exit_code)
    except click.ClickException as error:
        click.echo(f"[usage] {error.format_message()}", err=True)
        sys.exit(UsageError.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("[interrupted] run the same command again: it resumes", err=True)
        sys.exit(Interrupted.exit_code)
    except DsqjobError as error:
        click.echo(str(error), err=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        sys.exit(_unexpected(error))


def _unexpected(error: Exception) -> int:
    """Faults of storage and paths in words; anything else is ours, with its traceback."""
    import traceback

    from dsqjob.engine.execute import in_words

    if isinstance(error, OSError) and (worded := in_words(error)) is not None:
        click.echo(str(worded), err=True)
        return worded.exit_code
    click.echo("".join(traceback.format_exception(error)), err=True)
    click.echo(f"[bug] {type(error).__name__}: {error}\n  way out: report this, with the lines above", err=True)
    return BugError.exit_code
