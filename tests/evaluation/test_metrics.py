"""Metrics against other libraries on the same features, closed forms and definitions; any batches, any ranks."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torchvision
from helpers import run_ranks
from scipy.linalg import sqrtm
from torch import Tensor, nn
from torch_fidelity.metric_fid import (
    KEY_METRIC_FID,
    fid_features_to_statistics,
    fid_statistics_to_metric,
)
from torch_fidelity.metric_kid import (
    KEY_METRIC_KID_MEAN,
    KEY_METRIC_KID_STD,
    kid_features_to_metric,
)
from torch_fidelity.metric_prc import (
    KEY_METRIC_PRECISION,
    KEY_METRIC_RECALL,
    prc_features_to_metric,
)
from torchmetrics.image import LearnedPerceptualImagePatchSimilarity
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import poly_mmd

from oss_exp.evaluation.metrics import FID, KID, LPIPS, ClassAgreement, PrecisionRecall
from oss_exp.evaluation.statistics import Reference, write_statistics

F = 16


class Pixels(nn.Module):
    """The pixels themselves as features, and their halves' brightness as the scores of two classes."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)

    def logits(self, images: Tensor) -> Tensor:
        return images.mean(dim=(1, 3)).unflatten(1, (2, -1)).mean(dim=2)


def images(count: int, seed: int, channels: int = 1, size: int = 4) -> Tensor:
    """Correlated pixels in [0, 1], of another distribution for every seed."""
    generator = torch.Generator().manual_seed(seed)
    mix = (8 * torch.rand(size * size, size * size, generator=generator)).softmax(dim=1)
    brightness = 0.5 + 2 * torch.rand(size * size, generator=generator)
    noise = torch.rand(count, channels, size * size, generator=generator)
    return (noise**brightness @ mix.T).clamp(0, 1).reshape(count, channels, size, size)


def labels(batch: Tensor) -> Tensor:
    return torch.arange(len(batch)) % 2


def measure(metric, generated: Tensor, batch: int = 7) -> dict[str, float]:
    classes = labels(generated)
    for part, wanted in zip(generated.split(batch), classes.split(batch), strict=True):
        metric.update(part, part, wanted)
    return metric.compute()


@pytest.fixture
def real(tmp_path) -> Reference:
    return write_statistics(tmp_path / "real.npz", Pixels(), [images(60, seed=1)])


def gaussian(mu: np.ndarray, sigma: np.ndarray) -> Reference:
    return Reference(Path("gaussian.npz"), mu, sigma, channels=1)


# ------------------------------------------------------------------------------------------------
# FID
# ------------------------------------------------------------------------------------------------


def test_three_libraries_and_scipy_agree_on_fid(real):
    generated, truth = images(90, seed=2), images(60, seed=1)
    found = measure(FID(Pixels(), real, 90), generated)["fid"]
    other = FrechetInceptionDistance(Pixels(), normalize=True, input_img_size=(1, 4, 4))
    other.update(truth, real=True)
    other.update(generated, real=False)
    statistics = [fid_features_to_statistics(x.flatten(1).double()) for x in (generated, truth)]
    (mu, sigma), (mu_real, sigma_real) = ((s["mu"], s["sigma"]) for s in statistics)
    definition = ((mu - mu_real) ** 2).sum() + np.trace(
        sigma + sigma_real - 2 * sqrtm(sigma @ sigma_real).real
    )
    assert found > 0.01
    assert found == pytest.approx(other.compute().item(), rel=1e-3)
    assert found == pytest.approx(
        fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID], rel=1e-3
    )
    assert found == pytest.approx(definition, rel=1e-6)


def test_fid_of_images_with_themselves_is_zero(real):
    assert measure(FID(Pixels(), real, None), images(60, seed=1))["fid"] == pytest.approx(
        0, abs=1e-7
    )


def test_fid_of_moved_and_scaled_gaussians_is_the_closed_form():
    generated = images(50, seed=3)
    features = generated.flatten(1).double().numpy()
    mu, sigma = features.mean(axis=0), np.cov(features, rowvar=False)
    moved = measure(FID(Pixels(), gaussian(mu + 0.25, sigma), None), generated)["fid"]
    assert moved == pytest.approx(F * 0.25**2, rel=1e-6)
    scaled = measure(FID(Pixels(), gaussian(3 * mu, 9 * sigma), None), generated)["fid"]
    assert scaled == pytest.approx(4 * (mu**2).sum() + 4 * np.trace(sigma), rel=1e-6)


def test_batches_do_not_matter_and_a_metric_can_be_used_again(real):
    generated, metric = images(30, seed=2), FID(Pixels(), real, 30)
    first = measure(metric, generated, batch=1)
    metric.reset()
    assert measure(metric, generated, batch=30)["fid"] == pytest.approx(first["fid"], rel=1e-9)


def test_a_wrong_number_of_images_is_an_error(real):
    metric = FID(Pixels(), real, 31)
    with pytest.raises(
        ValueError, match=r"FID of 30 images where 31 are expected: .*number of images.*evaluate 31"
    ):
        measure(metric, images(30, seed=2))
    with pytest.raises(ValueError, match="KID of 30 images where 31 are expected"):
        measure(KID(Pixels(), real, 31), images(30, seed=2))


# ------------------------------------------------------------------------------------------------
# KID, precision and recall
# ------------------------------------------------------------------------------------------------


def test_kid_of_everything_is_torchmetrics(real):
    """A subset as large as the set leaves nothing to chance."""
    generated = images(60, seed=2)
    found = measure(KID(Pixels(), real, 60, subsets=3, subset_size=60), generated)
    expected = poly_mmd(torch.from_numpy(real.features).double(), generated.flatten(1).double())
    assert found["kid"] == pytest.approx(expected.item(), rel=1e-3)
    assert found["kid_std"] == pytest.approx(0, abs=1e-5)


def test_kid_of_subsets_is_torch_fidelitys(real):
    generated = images(90, seed=2)
    found = measure(KID(Pixels(), real, 90, subsets=50, subset_size=30), generated)
    options = {
        "kid_subsets": 50,
        "kid_subset_size": 30,
        "rng_seed": 1,
        "verbose": False,
    }  # other subsets
    other = kid_features_to_metric(
        generated.flatten(1), torch.from_numpy(real.features).float(), **options
    )
    error = (found["kid_std"] ** 2 / 50 + other[KEY_METRIC_KID_STD] ** 2 / 50) ** 0.5
    assert found["kid"] == pytest.approx(other[KEY_METRIC_KID_MEAN], abs=4 * error)
    assert found["kid_std"] == pytest.approx(other[KEY_METRIC_KID_STD], rel=0.5)


def test_kid_does_not_depend_on_the_order_of_images(real):
    generated = images(40, seed=2)
    first, second = (
        measure(KID(Pixels(), real, 40, subsets=5, subset_size=20), x)
        for x in (generated, generated.flip(0))
    )
    assert first == second


def share_within(points: Tensor, manifold: Tensor, k: int) -> float:
    """Kynkaanniemi et al. 2019, eq. (1): how many points lie in a ball that reaches a neighbour's k-th neighbour."""
    radius = (
        (manifold[:, None] - manifold[None]).norm(dim=-1).sort(dim=1).values[:, k]
    )  # 0 is the point itself
    return (
        ((points[:, None] - manifold[None]).norm(dim=-1) <= radius)
        .any(dim=1)
        .double()
        .mean()
        .item()
    )


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_are_the_papers_and_torch_fidelitys(real, k):
    generated = torch.cat([images(90, seed=1)[60:], images(20, seed=2) ** 2])
    found = measure(PrecisionRecall(Pixels(), real, 50, k), generated)
    features, truth = generated.flatten(1), torch.from_numpy(real.features).float()
    expected = share_within(features, truth, k), share_within(truth, features, k)
    assert (found["precision"], found["recall"]) == pytest.approx(expected, abs=1e-6)
    assert len({0.0, 1.0, *expected}) == 4
    other = prc_features_to_metric(
        features, truth, prc_neighborhood=k, save_cpu_ram=False, verbose=False
    )
    assert (found["precision"], found["recall"]) == pytest.approx(
        (other[KEY_METRIC_PRECISION], other[KEY_METRIC_RECALL]), abs=1e-6
    )


def test_images_that_are_all_alike_have_precision_and_no_recall(real):
    generated = images(60, seed=1)[:1].expand(10, -1, -1, -1)
    found = measure(PrecisionRecall(Pixels(), real, 10), generated)
    assert found["precision"] == 1
    assert found["recall"] < 0.1


def test_the_extractor_sees_the_very_batch(real):
    """Several metrics of one extractor can know that they look at the same images."""

    class Witness(Pixels):
        def forward(self, batch: Tensor) -> Tensor:
            self.seen = batch
            return super().forward(batch)

    reference, batch = (
        Reference(real.path, real.mu, real.sigma, channels=1, features=real.features),
        images(3, seed=2),
    )
    for kind in (FID, KID, PrecisionRecall):
        metric = kind(Witness(), reference, None)
        metric.update(batch, batch, labels(batch))
        assert metric.extractor.seen is batch


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (
            lambda real: KID(Pixels(), real, None),
            "KID needs at least 1000 images on both sides, got 30 generated",
        ),
        (
            lambda real: PrecisionRecall(Pixels(), real, None, k=30),
            r"at least 31 images .* got 30 .* 60 in .*real\.npz",
        ),
    ],
)
def test_too_few_images(real, metric, message):
    with pytest.raises(ValueError, match=message):
        measure(metric(real), images(30, seed=2))


@pytest.mark.parametrize("kind", [KID, PrecisionRecall])
def test_published_statistics_have_no_single_features(kind):
    with pytest.raises(
        ValueError, match=r"needs single features, but gaussian\.npz has only .*write_statistics"
    ):
        kind(Pixels(), gaussian(np.zeros(F), np.eye(F)), None)


# ------------------------------------------------------------------------------------------------
# Ranks
# ------------------------------------------------------------------------------------------------

SHARES = {1: [30], 2: [11, 19], 4: [8, 13, 9, 0]}  # a rank may have nothing


def measure_all(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/rendezvous{world}", rank=rank, world_size=world
        )
    real, extractor = Reference.load(Path(folder) / "real.npz"), Pixels()
    metrics = [
        FID(extractor, real, 30),
        KID(extractor, real, 30, subsets=5, subset_size=20),
        PrecisionRecall(extractor, real, 30),
        ClassAgreement(extractor),
    ]
    generated = images(30, seed=2)
    mine, classes = (
        generated.split(SHARES[world])[rank],
        labels(generated).split(SHARES[world])[rank],
    )
    found = {}
    for metric in metrics:
        for part, wanted in zip(mine.split(4), classes.split(4), strict=True):
            if len(mine):
                metric.update(part, part, wanted)
        found |= metric.compute()
    (Path(folder) / f"found{world}_{rank}.json").write_text(json.dumps(found))
    if world > 1:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_any_number_of_ranks_gives_the_same_numbers(real):
    folder = real.path.parent
    measure_all(0, 1, str(folder))
    for world in (2, 4):
        run_ranks(measure_all, world, world, str(folder))
    alone = json.loads((folder / "found1_0.json").read_text())
    assert alone.keys() == {"fid", "kid", "kid_std", "precision", "recall", "class_agreement"}
    for world in (2, 4):
        for rank in range(world):
            found = json.loads((folder / f"found{world}_{rank}.json").read_text())
            assert found == pytest.approx(alone, rel=1e-6)


# ------------------------------------------------------------------------------------------------
# Means over images
# ------------------------------------------------------------------------------------------------


def test_class_agreement_counts_images():
    generated = torch.zeros(8, 1, 4, 4)
    generated[:5, :, :2] = 1  # class 0: the upper half is brighter
    generated[5:, :, 2:] = 1
    metric = ClassAgreement(Pixels())
    metric.update(generated[:3], generated[:3], torch.tensor([0, 0, 1]))
    metric.update(generated[3:], generated[3:], torch.tensor([0, 0, 1, 1, 0]))
    assert metric.compute() == {"class_agreement": 75.0}


@pytest.mark.parametrize("label", [-1, 2])
def test_class_agreement_needs_the_classifiers_classes(label):
    batch = images(2, seed=0)
    with pytest.raises(
        ValueError, match=rf"class from 0 to 1 .* got \[.*{label}.*; set data\.classes"
    ):
        ClassAgreement(Pixels()).update(batch, batch, torch.tensor([0, label]))


@pytest.fixture(scope="module")
def alexnet(tmp_path_factory) -> Path:
    """torchvision's file with random convolutions alone, all that LPIPS reads; a whole one lies where torch looks."""
    hub = tmp_path_factory.mktemp("hub")
    torch.manual_seed(0)
    state = torchvision.models.alexnet().state_dict()
    convolutions = {name: value for name, value in state.items() if name.startswith("features")}
    rest = {
        name: torch.zeros(()).expand(value.shape)
        for name, value in state.items()
        if name not in convolutions
    }
    for folder, content in {"checkpoints": convolutions | rest, "own": convolutions}.items():
        (hub / folder).mkdir()
        torch.save(content, hub / folder / "alexnet-owt-7be5be79.pth")
    return hub / "own" / "alexnet-owt-7be5be79.pth"


def lpips_of_torchmetrics(alexnet: Path, a: Tensor, b: Tensor) -> float:
    before = torch.hub.get_dir()
    torch.hub.set_dir(alexnet.parent.parent)
    try:
        return LearnedPerceptualImagePatchSimilarity("alex", normalize=True)(a, b).item()
    finally:
        torch.hub.set_dir(before)


@pytest.mark.slow
def test_lpips_is_torchmetrics_without_a_download(alexnet):
    a, b = torch.rand(2, 5, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    metric = LPIPS(str(alexnet), "alex")
    for part in (slice(0, 3), slice(3, 5)):
        metric.update(a[part], b[part], labels(a[part]))
    found = metric.compute()["lpips"]
    assert found == pytest.approx(lpips_of_torchmetrics(alexnet, a, b), rel=1e-5)
    assert found > 0
    metric.reset()
    metric.update(a, a, labels(a))
    assert metric.compute() == {"lpips": 0.0}


@pytest.mark.slow
def test_lpips_of_small_grey_images_is_of_enlarged_rgb_ones(alexnet):
    a, b = images(3, 1, size=16), images(3, 2, size=16)
    metric = LPIPS(str(alexnet), "alex")
    metric.update(a[..., :8], b[..., :8], labels(a))
    large = [
        nn.functional.interpolate(
            x[..., :8].expand(-1, 3, -1, -1), (128, 64), mode="bilinear", align_corners=False
        )
        for x in (a, b)
    ]
    assert metric.compute()["lpips"] == pytest.approx(
        lpips_of_torchmetrics(alexnet, *large), rel=1e-5
    )


@pytest.mark.slow
def test_lpips_says_which_file_it_needs(alexnet, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no\.pth do not exist; get https://.*/vgg16-397923af\.pth"
    ):
        LPIPS("no.pth", "vgg")
    with pytest.raises(ValueError, match="net must be one of alex, vgg, got 'squeeze'"):
        LPIPS(str(alexnet), "squeeze")
    with pytest.raises(ValueError, match=r"is not torchvision's vgg16-397923af\.pth"):
        LPIPS(str(alexnet), "vgg")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(
        ValueError, match=r"other\.pth is not torchvision's alexnet.*features\.0\.weight"
    ):
        LPIPS(str(tmp_path / "other.pth"), "alex")
    (tmp_path / "cut.pth").write_bytes(alexnet.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"cut\.pth cannot be read .*; get https://.* again"):
        LPIPS(str(tmp_path / "cut.pth"), "alex")


# ------------------------------------------------------------------------------------------------
# Bad batches
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            images(3, 0) * 2 - 1,
            r"images must be in \[0, 1\], decoded and clipped, got values from -",
        ),
        (images(3, 0) * float("nan"), r"images must be in \[0, 1\].* from nan"),
        (images(3, 0)[0], r"both \(B, C, H, W\)"),
        (
            images(3, 0, channels=3),
            r"real\.npz is of grey images, the generated ones are RGB \(3 channels\)",
        ),
        (images(3, 0, size=5), r"has 16 features an image, the extractor gives \(25,\)"),
    ],
)
def test_batches_that_cannot_be_compared(real, batch, message):
    with pytest.raises(ValueError, match=message):
        FID(Pixels(), real, None).update(batch, batch, labels(batch))


def test_published_statistics_are_of_rgb_images():
    reference = Reference(Path("edm.npz"), np.zeros(F), np.eye(F))
    batch = images(3, 0)
    with pytest.raises(ValueError, match=r"edm\.npz is of RGB images, the generated ones are grey"):
        FID(Pixels(), reference, None).update(batch, batch, labels(batch))


def test_images_teacher_and_labels_belong_together(real):
    metric, batch = FID(Pixels(), real, None), images(3, 0)
    with pytest.raises(ValueError, match=r"\(3, 1, 4, 4\), \(2, 1, 4, 4\) and \(3,\)"):
        metric.update(batch, batch[:2], labels(batch))
    with pytest.raises(ValueError, match=r"and \(2,\)"):
        metric.update(batch, batch, labels(batch)[:2])
    with pytest.raises(ValueError, match=r"the teacher's images must be in \[0, 1\]"):
        metric.update(batch, batch + 1, labels(batch))


def test_statistics_of_another_extractor_are_refused(tmp_path):
    reference = write_statistics(
        tmp_path / "s.npz", nn.Sequential(nn.Flatten(), nn.Linear(F, F)), [images(9, 0)]
    )
    with pytest.raises(
        ValueError, match=r"was made with Sequential .*, but the extractor is Pixels "
    ):
        FID(Pixels(), reference, None)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize("kind", [FID, PrecisionRecall])
def test_no_images(real, kind):
    empty = images(0, 0)
    metric = kind(Pixels(), real, None)
    metric.update(empty, empty, labels(empty))
    with pytest.raises(ValueError, match=r"at least \d images"):
        metric.compute()


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_no_mean_of_no_images():
    with pytest.raises(ValueError, match="ClassAgreement has seen no images"):
        ClassAgreement(Pixels()).compute()
