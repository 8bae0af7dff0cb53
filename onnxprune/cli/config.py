"""Settings from a file: ``[tool.onnxprune]`` of pyproject.toml, or onnxprune.toml; the command line wins."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onnxprune.errors import UsageError, argument, nearest
from onnxprune.settings import (
    COMMANDS,
    CONDITIONS,
    Extent,
    Flag,
    Kind,
    Numbers,
    PathTo,
    Patterns,
    PerName,
    Setting,
    Targets,
    Text,
    options_of,
    settings_of,
)

OWN_FILE, PROJECT_FILE = "onnxprune.toml", "pyproject.toml"
_NEVER = ("config", "no_config")
_GATES = ("runs",)
"""Needs of settings that are gates: one that cannot be asked is an error, also where it comes from a file."""


@dataclass(frozen=True, slots=True)
class Configured:
    """Settings of one command from a file.

    Attributes:
        path: the file; None without one.
        values: values by name, as the command line would give them.
        ignored: {name: reason} of settings that have no meaning beside the typed ones.
    """

    path: Path | None = None
    values: Mapping[str, Any] = field(default_factory=dict)
    ignored: Mapping[str, str] = field(default_factory=dict)


def find(folder: Path) -> Path | None:
    """Return the nearest file with settings, from a folder upwards; None where there is none."""
    for place in (folder, *folder.parents):
        if (place / OWN_FILE).is_file():
            return place / OWN_FILE
        in_project = place / PROJECT_FILE
        if in_project.is_file() and _mentions(in_project) and _table(in_project) is not None:
            return in_project
    return None


def configured(command: str, path: Path | None, values: Mapping[str, Any], typed: Iterable[str]) -> Configured:
    """Return the settings of a command that a file adds to the typed ones.

    Args:
        command: its name.
        path: the file; None for none.
        values: of all options.
        typed: names of those that were typed.

    Raises:
        UsageError: the file is no TOML, or has a key that is no setting, or a value that is not allowed.
    """
    if path is None:
        return Configured()
    table = _underscored(_table(path) or {})
    _check_keys(path, table)
    known = {setting.name: setting for setting in options_of(command) if setting.name not in _NEVER}
    of_command = table.get(command)
    raw_values = {name: value for name, value in table.items() if name in known and not _is_table_of(name, value)}
    raw_values |= of_command if isinstance(of_command, Mapping) else {}
    typed_names = set(typed)
    configured_values = {n: _value(known[n], v, path) for n, v in raw_values.items() if n not in typed_names}
    ignored = _outvoted(command, typed_names, configured_values)
    configured_values = {name: value for name, value in configured_values.items() if name not in ignored}
    merged = {**values, **configured_values}
    for name in configured_values:
        need = known[name].needs
        if need is not None and need.of not in _GATES and not CONDITIONS[need.of](merged):
            ignored[name] = need.because
    return Configured(path, {n: v for n, v in configured_values.items() if n not in ignored}, ignored)


def _mentions(path: Path) -> bool:
    """Return whether a project's file speaks of this tool; damage in one that does not is not our concern."""
    try:
        return b"onnxprune" in path.read_bytes()
    except OSError:
        return False


def _table(path: Path) -> Mapping[str, Any] | None:
    """Return the table of settings of a file; None for a project's file without one.

    Raises:
        UsageError: it cannot be read, or is no TOML.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {(error.strerror or str(error)).lower()}") from error
    except ValueError as error:  # also a text that is not UTF-8
        raise UsageError(
            f"{path} is not valid TOML: {error}", hint=f"Correct it, or ignore it with {argument('no_config')}."
        ) from error
    tool = document.get("tool")
    table = tool.get("onnxprune") if isinstance(tool, Mapping) else None
    if table is None:
        return None if path.name == PROJECT_FILE else document
    if not isinstance(table, Mapping):
        raise UsageError(
            f"{path}: tool.onnxprune is not a table", hint="Write [tool.onnxprune] and one setting per line."
        )
    return table


def _underscored(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by their names in Python: in a file they may be spelled as on the command line (round-to)."""
    named = {name.replace("-", "_"): value for name, value in table.items()}
    return {n: _underscored(value) if _is_table_of(n, value) else value for n, value in named.items()}


def _is_table_of(name: str, value: Any) -> bool:
    """Return whether a key holds the settings of a command; some settings are called like commands."""
    return name in COMMANDS and isinstance(value, Mapping)


def _check_keys(path: Path, table: Mapping[str, Any]) -> None:
    """Check every key of every table; raises UsageError with the nearest name."""
    all_names = {setting.name for command in COMMANDS for setting in options_of(command)} - set(_NEVER)
    for name, value in table.items():
        if _is_table_of(name, value):
            names = {setting.name for setting in options_of(name)} - set(_NEVER)
            for key in value:
                if key not in names:
                    raise UsageError(f"{path}: {name} has no setting {key!r}", hint=nearest(key, names))
        elif name not in all_names:
            raise UsageError(f"{path}: there is no setting {name!r}", hint=nearest(name, [*all_names, *COMMANDS]))


def _value(setting: Setting, value: Any, path: Path) -> Any:
    """Return a value as the command line would give it; paths are relative to the file that names them.

    Raises:
        UsageError: it is not allowed; the message names the file.
    """
    kind, name = setting.typed or setting.kind, argument(setting.name)
    try:
        if isinstance(kind, Flag):
            flag = kind.check(value, name)
            return int(flag) if setting.name == "verbose" else flag
        if setting.many:
            return _several(kind, value, name, path.parent)
        return _one(kind, value, name, path.parent)
    except UsageError as error:  # a file has names of settings, not options
        raise UsageError(f"{path}: {error.message}", hint=str(error.hint)) from None


def _one(kind: Kind, value: Any, name: str, folder: Path) -> Any:
    """Return one value, from a text as it is typed or in Python's form."""
    if isinstance(kind, Extent) and isinstance(value, Sequence) and not isinstance(value, str):
        value = "x".join(map(str, value))
    elif isinstance(kind, Numbers) and isinstance(value, Sequence) and not isinstance(value, str):
        value = ",".join(map(str, value))
    elif isinstance(kind, (Extent, Numbers)) and not isinstance(value, str):
        value = str(value)
    if isinstance(kind, (PathTo, Text)) and not isinstance(value, str):
        raise UsageError(f"{name}: {value!r} is not allowed", hint=f"Give {kind.allowed} as a text.")
    if not isinstance(value, str):
        return kind.check(value, name)
    return _placed(kind, kind.parse(value, name), folder)


def _placed(kind: Kind, value: Any, folder: Path) -> Any:
    """Return a path from its file's folder; other values as they are."""
    if isinstance(kind, PathTo):
        return folder / value
    if "FILE" in kind.metavar and isinstance(value, str) and "." in value:  # other words are names
        return str(folder / value)
    return value


def _several(kind: Kind, value: Any, name: str, folder: Path) -> tuple[Any, ...]:
    """Return the values of an option that may be repeated: a list, or a table where they have names."""
    if isinstance(kind, Patterns):
        return tuple(kind.check(value, name))
    if isinstance(kind, Targets):
        return tuple(kind.check(value, name))
    if isinstance(kind, PerName):
        if isinstance(value, Mapping):
            return tuple(kind.parse(f"{key}={_listed(item)}", name) for key, item in value.items())
        return tuple(kind.parse(str(item), name) for item in (value if isinstance(value, list) else [value]))
    return tuple(_one(kind, item, name, folder) for item in (value if isinstance(value, list) else [value]))


def _listed(value: Any) -> str:
    """Return a number, or numbers with commas between them, as they are typed."""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _outvoted(command: str, typed: set[str], values: Mapping[str, Any]) -> dict[str, str]:
    """Return the settings of a file that typed ones overrule: {name: reason}."""
    known = settings_of(command)
    budget = {"target", "max_drop"}
    typed_names = [name for name in typed if name in known]
    by_hand = next((n for n in typed_names if "budget" in known[n].conflicts), "")
    against_plan = next((n for n in typed_names if "plan" in known[n].conflicts), "")
    reasons: dict[str, str] = {}
    for name in values:
        if "plan" in known[name].conflicts and "plan" in typed:
            reasons[name] = f"has no meaning with {argument('plan')}"
        elif "budget" in known[name].conflicts and typed & budget:
            reasons[name] = f"has no meaning with {argument(min(typed & budget))}"
        elif name in budget and by_hand:
            reasons[name] = f"has no meaning with {argument(by_hand)}"
        elif name == "plan" and against_plan:
            reasons[name] = f"has no meaning with {argument(against_plan)}"
    return reasons
