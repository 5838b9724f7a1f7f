"""Files are whole or absent, and an asset is what its hash says."""

import json
import os
import sys
from pathlib import Path
from typing import Literal

import pytest
import torch

from oss_exp.files import (
    UNFINISHED,
    Numbers,
    Record,
    inside,
    load_asset,
    load_config,
    load_record,
    load_records,
    read_text,
    remove_unfinished,
    save_asset,
    write_atomically,
)


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
    files = [(file.name, file.read_text()) for file in tmp_path.iterdir()]
    assert files == ([] if old is None else [(path.name, old)])


def test_a_folder_that_takes_no_files_is_named(tmp_path):
    (tmp_path / "file").touch()
    for path in (Path("/proc/x.json"), tmp_path / "file" / "x.json"):
        words = rf"cannot write {path}: no file can be made in {path.parent} \(.*choose an"
        with pytest.raises(OSError, match=words):
            write_atomically(path, "{}")


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
def test_a_written_file_replaces_an_older_one_byte_for_byte(content, tmp_path):
    path = tmp_path / "a" / "b" / "file"
    write_atomically(path, "something longer than the new content")
    assert write_atomically(path, content) == path
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert os.listdir(path.parent) == ["file"]


def test_an_asset_gives_back_tensors_and_provenance(tmp_path):
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).T  # not contiguous
    path = tmp_path / "x.safetensors"

    digest = save_asset(path, {"x": x, "n": torch.arange(3)}, {"made_by": "a test"})
    tensors, record = load_asset(path, "asset")

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
def test_an_asset_without_one_of_its_files_is_refused_by_the_name_of_that_file(suffix, tmp_path):
    path = tmp_path / "x.safetensors"
    save_asset(path, {"x": torch.ones(3)}, {})
    path.with_suffix(suffix).unlink()
    with pytest.raises(FileNotFoundError, match=rf"x\{suffix} does not exist"):
        load_asset(path, "asset")


@pytest.mark.parametrize("record", ["{}", "[]", '"text"'])
def test_an_asset_whose_json_has_no_hash_is_refused(record, tmp_path):
    path = tmp_path / "x.safetensors"
    save_asset(path, {"x": torch.ones(3)}, {})
    path.with_suffix(".json").write_text(record)
    with pytest.raises(ValueError, match="asset") as caught:
        load_asset(path, "asset")
    assert str(tmp_path / "x") in str(caught.value)


def test_a_folder_in_place_of_a_json_file_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="cannot be read") as caught:
        load_record(tmp_path, Record, "record")
    assert str(tmp_path) in str(caught.value)


def test_only_the_unfinished_files_of_a_killed_process_are_removed(tmp_path):
    others = [tmp_path / name for name in ("a.json", ".lock", "sub/b.tmp", ".editor.tmp")]
    unfinished = [
        tmp_path / name for name in (f".a.json.x1{UNFINISHED}", f"sub/.b.png.y2{UNFINISHED}")
    ]
    for path in (*others, *unfinished):
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    remove_unfinished(tmp_path)

    assert all(path.exists() for path in others)
    assert not any(path.exists() for path in unfinished)


# --------------------------------------------------------------------------------------------------
# Records (tests/test_records.py gives every reader the same broken contents)
# --------------------------------------------------------------------------------------------------


class Note(Record):
    """A record with a field of each kind."""

    format: Literal["a/note"]
    version: Literal[2]
    times: Numbers | list[Numbers]
    count: int = 0
    flag: bool = False
    more: dict[str, float] | None = None


WHOLE = {"format": "a/note", "version": 2, "times": [1.0, 0.5]}


def note(path, content) -> Note:
    """Write this content and read it as a `Note`."""
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return load_record(path, Note, "note", "ask for another")


def test_a_record_may_have_a_byte_order_mark_and_unknown_fields(tmp_path):
    content = json.dumps({**WHOLE, "by": "somebody", "count": 3}).encode()
    read = note(tmp_path / "n.json", b"\xef\xbb\xbf" + content)
    assert (read.times, read.count) == ([1.0, 0.5], 3)


def test_the_last_of_two_fields_of_one_name_counts(tmp_path):
    twice = b'{"count": 1, "count": 2,' + json.dumps(WHOLE).encode()[1:]
    assert note(tmp_path / "n.json", twice).count == 2


def test_numbers_are_read_to_the_bit(tmp_path):
    bits = torch.randint(0, 2**62, (20_000,), generator=torch.Generator().manual_seed(0))
    values = bits.view(torch.float64)[bits.view(torch.float64).isfinite()].tolist()
    assert note(tmp_path / "n.json", {**WHOLE, "times": values}).times == values


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            {**WHOLE, "format": "another"},
            " is of another format: `format` must be 'a/note', got \"another\"; ask",
        ),
        (
            {**WHOLE, "version": 1, "times": 3},
            " is of another version: `version` must be 2, got 1; ask",
        ),
        ({"version": 2, "times": []}, ": field `format` is missing; ask"),
        ({**WHOLE, "times": [1.0, "abc", 3]}, ': field `times.1` must be a number, got "abc"'),
        (
            {**WHOLE, "times": [[1.0], [float("nan")]]},
            ": field `times.1.0` must be a finite number, got nan",
        ),
        ({**WHOLE, "count": True}, ": field `count` must be a whole number, got true; ask"),
        (
            {**WHOLE, "count": 1.0, "flag": 1},
            ": field `count` must be a whole number, got 1.0 (1 more fault); ask",
        ),
        (
            {**WHOLE, "count": "x" * 10_000_000},
            f': field `count` must be a whole number, got "{"x" * 76}...; ask',
        ),
        (
            {**WHOLE, "more": {"a": 1, "b": {"c": 1}}},
            ': field `more.b` must be a number, got {"c": 1}; ask',
        ),
        (
            {**WHOLE, "more": 10**400},
            ": field `more` must be an object, got a number of over 80 digits; ask",
        ),
        (
            {**WHOLE, "more": {"a": 10**400}},
            ": field `more.a` must be a finite number, got a number of over 80 digits",
        ),
        ([WHOLE], ": must be an object, got [{...}]; ask"),
        (b"", " is empty; ask"),
        (b"{", " is not complete JSON (EOF while parsing an object at line 1 column 1); ask"),
        (b"[" * 10**6, " has lists or objects more than 200 levels deep (recursion limit exceeded"),
        (b'"\xff"', " is not complete JSON (invalid unicode code point at line 1 column 2); ask"),
    ],
)
def test_wrong_content_is_refused_in_one_line(content, words, tmp_path):
    with pytest.raises(ValueError, match="note") as caught:
        note(tmp_path / "n.json", content)
    assert str(caught.value).startswith(f"note {tmp_path / 'n.json'}{words}")
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


def test_a_file_above_its_size_limit_is_not_read(tmp_path):
    path = tmp_path / "n.json"
    path.write_text(json.dumps(WHOLE) + " " * (1 << 20))
    assert load_record(path, Note, "note", limit=2 << 20).version == 2
    with pytest.raises(ValueError, match=r"n\.json is larger than 1 MiB"):
        load_record(path, Note, "note", limit=1 << 20)
    with pytest.raises(ValueError, match=r"n\.json is larger than 1 MiB"):
        read_text(path, "text", limit=1 << 20)


def test_a_file_of_more_values_than_memory_holds_is_not_read(tmp_path):
    """Four bytes of JSON become a hundred in memory."""
    path = tmp_path / "n.json"
    path.write_text("[" + "[]," * 4_200_000 + "[]]")
    words = r"note .*n\.json has more values than the 4,194,304 lists or"
    with pytest.raises(ValueError, match=words):
        load_record(path, Note, "note")


def test_a_line_is_named_by_its_number(tmp_path):
    path = tmp_path / "n.jsonl"
    # U+2028 ends no line in JSON.
    line = json.dumps({**WHOLE, "more": {"a\u2028b": 1}}, ensure_ascii=False)
    path.write_text(f"{line}\n\n{line}\r\n", encoding="utf-8")
    assert len(load_records(path, Note, "notes")) == 2
    path.write_text(f"{line}\n\n{{}}\n", encoding="utf-8")

    with pytest.raises(ValueError, match=r"notes .*n\.jsonl, line 3: field `format` is missing"):
        load_records(path, Note, "notes")


def test_a_configuration_is_plain_data(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("a: ${oc.env:HOME}\nb: {_target_: os.system, command: x}\nc: 1.0e-05\n")
    assert load_config(path, "configuration") == {
        "a": "${oc.env:HOME}",
        "b": {"_target_": "os.system", "command": "x"},
        "c": 1e-5,
    }


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: &a [x]\nb: *a\n", "aliases"),
        ("a: !!python/object/apply:os.system [x]\n", "could not determine a constructor"),
        ("a: " + "[" * 300 + "]" * 300, "more than 200 levels"),
        ("a: " + "x" * (1 << 18), "larger than 0.25 MiB"),
        ("- a\n", "must be a mapping"),
    ],
)
def test_a_configuration_that_is_more_than_data_is_refused(text, reason, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"configuration .*config\.yaml .*{reason}"):
        load_config(path, "configuration")


def test_a_link_out_of_a_folder_is_refused(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (tmp_path / "secret").write_text("x")
    (folder / "out").symlink_to("../secret")
    (folder / "loop").symlink_to("loop")
    (folder / "in").symlink_to("own")
    (tmp_path / "also").symlink_to("run")

    assert inside(folder, "in") == folder / "in"
    assert inside(tmp_path / "also", "own") == tmp_path / "also" / "own"
    for parts in (("out",), ("..", "secret"), ("/etc/passwd",)):
        with pytest.raises(ValueError, match="leads out of its folder"):
            inside(folder, *parts)


def test_a_pipe_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(ValueError, match="it is not a file but a folder, a pipe or a device"):
        read_text(tmp_path / "pipe.json", "record")
