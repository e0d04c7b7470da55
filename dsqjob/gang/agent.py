"""torch's elastic agent in a thread: it joins the nodes and starts this node's ranks.

Its verdict is hardly used: it names the first dead rank only, loses exit codes, and takes long to kill. Its thread
forked the ranks and is kept until they are gone, since PR_SET_PDEATHSIG fires when that thread ends.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import socket
import threading
from collections.abc import Callable
from typing import Any

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from dsqjob.gang.ending import how_it_ended
from dsqjob.gang.node import Node

_MONITOR = 0.25
_CLOSE = 5
_NEVER = 1 << 20
"""Seconds until elastic kills ranks of its own accord: that is for the supervisor, who first looks how they ended."""
_FOREIGN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


class Agent:
    """Starts ``entry(*arguments)`` in every rank of this node, forked from this process."""

    def __init__(self, entry: Callable[..., None], node: Node, timeout: float) -> None:
        self._entry, self._node = entry, node
        self._arguments: tuple[Any, ...] = ()
        self._seconds = max(1, math.ceil(timeout))
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._run, name="elastic", daemon=True)
        self.over = threading.Event()
        self.error: BaseException | None = None

    def start(self, *arguments: Any) -> None:
        """From now on, ranks may appear."""
        self._arguments = arguments
        _prepare_environment()
        self._thread.start()

    def release(self, seconds: float) -> None:
        """Let the thread go, now that its ranks are gone."""
        self._released.set()
        if self._thread.ident is not None:
            self._thread.join(seconds)

    def died(self) -> tuple[int, str] | None:
        """The local rank that elastic saw die first, and how."""
        if not isinstance(self.error, ChildFailedError):
            return None
        failure = self.error.get_first_failure()[1]
        return failure.local_rank, how_it_ended(failure.exitcode)

    def reasons(self) -> str:
        """Why elastic gave up."""
        words, error = [], self.error
        while error is not None:
            words.append(f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}")
            error = error.__cause__
        return "; ".join(words) or "it ended"

    def _run(self) -> None:
        try:
            elastic_launch(self._config(), self._entry)(*self._arguments)
        except BaseException as error:  # told to the thread that waits for us
            self.error = error
        self.over.set()
        self._released.wait()

    def _config(self) -> LaunchConfig:
        return LaunchConfig(
            min_nodes=self._node.nodes,
            max_nodes=self._node.nodes,
            nproc_per_node=self._node.ranks,
            run_id=f"{self._node.job}-{self._node.attempt}",
            role="gang",
            rdzv_endpoint=self._node.rendezvous,
            rdzv_backend="c10d",
            rdzv_configs={
                "is_host": self._node.index == 0,
                "timeout": self._seconds,
                "join_timeout": self._seconds,
                "read_timeout": self._seconds,
                "close_timeout": _CLOSE,
            },
            max_restarts=0,
            monitor_interval=_MONITOR,
            start_method="fork",
            local_addr=_address_towards(*self._node.address),
            logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
            signals_to_handle="SIGHUP",
            **_if_known(shutdown_timeout=_NEVER),
        )


def _if_known(**settings: Any) -> dict[str, Any]:
    """Settings that older releases of torch do not have (2.11 waits its 30 s where 2.13 can be told)."""
    known = {field.name for field in dataclasses.fields(LaunchConfig)}
    return {name: value for name, value in settings.items() if name in known}


def _address_towards(host: str, port: int) -> str:
    """This node's address on the way to ``host``: a name looked up by DNS may be slow, or known to nobody else."""
    family, _, _, _, address = socket.getaddrinfo(host, port or 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


def _prepare_environment() -> None:
    """What an outer launcher says of ranks would confuse ours; looking at GPUs must not initialise CUDA before a
    fork; elastic's loggers print stack traces on normal ends."""
    for name in list(os.environ):
        if name in _FOREIGN or name.startswith(("TORCHELASTIC_", "TORCH_ELASTIC_")):
            del os.environ[name]
    os.environ.pop("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", None)
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("torch.distributed.elastic", "torch.distributed.launcher", "torch.multiprocessing")):
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
