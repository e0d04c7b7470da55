"""What the events say: the state of every stage, as a pure function of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

_WINDOW = 60.0
_QUIET = 120.0
_HARMLESS = (69, 75)
"""Exit codes that take nothing from a stage that is done: a peer was lost, or stopped, on the way out."""


@dataclass
class StageSeen:
    """A stage as its workers reported it. Bytes are those of outputs, or whatever ``measure`` says; times are seconds
    since 1970."""

    stage: str
    state: str = "waiting"
    units: int = 0
    units_done: int = 0
    bytes: int = 0
    bytes_done: int = 0
    begun: float = 0.0
    last: float = 0.0
    rate: float = 0.0
    """Bytes (or what is measured) per second over the last minute of work."""
    seconds_left: float | None = None
    workers: list[str] = field(default_factory=list)
    error: str = ""
    measure: str = "bytes"
    phase: str = ""
    """What a gang is at."""
    attempts: int = 0
    """How often it was begun."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def observe(events: Iterable[dict[str, Any]], now: float) -> dict[str, StageSeen]:
    """Stage name -> what was seen of it, from events in any order."""
    by_stage: dict[str, list[dict[str, Any]]] = {}
    for event in sorted(events, key=lambda event: event.get("time", 0)):
        if (stage := event.get("stage")) and "time" in event:
            mine = by_stage.setdefault(stage, [])
            if event["event"] == "restart":
                mine.clear()
            mine.append(event)
    return {stage: _observe_stage(stage, mine, now) for stage, mine in by_stage.items()}


def _observe_stage(stage: str, events: list[dict[str, Any]], now: float) -> StageSeen:
    seen = StageSeen(stage, begun=events[0]["time"], last=events[-1]["time"])
    fingerprint = ""
    done: dict[str, dict[str, Any]] = {}
    moving: dict[str, int] = {}
    last_of: dict[str, dict[str, Any]] = {}
    attempts: set[Any] = set()
    for event in events:
        last_of[f"{event.get('worker')} on {event.get('host')}"] = event
        match event["event"]:
            case "stage":
                if event["fingerprint"] != fingerprint:
                    fingerprint, done, moving = event["fingerprint"], {}, {}
                seen.units, seen.bytes, seen.state, seen.error = event["units"], event["bytes"], "running", ""
                seen.measure, seen.phase = event.get("measure", "bytes"), event.get("phase", "")
            case "gang":
                attempts.add(event.get("attempt"))  # every node says so
                seen.state, seen.error, seen.attempts = "running", "", len(attempts)
            case "again" if seen.state != "done":
                seen.state, seen.error = "starting", event["what"]
            case "phase":
                seen.phase = event["phase"]
            case "unit" | "progress":
                moving[event["unit"]] = event.get("bytes", 0) if event["event"] == "progress" else 0
            case "unit-done":
                done[event["unit"]] = event
                moving.pop(event["unit"], None)
            case "error" if seen.state != "done" or event.get("code") not in _HARMLESS:
                seen.state = "interrupted" if event.get("code") == 75 else "failed"
                seen.error = f"[{event.get('id')}] {event.get('what')}" + (
                    f" ({event['where']})" if event.get("where") else ""
                )
            case "stage-done":
                seen.state, seen.error = "done", ""
    seen.units_done = len(done)
    seen.bytes_done = sum(event.get("bytes", 0) for event in done.values())
    if seen.state in ("starting", "running"):
        at_work = {name: event["event"] for name, event in last_of.items() if _at_work(event, now)}
        seen.workers = sorted(name for name, last in at_work.items() if last != "again")
        seen.state = seen.state if at_work else "quiet"
        seen.bytes_done += sum(moving.values())
        _set_rate(seen, list(done.values()), now)
    return seen


def _at_work(event: dict[str, Any], now: float) -> bool:
    return event["event"] not in ("error", "stage-done", "restart") and now - float(event["time"]) < _QUIET


def _set_rate(seen: StageSeen, done: list[dict[str, Any]], now: float) -> None:
    recent = [event for event in done if now - event["time"] < _WINDOW]
    if recent:
        since = min(event["time"] - event.get("seconds", 0) for event in recent)
        seen.rate = sum(event.get("bytes", 0) for event in recent) / max(now - since, 1e-3)
        seen.seconds_left = max(0.0, (seen.bytes - seen.bytes_done) / seen.rate) if seen.rate else None
