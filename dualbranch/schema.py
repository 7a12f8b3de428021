"""Configs: frozen dataclasses are the schema, a YAML file says only what differs, and every mistake names its path.

`load_yaml` serves `train.py` and `infer.py`; `from_dict` and `to_dict` serve checkpoints (`config.json`). Nothing here knows
a particular config. The YAML read is 1.2 in spirit: `on`, `off`, `yes`, `no` and dates are strings, `3e-4` is a float,
a key given twice is an error.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import os
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

from dualbranch.whole_file import whole_file

T = TypeVar("T")

BASE_KEY = "base"
"""Top-level key naming another YAML file to start from, relative to the file that holds it."""


class ConfigError(ValueError):
    """A config that can't be used: one line saying where, what was got and what is needed.

    `path` is the dotted path of the setting at fault, "" if the whole file is.
    """

    def __init__(self, message: str, path: str = ""):
        super().__init__(message)
        self.path = path


def load_yaml(
    path: str | os.PathLike, cls: type[T], overrides: Sequence[str] = (), complete: Callable[[dict[str, Any]], dict[str, Any]] | None = None
) -> T:
    """The config of type `cls` in the YAML file at `path`, with `overrides` like `"gate.budget=0.2"` applied last.

    A top-level `base: other.yaml` starts from that file (which may have a base itself); mappings merge key by key,
    anything else is replaced. Override values are parsed as YAML. An empty file means all defaults. `complete` may add to what the file and
    the overrides say, before it becomes a config.

    Raises ConfigError for a missing or unreadable file, a syntax error (with its line), an unknown key (with the nearest
    valid one), a wrong type, a missing value, and whatever ValueError a dataclass's `__post_init__` raises.
    """
    path = Path(path)
    values = _read_with_base(path, ())
    set_by_override: dict[str, str] = {}
    for override in overrides:
        set_by_override[_apply_override(values, override)] = override
    try:
        return from_dict(cls, values if complete is None else complete(values))
    except ConfigError as error:
        for key, override in set_by_override.items():
            if key == error.path or key.startswith(error.path + ".") or error.path.startswith((key + ".", key + "[")):
                raise ConfigError(f"--set {override}: {error}", error.path) from error
        raise ConfigError(f"{path}: {error}", error.path) from error


def override(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of nested `values` with overrides like `"gate.budget=0.2"` applied. Raises ConfigError for a malformed one."""
    changed = copy.deepcopy(dict(values))
    for one in overrides:
        _apply_override(changed, one)
    return changed


def from_dict(cls: type[T], values: Mapping[str, Any]) -> T:
    """An instance of dataclass `cls` from nested mappings, as `to_dict`, YAML or JSON give them.

    Understood types: nested dataclasses, bool, int, float (an int or a str like "3e-4" will do), str, Path, Any, None,
    Optional and other unions, Literal, tuple, list, dict. A bool is never an int. Raises ConfigError.
    """
    return _Converter(cls).convert(values, cls, "")


def to_dict(obj: Any) -> Any:
    """`obj` with dataclasses as dicts, tuples as lists and paths as str: `from_dict(type(obj), to_dict(obj)) == obj`."""
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        return {field.name: to_dict(getattr(obj, field.name)) for field in dataclasses.fields(obj) if field.init}
    if isinstance(obj, Mapping):
        return {key: to_dict(value) for key, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [to_dict(value) for value in obj]
    if isinstance(obj, Path):
        return str(obj)
    return obj


def save_yaml(path: str | os.PathLike, obj: Any) -> None:
    """Write a dataclass (or mapping) as YAML that `load_yaml` reads back equal, whole or not at all. Makes the folder."""
    with whole_file(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        yaml.dump(to_dict(obj), file, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


# ---- values to dataclasses


class _Converter:
    """Converts plain values to annotated types; knows the root class, to suggest where a misplaced key belongs."""

    def __init__(self, root: type):
        self.root = root

    def convert(self, value: Any, to: Any, path: str) -> Any:
        if to is Any:
            return value
        if dataclasses.is_dataclass(to):
            return self._dataclass(value, to, path)
        origin, args = typing.get_origin(to), typing.get_args(to)
        if origin in (Union, types.UnionType):
            return self._union(value, args, path)
        if origin is Literal:
            for choice in args:
                if value == choice and type(value) is type(choice):
                    return value
            near = difflib.get_close_matches(str(value), map(str, args), n=1)
            raise _wrong(value, to, path, hint=f"; did you mean {near[0]}?" if near else "")
        container = origin or to
        if container in (list, tuple):
            return self._sequence(value, to, container, args, path)
        if container in (dict, Mapping):
            if not isinstance(value, Mapping):
                raise _wrong(value, to, path)
            key_type, value_type = args or (Any, Any)
            return {self.convert(k, key_type, path): self.convert(v, value_type, _join(path, k)) for k, v in value.items()}
        if to is float and not isinstance(value, bool):
            if isinstance(value, str) and _FLOAT.fullmatch(value):
                return _to_float(value)
            if isinstance(value, (int, float)):
                return float(value)
        elif to is Path and isinstance(value, (str, Path)):
            return Path(value)
        elif (to is int and isinstance(value, int) and not isinstance(value, bool)) or (
            to in (bool, str, type(None)) and isinstance(value, to)
        ):
            return value
        elif to not in (bool, int, float, str, Path, type(None)):
            raise TypeError(f"{path}: schema can't read fields of type {to}")
        raise _wrong(value, to, path)

    def _dataclass(self, value: Any, cls: type, path: str) -> Any:
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            hint = " (an empty section is written {})" if value is None else ""
            raise ConfigError(f"{_at(path)}got {_spell(value)}, needed settings like `name: value`{hint}", path)
        hints = _hints(cls)
        fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
        for key in value:
            if key not in fields:
                raise self._unknown(key, list(fields), path)
        missing = [
            name
            for name, field in fields.items()
            if name not in value
            and field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
        ]
        if missing:
            raise ConfigError(f"{_join(path, missing[0])} is not set, and it has no default", _join(path, missing[0]))
        arguments = {key: self.convert(item, hints[key], _join(path, key)) for key, item in value.items()}
        try:
            return cls(**arguments)
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(f"{_at(path)}{error}", path) from error

    def _unknown(self, key: Any, valid: list[str], path: str) -> ConfigError:
        full = _join(path, key)
        if not isinstance(key, str):
            return ConfigError(f"{full}: a setting's name must be text, got {_spell(key)}", full)
        near = difflib.get_close_matches(key, valid, n=1)
        if near:
            return ConfigError(f"unknown setting {full}, did you mean {_join(path, near[0])}?", full)
        everywhere = _dotted_names(self.root)
        last = {name: name.rpartition(".")[2] for name in everywhere}
        leaf = key.rpartition(".")[2]
        near = difflib.get_close_matches(leaf, list(last.values()), n=1)
        if near:
            place = next(name for name in everywhere if last[name] == near[0])
            return ConfigError(f"unknown setting {full}, did you mean {place}?", full)
        return ConfigError(f"unknown setting {full}; valid here: {', '.join(valid)}", full)

    def _union(self, value: Any, choices: tuple, path: str) -> Any:
        if value is None and type(None) in choices:
            return None
        choices = tuple(choice for choice in choices if choice is not type(None))
        if len(choices) == 1:
            return self.convert(value, choices[0], path)
        for choice in choices:  # an exact type first, so that an int stays an int in `float | int`
            if isinstance(choice, type) and type(value) is choice:
                return value
        for choice in choices:
            try:
                return self.convert(value, choice, path)
            except ConfigError:
                continue
        raise _wrong(value, Union[choices], path)  # noqa: UP007 (built at run time)

    def _sequence(self, value: Any, to: Any, container: type, args: tuple, path: str) -> Any:
        if not isinstance(value, (list, tuple)):
            raise _wrong(value, to, path)
        if container is list or not args or args[-1] is Ellipsis:
            item_types = [args[0] if args else Any] * len(value)
        else:
            item_types = list(args)
            if len(value) != len(args):
                raise ConfigError(f"{_at(path)}got {len(value)} items, needed {len(args)}: {_name(to)}", path)
        return container(
            self.convert(item, item_type, f"{path}[{i}]")
            for i, (item, item_type) in enumerate(zip(value, item_types, strict=True))
        )


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _dotted_names(cls: type, prefix: str = "", seen: tuple = ()) -> list[str]:
    """Dotted paths of all settings of `cls`, nested ones included."""
    names = []
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        names.append(_join(prefix, field.name))
        to = _hints(cls)[field.name]
        for inner in (to, *typing.get_args(to)):
            if dataclasses.is_dataclass(inner) and inner not in seen:
                names += _dotted_names(inner, _join(prefix, field.name), (*seen, cls, inner))
    return names


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def _at(path: str) -> str:
    return f"{path}: " if path else ""


def _wrong(value: Any, to: Any, path: str, hint: str = "") -> ConfigError:
    return ConfigError(f"{_at(path)}got {_spell(value)}, needed {_name(to)}{hint}", path)


def _spell(value: Any) -> str:
    if value is None:
        return "nothing (null)"
    if isinstance(value, Mapping):
        return f"settings ({', '.join(map(str, list(value)[:3]))}{', ...' if len(value) > 3 else ''})"
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def _name(to: Any) -> str:
    """A type in the words of someone writing YAML."""
    origin, args = typing.get_origin(to), typing.get_args(to)
    if origin in (Union, types.UnionType):
        return " or ".join(_name(arg) for arg in args)
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(map(str, args))
    if origin is tuple and args and args[-1] is not Ellipsis:
        return f"[{', '.join(_name(arg) for arg in args)}]"
    if origin in (list, tuple) and args:
        return f"a list of {_name(args[0])}"
    if (origin or to) in (list, tuple):
        return "a list"
    if (origin or to) in (dict, Mapping):
        return "a mapping"
    return {type(None): "null", bool: "true or false", Path: "a path"}.get(to, getattr(to, "__name__", str(to)))


# ---- YAML


def _read_with_base(path: Path, children: tuple[Path, ...]) -> dict[str, Any]:
    """The mapping in `path`, merged over its base. `children`: the files that led here, to stop cycles."""
    resolved = path.resolve()
    if resolved in children:
        raise ConfigError(f"{path}: its {BASE_KEY} leads back to itself")
    values = _read(path)
    if BASE_KEY not in values:
        return values
    base = values.pop(BASE_KEY)
    if not isinstance(base, str) or not base:
        raise ConfigError(f"{path}: {BASE_KEY}: got {_spell(base)}, needed the name of a YAML file", BASE_KEY)
    try:
        below = _read_with_base(path.parent / base, (*children, resolved))
    except ConfigError as error:
        raise ConfigError(f"{path}: {BASE_KEY}: {error}", BASE_KEY) from error
    return _merge(below, values)


def _read(path: Path) -> dict[str, Any]:
    if path.is_dir() or not path.exists():
        raise ConfigError(f"{path}: {'is a folder, not a file' if path.is_dir() else 'no such file'}{_nearby(path)}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise ConfigError(f"{path}: can't be read ({error.strerror})") from error
    values = _parse(text, str(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: got a {type(values).__name__} at the top, needed settings like `name: value`")
    return values


def _nearby(path: Path) -> str:
    """What YAML files there are, for someone who mistyped one."""
    folder = path if path.is_dir() else path.parent
    while not folder.is_dir():
        folder = folder.parent
    names = sorted(p.name for p in folder.iterdir() if p.suffix in (".yaml", ".yml"))
    if not names:
        return f"; {folder} holds no YAML file"
    near = difflib.get_close_matches(path.name, names, n=1)
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return f"{f'; did you mean {folder / near[0]}?' if near else ''}; {folder} has {shown}"


def _parse(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        problem = " ".join((error.problem or error.context or "can't be parsed").split())
        if "'\\t'" in problem:
            problem += " (indent with spaces, not tabs)"
        raise ConfigError(f"{source}{line}: not YAML: {problem}") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{source}:{line}: not YAML: character {error.character!r} isn't allowed") from error
    except RecursionError as error:
        raise ConfigError(f"{source}: nested too deeply") from error


def _apply_override(values: dict[str, Any], override: str) -> str:
    """Set `a.b=c` in `values` (mutated); returns "a.b"."""
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key or not all(key.split(".")):
        raise ConfigError(f"--set {override}: needed the form name=value, like gate.budget=0.2")
    value = _parse(text, f"--set {override}")
    *parents, last = key.split(".")
    for i, parent in enumerate(parents):
        inner = values.setdefault(parent, {})
        if inner is None:
            inner = values[parent] = {}
        if not isinstance(inner, dict):
            where = ".".join(parents[: i + 1])
            raise ConfigError(f"--set {override}: {where} is {_spell(inner)}, it has no settings inside", where)
        values = inner
    if isinstance(value, dict) and isinstance(values.get(last), dict):
        value = _merge(values[last], value)
    values[last] = value
    return key


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        inner = merged.get(key)
        merged[key] = _merge(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged


_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_INT = re.compile(r"[-+]?(0|[1-9][0-9_]*)|0x[0-9a-fA-F]+")

# Scalars without quotes: what isn't one of these is a string. With the characters each can start with.
_RESOLVERS = [
    ("tag:yaml.org,2002:null", "~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", "true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("tag:yaml.org,2002:int", _INT.pattern, list("-+0123456789")),
    ("tag:yaml.org,2002:float", _FLOAT.pattern, list("-+.0123456789")),
    ("tag:yaml.org,2002:merge", "<<", ["<"]),
]


def _resolvers() -> dict[str, list]:
    table: dict[str, list] = {}
    for tag, pattern, first_chars in _RESOLVERS:
        for char in first_chars:
            table.setdefault(char, []).append((tag, re.compile(f"(?:{pattern})$")))
    return table


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = _resolvers()

    def construct_mapping(self, node, deep=False):
        seen: set[str] = set()
        if isinstance(node, yaml.MappingNode):
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                    if key.value in seen:
                        raise yaml.constructor.ConstructorError(
                            None, None, f"{key.value!r} is set twice", key.start_mark
                        )
                    seen.add(key.value)
        return super().construct_mapping(node, deep)


def _to_float(text: str) -> float:
    return float(text.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan"))


def _construct_float(loader: _Loader, node: yaml.ScalarNode) -> float:
    return _to_float(loader.construct_scalar(node))


_Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = _resolvers()

    def ignore_aliases(self, data):
        return True


def _represent_str(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # PyYAML loses these line separators in every style but this one.
    style = '"' if set("\x85\u2028\u2029") & set(text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_str)
