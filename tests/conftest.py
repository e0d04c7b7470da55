"""Fixtures that every room uses, and the rule that in CI nothing is left out."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHECKOUT = Path(__file__).parent.parent
CI = os.environ.get("CI") == "true"
GOLDEN = Path(os.environ.get("GOLDEN", CHECKOUT.parent / "shared" / "golden")) / "v4"
WAYS = {
    "strace": "apt-get install strace",
    "root": "run as root, for mounts and namespaces",
    "slurmctld": "make system-packages APT=yes",
    "mariadbd": "make system-packages APT=yes",
}
PLACES = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])

_left_out: dict[str, str] = {}
_weakened: list[str] = []


def _has(what: str) -> bool:
    return os.getuid() == 0 if what == "root" else shutil.which(what, path=PLACES) is not None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without CI, tests whose program or goldens are not here are left out and named; with CI all must run."""
    if CI:
        return
    kept = []
    for item in items:
        missing = [mark.args[0] for mark in item.iter_markers("needs") if not _has(mark.args[0])]
        if missing:
            _left_out[item.nodeid] = f"needs {missing[0]}: {WAYS[missing[0]]}"
        elif "golden" in getattr(item, "fixturenames", ()) and not GOLDEN.is_dir():
            _left_out[item.nodeid] = "needs the golden tensors: set GOLDEN=DIR"
        else:
            kept.append(item)
    items[:] = kept


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped or hasattr(report, "wasxfail"):
        _weakened.append(report.nodeid)


def pytest_deselected(items: list[pytest.Item]) -> None:
    _weakened.extend(item.nodeid for item in items)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """One of several processes that share the tests has ended: what it left out, this one must know."""
    told = getattr(node, "workeroutput", {})
    _left_out.update(told.get("left_out", {}))
    _weakened.extend(name for name in told.get("weakened", ()) if name not in _weakened)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """In CI a skip, an expected failure or a deselection fails the run."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput |= {"left_out": _left_out, "weakened": _weakened}
    elif CI and exitstatus == 0 and (_weakened or _left_out or not session.testscollected):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for title, lines in (
        ("left out on this machine", [f"{name}  ({why})" for name, why in sorted(_left_out.items())]),
        ("not run in full: in CI this fails", _weakened if CI else []),
    ):
        if lines:
            terminalreporter.section(title)
            for line in lines:
                terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def golden() -> Path:
    """Tensors that the vendor's and the reference's own programs made."""
    assert GOLDEN.is_dir(), f"no goldens in {GOLDEN}: set GOLDEN=DIR"
    return GOLDEN


@pytest.fixture(scope="session")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A miniature DeepSeek-V4 release, read-only."""
    from dsqjob.miniature import write

    folder = tmp_path_factory.mktemp("miniature") / "release"
    write("deepseek-v4", folder, seed=1)
    for path in folder.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    folder.chmod(0o555)
    yield folder
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir():
            path.chmod(0o755)


@pytest.fixture(scope="session")
def base_python() -> Path:
    """The interpreter of the environment without torch."""
    return CHECKOUT / ".venv-base" / "bin" / "python"
