"""A job file becomes a Job: YAML, ``--set``, environment, derived paths, then validation with errors in words."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsqjob.errors import UsageError
from dsqjob.job.yaml12 import parse

if TYPE_CHECKING:
    from pydantic import BaseModel

    from dsqjob.job.schema import Job

_MANUAL = "`dsqjob schema` explains every field"
_DERIVED: tuple[tuple[str, str, str], ...] = (
    ("inference_dir", "release", "inference"),
    ("inference_config", "inference_dir", "config.json"),
    ("convert.output", "workspace", "mp"),
    ("tokens.output", "workspace", "tokens"),
    ("calibrate.output", "workspace", "amax"),
    ("calibrate.mp_checkpoint", "convert.output", ""),
    ("export.amax", "calibrate.output", ""),
    ("slurm.logs", "workspace", "logs/slurm"),
)


def shipped() -> list[str]:
    """Names of the job files that come with dsqjob."""
    folder = resources.files("dsqjob").joinpath("jobs")
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load(
    name: str,
    *,
    sets: Sequence[str] = (),
    environment: Mapping[str, str],
    families: Sequence[str],
    launchers: Sequence[str],
) -> Job:
    """The job of a file, or of a shipped one by name; every derived path filled in, all paths absolute.

    Raises UsageError: ``job-missing``, ``job-yaml``, ``job-doubled-key``, ``job-unknown-key``, ``job-invalid``,
    ``variable-missing``, ``set-syntax``, ``family-unknown``, ``launcher-unknown``.
    """
    from pydantic import ValidationError

    from dsqjob.job.schema import Job

    raw, place = _read(name, sets, environment, known=lambda given, file: _refuse_unknown(given, Job, file, ""))
    said, profile = _said(name, sets), raw.get("profile")
    _derive(raw, place)
    _choose(raw.get("family"), families, "family-unknown", "family", place)
    launcher = raw.get("launcher")
    if isinstance(launcher, dict) and "kind" in launcher:
        _choose(launcher["kind"], launchers, "launcher-unknown", "launcher.kind", place)
    try:
        return Job.model_validate(raw)
    except ValidationError as error:
        problems = [_problem(problem) for problem in error.errors(include_url=False)]
        field = problems[0][0]
        file = profile if profile and _get(said, field) is None and _get(raw, field) is not None else place
        raise UsageError(
            "job-invalid", "; ".join(text for _, text in problems), where=f"{file}: {field}", way_out=_MANUAL
        ) from None


def workspace_of(name: str, *, sets: Sequence[str] = (), environment: Mapping[str, str]) -> Path:
    """The job's workspace, without validating anything else; a folder is a workspace itself."""
    if Path(name).is_dir():
        if not (Path(name) / "state").is_dir():
            raise UsageError(
                "workspace-missing",
                "this folder is no workspace: it holds no state",
                where=name,
                way_out="name the job file, or the folder that it calls `workspace`",
            )
        return Path(name).absolute()
    raw, place = _read(name, sets, environment, only="workspace")
    value = raw.get("workspace")
    if not isinstance(value, str):
        raise UsageError("job-invalid", "workspace: must be a path", where=f"{place}: workspace", way_out=_MANUAL)
    return _absolute(value, place)


def _said(name: str, sets: Sequence[str]) -> dict[str, Any]:
    """What the job file and the overrides say themselves."""
    text, place = _text(name)
    raw = parse(text, str(place))
    if not isinstance(raw, dict):
        raise UsageError("job-yaml", "a job file is a mapping of fields", where=place, way_out=_MANUAL)
    for item in sets:
        _set(raw, item)
    return raw


def _read(
    name: str,
    sets: Sequence[str],
    environment: Mapping[str, str],
    only: str | None = None,
    known: Callable[[Any, Path], None] | None = None,
) -> tuple[dict[str, Any], Path]:
    """The fields of job file, overrides and profile; ``known`` refuses those of one file that no field has."""
    place, raw = _text(name)[1], _said(name, sets)
    if known is not None:
        known(raw, place)
    raw = _under_profile(raw, environment, place, known)
    if only is not None:
        raw = {only: raw.get(only)}
    return _expand(raw, environment, place, ""), place


def _under_profile(
    raw: dict[str, Any], environment: Mapping[str, str], place: Path, known: Callable[[Any, Path], None] | None
) -> dict[str, Any]:
    """The job's fields over those of its profile, section by section; lists and values are replaced whole.

    UsageError ``profile-missing`` where the file cannot be read, ``job-yaml`` where it is no mapping.
    """
    named = _expand(raw.get("profile"), environment, place, "profile")
    if not isinstance(named, str) or not named:
        return {key: value for key, value in raw.items() if key != "profile"}
    path = _absolute(named, place)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UsageError(
            "profile-missing", f"the site profile cannot be read: {reason}", where=path, way_out="name a readable file"
        ) from None
    below = parse(text, str(path))
    if not isinstance(below, dict) or "profile" in below:
        raise UsageError("job-yaml", "a profile is a mapping of fields, without `profile`", where=path, way_out=_MANUAL)
    if known is not None:
        known(below, path)
    return _over(below, {**raw, "profile": str(path)})


def _over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        inner = merged.get(key)
        merged[key] = _over(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged


def _text(name: str) -> tuple[str, Path]:
    path = Path(name)
    if "/" not in name and not name.endswith((".yaml", ".yml")) and not path.exists():
        if name not in shipped():
            raise UsageError(
                "job-missing",
                f"no file and no shipped job of this name; shipped: {', '.join(shipped())}",
                where=name,
                way_out=_nearest(name, shipped()) or "name a job file",
            )
        place = Path(str(resources.files("dsqjob").joinpath("jobs", f"{name}.yaml")))
        return place.read_text(), place
    try:
        return path.read_text(encoding="utf-8"), path.absolute()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UsageError(
            "job-missing", f"the job file cannot be read: {reason}", where=path, way_out="name a readable job file"
        ) from None


def _set(raw: dict[str, Any], item: str) -> None:
    path, equals, text = item.partition("=")
    if not equals or not path:
        raise UsageError(
            "set-syntax", f"{item!r} is not key=value", where="--set", way_out="write --set export.weights=cast"
        )
    *parents, last = path.split(".")
    place = raw
    for parent in parents:
        inner = place.setdefault(parent, {})
        if inner is None:
            inner = place[parent] = {}
        if not isinstance(inner, dict):
            raise UsageError("set-syntax", f"{parent} holds no fields", where=f"--set {item}", way_out=_MANUAL)
        place = inner
    place[last] = parse(text, f"--set {item}")


_VARIABLE = re.compile(r"\$(?:(\$)|\{([A-Za-z_][A-Za-z0-9_]*)(:-)?)")


def _expand(value: Any, environment: Mapping[str, str], place: Path, field: str) -> Any:
    """``${VAR}`` and ``${VAR:-default}`` in every string; a whole scalar keeps YAML's types (``${MP:-8}`` is 8)."""
    if isinstance(value, dict):
        return {
            key: _expand(inner, environment, place, f"{field}.{key}" if field else str(key))
            for key, inner in value.items()
        }
    if isinstance(value, list):
        return [_expand(inner, environment, place, f"{field}[{n}]") for n, inner in enumerate(value)]
    if not isinstance(value, str) or "$" not in value:
        return value
    text, _ = _fill(value, 0, environment, f"{place}: {field}", nested=False)
    whole = value.startswith("${") and value.endswith("}")
    return parse(text, field) if whole and re.fullmatch(r"[-+]?\d+|true|false", text) else text


def _fill(text: str, at: int, environment: Mapping[str, str], where: str, *, nested: bool) -> tuple[str, int]:
    """Text from ``at`` with variables filled in, up to the closing brace if ``nested``; where it ended."""
    found: list[str] = []
    while at < len(text):
        if nested and text[at] == "}":
            return "".join(found), at + 1
        match = _VARIABLE.match(text, at)
        if match is None:
            if text.startswith("${", at):
                break
            found.append(text[at])
            at += 1
        elif match[1]:
            found.append("$")
            at = match.end()
        else:
            piece, at = _variable(text, match, environment, where)
            found.append(piece)
    if nested or at < len(text):
        raise UsageError(
            "variable-syntax",
            f"{text!r} is not ${{NAME}} or ${{NAME:-default}}",
            where=where,
            way_out="write $$ for a dollar",
        )
    return "".join(found), at


def _variable(text: str, match: re.Match[str], environment: Mapping[str, str], where: str) -> tuple[str, int]:
    name, end = match[2], match.end()
    known = environment.get(name)
    if match[3]:
        if known:
            end = _fill(text, end, _Anything(), where, nested=True)[1]
            return known, end
        return _fill(text, end, environment, where, nested=True)
    if not text.startswith("}", end):
        raise UsageError(
            "variable-syntax",
            f"{text!r} is not ${{NAME}} or ${{NAME:-default}}",
            where=where,
            way_out="close the brace",
        )
    if known is None:
        raise UsageError(
            "variable-missing", f"the environment variable {name} is not set", where=where, way_out=f"export {name}=..."
        )
    return known, end + 1


class _Anything(Mapping[str, str]):
    """An environment for a default that is not used."""

    def __getitem__(self, key: str) -> str:
        return "unused"

    def __iter__(self) -> Any:
        return iter(())

    def __len__(self) -> int:
        return 0


def _refuse_unknown(raw: Any, model: type[BaseModel], place: Path, prefix: str) -> None:
    """UsageError ``job-unknown-key`` for a key that no field has, with the nearest one."""
    if not isinstance(raw, dict):
        return
    for key, value in raw.items():
        path = f"{prefix}{key}"
        if key not in model.model_fields:
            raise UsageError(
                "job-unknown-key",
                f"there is no field {path}",
                where=f"{place}: {path}",
                way_out=_nearest(str(key), model.model_fields) or f"fields here: {', '.join(model.model_fields)}",
            )
        for inner in _models(model.model_fields[key].annotation):
            for item in value if isinstance(value, list) else [value]:
                _refuse_unknown(item, inner, place, f"{path}.")


def _models(annotation: Any) -> Iterable[type[BaseModel]]:
    from pydantic import BaseModel

    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in getattr(annotation, "__args__", ()):
        yield from _models(inner)


def _derive(raw: dict[str, Any], place: Path) -> None:
    """Fill in derived paths and make all of them absolute."""
    for path in ("release", "workspace", "export.output"):
        _update(raw, path, lambda value: str(_absolute(value, place)) if isinstance(value, str) and value else value)
    for path, base, tail in _DERIVED:
        origin = _get(raw, base)
        if not _get(raw, path) and isinstance(origin, str) and origin:
            _put(raw, path, str(Path(origin, tail)))
        else:
            _update(raw, path, lambda value: str(_absolute(value, place)) if isinstance(value, str) else value)
    tokens = raw.get("tokens")
    data = tokens.get("data") if isinstance(tokens, dict) else None
    for item in data if isinstance(data, list) else []:
        for kind in ("jsonl", "tokens"):
            if isinstance(item, dict) and isinstance(item.get(kind), str):
                item[kind] = str(_absolute(item[kind], place))


def _absolute(value: str, place: Path) -> Path:
    """Relative paths count from the job file's folder; those of a shipped job from the current one."""
    shipped_jobs = Path(str(resources.files("dsqjob").joinpath("jobs")))
    base = Path.cwd() if place.parent == shipped_jobs else place.parent
    try:
        path = Path(value).expanduser()
        return path if path.is_absolute() else (base / path).resolve(strict=False)
    except (ValueError, RuntimeError, OSError) as error:
        raise UsageError("job-invalid", f"not a path: {error}", where=f"{place}: {value!r}", way_out=_MANUAL) from None


def _get(raw: Any, path: str) -> Any:
    for part in path.split("."):
        raw = raw.get(part) if isinstance(raw, dict) else None
    return raw


def _put(raw: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for parent in parents:
        if raw.get(parent) is None:
            raw[parent] = {}
        if not isinstance(raw[parent], dict):
            return
        raw = raw[parent]
    raw[last] = value


def _update(raw: dict[str, Any], path: str, change: Callable[[Any], Any]) -> None:
    if (value := _get(raw, path)) is not None:
        _put(raw, path, change(value))


def _choose(value: Any, valid: Sequence[str], id: str, field: str, place: Path) -> None:
    if value is not None and value not in valid:
        raise UsageError(
            id,
            f"{value!r} is not known; valid: {', '.join(valid)}",
            where=f"{place}: {field}",
            way_out=_nearest(str(value), valid) or f"set {field} to one of them",
        )


def _nearest(name: str, valid: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(valid), 1, 0.5)
    return f"did you mean {close[0]}?" if close else ""


def _problem(problem: Any) -> tuple[str, str]:
    field = ".".join(str(part) for part in problem["loc"]) or "job"
    reason = problem["msg"].removeprefix("Value error, ")
    return field, f"{field}: {reason[0].lower()}{reason[1:]}" + (
        "" if problem["type"] == "missing" else f" (is {problem['input']!r})"
    )
