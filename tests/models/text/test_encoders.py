"""Text encoders: prompts that they cut are named."""

import logging

import pytest

from oss_exp.models.text.encoders import Together, clip_pooled, encode, random_text_model, t5_text

CLIP = {
    "vocab_size": 514,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "max_position_embeddings": 10,  # two of them for the ends of a prompt
}
T5 = {"vocab_size": 300, "d_model": 8, "d_kv": 8, "d_ff": 8, "num_layers": 1, "num_heads": 1}


@pytest.fixture
def clip():
    return random_text_model("CLIPTextModel", CLIP, clip_pooled, None)


def test_a_prompt_that_is_cut_is_named_with_what_is_left_out(clip, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("OSS_EXP_CACHE", str(tmp_path))
    prompts = ["", "red boats", "red boats!", "red boat and bag"]  # a token is a letter here, and a space is none
    for _ in range(2):  # from the encoder, then from the cache
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            encode(clip, prompts)
        assert [record.getMessage() for record in caplog.records] == [
            'the text encoder cuts the prompt "red boats!": it does not see "!"',
            'the text encoder cuts the prompt "red boat and bag": it does not see "nd bag"',
        ]


def test_of_two_encoders_the_one_that_reads_more_counts(clip):
    t5 = random_text_model("T5EncoderModel", T5, t5_text, 20)
    assert clip.cuts(["a" * 15]).keys() == {"a" * 15}
    assert Together(clip, t5).cuts(["a" * 15]) == {}
    assert Together(clip, t5).cuts(["a" * 30]) == {"a" * 30: "a" * 11}
