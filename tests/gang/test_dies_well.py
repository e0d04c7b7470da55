"""Whatever befalls a rank or a node, the whole gang ends with one exit code, in time, and says who it was."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.gang.gangs import Gang
from tests.waiting import wait_until

Make = Callable[..., Gang]
SOON = 15.0
"""Seconds: a settling, a few looks, an end."""


@pytest.mark.parametrize(("nodes", "ranks", "culprit"), [(1, 2, 1), (2, 1, 0), (2, 2, 2)])
def test_rank_killed_while_loading(gang: Make, nodes: int, ranks: int, culprit: int) -> None:
    """Outside a collective, the others in a barrier."""
    made = gang("load", nodes, ranks, culprit=culprit, as_host=True).start().ready()
    os.kill(made.pid(culprit), signal.SIGKILL)
    for line in made.ends(69, within=SOON):
        assert line.startswith(f"[rank-died] rank {culprit} on host{culprit // ranks} in phase load: "), line
        assert line.endswith("killed by SIGKILL")


def test_rank_killed_inside_a_collective(gang: Make) -> None:
    made = gang("never", 2, 1, culprit=0).start().ready()
    os.kill(made.pid(1), signal.SIGKILL)
    for line in made.ends(69, within=SOON):
        assert line.startswith("[rank-died] rank 1 on "), line
        assert "in phase batch: " in line


def test_rank_killed_while_saving(gang: Make) -> None:
    made = gang("save", 2, 2, culprit=3).start()
    for line in made.ends(69, within=SOON + 10):
        assert line.startswith("[rank-died] rank 3 on "), line
        assert "in phase save: " in line


def test_rank_stopped(gang: Make) -> None:
    """A rank that gives no sign of life."""
    made = gang("load", 2, 1, culprit=1, limits={"silence": 2.0}).start().ready()
    os.kill(made.pid(1), signal.SIGSTOP)
    for line in made.ends(69, within=SOON):
        assert line.startswith("[rank-silent] rank 1 on "), line
        assert "in phase load: no sign of life for" in line


def test_rank_without_a_first_word(gang: Make) -> None:
    """Stopped before it is a rank, as by a broken GPU; or dead before."""
    made = gang("load", 1, 2, wordless=1, limits={"silence": 2.0}).start()
    (line,) = made.ends(69, within=SOON)
    assert line.startswith("[rank-silent] rank 1 on "), line
    made = gang("load", 1, 2, wordless=1).start()
    wait_until(lambda: len(made.supervisors[0].children()) == 2)
    wait_until((made.folder / "pid-0").exists)
    (wordless,) = set(made.supervisors[0].children()) - {made.pid(0)}
    os.kill(wordless, signal.SIGKILL)
    (line,) = made.ends(69, within=SOON)
    assert line.startswith("[rank-died] rank 1 on "), line
    assert line.endswith("killed by SIGKILL")


def test_rank_that_leaves_without_a_word(gang: Make) -> None:
    """Even with exit code 0."""
    (line,) = gang("leave_silently", 1, 1).start().ends(69, within=SOON)
    assert line.startswith("[rank-died] rank 0 on ")
    assert line.endswith("left with exit code 0 and without a word")


def test_rank_hangs(gang: Make) -> None:
    """Past the limit of its phase; its log tells where. Who waits for it in a collective is as late as it is."""
    made = gang("hang", 2, 1, culprit=1, limit=2.0).start().ready()
    for line in made.ends(69, within=SOON):
        assert line.startswith("[phase-timeout] rank "), line
        assert "in phase batch: no progress for 2 s" in line
    assert "do_hang" in made.log(1)
    assert "(batch 3)" in made.supervisors[0].said()


def test_collective_that_never_completes(gang: Make) -> None:
    made = gang("never", 2, 1, culprit=0, limit=2.0).start().ready()
    for line in made.ends(69, within=SOON):
        assert line.startswith("[phase-timeout] rank 1 on "), line


def test_collective_outlives_its_phase(gang: Make) -> None:
    """The group's own timeout follows the phase: where the supervisor sees beats, the collective still ends."""
    made = gang("outlive", 1, 2, culprit=0).start()
    (line,) = made.ends(69, within=SOON)
    assert line.startswith("[collective-failed] rank 1 on "), line
    assert "in phase batch: " in line


def test_supervisor_killed(gang: Make) -> None:
    """Its ranks die with it at once; the other node names it."""
    made = gang("load", 2, 2, as_host=True).start().ready()
    ranks = made.supervisors[0].children()
    assert len(ranks) == 2
    made.signal(0, signal.SIGKILL)
    wait_until(lambda: not made.supervisors[0].processes(), 5)
    (line,) = made.ends(69, within=SOON, nodes=[1])
    assert line.startswith("[node-silent] node 0 (host0) gives no sign of life for"), line
    assert made.supervisors[0].wait() == -signal.SIGKILL


def test_supervisor_stopped(gang: Make) -> None:
    """Its ranks end by themselves, as nobody else would end them; once continued, it ends like the others."""
    made = gang("load", 2, 1, culprit=0, as_host=True, limits={"silence": 2.0}).start().ready()
    made.signal(0, signal.SIGSTOP)
    (line,) = made.ends(69, within=SOON, nodes=[1])
    assert line.startswith("[node-silent] node 0 (host0) "), line
    wait_until(lambda: made.supervisors[0].processes() == [made.supervisors[0].pid], 5)
    made.signal(0, signal.SIGCONT)
    made.ends(69, within=SOON)


def test_node_never_arrives(gang: Make) -> None:
    made = gang("load", 3, 1, limits={"rendezvous": 2.0}).start([0, 2])
    for line in made.ends(69, within=SOON):
        assert line.startswith("[node-missing] node 1 did not arrive within 2 s (here: node "), line


def test_host_of_the_rendezvous_is_unknown(gang: Make) -> None:
    """Each node says so at once, and not when its patience is over."""
    made = gang("sum", 2, 1)
    made.node["rendezvous"] = "no-such-host.invalid:29500"
    for line in made.start().ends(69, within=SOON):
        assert line.startswith("[rendezvous-host] ") and "cannot look up no-such-host.invalid" in line, line


def test_port_taken(gang: Make) -> None:
    """The rendezvous cannot be opened on node 0."""
    with socket.socket() as squatter:
        squatter.bind(("127.0.0.1", 0))
        made = gang("sum", 2, 1, port=squatter.getsockname()[1]).start()
        for line in made.ends(69, within=SOON):
            assert line.startswith("[rendezvous-failed] node 0 ("), line


@pytest.mark.parametrize(("what", "code", "first"), [("bad_data", 65, "[tensor-missing]"), ("bug", 70, "[bug]")])
def test_rank_raises(gang: Make, what: str, code: int, first: str) -> None:
    """While the others sit in a collective: its code and words everywhere."""
    made = gang(what, 2, 2, culprit=1).start()
    for line in made.ends(code, within=SOON + 10):
        assert line.startswith(f"{first} rank 1 on "), line
        assert "in phase load: " in line
    if what == "bug":
        assert "Traceback" in made.log(1)
        assert "ZeroDivisionError: so it is" in made.log(1)
        assert "Traceback" not in made.supervisors[0].said()
    else:
        assert "where: a file" in made.supervisors[1].said()


def test_facts_that_differ(gang: Make) -> None:
    made = gang("disagree", 2, 1, culprit=1, as_host=True).start()
    for line in made.ends(64, within=SOON + 10):
        assert line.startswith("[gang-disagrees] rank "), line
        assert line.endswith("modelopt is '1' on host0 (rank 0) and '2' on host1 (rank 1)"), line


def test_no_room_on_one_node(gang: Make, tmp_path: Path) -> None:
    """The probe fails on node 1 only, before any rank; node 0 comes later and hears of it."""
    made = gang("sum", 2, 1, culprit=1, probe=str(tmp_path), need=1 << 60)
    made.start([1, 0], pause=1.5)
    for line in made.ends(74, within=SOON):
        assert line.startswith("[storage-full] "), line
        assert "bytes and" in line


def test_elastic_logs_nothing(gang: Make) -> None:
    """The supervisor's log holds only words that help."""
    made = gang("load", 2, 1).start().ready()
    os.kill(made.pid(0), signal.SIGKILL)
    made.ends(69, within=SOON)
    for supervisor in made.supervisors.values():
        first, *more = supervisor.said().splitlines()
        assert first.startswith("[rank-died] ")
        assert [line.split(":")[0].strip() for line in more] == ["where", "way out"], more


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "small"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], check=True)
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.needs("root")
def test_full_disk(gang: Make, small_disk: Path) -> None:
    """A last word fits on a shared disk that has become full."""
    made = gang("load", 2, 1, culprit=1, shared=str(small_disk)).start().ready()
    with suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))
    os.kill(made.pid(1), signal.SIGKILL)
    for line in made.ends(69, within=made.limits["silence"] + 4):
        assert line.startswith("[rank-died] rank 1 on "), line
