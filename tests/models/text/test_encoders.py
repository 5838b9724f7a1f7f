"""Text encoders name the prompts that they cut."""

import logging

from oss_exp.models.families.open_sora import t5_masked
from oss_exp.models.text.encoders import encode, random_t5_model

T5 = {"vocab_size": 300, "d_model": 8, "d_kv": 8, "d_ff": 8, "num_layers": 1, "num_heads": 1}


def test_a_cut_prompt_is_named_with_its_missing_end(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("OSS_EXP_CACHE", str(tmp_path))
    prompts = ["", "red boats", "red boats!", "red boat and bag"]  # a token is a letter or the end

    for _ in range(2):  # from the encoder, then from the cache
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            encode(random_t5_model(T5, t5_masked, 10), prompts)
        assert [record.getMessage() for record in caplog.records] == [
            'the text encoder cuts the prompt "red boats!": it does not see "!"',
            'the text encoder cuts the prompt "red boat and bag": it does not see "and bag"',
        ]
