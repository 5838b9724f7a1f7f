"""Which of a file's tensors are a network's weights: whatever they were wrapped in, and the averaged ones of several.

A file may hold several sets of weights, in objects within objects or under prefixes of their keys, such as `module.`.
A set is called by the names that lead to it, with dots between them. What fits the network decides, not what a set is
called; of several that fit the average is taken.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from oss_exp.models.checkpoints.safe_pickle import Module, Stored, tensors_of

Tensors = dict[str, Tensor]
Translate = Callable[[Tensors], Mapping[str, Tensor]]

AVERAGED = re.compile(r"(?<![a-z])(ema|averaged?|avg|swa|polyak|shadow)(?![a-z])", re.IGNORECASE)
OURS = "state_dict.model.backbone"  # the average in a last.ckpt of task=pretrain; what is trained is state_dict.network
OTHERS = re.compile(
    r"optim|opt$|(lr_)?sched|scaler|rng|callbacks$|loops$|hyper_param", re.IGNORECASE
)  # what else a training keeps
DEPTH = 4  # objects within objects, and names in a prefix
SHARE = 8  # a set under a prefix has at least this part of its file's keys
SHOWN = 12  # sets and weights in a message


class Sets(NamedTuple):
    """The sets of a file by name, and averages that are no sets of tensors by name."""

    tensors: dict[str, Tensors]
    unread: list[str]


def sets_in(content: Any, path: Path) -> Sets:
    """Sets of an object read from a file; ValueError where it has none."""
    found: dict[str, Tensors] = {}
    unread: list[str] = []
    refused, seen, ahead = None, set(), [("", content)]
    while ahead:
        name, node = ahead.pop(0)
        if id(node) in seen or name.count(".") >= DEPTH:
            continue
        seen.add(id(node))
        try:
            node = tensors_of(node, path) if _is_stored(node) else node
        except ValueError as error:  # it may be of no importance
            refused = refused or error
            continue
        if _is_set(node):
            found[name] = node
        elif isinstance(node, dict):
            below = {
                key: each
                for key, each in node.items()
                if isinstance(key, str) and not OTHERS.match(key)
            }
            ahead += [
                (_below(name, key), each)
                for key, each in below.items()
                if isinstance(each, dict | Module)
            ]
            unread += [_below(name, key) for key, each in below.items() if isinstance(each, list)]
    if not found:
        raise refused or ValueError(_nothing(content, path))
    return Sets(
        {name: _plain(tensors, path) for name, tensors in found.items()},
        list(filter(AVERAGED.search, unread)),
    )


def named(sets: Sets, path: Path, weights_set: str | None = None) -> Tensors:
    """The set of that name; null: the only one, or the only average."""
    names = [weights_set] if weights_set is not None else _preferred(list(sets.tensors))
    if len(names) != 1 or names[0] not in sets.tensors:
        raise ValueError(_choose(path, sets.tensors, weights_set))
    return sets.tensors[names[0]]


def fitting(
    sets: Sets,
    path: Path,
    own: Mapping[str, Tensor],
    translate: Translate,
    weights_set: str | None,
    model: str,
) -> Mapping[str, Tensor]:
    """The tensors of a file, by a network's keys, that are its weights `own`.

    translate: a file's tensors by the network's keys. ValueError where no set fits; where several do, and none or
    several of them are averages; or where there is an average and it does not fit. model: the network, for the message.
    """
    fits: dict[str, Mapping[str, Tensor]] = {}
    misfits: dict[str, tuple[int, str]] = {}
    refused: Exception | None = None

    def attempt(name: str, tensors: Tensors) -> None:
        nonlocal refused
        if weights_set is not None and f"{name}.".removeprefix(f"{weights_set}.") == f"{name}.":
            return
        try:
            translated = translate(tensors)
        except Exception as error:  # whatever tensors of other networks make it do
            refused = refused or error
            return
        if differences := _differences(own, translated):
            misfits[name] = differences
        else:
            fits[name] = translated

    tried = {**sets.tensors, **_with_dots(sets.tensors)}
    for name, tensors in tried.items():
        attempt(name, tensors)
    for name, tensors in tried.items():
        for prefix, group in _groups(tensors).items() if name not in fits else ():
            attempt(_below(name, prefix[:-1]), group)

    chosen = _preferred(list(fits))
    passed_over = [name for name in (*misfits, *sets.unread) if AVERAGED.search(name)]
    if len(chosen) == 1 and (
        weights_set is not None or not passed_over or AVERAGED.search(chosen[0])
    ):
        return fits[chosen[0]]
    if fits:
        raise ValueError(_choose(path, fits, weights_set, passed_over if len(chosen) == 1 else ()))
    if not misfits:
        raise ValueError(
            _choose(path, sets.tensors, weights_set) if refused is None else f"{path}: {refused}"
        )
    for tensors in tried.values():
        if partial := _partial_prefix(own, tensors, translate):
            prefix, count = partial
            raise ValueError(
                f"checkpoint {path} has the weights of {model}, but {prefix!r:.80} before only {count} of its "
                f"{len(tensors)} names; save it with that before all names or none"
            )
    closest = min(misfits, key=lambda name: misfits[name][0])
    count, first = misfits[closest]
    where = f", in its set {closest!r}," if closest and len(sets.tensors) > 1 else ""
    raise ValueError(
        f"checkpoint {path}{where} is of another architecture than {model}: {count} weights differ, first {first}; "
        "choose the model it was trained as, or another checkpoint"
    )


# --------------------------------------------------------------------------------------------------------------
# Sets
# --------------------------------------------------------------------------------------------------------------


def _is_set(node: Any) -> bool:
    return (
        isinstance(node, dict)
        and bool(node)
        and all(isinstance(key, str) and isinstance(each, Tensor) for key, each in node.items())
    )


def _is_stored(node: Any) -> bool:
    return isinstance(node, Module) or (
        isinstance(node, dict) and any(isinstance(each, Stored) for each in node.values())
    )


def _plain(tensors: Tensors, path: Path) -> Tensors:
    """The tensors, all of which have their numbers in the file."""
    for key, value in tensors.items():
        plain = value.layout is torch.strided and value.device.type == "cpu"
        if not plain or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError(
                f"{path} holds a tensor without its numbers at {key!r:.80}; give a file of weights alone"
            )
    return {key: value.detach() for key, value in tensors.items()}


def _nothing(content: Any, path: Path) -> str:
    """What is said of a file without a set."""
    if not isinstance(content, dict) or not content:
        return f"{path} holds no weights by name but a {type(content).__name__}; give a file of weights"
    strange = next(((key, each) for key, each in content.items() if not isinstance(key, str)), None)
    key, value = strange or next(
        item for item in content.items() if not isinstance(item[1], Tensor | Stored)
    )
    what = (
        f"a {type(value).__name__} at {key!r:.80}"
        if isinstance(key, str)
        else "names that are no text"
    )
    return f"{path} holds {what} where only tensors belong; give a file of weights alone"


def _groups(tensors: Tensors) -> dict[str, Tensors]:
    """{prefix: its tensors by the rest of their keys}, short prefixes first."""
    counts: Counter[str] = Counter()
    for key in tensors:
        parts = key.split(".", DEPTH + 1)[:-1]
        counts.update(
            ".".join(parts[:length]) + "." for length in range(1, min(len(parts), DEPTH) + 1)
        )
    shared = [prefix for prefix, count in counts.items() if count * SHARE >= len(tensors)]
    return {
        prefix: {
            key.removeprefix(prefix): each
            for key, each in tensors.items()
            if key.startswith(prefix)
        }
        for prefix in sorted(shared, key=lambda prefix: (prefix.count("."), prefix))
    }


def _partial_prefix(
    own: Mapping[str, Tensor], tensors: Tensors, translate: Translate
) -> tuple[str, int] | None:
    """The prefix without which a set fits, though only some of its keys have it, and how many have."""
    for prefix, group in _groups(tensors).items():
        plain = {key.removeprefix(prefix): each for key, each in tensors.items()}
        if len(plain) != len(tensors):
            continue
        try:
            fits = _differences(own, translate(plain)) is None
        except Exception:  # whatever tensors of other networks make it do
            continue
        if fits:
            return prefix, len(group)
    return None


def _with_dots(sets: Mapping[str, Tensors]) -> dict[str, Tensors]:
    """Averages that latent diffusion's trainings keep by names without dots, by those of what they are averages of."""
    found = {}
    for outer, tensors in sets.items():
        groups = _groups(tensors)
        flat = {
            prefix: group
            for prefix, group in groups.items()
            if AVERAGED.search(prefix) and "." not in "".join(group)
        }
        for prefix, group in flat.items():
            for other in groups.values():
                names = {key.replace(".", ""): key for key in other}
                if (
                    other is not group and len(group.keys() & names.keys()) >= len(group) - 2
                ):  # decay, num_updates
                    average = {names[key]: each for key, each in group.items() if key in names}
                    found[_below(outer, prefix[:-1])] = {**other, **average}
    return found


def _preferred(names: list[str]) -> list[str]:
    """The averages among several sets; all where there are none."""
    averages = [name for name in names if AVERAGED.search(name) or name == OURS]
    innermost = [
        name for name in averages if AVERAGED.search(name.rpartition(".")[2])
    ]  # ema.ema_model, ema.model
    return (
        names if len(names) < 2 or not averages else innermost if len(innermost) == 1 else averages
    )


def _differences(
    own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> tuple[int, str] | None:
    """How many weights differ, one that has another name counted once, and the first of them."""
    shapes = {
        key: (_shape(tensors.get(key)), _shape(own.get(key)))
        for key in sorted(own.keys() | tensors.keys())
    }
    wrong = {key: pair for key, pair in shapes.items() if pair[0] != pair[1]}
    if not wrong:
        return None
    absent, unknown = sum(key not in tensors for key in wrong), sum(key not in own for key in wrong)
    key, (there, here) = next(iter(wrong.items()))
    return len(wrong) - min(absent, unknown), f"{key}: {there} in the file, {here} in the network"


def _choose(
    path: Path, sets: Mapping[str, Any], weights_set: str | None, passed_over: Sequence[str] = ()
) -> str:
    names = ", ".join(name or "(the whole file)" for name in list(sets)[:SHOWN])
    reason = (
        "holds several sets of weights"
        if weights_set is None
        else f"has no set of weights {weights_set!r:.80}"
    )
    if passed_over:
        reason = f"has an average {passed_over[0]!r:.80}, which is not of these weights or not by their names"
    return f"checkpoint {path} {reason}; choose one with model.weights_set=NAME: {names:.800}"


def _below(outer: str, name: str) -> str:
    return f"{outer}.{name}" if outer else name


def _shape(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else str(tuple(tensor.shape))
