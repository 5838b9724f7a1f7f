"""Small networks of prompts, with a list of words as their text encoder."""

import pytest
import torch
from helpers import random_weights
from hydra.utils import instantiate
from models.common import composed

from oss_exp.models.checkpoints.weights import randomise
from oss_exp.models.guidance import Guidance
from oss_exp.models.text.words import Words

PROMPTS = {
    "flux_fashion": ["a red boot", "a blue bag", "an orange dress"],
    "video_fashion": ["boot rising", "bag moving left", "coat falling"],
}


def model(name: str, prompts: list[str]):
    """Load a model of conf/ with random weights."""
    cfg = composed(f"model={name}", "model.checkpoint=untrained", "model.dtype=float64")
    network = instantiate(cfg.model, prompts=prompts)
    randomise(network.backbone, torch.Generator().manual_seed(0))
    return network


def test_a_word_is_a_feature_at_its_place():
    encoded = Words(["red", "blue", "boot"], 3)(["Red boot", "", "boot, boot! red"])
    red, _, boot = torch.eye(3)
    none = torch.zeros(3)
    assert torch.equal(encoded["text"][0], torch.stack([red, boot, none]))
    assert torch.equal(encoded["text"][2], torch.stack([boot, boot, red]))
    assert encoded["mask"].tolist() == [[True, True, False], [False] * 3, [True] * 3]
    assert torch.equal(encoded["pooled"], torch.stack([red + boot, none, red + 2 * boot]))


def test_an_ordered_encoding_tells_the_places_of_words():
    words = Words(["red", "boot"], 3, scale=2.0, ordered=True)
    (text, mask, pooled) = words(["red boot"]).values()
    turned = words(["boot red"])
    assert text[0].tolist() == [[2, 0, 2, 0, 0], [0, 2, 0, 2, 0], [0, 0, 0, 0, 0]]
    assert turned["text"][0].tolist() == [[0, 2, 2, 0, 0], [2, 0, 0, 2, 0], [0, 0, 0, 0, 0]]
    assert torch.equal(turned["pooled"], pooled)
    assert mask.tolist() == [[True, True, False]]


def test_the_scale_multiplies_all_features():
    one = Words(["red", "boot"], 2)
    four = Words(["red", "boot"], 2, scale=4.0)
    (text, mask, pooled) = one(["red boot"]).values()
    scaled = four(["red boot"])
    assert torch.equal(scaled["text"], 4 * text)
    assert torch.equal(scaled["mask"], mask)
    assert torch.equal(scaled["pooled"], 4 * pooled)
    assert one.fingerprint != four.fingerprint


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a green boot", "does not know 'a' of prompt 'a green boot'; its words are red, boot"),
        ("red red red", "has 3 words, the model reads 2"),
    ],
)
def test_prompts_it_cannot_read_are_refused(prompt, message):
    with pytest.raises(ValueError, match=message):
        Words(["red", "boot"], 2)([prompt])


@pytest.mark.slow
@pytest.mark.parametrize("name", PROMPTS)
def test_the_velocity_depends_on_a_prompts_words_and_not_on_its_number(name):
    one = model(name, PROMPTS[name])
    other = model(name, PROMPTS[name][::-1])
    x = torch.randn(
        3, *one.event_shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    t = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)
    velocity = one.velocity(torch.tensor([0, 1, 2]))(x, t)

    torch.testing.assert_close(other.velocity(torch.tensor([2, 1, 0]))(x, t), velocity)
    assert (one.velocity(torch.tensor([1, 2, 0]))(x, t) - velocity).abs().amax(
        (1, *range(2, x.ndim))
    ).min() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", PROMPTS)
def test_guidance_leads_away_from_no_prompt(name):
    network = model(name, PROMPTS[name])
    x = torch.randn(
        2, *network.event_shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    t = torch.tensor([0.8, 0.3], dtype=torch.float64)
    prompts = torch.tensor([2, 0])
    with_prompt = network._velocity(x, t, prompts)
    without = network._velocity(x, t, torch.full((2,), -1))

    velocity = network.velocity(prompts, Guidance(3.0))(x, t)

    torch.testing.assert_close(velocity, 3 * with_prompt - 2 * without)


def test_the_fingerprint_depends_on_the_words(tmp_path):
    weights = random_weights(tmp_path / "w.safetensors", "model=flux_fashion")
    cfg = composed("model=flux_fashion", weights).model
    first = instantiate(cfg)
    cfg.words.vocabulary[2:4] = ["orange", "red"]
    assert instantiate(cfg).fingerprint != first.fingerprint
