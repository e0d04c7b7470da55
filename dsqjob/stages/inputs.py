"""What the stages of a job share; every header is read once, whatever the number of stages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

from dsqjob.amax.ledger import LEDGER, Ledger
from dsqjob.amax.reference import amax_identity, load_amax, rank_files
from dsqjob.amax.settle import Settled, settle
from dsqjob.checkpoint.release import Release, open_release
from dsqjob.engine.fingerprint import digest_of
from dsqjob.engine.workspace import Workspace
from dsqjob.errors import DataError, UsageError
from dsqjob.families import family
from dsqjob.families.face import Family, Target
from dsqjob.job.schema import Job

FORMAT_VERSION = "1"
"""Changes when the same inputs and settings would give other bytes."""


def release_digest(release: Release) -> str:
    """One word for what the release is."""
    return digest_of(release.identity())


class Inputs:
    """A job and what its headers say, read when first asked for."""

    def __init__(self, job: Job, *, aside: Path | None = None) -> None:
        """``aside``: where amax are imported to that the workspace does not have yet (a plan writes nothing there)."""
        self.job = job
        self.workspace = Workspace(job.workspace)
        self._aside = aside

    @cached_property
    def family(self) -> Family:
        return family(self.job.family)

    @cached_property
    def release(self) -> Release:
        """The release, found whole and of the job's family."""
        job = self.job
        if job.release.resolve() in [job.workspace.resolve(), *job.workspace.resolve().parents]:
            raise UsageError(
                "output-inside-release",
                "the workspace lies inside the release and would become part of it",
                where=f"workspace: {job.workspace}",
                way_out="choose a workspace outside the release",
            )
        for name in ("tokens", "convert", "calibrate", "export"):
            self._disjoint(f"{name}.output", getattr(job, name).output)
        self._apart()
        release = open_release(self.job.release)
        self.family.check(release)
        return release

    def _apart(self) -> None:
        """Every stage writes a folder of its own."""
        names: dict[Path, str] = {}
        for name in ("tokens", "convert", "calibrate", "export"):
            folder = getattr(self.job, name).output
            if (other := names.setdefault(folder.resolve(), name)) != name:
                raise UsageError(
                    "outputs-same",
                    f"{other}.output and {name}.output are one folder",
                    where=folder,
                    way_out="give each stage a folder of its own",
                )

    def _disjoint(self, name: str, folder: Path) -> None:
        source, target = self.job.release.resolve(), folder.resolve()
        if source == target or source in target.parents or target in source.parents:
            raise UsageError(
                "output-inside-release",
                "release and output folder must lie apart",
                where=f"{name}: {folder}",
                way_out="choose an output folder outside the release",
            )

    def targets(self) -> Iterator[Target]:
        """All projections to quantize; not kept, since a large release has 70,000."""
        return self.family.targets(self.release)

    @cached_property
    def route(self) -> str:
        """How weights become NVFP4. UsageError ``weights-route`` where the release has no such way."""
        routes = self.family.routes(self.release)
        if self.job.export.weights == "auto":
            return routes[0]
        if self.job.export.weights not in routes:
            raise UsageError(
                "weights-route",
                f"this release allows {', '.join(routes)}, not {self.job.export.weights}",
                where="export.weights",
                way_out="set export.weights to auto",
            )
        return self.job.export.weights

    @property
    def calibrated(self) -> bool:
        return self.job.export.input_scale == "calibrated"

    @property
    def awaits_calibration(self) -> bool:
        """Whether the amax are still to be measured by this job's own gang."""
        job = self.job
        ours = self.calibrated and job.export.amax == job.calibrate.output
        return ours and not (job.calibrate.output / LEDGER).is_file() and not rank_files(job.calibrate.output)

    @cached_property
    def amax_digest(self) -> str:
        """What the amax are: a digest of their files, or the word ``one``."""
        return amax_identity(self.job.export.amax) if self.calibrated else "one"

    @cached_property
    def ledger(self) -> Ledger | None:
        """The amax; those of the reference are imported into the workspace first."""
        if not self.calibrated:
            return None
        imports = self.workspace.root / "state" / "amax-imports"
        if self._aside is not None and not (imports / self.amax_digest).is_dir():
            imports = self._aside
        ledger = load_amax(self.job.export.amax, imports)
        if ledger.about.get("weights") == "made up":
            raise UsageError(
                "amax-dummy",
                "these amax were measured on made-up weights",
                where=self.job.export.amax,
                way_out="calibrate without dummy weights: --stage calibrate --restart",
            )
        if (measured := ledger.about.get("release")) not in (None, release_digest(self.release)):
            raise DataError(
                "amax-other-release",
                f"these amax were measured on another release (its digest is {measured})",
                where=self.job.export.amax,
                way_out="calibrate this release, or point export.amax at its amax",
            )
        return ledger

    @cached_property
    def settled(self) -> Mapping[str, Settled] | None:
        """Maxima of every target; None where input scales are 1."""
        if self.ledger is None:
            return None
        return settle(
            self.ledger,
            (target.sharing for target in self.targets()),
            allow_uncalibrated=self.job.export.allow_uncalibrated,
            where=self.job.export.amax,
        )

    def release_parts(self) -> dict[str, str]:
        """The release in a fingerprint."""
        return {f"release {name}": digest for name, digest in self.release.identity().items()}
