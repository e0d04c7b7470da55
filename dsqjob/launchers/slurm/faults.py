"""How often a fault stopped a stage's jobs, and on which nodes: a file a fault, so that nobody is overwritten."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence

from dsqjob.engine.publish import publish_json
from dsqjob.engine.workspace import Workspace, unique_token

_TOO_OFTEN = 2


class Faults:
    """The faults of a stage since it was submitted or last ended well."""

    def __init__(self, workspace: Workspace, stage: str) -> None:
        self._folder = workspace.stage(stage) / "faults"

    def add(self, attempt: str, nodes: Sequence[str]) -> None:
        """Write a fault down, once an attempt."""
        self._folder.mkdir(parents=True, exist_ok=True)
        publish_json(self._folder / f"{attempt}.json", {"nodes": list(nodes)}, unique_token())

    @property
    def count(self) -> int:
        return len(self._all())

    @property
    def bad_nodes(self) -> list[str]:
        """Nodes with two faults or more."""
        seen = Counter(node for nodes in self._all() for node in nodes)
        return sorted(node for node, times in seen.items() if times >= _TOO_OFTEN)

    def forget(self) -> None:
        for path in self._folder.glob("*.json"):
            path.unlink(missing_ok=True)

    def _all(self) -> list[list[str]]:
        found = []
        for path in sorted(self._folder.glob("*.json")):
            try:
                found.append([str(node) for node in json.loads(path.read_bytes())["nodes"]])
            except (OSError, ValueError, KeyError, TypeError):
                found.append([])
        return found
