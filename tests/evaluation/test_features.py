"""Feature extractors: Inception-V3 of a local file, and the fixed random network."""

import pytest
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from oss_exp.distances import Inception, RandomFeatures
from oss_exp.evaluation.features import InceptionV3
from oss_exp.noise import FlowSchedule
from oss_exp.solvers import Euler
from oss_exp.stepsize import OSSShared, Problem


def images(count: int, channels: int, size: int = 8) -> torch.Tensor:
    """Return random images in [0, 1]."""
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    """A file of random weights in the layout of torch-fidelity's."""

    class Empty(FeatureExtractorInceptionV3):
        def load_state_dict(self, state, **_):
            return None

    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save({}, path)
    torch.manual_seed(0)
    torch.save(Empty("inception", ["2048"], str(path)).state_dict(), path)
    return str(path)


@pytest.mark.slow
def test_inception_gives_2048_features_of_colour_and_grey_images(weights):
    extractor = InceptionV3(weights)
    grey = images(3, 1)
    features = extractor(grey)
    assert features.shape == (3, 2048)
    assert bool(features.isfinite().all())
    torch.testing.assert_close(extractor(grey.expand(-1, 3, -1, -1)), features)
    torch.testing.assert_close(extractor(grey[1:2]), features[1:2], rtol=1e-4, atol=1e-5)


def test_a_missing_file_is_named_with_where_to_get_it():
    message = r"no\.pth do not exist; get pt_inception-2015-12-05-6726825d\.pth"
    with pytest.raises(FileNotFoundError, match=message):
        InceptionV3("no.pth")


def test_random_features_are_the_same_for_a_seed_and_differ_between_images():
    first, again, other = (RandomFeatures(1, 4, seed)(images(5, 1)) for seed in (0, 0, 1))
    assert first.shape == (5, 2 * (4 + 8 + 16))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(first.unique(dim=0)) == 5


@pytest.mark.slow
def test_a_search_by_inception_features_runs(weights, mixture, gmm):
    class Pixels(torch.nn.Module):
        def decode(self, x0):
            return ((x0 + 1) / 2).clamp(0, 1).reshape(-1, 1, 8, 8).float()

    distance = Inception(InceptionV3(weights)).bind(Pixels())
    grid = FlowSchedule(1.0).nodes(4)
    problem = Problem(mixture.velocity(None), gmm["z"][:2], grid, Euler(), distance)

    steps = OSSShared("pinned", None, False, "mean").plan(problem, [2])[2]
    assert steps.num_steps == 2
