"""calibrate: release or model-parallel checkpoint + tokens -> amax, by a gang of ranks. Planned without torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

from dsqjob.amax.ledger import LEDGER, file_digest
from dsqjob.dataplan.mp_checkpoint import as_written, mp_identity
from dsqjob.dataplan.plan import FilePlan
from dsqjob.engine.fingerprint import Fingerprint, digest_of
from dsqjob.engine.publish import publish_json
from dsqjob.engine.stage import GangStage, Record, Unit
from dsqjob.engine.workspace import read_state, unique_token
from dsqjob.errors import UsageError
from dsqjob.families.known_code import check_code
from dsqjob.stages.inputs import FORMAT_VERSION, Inputs
from dsqjob.tokens.file import TOKENS, TokenIds, load_tokens
from dsqjob.tokens.prompt import decode_ids, encode_prompt

AMAX = "amax"
PAPERS = ("quantized_layers_manifest.json", ".quant_summary.txt", "coverage.json", "convergence.json")
"""What is left beside the amax: two files as the reference writes them, two of our own."""
PICTURES = ("coverage.svg", "convergence.svg")
_GIB = 1 << 30
_WORK = "dsqjob.calibration.work"


def rank_file(rank: int, n: int) -> str:
    """The reference's name for a rank's amax."""
    return f"amax_dict_rank{rank}-mp{n}.pt"


class Calibrate(GangStage):
    """One unit: all amax. Within it, every batch is a point to resume from."""

    name = "calibrate"
    owner = "calibrate"

    def __init__(self, inputs: Inputs) -> None:
        job = inputs.job
        self.inputs, self.job = inputs, job
        self.folder = job.calibrate.output
        self.n = job.parallel.model_parallel
        self.nodes, self.ranks_per_node = job.parallel.nodes, job.parallel.gpus_per_node
        self.rendezvous_seconds = job.calibrate.timeouts.rendezvous
        self.silence_seconds = job.calibrate.timeouts.silence
        inputs.family.check_model_parallel(inputs.release, self.n)
        files = [*(rank_file(rank, self.n) for rank in range(self.n)), *PAPERS, LEDGER]
        self.units = [Unit(AMAX, tuple(files), self.n * self.memory["weights"], 0)]

    @cached_property
    def memory(self) -> dict[str, int]:
        """Bytes that a rank needs, by what for."""
        job = self.job
        length = job.tokens.sequence_length
        return dict(self.inputs.family.rank_memory(self.inputs.release, self.n, job.calibrate.batch_size, length))

    @cached_property
    def code(self) -> dict[str, str]:
        """SHA-256 of the vendor's files. UsageError ``vendor-code-missing``, ``vendor-code-unknown``."""
        job = self.job
        settings = job.calibrate
        return check_code(
            job.family, job.inference_dir, required=settings.require_known_code, vouched=settings.known_code
        )

    @cached_property
    def tokens(self) -> TokenIds:
        """The token ids, checked against the model. UsageError ``tokens-missing``, ``sequence-too-long``; DataError
        ``token-id``."""
        path = self.job.tokens.output / TOKENS
        if not path.is_file():
            raise UsageError(
                "tokens-missing", "there are no tokens yet", where=path, way_out="dsqjob run JOB --stage tokens"
            )
        tokens = load_tokens(path)
        self.inputs.family.check_tokens(self.inputs.release, tokens.ids, str(path))
        return tokens

    @property
    def batches(self) -> int:
        """Forwards through the model."""
        return -(-len(self.tokens.ids) // self.job.calibrate.batch_size)

    @cached_property
    def fingerprint(self) -> Fingerprint:
        job = self.job
        config = job.inference_config
        if not config.is_file():
            raise UsageError(
                "inference-config-missing",
                "the vendor's model configuration is not there",
                where=config,
                way_out="set inference_config to the JSON file of its ModelArgs",
            )
        names = [plan.name for plan in self._release_plans()] if self._from_mp else []
        return Fingerprint(
            {
                **self.inputs.release_parts(),
                "tokens": self.tokens.digest,
                "vendor code": digest_of(self.code),
                "inference_config": file_digest(config),
                "mp checkpoint": mp_identity(job.calibrate.mp_checkpoint, names) if names else "none",
                "parallel.model_parallel": str(self.n),
                "calibrate.batch_size": str(job.calibrate.batch_size),
                "calibrate.threads": str(job.calibrate.threads),
                "calibrate.dummy_weights": str(job.calibrate.dummy_weights),
                "device": job.device,
                "format": FORMAT_VERSION,
            }
        )

    @property
    def _from_mp(self) -> bool:
        return self.job.calibrate.source == "mp" and not self.job.calibrate.dummy_weights

    def _release_plans(self) -> list[FilePlan]:
        return [self.inputs.family.mp_file(self.inputs.release, rank, self.n) for rank in range(self.n)]

    def check(self) -> None:
        """Whatever can be refused before a GPU is touched."""
        self.prompt  # noqa: B018 (refused here, before supervisors start)
        if self.tokens and self.code and self._from_mp:
            for plan in self._release_plans():
                as_written(plan, self.job.calibrate.mp_checkpoint)

    def rank_plan(self, rank: int) -> tuple[FilePlan, Path]:
        """Every tensor of a rank and the folder that its bytes are read from."""
        plan = self.inputs.family.mp_file(self.inputs.release, rank, self.n)
        if not self._from_mp:
            return plan, self.inputs.release.root
        folder = self.job.calibrate.mp_checkpoint
        return as_written(plan, folder), folder

    @cached_property
    def prompt(self) -> list[int]:
        """Token ids of ``calibrate.generate``; empty where there is none. UsageError ``tokenizer-missing``."""
        text = self.job.calibrate.generate
        ids = encode_prompt(self.job.release, text) if text is not None else []
        longest = self.inputs.release.config.get("max_position_embeddings")
        if type(longest) is int and len(ids) + self.job.calibrate.max_new_tokens > longest:
            raise UsageError(
                "prompt-too-long",
                f"{len(ids)} tokens and {self.job.calibrate.max_new_tokens} new ones, the model takes {longest}",
                where="calibrate.generate",
                way_out="shorten the prompt, or calibrate.max_new_tokens",
            )
        return ids

    @property
    def _generated(self) -> Path:
        return self.inputs.workspace.reports / "generated.json"

    def _question(self) -> dict[str, Any]:
        settings = self.job.calibrate
        return {
            "prompt": settings.generate,
            "max_new_tokens": settings.max_new_tokens,
            "fingerprint": self.fingerprint.digest,
        }

    def wanted(self) -> bool:
        return self.job.calibrate.generate is not None and self._answer() is None

    def _answer(self) -> str | None:
        if not self._generated.is_file():
            return None
        found = read_state(self._generated)
        same = all(found.get(key) == value for key, value in self._question().items())
        return str(found["text"]) if same else None

    def write_generated(self, ids: list[int]) -> None:
        """Keep what the quantized model made of the prompt, for people to judge."""
        text = decode_ids(self.job.release, ids)
        publish_json(self._generated, {**self._question(), "ids": ids, "text": text}, unique_token())

    def work(self) -> Callable[[Any], None]:
        self.inputs.release, self.fingerprint, self.prompt  # noqa: B018 (read once a node, before the fork)
        if import_module("dsqjob.calibration.devices").device_kind(self.job.device) == "cpu":
            import_module(_WORK)  # so that ranks find it imported; with GPUs that would initialise CUDA before the fork

        def in_rank(rank: Any) -> None:
            import_module(_WORK).CalibrationWork(self)(rank)

        return in_rank

    def look_back(self) -> None:
        import_module("dsqjob.calibration.looking_back").draw_pictures(self)

    def describe(self) -> Sequence[str]:
        job = self.job
        need = sum(self.memory.values())
        parts = ", ".join(f"{name} {value / _GIB:.2f}" for name, value in self.memory.items())
        shape = f"{self.nodes} x {self.ranks_per_node}" if self.nodes > 1 else f"{self.n}"
        source = job.calibrate.mp_checkpoint if self._from_mp else self.inputs.release.root
        lines = [
            f"a gang of {shape} ranks, each {need / _GIB:.2f} GiB: {parts}",
            f"weights {'are made up' if job.calibrate.dummy_weights else f'from {source}'}",
        ]
        if (job.tokens.output / TOKENS).is_file():
            samples, length = self.tokens.ids.shape
            lines.append(f"{self.batches} batches of {job.calibrate.batch_size}: {samples} samples of {length} tokens")
        for name, digest in self.code.items():
            lines.append(f"vendor code {name} {digest}")
        return lines

    def summary(self, records: Sequence[Record]) -> Sequence[str]:
        lines = [str(line) for line in records[0].counts.get("lines", ())]
        if (text := self._answer() if self.job.calibrate.generate is not None else None) is not None:
            lines += [f"[generate] prompt: {self.job.calibrate.generate!r}", f"[generate] completion: {text!r}"]
        pictures = [path for name in PICTURES if (path := self.inputs.workspace.reports / name).is_file()]
        return lines + [f"picture: {path}" for path in pictures]


def build(inputs: Inputs) -> Calibrate:
    return Calibrate(inputs)
