"""Metrics equal other libraries, closed forms and definitions, on any batches and ranks."""

import json
from dataclasses import replace
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
    """An extractor of the pixels, whose two classes are the brighter half of an image."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)

    def logits(self, images: Tensor) -> Tensor:
        return images.mean(dim=(1, 3)).unflatten(1, (2, -1)).mean(dim=2)


def images(count: int, seed: int, channels: int = 1, size: int = 4) -> Tensor:
    """Return correlated pixels in [0, 1], with another distribution for every seed."""
    generator = torch.Generator().manual_seed(seed)
    mix = (8 * torch.rand(size * size, size * size, generator=generator)).softmax(dim=1)
    brightness = 0.5 + 2 * torch.rand(size * size, generator=generator)
    noise = torch.rand(count, channels, size * size, generator=generator)
    return (noise**brightness @ mix.T).clamp(0, 1).reshape(count, channels, size, size)


def labels(batch: Tensor) -> Tensor:
    """Return alternating classes (B,)."""
    return torch.arange(len(batch)) % 2


def measure(metric, generated: Tensor, batch: int = 7) -> dict[str, float]:
    """Return the values of a metric of these images, in batches."""
    classes = labels(generated)
    for part, part_classes in zip(generated.split(batch), classes.split(batch), strict=True):
        metric.update(part, part, part_classes)
    return metric.compute()


@pytest.fixture
def real(tmp_path) -> Reference:
    """The statistics of 60 images."""
    return write_statistics(tmp_path / "real.npz", Pixels(), [images(60, seed=1)])


def gaussian(mu: np.ndarray, sigma: np.ndarray) -> Reference:
    """Return statistics without single features."""
    return Reference(Path("gaussian.npz"), mu, sigma, channels=1)


# ------------------------------------------------------------------------------------------------
# FID
# ------------------------------------------------------------------------------------------------


def fid_of_torchmetrics(generated: Tensor, truth: Tensor) -> float:
    metric = FrechetInceptionDistance(Pixels(), normalize=True, input_img_size=(1, 4, 4))
    metric.update(truth, real=True)
    metric.update(generated, real=False)
    return metric.compute().item()


def fid_of_torch_fidelity(generated: Tensor, truth: Tensor) -> float:
    statistics = [fid_features_to_statistics(x.flatten(1).double()) for x in (generated, truth)]
    return fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]


def fid_by_definition(generated: Tensor, truth: Tensor) -> float:
    features = [x.flatten(1).double().numpy() for x in (generated, truth)]
    (mu, mu_real) = (x.mean(axis=0) for x in features)
    (sigma, sigma_real) = (np.cov(x, rowvar=False) for x in features)
    root = sqrtm(sigma @ sigma_real).real
    return ((mu - mu_real) ** 2).sum() + np.trace(sigma + sigma_real - 2 * root)


def test_three_libraries_and_the_definition_agree_on_fid(real):
    pair = (images(90, seed=2), images(60, seed=1))
    fid = measure(FID(Pixels(), real, 90), pair[0])["fid"]
    assert fid > 0.01
    assert fid == pytest.approx(fid_of_torchmetrics(*pair), rel=1e-3)
    assert fid == pytest.approx(fid_of_torch_fidelity(*pair), rel=1e-3)
    assert fid == pytest.approx(fid_by_definition(*pair), rel=1e-6)


def test_fid_of_images_with_themselves_is_zero(real):
    fid = measure(FID(Pixels(), real, None), images(60, seed=1))["fid"]
    assert fid == pytest.approx(0, abs=1e-7)


def test_fid_of_moved_and_scaled_gaussians_is_the_closed_form():
    generated = images(50, seed=3)
    features = generated.flatten(1).double().numpy()
    mu = features.mean(axis=0)
    sigma = np.cov(features, rowvar=False)

    moved = measure(FID(Pixels(), gaussian(mu + 0.25, sigma), None), generated)["fid"]
    assert moved == pytest.approx(F * 0.25**2, rel=1e-6)

    scaled = measure(FID(Pixels(), gaussian(3 * mu, 9 * sigma), None), generated)["fid"]
    assert scaled == pytest.approx(4 * (mu**2).sum() + 4 * np.trace(sigma), rel=1e-6)


def test_batches_do_not_matter_and_a_metric_can_be_used_again(real):
    generated = images(30, seed=2)
    metric = FID(Pixels(), real, 30)
    first = measure(metric, generated, batch=1)
    metric.reset()
    assert measure(metric, generated, batch=30)["fid"] == pytest.approx(first["fid"], rel=1e-9)


def test_a_wrong_number_of_images_is_an_error(real):
    generated = images(30, seed=2)
    few = r"FID of 30 images where 31 are expected: .*number of images.*evaluate 31"
    with pytest.raises(ValueError, match=few):
        measure(FID(Pixels(), real, 31), generated)
    with pytest.raises(ValueError, match="KID of 30 images where 31 are expected"):
        measure(KID(Pixels(), real, 31), generated)


# ------------------------------------------------------------------------------------------------
# KID, precision and recall
# ------------------------------------------------------------------------------------------------


def test_kid_of_everything_is_torchmetrics(real):
    # A subset as large as the set leaves nothing to chance.
    generated = images(60, seed=2)
    result = measure(KID(Pixels(), real, 60, subsets=3, subset_size=60), generated)
    expected = poly_mmd(torch.from_numpy(real.features).double(), generated.flatten(1).double())
    assert result["kid"] == pytest.approx(expected.item(), rel=1e-3)
    assert result["kid_std"] == pytest.approx(0, abs=1e-5)


def test_kid_of_subsets_is_torch_fidelitys(real):
    generated = images(90, seed=2)
    result = measure(KID(Pixels(), real, 90, subsets=50, subset_size=30), generated)
    expected = kid_features_to_metric(
        generated.flatten(1),
        torch.from_numpy(real.features).float(),
        kid_subsets=50,
        kid_subset_size=30,
        rng_seed=1,
        verbose=False,
    )

    # The subsets are others.
    mean = expected[KEY_METRIC_KID_MEAN]
    deviation = expected[KEY_METRIC_KID_STD]
    error = (result["kid_std"] ** 2 / 50 + deviation**2 / 50) ** 0.5
    assert result["kid"] == pytest.approx(mean, abs=4 * error)
    assert result["kid_std"] == pytest.approx(deviation, rel=0.5)


def test_kid_does_not_depend_on_the_order_of_images(real):
    generated = images(40, seed=2)
    forward = measure(KID(Pixels(), real, 40, subsets=5, subset_size=20), generated)
    backward = measure(KID(Pixels(), real, 40, subsets=5, subset_size=20), generated.flip(0))
    assert forward == backward


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Return the distances (n, m) of points (n, F) to points (m, F)."""
    return (a[:, None] - b[None]).norm(dim=-1)


def share_within(points: Tensor, manifold: Tensor, k: int) -> float:
    """Return the share of points inside a ball of the manifold.

    Kynkaanniemi et al. 2019, eq. (1); a ball reaches to the k-th neighbour of its centre.
    """
    radius = distances(manifold, manifold).sort(dim=1).values[:, k]  # 0 is the point itself
    return (distances(points, manifold) <= radius).any(dim=1).double().mean().item()


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_are_the_papers_and_torch_fidelitys(real, k):
    generated = torch.cat([images(90, seed=1)[60:], images(20, seed=2) ** 2])
    features = generated.flatten(1)
    truth = torch.from_numpy(real.features).float()
    expected = [share_within(features, truth, k), share_within(truth, features, k)]
    fidelity = prc_features_to_metric(
        features, truth, prc_neighborhood=k, save_cpu_ram=False, verbose=False
    )

    values = measure(PrecisionRecall(Pixels(), real, 50, k), generated)

    result = [values["precision"], values["recall"]]
    assert len({0.0, 1.0, *expected}) == 4
    assert result == pytest.approx(expected, abs=1e-6)
    assert result[0] == pytest.approx(fidelity[KEY_METRIC_PRECISION], abs=1e-6)
    assert result[1] == pytest.approx(fidelity[KEY_METRIC_RECALL], abs=1e-6)


def test_images_that_are_all_alike_have_precision_and_no_recall(real):
    generated = images(60, seed=1)[:1].expand(10, -1, -1, -1)
    values = measure(PrecisionRecall(Pixels(), real, 10), generated)
    assert values["precision"] == 1
    assert values["recall"] < 0.1


class Witness(Pixels):
    """An extractor that remembers its last batch."""

    def forward(self, batch: Tensor) -> Tensor:
        self.batch = batch
        return super().forward(batch)


@pytest.mark.parametrize("kind", [FID, KID, PrecisionRecall])
def test_metrics_of_one_extractor_give_it_the_same_batch(kind, real):
    batch = images(3, seed=2)
    metric = kind(Witness(), replace(real, extractor=None), None)
    metric.update(batch, batch, labels(batch))
    assert metric.extractor.batch is batch


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
def test_too_few_images_are_an_error(real, metric, message):
    with pytest.raises(ValueError, match=message):
        measure(metric(real), images(30, seed=2))


@pytest.mark.parametrize("kind", [KID, PrecisionRecall])
def test_published_statistics_have_no_single_features(kind):
    message = r"needs single features, but gaussian\.npz has only .*write_statistics"
    with pytest.raises(ValueError, match=message):
        kind(Pixels(), gaussian(np.zeros(F), np.eye(F)), None)


# ------------------------------------------------------------------------------------------------
# Ranks
# ------------------------------------------------------------------------------------------------

SHARES = {2: [11, 19], 4: [8, 13, 9, 0]}  # images of each rank, which may have none


def all_values(folder: Path, part: slice, batch: int) -> dict[str, float]:
    """Return the values of every metric, of which this rank has a part of the images."""
    real = Reference.load(folder / "real.npz")
    extractor = Pixels()
    metrics = [
        FID(extractor, real, 30),
        KID(extractor, real, 30, subsets=5, subset_size=20),
        PrecisionRecall(extractor, real, 30),
        ClassAgreement(extractor),
    ]
    generated = images(30, seed=2)
    indices = torch.arange(30)[part]

    values = {}
    for metric in metrics:
        for numbers in indices.split(batch):
            if len(numbers):
                metric.update(generated[numbers], generated[numbers], labels(generated)[numbers])
        values |= metric.compute()
    return values


def measure_on_rank(rank: int, world: int, folder: str) -> None:
    """Write the values of every metric, measured together with the other ranks."""
    torch.set_num_threads(1)
    place = f"file://{folder}/rendezvous{world}"
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=world)
    first = sum(SHARES[world][:rank])
    part = slice(first, first + SHARES[world][rank])
    values = all_values(Path(folder), part, batch=4)
    (Path(folder) / f"values{world}_{rank}.json").write_text(json.dumps(values))
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_any_number_of_ranks_gives_the_same_numbers(real):
    folder = real.path.parent
    expected = all_values(folder, slice(0, 30), batch=4)
    assert expected.keys() == {"fid", "kid", "kid_std", "precision", "recall", "class_agreement"}

    for world in SHARES:
        run_ranks(measure_on_rank, world, world, str(folder))
        for rank in range(world):
            values = json.loads((folder / f"values{world}_{rank}.json").read_text())
            assert values == pytest.approx(expected, rel=1e-6)


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
    message = rf"class from 0 to 1 .* got \[.*{label}.*; set data\.classes"
    with pytest.raises(ValueError, match=message):
        ClassAgreement(Pixels()).update(batch, batch, torch.tensor([0, label]))


ALEXNET = "alexnet-owt-7be5be79.pth"


@pytest.fixture(scope="module")
def alexnet(tmp_path_factory) -> Path:
    """torchvision's file with random convolutions alone, which is all that LPIPS reads.

    The file with all keys lies where torchmetrics looks, in `checkpoints` beside its folder.
    """
    hub = tmp_path_factory.mktemp("hub")
    torch.manual_seed(0)
    convolutions = {}
    zeros = {}
    for name, value in torchvision.models.alexnet().state_dict().items():
        if name.startswith("features"):
            convolutions[name] = value
        else:
            zeros[name] = torch.zeros(()).expand(value.shape)
    for folder, content in {"checkpoints": convolutions | zeros, "own": convolutions}.items():
        (hub / folder).mkdir()
        torch.save(content, hub / folder / ALEXNET)
    return hub / "own" / ALEXNET


def lpips_of_torchmetrics(alexnet: Path, a: Tensor, b: Tensor) -> float:
    """Return the LPIPS of torchmetrics with the same weights."""
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
    lpips = metric.compute()["lpips"]
    assert lpips > 0
    assert lpips == pytest.approx(lpips_of_torchmetrics(alexnet, a, b), rel=1e-5)

    metric.reset()
    metric.update(a, a, labels(a))
    assert metric.compute() == {"lpips": 0.0}


def enlarged(x: Tensor) -> Tensor:
    """Return grey images (B, 1, 16, 8) as RGB images (B, 3, 128, 64)."""
    rgb = x.expand(-1, 3, -1, -1)
    return nn.functional.interpolate(rgb, (128, 64), mode="bilinear", align_corners=False)


@pytest.mark.slow
def test_lpips_of_small_grey_images_is_of_enlarged_rgb_ones(alexnet):
    a = images(3, 1, size=16)[..., :8]
    b = images(3, 2, size=16)[..., :8]
    metric = LPIPS(str(alexnet), "alex")
    metric.update(a, b, labels(a))
    expected = lpips_of_torchmetrics(alexnet, enlarged(a), enlarged(b))
    assert metric.compute()["lpips"] == pytest.approx(expected, rel=1e-5)


def test_lpips_without_its_file_says_where_to_get_it():
    message = r"no\.pth do not exist; get https://.*/vgg16-397923af\.pth"
    with pytest.raises(FileNotFoundError, match=message):
        LPIPS("no.pth", "vgg")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("net", "message"),
    [
        ("squeeze", "net must be one of alex, vgg, got 'squeeze'"),
        ("vgg", r"is not torchvision's vgg16-397923af\.pth"),
    ],
)
def test_lpips_of_another_network_than_its_file_is_refused(net, message, alexnet):
    with pytest.raises(ValueError, match=message):
        LPIPS(str(alexnet), net)


def test_lpips_with_other_weights_is_refused(tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    message = r"other\.pth is not torchvision's alexnet.*features\.0\.weight"
    with pytest.raises(ValueError, match=message):
        LPIPS(str(tmp_path / "other.pth"), "alex")


@pytest.mark.slow
def test_lpips_with_a_truncated_file_is_refused(alexnet, tmp_path):
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
def test_batches_that_cannot_be_compared_are_refused(real, batch, message):
    with pytest.raises(ValueError, match=message):
        FID(Pixels(), real, None).update(batch, batch, labels(batch))


def test_published_statistics_are_of_rgb_images():
    reference = Reference(Path("edm.npz"), np.zeros(F), np.eye(F))
    batch = images(3, 0)
    with pytest.raises(ValueError, match=r"edm\.npz is of RGB images, the generated ones are grey"):
        FID(Pixels(), reference, None).update(batch, batch, labels(batch))


def test_images_teacher_and_labels_belong_together(real):
    metric = FID(Pixels(), real, None)
    batch = images(3, 0)
    with pytest.raises(ValueError, match=r"\(3, 1, 4, 4\), \(2, 1, 4, 4\) and \(3,\)"):
        metric.update(batch, batch[:2], labels(batch))
    with pytest.raises(ValueError, match=r"and \(2,\)"):
        metric.update(batch, batch, labels(batch)[:2])
    with pytest.raises(ValueError, match=r"the teacher's images must be in \[0, 1\]"):
        metric.update(batch, batch + 1, labels(batch))


def test_statistics_of_another_extractor_are_refused(tmp_path):
    other = nn.Sequential(nn.Flatten(), nn.Linear(F, F))
    reference = write_statistics(tmp_path / "s.npz", other, [images(9, 0)])
    message = r"was made with Sequential .*, but the extractor is Pixels "
    with pytest.raises(ValueError, match=message):
        FID(Pixels(), reference, None)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize("kind", [FID, PrecisionRecall])
def test_a_metric_of_no_images_is_an_error(real, kind):
    empty = images(0, 0)
    metric = kind(Pixels(), real, None)
    metric.update(empty, empty, labels(empty))
    with pytest.raises(ValueError, match=r"at least \d images"):
        metric.compute()


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_a_mean_over_no_images_is_an_error():
    with pytest.raises(ValueError, match="ClassAgreement has seen no images"):
        ClassAgreement(Pixels()).compute()
