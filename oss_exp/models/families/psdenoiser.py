"""21cmPSDenoiser: a noisy 21-cm power spectrum -> samples of its mean, by conditional diffusion (Breitman et al. 2025).

One simulation shows one realisation of a power spectrum; the network, trained on many, says what their mean may be. It
is the published one (PyPI 21cmpsdenoiser 1.0.2, MIT): a U-Net that predicts eps on the continuous variance-preserving
path, with the noisy spectrum as a second channel of its input. Spectra are 32 k_perp x 16 k_par bins, in mK^2; the
network sees log10 of them. Legend: M rows, B samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from oss_exp.checks import require_range
from oss_exp.models.base import Model
from oss_exp.models.checkpoints.weights import file_sha256, read_for
from oss_exp.models.guidance import UNGUIDED, Guidance
from oss_exp.models.parameterization import NoisePrediction
from oss_exp.noise import VPPath
from oss_exp.noise.paths import require_time_scale
from oss_exp.velocity import BoundVelocity


@dataclass(frozen=True)
class LogRange:
    """Powers from 10^low mK^2 over so many decades, as -1 to 1 in their logarithm."""

    low: float
    decades: float

    def scaled(self, power: Tensor) -> Tensor:
        """mK^2 -> the network's units."""
        return 2 * (power.log10() - self.low) / self.decades - 1

    def power(self, scaled: Tensor) -> Tensor:
        """The network's units -> mK^2."""
        return 10 ** (self.low + self.decades * (scaled + 1) / 2)


class PSDenoiser(Model):
    """network(x (M, 1, H, W), clock (M,), noisy (M, 1, H, W)) -> eps (M, 1, H, W), conditioned on noisy spectra.

    time_scale: the network's clock is time_scale tau, for tau in [time_min, 1] of `path`; below time_min it has seen
                nothing and is asked at time_min.
    noisy, clean: the ranges in which it sees the spectra to denoise, and in which it gives denoised ones.
    micro_batch: network rows evaluated at a time.
    """

    num_classes = None
    guidance = UNGUIDED  # none: the network was not trained to answer without a condition

    def __init__(
        self,
        network: nn.Module,
        path: VPPath,
        time_min: float,
        time_scale: float,
        noisy: LogRange,
        clean: LogRange,
        event_shape: tuple[int, int, int],
        micro_batch: int,
        name: str,
        fingerprint: str,
    ):
        super().__init__()
        require_range(above=0, below=1, time_min=time_min)
        require_time_scale(time_scale)
        require_range(at_least=1, micro_batch=micro_batch)
        self.network = network.eval().requires_grad_(False)
        self.path, self.time_min, self.time_scale = path, time_min, time_scale
        self.parameterization = NoisePrediction(
            path, time_max=float(path.canonical(torch.ones((), dtype=torch.float64)))
        )
        self.noisy, self.clean, self.event_shape = noisy, clean, tuple(event_shape)
        self.micro_batch, self.name, self.fingerprint = micro_batch, name, fingerprint

    @classmethod
    def from_package(
        cls,
        beta_min: float = 0.1,
        beta_max: float = 20.0,
        time_min: float = 0.001,
        time_scale: float = 999.0,
        micro_batch: int = 64,
        checkpoint: str | Path | None = None,
    ) -> PSDenoiser:
        """The published network. checkpoint: other weights of it, a state dict; null: those of the package.

        ModuleNotFoundError without the package; FileNotFoundError or ValueError for a checkpoint that is missing,
        damaged or of another network.
        """
        try:
            with torch.random.fork_rng(devices=[]):  # importing it seeds torch
                import psdenoiser
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"model=psdenoiser_21cm needs the package 21cmpsdenoiser ({error}): pip install 'oss_exp[psdenoiser]', "
                "then pip install --no-deps 21cmpsdenoiser==1.0.2 (sampling needs none of the simulators it asks for)"
            ) from None
        constants = psdenoiser.denoiser_csts
        height, width = len(constants.kperp), len(constants.kpar)
        network = psdenoiser.UNet(
            dim=(height, width), channels=2, dim_mults=(1, 2, 4, 8), cdn_len=None
        )
        file = Path(
            checkpoint or Path(psdenoiser.__file__).with_name("denoiser_model.pt")
        ).expanduser()
        return cls(
            network=network,
            path=VPPath(beta_min, beta_max),
            time_min=time_min,
            time_scale=time_scale,
            noisy=LogRange(float(constants.noisy_bias[0]), float(constants.noisy_scale[0])),
            clean=LogRange(float(constants.mean_bias[0]), float(constants.mean_scale[0])),
            event_shape=(1, height, width),
            micro_batch=micro_batch,
            name="psdenoiser_21cm",
            fingerprint=load_weights(network, file),
        )

    def velocity(self, condition: Tensor | None, guidance: Guidance | None = None) -> BoundVelocity:
        """condition: noisy spectra (B, H, W) in mK^2, as the package takes them."""
        if condition is None:
            raise ValueError(
                f"{self.name} denoises given spectra; set data=conditions data.conditions=FILE.npz"
            )
        if guidance not in (None, self.guidance):
            raise ValueError(
                f"{self.name} cannot be guided: it has no answer without a condition; got {guidance}"
            )
        if tuple(condition.shape[1:]) != self.event_shape[1:]:
            raise ValueError(
                f"{self.name} denoises spectra of shape {self.event_shape[1:]} (k_perp, k_par), got "
                f"{tuple(condition.shape[1:])}; choose another array with data.key"
            )
        if not bool(((condition > 0) & condition.isfinite()).all()):
            raise ValueError(
                f"{self.name} takes logarithms of spectra: they must be positive and finite, in mK^2"
            )
        return BoundVelocity(
            self._velocity, self.noisy.scaled(condition)[:, None], self.micro_batch
        )

    def decode(self, x0: Tensor) -> Tensor:
        """(B, 1, H, W) -> [0, 1], log10 of the power in units of the network's range (11.2 decades in the package)."""
        return ((x0 + 1) / 2).clamp(0, 1)

    def _velocity(self, x: Tensor, t: Tensor, noisy: Tensor) -> Tensor:
        question, tau = self.parameterization.question(x, t)
        eps = self.network(question, self.time_scale * tau.clamp(min=self.time_min), noisy.to(x))
        return self.parameterization.velocity(eps, x, t)


def load_weights(network: nn.Module, file: Path) -> str:
    """Fill the network from a state dict on disk, none of which is executed; returns the file's SHA-256."""
    if not file.is_file():
        raise FileNotFoundError(
            f"psdenoiser weights {file} do not exist; set model.checkpoint=null for the published"
        )
    model = "21cmPSDenoiser's U-Net"
    try:
        network.load_state_dict(read_for(file, network.state_dict(), dict, None, model))
    except ValueError as error:
        raise ValueError(
            f"{file} holds no weights of {model}: {error!s:.400}; set model.checkpoint=null for the published"
        ) from None
    return file_sha256(file)
