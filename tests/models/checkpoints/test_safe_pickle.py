"""Pickled networks give their tensors; other things in a pickle are refused and never run."""

import copyreg
import importlib
import os
import pickle
import random
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

from oss_exp.models.checkpoints.safe_pickle import STAND_INS, load, tensors_of
from oss_exp.models.checkpoints.weights import read

# --------------------------------------------------------------------------------------------------
# A network as the public files have it
# --------------------------------------------------------------------------------------------------


class Persistent(nn.Module):
    """A module pickled as `torch_utils.persistence` does it, with source, name and state."""

    def __init__(self, *args):
        super().__init__()
        self._init_args = args
        self._init_kwargs = sys.modules["dnnlib.util"].EasyDict(init_weight=np.sqrt(1 / 3))

    def __reduce__(self):
        meta = {
            "type": "class",
            "version": 6,
            "module_src": "raise SystemExit",
            "class_name": type(self).__name__,
        }
        return (
            sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj,
            (meta | {"state": vars(self)},),
            None,
        )


class Layer(Persistent):
    def __init__(self, width):
        super().__init__(width)
        self.weight = nn.Parameter(torch.randn(width, 2, 3))
        self.bias = nn.Parameter(torch.randn(width).half())
        self.absent = None
        self.skip_scale = np.sqrt(0.5)
        self.register_parameter("gain", None)
        self.register_buffer(
            "resample_filter", torch.randn(4, 3, dtype=torch.float64).T
        )  # not contiguous
        self.register_buffer("none", None)
        self.register_buffer("passing", torch.ones(2), persistent=False)


class Net(Persistent):
    def __init__(self):
        super().__init__()
        self.enc = nn.ModuleDict({"8x8_conv": Layer(3), "8x8_block0": Layer(2)})
        self.map_layer0 = Layer(1)
        self.dropped = None
        self.scale = np.ones(2, dtype=np.float32)
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("part", torch.arange(10)[3:7])  # of a larger storage


class Wrapper(Persistent):
    def __init__(self):
        super().__init__()
        self.model = Net()


@contextmanager
def the_training_code():
    """Provide the modules of EDM's code while a file is written; readers do not have them."""
    persistence = ModuleType("torch_utils.persistence")
    dnnlib = ModuleType("dnnlib.util")

    def _reconstruct_persistent_obj(meta):
        raise AssertionError

    easy = type("EasyDict", (dict,), {"__module__": "dnnlib.util"})
    _reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    persistence._reconstruct_persistent_obj = _reconstruct_persistent_obj
    dnnlib.EasyDict = easy
    with pytest.MonkeyPatch.context() as patch:
        for module in (ModuleType("torch_utils"), persistence, ModuleType("dnnlib"), dnnlib):
            patch.setitem(sys.modules, module.__name__, module)
        yield


def edm_file(protocol: int = 4) -> tuple[bytes, dict[str, torch.Tensor]]:
    """Return a file like the public ones, and the state of its averaged network."""
    torch.manual_seed(0)
    with the_training_code():
        net = Wrapper()
        data = {
            "loss_fn": Layer(1),
            "ema": net,
            "dataset_kwargs": sys.modules["dnnlib.util"].EasyDict(path="images"),
        }
        return pickle.dumps(data, protocol), net.state_dict()


@pytest.mark.parametrize("protocol", [3, 4])
def test_a_pickled_network_gives_its_state_dict(protocol, tmp_path):
    data, state = edm_file(protocol)
    path = tmp_path / "net.pkl"
    path.write_bytes(data)
    tensors = read(path)

    assert list(tensors) == list(state)
    assert {"model.enc.8x8_conv.weight", "model.map_layer0.bias", "model.part"} < set(tensors)

    for key, value in state.items():
        assert type(tensors[key]) is torch.Tensor
        assert tensors[key].dtype == value.dtype
        assert torch.equal(tensors[key], value), key


@pytest.mark.parametrize("container", [lambda x: x, lambda x: {"model": {}, "state_dict": x}])
def test_a_plainly_pickled_state_dict_is_read(container, tmp_path):
    state = nn.Linear(2, 3).state_dict()
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(container(state)))
    tensors = read(tmp_path / "w.pkl")
    assert tensors.keys() == state.keys()
    assert all(torch.equal(tensors[key], state[key]) for key in state)


# --------------------------------------------------------------------------------------------------
# Hostile files
# --------------------------------------------------------------------------------------------------


class Evil:
    def __init__(self, function, *args):
        self.function = function
        self.args = args

    def __reduce__(self):
        return self.function, self.args


def evils(canary: Path) -> list[Evil]:
    touch = f"touch {canary}"
    write = f"open({str(canary)!r}, 'w')"

    return [
        Evil(os.system, touch),
        Evil(eval, write),
        Evil(exec, write),
        Evil(open, str(canary), "w"),
        Evil(subprocess.Popen, ["touch", str(canary)]),
        Evil(getattr, "text", "upper"),
        Evil(importlib.import_module, "this"),
        Evil(torch.load, str(canary)),
        Evil(torch.hub.load, "owner/name", "model"),
        Evil(torch.Tensor, 2),
        Evil(pickle.loads, pickle.dumps(1)),
        Evil(map, eval, [write]),
    ]


@pytest.fixture
def canary(tmp_path):
    """A file that no test may create; the reader's stand-ins may not change either."""
    before = {stand_in: dict(vars(stand_in)) for stand_in in STAND_INS.values()}
    yield tmp_path / "canary"
    assert not (tmp_path / "canary").exists()
    assert {stand_in: dict(vars(stand_in)) for stand_in in STAND_INS.values()} == before


def attempt(tmp_path: Path, data: bytes) -> dict:
    path = tmp_path / "file.pkl"
    path.write_bytes(data)
    tree = load(path)
    return tensors_of(tree["ema"] if isinstance(tree, dict) and "ema" in tree else tree, path)


def refusal(tmp_path: Path, data: bytes, match: str) -> str:
    with pytest.raises(ValueError, match=match) as caught:
        attempt(tmp_path, data)
    assert str(tmp_path / "file.pkl") in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("protocol", range(6))
def test_functions_are_refused_by_name(protocol, canary, tmp_path):
    for evil in evils(canary):
        message = refusal(
            tmp_path,
            pickle.dumps(evil, protocol),
            "was refused and nothing of it was run: it asks for",
        )
        assert evil.function.__name__ in message


def text(value: str) -> bytes:
    return pickle.SHORT_BINUNICODE + bytes([len(value)]) + value.encode()


def name(module: str, attribute: str) -> bytes:
    return text(module) + text(attribute) + pickle.STACK_GLOBAL


def called(function: bytes, *args: bytes) -> bytes:
    return function + pickle.MARK + b"".join(args) + pickle.TUPLE + pickle.REDUCE


REBUILD = name("torch._utils", "_rebuild_tensor_v2")
FROM_BYTES = name("torch.storage", "_load_from_bytes")
PERSISTENT = name("torch_utils.persistence", "_reconstruct_persistent_obj")


def plain(value) -> bytes:
    """Return the opcodes of a value without memo, header and end."""
    return pickle.dumps(value, 2)[2:-1]


@pytest.mark.parametrize(
    ("module", "attribute"),
    [
        ("torch._utils", "_rebuild_tensor_v2.__globals__"),
        ("torch._utils", "_rebuild_tensor_v2.__globals__.get"),
        ("collections", "OrderedDict.__init__.__globals__"),
        ("collections", "abc.sys.modules"),
        ("torch.storage", "_load_from_bytes.__builtins__"),
        ("torch.storage", "io"),
        ("torch", "ops.load_library"),
        ("torch.serialization", "load"),
        ("torch_utils.persistence", "_src_to_module"),
        ("builtins", "__import__"),
        ("__builtin__", "eval"),
        ("numpy", "load"),
        ("numpy", "dtype.__new__"),
        ("", ""),
        ("os\x1b[2J", "system\n"),
    ],
)
def test_names_around_the_allowed_ones_are_refused(module, attribute, canary, tmp_path):
    message = refusal(
        tmp_path, b"\x80\x04" + called(name(module, attribute)) + b".", "it asks for "
    )
    assert message.isprintable()


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02" + pickle.PERSID + b"id\n.",
        b"\x80\x02" + text("id") + pickle.BINPERSID + b".",
        b"(S'true'\nios\nsystem\n.",
        b"\x80\x02(" + name("builtins", "set") + pickle.OBJ + b".",
        b"\x80\x05" + pickle.NEXT_BUFFER + b".",
        b"\x80\x05" + pickle.BYTEARRAY8 + bytes(5) + b"\x01\x00\x00.",
    ],
    ids=["persistent id", "binary persistent id", "inst", "obj", "buffer", "a terabyte"],
)
def test_other_ways_to_objects_are_refused(data, canary, tmp_path):
    refusal(tmp_path, data, "it asks for the opcode ")


def test_registered_and_cached_extensions_are_refused(canary, tmp_path):
    copyreg.add_extension("posix", "system", 240)
    try:
        data = pickle.dumps(Evil(os.system, f"touch {canary}"), 2)
        assert b"posix" not in data
        copyreg._extension_cache[240] = os.system
        refusal(tmp_path, data, "it asks for the opcode EXT1")
    finally:
        copyreg.remove_extension("posix", "system", 240)
        copyreg._extension_cache.pop(240, None)


@pytest.mark.parametrize("target", sorted(STAND_INS), ids=".".join)
@pytest.mark.parametrize("instance", [False, True], ids=["the class", "an object of it"])
def test_no_state_changes_the_stand_ins(target, instance, canary, tmp_path):
    """The fixture `canary` compares them before and after."""
    values = {
        "__class__": 1,
        "__init__": 1,
        "__setstate__": 1,
        "__code__": 1,
        "__dict__": {},
        "tensor": 1,
        "state": {},
    }

    for state in (values, (values, values), (None, values)):
        stand_in = name(*target) + (pickle.EMPTY_TUPLE + pickle.NEWOBJ if instance else b"")
        with pytest.raises(ValueError, match=r"holds|damaged"):
            attempt(
                tmp_path,
                b"\x80\x04" + stand_in + plain(state) + pickle.BUILD + pickle.TUPLE1 + b".",
            )


def legacy(values: torch.Tensor) -> bytes:
    """Return the opcodes of a storage in the old format."""
    function, (data,) = values.storage().__reduce__()
    assert function.__name__ == "_load_from_bytes"
    return called(FROM_BYTES, plain_bytes(data))


def plain_bytes(data: bytes) -> bytes:
    return pickle.BINBYTES + len(data).to_bytes(4, "little") + data


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize(
    ("offset", "shape", "stride"),
    [
        (0, (7,), (1,)),
        (1, (6,), (1,)),
        (0, (2, 3), (4, 1)),
        (-1, (2,), (1,)),
        (0, (2,), (-1,)),
        (0, (-2,), (1,)),
        (0, (2, 2), (1,)),
        (0, (2**40,), (0,)),
        (0, (2**62, 4), (2**62, 1)),
        (2**70, (1,), (1,)),
        (6, (), ()),
        (True, (2,), (1,)),
        (0, (2.0,), (1,)),
        (0, "ab", "cd"),
        (0, None, None),
    ],
)
def test_tensors_outside_of_their_bytes_are_refused(offset, shape, stride, canary, tmp_path):
    storage = legacy(torch.arange(6.0))

    def data(*numbers):
        tensor = called(REBUILD, storage, *map(plain, numbers), plain(False), plain(None))
        return b"\x80\x04}" + text("w") + tensor + pickle.SETITEM + b"."

    assert attempt(tmp_path, data(1, (2, 2), (2, 1)))["w"].tolist() == [[1, 2], [3, 4]]
    refusal(tmp_path, data(offset, shape, stride), "is damaged: 'w' cannot be read")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", ["pickle", "old", "zip", "text", "no bytes"])
def test_a_hostile_file_for_the_bytes_of_a_tensor_is_refused(form, canary, tmp_path):
    evil = Evil(os.system, f"touch {canary}")
    torch.save(evil, tmp_path / "zip")
    torch.save(evil, tmp_path / "old", _use_new_zipfile_serialization=False)
    (tmp_path / "pickle").write_bytes(pickle.dumps(evil))
    (tmp_path / "text").write_bytes(b"text")
    inner = plain(3) if form == "no bytes" else plain_bytes((tmp_path / form).read_bytes())
    tensor = called(REBUILD, called(FROM_BYTES, inner), *map(plain, (0, (1,), (1,), False, None)))
    refusal(
        tmp_path, b"\x80\x04}" + text("w") + tensor + pickle.SETITEM + b".", "'w' cannot be read"
    )


@pytest.mark.parametrize(
    "state",
    [
        None,
        3,
        {"_parameters": 3},
        {"_parameters": {"w": 3}},
        {"_buffers": {3: None}},
        {"_modules": {"m": {}}},
        {},
    ],
)
def test_networks_of_something_else_are_refused_by_name(state, canary, tmp_path):
    data = b"\x80\x04" + called(PERSISTENT, plain({"state": state})) + b"."
    if state == {}:
        assert attempt(tmp_path, data) == {}
    else:
        refusal(tmp_path, data, r"holds (a|no module)")


def test_a_network_within_itself_is_refused(canary, tmp_path):
    itself = (
        name("torch.nn.modules.container", "ModuleDict") + b")" + pickle.NEWOBJ + pickle.MEMOIZE
    )
    state = b"}" + text("_modules") + b"}" + text("m") + pickle.BINGET + b"\0" + b"ss"
    refusal(
        tmp_path, b"\x80\x04" + itself + state + pickle.BUILD + b".", "for the second time, at 'm'"
    )


# --------------------------------------------------------------------------------------------------
# Any file
# --------------------------------------------------------------------------------------------------


def nested(draw: random.Random, depth: int, evil: Evil | None):
    """Nest random containers, with the hostile object somewhere inside."""
    if depth == 0:
        if evil is not None:
            return evil
        return draw.choice([None, True, 3, -(2**70), 0.5, "σ", b"\x80\x00", (), {}])
    items = [nested(draw, draw.randrange(depth), None) for _ in range(draw.randrange(4))]
    items.insert(draw.randrange(len(items) + 1), nested(draw, depth - 1, evil))
    return draw.choice([list, tuple, lambda x: dict(enumerate(x)), lambda x: {"ema": x}])(items)


def test_a_hostile_function_at_any_depth_is_refused(canary, tmp_path):
    draw = random.Random(0)
    hostile = evils(canary)
    for _ in range(150):
        data = pickle.dumps(
            nested(draw, draw.randrange(8), draw.choice(hostile)), draw.randrange(6)
        )
        refusal(tmp_path, data, "it asks for")


def test_harmless_containers_are_not_refused(tmp_path):
    draw = random.Random(0)
    for _ in range(100):
        tree = nested(draw, draw.randrange(8), None)
        (tmp_path / "file.pkl").write_bytes(pickle.dumps(tree, draw.choice([3, 4, 5])))
        assert load(tmp_path / "file.pkl") == tree


def damage(data: bytes, draw: random.Random) -> bytes:
    """Change some bytes, and cut a third of the files short."""
    changed = bytearray(data)
    for _ in range(draw.choice([1, 1, 4])):
        position = draw.randrange(len(data))
        changed[position] = draw.choice([draw.randrange(256), *b"cR\x93b\x81.0h"])
    size = draw.choice([len(data), len(data), draw.randrange(len(data))])
    return bytes(changed[:size])


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_changed_bytes_give_plain_tensors_or_a_refusal(canary, tmp_path):
    data, _ = edm_file()
    draw = random.Random(0)
    path = tmp_path / "file.pkl"
    refusals = 0

    for _ in range(200):
        path.write_bytes(damage(data, draw))
        try:
            tensors = read(path)
        except ValueError:
            refusals += 1
        else:
            assert {type(key) for key in tensors} <= {str}
            assert {type(tensor) for tensor in tensors.values()} <= {torch.Tensor}

    assert 50 < refusals < 200
