"""A model of stages: the parameters of every time, and the folder that holds them."""

from itertools import pairwise

import pytest
import torch

from oss_exp.models.checkpoints.weights import randomise
from oss_exp.models.decoders.image import Pixels
from oss_exp.models.families.backbones import DiT
from oss_exp.models.guidance import Guidance
from oss_exp.models.network import Network
from oss_exp.models.parameterization import FlowVelocity
from oss_exp.models.stages import DOWN, UP, Staged, StageFolder
from oss_exp.noise import FlowPath
from oss_exp.schedule import StepSchedule
from oss_exp.solvers import Euler

CUTS = (0.7, 0.25)
STEPS = StepSchedule(torch.tensor([1.0, 0.9, 0.7, 0.5, 0.25, 0.0]))


def network(seed: int = 0, scale: float = 1.0) -> Network:
    """Build a small DiT with the random weights of a seed."""
    backbone = DiT(
        channels=1,
        size=8,
        num_classes=3,
        patch=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
    )

    form = FlowVelocity(FlowPath(1.0, 1000.0))
    model = Network(
        "tiny", backbone, form, (1, 8, 8), 3, Pixels(), Guidance(scale), 64, "float32", "untrained"
    )
    randomise(model.backbone, torch.Generator().manual_seed(seed))
    model.fingerprint = f"seed {seed}"

    return model


def folder(path, *stages: dict) -> StageFolder:
    """Save a folder of stages."""
    stages_folder = StageFolder(path, {"name": "tiny", "sha256": "seed 0"}, CUTS)
    stages_folder.save()
    for stage, tensors in enumerate(stages):
        stages_folder.save_stage(stage, tensors, {"stage": stage})
    return stages_folder


def weights(seed: int) -> dict[str, torch.Tensor]:
    return dict(network(seed).backbone.named_parameters())


@pytest.fixture
def staged(tmp_path) -> Staged:
    """Three stages, each with all parameters of another network."""
    return Staged.load(network(), folder(tmp_path, *map(weights, (1, 2, 3))).path)


def answer(model, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return the velocity for the classes 0, 1, 2, 0, ..."""
    return model.velocity(torch.arange(len(x)) % 3)(x, t)


def noise(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_stages_that_changed_nothing_are_the_base_bit_for_bit(tmp_path, scale):
    model = Staged.load(network(scale=scale), folder(tmp_path, {}, {}, weights(0)).path)
    classes = torch.arange(3)
    expected = network(scale=scale).generate(Euler(), STEPS, noise(), classes)
    assert torch.equal(model.generate(Euler(), STEPS, noise(), classes), expected)


@pytest.mark.parametrize(
    ("t", "seed"),
    [(1.0, 1), (0.7 + 1e-12, 1), (0.7, 2), (0.5, 2), (0.25 + 1e-12, 2), (0.25, 3), (0.0, 3)],
)
def test_a_time_has_its_stage_and_a_cut_has_the_stage_that_starts_there(staged, t, seed):
    t = torch.full((3,), t, dtype=torch.float64)
    assert torch.equal(answer(staged, t, noise()), answer(network(seed), t, noise()))


def test_rows_of_one_call_have_stages_of_their_own(staged):
    t = torch.tensor([0.1, 0.9, 0.5, 0.05, 0.7, 0.95], dtype=torch.float64)
    result = answer(staged, t, noise(6))
    for row, seed in enumerate((3, 1, 2, 3, 2, 1)):
        expected = network(seed).velocity(torch.tensor([row % 3]))(noise(6)[[row]], t[[row]])
        torch.testing.assert_close(result[[row]], expected)


def test_sampling_goes_through_the_stages(staged):
    x = noise()
    for seed, span in ((1, [1.0, 0.9, 0.7]), (2, [0.7, 0.5, 0.25]), (3, [0.25, 0.0])):
        for t, t_next in pairwise(span):
            t = torch.full((3,), t, dtype=torch.float64)
            x = x + (t_next - t).float().view(-1, 1, 1, 1) * answer(network(seed), t, x)
    torch.testing.assert_close(staged.sample(Euler(), STEPS, noise(), torch.arange(3)), x)


def test_the_original_is_the_base_after_any_stage(staged):
    t = torch.full((3,), 0.5, dtype=torch.float64)
    answer(staged, t, noise())
    assert torch.equal(answer(staged.original, t, noise()), answer(network(), t, noise()))
    assert torch.equal(answer(staged, t, noise()), answer(network(2), t, noise()))
    assert staged.original.fingerprint == "seed 0"
    assert network().original.fingerprint == "seed 0"


def test_low_rank_changes_are_added_as_products(tmp_path):
    name = "network.transformer_blocks.0.attn1.to_q.weight"
    down = torch.randn(2, 16)
    up = torch.randn(16, 2)
    model = Staged.load(
        network(), folder(tmp_path, {name + DOWN: down, name + UP: up}, {}, {}).path
    )
    expected = network()
    with torch.no_grad():
        expected.backbone.get_parameter(name).add_(up @ down)

    t = torch.ones(3, dtype=torch.float64)
    torch.testing.assert_close(answer(model, t, noise()), answer(expected, t, noise()))
    assert torch.equal(answer(model, 0.5 * t, noise()), answer(network(), 0.5 * t, noise()))


def test_the_fingerprint_depends_on_every_stage_and_cut(tmp_path):
    fingerprints = set()
    for number, seeds in enumerate([(1, 2, 3), (1, 2, 4), (2, 1, 3)]):
        stages = folder(tmp_path / str(number), *map(weights, seeds))
        fingerprints.add(Staged.load(network(), stages.path).fingerprint)

    other = StageFolder(tmp_path / "0", {"name": "tiny", "sha256": "seed 0"}, (0.7, 0.2))
    other.save()
    fingerprints.add(Staged.load(network(), other.path).fingerprint)

    assert len(fingerprints) == 4


# --------------------------------------------------------------------------------------------------
# Refusals
# --------------------------------------------------------------------------------------------------


def test_a_missing_folder_and_a_missing_stage_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"record of stages .*nowhere.*does not exist"):
        Staged.load(network(), tmp_path / "nowhere")
    lacking = folder(tmp_path, {}, {}, {})
    lacking.file(1).unlink()
    with pytest.raises(
        FileNotFoundError,
        match=r"3 stages and lacks stage_1.safetensors.*task=finetune task.stage=1",
    ):
        Staged.load(network(), tmp_path)


def test_a_damaged_stage_is_found_before_anything_runs(tmp_path):
    stages = folder(tmp_path, weights(1), {}, {})
    data = bytearray(stages.file(0).read_bytes())
    data[-1] ^= 1
    stages.file(0).write_bytes(data)
    with pytest.raises(ValueError, match=r"stage_0.safetensors is damaged"):
        Staged.load(network(), tmp_path)


def test_stages_of_another_model_are_refused(tmp_path):
    folder(tmp_path, {}, {}, {})
    with pytest.raises(
        ValueError, match=r"began as tiny \(seed 0\), this model is tiny \(seed 5\)"
    ):
        Staged.load(network(5), tmp_path)


@pytest.mark.parametrize(
    "tensors", [{"network.none": torch.zeros(2)}, {"network.proj_out_2.bias": torch.zeros(2)}]
)
def test_tensors_that_the_network_lacks_are_refused(tmp_path, tensors):
    folder(tmp_path, {}, tensors, {})
    with pytest.raises(
        ValueError, match=r"stage_1.safetensors changes network\.\w+.*lacks at that shape"
    ):
        Staged.load(network(), tmp_path)
