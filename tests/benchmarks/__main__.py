"""Prints the table. ``--scratch DIR`` (default: a temporary folder), ``--pairs N``, ``--only WORD``."""

from __future__ import annotations

import argparse
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from tests.benchmarks.synthetic import write_amax, write_hollow_release, write_release
from tests.harness import command, worker, write_job

SHARDS = 5
Run = Callable[[int], None]


class Bench:
    def __init__(self, scratch: Path, pairs: int) -> None:
        self.scratch, self.pairs = scratch, pairs
        self.rows: list[tuple[str, str, str]] = []
        for count in (1, SHARDS):
            write_release(scratch / f"release{count}", count)
            write_amax(scratch / f"amax{count}", count)
        os.sync()

    def row(self, what: str, found: str, limit: str = "") -> None:
        self.rows.append((what, found, limit))
        print(f"| {what} | {found} | {limit} |", flush=True)

    def export(self, *sets: str, stage: str = "export", folder: Path | None = None, workers: int = 1) -> Run:
        """Run a stage from nothing on 1 or 5 shards."""

        def run(shards: int) -> None:
            place = folder or self.scratch
            job = write_job(
                place / "job", self.scratch / f"release{shards}", memory="2GiB",
                export__amax=self.scratch / f"amax{shards}", export__input_scale="calibrated",
            )  # fmt: skip
            options = [word for item in sets for word in ("--set", item)]
            more = ["--mp", "1"] if stage == "convert" else []
            going = [
                subprocess.Popen(worker(stage, job, *more, *options, index=n, count=workers)) for n in range(workers)
            ]
            if any(process.wait() for process in going):
                raise SystemExit(f"{stage} {sets} failed")

        return run

    def copy(self, folder: Path | None = None, parallel: int = 1, reflink: str = "never") -> Run:
        """``cp`` of the shards, then ``sync`` of the copies."""

        def run(shards: int) -> None:
            target = (folder or self.scratch) / "copy"
            target.mkdir()
            files = [str(path) for path in sorted((self.scratch / f"release{shards}").glob("*.safetensors"))]
            going = [
                subprocess.Popen(["cp", f"--reflink={reflink}", *files[n::parallel], str(target)])
                for n in range(parallel)
            ]
            if any(process.wait() for process in going):
                raise SystemExit("cp failed")
            subprocess.run(["sync", *[str(path) for path in target.iterdir()]], check=True)

        return run

    def seconds(self, run: Run, shards: int, folder: Path | None = None) -> float:
        place = folder or self.scratch
        for name in ("job", "copy"):
            shutil.rmtree(place / name, ignore_errors=True)
        os.sync()
        begun = time.monotonic()
        run(shards)
        return time.monotonic() - begun

    def slope(self, run: Run, folder: Path | None = None) -> float:
        """Seconds a shard: what a run of 5 takes over a run of 1, divided by 4."""
        return (self.seconds(run, SHARDS, folder) - self.seconds(run, 1, folder)) / (SHARDS - 1)

    def slopes(self, what: str, ours: Run, theirs: Run, limit: str) -> None:
        self.slope(ours)  # warms page cache and compiled code
        pairs = [(self.slope(ours), self.slope(theirs)) for _ in range(self.pairs)]
        ratios = sorted(a / b for a, b in pairs)
        mine, other = median(a for a, _ in pairs), median(b for _, b in pairs)
        self.row(
            what,
            f"{median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}); {mine:.2f} and {other:.2f} s a shard",
            limit,
        )

    def cpu(self, arguments: list[str]) -> float:
        """Least user and system seconds of three runs of a command."""
        found = []
        for _ in range(3):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            found.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        return min(found)

    def bytes_at_the_speed_of_the_disk(self) -> None:
        off = "checksums=false"
        cast = self.export(off)
        self.slopes("cast / (cp + sync), checksums off, slope", cast, self.copy(), "1.3")
        self.slopes("cast / (cp + sync), checksums on, slope", self.export(), self.copy(), "1.5")
        self.slopes(
            "convert / (cp + sync), checksums off, slope", self.export(off, stage="convert"), self.copy(), "1.3"
        )
        self.slopes("convert / (cp + sync), checksums on, slope", self.export(stage="convert"), self.copy(), "1.5")

    def requantize(self) -> None:
        off = "checksums=false"
        cast, lookup = self.export(off), self.export(off, "export.weights=requantize")
        self.slopes("requantize / cast, checksums off, slope", lookup, cast, "1.5")
        both = self.export("export.weights=requantize")
        self.slopes("requantize / cast, checksums on, slope", both, self.export(), "1.5")

    def start(self) -> None:
        job = write_job(self.scratch / "small", self.scratch / "release1")
        subprocess.run(worker("export", job), check=True)
        timed = [sys.executable, "-X", "importtime", *worker("export", job)[1:]]
        said = subprocess.run(timed, capture_output=True, text=True, check=True).stderr
        torch = "with" if re.search(r"\| +torch$", said, re.M) else "no"
        self.row("a worker on a finished stage, CPU s", f"{self.cpu(worker('export', job)):.2f}, {torch} torch", "0.5")
        self.row("dsqjob --help, CPU s", f"{self.cpu(command('--help')):.2f}", "0.3")
        self.row("dsqjob status, CPU s", f"{self.cpu(command('status', job)):.2f}", "0.3")

    def plan(self) -> None:
        write_hollow_release(self.scratch / "hollow")
        job = write_job(self.scratch / "large", self.scratch / "hollow")
        begun = time.monotonic()
        subprocess.run(command("plan", job), check=True, stdout=subprocess.DEVNULL)
        self.row("plan of 64 shards and 150,000 tensors, s", f"{time.monotonic() - begun:.1f}", "5")
        if shutil.which("strace"):
            trace = self.scratch / "trace"
            subprocess.run(["strace", "-f", "-qq", "-y", "-o", str(trace), "-e", "trace=openat,read", *command("plan", job)],
                           check=True, stdout=subprocess.DEVNULL)  # fmt: skip
            text = trace.read_text()
            opens = len(re.findall(r'openat\([^\n]*model-\d+-of-\d+\.safetensors"[^\n]*= \d', text))
            read = sum(int(n) for n in re.findall(r"read\(\d+<[^>]*model-\d+-of-\d+\.safetensors>.*= (\d+)", text))
            heads = [path.open("rb").read(8) for path in (self.scratch / "hollow").glob("*.safetensors")]
            header = sum(8 + int.from_bytes(head, "little") for head in heads)
            self.row("its opens of shards, bytes read / header bytes", f"{opens}, {read} / {header}", "64, equal")
        run = command("run", job, "--stage", "export", "--set", "launcher.workers=2")
        subprocess.run(run, check=True, stdout=subprocess.DEVNULL)
        begun = time.monotonic()
        subprocess.run(run, check=True, stdout=subprocess.DEVNULL)
        self.row("that stage, finished, is recognised, s", f"{time.monotonic() - begun:.1f}", "5")
        shutil.rmtree(self.scratch / "large")

    def memory(self) -> None:
        """Peak resident size at memory = 256 MiB, and whether a cgroup of that size lets the worker live."""
        group = Path("/sys/fs/cgroup/memory/dsqjob-bench")
        prefix: list[str] = []
        try:
            group.mkdir()
            (group / "memory.limit_in_bytes").write_text(str(256 << 20))
            prefix = ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"]
        except OSError:
            self.row("memory cgroup", "cannot be made here: resident size only")
        code = "import resource,subprocess,sys; c=subprocess.call(sys.argv[1:]); print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(c)"
        for what, stage, sets in (
            ("cast", "export", ()), ("requantize", "export", ("export.weights=requantize",)),
            ("requantize, amax derived", "export", ("export.weights=requantize", "export.input_scale=one")),
            ("convert", "convert", ()), ("verify", "verify", ()),
        ):  # fmt: skip
            if stage != "verify":
                shutil.rmtree(self.scratch / "job", ignore_errors=True)
            job = write_job(self.scratch / "job", self.scratch / "release1", memory="256MiB",
                            export__amax=self.scratch / "amax1", export__input_scale="calibrated")  # fmt: skip
            if stage == "verify":
                shutil.rmtree(self.scratch / "job" / "work", ignore_errors=True)
                shutil.rmtree(self.scratch / "job" / "out", ignore_errors=True)
                for one in ("export", "finalize"):
                    subprocess.run(worker(one, job), check=True)
            options = [word for item in sets for word in ("--set", item)] + (
                ["--mp", "1"] if stage == "convert" else []
            )
            done = subprocess.run([*prefix, sys.executable, "-c", code, *worker(stage, job, *options)],
                                  capture_output=True, text=True, check=False)  # fmt: skip
            peak = f"{int(done.stdout.split()[-1]) / 1024:.0f} MiB" if done.stdout else "killed"
            lived = (
                "" if not prefix else ", lived in the cgroup" if done.returncode == 0 else f", exit {done.returncode}"
            )
            self.row(f"peak of {what} at 256 MiB, shards of 1 GB", peak + lived, "256 MiB")
        if prefix:
            group.rmdir()

    def workers(self) -> None:
        cores = len(os.sched_getaffinity(0))
        memory = Path(tempfile.mkdtemp(prefix="dsqjob-bench-", dir="/dev/shm"))
        try:
            one, all_ = (
                self.export("export.weights=requantize", "checksums=false", folder=memory, workers=n)
                for n in (1, cores)
            )
            self.slope(one, memory)
            pairs = [(self.slope(one, memory), self.slope(all_, memory)) for _ in range(self.pairs)]
            gain = median(a / b for a, b in pairs)
            self.row(
                f"requantize on tmpfs, {cores} workers over 1, speed-up of the slope",
                f"{gain:.2f}",
                f"{0.85 * cores:.2f}",
            )
        finally:
            shutil.rmtree(memory)
        pairs = [
            (
                self.seconds(self.export("checksums=false", workers=cores), SHARDS),
                self.seconds(self.copy(parallel=cores), SHARDS),
            )
            for _ in range(self.pairs)
        ]
        self.row(
            f"cast on disk by {cores} workers / {cores} parallel cp + sync", f"{median(a / b for a, b in pairs):.2f}"
        )

    def reflink(self) -> None:
        """On an XFS with reflinks in a file, where that can be had."""
        if shutil.which("mkfs.xfs") is None or os.getuid() != 0:
            self.row("cast where copies go by reflink", "not measured: needs root and xfsprogs")
            return
        image, disk = self.scratch / "xfs.img", self.scratch / "xfs"
        disk.mkdir()
        with image.open("wb") as file:
            file.truncate(6 << 30)
        subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=1", str(image)], check=True)
        subprocess.run(["mount", "-o", "loop", str(image), str(disk)], check=True)
        try:
            shutil.copytree(self.scratch / "release1", disk / "release1")
            shutil.copytree(self.scratch / "amax1", disk / "amax1")
            here = Bench.__new__(Bench)
            here.scratch, here.pairs, here.rows = disk, self.pairs, self.rows
            run, copy, linked = here.export("checksums=false"), here.copy(), here.copy(reflink="always")
            here.seconds(run, 1)
            times = [(here.seconds(run, 1), here.seconds(copy, 1), here.seconds(linked, 1)) for _ in range(self.pairs)]
            a, b, c = (median(column) for column in zip(*times, strict=True))
            self.row(
                "on XFS with reflinks, 1 shard: cast, cp --reflink=never, cp --reflink=always; s",
                f"{a:.2f}, {b:.2f}, {c:.2f}",
            )
        finally:
            subprocess.run(["umount", "-l", str(disk)], check=True)


PARTS = ("start", "plan", "memory", "bytes_at_the_speed_of_the_disk", "requantize", "workers", "reflink")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--scratch", type=Path)
    options.add_argument("--pairs", type=int, default=5)
    options.add_argument("--only", default="")
    chosen = options.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="dsqjob-bench-", dir=chosen.scratch))
    if shutil.disk_usage(scratch).free < 25 << 30:
        raise SystemExit(f"{scratch}: needs 25 GB free; name another folder with --scratch")
    print(
        f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, {os.cpu_count()} cores, {scratch}, medians of {chosen.pairs} pairs"
    )
    print("| what | found | limit |\n|---|---|---|")
    try:
        bench = Bench(scratch, chosen.pairs)
        for part in PARTS:
            if chosen.only in part:
                getattr(bench, part)()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
