"""Files are whole or absent, and an asset is what its hash says."""

import os
import sys

import pytest
import torch

from oss_exp.files import load_asset, read_json, remove_unfinished, save_asset, write_atomically


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("old", [None, "old content"])
def test_a_failed_rename_leaves_the_old_file_and_nothing_else(error, old, tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    if old is not None:
        path.write_text(old)

    def fail(source, target):
        raise error

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(type(error)):
        write_atomically(path, "new content")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == ([] if old is None else [(path.name, old)])


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_a_write_that_the_system_cuts_short_leaves_the_old_file_and_nothing_else(tmp_path):
    import resource

    path = tmp_path / "result.bin"
    path.write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_atomically(path, bytes(2 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [(path.name, b"old")]


@pytest.mark.parametrize("content", ["σ = 80\n", b"\x00\xff\r\n", ""])
def test_what_is_written_is_read_back_byte_for_byte_over_an_older_file(content, tmp_path):
    path = tmp_path / "a" / "b" / "file"
    write_atomically(path, "something longer than the new content")
    assert write_atomically(path, content) == path
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert os.listdir(path.parent) == ["file"]


def test_an_asset_gives_back_tensors_and_provenance(tmp_path):
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).T  # not contiguous
    digest = save_asset(tmp_path / "x.safetensors", {"x": x, "n": torch.arange(3)}, {"made_by": "a test"})
    tensors, record = load_asset(tmp_path / "x.safetensors", "asset")
    assert torch.equal(tensors["x"], x)
    assert tensors["n"].tolist() == [0, 1, 2]
    assert record.model_dump() == {"file": "x.safetensors", "sha256": digest, "made_by": "a test"}


@pytest.mark.parametrize("position", [0, 20, -1], ids=["length", "header", "last number"])
def test_an_asset_with_one_changed_byte_is_refused_by_name(position, tmp_path):
    path = tmp_path / "x.safetensors"
    save_asset(path, {"x": torch.ones(3)}, {})
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="damaged or was replaced") as caught:
        load_asset(path, "asset")
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
def test_half_an_asset_is_refused_by_the_name_of_the_missing_half(suffix, tmp_path):
    path = tmp_path / "x.safetensors"
    save_asset(path, {"x": torch.ones(3)}, {})
    path.with_suffix(suffix).unlink()
    with pytest.raises(FileNotFoundError, match=rf"x\{suffix} does not exist"):
        load_asset(path, "asset")


@pytest.mark.parametrize("record", ["{}", "[]", '"text"'])
def test_an_asset_whose_json_vouches_for_nothing_is_refused(record, tmp_path):
    path = tmp_path / "x.safetensors"
    save_asset(path, {"x": torch.ones(3)}, {})
    path.with_suffix(".json").write_text(record)
    with pytest.raises(ValueError, match="asset") as caught:
        load_asset(path, "asset")
    assert str(tmp_path / "x") in str(caught.value)


def test_a_folder_in_place_of_a_json_file_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="cannot be read") as caught:
        read_json(tmp_path, "record")
    assert str(tmp_path) in str(caught.value)


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    kept = [tmp_path / name for name in ("a.json", ".lock", "sub/b.tmp")]
    left = [tmp_path / name for name in (".a.json.x1.tmp", "sub/.b.png.y2.tmp")]
    for path in (*kept, *left):
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    remove_unfinished(tmp_path)
    assert all(path.exists() for path in kept)
    assert not any(path.exists() for path in left)
