"""Checkpoints are found and read in every form, and refused when they are not whole."""

import hashlib
import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from oss_exp.files import save_asset
from oss_exp.models.checkpoints.weights import digest, locate, randomise, read, spelled

FILES = ("transformer/weights.safetensors", "weights.safetensors.index.json", "weights.pt")
SOURCE = "https://example.org/weights"


def state() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(3, 4, generator=draw),
        "a.bias": torch.randn(3, generator=draw).bfloat16(),
        "count": torch.tensor(7),
        "mask": torch.tensor([True, False]),
    }


def write_shards(index: Path, tensors: dict[str, torch.Tensor]) -> list[Path]:
    """Write an index and a shard for each tensor, and return the shards."""
    index.parent.mkdir(parents=True, exist_ok=True)
    shards = {key: f"weights-{i:05d}.safetensors" for i, key in enumerate(tensors)}
    for key, shard in shards.items():
        safetensors.torch.save_file({key: tensors[key]}, index.parent / shard)
    index.write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    return [index.parent / shard for shard in shards.values()]


def write(form: str, path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """Write tensors in a form and return the file."""
    if form == "safetensors":
        safetensors.torch.save_file(tensors, path)
    elif form == "shards":
        write_shards(path, tensors)
    elif form == "pickle":
        path.write_bytes(pickle.dumps(tensors))
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=form == "zip")
    return path


def equal(tensors, expected) -> bool:
    """Tell whether names, dtypes and numbers are the same."""
    if tensors.keys() != expected.keys():
        return False
    pairs = [(tensors[key], expected[key]) for key in expected]
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


# --------------------------------------------------------------------------------------------------
# Where
# --------------------------------------------------------------------------------------------------


def test_a_file_is_itself_and_a_folder_has_the_first_of_the_files(tmp_path):
    for name in FILES[1:]:
        (tmp_path / name).write_text("")
    assert locate(str(tmp_path / FILES[2]), FILES, SOURCE) == tmp_path / FILES[2]
    assert locate(str(tmp_path), FILES, SOURCE) == tmp_path / FILES[1]
    (tmp_path / FILES[0]).parent.mkdir()
    (tmp_path / FILES[0]).write_text("")
    assert locate(str(tmp_path), FILES, SOURCE) == tmp_path / FILES[0]


@pytest.mark.parametrize(
    "checkpoint", ["folder", "weights/absent.pt", "/no/such/place", "name", "a/b/c", ""]
)
def test_a_missing_checkpoint_is_named_with_the_remedy(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileNotFoundError) as caught:
        locate(checkpoint, FILES if checkpoint else (), SOURCE)
    for part in (checkpoint, SOURCE, "model.checkpoint=FILE", "model.size=tiny"):
        assert part in str(caught.value)


def in_hub(cache: Path, repository: str) -> Path:
    """Make the folder of a repository's main branch in the hub's cache."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    return folder / "snapshots" / ("0" * 40)


SCRIPT = f"""
from oss_exp.models.checkpoints.weights import digest, locate, read
for name in ("single", "single@{"0" * 40}", "sharded", "half", "absent", "single@other"):
    try:
        path = locate(f"owner/{{name}}", {FILES!r}, {SOURCE!r})
        print(path, digest(read(path)))
    except FileNotFoundError as error:
        print(error)
"""


@pytest.mark.slow
def test_the_hub_cache_serves_files_and_shards_offline(tmp_path):
    """The hub's library reads its environment once, so another process asks it."""
    # The cache.
    single = in_hub(tmp_path, "owner/single") / FILES[0]
    single.parent.mkdir(parents=True)
    safetensors.torch.save_file(state(), single)
    index = in_hub(tmp_path, "owner/sharded") / FILES[1]
    write_shards(index, state())
    write_shards(in_hub(tmp_path, "owner/half") / FILES[1], state())[1].unlink()

    # The process.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", SCRIPT]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    lines = process.stdout.splitlines()

    # Whole checkpoints are read, others are refused.
    assert lines[:2] == [f"{single} {digest(state())}"] * 2
    assert lines[2] == f"{index} {digest(state())}"
    for name, line in zip(("half", "absent", "single@other"), lines[3:], strict=True):
        message = f"checkpoint owner/{name}: cannot get {' or '.join(FILES)} from the hub"
        assert line.startswith(f"{message}, which cannot be reached")
        assert SOURCE in line


@pytest.mark.parametrize(
    ("kind", "attempts", "reason"),
    [
        ("GatedRepoError", 1, "accepted its licence"),
        ("RepositoryNotFoundError", 1, "no such public repository"),
        ("RevisionNotFoundError", 1, "no revision v2"),
        ("EntryNotFoundError", 9, "no such file"),
        ("LocalEntryNotFoundError", 9, "cannot be reached"),
        (ConnectionError, 1, "which fails: the first line; the public"),
    ],
)
def test_a_refusal_of_the_hub_is_one_message(kind, attempts, reason, monkeypatch):
    import huggingface_hub
    from huggingface_hub import utils

    requests = []

    def refuse(repository, file, revision, local_files_only):
        requests.append((repository, file, revision))
        assert local_files_only == (kind == "LocalEntryNotFoundError" and len(requests) > 1)
        error = getattr(utils, kind) if isinstance(kind, str) else kind
        raise error.__new__(error, "the first line\nthe second")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(FileNotFoundError, match=reason) as caught:
        locate("owner/name@v2", FILES, SOURCE)

    assert requests == [("owner/name", file, "v2") for file in spelled(FILES)[:attempts]]
    assert "checkpoint owner/name@v2: cannot get" in str(caught.value)
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------------------------------
# What
# --------------------------------------------------------------------------------------------------

FORMS = ["safetensors", "shards", "zip", "old", "pickle"]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read_under_any_name(form, tmp_path):
    path = write(form, tmp_path / "file.of_weights", state())
    assert equal(read(path), state())
    assert digest(read(path)) == digest(state())


@pytest.mark.parametrize("form", ["zip", "old", "pickle"])
@pytest.mark.parametrize(
    "container",
    [
        lambda x, y: {"model": y, "ema": x, "epoch": 3},
        lambda x, y: {"state_dict": y, "model_ema": x},
        lambda x, y: {"ema_model": {"online": x}, "optimizer": {"params": y}},
        lambda x, y: {"epoch": 3, "model": x},
        lambda x, y: {"state_dict": {"ema": x, "model": y}},
    ],
)
def test_averaged_weights_come_before_others(form, container, tmp_path):
    other = {"a.weight": torch.zeros(1)}
    assert equal(read(write(form, tmp_path / "x", container(state(), other))), state())


def test_a_weight_may_be_called_model(tmp_path):
    assert read(write("zip", tmp_path / "x", {"model": torch.ones(2)}))["model"].tolist() == [1, 1]


@pytest.mark.parametrize("form", ["zip", "old", "pickle"])
@pytest.mark.parametrize(
    "content",
    [
        [torch.ones(1)],
        torch.ones(1),
        {},
        {"w": torch.ones(1), "epoch": 3},
        {"w": {"x": 1}},
        {3: torch.ones(1)},
        {"ema": {"decay": 0.99, "shadow": [torch.ones(1)]}},
    ],
    ids=str,
)
def test_contents_that_are_no_named_weights_are_refused(form, content, tmp_path):
    with pytest.raises(ValueError, match=r"x holds .* give (a|the) file") as caught:
        read(write(form, tmp_path / "x", content))
    assert str(tmp_path) in str(caught.value)


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
def test_tensors_without_numbers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds a tensor without its numbers at 'w'"):
        read(write("zip", tmp_path / "x", {"w": torch.eye(2).to_sparse()}))


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["zip", "old", "pickle"])
def test_code_is_refused_and_not_run(form, tmp_path):
    path = write(form, tmp_path / "x", {"w": torch.ones(1), "evil": Evil(tmp_path / "canary")})
    with pytest.raises(ValueError, match="nothing of it was run") as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert "weights_only" not in str(caught.value)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("share", [0, 1e-9, 0.01, 0.3, 0.9, 0.999])
def test_files_cut_short_are_refused(form, share, tmp_path):
    path = write(form, tmp_path / "x", state())
    data = path.read_bytes()
    path.write_bytes(data[: min(int(len(data) * share + (share > 0)), len(data) - 1)])
    with pytest.raises(ValueError, match="again") as caught:
        read(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [b"<!DOCTYPE html>", b"version https://git-lfs", b"[1, 2]", b'{"a": 1}', b"PK", bytes(99)],
)
def test_files_of_other_kinds_are_refused(content, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.safetensors"):
        read(tmp_path / "x.safetensors")


@pytest.mark.parametrize("form", FORMS)
def test_a_file_that_differs_from_its_hash_is_refused(form, tmp_path):
    path = write(form, tmp_path / "x.bin", state())
    data = path.read_bytes()
    (tmp_path / "x.bin.sha256").write_text(f"{hashlib.sha256(data).hexdigest()}  x.bin\n")

    assert equal(read(path), state())

    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"is damaged or was replaced: .* x\.bin\.sha256 says"):
        read(path)

    path.write_bytes(data)
    (tmp_path / "x.bin.sha256").write_text("")
    with pytest.raises(ValueError, match="is damaged or was replaced"):
        read(path)


def test_our_provenance_is_checked_and_that_of_others_is_not(tmp_path):
    path = tmp_path / "x.safetensors"
    save_asset(path, state(), {})
    assert equal(read(write("zip", tmp_path / "x.pt", state())), state())
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"x\.json says"):
        read(path)
    (tmp_path / "x.json").write_text('{"architecture": "DiT"}')
    assert not equal(read(path), state())  # nothing vouches for it


def flip(data: bytes, position: int, bit: int = 0) -> bytes:
    """Change one bit of some bytes."""
    changed = bytearray(data)
    changed[position] ^= 1 << bit
    return bytes(changed)


def test_a_changed_bit_of_a_torch_file_is_refused_or_changes_nothing(tmp_path):
    path = write("zip", tmp_path / "x.pt", state())
    data = path.read_bytes()
    draw = random.Random(0)
    refusals = 0

    for _ in range(150):
        position = draw.randrange(len(data))
        path.write_bytes(flip(data, position, draw.randrange(8)))
        try:
            tensors = read(path)
        except ValueError:
            refusals += 1
        else:
            assert equal(tensors, state())

    assert refusals > 30


def test_a_changed_number_of_a_torch_file_is_refused(tmp_path):
    path = write("zip", tmp_path / "x.pt", state())
    data = path.read_bytes()
    path.write_bytes(flip(data, data.index(state()["a.weight"].numpy().tobytes())))
    with pytest.raises(ValueError, match="damaged"):
        read(path)


@pytest.mark.parametrize("name", ["../weights.safetensors", "/weights.safetensors", "", "..", 3])
def test_shards_are_beside_their_index(name, tmp_path):
    (tmp_path / "x.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises((ValueError, FileNotFoundError), match=r"x\.index\.json"):
        read(tmp_path / "x.index.json")


def test_missing_damaged_and_short_shards_are_refused_by_name(tmp_path):
    index = tmp_path / "x.index.json"
    shard = write_shards(index, state())[0]
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])

    with pytest.raises(ValueError, match=shard.name):
        read(index)

    safetensors.torch.save_file({"other": torch.ones(1)}, shard)
    with pytest.raises(ValueError, match=r"lack 1 weights, first a\.weight"):
        read(index)

    shard.unlink()
    with pytest.raises(FileNotFoundError, match=shard.name):
        read(index)


# --------------------------------------------------------------------------------------------------
# In their place, and by which name
# --------------------------------------------------------------------------------------------------


def net() -> nn.Module:
    network = nn.Sequential(nn.Conv2d(64, 32, 3), nn.GroupNorm(4, 400), nn.Linear(200, 100))
    network.register_buffer("table", torch.full((3,), 5.0))
    network.scale = nn.Parameter(torch.zeros(()))
    return network


def test_random_weights_keep_the_size_of_signals():
    network = net()
    randomise(network, torch.Generator().manual_seed(0))
    weights = network.state_dict()

    assert float(weights["0.weight"].std()) == pytest.approx((64 * 9) ** -0.5, rel=0.03)
    assert float(weights["2.weight"].std()) == pytest.approx(200**-0.5, rel=0.03)
    assert float(weights["1.weight"].mean()) == pytest.approx(1, abs=0.05)
    assert float(weights["1.weight"].std()) == pytest.approx(0.2, rel=0.15)
    assert float(weights["1.bias"].std()) == pytest.approx(0.1, rel=0.15)
    assert weights["table"].tolist() == [5, 5, 5]
    assert weights["scale"] != 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_random_weights_are_the_same_for_every_dtype(dtype):
    network = net()
    other = net().to(dtype)
    for module in (network, other):
        randomise(module, torch.Generator().manual_seed(1))
    for ours, theirs in zip(network.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours.to(dtype), theirs)
    randomise(other, torch.Generator().manual_seed(2))
    assert not torch.equal(network[0].weight.to(dtype), other[0].weight)


def test_the_digest_is_of_the_weights_and_not_of_their_layout():
    tensors = state() | {"none": torch.zeros(0, 2), "z": torch.tensor(1j)}
    expected = digest(tensors)
    assert digest(dict(reversed(tensors.items()))) == expected
    assert digest(tensors | {"a.weight": tensors["a.weight"].T.contiguous().T}) == expected

    for change in (
        {"a.weight": tensors["a.weight"].T},
        {"a.weight": tensors["a.weight"].double()},
        {"a.bias": -tensors["a.bias"]},
        {"none": torch.zeros(2, 0)},
        {"count": torch.tensor([7])},
        {"more": torch.zeros(0)},
    ):
        assert digest(tensors | change) != expected

    one = {"w": torch.tensor([1.0])}
    header = b'["w", "torch.float32", [1]]'
    assert digest(one) == hashlib.sha256(header + b"\x00\x00\x80\x3f").hexdigest()
