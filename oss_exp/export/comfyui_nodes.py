"""Step schedules in ComfyUI, k-diffusion and webui: orders, fitted steps and analytic starts, which no list holds.

`oss-exp task=export exporter=comfyui_nodes` writes this file, which needs nothing else of oss_exp, and the schedules.
ComfyUI finds them in `schedules` beside it and in its models/oss_schedules. Times t are those of flow matching, x_t =
(1 - t) x0 + t eps. A flow model's sigma is t; another's is t / (1 - t), and its latents are x_t / (1 - t).
Legend: B samples, K steps, G conditions, *E a latent's dims.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from tqdm.auto import trange

# pyright: reportMissingImports=false, reportPossiblyUnboundVariable=false, reportOptionalMemberAccess=false
try:
    import folder_paths
    import latent_preview
    from comfy import model_sampling, sample, samplers, utils
except ImportError:  # in k-diffusion or webui
    folder_paths = None

FORMAT, VERSION, FOLDER = "oss_exp/scheduler", 1, "oss_schedules"
LIMIT, MEAN_LIMIT = 1 << 24, 1 << 29  # bytes that are read of a schedule and of its mean
KNOWN = "format version times weights start start_time answers mean range provenance strength num_inference_steps"
LAST_SIGMA = 4096.0  # of a chain that has no signal left, as diffusers has it
FULL = 0.9  # schedules whose noise is less begin at an image
KINDS = {
    True: "a flow model",
    False: "one of sigma / alpha",
    None: "one of no known kind; connect a model that says",
}
said: set[tuple[str, str]] = set()  # warnings are given once


@dataclass(frozen=True, eq=False)
class Schedule:
    """What a file says."""

    name: str
    times: list[float]  # K + 1, decreasing, the last 0
    weights: list[
        list[float]
    ]  # K rows over (x, first state, mean, newest answers, older ...): the next state
    start: str  # pinned, free: the noise is the first state; analytic: it is a jump away, towards the mean
    start_time: float  # the noise is start_time * eps
    answers: int  # of a call: 1, or 2 where the steps weigh the guided and the unguided one apart
    strength: float | None  # of a schedule that begins at an image
    measured: dict[str, Any]  # the certificate: where the schedule was found to hold
    about: dict[str, Any]  # its provenance
    mean: Tensor | None  # (G, *E) or (G,)

    def clock(self, flow: bool) -> list[float]:
        """Return the times, none later than what a sigma can say."""
        return self.times if flow else [min(t, LAST_SIGMA / (1 + LAST_SIGMA)) for t in self.times]

    def sigmas(self, flow: bool) -> Tensor:
        """Return the K + 1 sigmas of such a model, float32 as samplers take them."""
        return torch.tensor(
            [t if flow else t / (1 - t) for t in self.clock(flow)], dtype=torch.float32
        )

    def for_flow(self, flow: bool | None) -> bool:
        """Whether the model is a flow model. ValueError where nobody says (None), or where the file says otherwise."""
        clock = _dict(self.about.get("native")).get("clock")
        planned = flow if clock is None else clock == "flow time"
        if planned is None or flow not in (None, planned):
            raise ValueError(
                f"schedule {self.name} is for {KINDS[planned]}, and the model is {KINDS[flow]}"
            )
        return planned


def load(file: str | Path) -> Schedule:
    """Read a schedule and its mean. OSError or ValueError says what is wrong with it, and what to do."""
    path = Path(file)
    try:
        if path.stat().st_size > LIMIT:
            raise ValueError(f"more than {LIMIT >> 20} MiB")
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"schedule {path.name} is not complete JSON ({error!s:.200}); write it again"
        ) from None
    get: Any = _dict(record).get
    if get("format") != FORMAT or get("version") != VERSION:
        command = "oss-exp task=export exporter=comfyui_nodes task.schedule=FILE"
        raise ValueError(
            f"{path.name} is no {FORMAT} of version {VERSION}; where oss_exp is, make one by {command}"
        )
    if unknown := {*record} - {*KNOWN.split(), "begin_index"}:
        raise ValueError(
            f"schedule {path.name} has {min(unknown)!r:.50}, which these nodes do not know; update them"
        )
    times, rows, begun, strength = get("times"), get("weights"), get("start_time"), get("strength")
    mean, start, wrong = _mean(path, get("mean")), get("start"), None
    if (
        not _numbers(times, 2)
        or times[0] > 1
        or times[-1] != 0
        or any(a <= b for a, b in pairwise(times))
    ):
        wrong = "times"
    elif (
        not isinstance(rows, list)
        or len(rows) != len(times) - 1
        or not all(_numbers(row, 4) for row in rows)
    ):
        wrong = "weights"
    elif (
        start not in ("pinned", "free", "analytic")
        or not _numbers([begun], 1)
        or not times[0] <= begun <= 1
    ):
        wrong = "start"
    elif mean is None and (start == "analytic" or any(row[2] for row in rows)):
        wrong = "mean (none)"
    elif get("answers", 1) not in (1, 2) or not (strength is None or _numbers([strength], 1)):
        wrong = "answers or strength"
    if wrong:
        raise ValueError(f"schedule {path.name} has wrong {wrong}; write it again")
    about = _dict(get("range")), _dict(get("provenance"))
    return Schedule(path.stem, times, rows, start, begun, get("answers", 1), strength, *about, mean)


def _mean(path: Path, named: Any) -> Tensor | None:
    """The tensor of a schedule's second file."""
    if named is None:
        return None
    name = str(_dict(named).get("file"))
    file = path.with_name(Path(name).name or "mean")
    if file.name != name or not file.is_file():
        raise FileNotFoundError(
            f"the mean {name!r:.200} of schedule {path.name} is not beside it; copy it too"
        )
    data = b"" if file.stat().st_size > MEAN_LIMIT else file.read_bytes()
    if hashlib.sha256(data).hexdigest() != _dict(named).get("sha256"):
        raise ValueError(f"{name} is not the mean of schedule {path.name}; copy both again")
    try:
        mean = safetensors.torch.load(data)["mean"]
    except Exception:  # whatever the bytes are
        mean = torch.empty(0)
    if not (
        mean.is_floating_point()
        and mean.ndim > 0
        and mean.numel() > 0
        and bool(mean.isfinite().all())
    ):
        raise ValueError(
            f"{name} holds no mean of finite numbers; write schedule {path.name} again"
        )
    return mean


def _numbers(values: Any, least: int) -> bool:
    """Whether this is a list of numbers, at least so many, none of them huge or NaN."""
    listed = isinstance(values, list) and len(values) >= least
    return listed and all(type(value) in (int, float) and -1e9 < value < 1e9 for value in values)


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


@torch.no_grad()
def sample_oss(
    model,
    x,
    sigmas,
    extra_args=None,
    callback=None,
    disable=None,
    *,
    schedule: Schedule,
    flow: bool,
    condition=0,
) -> Tensor:
    """Run a schedule as samplers of ComfyUI and k-diffusion do: x (B, *E) at sigmas[0] -> the latents at sigmas[-1].

    model (x, sigma (B,), **extra_args) -> x0, guided or not. condition: which mean is all samples', or each one's (B,).
    sigmas: the schedule's, or a part of them where its steps remember nothing, as two experts share them.
    """
    extra_args = extra_args or {}
    guider = getattr(model, "inner_model", None)
    if hasattr(guider, "model_patcher"):  # in ComfyUI
        schedule.for_flow(is_flow(guider.model_patcher))
        warn(
            schedule,
            {
                "shape": list(x.shape[1:]),
                **setting_of(guider.model_patcher, getattr(guider, "cfg", None)),
            },
        )
    begin, count = _part(schedule, sigmas, flow)
    times, mask = schedule.clock(flow)[begin : begin + count + 1], extra_args.get("denoise_mask")
    scale = [1.0 if flow else 1 / (1 - t) for t in times]  # of the model's latents, over x_t
    mean, clean = _mean_of(schedule, x, condition), []
    state: Any = x / scale[0] if begin else _first_state(schedule, model, x, times[0], flow, mean)
    first = state
    for step in trange(count, disable=disable):
        latents, sigma = state * scale[step], times[step] * scale[step]
        denoised, answers = _ask(
            model, latents, x.new_full((len(x),), sigma), extra_args, schedule.answers
        )
        if callback is not None:
            callback(
                {
                    "x": latents,
                    "i": step,
                    "sigma": sigmas[step],
                    "sigma_hat": sigmas[step],
                    "denoised": denoised,
                }
            )
        clean[:0] = answers
        terms = zip(schedule.weights[begin + step], [state, first, mean, *clean], strict=False)
        state = sum(
            (weight * vector for weight, vector in terms if weight != 0), torch.zeros_like(x)
        )
    if mask is not None and times[-1] == 0:  # what is to stay stays exactly
        state = state * mask + model.latent_image * (1 - mask)
    return state * scale[-1]


def _first_state(
    schedule: Schedule, model, x: Tensor, t: float, flow: bool, mean: Tensor | float
) -> Tensor:
    """The state at the first time t, of noise that the caller has scaled for t, and of its image, where it has one."""
    image, noise = getattr(model, "latent_image", None), getattr(model, "noise", None)
    image = torch.zeros_like(x) if image is None else image.to(x)
    if flow or noise is None:  # else ComfyUI may have scaled it by sqrt(1 + sigma^2)
        noise = (x - (1 - t) * image) / t if flow else (x - image) * (1 - t) / t
    begun = t if schedule.start == "pinned" else schedule.start_time
    state = begun * noise.to(x) + (1 - begun) * image
    return t / begun * state + (1 - t / begun) * mean if schedule.start == "analytic" else state


def _ask(
    model, x: Tensor, sigma: Tensor, extra_args: dict[str, Any], count: int
) -> tuple[Tensor, list[Tensor]]:
    """The model's x0, and it alone or, guided first, the two that it is mixed of."""
    if count == 1:
        denoised = model(x, sigma, **extra_args)
        return denoised, [denoised]
    seen, mask = {}, extra_args.get("denoise_mask")
    options = {**extra_args.get("model_options", {}), "disable_cfg1_optimization": True}
    after = options.get("sampler_post_cfg_function", [])
    options["sampler_post_cfg_function"] = [
        lambda given: seen.update(given) or given["denoised"],
        *after,
    ]
    denoised = model(x, sigma, **{**extra_args, "model_options": options})
    apart: list[Any] = [seen.get("cond_denoised"), seen.get("uncond_denoised")]
    if any(answer is None for answer in apart):
        raise ValueError(
            "the schedule weighs guided and unguided answers apart; sample with a negative prompt and CFG"
        )
    return denoised, apart if mask is None else [
        each * mask + model.latent_image * (1 - mask) for each in apart
    ]


def _part(schedule: Schedule, sigmas: Tensor, flow: bool) -> tuple[int, int]:
    """Which step of the schedule the sigmas begin with, and how many they are."""
    own, given, count, name = (
        schedule.sigmas(flow),
        sigmas.float().cpu().flatten(),
        len(sigmas) - 1,
        schedule.name,
    )
    for begin in range(len(own) - count) if count > 0 else ():
        if torch.allclose(own[begin : begin + count + 1], given, rtol=1e-4, atol=1e-7):
            rows = enumerate(schedule.weights[begin : begin + count], 1)
            if begin and any(
                row[1] or any(row[3 + schedule.answers * calls :]) for calls, row in rows
            ):
                raise ValueError(
                    f"steps of schedule {name} remember those before; give one sampler all of its sigmas"
                )
            return begin, count
    raise ValueError(
        f"the sigmas are not those of schedule {name}; connect the SIGMAS of its OSS Schedule node"
    )


def _mean_of(schedule: Schedule, x: Tensor, condition: int | Tensor) -> Tensor | float:
    """The mean (B, *E), or (*E) of all samples, of their conditions; 0 where there is none."""
    mean, index = schedule.mean, torch.as_tensor(condition)
    if mean is None:
        return 0.0
    if not 0 <= int(index.min()) <= int(index.max()) < len(mean):
        raise ValueError(
            f"schedule {schedule.name} has means of {len(mean)} conditions, 0 to {len(mean) - 1}"
        )
    if (
        mean.ndim == 3
        and x.ndim == 4
        and mean.shape[2] == 4 * x.shape[1]
        and mean[0].numel() == x[0].numel()
    ):
        packed = mean.reshape(
            len(mean), x.shape[2] // 2, x.shape[3] // 2, -1, 2, 2
        )  # as pipelines of FLUX do
        mean = packed.permute(0, 3, 1, 4, 2, 5).reshape(len(mean), *x.shape[1:])
    if mean.ndim > 1 and mean.shape[1:] != x.shape[1:]:
        shapes = [tuple(each.shape[1:]) for each in (mean, x)]
        raise ValueError(
            f"schedule {schedule.name} has a mean of shape {shapes[0]}, the latents have {shapes[1]}"
        )
    chosen = mean.to(x)[index.to(x.device)]
    return chosen if mean.ndim > 1 or index.ndim == 0 else chosen.reshape(-1, *[1] * (x.ndim - 1))


def for_k_diffusion(
    file: str | Path, flow: bool | None = None, condition: int | Tensor = 0, webui: bool = False
):
    """Return a sampler with k-diffusion's arguments, and sigmas. webui: it runs these, whatever sigmas it is given."""
    schedule = load(file)
    options = {"schedule": schedule, "flow": schedule.for_flow(flow), "condition": condition}
    own = schedule.sigmas(options["flow"])

    def sampler(model, x, sigmas, extra_args=None, callback=None, disable=None):
        if webui:
            x, sigmas = x * (float(own[0]) / float(sigmas[0])), own.to(x.device)
        return sample_oss(model, x, sigmas, extra_args, callback, disable, **options)

    return sampler, own


def outside(measured: dict[str, Any], setting: dict[str, Any]) -> list[str]:
    """Return where a setting {axis: value, None: unknown} is outside of a certificate, and what was measured there."""
    found = []
    for axis, value in setting.items():
        base = measured["base"].get(axis) if measured else None
        if (
            value is None
            or base is None
            or value == base
            or (axis == "shape" and len(value) != len(base))
        ):
            continue
        cells = [cell for cell in measured["cells"] if cell["axis"] == axis]
        near = [cell for cell in cells if value is True or cell["value"] == value]
        if not near and isinstance(value, float):  # between two that were measured
            points = sorted(
                [*cells, {"value": base, "loss": 0.0}], key=lambda point: point["value"]
            )
            near = [
                p
                for pair in pairwise(points)
                if pair[0]["value"] < value < pair[1]["value"]
                for p in pair
            ]
        if not near:
            known = ", ".join(str(point) for point in [base, *(cell["value"] for cell in cells)])
            found.append(f"nothing was measured at {axis}={value}, only at {known}")
        elif (worst := max(near, key=lambda point: point["loss"]))["loss"] > measured["tolerance"]:
            lost = "{loss:.1f} dB ({loss_interval[0]:.1f} to {loss_interval[1]:.1f}, n={n}; gain {gain:+.1f})"
            found.append(
                f"{axis}={value} is outside of its range: at {worst['value']} it lost {lost.format(**worst)}"
            )
    return found


def warn(schedule: Schedule, setting: dict[str, Any]) -> list[str]:
    """Return what there is to say of the schedule in such a setting, and log it the first time."""
    try:
        found = outside(schedule.measured, setting)
    except (AttributeError, LookupError, TypeError, ValueError):
        found = ["its certificate is damaged; certify it again"]
    for text in found:
        if (schedule.name, text) not in said:
            said.add((schedule.name, text))
            logging.warning("OSS schedule %s: %s", schedule.name, text)
    return found


def setting_of(patcher, cfg: float | None) -> dict[str, Any]:
    """What a MODEL of ComfyUI and its guidance are, on the axes of a certificate."""
    setting: dict[str, Any] = {"guidance": None if cfg is None else float(cfg)}
    if patcher is not None:
        setting |= {
            "dtype": str(patcher.model.get_dtype()).split(".")[-1],
            "lora": bool(patcher.patches) or "",
        }
    return setting


def is_flow(patcher) -> bool | None:
    """Whether a MODEL of ComfyUI, where one is given, is a flow model."""
    return patcher and isinstance(patcher.get_model_object("model_sampling"), model_sampling.CONST)


def describe(schedule: Schedule) -> str:
    """Return what a schedule is for and where it holds, in a few lines."""
    model, measured = _dict(schedule.about.get("model")), schedule.measured
    begins = (
        "pure noise" if schedule.strength is None else f"an image, denoise={schedule.strength:g}"
    )
    lines = [
        f"{schedule.name}: {len(schedule.weights)} network calls, {schedule.start} start at {begins}"
    ]
    lines.append(
        f"searched on {model.get('name', '?')}, guidance {_dict(model.get('guidance')).get('scale', '?')}"
    )
    try:
        for cell in measured["cells"]:
            numbers = f"{cell['psnr']:.1f} dB to its teacher, {cell['baseline']:.1f} by {measured['baseline']}"
            lines.append(
                f"{cell['axis']}={cell['value']}: {numbers}, loss {cell['loss']:.1f}, n={cell['n']}"
            )
    except (AttributeError, LookupError, TypeError, ValueError):
        lines.append(
            "it has no certificate: where it holds was not measured (oss-exp task=certify)"
        )
    return "\n".join(lines)


class _Node:
    """What the nodes share."""

    CATEGORY, FUNCTION, REQUIRED, OPTIONAL = "sampling/oss", "run", "", ""

    @classmethod
    def VALIDATE_INPUTS(cls, schedule):
        try:
            cls.find(schedule)
        except (OSError, ValueError) as error:
            return str(error)
        return True

    @classmethod
    def IS_CHANGED(cls, schedule, **_):
        return Path(folder_paths.get_full_path(FOLDER, schedule) or __file__).read_text(
            errors="replace"
        )

    @staticmethod
    def find(name: str) -> Schedule:
        if (path := folder_paths.get_full_path(FOLDER, name)) is None:
            raise ValueError(f"there is no schedule {name!r:.200}; put one into models/{FOLDER}")
        return load(path)

    @classmethod
    def prepared(cls, name: str, model, denoise: float, condition: int):
        """SIGMAS, SAMPLER, and what the schedule is for."""
        schedule = cls.find(name)
        strength = schedule.strength or (1 if schedule.start_time >= FULL else schedule.start_time)
        if abs(denoise - strength) > 0.005:
            begin = "pure noise" if strength == 1 else "an image"
            raise ValueError(
                f"schedule {schedule.name} begins at {begin}: set denoise={strength:.2f}, or search another"
            )
        flow = schedule.for_flow(is_flow(model))
        sampler = samplers.KSAMPLER(
            sample_oss, {"schedule": schedule, "flow": flow, "condition": condition}
        )
        return schedule.sigmas(flow), sampler, describe(schedule)

    @classmethod
    def INPUT_TYPES(cls):
        listed = [
            name
            for name in folder_paths.get_filename_list(FOLDER)
            if re.search(r"(?<!\.mean)\.json$", name)
        ]
        kinds = {
            "schedule": (listed or [f"none in models/{FOLDER}"],),
            "model": ("MODEL",),
            "latent_image": ("LATENT",),
        }
        kinds |= {"positive": ("CONDITIONING",), "negative": ("CONDITIONING",)}
        kinds["seed"] = (
            "INT",
            {"default": 0, "min": 0, "max": 2**64 - 1, "control_after_generate": True},
        )
        kinds["cfg"] = (
            "FLOAT",
            {"default": 1.0, "min": 0.0, "max": 100.0, "step": 0.1, "round": 0.01},
        )
        kinds["denoise"] = ("FLOAT", {"default": 1.0, "min": 0.0, "max": 1.0, "step": 0.01})
        kinds["condition"] = ("INT", {"default": 0, "min": 0, "max": 100000})
        given = {"required": cls.REQUIRED, "optional": cls.OPTIONAL}
        return {
            kind: {name: kinds[name] for name in named.split()} for kind, named in given.items()
        }


class OSSSchedule(_Node):
    """SIGMAS and SAMPLER for SamplerCustom and SamplerCustomAdvanced, and what the schedule is for."""

    RETURN_TYPES, RETURN_NAMES = ("SIGMAS", "SAMPLER", "STRING"), ("sigmas", "sampler", "about")
    REQUIRED, OPTIONAL = "schedule denoise", "model condition"

    def run(self, schedule, denoise=1.0, model=None, condition=0):
        return self.prepared(schedule, model, denoise, condition)


class OSSSampler(_Node):
    """Samples by a schedule, in the place of KSampler."""

    RETURN_TYPES = ("LATENT",)
    REQUIRED, OPTIONAL = (
        "model schedule seed cfg positive negative latent_image denoise",
        "condition",
    )

    def run(
        self, model, schedule, seed, cfg, positive, negative, latent_image, denoise=1.0, condition=0
    ):
        sigmas, sampler, _ = self.prepared(schedule, model, denoise, condition)
        latent = sample.fix_empty_latent_channels(model, latent_image["samples"])
        noise = sample.prepare_noise(latent, seed, latent_image.get("batch_index"))
        callback, quiet = (
            latent_preview.prepare_callback(model, len(sigmas) - 1),
            not utils.PROGRESS_BAR_ENABLED,
        )
        more = {
            "noise_mask": latent_image.get("noise_mask"),
            "callback": callback,
            "disable_pbar": quiet,
            "seed": seed,
        }
        samples = sample.sample_custom(
            model, noise, cfg, sampler, sigmas, positive, negative, latent, **more
        )
        return ({**latent_image, "samples": samples},)


class OSSRange(_Node):
    """The certificate of a schedule, and whether this model and guidance are inside of it."""

    RETURN_TYPES, RETURN_NAMES, OUTPUT_NODE = ("STRING",), ("range",), True
    REQUIRED, OPTIONAL = "schedule", "model cfg"

    def run(self, schedule, model=None, cfg=None):
        found = self.find(schedule)
        text = "\n".join([describe(found), *warn(found, setting_of(model, cfg))])
        return {"ui": {"text": [text]}, "result": (text,)}


if folder_paths is not None:
    folders, _ = folder_paths.folder_names_and_paths.setdefault(FOLDER, ([], set()))
    folders += [
        str(Path(folder_paths.models_dir) / FOLDER),
        str(Path(__file__).parent / "schedules"),
    ]

NODE_CLASS_MAPPINGS = {"OSSSchedule": OSSSchedule, "OSSSampler": OSSSampler, "OSSRange": OSSRange}
NODE_DISPLAY_NAME_MAPPINGS = {
    "OSSSchedule": "OSS Schedule",
    "OSSSampler": "OSS Sampler",
    "OSSRange": "OSS Range",
}
