"""A reader for pickled networks, such as the `.pkl` files of EDM, that runs none of their code.

A pickle is a program: it names functions, passes them arguments, and carries the source of its
classes. This reader looks every name up in a short table of stand-ins, which only store what they
receive. It refuses any other name, and every opcode that could circumvent the table. Tensors are
built afterwards, from sizes that were checked, so a pickle never reaches an object of torch.

A pickle has a limited number of steps, each of which makes one object, and no tensor is larger
than its bytes.
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

# ------------------------------------------------------------------------------------------------
# Stand-ins
# ------------------------------------------------------------------------------------------------

# With an object on its stack, a pickle can do no more than call it, call its `__new__` or its
# `__setstate__` or else set its attributes, append to it, and set its items. So every stand-in is
# a class with slots and a `__setstate__`.


class Ignored:
    """An object that weights do not need: NumPy's numbers among a network's arguments."""

    __slots__ = ()

    def __new__(cls, *_: Any) -> Ignored:
        return object.__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


class Dict(dict):
    """The items of an OrderedDict or an EasyDict, without its attributes."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass


class Module:
    """A network or a part of it: the `__dict__` that it was pickled with."""

    __slots__ = ("state",)

    def __new__(cls, meta: Any = None) -> Module:
        """Store the state of an object of `torch_utils.persistence`.

        Args:
            meta: {state: the object's __dict__, module_src: its source, ...}.
        """
        self = object.__new__(cls)
        self.state = None if meta is None else meta["state"]
        return self

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def part(self, name: str, path: Path) -> dict[str, Any]:
        """Return `_parameters`, `_buffers` or `_modules`, without entries of None."""
        entries = self.state.get(name, {}) if isinstance(self.state, dict) else None
        if not isinstance(entries, dict) or not all(isinstance(key, str) for key in entries):
            raise ValueError(
                f"{path} holds a network whose {name} are not named; download it again"
            )
        return {key: value for key, value in entries.items() if value is not None}


class Storage:
    """The bytes of a tensor, which are a torch file of the old kind."""

    __slots__ = ("file",)

    def __init__(self, file: bytes):
        self.file = file

    def __setstate__(self, state: Any) -> None:
        raise TypeError("a storage has no state")


class Stored:
    """A tensor as it is stored."""

    __slots__ = ("offset", "shape", "storage", "stride")

    def __init__(self, storage: Storage, offset: int, shape: tuple, stride: tuple, *_: Any):
        self.storage = storage
        self.offset = offset
        self.shape = shape
        self.stride = stride

    def __setstate__(self, state: Any) -> None:
        raise TypeError("a tensor has no state")

    def tensor(self) -> Tensor:
        """Build the tensor. Raises TypeError or ValueError if it is not within its storage."""
        self._check()
        storage = torch.load(io.BytesIO(self.storage.file), map_location="cpu", weights_only=True)
        flat = torch.empty(0, dtype=storage.dtype).set_(storage)

        # Bounds.
        last = self.offset
        for size, stride in zip(self.shape, self.stride, strict=True):
            last += (size - 1) * stride
        if prod(self.shape) > len(flat) or (prod(self.shape) and last >= len(flat)):
            raise ValueError(
                f"{self.shape} at {self.offset} by {self.stride} is not within {len(flat)} numbers"
            )
        view = flat.as_strided(self.shape, self.stride, self.offset)
        return view.clone(memory_format=torch.contiguous_format)

    def _check(self) -> None:
        """Raise TypeError or ValueError for arguments of the wrong kind."""
        kinds = (type(self.storage), type(self.shape), type(self.stride))
        if kinds != (Storage, tuple, tuple):
            raise TypeError("not a tensor's storage, shape and stride")
        numbers = (self.offset, *self.shape, *self.stride)
        whole = all(type(number) is int and number >= 0 for number in numbers)
        if len(self.shape) != len(self.stride) or not whole:
            raise ValueError("shape, stride and offset must be whole numbers of at least 0")
        if self.storage.file.startswith(b"PK"):  # an archive may unpack to more than its bytes
            raise ValueError("its numbers are an archive")


class Parameter:
    """A parameter's tensor, without its wrapper."""

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
    ("numpy", "dtype"): Ignored,
    ("numpy", "ndarray"): Ignored,
    ("numpy.core.multiarray", "_reconstruct"): Ignored,
    ("numpy.core.multiarray", "scalar"): Ignored,
    ("numpy._core.multiarray", "_reconstruct"): Ignored,
    ("numpy._core.multiarray", "scalar"): Ignored,
}

# ------------------------------------------------------------------------------------------------
# The reader
# ------------------------------------------------------------------------------------------------

# Opcodes for objects from outside of the file, for names that bypass `find_class`, and for memory
# that is taken before it is filled.
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
    """A file that yields at most STEPS pieces; a pickle reads one for every step."""

    def __init__(self, path: Path):
        super().__init__(io.FileIO(path))
        self.steps = 0

    def read(self, size: int | None = -1) -> bytes:
        self.steps += 1
        if self.steps > STEPS:
            raise ValueError(f"more than {STEPS:,} steps")
        return super().read(size)


class Refused(Exception):
    """A request of the file that is not granted."""


def _refuse(opcode: str, _: Any) -> None:
    raise Refused(f"the opcode {opcode}")


def _skip_frame(unpickler: Any) -> None:
    """Read a frame's length only, so that every step reads from the file, where it is counted."""
    unpickler.read(8)


# Python's unpickler, as the one in C cannot be kept from the extension cache of copyreg.
class _Unpickler(pickle._Unpickler):
    dispatch = pickle._Unpickler.dispatch | {
        getattr(pickle, name)[0]: partial(_refuse, name) for name in REFUSED
    }
    dispatch[pickle.FRAME[0]] = _skip_frame

    def find_class(self, module: str, name: str) -> type:
        if (module, name) not in STAND_INS:
            raise Refused(f"{f'{module}.{name}'!r:.200}")
        return STAND_INS[module, name]


def load(path: Path) -> Any:
    """Return the content of a pickle, with stand-ins for its objects.

    Raises:
        ValueError: If the file is no whole pickle, or requests anything but a stand-in.
    """
    try:
        with Bounded(path) as file:
            return _Unpickler(file).load()
    except Refused as request:
        raise ValueError(
            f"{path} was refused and nothing of it was run: it asks for {request}, which no "
            "weights need; take the file from those who published it"
        ) from None
    except Exception as error:  # damaged bytes can raise anything
        raise ValueError(
            f"{path} is damaged or no pickle of a network ({error!r:.200}); download it again"
        ) from None


# ------------------------------------------------------------------------------------------------
# Tensors
# ------------------------------------------------------------------------------------------------


def tensors_of(tree: Any, path: Path) -> dict[str, Any]:
    """Return the tensors of a network by the keys of its state dict.

    Args:
        tree: A `Module`, or a dict, whose other entries are returned as they are.
        path: The file, for messages.

    Raises:
        ValueError: If it is neither, or a tensor is not within its bytes.
    """
    if isinstance(tree, Module):
        tree = dict(_state(tree, path))
    if not isinstance(tree, dict):
        raise ValueError(
            f"{path} holds no network but a {type(tree).__name__}; give the file of a network"
        )
    tensors = {}
    for key, value in tree.items():
        tensors[key] = _tensor(value, key, path) if isinstance(value, Stored) else value
    return tensors


def _tensor(stored: Stored, key: Any, path: Path) -> Tensor:
    try:
        return stored.tensor()
    except Exception as error:  # torch's own too
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{path} is damaged: {key!r:.100} cannot be read ({reason:.200}); download it again"
        ) from None


def _state(network: Module, path: Path) -> Iterator[tuple[str, Stored]]:
    """Yield keys and tensors of a module and of all modules within it, depth first."""
    stack = [("", network)]
    visited = set()
    while stack:
        prefix, module = stack.pop()
        if not isinstance(module, Module) or id(module) in visited:
            raise ValueError(
                f"{path} holds no module, or one for the second time, at {prefix[:-1]!r}; "
                "download it again"
            )
        visited.add(id(module))

        # Tensors.
        for key, value in _persistent(module, path).items():
            if not isinstance(value, Stored):
                raise ValueError(
                    f"{path} holds a {type(value).__name__} for the tensor {prefix}{key}; "
                    "download it again"
                )
            yield f"{prefix}{key}", value

        # Modules, the first on top.
        for key, inner in reversed(module.part("_modules", path).items()):
            stack.append((f"{prefix}{key}.", inner))


def _persistent(module: Module, path: Path) -> dict[str, Any]:
    """Return the parameters and buffers of a module that belong to its state dict."""
    tensors = module.part("_parameters", path)
    transient = None
    if isinstance(module.state, dict):
        transient = module.state.get("_non_persistent_buffers_set")
    for key, value in module.part("_buffers", path).items():
        if not (isinstance(transient, set) and key in transient):
            tensors[key] = value
    return tensors
