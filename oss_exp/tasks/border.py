"""The border of configurations: the one place where a configuration becomes objects.

`check` compares every value with the annotation of the parameter that receives it, before anything is built; `build`
does the same for one node and then lets Hydra make the object. Both raise one ValueError that names every wrong value
with its full key, what it should be and what was given. Types are checked here and nowhere else; constructors check
what types cannot say, such as ranges and relations.

pydantic decides whether a value has a type, strictly (`true` is no 1, 1.5 no whole number, nan no rate), by the rules
of JSON, because a yaml has no tuples and no paths. It is used directly, not through hydra-zen: hydra-zen validates the
call of a constructor, which is after everything below it was built and, for a configuration of several groups, after
the model was loaded; its messages name arguments, not keys of the configuration; and it is one more dependency around
the three functions that are used here.
"""

from __future__ import annotations

import difflib
import inspect
import json
import re
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

import annotated_types
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import OmegaConf
from pydantic import (
    ConfigDict,
    PydanticSchemaGenerationError,
    PydanticUserError,
    TypeAdapter,
    ValidationError,
)
from typing_extensions import get_protocol_members, is_protocol

import oss_exp
from oss_exp.checks import SettingsOf
from oss_exp.names import named_object, with_public_names

# Hydra's own keys beside a _target_.
RESERVED = {
    "_partial_": bool,
    "_recursive_": bool,
    "_convert_": Literal["none", "partial", "object", "all"],
    "_args_": list,
}
UNSET = "???"
STRICT = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)


def check(node: Any, key: str = "", kind: Any = Any) -> None:
    """Raise one ValueError for all values below `node` that do not have the type of what receives them.

    key:  of the node in the whole configuration.
    kind: what the node should be; `Any` checks only what lies below its `_target_`s.

    Values that are not set (???) pass: a group may have options that this run does not use.
    """
    _Check(node, key, unset_passes=True).of(_plain(node), kind)


def build(node: Any, key: str, kind: Any = Any, **arguments: Any) -> Any:
    """Return the object that `node` describes; further arguments are passed on, in place of the node's own.

    ValueError or OSError, with the key, for wrong values, and for whatever the constructors refuse.
    """
    plain = _plain(node)
    if isinstance(plain, Mapping):
        plain = {name: value for name, value in plain.items() if name not in arguments}
    checked = _Check(node, key, unset_passes=False, given=arguments).of(plain, kind)
    if checked is None:
        return None
    if not isinstance(checked, Mapping) or "_target_" not in checked:
        raise ValueError(f"{key} must be a mapping with _target_, got {shown(checked)}")
    try:
        # Not as keywords of `instantiate`, which would make configurations of dataclasses among them.
        return instantiate(checked, _convert_="all", _partial_=True)(**arguments)
    except InstantiationException as error:
        below = re.search(r"\nfull_key: (\S+)$", str(error))
        path = below[1] if below else ""
        written = OmegaConf.select(node, path) if OmegaConf.is_config(node) and path else node
        raise _with_key(
            ".".join(filter(None, [key, path])), _at(checked, path), written, _cause(error)
        ) from error
    except Exception as error:
        raise _with_key(key, {**checked, **arguments}, node, error) from error


def class_of(node: Any, key: str) -> Any:
    """Return what the `_target_` of a node names, without calling it; ValueError with the key where it is none."""
    try:
        return _target(node["_target_"])
    except ValueError as error:
        raise ValueError(f"{key}._target_ {error}") from None


def _plain(node: Any) -> Any:
    """The node without interpolations, its targets by their public names."""
    return with_public_names(
        OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    )


# --------------------------------------------------------------------------------------------------------------
# The walk through a configuration
# --------------------------------------------------------------------------------------------------------------


class _Check:
    """One walk: collects the faults, and returns the nodes as Hydra's `instantiate` takes them.

    node, key: with interpolations as they are written. given: arguments of the topmost target that are no part of it.
    """

    def __init__(self, node: Any, key: str, unset_passes: bool, given: Collection[str] = ()):
        self.node, self.key, self.unset_passes, self.given = node, key, unset_passes, given
        self.faults: list[str] = []

    def of(self, value: Any, kind: Any) -> Any:
        checked = self._value(value, kind, self.key, None if self.unset_passes else self.given)
        if self.faults:
            raise ValueError("\n".join(self.faults))
        return checked

    def _value(self, value: Any, kind: Any, key: str, given: Collection[str] | None = ()) -> Any:
        """given: None where a target may get further arguments that are not known here."""
        if value == UNSET:
            if not self.unset_passes:
                explained = any(isinstance(each, str) for each in _metadata(kind))
                what = f"it must be {describe(kind)}; " if explained else ""
                self.faults.append(f"{key} is not set; {what}add {key}={_example(kind)}")
        elif isinstance(value, Mapping):
            return self._mapping(value, kind, key, given)
        elif isinstance(value, list) and _has_target(value):
            item = next(
                (get_args(each)[0] for each in _options(kind) if _is_list(each) and get_args(each)),
                Any,
            )
            return [self._value(each, item, f"{key}.{place}") for place, each in enumerate(value)]
        elif not _accepts(kind, value):
            self._refuse(key, kind, shown(value))
        return value

    def _refuse(self, key: str, kind: Any, given: str) -> None:
        self.faults.append(
            f"{key} must be {describe(kind)}, got {given}{_origin(self.node, key.removeprefix(self.key))}"
        )

    def _mapping(self, value: Mapping, kind: Any, key: str, given: Collection[str] | None) -> Any:
        if "_target_" in value:
            return self._call(value, kind, key, given)
        for option in _options(kind):
            for settings in _metadata(option):
                if isinstance(settings, SettingsOf):
                    return self._fields(
                        value, parameters_of(settings.kind), key, settings.kind.__name__
                    )
            if is_typeddict(option):
                return self._fields(
                    value, _Parameters(get_type_hints(option, include_extras=True), (), True), key
                )
            if _is_record(option):
                filled = self._fields(value, parameters_of(option), key, str(option.__name__), ())
                return {"_target_": f"{option.__module__}.{option.__qualname__}", **filled}
            if get_origin(option) in (dict, Mapping):
                item = (*get_args(option), Any, Any)[1]
                return {
                    name: self._value(each, item, _below(key, name), None if given is None else ())
                    for name, each in value.items()
                }
        if kind is not Any and not _has_target(value) and not _accepts(kind, value):
            self._refuse(key, kind, shown(value))
            return value
        return {
            name: self._value(each, Any, _below(key, name), None if given is None else ())
            for name, each in value.items()
        }

    def _call(
        self, node: Mapping, kind: Any, key: str, given: Collection[str] | None
    ) -> dict[str, Any]:
        """A node with a _target_."""
        try:
            target = _target(node["_target_"])
        except ValueError as error:
            self.faults.append(f"{_below(key, '_target_')} {error}")
            return dict(node)
        if not _fits(target, node.get("_partial_", False), kind):
            self._refuse(key, kind, node["_target_"])
        own = {name: value for name, value in node.items() if name not in ("_target_", *RESERVED)}
        for name, expected in RESERVED.items():
            if name in node and not _accepts(expected, node[name]):
                self._refuse(_below(key, name), expected, shown(node[name]))
        parameters = parameters_of(target)
        if node.get("_partial_", False) or "_args_" in node:
            given = None
        filled = self._fields(own, parameters, key, node["_target_"], given)
        return {**{name: node[name] for name in ("_target_", *RESERVED) if name in node}, **filled}

    def _fields(
        self,
        values: Mapping,
        parameters: _Parameters,
        key: str,
        owner: str = "",
        given: Collection[str] | None = None,
    ) -> dict[str, Any]:
        """The values of the parameters, or of the fields, of something; given: None where some may be missing."""
        filled = {}
        for name, value in values.items():
            if name not in parameters.kinds and not parameters.takes_more:
                self.faults.append(_unknown(key, name, owner, parameters.kinds))
            kind = parameters.kinds.get(name, Any)
            filled[name] = self._value(value, kind, _below(key, name), None if owner == "" else ())
        if given is not None:
            for name in parameters.required:
                if name not in values and name not in given:
                    self.faults.append(
                        f"{_below(key, name)} is missing; it must be {describe(parameters.kinds[name])}"
                    )
        return filled


def _origin(node: Any, path: str) -> str:
    """Where the value at a path is from, if it is another's, as in num_classes: ${model.num_classes}."""
    written = _at(OmegaConf.to_container(node) if OmegaConf.is_config(node) else {}, path)
    return f" from {written}" if isinstance(written, str) and "${" in written else ""


def _at(node: Any, path: str) -> Any:
    """What lies at a path such as sizes.tiny.decoder; None where there is nothing."""
    for part in filter(None, path.split(".")):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


def _below(key: str, name: Any) -> str:
    return f"{key}.{name}" if key else str(name)


def _has_target(value: Any) -> bool:
    if isinstance(value, Mapping):
        return "_target_" in value or any(map(_has_target, value.values()))
    return isinstance(value, list) and any(map(_has_target, value))


def _unknown(key: str, name: str, owner: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(str(name), known, n=1)
    some = [*known][:12] + ["..."] * (len(known) > 12)
    advice = (
        f"did you mean {_below(key, near[0])}?" if near else f"it takes {', '.join(some) or 'none'}"
    )
    return f"{_below(key, name)} is no option of {owner}; {advice}"


# --------------------------------------------------------------------------------------------------------------
# Targets and their parameters
# --------------------------------------------------------------------------------------------------------------


class _Parameters(NamedTuple):
    """kinds: {parameter: its annotation}; required: those without a default; takes_more: any others, unchecked."""

    kinds: Mapping[str, Any]
    required: Sequence[str]
    takes_more: bool


def _target(name: Any) -> Any:
    """The object of a name; ValueError, to be read after the key, where there is none."""
    if not isinstance(name, str):
        raise ValueError(f"must be the name of a class or a function, got {shown(name)}")
    package, _, path = name.partition(".")
    try:
        found = named_object(name) if package == "oss_exp" else get_object(name)
    except Exception as error:
        if str(error).startswith(f"is {name}"):
            raise ValueError(str(error)) from None
        known = [*oss_exp.PUBLIC, *oss_exp.CONFIGURED] if package == "oss_exp" else []
        near = difflib.get_close_matches(path, known, n=1)
        advice = f"; did you mean oss_exp.{near[0]}?" if near else ""
        raise ValueError(
            f"must be the name of a class or a function, got {name!r}{advice}"
        ) from None
    if not callable(found):
        raise ValueError(f"must be the name of a class or a function, got {name!r}")
    return found


@cache
def parameters_of(target: Callable) -> _Parameters:
    """What a class or a function takes.

    `**others` of a class of ours are the parameters of its base class, where that is one of ours too.
    """
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):  # some that are written in C
        return _Parameters({}, (), True)
    hints = _hints(target)
    own = _is_ours(target)
    kinds, required, takes_more = {}, [], False
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            base = _next_constructor(target)
            inherited = _Parameters({}, (), True) if base is None else parameters_of(base)
            kinds = {
                **inherited.kinds,
                **kinds,
            }  # which are required, only `target` knows: it may give some itself
            takes_more = inherited.takes_more
        elif parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            optional = parameter.default is not parameter.empty
            kind = hints.get(name, Any)
            kinds[name] = kind if own else _loosened(kind, parameter.default)
            if not optional:
                required.append(name)
    return _Parameters(kinds, tuple(required), takes_more)


def _is_ours(target: Any) -> bool:
    return str(getattr(target, "__module__", "")).partition(".")[0] == "oss_exp"


def _next_constructor(target: Any) -> type | None:
    """The class of ours whose constructor the class `target` hands its **others to."""
    if not inspect.isclass(target):
        return None
    makers = [each for each in target.__mro__ if "__init__" in vars(each)]
    return makers[1] if len(makers) > 1 and _is_ours(makers[0]) and _is_ours(makers[1]) else None


def _hints(target: Any) -> Mapping[str, Any]:
    """Annotations; of another library those that can be understood when it runs."""
    holder = target if is_dataclass(target) or not inspect.isclass(target) else target.__init__
    try:
        return get_type_hints(holder, include_extras=True)
    except Exception:
        if _is_ours(target):
            raise
        hints, names = {}, vars(sys.modules[target.__module__])
        for name, written in inspect.get_annotations(holder).items():
            with suppress(Exception):
                hints[name] = eval(written, dict(names)) if isinstance(written, str) else written
        return hints


def _loosened(kind: Any, default: Any) -> Any:
    """The annotation of another library's parameter, as far as it can be trusted.

    Not for the length of tuples and what is in mappings; and null may be written where it is the default.
    """
    options = []
    for each in _options(kind):
        items = [_loosened(item, ...) for item in get_args(each) if item is not Ellipsis]
        if get_origin(each) in (dict, Mapping):
            options.append(dict)
        elif _is_list(each):
            options.append(list[Union[tuple(items)]] if items else list)  # noqa: UP007
        else:
            options.append(each)
    if default is None:
        options.append(type(None))
    return Union[tuple(options)]  # noqa: UP007  (its members are computed)


def _fits(target: Any, is_partial: bool, kind: Any) -> bool:
    """Whether what `target` makes may be what is asked for, as far as annotations tell."""
    if is_partial:
        return any(each is Any or not inspect.isclass(each) for each in _options(kind))
    made = target
    if not inspect.isclass(target):
        made = _hints(target).get("return")
        owner = getattr(target, "__self__", None)  # of a class method that returns its own class
        made = owner if inspect.isclass(owner) and not inspect.isclass(made) else made
    if not inspect.isclass(made):
        return True
    return any(_is_kind(made, each) for each in _options(kind))


def _is_kind(made: type, kind: Any) -> bool:
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if kind is Any or kind is object:
        return True
    if kind is None or kind is type(None):
        return False
    if not inspect.isclass(kind) or get_origin(kind) is not None:
        return get_origin(kind) is not Literal
    if is_protocol(kind):
        methods = [
            name for name in get_protocol_members(kind) if callable(getattr(kind, name, None))
        ]
        return all(
            hasattr(made, name) for name in methods
        )  # other attributes may be those of objects
    return issubclass(made, kind)


# --------------------------------------------------------------------------------------------------------------
# Values and their annotations
# --------------------------------------------------------------------------------------------------------------


def _options(kind: Any) -> Iterator[Any]:
    """The members of a union; else the annotation itself."""
    if get_origin(kind) in (Union, types.UnionType):
        for each in get_args(kind):
            yield from _options(each)
    else:
        yield kind


def _metadata(kind: Any) -> tuple[Any, ...]:
    return get_args(kind)[1:] if get_origin(kind) is Annotated else ()


def _is_list(kind: Any) -> bool:
    origin = get_origin(kind) or kind
    return (
        inspect.isclass(origin)
        and origin is not str
        and (origin is Iterable or issubclass(origin, list | tuple | Sequence))
    )


def _accepts(kind: Any, value: Any) -> bool:
    return any(_accepts_one(each, value) for each in _options(kind))


def _accepts_one(kind: Any, value: Any) -> bool:
    if kind is Any or kind is object or isinstance(kind, typing.TypeVar):
        return True
    if kind is None or kind is type(None):
        return value is None
    if get_origin(kind) is Callable or kind is Callable:
        return False
    if _is_object(kind):
        with suppress(TypeError):  # a protocol
            return isinstance(value, kind)  # as interpolations can be, such as ${hydra:mode}
        return False
    if get_origin(kind) is Literal:  # for pydantic, true is a 1 here
        return any(type(value) is type(choice) and value == choice for choice in get_args(kind))
    try:
        _adapter(kind).validate_json(json.dumps(value, default=str))
    except ValidationError:
        return False
    except (PydanticSchemaGenerationError, PydanticUserError):
        return True  # of another library, and more than pydantic knows
    return True


def _is_object(kind: Any) -> bool:
    """Whether only a _target_ can make it."""
    return (
        inspect.isclass(kind)
        and get_origin(kind) is None
        and kind is not Any
        and not issubclass(kind, PLAIN)
    )


def _is_record(kind: Any) -> bool:
    """Whether it is a dataclass of plain values, which a mapping of its fields describes, also without a _target_."""
    if not inspect.isclass(kind) or not is_dataclass(kind) or inspect.isabstract(kind):
        return False
    return not any(
        _is_object(each) for part in parameters_of(kind).kinds.values() for each in _options(part)
    )


PLAIN = (bool, int, float, str, Path, list, tuple, dict, type(None))


@cache
def _adapter(kind: Any) -> TypeAdapter:
    return TypeAdapter(kind, config=STRICT)


WORDS = {
    int: "whole number",
    float: "finite number",
    Path: "path",
    str: "text",
    bool: "true or false",
}


def describe(kind: Any, plural: bool = False) -> str:
    """Return the words for what a value of this annotation is, such as "a whole number of at least 1".

    A text in `Annotated[..., text]` follows the words for the type.
    """
    options = list(_options(kind))
    if len(options) > 1:
        first = [each for each in options if each is not type(None)]
        listed = [describe(each, plural) for each in first] + ["null"] * (len(first) < len(options))
        return " or ".join([", ".join(listed[:-1]), listed[-1]])
    if get_origin(kind) is Annotated:
        inner, *metadata = get_args(kind)
        return describe(inner, plural) + _bounds(metadata)
    if get_origin(kind) is Literal:
        return ("each " if plural else "") + f"one of {', '.join(map(_word, get_args(kind)))}"
    if kind in (str, bool):
        return ("texts" if plural else "text") if kind is str else WORDS[bool]
    if kind in WORDS:
        return f"{WORDS[kind]}s" if plural else f"a {WORDS[kind]}"
    if kind is None or kind is type(None):
        return "null"
    if kind is Any:
        return "anything"
    if _is_list(kind):
        items = [each for each in get_args(kind) if each is not Ellipsis]
        several = "lists" if plural else "a list"
        if get_origin(kind) is tuple and Ellipsis not in get_args(kind) and items:
            several += f" of {len(items)}"
            return (
                f"{several} {describe(items[0], plural=True)}" if len(set(items)) == 1 else several
            )
        return (
            f"{several} of {describe(items[0], plural=True)}"
            if items and items[0] is not Any
            else several
        )
    if kind is dict or get_origin(kind) in (dict, Mapping):
        return "mappings" if plural else "a mapping"
    if _is_record(kind):
        return f"a mapping of {', '.join(parameters_of(kind).kinds)}"
    name = getattr(kind, "__name__", str(kind))
    return f"a {name} (a mapping with _target_)"


def _bounds(metadata: Sequence[Any]) -> str:
    words, low, high = "", None, None
    for each in metadata:
        if isinstance(each, annotated_types.Ge):
            low = each.ge
        elif isinstance(each, annotated_types.Le):
            high = each.le
        elif isinstance(each, annotated_types.Gt):
            words += f" above {each.gt}"
        elif isinstance(each, annotated_types.Lt):
            words += f" below {each.lt}"
        elif isinstance(each, str):
            words += f" {each}"
    if low is not None and high is not None:
        return f" from {low} to {high}{words}"
    return "".join(
        [f" of at least {low}"] * (low is not None)
        + [f" of at most {high}"] * (high is not None)
        + [words]
    )


def _example(kind: Any) -> str:
    """What may stand behind "key=": a choice where there are some, else a word for it."""
    choices = [
        each
        for option in _options(kind)
        if get_origin(option) is Literal
        for each in get_args(option)
    ]
    return "|".join(map(_word, choices)) if choices else "VALUE"


def _word(value: Any) -> str:
    return value if isinstance(value, str) else shown(value)


def shown(value: Any) -> str:
    """Return a value as a yaml has it: null, true, nan, [1, 2], {a: 1}; text in quotation marks."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {shown(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(shown, value)) + "]"
    return repr(value)


# --------------------------------------------------------------------------------------------------------------
# What constructors refuse
# --------------------------------------------------------------------------------------------------------------


def _cause(error: BaseException) -> BaseException:
    while isinstance(error, InstantiationException) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _with_key(key: str, node: Any, written: Any, error: BaseException) -> Exception:
    """The error as a user reads it: with the full key of the value, or of the node, that it is about.

    written: the node with its interpolations.
    """
    text = str(error)
    if not isinstance(error, ValueError | TypeError | OSError | RuntimeError | ImportError):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    last = key.rpartition(".")[2]
    # "sizes.tiny.decoder: tile must be ..." is said of sizes.tiny.decoder.tile.
    if (part := re.match(r"([\w.]+): (\w+) ", text)) and part[2] in (_at(node, part[1]) or ()):
        text = f"{part[1]}.{text[part.start(2) :]}{_origin(written, f'{part[1]}.{part[2]}')}"
    if (name := re.match(r"(\w+)( must| is| has|=|\.|:)", text)) and name[1] in (node or ()):
        text = f"{key}.{text}"
    elif re.search(rf"(?<![\w.]){re.escape(key)}[.=]", text):
        pass
    elif re.match(rf"{re.escape(last)}[.=]", text):
        text = key.removesuffix(last) + text
    else:
        text = f"{key}: {text}"
    if isinstance(error, OSError):
        return FileNotFoundError(text) if isinstance(error, FileNotFoundError) else OSError(text)
    return ValueError(text)
