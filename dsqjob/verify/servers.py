"""What will each server do with a checkpoint: load it, refuse it, or serve it wrongly without a word."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from dsqjob.verify import conditions as a
from dsqjob.verify import config_conditions as b
from dsqjob.verify.conditions import Problem
from dsqjob.verify.facts import Facts

SERVERS = ("vllm", "sglang", "trtllm")
LOADS, FAILS, WRONG = "loads", "fails", "silently wrong"
_SHOWN = 20


class Broken(NamedTuple):
    """A condition that does not hold: its id, ``F`` fails to load, ``S`` silently wrong or ``W`` warning, and why."""

    id: str
    severity: str
    what: str


class Verdict(NamedTuple):
    """What a server will do: ``outcome`` is ``loads``, ``fails`` or ``silently wrong``.

    ``drafts`` says what becomes of speculative decoding and changes no outcome; ``needs`` is the oldest server that
    knows the format.
    """

    server: str
    outcome: str
    broken: tuple[Broken, ...]
    drafts: str
    needs: str


class _Condition(NamedTuple):
    """Severities of a condition by server in the order of ``SERVERS``: ``F/S`` by the problem's case, ``-`` none."""

    id: str
    check: Callable[[Facts], Iterator[Problem]]
    severities: tuple[str, str, str]


CONDITIONS = (
    _Condition("A1", a.a1_complete, ("S", "S", "F")),
    _Condition("A2", a.a2_layout, ("F/S", "F", "F")),
    _Condition("A3", a.a3_leftovers, ("S", "W", "S")),
    _Condition("A4", a.a4_values, ("S", "S", "S")),
    _Condition("A5", a.a5_weight_scales_shared, ("S", "W", "F")),
    _Condition("A6", a.a6_input_scales_shared, ("S", "S", "F")),
    _Condition("A7", a.a7_spread, ("W", "W", "W")),
    _Condition("B1", b.b1_base, ("F/S", "F", "F")),
    _Condition("B2", b.b2_experts, ("F/S", "F/S", "-")),
    _Condition("B3", b.b3_mixed, ("-", "F/S", "F")),
    _Condition("B4", b.b4_copies, ("-", "-", "F/W")),
    _Condition("B5", b.b5_no_nested, ("F", "-", "W")),
    _Condition("B6", b.b6_not_ignored, ("-", "S", "-")),
    _Condition("B7", b.b7_no_overlay, ("-", "-", "S")),
    _Condition("E1", a.e1_index, ("W", "S", "W")),
)
"""A7 only warns: a spread costs accuracy, and how much is for an evaluation to say."""

_DRAFTS = {
    ("vllm", "mxfp4"): "silent: reads the MXFP4 drafts as NVFP4; few drafts are accepted, the output stays right",
    ("sglang", "mxfp4"): "ok: wants the drafts MXFP4, as released",
    ("trtllm", "mxfp4"): "broken: gives the drafts the main layers' layout, NVFP4",
    ("vllm", "nvfp4"): "ok",
    ("sglang", "nvfp4"): "broken: wants the drafts MXFP4, as released",
    ("trtllm", "nvfp4"): "ok",
}

_NEEDS = {
    "vllm": "a release with vLLM pull request 42209 (not 0.20.x)",
    "sglang": "a release with SGLang pull request 25820 (33276 too for DSpark)",
    "trtllm": "a release with TensorRT-LLM pull request 16433",
}


def judge(facts: Facts, server: str, tensor_parallel: int | None = None) -> Verdict:
    """What ``server`` will do with a checkpoint. E2 only warns unless ``tensor_parallel`` is named."""
    column = SERVERS.index(server)
    broken: list[Broken] = []
    for condition in CONDITIONS:
        cell = condition.severities[column]
        if cell != "-":
            broken += _limited(condition.id, cell, condition.check(facts))
    broken += _limited("E2", "W" if tensor_parallel is None else "F", a.e2_divisible(facts, tensor_parallel))
    severities = {one.severity for one in broken}
    outcome = FAILS if "F" in severities else WRONG if "S" in severities else LOADS
    kind, census = a.draft_layers(facts)
    drafts = census if kind == "none" else f"{_DRAFTS.get((server, kind), 'not known for this layout')} ({census})"
    return Verdict(server, outcome, tuple(broken), drafts, _NEEDS[server])


def _limited(id: str, cell: str, problems: Iterator[Problem]) -> Iterator[Broken]:
    """A severity for each problem; of many of one severity, the first ones and how many more there are."""
    cases = cell.split("/")
    counts: dict[str, int] = {}
    for problem in problems:
        severity = cases[min(problem.case, len(cases) - 1)]
        counts[severity] = counts.get(severity, 0) + 1
        if counts[severity] <= _SHOWN:
            yield Broken(id, severity, problem.what)
    for severity, count in counts.items():
        if count > _SHOWN:
            yield Broken(id, severity, f"and {count - _SHOWN} more")
