"""A stand-in for the parts of ComfyUI that the nodes use, which no package registry has.

Flow models carry x_t and sigma = t, others x0 + sigma eps. KSAMPLER scales the noise, by
sqrt(1 + sigma^2) at the model's largest sigma, wraps the guider for masks, and calls
sampler(model, x, sigmas, extra_args, callback, disable).
"""

import math
import sys
import types
from pathlib import Path
from types import MappingProxyType

import torch


class EPS:
    """The conventions of a model in sigma / alpha."""

    def __init__(self, sigma_max: float = 1e9):
        self.sigma_max = torch.tensor(sigma_max)

    def noise_scaling(self, sigma, noise, latent_image, max_denoise=False):
        return noise * ((1 + sigma**2).sqrt() if max_denoise else sigma) + latent_image

    def inverse_noise_scaling(self, sigma, latent):
        return latent


class CONST(EPS):
    """The conventions of a flow model."""

    def noise_scaling(self, sigma, noise, latent_image, max_denoise=False):
        return sigma * noise + (1 - sigma) * latent_image

    def inverse_noise_scaling(self, sigma, latent):
        return latent / (1 - sigma)


class Patcher:
    """A MODEL of ComfyUI around denoisers x0 = f(x, sigma), with a prompt and without."""

    def __init__(self, sampling, conditional, free=None, dtype=torch.float32):
        self.model = types.SimpleNamespace(
            model_sampling=sampling, get_dtype=lambda: dtype, scale_latent_inpaint=scaled
        )
        self.model.answers = (conditional, free)
        self.patches = {}
        self.load_device = "cpu"

    def get_model_object(self, name):
        return getattr(self.model, name)


def scaled(x, sigma, noise, latent_image, **_):
    """Return the latent image noised to sigma, for masks."""
    sigma = sigma.reshape(-1, *[1] * (x.ndim - 1))
    return sigma * noise + (1 - sigma) * latent_image


class CFGGuider:
    """A guider that combines the denoisers with and without a prompt."""

    def __init__(self, patcher, cfg=1.0):
        self.model_patcher = patcher
        self.inner_model = patcher.model
        self.cfg = cfg

    def __call__(self, x, sigma, model_options, seed=None):
        conditional, free = self.inner_model.answers
        needs_both = model_options.get("disable_cfg1_optimization", False)
        skips_uncond = math.isclose(self.cfg, 1) and not needs_both
        cond = conditional(x, sigma)
        uncond = 0.0 if skips_uncond else free(x, sigma)
        denoised = uncond + (cond - uncond) * self.cfg
        for after in model_options.get("sampler_post_cfg_function", []):
            arguments = {"denoised": denoised, "cond_denoised": cond, "uncond_denoised": uncond}
            denoised = after(arguments)
        return denoised

    def sample(
        self,
        noise,
        latent_image,
        sampler,
        sigmas,
        denoise_mask=None,
        callback=None,
        disable_pbar=False,
        seed=None,
    ):
        return sampler.sample(
            self,
            sigmas,
            {"model_options": {}, "seed": seed},
            callback,
            noise,
            latent_image,
            denoise_mask,
        )


class KSamplerX0Inpaint:
    """A denoiser that keeps the latent image outside a mask."""

    def __init__(self, model):
        self.inner_model = model

    def __call__(self, x, sigma, denoise_mask, model_options=MappingProxyType({}), seed=None):
        if denoise_mask is not None:
            noised = self.inner_model.inner_model.scale_latent_inpaint(
                x, sigma, self.noise, self.latent_image
            )
            x = x * denoise_mask + noised * (1 - denoise_mask)
        out = self.inner_model(x, sigma, model_options=model_options, seed=seed)
        if denoise_mask is None:
            return out
        return out * denoise_mask + self.latent_image * (1 - denoise_mask)


class KSAMPLER:
    """A SAMPLER of ComfyUI around a function."""

    def __init__(
        self,
        sampler_function,
        extra_options=MappingProxyType({}),
        inpaint_options=MappingProxyType({}),
    ):
        self.sampler_function = sampler_function
        self.extra_options = extra_options

    def sample(
        self,
        model_wrap,
        sigmas,
        extra_args,
        callback,
        noise,
        latent_image=None,
        denoise_mask=None,
        disable_pbar=True,
    ):
        extra_args["denoise_mask"] = denoise_mask
        model = KSamplerX0Inpaint(model_wrap)
        model.latent_image = latent_image
        model.noise = noise

        # The noised latent.
        sampling = model_wrap.inner_model.model_sampling
        largest = math.isclose(float(sampling.sigma_max), float(sigmas[0]), rel_tol=1e-5)
        x = sampling.noise_scaling(sigmas[0], noise, latent_image, largest)

        def tell(at):
            if callback is not None:
                callback(at["i"], at["denoised"], at["x"], len(sigmas) - 1)

        options = {
            "extra_args": extra_args,
            "callback": tell,
            "disable": True,
            **self.extra_options,
        }
        latent = self.sampler_function(model, x, sigmas, **options)
        return sampling.inverse_noise_scaling(sigmas[-1], latent)


def sample_custom(
    model,
    noise,
    cfg,
    sampler,
    sigmas,
    positive,
    negative,
    latent_image,
    noise_mask=None,
    callback=None,
    disable_pbar=False,
    seed=None,
):
    """Sample with guidance, as SamplerCustom does."""
    return CFGGuider(model, cfg).sample(
        noise, latent_image, sampler, sigmas, noise_mask, callback, disable_pbar, seed
    )


def prepare_noise(latent_image, seed, noise_inds=None):
    """Return noise of the latent image's shape."""
    generator = torch.manual_seed(seed)
    return torch.randn(latent_image.shape, generator=generator, dtype=latent_image.dtype)


def folder_paths(folder: Path) -> dict:
    """Return the module `folder_paths` of an installation with its models in `folder`."""
    paths: dict[str, tuple[list[str], set[str]]] = {}

    def get_filename_list(name):
        roots = map(Path, paths[name][0])
        return sorted({path.name for root in roots for path in root.rglob("*") if path.is_file()})

    def get_full_path(name, file):
        inside = Path("/", file).resolve().relative_to("/")
        for root in paths[name][0]:
            if (Path(root) / inside).is_file():
                return str(Path(root) / inside)
        return None

    return {
        "folder_names_and_paths": paths,
        "models_dir": str(folder),
        "get_filename_list": get_filename_list,
        "get_full_path": get_full_path,
    }


def install(monkeypatch, folder: Path) -> dict[str, list]:
    """Install the stand-in as ComfyUI with its models in `folder`.

    Returns:
        {"steps": [(step, total, x0)]}, which fills during runs as a preview shows them.
    """
    preview: dict[str, list] = {"steps": []}

    def prepare_callback(model, steps):
        return lambda step, x0, x, total: preview["steps"].append((step, total, x0))

    modules = {
        "comfy": {},
        "comfy.model_sampling": {"CONST": CONST},
        "comfy.samplers": {"KSAMPLER": KSAMPLER},
        "comfy.sample": {
            "sample_custom": sample_custom,
            "prepare_noise": prepare_noise,
            "fix_empty_latent_channels": lambda model, latent: latent,
        },
        "comfy.utils": {"PROGRESS_BAR_ENABLED": False},
        "latent_preview": {"prepare_callback": prepare_callback},
        "folder_paths": folder_paths(folder),
    }
    for name, content in modules.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
        if "." in name:
            setattr(sys.modules["comfy"], name.split(".")[1], module)
    return preview
