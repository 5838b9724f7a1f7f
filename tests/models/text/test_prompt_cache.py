"""The cache of encoded prompts asks the encoder only for what it lacks."""

import pytest
import torch

from oss_exp.models.text.prompts import BATCH, PromptCache


class Encoder:
    """An encoder that counts letters and remembers its calls."""

    def __init__(self, fingerprint: str = "a"):
        self.fingerprint = fingerprint
        self.calls = []

    def __call__(self, prompts):
        self.calls.append(list(prompts))
        rows = [(prompt.count("a"), prompt.count("b"), prompt.count("c")) for prompt in prompts]
        counts = torch.tensor(rows, dtype=torch.float32)
        return {
            "text": counts[:, None].expand(-1, 2, 3),
            "pooled": counts.sum(1, keepdim=True).bfloat16(),
        }


# --------------------------------------------------------------------------------------------------
# The cache
# --------------------------------------------------------------------------------------------------


def test_only_new_prompts_are_encoded_once_and_the_order_is_kept(tmp_path):
    encoder = Encoder()
    cache = PromptCache(tmp_path)
    first = cache.encode(encoder, ["b", "aa", "b"])

    assert encoder.calls == [["b", "aa"]]

    second = PromptCache(tmp_path).encode(encoder, ["c", "aa", "", "b"])
    assert encoder.calls[1:] == [["c", ""]]

    fresh = Encoder()(["c", "aa", "", "b"])
    assert {name: tensor.dtype for name, tensor in second.items()} == {
        "text": torch.float32,
        "pooled": torch.bfloat16,
    }
    assert all(second[name].equal(fresh[name]) for name in fresh)
    assert first["text"][0].equal(first["text"][2])
    assert len(list(tmp_path.iterdir())) == 4  # and nothing temporary


def test_an_encoder_does_not_get_encodings_of_another_one(tmp_path):
    PromptCache(tmp_path).encode(Encoder(), ["a"])
    other = Encoder("b")
    PromptCache(tmp_path).encode(other, ["a"])
    assert other.calls == [["a"]]


def test_prompts_are_encoded_in_batches_and_every_batch_is_saved(tmp_path):
    class Failing(Encoder):
        def __call__(self, prompts):
            if self.calls:
                raise RuntimeError("out of memory")
            return super().__call__(prompts)

    prompts = ["a" * n for n in range(BATCH + 3)]
    encoder = Encoder()

    with pytest.raises(RuntimeError):
        PromptCache(tmp_path).encode(Failing(), prompts)

    PromptCache(tmp_path).encode(encoder, prompts)
    assert encoder.calls == [prompts[BATCH:]]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:-3],
        lambda data: data[:-1] + b"\x7f",
        lambda data: b"text",
    ],
)
def test_a_damaged_encoding_is_made_again_with_a_warning(tmp_path, caplog, damage):
    cache = PromptCache(tmp_path)
    whole = cache.encode(Encoder(), ["a cab"])
    file = next(tmp_path.iterdir())
    file.write_bytes(damage(file.read_bytes()))
    encoder = Encoder()

    assert cache.encode(encoder, ["a cab"])["text"].equal(whole["text"])
    assert encoder.calls == [["a cab"]]
    assert "'a cab' is damaged; it is made again" in caplog.text

    cache.encode(encoder, ["a cab"])
    assert len(encoder.calls) == 1


def test_the_cache_is_in_the_chosen_folder_or_in_the_users_home(tmp_path, monkeypatch):
    monkeypatch.setenv("OSS_EXP_CACHE", str(tmp_path / "here"))
    PromptCache().encode(Encoder(), ["a"])
    assert len(list((tmp_path / "here" / "prompts").glob("*.safetensors"))) == 1
    monkeypatch.delenv("OSS_EXP_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    PromptCache().encode(Encoder(), ["a"])
    assert len(list((tmp_path / ".cache" / "oss_exp" / "prompts").glob("*.safetensors"))) == 1
