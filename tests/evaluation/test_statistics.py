"""Reference statistics: three layouts are read, other files refused, and moments are NumPy's."""

import io
import zipfile

import numpy as np
import pytest
import torch

from oss_exp.distances import RandomFeatures
from oss_exp.evaluation.statistics import (
    Reference,
    fingerprint,
    frechet,
    gram,
    moments,
    write_statistics,
)

F = 28  # features of EXTRACTOR
EXTRACTOR = RandomFeatures(3, 2, 0)


def images(count: int, channels: int = 3, seed: int = 0) -> torch.Tensor:
    """Return random images (count, channels, 8, 8) in [0, 1]."""
    return torch.rand(count, channels, 8, 8, generator=torch.Generator().manual_seed(seed))


def save(path, **arrays):
    """Save arrays as an .npz file; return its path."""
    np.savez(path, **arrays)
    return path


def gaussian(**changes):
    """Return the arrays of statistics, with changes."""
    return {"mu": np.zeros(F), "sigma": np.eye(F)} | changes


def test_moments_are_numpys_over_any_batches():
    features = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)) * 0.1 + 5
    mu, sigma, count = moments(sum(gram(batch) for batch in features.split(8)))
    assert count == 50
    exact = features.double().numpy()
    np.testing.assert_allclose(mu, exact.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(sigma, np.cov(exact, rowvar=False), rtol=0, atol=1e-12)


def test_frechet_of_gaussians_is_the_closed_form():
    """For commuting covariances it is |mu - mu'|^2 + sum (s_i - s'_i)^2 in any rotated basis."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    mu = rng.normal(size=6)
    other_mu = rng.normal(size=6)
    s = rng.uniform(0.5, 2, 6)
    other_s = rng.uniform(0.5, 2, 6)
    sigma = (basis * s**2) @ basis.T
    other_sigma = (basis * other_s**2) @ basis.T

    expected = ((mu - other_mu) ** 2).sum() + ((s - other_s) ** 2).sum()
    assert frechet(mu, sigma, other_mu, other_sigma) == pytest.approx(expected, rel=1e-10)
    assert frechet(mu, sigma, mu, sigma) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("source", ["written", "read"])
def test_statistics_are_those_of_the_features(source, tmp_path):
    path = tmp_path / "new folder" / "statistics.npz"
    reference = write_statistics(path, EXTRACTOR, images(40).split(12))
    if source == "read":
        reference = Reference.load(path)

    features = EXTRACTOR(images(40)).double().numpy()
    covariance = np.cov(features, rowvar=False)
    assert (reference.n, reference.channels) == (40, 3)
    assert reference.extractor == fingerprint(EXTRACTOR)
    assert reference.features.dtype == np.float16
    np.testing.assert_allclose(reference.mu, features.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(reference.sigma, covariance, rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(reference.features, features, rtol=1e-3, atol=1e-6)
    assert [file.name for file in path.parent.iterdir()] == ["statistics.npz"]


def test_no_more_features_are_kept_than_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("oss_exp.evaluation.statistics.MAX_FEATURES", 10)
    reference = write_statistics(tmp_path / "s.npz", EXTRACTOR, images(20).split(8))
    assert (reference.n, len(reference.features)) == (20, 10)
    expected = EXTRACTOR(images(20))[:10].half()
    torch.testing.assert_close(torch.from_numpy(reference.features), expected)


ADM = {"mu_s": np.zeros(9), "sigma_s": np.eye(9), "arr_0": np.zeros((2, 8, 8, 3), np.uint8)}


@pytest.mark.parametrize("more", [{}, ADM], ids=["EDM", "ADM"])
def test_published_layouts_are_read(tmp_path, more):
    """EDM has two arrays in float32; ADM has spatial statistics and images beside them."""
    mu = np.arange(F, dtype=np.float32)
    sigma = np.diag(np.arange(1.0, F + 1)).astype(np.float32)
    reference = Reference.load(save(tmp_path / "x.npz", mu=mu, sigma=sigma, **more))

    assert reference.mu.dtype == reference.sigma.dtype == np.float64
    assert reference.mu.tolist() == list(range(F))
    assert np.trace(reference.sigma) == F * (F + 1) / 2
    assert reference.channels == 3
    assert (reference.n, reference.features, reference.extractor) == (None, None, None)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(F)}, r"no sigma, only mu; make it again"),
        ({"x": np.zeros(F)}, r"no mu and no sigma, only x"),
        ({"arr_0": np.zeros((4, 8, 8, 3), np.uint8)}, r"holds images \(arr_0\).*write_statistics"),
        (gaussian(sigma=np.zeros((F, F - 1))), r"sigma \(F, F\), .*got \(28,\) and \(28, 27\)"),
        (gaussian(mu=np.zeros((1, F))), r"mu must be \(F,\)"),
        (gaussian(mu=np.full(F, np.nan)), "NaN or infinite"),
        (gaussian(sigma=np.full((F, F), np.inf)), "NaN or infinite"),
        (gaussian(features=np.zeros((9, F), "f2")), "no n and no channels and no extractor"),
        (
            gaussian(features=np.zeros((9, 5), "f2"), n=9, channels=3, extractor="x"),
            r"features must be \(n, 28\)",
        ),
        (gaussian(mu=np.array([None] * F)), r"cannot be read as an \.npz"),  # a pickle
    ],
)
def test_files_that_are_no_statistics_are_refused(tmp_path, arrays, message):
    with pytest.raises(ValueError, match=message):
        Reference.load(save(tmp_path / "bad.npz", **arrays))


@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.99])
def test_truncated_files_are_refused(tmp_path, keep):
    data = write_statistics(tmp_path / "good.npz", EXTRACTOR, [images(9)]).path.read_bytes()
    bad = tmp_path / "bad.npz"
    bad.write_bytes(data[: keep if keep > 1 else int(keep * len(data))])
    with pytest.raises(ValueError, match=r"bad\.npz cannot be read as an \.npz file"):
        Reference.load(bad)


def test_damage_inside_is_found(tmp_path):
    path = save(tmp_path / "x.npz", **gaussian())
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"cannot be read as an \.npz"):
        Reference.load(path)


@pytest.mark.slow
def test_arrays_that_unpack_to_more_than_512_mib_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("arr_0.npy", bytes(1 << 20))  # not read
        with archive.open("mu.npy", "w") as file:
            for _ in range(520):
                file.write(bytes(1 << 20))

    message = r"bomb\.npz cannot be read .*: it unpacks to more than 512 MiB"
    with pytest.raises(ValueError, match=message):
        Reference.load(tmp_path / "bomb.npz")


def test_more_than_8192_features_are_refused(tmp_path):
    wide = np.lib.stride_tricks.as_strided(np.zeros(1, "f2"), (9000,), (0,))
    path = save(tmp_path / "wide.npz", mu=wide, sigma=np.zeros((1, 1), "f2"))
    with pytest.raises(ValueError, match="F at most 8192, got"):
        Reference.load(path)


def test_an_absent_file_is_refused(tmp_path):
    message = r"statistics .*none\.npz is neither a path that exists nor a shipped file"
    with pytest.raises(FileNotFoundError, match=message):
        Reference.load(tmp_path / "none.npz")


def test_a_file_of_one_array_is_refused(tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    (tmp_path / "array.npz").write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match=r"cannot be read as an \.npz file"):
        Reference.load(tmp_path / "array.npz")


def test_statistics_belong_to_an_extractor(tmp_path):
    reference = write_statistics(tmp_path / "s.npz", EXTRACTOR, [images(9)])
    reference.check_extractor(RandomFeatures(3, 2, 0))
    message = r"was made with RandomFeatures .*, but the extractor is RandomFeatures "
    with pytest.raises(ValueError, match=message):
        reference.check_extractor(RandomFeatures(3, 2, 1))


def test_published_statistics_go_with_any_extractor(tmp_path):
    reference = Reference.load(save(tmp_path / "published.npz", **gaussian()))
    reference.check_extractor(RandomFeatures(3, 2, 1))


def test_a_fingerprint_is_of_the_values_not_of_their_layout():
    extractor = RandomFeatures(3, 2, 0)
    assert fingerprint(extractor.to(memory_format=torch.channels_last)) == fingerprint(EXTRACTOR)
    with torch.no_grad():
        extractor.layers[0].bias[0] += 1e-6
    assert fingerprint(extractor) != fingerprint(EXTRACTOR)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], r"need images.* got \[\]"),
        ([images(3) * 2 - 1], r"must be in \[0, 1\], decoded and clipped"),
        ([images(1)], "at least 2 images, got 1"),
    ],
)
def test_images_without_statistics_are_refused(tmp_path, batches, message):
    with pytest.raises(ValueError, match=message):
        write_statistics(tmp_path / "s.npz", EXTRACTOR, batches)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("scale", "message"), [(1e6, "exceed float16"), (float("nan"), "not all finite")]
)
def test_features_without_statistics_are_refused(tmp_path, scale, message):
    class Scaled(RandomFeatures):
        def forward(self, batch):
            return super().forward(batch) * scale

    with pytest.raises(ValueError, match=message):
        write_statistics(tmp_path / "s.npz", Scaled(3, 2, 0), [images(4)])
