"""Files of prompts: what is read from each kind, and what is refused."""

import json

import pytest

from oss_exp.data.prompts import read_prompts


def written(folder, name: str, content) -> str:
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(folder / name)


def test_a_prompt_a_line(tmp_path):
    file = written(tmp_path, "p.txt", "\ufeffa cat\r\n\n  a dog, naïve — 猫 \n \n")
    assert read_prompts(file) == ["a cat", "a dog, naïve — 猫"]


def test_geneval_metadata(tmp_path):
    lines = [{"tag": "counting", "prompt": "two cats"}, {"prompt": "a red bus"}]
    assert read_prompts(written(tmp_path, "p.jsonl", "\n".join(map(json.dumps, lines)) + "\n")) == [
        "two cats",
        "a red bus",
    ]


def test_the_first_caption_of_every_coco_image(tmp_path):
    rows = [(7, "a bear\n"), (3, "a bus"), (7, "another bear"), (1, "a kite"), (3, "a van")]
    annotations = [{"image_id": image, "id": 100 - i, "caption": text} for i, (image, text) in enumerate(rows)]
    file = written(tmp_path, "p.json", {"images": [], "annotations": annotations})
    assert read_prompts(file) == ["a bear", "a bus", "a kite"]


def test_prompts_are_shipped():
    prompts = read_prompts("prompts.txt")
    assert len(prompts) == len(set(prompts)) == 24


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.txt", "", "has 0 prompts"),
        ("p.txt", " \n\n", "has 0 prompts"),
        ("p.jsonl", "\n", "has 0 prompts"),
        ("p.json", {"annotations": []}, "has 0 prompts"),
        ("p.jsonl", '{"text": "a"}', "line 1: field `prompt` is missing"),
        ("p.jsonl", '{"prompt": "a"}\n3', "line 2: must be an object, got 3"),
        ("p.jsonl", "a cat", "line 1 is not complete JSON"),
        ("p.json", "{", "is not complete JSON"),
        ("p.json", ["a cat"], "must be an object"),
        ("p.json", {"info": 1}, "field `annotations` is missing"),
        (
            "p.json",
            {"annotations": [{"image_id": 1, "caption": None}]},
            "`annotations.0.caption` must be text",
        ),
    ],
)
def test_what_holds_no_prompts_is_refused(tmp_path, name, content, words):
    with pytest.raises(ValueError, match=rf"{name}.*{words}"):
        read_prompts(written(tmp_path, name, content))


def test_other_files(tmp_path):
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"p\.txt is no UTF-8 text"):
        read_prompts(tmp_path / "p.txt")
    with pytest.raises(ValueError, match="cannot be read"):
        read_prompts(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt is neither a path that exists nor a shipped file"):
        read_prompts("nowhere.txt")
