"""A node's part of a gang stage: the claim, the supervisor, the look back. Imports torch; loaded by name."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from dsqjob.engine.claims import STALE_AFTER, Claim, Claims
from dsqjob.engine.events import EventLog
from dsqjob.engine.execute import StopRequest
from dsqjob.engine.stage import GangStage, StageState
from dsqjob.engine.workspace import Workspace
from dsqjob.errors import DsqjobError
from dsqjob.gang.node import Limits, Node, Places
from dsqjob.gang.preflight import probe_storage
from dsqjob.gang.supervisor import supervise
from dsqjob.worker import private_cache

_CACHES = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor", "TILELANG_CACHE_DIR": "tilelang"}
_LEAST_FREE = 64 << 20
"""Bytes that a gang's small files may take."""


def supervise_stage(
    stage: GangStage, workspace: Workspace, index: int, rendezvous: str, attempt: str, log: EventLog, stop: StopRequest
) -> None:
    """Bring the stage to its end together with the other nodes; at once where it is done.

    UsageError ``gang-running`` where another gang holds the stage, and what ``check``, ``begin``, ``supervise`` raise.
    """
    state = StageState(workspace, stage)
    if state.compare() and not state.missing() and not stage.wanted():
        return
    stage.check()
    stop.check()
    _private_caches()
    node = Node(index, stage.nodes, stage.ranks_per_node, rendezvous, attempt, workspace.identity())
    limits = Limits(rendezvous=stage.rendezvous_seconds, silence=stage.silence_seconds)
    places = Places(workspace.gang(stage.name, attempt), workspace.logs / f"{stage.name}-ranks", workspace.events)
    with ExitStack() as held:

        def prepare() -> Callable[[Any], None]:
            places.shared.mkdir(parents=True, exist_ok=True)
            probe_storage(places.shared, _LEAST_FREE)
            if index == 0:
                state.begin()
                probe_storage(stage.folder, _LEAST_FREE)
                held.enter_context(_holding(state, stop))
            return stage.work()

        supervise(prepare, node, limits, places, log=log, stop=stop, stage=stage.name)
    if index:
        return
    state.sweep_all()
    stage.settle()
    try:
        stage.look_back()
    except DsqjobError as error:
        print(f"{error}\n  (the stage itself is done)", file=sys.stderr)


def _private_caches() -> None:
    """What ranks compile lies on this node's own disk, not in a home on a file server."""
    folder = private_cache()
    for variable, name in _CACHES.items() if folder is not None else ():
        os.environ.setdefault(variable, f"{folder}/{name}")


@contextmanager
def _holding(state: StageState, stop: StopRequest) -> Iterator[None]:
    """The stage's claim: no two gangs at once. A holder of another host that is silent is waited for, as it may be
    dead."""
    claims = Claims(state.workspace.claims(state.stage.name))
    with claims.keeping(_take(claims, state, stop)):
        yield


def _take(claims: Claims, state: StageState, stop: StopRequest) -> Claim:
    (unit,) = state.stage.units
    deadline = time.monotonic() + 1.25 * STALE_AFTER
    while (taken := claims.take(unit.id)) is None:
        stop.check()
        holder = claims.holder(unit.id) or {}
        if claims.nearby(holder) or time.monotonic() > deadline:
            raise state.running(holder)
        time.sleep(1)
    claim, dead = taken
    for token in dead:
        state.sweep(unit, token)
    return claim
