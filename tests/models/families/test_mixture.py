"""The mixture's velocity is exact, the shipped mixtures are whole, and the fit recovers them."""

import copy
import shutil

import pytest
import torch

from oss_exp.files import ASSETS
from oss_exp.models.families.mixture import GaussianMixture, fit
from oss_exp.models.guidance import Guidance
from oss_exp.noise import EDMPath

SHIPPED = ["mixture_fashion.safetensors", "mixture_digits.safetensors"]


def at(t: float, rows: int) -> torch.Tensor:
    return torch.full((rows,), t, dtype=torch.float64)


def small_parts() -> dict[str, torch.Tensor]:
    """Five components of rank 2 in six dimensions; classes 0 and 1 have two and three."""
    generator = torch.Generator().manual_seed(0)
    options = {"dtype": torch.float64, "generator": generator}

    return {
        "weights": torch.rand(5, **options) + 0.2,
        "means": torch.randn(5, 6, **options),
        "basis": torch.linalg.qr(torch.randn(5, 6, 2, **options))[0],
        "extra": torch.rand(5, 2, **options) + 0.1,
        "floor": torch.rand(5, **options) / 10 + 0.01,
        "labels": torch.tensor([0, 1, 1, 0, 1]),
    }


def build(parts: dict[str, torch.Tensor]) -> GaussianMixture:
    return GaussianMixture(
        **parts,
        event_shape=(1, 2, 3),
        name="small",
        fingerprint="",
        guidance=Guidance(),
        micro_batch=1000,
    )


def covariances(parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the covariances (C, D, D) of all components."""
    spread = (parts["basis"] * parts["extra"][:, None]) @ parts["basis"].mT
    return spread + parts["floor"][:, None, None] * torch.eye(parts["means"].shape[1]).to(spread)


def draw(
    parts: dict[str, torch.Tensor], count: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw samples (count, D) and return them with their components (count,)."""
    generator = torch.Generator().manual_seed(seed)
    component = torch.multinomial(parts["weights"], count, replacement=True, generator=generator)
    noise = torch.randn(count, parts["means"].shape[1], dtype=torch.float64, generator=generator)
    factors = torch.linalg.cholesky(covariances(parts))
    return parts["means"][component] + torch.einsum(
        "nij,nj->ni", factors[component], noise
    ), component


def dense_velocity(weights, means, sigmas, x, t: float) -> torch.Tensor:
    """Return E[eps - x0 | x] for x (B, D), by one solve with the full covariance a component."""
    eye = torch.eye(x.shape[1], dtype=x.dtype)
    log_density = []
    slope = []

    for weight, mean, sigma in zip(weights, means, sigmas, strict=True):
        total = (1 - t) ** 2 * sigma + t**2 * eye
        normal = torch.distributions.MultivariateNormal((1 - t) * mean, total)
        solved = torch.linalg.solve(total, (x - (1 - t) * mean).T).T
        log_density.append(weight.log() + normal.log_prob(x))
        slope.append(t * solved - mean - (1 - t) * solved @ sigma)

    share = torch.stack(log_density).softmax(0)

    return (share[..., None] * torch.stack(slope)).sum(0)


def assert_relative(value, expected, tolerance):
    assert ((value - expected).abs().max() / expected.abs().max()).item() < tolerance


# --------------------------------------------------------------------------------------------------
# The exact velocity
# --------------------------------------------------------------------------------------------------


def test_velocity_and_denoiser_equal_the_oracle(mixture, velocity, gmm):
    assert_relative(velocity(gmm["fm_x"], gmm["fm_t"]), gmm["fm_v"], 1e-10)
    assert_relative(mixture.denoise(gmm["fm_x"], gmm["fm_t"]), gmm["fm_denoised"], 1e-10)


def test_the_denoiser_behind_an_edm_path_equals_the_oracle(mixture, gmm):
    path = EDMPath()
    t = path.canonical(gmm["edm_sigma"])
    assert_relative(mixture.denoise(gmm["edm_x"] / path.scale(t)[:, None], t), gmm["edm_D"], 1e-10)


@pytest.mark.parametrize("t", [0.0, 1e-6, 0.002, 0.1, 0.5, 0.97, 1.0])
def test_velocity_equals_dense_algebra_from_end_to_end(t):
    parts = small_parts()
    x = (1 - t) * draw(parts, 8, seed=1)[0] + t * draw(parts, 8, seed=2)[0]
    v = build(parts).velocity(None)(x.view(8, 1, 2, 3), at(t, 8))
    expected = dense_velocity(
        parts["weights"] / parts["weights"].sum(), parts["means"], covariances(parts), x, t
    )
    assert_relative(v.flatten(1), expected, 1e-10)


def test_at_clean_data_the_velocity_is_minus_the_data(velocity, gmm):
    v = velocity(gmm["x0_used"], at(0.0, 16))
    # x0 is known, and the mean of eps is 0.
    torch.testing.assert_close(v, -gmm["x0_used"], rtol=0, atol=1e-12)


def test_at_pure_noise_the_velocity_points_from_the_overall_mean(velocity, gmm):
    mean = (gmm["weights"][:, None] * gmm["means"]).sum(0)
    torch.testing.assert_close(velocity(gmm["z"], at(1.0, 16)), gmm["z"] - mean, rtol=0, atol=1e-12)


# --------------------------------------------------------------------------------------------------
# Classes and guidance
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("t", [0.0, 0.3, 0.8, 1.0])
def test_the_velocity_given_a_class_is_that_of_the_mixture_of_its_components(label, t):
    parts = small_parts()
    members = {key: value[parts["labels"] == label] for key, value in parts.items()}
    only = build(members | {"labels": torch.zeros_like(members["labels"])})
    x = draw(parts, 8, seed=1)[0].view(8, 1, 2, 3)
    v = build(parts).velocity(torch.full((8,), label))(x, at(t, 8))
    assert_relative(v, only.velocity(None)(x, at(t, 8)), 1e-12)


@pytest.mark.parametrize("guidance", [-1.0, 0.0, 1.0, 2.5, 7.0])
def test_guidance_moves_along_the_line_from_the_free_to_the_class_velocity(guidance):
    model = build(small_parts())
    label = torch.tensor([0, 1, 1, 0])
    x = draw(small_parts(), 4, seed=1)[0].view(4, 1, 2, 3)
    t = torch.tensor([0.9, 0.6, 0.3, 0.1]).double()
    free = model.velocity(None)(x, t)
    of_class = model.velocity(label)(x, t)
    assert (free - of_class).abs().max() > 0.01
    guided = model.velocity(label, Guidance(guidance))(x, t)
    torch.testing.assert_close(guided, free + guidance * (of_class - free), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("label", "guidance", "rows"), [(None, 1.0, 1), (0, 1.0, 1), (0, 2.0, 2)])
def test_guidance_costs_a_second_network_row(mixture, label, guidance, rows):
    condition = None if label is None else torch.tensor([label])
    assert mixture.velocity(condition, Guidance(guidance)).rows_at(torch.tensor(0.5)) == rows


def test_guidance_without_classes_is_refused(mixture):
    with pytest.raises(ValueError, match=r"scale=2\.0 needs class labels"):
        mixture.velocity(None, Guidance(2.0))


# --------------------------------------------------------------------------------------------------
# Precision, assets and fit
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0.002, 0.5, 1.0])
def test_float32_agrees_with_float64_on_the_oracle_mixture(mixture, velocity, gmm, t):
    x = ((1 - t) * gmm["x0_used"] + t * gmm["z"]).float()
    v = copy.deepcopy(mixture).float().velocity(None)(x, at(t, 16))
    assert v.dtype == torch.float32
    assert_relative(v.double(), velocity(x.double(), at(t, 16)), 1e-4)


@pytest.mark.parametrize("t", [0.002, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("file", SHIPPED)
def test_float32_agrees_with_float64_on_the_shipped_mixtures(file, t):
    model = GaussianMixture.from_asset(file, guidance=Guidance(), micro_batch=64)
    grain, noise = torch.randn(
        2, 16, model.means.shape[1], generator=torch.Generator().manual_seed(0)
    )
    component = torch.arange(16) % len(model.means)
    x0 = model.means[component] + model.floor[component, None].sqrt() * grain
    x = ((1 - t) * x0 + t * noise).view(16, *model.event_shape)
    v = model.velocity(None)(x, at(t, 16))
    assert_relative(v.double(), model.double().velocity(None)(x.double(), at(t, 16)), 1e-4)


@pytest.mark.parametrize("file", SHIPPED)
def test_a_shipped_mixture_is_small_whole_and_orthonormal(file):
    assert (ASSETS / file).stat().st_size <= 4_000_000
    model = GaussianMixture.from_asset(file, guidance=Guidance(), micro_batch=64)
    count, rank = model.extra.shape
    basis = model.flat_basis.unflatten(1, (count, rank)).permute(1, 0, 2)

    torch.testing.assert_close(
        basis.mT @ basis, torch.eye(rank).expand(count, -1, -1), rtol=0, atol=1e-5
    )
    assert model.log_weights.exp().sum().item() == pytest.approx(1, abs=1e-5)
    assert sorted(model.labels.unique().tolist()) == list(range(10))
    assert bool((model.floor > 0).all())
    assert bool((model.extra >= 0).all())


def test_the_shipped_digits_have_the_mean_of_the_data():
    data = pytest.importorskip("sklearn.datasets").load_digits().data / 8 - 1
    model = GaussianMixture.from_asset(
        "mixture_digits.safetensors", guidance=Guidance(), micro_batch=64
    )
    mean = model.log_weights.exp() @ model.means
    torch.testing.assert_close(mean.double(), torch.from_numpy(data.mean(0)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("file", SHIPPED)
def test_a_copy_with_one_changed_byte_is_refused(file, tmp_path):
    for name in (file, file.replace(".safetensors", ".json")):
        shutil.copy(ASSETS / name, tmp_path / name)

    path = tmp_path / file
    assert (
        GaussianMixture.from_asset(str(path), guidance=Guidance(), micro_batch=64).num_classes == 10
    )

    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)

    with pytest.raises(ValueError, match="damaged or was replaced") as caught:
        GaussianMixture.from_asset(str(path), guidance=Guidance(), micro_batch=64)

    assert str(path) in str(caught.value)


def test_decode_maps_minus_one_to_black_and_clips(mixture):
    pixels = mixture.decode(torch.tensor([-3.0, -1.0, 0.0, 0.5, 1.0, 2.0]))
    assert pixels.tolist() == [0, 0, 0.5, 0.75, 1, 1]


def needles() -> dict[str, torch.Tensor]:
    """Two long components at a right angle, which k-means does not separate."""
    return {
        "weights": torch.tensor([0.6, 0.4], dtype=torch.float64),
        "means": torch.tensor([[0, 0, 0], [6, 0, 2]], dtype=torch.float64),
        "basis": torch.tensor([[[1], [0], [0]], [[0], [1], [0]]], dtype=torch.float64),
        "extra": torch.tensor([[9], [4]], dtype=torch.float64),
        "floor": torch.tensor([0.02, 0.02], dtype=torch.float64),
        "labels": torch.tensor([0, 0]),
    }


def far_apart() -> dict[str, torch.Tensor]:
    first = {key: value[[0, 3]] for key, value in small_parts().items()}
    return first | {
        "means": 6 * first["means"],
        "floor": torch.full((2,), 0.02, dtype=torch.float64),
    }


@pytest.mark.parametrize("parts", [far_apart(), needles()], ids=["far_apart", "needles"])
def test_fit_recovers_the_mixture_of_its_samples(parts):
    images, component = draw(parts, 20_000, seed=3)
    labels = torch.zeros(len(images)).long()
    rank = parts["extra"].shape[1]
    fitted = fit(
        images, labels, 2, rank, 0.02, seed=0, iterations=20, progress=lambda count, total: None
    )
    fitted_covariances = covariances(fitted).double()

    for truth in range(2):
        n = int((component == truth).sum())
        match = (fitted["means"].double() - parts["means"][truth]).norm(dim=1).argmin()
        sigma = covariances(parts)[truth]
        # Five standard errors: var(mean_i) = S_ii / n, var(cov_ij) = (S_ii S_jj + S_ij^2) / n.
        variances = sigma.diagonal()

        error = (variances / n).sqrt()
        assert bool(((fitted["means"][match] - parts["means"][truth]).abs() < 5 * error).all())

        error = ((variances[:, None] * variances + sigma**2) / n).sqrt()
        assert bool(((fitted_covariances[match] - sigma).abs() < 5 * error).all())
        assert fitted["weights"][match].item() == pytest.approx(n / len(images), abs=1e-3)

    assert fitted["labels"].tolist() == [0, 0]


def test_fit_keeps_classes_apart_and_reports_progress():
    images, component = draw(small_parts(), 2_000, seed=4)
    labels = small_parts()["labels"][component] * 3  # classes 0 and 3
    calls = []
    fitted = fit(
        images, labels, 1, 2, 0.02, 0, 5, lambda count, total: calls.append((count, total))
    )

    assert fitted["labels"].tolist() == [0, 3]
    assert calls == [(1, 2), (2, 2)]

    for row, label in enumerate((0, 3)):
        torch.testing.assert_close(
            fitted["means"][row].double(), images[labels == label].mean(0), rtol=0, atol=1e-5
        )
        assert fitted["weights"][row].item() == pytest.approx(
            (labels == label).double().mean().item(), abs=1e-6
        )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 0}, "rank >= 1"),
        ({"clusters": 0}, "clusters >= 1"),
        ({"floor": 0.0}, "floor > 0"),
        (
            {"clusters": 3, "rank": 4},
            r"class 0 has 10 images, too few for 3 clusters of rank 4.*<= 10",
        ),
    ],
)
def test_fit_refuses_what_it_cannot_fit(options, words):
    images = torch.randn(10, 6, generator=torch.Generator().manual_seed(0))
    settings = {"clusters": 1, "rank": 2, "floor": 0.01, "seed": 0, "iterations": 1} | options
    with pytest.raises(ValueError, match=words):
        fit(images, torch.zeros(10).long(), **settings, progress=lambda count, total: None)


def test_drawn_samples_have_the_moments_of_their_components():
    model = GaussianMixture.from_asset(
        "mixture_digits.safetensors", guidance=Guidance(), micro_batch=64
    )
    x, labels = model.draw(40_000, seed=1)
    again, _ = model.draw(40_000, seed=1)

    assert x.shape == (40_000, 1, 8, 8)
    assert torch.equal(x, again)

    basis = model.flat_basis.unflatten(1, (10, -1))

    for label in (0, 4, 9):
        members = x[labels == label].flatten(1)
        component = int((model.labels == label).nonzero())
        assert len(members) / 40_000 == pytest.approx(
            float(model.log_weights[component].exp()), abs=0.01
        )
        torch.testing.assert_close(members.mean(0), model.means[component], rtol=0, atol=0.06)
        expected = basis[:, component] * model.extra[component] @ basis[:, component].T
        expected = expected + model.floor[component] * torch.eye(64)
        torch.testing.assert_close(members.T.cov(), expected, rtol=0, atol=0.06)
