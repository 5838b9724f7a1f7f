"""Turn configurations into objects; nothing else in the package does.

`check` compares every value with the annotation of the parameter that receives it, before
anything is built; `build` does the same for one node and then lets Hydra make the object. Both
raise one ValueError that lists every wrong value with its full key, what it should be and what
it is. Types are checked here and nowhere else; constructors check what types cannot say, such as
ranges and relations.

pydantic decides whether a value has a type, strictly (`true` is not 1, 1.5 is not a whole number,
nan is not a rate), by the rules of JSON, because a yaml has no tuples and no paths. hydra-zen is
not used: it validates the call of a constructor, when everything below has been built and, for a
configuration of several groups, the model has been loaded, and its messages name arguments
instead of keys.
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

# Hydra's keys beside a _target_.
RESERVED = {
    "_partial_": bool,
    "_recursive_": bool,
    "_convert_": Literal["none", "partial", "object", "all"],
    "_args_": list,
}
UNSET = "???"
STRICT = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)


def check(node: Any, key: str = "", kind: Any = Any) -> None:
    """Check the types of all values below a node.

    Values that are not set (???) pass, because a group may have options that this run does not
    use.

    Args:
        node: A node of the configuration.
        key: Key of the node in the whole configuration.
        kind: Annotation of the node itself; `Any` checks only what lies below its `_target_`s.

    Raises:
        ValueError: If values have a wrong type; the message lists all of them.
    """
    _Check(node, key, unset_passes=True).of(_plain(node), kind)


def build(node: Any, key: str, kind: Any = Any, **arguments: Any) -> Any:
    """Build the object that a node describes.

    Args:
        node: A node of the configuration with a `_target_`, or None.
        key: Key of the node in the whole configuration.
        kind: Annotation of the object.
        arguments: Further arguments of the target, instead of those of the node.

    Returns:
        The object; None for a node that is None.

    Raises:
        ValueError, OSError: With the key, for wrong values and for all that constructors refuse.
    """
    # Check the types.
    plain = _plain(node)
    if isinstance(plain, Mapping):
        plain = {name: value for name, value in plain.items() if name not in arguments}
    checked = _Check(node, key, unset_passes=False, arguments=arguments).of(plain, kind)
    if checked is None:
        return None

    if not isinstance(checked, Mapping) or "_target_" not in checked:
        raise ValueError(f"{key} must be a mapping with _target_, got {as_yaml(checked)}")

    # Build. As keywords of `instantiate`, dataclasses among the arguments would become
    # configurations.
    try:
        return instantiate(checked, _convert_="all", _partial_=True)(**arguments)
    except InstantiationException as error:
        match = re.search(r"\nfull_key: (\S+)$", str(error))
        path = match[1] if match else ""
        full_key = ".".join(filter(None, [key, path]))
        written = OmegaConf.select(node, path) if OmegaConf.is_config(node) and path else node
        raise _with_key(full_key, _at(checked, path), written, _cause(error)) from error
    except Exception as error:
        raise _with_key(key, {**checked, **arguments}, node, error) from error


def class_of(node: Any, key: str) -> Any:
    """Return what the `_target_` of a node names, without calling it.

    Raises:
        ValueError: With the key, if the name is not one of a class or function.
    """
    try:
        return _target(node["_target_"])
    except ValueError as error:
        raise ValueError(f"{key}._target_ {error}") from None


def _plain(node: Any) -> Any:
    """Resolve the interpolations of a node, and spell its targets by their public names."""
    if OmegaConf.is_config(node):
        node = OmegaConf.to_container(node, resolve=True)
    return with_public_names(node)


# --------------------------------------------------------------------------------------------------
# The walk through a configuration
# --------------------------------------------------------------------------------------------------


class _Check:
    """One walk through a node: it collects the errors, and returns what `instantiate` takes.

    In the methods, `extra` names the arguments that a target gets besides those of its node;
    None: any may come, so none can be missing.

    Args:
        node: The node with its interpolations as they are written.
        key: Key of the node.
        unset_passes: Accept values that are not set.
        arguments: Arguments of the topmost target that are not in the node.
    """

    def __init__(self, node: Any, key: str, unset_passes: bool, arguments: Collection[str] = ()):
        self.node = node
        self.key = key
        self.unset_passes = unset_passes
        self.arguments = arguments
        self.faults: list[str] = []

    def of(self, value: Any, kind: Any) -> Any:
        """Return the checked value, or raise one ValueError for all errors."""
        extra = None if self.unset_passes else self.arguments
        checked = self._value(value, kind, self.key, extra)
        if self.faults:
            raise ValueError("\n".join(self.faults))
        return checked

    def _value(self, value: Any, kind: Any, key: str, extra: Collection[str] | None = ()) -> Any:
        if value == UNSET:
            if not self.unset_passes:
                self._refuse_unset(key, kind)
        elif isinstance(value, Mapping):
            return self._mapping(value, kind, key, extra)
        elif isinstance(value, list) and _has_target(value):
            item = _item_kind(kind)
            return [self._value(entry, item, f"{key}.{i}") for i, entry in enumerate(value)]
        elif not _accepts(kind, value):
            self._refuse(key, kind, as_yaml(value))
        return value

    def _refuse_unset(self, key: str, kind: Any) -> None:
        is_explained = any(isinstance(entry, str) for entry in _metadata(kind))
        explanation = f"it must be {describe(kind)}; " if is_explained else ""
        self.faults.append(f"{key} is not set; {explanation}add {key}={_example(kind)}")

    def _refuse(self, key: str, kind: Any, value: str) -> None:
        origin = _origin(self.node, key.removeprefix(self.key))
        self.faults.append(f"{key} must be {describe(kind)}, got {value}{origin}")

    def _mapping(self, value: Mapping, kind: Any, key: str, extra: Collection[str] | None) -> Any:
        if "_target_" in value:
            return self._call(value, kind, key, extra)
        extra_below = None if extra is None else ()

        # The first option of the annotation that a mapping can be.
        for option in _options(kind):
            for settings in _metadata(option):
                if isinstance(settings, SettingsOf):
                    parameters = parameters_of(settings.kind)
                    return self._fields(value, parameters, key, settings.kind.__name__)
            if is_typeddict(option):
                hints = get_type_hints(option, include_extras=True)
                return self._fields(value, _Parameters(hints, (), True), key)
            if _is_record(option):
                fields = self._fields(value, parameters_of(option), key, str(option.__name__), ())
                return {"_target_": f"{option.__module__}.{option.__qualname__}", **fields}
            if get_origin(option) in (dict, Mapping):
                item = (*get_args(option), Any, Any)[1]
                return self._entries(value, item, key, extra_below)

        # Other mappings may hold targets.
        if kind is not Any and not _has_target(value) and not _accepts(kind, value):
            self._refuse(key, kind, as_yaml(value))
            return value
        return self._entries(value, Any, key, extra_below)

    def _entries(
        self, values: Mapping, kind: Any, key: str, extra: Collection[str] | None
    ) -> dict[str, Any]:
        """Check the entries of a mapping, all of one kind."""
        checked = {}
        for name, value in values.items():
            checked[name] = self._value(value, kind, _below(key, name), extra)
        return checked

    def _call(
        self, node: Mapping, kind: Any, key: str, extra: Collection[str] | None
    ) -> dict[str, Any]:
        """Check a node with a `_target_`."""
        try:
            target = _target(node["_target_"])
        except ValueError as error:
            self.faults.append(f"{_below(key, '_target_')} {error}")
            return dict(node)

        is_partial = node.get("_partial_", False)
        if not _fits(target, is_partial, kind):
            self._refuse(key, kind, node["_target_"])

        # Hydra's keys.
        reserved = {"_target_": node["_target_"]}
        for name, expected in RESERVED.items():
            if name not in node:
                continue
            reserved[name] = node[name]
            if not _accepts(expected, node[name]):
                self._refuse(_below(key, name), expected, as_yaml(node[name]))

        # Arguments of the target.
        if is_partial or "_args_" in node:
            extra = None
        arguments = {name: value for name, value in node.items() if name not in reserved}
        fields = self._fields(arguments, parameters_of(target), key, node["_target_"], extra)
        return {**reserved, **fields}

    def _fields(
        self,
        values: Mapping,
        parameters: _Parameters,
        key: str,
        owner: str = "",
        extra: Collection[str] | None = None,
    ) -> dict[str, Any]:
        """Check the arguments of a target, or the fields of a record.

        Args:
            values: The values by name.
            parameters: What the owner takes.
            key: Key of the mapping.
            owner: Name of the owner, for messages; "" for the configuration itself.
            extra: See the class.
        """
        # Unknown names and wrong types.
        fields = {}
        for name, value in values.items():
            if name not in parameters.kinds and not parameters.takes_more:
                self.faults.append(_unknown(key, name, owner, parameters.kinds))
            kind = parameters.kinds.get(name, Any)
            extra_below = None if owner == "" else ()
            fields[name] = self._value(value, kind, _below(key, name), extra_below)

        # Missing names.
        if extra is not None:
            for name in parameters.required:
                if name not in values and name not in extra:
                    expected = describe(parameters.kinds[name])
                    self.faults.append(f"{_below(key, name)} is missing; it must be {expected}")
        return fields


def _item_kind(kind: Any) -> Any:
    """Return the annotation of a list's items, from the first list in the annotation."""
    for option in _options(kind):
        if _is_list(option) and get_args(option):
            return get_args(option)[0]
    return Any


def _origin(node: Any, path: str) -> str:
    """Return " from ..." for a value that is an interpolation, as num_classes: ${...} is."""
    written = _at(OmegaConf.to_container(node) if OmegaConf.is_config(node) else {}, path)
    return f" from {written}" if isinstance(written, str) and "${" in written else ""


def _at(node: Any, path: str) -> Any:
    """Return the value at a path such as sizes.tiny.decoder, or None."""
    for part in filter(None, path.split(".")):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


def _below(key: str, name: Any) -> str:
    return f"{key}.{name}" if key else str(name)


def _has_target(value: Any) -> bool:
    if isinstance(value, Mapping):
        return "_target_" in value or any(map(_has_target, value.values()))
    return isinstance(value, list) and any(map(_has_target, value))


def _unknown(key: str, name: str, owner: str, options: Collection[str]) -> str:
    """Return the message for an unknown option, with the nearest one or the first twelve."""
    near = difflib.get_close_matches(str(name), options, n=1)
    if near:
        advice = f"did you mean {_below(key, near[0])}?"
    else:
        first = [*options][:12] + ["..."] * (len(options) > 12)
        advice = f"it takes {', '.join(first) or 'none'}"
    return f"{_below(key, name)} is no option of {owner}; {advice}"


# --------------------------------------------------------------------------------------------------
# Targets and their parameters
# --------------------------------------------------------------------------------------------------


class _Parameters(NamedTuple):
    """The parameters of a class or function.

    Attributes:
        kinds: The annotation of every parameter.
        required: Names of the parameters without a default.
        takes_more: Whether other arguments are accepted, unchecked.
    """

    kinds: Mapping[str, Any]
    required: Sequence[str]
    takes_more: bool


def _target(name: Any) -> Any:
    """Return the object of a name; the ValueError is read after the key."""
    if not isinstance(name, str):
        raise ValueError(f"must be the name of a class or a function, got {as_yaml(name)}")
    package, _, path = name.partition(".")
    is_ours = package == "oss_exp"

    try:
        target = named_object(name) if is_ours else get_object(name)
    except Exception as error:
        if str(error).startswith(f"is {name}"):
            raise ValueError(str(error)) from None
        options = [*oss_exp.PUBLIC, *oss_exp.CONFIGURED] if is_ours else []
        near = difflib.get_close_matches(path, options, n=1)
        advice = f"; did you mean oss_exp.{near[0]}?" if near else ""
        raise ValueError(
            f"must be the name of a class or a function, got {name!r}{advice}"
        ) from None

    if not callable(target):
        raise ValueError(f"must be the name of a class or a function, got {name!r}")
    return target


@cache
def parameters_of(target: Callable) -> _Parameters:
    """Return the parameters of a class or function.

    `**others` of a class of this package stand for the parameters of its base class, if that is
    one of this package too.
    """
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):  # some of those written in C
        return _Parameters({}, (), True)

    hints = _hints(target)
    kinds: dict[str, Any] = {}
    required: list[str] = []
    takes_more = False

    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            # Required parameters of the base are not required here: the class may set them.
            base = _next_constructor(target)
            inherited = _Parameters({}, (), True) if base is None else parameters_of(base)
            kinds = {**inherited.kinds, **kinds}
            takes_more = inherited.takes_more
        elif parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            kind = hints.get(name, Any)
            kinds[name] = kind if _is_ours(target) else _loosened(kind, parameter.default)
            if parameter.default is parameter.empty:
                required.append(name)

    return _Parameters(kinds, tuple(required), takes_more)


def _is_ours(target: Any) -> bool:
    return str(getattr(target, "__module__", "")).partition(".")[0] == "oss_exp"


def _next_constructor(target: Any) -> type | None:
    """Return the class of this package to whose constructor `target` passes its `**others`."""
    if not inspect.isclass(target):
        return None
    owners = [base for base in target.__mro__ if "__init__" in vars(base)]
    if len(owners) > 1 and _is_ours(owners[0]) and _is_ours(owners[1]):
        return owners[1]
    return None


def _hints(target: Any) -> Mapping[str, Any]:
    """Return the annotations of a target; of other libraries those that can be evaluated."""
    holder = target if is_dataclass(target) or not inspect.isclass(target) else target.__init__
    try:
        return get_type_hints(holder, include_extras=True)
    except Exception:
        if _is_ours(target):
            raise

    # One by one.
    hints = {}
    names = vars(sys.modules[target.__module__])
    for name, written in inspect.get_annotations(holder).items():
        with suppress(Exception):
            hints[name] = eval(written, dict(names)) if isinstance(written, str) else written
    return hints


def _loosened(kind: Any, default: Any) -> Any:
    """Return the annotation of another library's parameter, as far as it can be trusted.

    The length of tuples and the entries of mappings are left out, and null is accepted where it
    is the default.
    """
    options = []
    for option in _options(kind):
        items = [_loosened(item, ...) for item in get_args(option) if item is not Ellipsis]
        if get_origin(option) in (dict, Mapping):
            options.append(dict)
        elif _is_list(option):
            options.append(list[Union[tuple(items)]] if items else list)  # noqa: UP007
        else:
            options.append(option)
    if default is None:
        options.append(type(None))
    return Union[tuple(options)]  # noqa: UP007  (its members are computed)


def _fits(target: Any, is_partial: bool, kind: Any) -> bool:
    """Tell whether the result of `target` may be of a kind, as far as annotations say."""
    if is_partial:
        return any(option is Any or not inspect.isclass(option) for option in _options(kind))
    result = target
    if not inspect.isclass(target):
        result = _hints(target).get("return")
        owner = getattr(target, "__self__", None)  # of a class method that returns its class
        if inspect.isclass(owner) and not inspect.isclass(result):
            result = owner
    if not inspect.isclass(result):
        return True
    return any(_is_kind(result, option) for option in _options(kind))


def _is_kind(result: type, kind: Any) -> bool:
    """Tell whether a class is of the kind that one option of an annotation asks for."""
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if kind is Any or kind is object:
        return True
    if kind is None or kind is type(None):
        return False
    if not inspect.isclass(kind) or get_origin(kind) is not None:
        return get_origin(kind) is not Literal

    # Of a protocol the methods count; other attributes may be set by the constructor.
    if is_protocol(kind):
        members = get_protocol_members(kind)
        methods = [name for name in members if callable(getattr(kind, name, None))]
        return all(hasattr(result, name) for name in methods)
    return issubclass(result, kind)


# --------------------------------------------------------------------------------------------------
# Values and their annotations
# --------------------------------------------------------------------------------------------------


def _options(kind: Any) -> Iterator[Any]:
    """Yield the members of a union, or the annotation itself."""
    if get_origin(kind) in (Union, types.UnionType):
        for member in get_args(kind):
            yield from _options(member)
    else:
        yield kind


def _metadata(kind: Any) -> tuple[Any, ...]:
    return get_args(kind)[1:] if get_origin(kind) is Annotated else ()


def _is_list(kind: Any) -> bool:
    origin = get_origin(kind) or kind
    if not inspect.isclass(origin) or origin is str:
        return False
    return origin is Iterable or issubclass(origin, list | tuple | Sequence)


def _accepts(kind: Any, value: Any) -> bool:
    return any(_accepts_one(option, value) for option in _options(kind))


def _accepts_one(kind: Any, value: Any) -> bool:
    # Annotations that pydantic need not see.
    if kind is Any or kind is object or isinstance(kind, typing.TypeVar):
        return True
    if kind is None or kind is type(None):
        return value is None

    if get_origin(kind) is Callable or kind is Callable:
        return False
    if _is_object(kind):
        # An interpolation can be an object, as ${hydra:mode} is; a protocol raises TypeError.
        with suppress(TypeError):
            return isinstance(value, kind)
        return False

    if get_origin(kind) is Literal:  # for pydantic, true is a 1 here
        return any(type(value) is type(choice) and value == choice for choice in get_args(kind))

    # Everything else, by the rules of JSON.
    try:
        _adapter(kind).validate_json(json.dumps(value, default=str))
    except ValidationError:
        return False
    except (PydanticSchemaGenerationError, PydanticUserError):
        return True  # an annotation of another library that pydantic does not know
    return True


def _is_object(kind: Any) -> bool:
    """Tell whether only a `_target_` can make such a value."""
    if not inspect.isclass(kind) or get_origin(kind) is not None or kind is Any:
        return False
    return not issubclass(kind, PLAIN)


def _is_record(kind: Any) -> bool:
    """Tell whether it is a dataclass of plain values, for which a mapping of fields is enough."""
    if not inspect.isclass(kind) or not is_dataclass(kind) or inspect.isabstract(kind):
        return False
    for annotation in parameters_of(kind).kinds.values():
        if any(_is_object(option) for option in _options(annotation)):
            return False
    return True


PLAIN = (bool, int, float, str, Path, list, tuple, dict, type(None))


@cache
def _adapter(kind: Any) -> TypeAdapter:
    return TypeAdapter(kind, config=STRICT)


# Singular with its article, and plural.
WORDS = {
    int: ("a whole number", "whole numbers"),
    float: ("a finite number", "finite numbers"),
    Path: ("a path", "paths"),
    str: ("text", "texts"),
    bool: ("true or false", "true or false"),
    Any: ("anything", "anything"),
    dict: ("a mapping", "mappings"),
    None: ("null", "null"),
    type(None): ("null", "null"),
}


def describe(kind: Any, plural: bool = False) -> str:
    """Return the words for an annotation, such as "a whole number of at least 1".

    A text in `Annotated[..., text]` follows the words for the type.
    """
    # Unions, bounds, choices.
    options = list(_options(kind))
    if len(options) > 1:
        words = [describe(option, plural) for option in options if option is not type(None)]
        if len(words) < len(options):
            words.append("null")
        return " or ".join([", ".join(words[:-1]), words[-1]])

    if get_origin(kind) is Annotated:
        inner, *metadata = get_args(kind)
        return describe(inner, plural) + _bounds(metadata)
    if get_origin(kind) is Literal:
        choices = ", ".join(map(_word, get_args(kind)))
        return f"each one of {choices}" if plural else f"one of {choices}"

    # Types.
    if get_origin(kind) in (dict, Mapping):
        kind = dict
    if kind in WORDS:
        return WORDS[kind][plural]
    if _is_list(kind):
        return _describe_list(kind, "lists" if plural else "a list")
    if _is_record(kind):
        return f"a mapping of {', '.join(parameters_of(kind).kinds)}"
    name = getattr(kind, "__name__", str(kind))
    return f"a {name} (a mapping with _target_)"


def _describe_list(kind: Any, noun: str) -> str:
    """Return the words for a list, such as "a list of whole numbers"."""
    items = [item for item in get_args(kind) if item is not Ellipsis]
    if get_origin(kind) is tuple and Ellipsis not in get_args(kind) and items:
        noun = f"{noun} of {len(items)}"
        return f"{noun} {describe(items[0], plural=True)}" if len(set(items)) == 1 else noun
    if items and items[0] is not Any:
        return f"{noun} of {describe(items[0], plural=True)}"
    return noun


def _bounds(metadata: Sequence[Any]) -> str:
    """Return the words for the bounds of an annotated number, with a space before them."""
    words = ""
    low = None
    high = None

    for entry in metadata:
        if isinstance(entry, annotated_types.Ge):
            low = entry.ge
        elif isinstance(entry, annotated_types.Le):
            high = entry.le
        elif isinstance(entry, annotated_types.Gt):
            words += f" above {entry.gt}"
        elif isinstance(entry, annotated_types.Lt):
            words += f" below {entry.lt}"
        elif isinstance(entry, str):
            words += f" {entry}"

    # Closed ends before open ones.
    if low is not None and high is not None:
        return f" from {low} to {high}{words}"
    if low is not None:
        return f" of at least {low}{words}"
    if high is not None:
        return f" of at most {high}{words}"
    return words


def _example(kind: Any) -> str:
    """Return what may stand behind "key=": the choices if there are some, or VALUE."""
    choices: list[Any] = []
    for option in _options(kind):
        if get_origin(option) is Literal:
            choices += get_args(option)
    return "|".join(map(_word, choices)) if choices else "VALUE"


def _word(value: Any) -> str:
    return value if isinstance(value, str) else as_yaml(value)


def as_yaml(value: Any) -> str:
    """Return a value as a yaml has it: null, true, nan, [1, 2], {a: 1}; text is quoted."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {as_yaml(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(as_yaml, value)) + "]"
    return repr(value)


# --------------------------------------------------------------------------------------------------
# What constructors refuse
# --------------------------------------------------------------------------------------------------


def _cause(error: BaseException) -> BaseException:
    while isinstance(error, InstantiationException) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _with_key(key: str, node: Any, written: Any, error: BaseException) -> Exception:
    """Return an error for the user: with the full key of the value or node that it is about.

    Args:
        key: Key of the node.
        node: The node without interpolations.
        written: The node with its interpolations.
        error: The error of the constructor.
    """
    text = str(error)
    if not isinstance(error, ValueError | TypeError | OSError | RuntimeError | ImportError):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__

    # "sizes.tiny.decoder: tile must be ..." is about sizes.tiny.decoder.tile.
    if (part := re.match(r"([\w.]+): (\w+) ", text)) and part[2] in (_at(node, part[1]) or ()):
        path = f"{part[1]}.{part[2]}"
        text = f"{part[1]}.{text[part.start(2) :]}{_origin(written, path)}"

    # The key, if the text does not begin with it, or with its end.
    last = key.rpartition(".")[2]
    if (name := re.match(r"(\w+)( must| is| has|=|\.|:)", text)) and name[1] in (node or ()):
        text = f"{key}.{text}"
    elif re.search(rf"(?<![\w.]){re.escape(key)}[.=]", text):
        pass
    elif re.match(rf"{re.escape(last)}[.=]", text):
        text = key.removesuffix(last) + text
    else:
        text = f"{key}: {text}"

    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(text)
    return OSError(text) if isinstance(error, OSError) else ValueError(text)
