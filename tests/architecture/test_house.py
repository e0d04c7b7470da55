"""The house stays in order: sizes, names, paths, error ids."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

CHECKOUT = Path(__file__).parent.parent.parent
PACKAGE = CHECKOUT / "dsqjob"
ERRORS = {"UsageError", "DataError", "PeerError", "BugError", "StorageError", "Interrupted", "FormatError", "_bad"}
ID = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


def modules() -> list[Path]:
    return [path for path in PACKAGE.rglob("*.py") if "deepseek_v4_inference" not in path.parts]


def tracked() -> list[Path]:
    names = subprocess.run(["git", "ls-files"], cwd=CHECKOUT, capture_output=True, text=True, check=True).stdout
    return [CHECKOUT / name for name in names.splitlines() if (CHECKOUT / name).is_file()]


def test_files_and_functions_stay_small() -> None:
    long_files = [path.name for path in modules() if len(path.read_text().splitlines()) > 400]
    long_functions = [
        f"{path.name}:{node.name}"
        for path in modules()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno > 60
    ]
    assert (long_files, long_functions) == ([], [])


def test_no_name_that_explains_nothing() -> None:
    bad = {"utils", "util", "helpers", "helper", "common", "manager", "misc"}
    assert [path for path in tracked() if path.stem in bad or path.parent.name in bad] == []


def test_no_machines_path_and_no_registry_in_the_project() -> None:
    path = re.compile(r"(?<![\w.$}])/" + r"(work|root|home/[a-z]+)/(?!mp\b)")
    hosts = re.compile("py" + r"pi\.org|files\.python" + r"hosted|registry\.n" + r"pmjs|deb\.deb" + "ian")
    found = []
    for file in tracked():
        if file.suffix in {".py", ".md", ".toml", ".yaml", ".yml", ".txt", ""}:
            for number, line in enumerate(file.read_text(errors="replace").splitlines(), 1):
                if (path.search(line) and file.suffix in {".md", ".toml", ".yaml", ".yml", ""}) or hosts.search(line):
                    found.append(f"{file.name}:{number}")
    assert found == []


def error_ids() -> Iterator[str]:
    """Constant ids given to errors: the first argument that is a string without spaces."""
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
                for argument in node.args[:2] if name in ERRORS else []:
                    for leaf in (argument.body, argument.orelse) if isinstance(argument, ast.IfExp) else (argument,):
                        if isinstance(leaf, ast.Constant) and isinstance(leaf.value, str) and ID.fullmatch(leaf.value):
                            yield leaf.value


def test_every_error_id_is_in_the_design() -> None:
    table = (PACKAGE / "DESIGN.md").read_text().partition("## Error ids")[2]
    listed = set(re.findall(r"`([a-z0-9-]+)`", table))
    assert set(error_ids()) - listed == set()


def test_what_acceptance_names_is_there() -> None:
    named = set(re.findall(r"\btest_\w+", (CHECKOUT / "tests" / "ACCEPTANCE.md").read_text()))
    files = list((CHECKOUT / "tests").rglob("test_*.py"))
    have = {path.stem for path in files}
    have |= {name for path in files for name in re.findall(r"def (test_\w+)", path.read_text())}
    assert named - have == set()


def test_every_test_can_be_collected_in_one_room() -> None:
    """`make test` names its rooms; a room that it does not name would never run."""
    makefile = (CHECKOUT / "Makefile").read_text()
    rooms = {path.parent.relative_to(CHECKOUT).parts[1] for path in (CHECKOUT / "tests").rglob("test_*.py")}
    assert {room for room in rooms if f"tests/{room}" not in makefile} == set()
