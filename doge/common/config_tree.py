"""Configuration trees: frozen dataclasses read from YAML and dictionaries, with a command-line option for every leaf.

The dataclasses are defined next to the code that they configure.
"""

import dataclasses
import difflib
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import tyro
import yaml

from doge.common.errors import UserError

T = TypeVar("T")

_MERGE = "tag:yaml.org,2002:merge"


def read_yaml(cls: type[T], path: str | Path) -> T:
    """Read a YAML file into the dataclass tree ``cls``; keys that are missing keep their defaults.

    A file with ``base: other.yaml`` changes, key by key, the values of that file in the same directory. ``null``
    removes a mapping of the base: ``data: {sources: {python-edu: null}}`` leaves that source out.

    Raises:
        UserError: The file cannot be read or is not a YAML mapping, it is among its own bases, a key stands twice or is
            unknown (the message names the nearest), or a type is wrong.
    """
    return from_dict(cls, _read_values(Path(path)), where=str(path))


def _read_values(path: Path, children: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The values of a file merged into those of its base; ``children`` are the files that this one is a base of."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"There is no file {path}.") from None
    except OSError as error:
        raise UserError(f"The file {path} cannot be read ({error.strerror}): give a YAML file.") from None
    except UnicodeDecodeError:
        raise UserError(f"The file {path} is not UTF-8 text: give a YAML file.") from None
    values = parse_yaml(text, str(path))
    if "base" not in values:
        return values
    base, chain = values.pop("base"), (*children, path.resolve())
    if not isinstance(base, str):
        raise UserError(f"In {path}, base = {base!r} must be the name of a YAML file.")
    if (path.parent / base).resolve() in chain:
        raise UserError(f"In {path}, base: {base} leads back to a file whose base this one is: remove the line.")
    merged: dict[str, Any] = _merged(_read_values(path.parent / base, chain), values)
    return merged


def parse_yaml(text: str, where: str) -> dict[str, Any]:
    """The keys and values of a YAML text that comes from ``where``.

    Raises UserError if it is not valid, holds something else, or has a key twice.
    """
    try:
        loader = yaml.SafeLoader(text)  # refuses control characters
        node = loader.get_single_node()
        _refuse_doubled_keys(node, (), where, set())
        values: Any = loader.construct_document(node) if node is not None else {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(values or {}, dict):
        raise UserError(f"{where} must hold keys and values, not {values!r}.")
    return values or {}


def _refuse_doubled_keys(node: Any, path: tuple[str, ...], where: str, seen: set[int]) -> None:
    """Raise UserError if a mapping has a key of its own twice; those that ``<<`` merges into it may be there too."""
    if id(node) in seen:  # an alias
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for at, item in enumerate(node.value):
            _refuse_doubled_keys(item, (*path, str(at)), where, seen)
    if not isinstance(node, yaml.MappingNode):
        return
    lines: dict[tuple[str, str], int] = {}
    for key, value in node.value:
        if isinstance(key, yaml.ScalarNode):
            line, known = key.start_mark.line + 1, (key.tag, key.value)
            if known in lines and key.tag != _MERGE:
                name = ".".join((*path, key.value))
                raise UserError(
                    f"In {where}, the key {name} stands twice, in lines {lines[known]} and {line}: keep one of them."
                )
            lines[known] = line
        _refuse_doubled_keys(value, (*path, str(key.value)), where, seen)


def _merged(base: Any, changes: Any) -> Any:
    """``base`` with ``changes``; ``null`` in the changes removes a mapping of the base."""
    if not isinstance(base, dict) or not isinstance(changes, dict):
        return changes
    dropped = {key for key, value in changes.items() if value is None and isinstance(base.get(key), dict)}
    merged = base | {key: _merged(base.get(key), value) for key, value in changes.items()}
    return {key: value for key, value in merged.items() if key not in dropped}


def from_dict(cls: type[T], values: dict[str, Any], where: str = "the configuration") -> T:
    """Build the dataclass tree ``cls`` from nested dictionaries that come from ``where``.

    Raises UserError, naming the key, if a key is unknown or a value has the wrong type.
    """
    _refuse_unknown_keys(cls, values, (), where)
    _refuse_truth_values(cls, values, (), where)
    try:
        return pydantic.TypeAdapter(cls).validate_python(values)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if isinstance(cause := first.get("ctx", {}).get("error"), UserError):
            raise cause from None
        raise UserError(f"In {where}, {key} = {first['input']!r} is invalid: {first['msg']}.") from None


def to_dict(tree: Any) -> dict[str, Any]:
    """Convert a tree to nested dictionaries of JSON values, from which ``from_dict`` builds an equal tree."""
    values: dict[str, Any] = pydantic.TypeAdapter(type(tree)).dump_python(tree, mode="json")
    return values


def to_yaml(tree: Any) -> str:
    """Convert a tree to YAML text that ``read_yaml`` reads."""
    text: str = yaml.safe_dump(to_dict(tree), sort_keys=False)
    return text


def flatten(tree: Any) -> dict[str, Any]:
    """A tree's leaves by dotted key, such as ``{"optimizer.lr": 0.008}``; equal trees give equal dictionaries."""
    return dict(_leaves(to_dict(tree), ""))


def parse(command: type[T], default: T, arguments: Sequence[str], description: str, usage: str = "") -> T:
    """Parse a command line into the dataclass tree ``command``. Exits with status 0 after ``--help``.

    Args:
        command: The dataclass.
        default: The values of options that are not given.
        arguments: The command line without the program's name.
        description: First paragraph of the help.
        usage: How the command is called; by default, ``python`` with the file that runs.

    Raises:
        UserError: An option is unknown; the message names the nearest.
    """
    parsed, unknown = tyro.cli(
        command,
        default=default,
        args=list(arguments),
        description=description,
        prog=usage or f"python {Path(sys.argv[0]).parent.name}/{Path(sys.argv[0]).name}",
        return_unknown_args=True,
    )
    if unknown:
        options = ["--" + key.replace("_", "-") for key in _option_names(default)]
        typed = unknown[0].split("=")[0].replace("_", "-")
        raise UserError(f"There is no option {unknown[0]}{_nearest(typed, options)}.")
    return parsed


def _option_names(default: Any) -> Iterator[str]:
    for field in dataclasses.fields(default):
        value = getattr(default, field.name)
        if dataclasses.is_dataclass(value):
            yield from flatten(value)
        else:
            yield field.name.rstrip("_")


def _leaves(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _refuse_unknown_keys(cls: Any, values: Any, path: tuple[str, ...], where: str) -> None:
    if typing.get_origin(cls) is dict and isinstance(values, dict):
        for key, value in values.items():
            _refuse_unknown_keys(typing.get_args(cls)[1], value, (*path, str(key)), where)
    if not dataclasses.is_dataclass(cls):
        return
    if not isinstance(values, dict):
        name = f"In {where}, {'.'.join(path)}" if path else where
        raise UserError(f"{name} must hold keys and values, not {values!r}.")
    hints = typing.get_type_hints(cls)
    for key, value in values.items():
        if key not in hints:
            full = ".".join((*path, str(key)))
            known = [".".join((*path, name)) for name in hints]
            raise UserError(f"In {where}, there is no key {full}{_nearest(full, known)}.")
        _refuse_unknown_keys(hints[key], value, (*path, key), where)


def _refuse_truth_values(hint: Any, value: Any, path: tuple[str, ...], where: str) -> None:
    """Raise UserError where a number belongs and ``true`` or ``false`` stands, which Python takes for 1 and 0."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    accepted = typing.get_args(hint) if union else (hint,)
    if isinstance(value, bool):
        if bool not in accepted and not {int, float}.isdisjoint(accepted):
            raise UserError(f"In {where}, {'.'.join(path)} must be a number, not {str(value).lower()}.")
        return
    for accept in accepted:
        if isinstance(value, dict):
            hints = typing.get_type_hints(accept) if dataclasses.is_dataclass(accept) else {}
            inside = [(hints.get(key, _last(accept)), key, below) for key, below in value.items()]
        elif isinstance(value, (list, tuple)):
            inside = [(_last(accept), at, below) for at, below in enumerate(value)]
        else:
            return
        for below_hint, key, below in inside:
            _refuse_truth_values(below_hint, below, (*path, str(key)), where)


def _last(hint: Any) -> Any:
    """The type of a container's values: of ``dict[str, float]`` and ``tuple[float, float]``, float."""
    arguments = [argument for argument in typing.get_args(hint) if argument is not Ellipsis]
    return arguments[-1] if arguments else Any


def _nearest(name: str, known: Sequence[str]) -> str:
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return f"; the nearest is {matches[0]}" if matches else ""
