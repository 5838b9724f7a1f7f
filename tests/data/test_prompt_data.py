"""Which sample has which prompt, and that prompts change no noise."""

import pytest
import torch

from oss_exp.data.conditions import PromptData
from oss_exp.data.noise import HELD_OUT, NoiseData

COMMON = {"event_shape": (2, 3), "num_classes": None, "seed": 0}
COUNTS = {"search_samples": 4, "eval_samples": 5, "per_sample": 2, "batch_size": 3}


@pytest.fixture
def file(tmp_path) -> str:
    """A file of ten prompts."""
    (tmp_path / "given.txt").write_text("\n".join(f"prompt {i}" for i in range(10)))
    return str(tmp_path / "given.txt")


def numbers(loader) -> list[int]:
    """Return the number of every sample's prompt."""
    batches = list(loader)
    assert all(batch["condition"].dtype == torch.long for batch in batches)
    assert all(bool((batch["label"] == -1).all()) for batch in batches)
    return torch.cat([batch["condition"] for batch in batches]).tolist()


def data(file: str, **changes) -> PromptData:
    """Return data of small counts, with changed settings."""
    return PromptData(**(COMMON | COUNTS | {"prompts": file} | changes))


def test_search_samples_have_the_first_prompts_and_held_out_samples_the_last(file):
    search, per_sample = data(file).predict_dataloader()
    assert numbers(search) == [0, 1, 2, 3]
    assert numbers(data(file).test_dataloader()) == [9, 8, 7, 6, 5]
    assert numbers(per_sample) == [9, 8]


def test_a_list_starts_again_where_it_ends(file):
    many = data(file, search_samples=12, eval_samples=13)
    assert numbers(many.predict_dataloader()[0]) == [*range(10), 0, 1]
    assert numbers(many.test_dataloader()) == [*range(9, -1, -1), 9, 8, 7]


def test_a_prompt_depends_on_the_sample_alone(file):
    changed = data(file, seed=8, search_samples=9, eval_samples=5, batch_size=1)
    assert numbers(changed.test_dataloader()) == numbers(data(file).test_dataloader())


def test_noises_are_those_of_noise_data(file):
    plain = NoiseData(**COMMON, **COUNTS, classes=None)
    for ours, theirs in zip(data(file).test_dataloader(), plain.test_dataloader(), strict=True):
        assert ours["index"].equal(theirs["index"])
        assert ours["noise"].equal(theirs["noise"])
        assert int(ours["index"].min()) >= HELD_OUT


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"num_classes": 10}, ValueError, "has no classes and the model has 10"),
        ({"search_samples": 0}, ValueError, r"search_samples must be from 1 to .*, got 0"),
        ({"prompts": "nowhere.txt"}, FileNotFoundError, r"prompts nowhere\.txt is neither a path"),
    ],
)
def test_wrong_settings_are_refused(file, changes, error, message):
    with pytest.raises(error, match=message):
        data(file, **changes)


def test_a_file_without_prompts_is_refused(tmp_path):
    (tmp_path / "none.txt").touch()
    with pytest.raises(ValueError, match="has 0 prompts"):
        data(str(tmp_path / "none.txt"))
