"""Files of prompts: what is read from each kind, and what is refused."""

import json

import pytest

from oss_exp.data.prompts import read_prompts


def written(folder, name: str, content) -> str:
    """Write text, or anything else as JSON; return the path."""
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def test_every_line_of_text_is_a_prompt(tmp_path):
    file = written(tmp_path, "p.txt", "\ufeffa cat\r\n\n  a dog, naïve — 猫 \n \n")
    assert read_prompts(file) == ["a cat", "a dog, naïve — 猫"]


LINES = ["a\u2028cat", "two\x85dogs", "three\x0bfour\x0cfive\x1csix", "a\tb"]
RECORDS = [json.dumps({"prompt": line}, ensure_ascii=False) for line in LINES]


@pytest.mark.parametrize(
    ("name", "lines"), [("p.txt", LINES), ("p.jsonl", RECORDS), ("p.csv", ["prompt", *LINES])]
)
def test_lines_end_at_line_feeds_only(name, lines, tmp_path):
    assert read_prompts(written(tmp_path, name, "\r\n".join(lines))) == LINES


TABLES = {
    "p.tsv": "Prompt\tCategory\na cup\tThings\n\ntwo cups, one plate\tThings\n",
    "P.TSV": 'PROMPT\n"a cup"\n"two cups, one plate"\n',
    "p.csv": 'seed,prompt\r\n3,a cup\r\n4,"two cups, one plate"\r\n',
    "excel.csv": 'prompt;seed\na cup;3\n"two cups, one plate";4\n',
    "coco.csv": '"image","Caption "\n1,a cup\n2,"two cups, one plate"\n',
    "table.txt": "prompt\tseed\na cup\t1\ntwo cups, one plate\t2\n",
    "P.JSONL": '{"prompt": "a cup"}\n{"prompt": "two cups, one plate"}\n',
    "lines.json": '{"prompt": "a cup"}\n{"prompt": "two cups, one plate"}\n',
    "lines.txt": '{"prompt": "a cup"}\n{"prompt": "two cups, one plate"}\n',
    "array.jsonl": '[{"prompt": "a cup"},\n {"prompt": "two cups, one plate"}]\n',
    "list.JSON": '[\n"a cup",\n"two cups, one plate"]',
    "CAPTIONS.JSON": '{"annotations": [{"image_id": 1, "caption": "a cup"},\n'
    '{"image_id": 2, "caption": "two cups, one plate"}]}',
}


@pytest.mark.parametrize("name", TABLES)
def test_a_file_is_read_by_its_content_whatever_the_case_of_its_name(name, tmp_path):
    assert read_prompts(written(tmp_path, name, TABLES[name])) == ["a cup", "two cups, one plate"]


def test_quotes_of_a_csv_table_are_removed(tmp_path):
    file = written(tmp_path, "p.csv", 'prompt,n\n"a ""red""\ncup",1\n12" ruler,2\n')
    assert read_prompts(file) == ['a "red"\ncup', '12" ruler']


def test_quotes_of_a_table_of_tabs_stay(tmp_path):
    file = written(tmp_path, "p.tsv", 'prompt\tn\n"left\t1\n"a" and "b"\t2\n')
    assert read_prompts(file) == ['"left', '"a" and "b"']


def test_a_prompt_may_begin_with_brackets(tmp_path):
    file = written(tmp_path, "p.txt", "{red|blue} cat\n[photo] dog")
    assert read_prompts(file) == ["{red|blue} cat", "[photo] dog"]


def test_the_prompts_of_genevals_metadata_are_read(tmp_path):
    lines = ['{"tag": "counting", "prompt": "two cats"}', '{"prompt": "a red bus"}']
    file = written(tmp_path, "p.jsonl", "\n".join(lines) + "\n")
    assert read_prompts(file) == ["two cats", "a red bus"]


def test_the_first_caption_of_every_coco_image_is_read(tmp_path):
    rows = [(7, "a bear\n"), (3, "a bus"), (7, "another bear"), (1, "a kite"), (3, "a van")]
    annotations = []
    for i, (image, text) in enumerate(rows):
        annotations.append({"image_id": image, "id": 100 - i, "caption": text})
    file = written(tmp_path, "p.json", {"images": [], "annotations": annotations})
    assert read_prompts(file) == ["a bear", "a bus", "a kite"]


def test_24_prompts_are_shipped():
    prompts = read_prompts("prompts.txt")
    assert len(prompts) == len(set(prompts)) == 24


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "", "has 0 prompts"),
        ("p.txt", " \n\n", "has 0 prompts"),
        ("p.jsonl", "\n", "has 0 prompts"),
        ("p.json", {"annotations": []}, "has 0 prompts"),
        ("p.jsonl", '{"text": "a"}', "line 1: field `prompt` is missing"),
        ("p.jsonl", '{"prompt": "a"}\n3', "line 2: must be an object, got 3"),
        ("p.jsonl", "a cat", "line 1 is not complete JSON"),
        ("p.json", "{", "is not complete JSON"),
        ("p.json", ["a cat", 3], "field `1` must be text, got 3"),
        ("p.json", [{"caption": "a cat"}], "field `0.prompt` is missing"),
        ("p.csv", "", "has no column prompt"),
        ("p.csv", "a cat\na dog\n", r'has no column prompt or .* but \["a cat"\]'),
        ("p.csv", "prompt,Prompt\na cat,a dog\n", "has 2 columns prompt in its first line; rename"),
        ("p.csv", "id,title\n1,a cat\n", r'has no column prompt or .* but \["id", "title"\]'),
        ("p.csv", "prompt,seed\n", "has 0 prompts"),
        (
            "p.csv",
            "prompt,seed\na cat,1\na cat, a dog,2\n",
            "line 3 has 3 fields and the first line 2; put",
        ),
        ("p.csv", 'prompt\n"a cat\n', "is no table: unexpected end of data"),
        ("p.tsv", "prompt\tseed\na cat\n", "line 2 has 1 fields"),
        ("p.txt", "a \x1b[31mcat", "has control characters in"),
        ("p.txt", "a cat\ra dog\r", "has control characters .* end lines by line feeds"),
        ("p.txt", "a\0 \0c\0a\0t\0", "has null characters, as UTF-16 has"),
        ("p.json", {"info": 1}, "field `annotations` is missing"),
        (
            "p.json",
            {"annotations": [{"image_id": 1, "caption": None}]},
            "`annotations.0.caption` must be text",
        ),
    ],
)
def test_what_holds_no_prompts_is_refused(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=rf"{name}.*{message}"):
        read_prompts(written(tmp_path, name, content))


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
@pytest.mark.parametrize("name", ["p.txt", "p.csv", "p.jsonl", "p.json"])
def test_other_encodings_are_refused(name, encoding, tmp_path):
    (tmp_path / name).write_bytes("naïve".encode(encoding))
    with pytest.raises(ValueError, match=rf"{name} is not UTF-8 text .*; save it as UTF-8"):
        read_prompts(tmp_path / name)


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        read_prompts(tmp_path)


def test_an_absent_file_is_refused():
    absent = r"nowhere\.txt is neither a path that exists nor a shipped file"
    with pytest.raises(FileNotFoundError, match=absent):
        read_prompts("nowhere.txt")
