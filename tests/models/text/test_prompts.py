"""Files of prompts, and the cache of their encodings: what is asked of the encoder, and what damage does."""

import json

import pytest
import torch

from oss_exp.models.text.prompts import BATCH, PromptCache, read_prompts


class Encoder:
    """Letters counted; remembers what it was asked."""

    def __init__(self, fingerprint: str = "a"):
        self.fingerprint, self.asked = fingerprint, []

    def __call__(self, prompts):
        self.asked.append(list(prompts))
        counts = torch.tensor([[float(prompt.count(letter)) for letter in "abc"] for prompt in prompts])
        return {"text": counts[:, None].expand(-1, 2, 3), "pooled": counts.sum(1, keepdim=True).bfloat16()}


# --------------------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------------------


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


# --------------------------------------------------------------------------------------------------------------
# The cache
# --------------------------------------------------------------------------------------------------------------


def test_only_new_prompts_are_encoded_once_and_the_order_is_kept(tmp_path):
    encoder, cache = Encoder(), PromptCache(tmp_path)
    first = cache.encode(encoder, ["b", "aa", "b"])
    assert encoder.asked == [["b", "aa"]]
    second = PromptCache(tmp_path).encode(encoder, ["c", "aa", "", "b"])
    assert encoder.asked[1:] == [["c", ""]]
    fresh = Encoder()(["c", "aa", "", "b"])
    assert {name: tensor.dtype for name, tensor in second.items()} == {"text": torch.float32, "pooled": torch.bfloat16}
    assert all(second[name].equal(fresh[name]) for name in fresh)
    assert first["text"][0].equal(first["text"][2])
    assert len(list(tmp_path.iterdir())) == 4  # and nothing temporary


def test_an_encoder_is_not_given_anothers_encodings(tmp_path):
    PromptCache(tmp_path).encode(Encoder(), ["a"])
    other = Encoder("b")
    PromptCache(tmp_path).encode(other, ["a"])
    assert other.asked == [["a"]]


def test_prompts_are_encoded_in_batches_and_kept_as_they_are_made(tmp_path):
    class Failing(Encoder):
        def __call__(self, prompts):
            if self.asked:
                raise RuntimeError("out of memory")
            return super().__call__(prompts)

    prompts, encoder = ["a" * n for n in range(BATCH + 3)], Encoder()
    with pytest.raises(RuntimeError):
        PromptCache(tmp_path).encode(Failing(), prompts)
    PromptCache(tmp_path).encode(encoder, prompts)
    assert encoder.asked == [prompts[BATCH:]]


@pytest.mark.parametrize(
    "damage", [lambda data: b"", lambda data: data[:-3], lambda data: data[:-1] + b"\x7f", lambda data: b"text"]
)
def test_a_damaged_encoding_is_made_again_with_a_note(tmp_path, caplog, damage):
    cache = PromptCache(tmp_path)
    whole = cache.encode(Encoder(), ["a cab"])
    file = next(tmp_path.iterdir())
    file.write_bytes(damage(file.read_bytes()))
    encoder = Encoder()
    assert cache.encode(encoder, ["a cab"])["text"].equal(whole["text"])
    assert encoder.asked == [["a cab"]]
    assert "'a cab' is damaged; it is made again" in caplog.text
    cache.encode(encoder, ["a cab"])
    assert len(encoder.asked) == 1


def test_where_encodings_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("OSS_EXP_CACHE", str(tmp_path / "here"))
    PromptCache().encode(Encoder(), ["a"])
    assert len(list((tmp_path / "here" / "prompts").glob("*.safetensors"))) == 1
    monkeypatch.delenv("OSS_EXP_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    PromptCache().encode(Encoder(), ["a"])
    assert len(list((tmp_path / ".cache" / "oss_exp" / "prompts").glob("*.safetensors"))) == 1
