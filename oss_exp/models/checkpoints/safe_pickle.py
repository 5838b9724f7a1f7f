"""Pickled networks without their code: the `.pkl` files of EDM and its kin, read and never run.

Such a file is a program: it names functions, gives them arguments, and carries the source of its classes. Here every
name is looked up in a short table of stand-ins that only keep what they are given; any other name, and every opcode
that could go around the table, is refused. Tensors are made after that, from sizes that were checked, so no object of
torch is ever within the pickle's reach.

A pickle has a limited number of steps, each of which makes one object; no tensor is larger than its bytes.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

STEPS = 1 << 22  # of a pickle; a network of a thousand layers needs a hundred thousand

# All that a pickle can do with what is on its stack: call it, `__new__` it, `__setstate__` it or else set its
# attributes, append to it and set its items. So a stand-in is a class with slots and a `__setstate__`.


class Ignored:
    """What weights do not need: NumPy's numbers among a network's arguments."""

    __slots__ = ()

    def __new__(cls, *_: Any) -> Ignored:
        return object.__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


class Dict(dict):
    """An OrderedDict or an EasyDict: its items, and no attributes."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass


class Module:
    """A network or a part of it: the `__dict__` that it was pickled with."""

    __slots__ = ("state",)

    def __new__(cls, meta: Any = None) -> Module:
        """meta: what `torch_utils.persistence` makes the object of: {state: __dict__, module_src: source, ...}."""
        self = object.__new__(cls)
        self.state = None if meta is None else meta["state"]
        return self

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def part(self, name: str, path: Path) -> dict[str, Any]:
        """`_parameters`, `_buffers` or `_modules`, less the absent ones."""
        found = self.state.get(name, {}) if isinstance(self.state, dict) else None
        if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
            raise ValueError(
                f"{path} holds a network whose {name} are not named; download it again"
            )
        return {key: value for key, value in found.items() if value is not None}


class Storage:
    """The bytes of a tensor: themselves a torch file of the old kind."""

    __slots__ = ("file",)

    def __init__(self, file: bytes):
        self.file = file

    def __setstate__(self, state: Any) -> None:
        raise TypeError("a storage has no state")


class Stored:
    """A tensor as it is stored."""

    __slots__ = ("offset", "shape", "storage", "stride")

    def __init__(self, storage: Storage, offset: int, shape: tuple, stride: tuple, *_: Any):
        self.storage, self.offset, self.shape, self.stride = storage, offset, shape, stride

    def __setstate__(self, state: Any) -> None:
        raise TypeError("a tensor has no state")

    def tensor(self) -> Tensor:
        """TypeError or ValueError where the numbers are none, or point outside of the storage."""
        if not (
            type(self.storage) is Storage
            and type(self.shape) is tuple
            and type(self.stride) is tuple
        ):
            raise TypeError("not a tensor's storage, shape and stride")
        numbers = (self.offset, *self.shape, *self.stride)
        if len(self.shape) != len(self.stride) or not all(
            type(number) is int and number >= 0 for number in numbers
        ):
            raise ValueError("shape, stride and offset must be whole numbers of at least 0")
        if self.storage.file.startswith(b"PK"):  # which may unpack to more
            raise ValueError("its numbers are an archive")
        storage = torch.load(io.BytesIO(self.storage.file), map_location="cpu", weights_only=True)
        flat = torch.empty(0, dtype=storage.dtype).set_(storage)
        last = self.offset + sum(
            (n - 1) * step for n, step in zip(self.shape, self.stride, strict=True)
        )
        if prod(self.shape) > len(flat) or (prod(self.shape) and last >= len(flat)):
            raise ValueError(
                f"{self.shape} at {self.offset} by {self.stride} is not within {len(flat)} numbers"
            )
        return flat.as_strided(self.shape, self.stride, self.offset).clone(
            memory_format=torch.contiguous_format
        )


class Parameter:
    """The tensor that it wraps."""

    __slots__ = ()

    def __new__(cls, data: Any, *_: Any) -> Any:
        return data

    def __setstate__(self, state: Any) -> None:
        raise TypeError("a parameter has no state")


STAND_INS: dict[tuple[str, str], type] = {
    ("collections", "OrderedDict"): Dict,
    ("dnnlib.util", "EasyDict"): Dict,
    ("builtins", "set"): set,
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): Module,
    ("torch.nn.modules.container", "ModuleDict"): Module,
    ("torch._utils", "_rebuild_tensor_v2"): Stored,
    ("torch._utils", "_rebuild_parameter"): Parameter,
    ("torch.storage", "_load_from_bytes"): Storage,
    **{
        (module, name): Ignored
        for module, names in {
            "numpy": ("dtype", "ndarray"),
            "numpy.core.multiarray": ("_reconstruct", "scalar"),
            "numpy._core.multiarray": ("_reconstruct", "scalar"),
        }.items()
        for name in names
    },
}
# Objects from outside of the file, names that are not looked up by `find_class`, and memory before it is filled.
REFUSED = (
    "PERSID",
    "BINPERSID",
    "EXT1",
    "EXT2",
    "EXT4",
    "INST",
    "OBJ",
    "NEXT_BUFFER",
    "READONLY_BUFFER",
    "BYTEARRAY8",
)


class Bounded(io.BufferedReader):
    """A file from which no more than STEPS pieces are read, as a pickle takes one for every step."""

    def __init__(self, path: Path):
        super().__init__(io.FileIO(path))
        self.steps = 0

    def read(self, size: int | None = -1) -> bytes:
        self.steps += 1
        if self.steps > STEPS:
            raise ValueError(f"more than {STEPS:,} steps")
        return super().read(size)


class Refused(Exception):
    """What the file asks for and does not get."""


def _refuse(opcode: str, _: Any) -> None:
    raise Refused(f"the opcode {opcode}")


def _skip_frame(unpickler: Any) -> None:
    """Take a frame's length alone: every step then reads the file itself, where it is counted."""
    unpickler.read(8)


class _Unpickler(
    pickle._Unpickler
):  # the one in C cannot be kept from copyreg's cache of extensions
    dispatch = pickle._Unpickler.dispatch | {
        getattr(pickle, name)[0]: partial(_refuse, name) for name in REFUSED
    }
    dispatch[pickle.FRAME[0]] = _skip_frame

    def find_class(self, module: str, name: str) -> type:
        if (module, name) not in STAND_INS:
            raise Refused(f"{f'{module}.{name}'!r:.200}")
        return STAND_INS[module, name]


def load(path: Path) -> Any:
    """What the file holds, in stand-ins. ValueError where it is no whole pickle, or asks for anything else."""
    try:
        with Bounded(path) as file:
            return _Unpickler(file).load()
    except Refused as request:
        raise ValueError(
            f"{path} was refused and nothing of it was run: it asks for {request}, which no weights need; "
            "take the file from those who published it"
        ) from None
    except Exception as error:  # whatever the bytes make the machine do
        raise ValueError(
            f"{path} is damaged or no pickle of a network ({error!r:.200}); download it again"
        ) from None


def tensors_of(tree: Any, path: Path) -> dict[str, Any]:
    """Of a network: its tensors by the keys of its state dict. Of a dict: its tensors and whatever else it holds.

    ValueError, naming `path`, where it is neither or a tensor is not within its bytes.
    """
    if isinstance(tree, Module):
        tree = dict(_state(tree, path))
    if not isinstance(tree, dict):
        raise ValueError(
            f"{path} holds no network but a {type(tree).__name__}; give the file of a network"
        )
    return {
        key: _tensor(value, key, path) if isinstance(value, Stored) else value
        for key, value in tree.items()
    }


def _tensor(stored: Stored, key: Any, path: Path) -> Tensor:
    try:
        return stored.tensor()
    except Exception as error:  # torch's own too
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{path} is damaged: {key!r:.100} cannot be read ({reason:.200}); download it again"
        ) from None


def _state(network: Module, path: Path) -> Iterator[tuple[str, Stored]]:
    """Keys and tensors of a module and of all within it."""
    ahead, seen = [("", network)], set()
    while ahead:
        prefix, module = ahead.pop()
        if not isinstance(module, Module) or id(module) in seen:
            raise ValueError(
                f"{path} holds no module, or one for the second time, at {prefix[:-1]!r}; download it again"
            )
        seen.add(id(module))
        passing = (
            module.state.get("_non_persistent_buffers_set")
            if isinstance(module.state, dict)
            else None
        )
        own = module.part("_parameters", path) | {
            key: value
            for key, value in module.part("_buffers", path).items()
            if not (isinstance(passing, set) and key in passing)
        }
        for key, value in own.items():
            if not isinstance(value, Stored):
                raise ValueError(
                    f"{path} holds a {type(value).__name__} for the tensor {prefix}{key}; download it again"
                )
            yield f"{prefix}{key}", value
        ahead += [
            (f"{prefix}{key}.", inner)
            for key, inner in reversed(module.part("_modules", path).items())
        ]
