"""Run 21cmPSDenoiser, which denoises 21-cm power spectra (Breitman et al. 2025).

A simulation shows one realisation of a power spectrum. The network, trained on many,
samples their mean, given one. It is the published U-Net (PyPI 21cmpsdenoiser 1.0.2,
MIT), which predicts eps on the continuous variance-preserving path, with the noisy
spectrum as a second channel of its input. Spectra have 32 k_perp x 16 k_par bins, in
mK^2; the network sees log10 of them.
Shapes: M rows, B samples, H x W bins.
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
    """A range of powers, which a network sees as -1 to 1 in their logarithm.

    Attributes:
        low: log10 of the smallest power in mK^2.
        decades: Width of the range.
    """

    low: float
    decades: float

    def scaled(self, power: Tensor) -> Tensor:
        """Return a power in mK^2 in the network's units."""
        return 2 * (power.log10() - self.low) / self.decades - 1

    def power(self, scaled: Tensor) -> Tensor:
        """Return a power in the network's units in mK^2."""
        return 10 ** (self.low + self.decades * (scaled + 1) / 2)


class PSDenoiser(Model):
    """A network that denoises spectra, conditioned on noisy ones.

    Args:
        network: Returns eps (M, 1, H, W) for x (M, 1, H, W), clock (M,), noisy (M, 1,
            H, W).
        path: Path of its training.
        time_min: Smallest native time tau of its training; below, it is called at
            time_min.
        time_scale: The network's clock is time_scale tau, for tau in [time_min, 1].
        noisy: Range of the spectra to denoise.
        clean: Range of the denoised ones.
        event_shape: (1, H, W).
        micro_batch: Network rows that are evaluated at a time.
        name: Name of the model.
        fingerprint: Hash of its weights.
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

        # Times.
        self.path = path
        self.time_min = time_min
        self.time_scale = time_scale
        time_max = path.canonical(torch.ones((), dtype=torch.float64))
        self.parameterization = NoisePrediction(path, time_max=float(time_max))

        # Spectra.
        self.noisy = noisy
        self.clean = clean
        self.event_shape = tuple(event_shape)
        self.micro_batch = micro_batch
        self.name = name
        self.fingerprint = fingerprint

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
        """Build the published network.

        Args:
            beta_min: Beta of the path at tau = 0.
            beta_max: Beta of the path at tau = 1.
            time_min: As in the constructor.
            time_scale: As in the constructor.
            micro_batch: As in the constructor.
            checkpoint: Another state dict of the network; None: the package's.

        Raises:
            ModuleNotFoundError: The package is not installed.
            FileNotFoundError: The checkpoint does not exist.
            ValueError: It is damaged, or of another network.
        """
        try:
            with torch.random.fork_rng(devices=[]):  # importing it seeds torch
                import psdenoiser
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"model=psdenoiser_21cm needs the package 21cmpsdenoiser ({error}): "
                "pip install 'oss_exp[psdenoiser]', "
                "then pip install --no-deps 21cmpsdenoiser==1.0.2 "
                "(sampling needs none of the simulators it asks for)"
            ) from None

        # Network.
        constants = psdenoiser.denoiser_csts
        height, width = len(constants.kperp), len(constants.kpar)
        size = (height, width)
        network = psdenoiser.UNet(dim=size, channels=2, dim_mults=(1, 2, 4, 8), cdn_len=None)

        # Weights.
        published = Path(psdenoiser.__file__).with_name("denoiser_model.pt")
        file = Path(checkpoint or published).expanduser()
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
        """Return the velocity for noisy spectra (B, H, W) in mK^2, as the package takes them."""
        if condition is None:
            raise ValueError(
                f"{self.name} denoises given spectra; set data=conditions data.conditions=FILE.npz"
            )
        if guidance not in (None, self.guidance):
            raise ValueError(
                f"{self.name} cannot be guided: it has no answer without a condition; "
                f"got {guidance}"
            )
        if tuple(condition.shape[1:]) != self.event_shape[1:]:
            raise ValueError(
                f"{self.name} denoises spectra of shape {self.event_shape[1:]} (k_perp, k_par), "
                f"got {tuple(condition.shape[1:])}; choose another array with data.key"
            )
        if not bool(((condition > 0) & condition.isfinite()).all()):
            raise ValueError(
                f"{self.name} takes logarithms of spectra: they must be positive and finite, "
                "in mK^2"
            )

        noisy = self.noisy.scaled(condition)[:, None]
        return BoundVelocity(self._velocity, noisy, self.micro_batch)

    def decode(self, x0: Tensor) -> Tensor:
        """Return log10 of the power (B, 1, H, W), as 0 to 1 over the network's range of decades."""
        return ((x0 + 1) / 2).clamp(0, 1)

    def _velocity(self, x: Tensor, t: Tensor, noisy: Tensor) -> Tensor:
        network_input, tau = self.parameterization.inputs(x, t)
        clock = self.time_scale * tau.clamp(min=self.time_min)
        eps = self.network(network_input, clock, noisy.to(x))
        return self.parameterization.velocity(eps, x, t)


def load_weights(network: nn.Module, file: Path) -> str:
    """Fill a network from a state dict, without running code of its file; return its SHA-256.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: It holds no weights of this network.
    """
    if not file.is_file():
        raise FileNotFoundError(
            f"psdenoiser weights {file} do not exist; set model.checkpoint=null for the published"
        )
    model = "21cmPSDenoiser's U-Net"
    try:
        network.load_state_dict(read_for(file, network.state_dict(), dict, None, model))
    except ValueError as error:
        raise ValueError(
            f"{file} holds no weights of {model}: {error!s:.400}; "
            "set model.checkpoint=null for the published"
        ) from None
    return file_sha256(file)
