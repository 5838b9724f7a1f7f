"""The sets of weights in a checkpoint, and the choice of the one that fits a network.

A file may hold several sets, in objects within objects or under prefixes of their keys, such as
`module.`. The name of a set is the path of names to it, with dots between them. The choice does
not depend on the name but on whether the set fits the network; if several fit, the average wins.
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

# The average in a last.ckpt of task=pretrain; the weights in training are state_dict.network.
OURS = "state_dict.model.backbone"

# Names of other objects in the checkpoint of a training.
OTHERS = re.compile(
    r"optim|opt$|(lr_)?sched|scaler|rng|callbacks$|loops$|hyper_param", re.IGNORECASE
)

DEPTH = 4  # objects within objects, and names in a prefix
SHARE = 8  # a set under a prefix has at least one in so many of its file's keys
SHOWN = 12  # sets and weights in a message


class Sets(NamedTuple):
    """The sets of a file by name, and the names of averages that are no sets of tensors by name."""

    tensors: dict[str, Tensors]
    unread: list[str]


def sets_in(content: Any, path: Path) -> Sets:
    """Return the sets of an object that was read from a file. Raises ValueError without any."""
    sets: dict[str, Tensors] = {}
    unread: list[str] = []
    first_error: ValueError | None = None

    # Breadth first.
    visited = set()
    queue = [("", content)]
    while queue:
        name, node = queue.pop(0)
        if id(node) in visited or name.count(".") >= DEPTH:
            continue
        visited.add(id(node))

        # A set, or the objects below.
        if _is_stored(node):
            try:
                node = tensors_of(node, path)
            except ValueError as error:  # matters only if there is no other set
                first_error = first_error or error
                continue
        if _is_set(node):
            sets[name] = node
        elif isinstance(node, dict):
            for key, value in node.items():
                if not isinstance(key, str) or OTHERS.match(key):
                    continue
                if isinstance(value, dict | Module):
                    queue.append((_below(name, key), value))
                if isinstance(value, list) and AVERAGED.search(_below(name, key)):
                    unread.append(_below(name, key))

    if not sets:
        raise first_error or ValueError(_nothing(content, path))
    return Sets({name: _plain(tensors, path) for name, tensors in sets.items()}, unread)


def named(sets: Sets, path: Path, weights_set: str | None = None) -> Tensors:
    """Return the set of this name; for None the only one, or the only average."""
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
    """Return the set of a file that fits a network, by the network's keys.

    Args:
        sets: The sets of the file.
        path: The file, for messages.
        own: The network's weights.
        translate: Maps a file's tensors to the network's keys.
        weights_set: Name of the set; None to choose.
        model: Name of the network, for messages.

    Raises:
        ValueError: If no set fits; if several fit, and none or several of them are averages; or if
            there is an average that does not fit.
    """
    candidates = _Candidates(own, translate, weights_set)
    whole = {**sets.tensors, **_with_dots(sets.tensors)}

    # Whole sets first, then those under a prefix.
    for name, tensors in whole.items():
        candidates.add(name, tensors)
    for name, tensors in whole.items():
        if name not in candidates.fits:
            for prefix, group in _groups(tensors).items():
                candidates.add(_below(name, prefix[:-1]), group)

    fits = candidates.fits
    misfits = candidates.misfits

    # The only one that fits, if no average is passed over for it.
    chosen = _preferred(list(fits))
    passed_over = [name for name in (*misfits, *sets.unread) if AVERAGED.search(name)]
    if len(chosen) == 1:
        is_average = AVERAGED.search(chosen[0])
        if weights_set is not None or not passed_over or is_average:
            return fits[chosen[0]]

    # Otherwise, say why.
    if fits:
        raise ValueError(_choose(path, fits, weights_set, passed_over if len(chosen) == 1 else ()))
    if not misfits and candidates.error is not None:
        raise ValueError(f"{path}: {candidates.error}")
    if not misfits:
        raise ValueError(_choose(path, sets.tensors, weights_set))
    for tensors in whole.values():
        if partial := _partial_prefix(own, tensors, translate):
            prefix, count = partial
            raise ValueError(
                f"checkpoint {path} has the weights of {model}, but {prefix!r:.80} before only "
                f"{count} of its {len(tensors)} names; save it with that before all names or none"
            )

    # A set of another network.
    closest = min(misfits, key=lambda name: misfits[name][0])
    count, first = misfits[closest]
    where = f", in its set {closest!r}," if closest and len(sets.tensors) > 1 else ""
    raise ValueError(
        f"checkpoint {path}{where} is of another architecture than {model}: {count} weights "
        f"differ, first {first}; choose the model it was trained as, or another checkpoint"
    )


class _Candidates:
    """Sets of weights that were compared with a network.

    Attributes:
        fits: Sets that fit, by name, with the network's keys.
        misfits: Number of differences and the first one, by name, of sets that do not fit.
        error: The first error of `translate`, or None.
    """

    def __init__(self, own: Mapping[str, Tensor], translate: Translate, weights_set: str | None):
        self.own = own
        self.translate = translate
        self.weights_set = weights_set
        self.fits: dict[str, Mapping[str, Tensor]] = {}
        self.misfits: dict[str, tuple[int, str]] = {}
        self.error: Exception | None = None

    def add(self, name: str, tensors: Tensors) -> None:
        """Compare a set, if it is the named one or within it."""
        if self.weights_set is not None and not f"{name}.".startswith(f"{self.weights_set}."):
            return
        try:
            translated = self.translate(tensors)
        except Exception as error:  # tensors of other networks can raise anything
            self.error = self.error or error
            return
        differences = _differences(self.own, translated)
        if differences is None:
            self.fits[name] = translated
        else:
            self.misfits[name] = differences


# ------------------------------------------------------------------------------------------------
# Sets
# ------------------------------------------------------------------------------------------------


def _is_set(node: Any) -> bool:
    """Tell whether an object is a dict of tensors by name."""
    if not isinstance(node, dict) or not node:
        return False
    return all(isinstance(key, str) and isinstance(value, Tensor) for key, value in node.items())


def _is_stored(node: Any) -> bool:
    """Tell whether an object is a pickled network, or a dict with pickled tensors."""
    if isinstance(node, Module):
        return True
    return isinstance(node, dict) and any(isinstance(value, Stored) for value in node.values())


def _plain(tensors: Tensors, path: Path) -> Tensors:
    """Return detached tensors. Raises ValueError if the numbers of one are not in the file."""
    for key, value in tensors.items():
        plain = value.layout is torch.strided and value.device.type == "cpu"
        if not plain or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError(
                f"{path} holds a tensor without its numbers at {key!r:.80}; "
                "give a file of weights alone"
            )
    return {key: value.detach() for key, value in tensors.items()}


def _nothing(content: Any, path: Path) -> str:
    """Return the message for a file without a set."""
    if not isinstance(content, dict) or not content:
        kind = type(content).__name__
        return f"{path} holds no weights by name but a {kind}; give a file of weights"

    # The first entry that does not belong.
    reason = "names that are no text"
    if all(isinstance(key, str) for key in content):
        for key, value in content.items():
            if not isinstance(value, Tensor | Stored):
                reason = f"a {type(value).__name__} at {key!r:.80}"
                break
    return f"{path} holds {reason} where only tensors belong; give a file of weights alone"


def _groups(tensors: Tensors) -> dict[str, Tensors]:
    """Return {prefix: its tensors by the rest of their keys}, short prefixes first."""
    # Prefixes of a large share of the keys.
    counts: Counter[str] = Counter()
    for key in tensors:
        parts = key.split(".", DEPTH + 1)[:-1]
        for length in range(1, min(len(parts), DEPTH) + 1):
            counts[".".join(parts[:length]) + "."] += 1
    shared = [prefix for prefix, count in counts.items() if count * SHARE >= len(tensors)]
    shared.sort(key=lambda prefix: (prefix.count("."), prefix))

    groups: dict[str, Tensors] = {prefix: {} for prefix in shared}
    for prefix, group in groups.items():
        for key, value in tensors.items():
            if key.startswith(prefix):
                group[key.removeprefix(prefix)] = value
    return groups


def _partial_prefix(
    own: Mapping[str, Tensor], tensors: Tensors, translate: Translate
) -> tuple[str, int] | None:
    """Return a prefix of some keys only, without which the set fits, and the number of those."""
    for prefix, group in _groups(tensors).items():
        plain = {key.removeprefix(prefix): value for key, value in tensors.items()}
        if len(plain) != len(tensors):
            continue
        try:
            fits = _differences(own, translate(plain)) is None
        except Exception:  # tensors of other networks can raise anything
            continue
        if fits:
            return prefix, len(group)
    return None


def _with_dots(sets: Mapping[str, Tensors]) -> dict[str, Tensors]:
    """Return averages whose names lost their dots, under the names of the weights they average.

    Latent diffusion saves its averages so.
    """
    averages = {}
    for outer, tensors in sets.items():
        groups = _groups(tensors)

        # A prefix of averages without dots.
        for prefix, group in groups.items():
            if not AVERAGED.search(prefix) or "." in "".join(group):
                continue

            # The weights that it averages: all its names but decay and num_updates are theirs.
            for other in groups.values():
                names = {key.replace(".", ""): key for key in other}
                if other is group or len(group.keys() & names.keys()) < len(group) - 2:
                    continue

                average = dict(other)
                for key, value in group.items():
                    if key in names:
                        average[names[key]] = value
                averages[_below(outer, prefix[:-1])] = average
    return averages


def _preferred(names: list[str]) -> list[str]:
    """Return the averages among several sets, the innermost if it is one; all without averages."""
    averages = [name for name in names if AVERAGED.search(name) or name == OURS]
    if len(names) < 2 or not averages:
        return names

    # Of ema.ema_model and ema.model, the former.
    innermost = [name for name in averages if AVERAGED.search(name.rpartition(".")[2])]
    return innermost if len(innermost) == 1 else averages


# ------------------------------------------------------------------------------------------------
# Differences
# ------------------------------------------------------------------------------------------------


def _differences(
    own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> tuple[int, str] | None:
    """Return the number of weights that differ, and the first one; None if there are none.

    A weight under another name counts once.
    """
    count = 0
    absent = 0
    unknown = 0
    first = ""
    for key in sorted(own.keys() | tensors.keys()):
        in_file = _shape(tensors.get(key))
        in_network = _shape(own.get(key))
        if in_file == in_network:
            continue
        count += 1
        absent += key not in tensors
        unknown += key not in own
        first = first or f"{key}: {in_file} in the file, {in_network} in the network"
    return (count - min(absent, unknown), first) if count else None


def _choose(
    path: Path, sets: Mapping[str, Any], weights_set: str | None, passed_over: Sequence[str] = ()
) -> str:
    """Return the message that asks for a choice of a set."""
    names = ", ".join(name or "(the whole file)" for name in list(sets)[:SHOWN])
    if passed_over:
        average = f"{passed_over[0]!r:.80}"
        reason = f"has an average {average}, which is not of these weights or not by their names"
    elif weights_set is None:
        reason = "holds several sets of weights"
    else:
        reason = f"has no set of weights {weights_set!r:.80}"
    return f"checkpoint {path} {reason}; choose one with model.weights_set=NAME: {names:.800}"


def _below(outer: str, name: str) -> str:
    return f"{outer}.{name}" if outer else name


def _shape(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else str(tuple(tensor.shape))
