"""What each rank of a calibrating gang does, from joining to the files."""

from __future__ import annotations

import sys
import time
from importlib.metadata import version

import numpy as np
import torch

from dsqjob import __version__
from dsqjob.calibration.coverage import summary_lines
from dsqjob.calibration.devices import claim_device
from dsqjob.calibration.dummy import make_up
from dsqjob.calibration.fill import fill, parameters_of
from dsqjob.calibration.generate import continue_prompt
from dsqjob.calibration.leave import RankResult, leave
from dsqjob.calibration.looking_back import batch_tokens, rank_state
from dsqjob.calibration.memory import out_of_memory_in_words, refuse_full_device
from dsqjob.calibration.resident import measure
from dsqjob.calibration.snapshot import RankState, Snapshot, empty_snapshot, history_of
from dsqjob.calibration.together import broadcast, gather
from dsqjob.calibration.vendor import build_model, import_code, model_args
from dsqjob.calibration.wiring import wiring_class
from dsqjob.calibration.wiring.face import Wiring
from dsqjob.calibration.wiring.quantizers import running_amax
from dsqjob.calibration.wiring.quantizers import summary_lines as quantizer_lines
from dsqjob.dataplan.sources import Sources
from dsqjob.engine.claims import Claims
from dsqjob.engine.stage import Done, StageState
from dsqjob.engine.workspace import unique_token
from dsqjob.errors import BugError
from dsqjob.gang.preflight import agree
from dsqjob.gang.rank import Rank
from dsqjob.stages.calibrate import AMAX, Calibrate
from dsqjob.stages.inputs import release_digest

_PREFLIGHT = 60.0


class CalibrationWork:
    """Made in each rank, from what the node's supervisor read once: headers, plan and tokens."""

    def __init__(self, stage: Calibrate) -> None:
        self.stage, self.job = stage, stage.job
        self.fingerprint = stage.fingerprint.digest
        ids = torch.from_numpy(np.ascontiguousarray(stage.tokens.ids))
        self.batches = ids.split(self.job.calibrate.batch_size)
        self.state = StageState(stage.inputs.workspace, stage)

    def __call__(self, rank: Rank) -> None:
        """DataError, UsageError, Interrupted and others end the whole gang."""
        limits = self.job.calibrate.timeouts
        torch.set_num_threads(self.job.calibrate.threads)
        rank.phase("start", limits.rendezvous)
        device = claim_device(self.job.device, rank.index, rank.local)
        state = rank_state(self.stage, rank.index, device=device.type, **_software())
        rank.join("nccl" if device.type == "cuda" else "gloo", device if device.type == "cuda" else None)
        holder = Claims(self.state.workspace.claims(self.stage.name)).holder(AMAX) if rank.index == 0 else None
        self.token = broadcast(str((holder or {}).get("token", unique_token())))
        rank.phase("preflight", _PREFLIGHT)
        self._preflight(rank, device)
        with out_of_memory_in_words(rank.index, self.stage.memory):
            rank.phase("load", limits.load)
            wiring = self._load(rank, device)
            rank.phase("batch", limits.batch)
            snapshot = self._measure(rank, wiring, state)
            rank.phase("save", limits.save)
            self._leave(rank, wiring, snapshot)
            if device.type == "cuda":
                peak, need = torch.cuda.max_memory_reserved(device), sum(self.stage.memory.values())
                rank.log.write("memory", stage=self.stage.name, rank=rank.index, peak=peak, planned=need)
            if self.job.calibrate.generate is not None:
                rank.phase("generate", limits.batch)
                self._generate(rank, wiring)
        if rank.index == 0:
            rank.log.write("stage-done", stage=self.stage.name)
        rank.leave()

    def _preflight(self, rank: Rank, device: torch.device) -> None:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        release = self.stage.inputs.release.root / "config.json"
        facts = {
            "dsqjob": __version__,
            **_software(),
            "fingerprint": self.fingerprint,
            "device": name,
            "release": f"{release.stat().st_size} bytes of config.json",
            "workspace": self.stage.inputs.workspace.identity(),
        }
        agree(rank, facts, device)
        refuse_full_device(rank.index, device, self.stage.memory)

    def _load(self, rank: Rank, device: torch.device) -> Wiring:
        job, begun = self.job, time.monotonic()
        module = import_code(job.family, job.inference_dir, self.stage.code)
        length = max(self.batches[0].shape[1], len(self.stage.prompt) + job.calibrate.max_new_tokens)
        args = model_args(module, job.inference_config, batch_size=job.calibrate.batch_size, sequence_length=length)
        model = build_model(module, args, device)

        if job.calibrate.dummy_weights:
            total = make_up(parameters_of(model), args.n_routed_experts, rank.index)
        else:
            plan, folder = self.stage.rank_plan(rank.index)
            with Sources(folder) as sources:
                total = fill(plan, parameters_of(model), sources, tick=lambda _: rank.check())
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = round(time.monotonic() - begun, 3)
        rank.log.write("loaded", stage=self.stage.name, rank=rank.index, bytes=total, seconds=seconds)
        gather(None)  # those that are ready wait here, within the time for loading
        wiring = wiring_class(job.family)
        wiring.register(module)
        return wiring(model, args)

    def _begin(self, rank: Rank, wiring: Wiring, state: RankState) -> Snapshot:
        """The newest snapshot that every rank has."""
        snapshots, why = state.load()
        if why:
            print(f"{state.path} is not used: {why}", file=sys.stderr, flush=True)
            rank.log.write("state-unusable", stage=self.stage.name, rank=rank.index, what=why, where=str(state.path))
        layers, experts = wiring.shape
        mine = {0: empty_snapshot(layers, experts, len(wiring.kinds)), **snapshots}
        return mine[max(set.intersection(*gather(set(mine))))]

    def _measure(self, rank: Rank, wiring: Wiring, state: RankState) -> Snapshot:
        begin, batches, name = self._begin(rank, wiring, state), self.batches, self.stage.name
        log = rank.log
        tokens = sum(batch.numel() for batch in batches)
        if rank.index == 0:
            log.write(
                "stage",
                stage=name,
                units=len(batches),
                bytes=tokens,
                fingerprint=self.fingerprint,
                measure="tokens",
                phase=rank.phase_name,
            )
        begun = time.monotonic()

        def before(number: int) -> None:
            nonlocal begun
            rank.check()
            rank.beat(batch=number)
            begun = time.monotonic()
            if rank.index == 0:
                log.write("unit", stage=name, unit=_batch_id(number), bytes=0)

        def after(now: Snapshot, earlier: Snapshot) -> None:
            state.save(now, earlier, self.token)
            if rank.index == 0:
                seconds = round(time.monotonic() - begun, 3)
                size = batches[earlier.cursor].numel()
                log.write("unit-done", stage=name, unit=_batch_id(earlier.cursor), bytes=size, seconds=seconds)

        return measure(wiring, batches, begin, before=before, after=after)

    def _leave(self, rank: Rank, wiring: Wiring, snapshot: Snapshot) -> None:
        """Rank 0 publishes everything and the record; once, although a later run may come for other reasons."""
        stage, unit = self.stage, self.stage.units[0]
        results = gather(_result(wiring, snapshot))
        if rank.index or self.state.record(unit) is not None:
            return
        begun = time.monotonic()
        history = history_of([one.snapshot for one in results], batch_tokens(self.stage))
        outputs = leave(results, history, stage.folder, self._about(wiring), self.token)
        counts = {"batches": snapshot.cursor, "lines": summary_lines(history, results[0].containers)}
        self.state.write_record(
            unit,
            Done(outputs, counts),
            worker=f"{rank.index}/{rank.size}",
            host=rank.host,
            seconds=time.monotonic() - begun,
            token=self.token,
        )

    def _about(self, wiring: Wiring) -> dict[str, str]:
        device = wiring.device
        return {
            "source": "dsqjob",
            "release": release_digest(self.stage.inputs.release),
            "model_parallel": str(self.stage.n),
            "samples": str(len(self.stage.tokens.ids)),
            "sequence_length": str(self.stage.tokens.ids.shape[1]),
            "batch_size": str(self.job.calibrate.batch_size),
            "tokens": self.stage.tokens.digest,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            **_software(),
            "weights": "made up" if self.job.calibrate.dummy_weights else "release",
        }

    def _generate(self, rank: Rank, wiring: Wiring) -> None:
        def tick(number: int) -> None:
            rank.check()
            rank.beat(token=number)

        count = self.job.calibrate.max_new_tokens
        ids = continue_prompt(wiring.model, self.stage.prompt, count, wiring.device, tick)
        if rank.index == 0:
            self.stage.write_generated(ids)


def _software() -> dict[str, str]:
    """What computes, by version."""
    return {"torch": torch.__version__, "modelopt": version("nvidia-modelopt")}


def _batch_id(number: int) -> str:
    return f"batch-{number}"


def _result(wiring: Wiring, snapshot: Snapshot) -> RankResult:
    """Weight maxima come from the weights; where a quantizer saw them in this process, both must agree."""
    layers, experts = wiring.shape
    amax = np.zeros((layers, experts, len(wiring.kinds)), np.float32)
    for layer, row in enumerate(wiring.experts()):
        for number, (name, expert) in enumerate(row):
            if not snapshot.tokens[layer, number]:
                continue
            derived = expert.weight_amax()
            amax[layer, number] = derived.float().cpu().numpy()
            for value, quantizer in zip(derived, expert.weight_quantizers(), strict=True):
                seen = running_amax(quantizer)
                if seen is None or float(value) != float(seen):
                    raise BugError("weight-amax", f"derived {float(value)}, measured {seen}", where=name)
    names = [[name for name, _ in row] for row in wiring.experts()]
    return RankResult(names, wiring.kinds, snapshot, amax, quantizer_lines(wiring.model))
