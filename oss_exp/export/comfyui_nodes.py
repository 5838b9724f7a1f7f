"""Run step schedules in ComfyUI, k-diffusion and webui.

A list of sigmas cannot hold a schedule's orders, fitted steps or analytic start; this
sampler takes every step as numbers. The file needs nothing else of oss_exp: `oss-exp
task=export exporter=comfyui_nodes` copies it, together with schedules, into a folder
for custom_nodes. Schedules are read from `schedules` beside this file and from
ComfyUI's models/oss_schedules.

Times t are those of flow matching, x_t = (1 - t) x0 + t eps. The sigma of a flow model
is t. The sigma of any other model is t / (1 - t), and its latents are x_t / (1 - t).
Shapes: B samples, K steps, G conditions, *E the dimensions of a latent.
"""

from __future__ import annotations

import hashlib
import json
import logging
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

FORMAT = "oss_exp/scheduler"
VERSION = 1
FIELDS = (
    "format version times weights start start_time answers mean range provenance "
    "strength num_inference_steps begin_index"
)
FOLDER = "oss_schedules"  # in ComfyUI's models
LIMIT = 1 << 24  # bytes of a schedule's file
MEAN_LIMIT = 1 << 29  # bytes of its mean
LAST_SIGMA = 4096.0  # sigma of t = 1, as in diffusers
FULL = 0.9  # a schedule whose noise is smaller begins at an image
KINDS = {
    True: "a flow model",
    False: "one of sigma / alpha",
    None: "one of no known kind; connect a model that says",
}
DAMAGE = (AttributeError, LookupError, TypeError, ValueError)  # what a damaged certificate raises
warned: set[tuple[str, str]] = set()  # each warning is logged once


@dataclass(frozen=True, eq=False)
class Schedule:
    """The content of a schedule's file.

    Attributes:
        name: Name of the file without its suffix.
        times: K + 1 decreasing times t, the last 0.
        weights: K rows over (x, first state, mean, newest answers, older answers, ...).
            The sum is the next state.
        start: "pinned" or "free": the noise is the first state. "analytic": the first
            state is a jump away from it, towards the mean.
        start_time: The noise is start_time * eps.
        answers: Predictions of x0 that one call adds: 1, or 2 where the guided and the
            unguided one have their own weights.
        strength: Strength of a schedule that begins at an image.
        measured: The certificate, which says where the schedule was measured to hold.
        about: The schedule's provenance.
        mean: Mean latents (G, *E), or (G,).
    """

    name: str
    times: list[float]
    weights: list[list[float]]
    start: str
    start_time: float
    answers: int
    strength: float | None
    measured: dict[str, Any]
    about: dict[str, Any]
    mean: Tensor | None

    @property
    def denoise(self) -> float:
        """The value of ComfyUI's `denoise` that this schedule is for."""
        return self.strength or (1 if self.start_time >= FULL else self.start_time)

    def clock(self, flow: bool) -> list[float]:
        """Return the times, cut to those that have a finite sigma."""
        latest = 1.0 if flow else LAST_SIGMA / (1 + LAST_SIGMA)
        return [min(t, latest) for t in self.times]

    def sigmas(self, flow: bool) -> Tensor:
        """Return the K + 1 sigmas for such a model, in float32."""
        times = self.clock(flow)
        return torch.tensor(times if flow else [t / (1 - t) for t in times], dtype=torch.float32)

    def for_flow(self, flow: bool | None) -> bool:
        """Return whether the schedule's model is a flow model.

        Args:
            flow: Whether the connected model is one; None if no model is connected.

        Raises:
            ValueError: The schedule is for the other kind, or neither of them names a
                kind.
        """
        clock = _dict(self.about.get("native")).get("clock")
        planned = flow if clock is None else clock == "flow time"
        if planned is None or flow not in (None, planned):
            kinds = f"{KINDS[planned]}, and the model is {KINDS[flow]}"
            raise ValueError(f"schedule {self.name} is for {kinds}")
        return planned


# ------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------


def load(file: str | Path) -> Schedule:
    """Read a schedule, and its mean from the file beside it.

    Raises:
        OSError: A file is missing or unreadable.
        ValueError: A file is not what it should be.
    """
    path = Path(file)
    record = _record(path)
    mean = _mean(path, record.get("mean"))
    if fault := _fault(record, mean):
        raise ValueError(f"schedule {path.name} has wrong {fault}; write it again")

    return Schedule(
        name=path.stem,
        times=record["times"],
        weights=record["weights"],
        start=record["start"],
        start_time=record["start_time"],
        answers=record.get("answers", 1),
        strength=record.get("strength"),
        measured=_dict(record.get("range")),
        about=_dict(record.get("provenance")),
        mean=mean,
    )


def _record(path: Path) -> dict[str, Any]:
    """Read the JSON of a schedule; its values are not checked yet."""
    try:
        if path.stat().st_size > LIMIT:
            raise ValueError(f"more than {LIMIT >> 20} MiB")
        record = _dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, RecursionError) as error:
        reason = f"is not complete JSON ({error!s:.200}); write it again"
        raise ValueError(f"schedule {path.name} {reason}") from None

    if record.get("format") != FORMAT or record.get("version") != VERSION:
        command = "oss-exp task=export exporter=comfyui_nodes task.schedule=FILE"
        remedy = f"where oss_exp is, make one by {command}"
        raise ValueError(f"{path.name} is no {FORMAT} of version {VERSION}; {remedy}")

    if unknown := record.keys() - {*FIELDS.split()}:
        reason = f"{min(unknown)!r:.50}, which these nodes do not know; update them"
        raise ValueError(f"schedule {path.name} has {reason}")
    return record


def _fault(record: Any, mean: Tensor | None) -> str | None:
    """Return the first field whose value is wrong, or None."""
    times = record.get("times")
    if not _numbers(times, 2) or times != sorted({*times}, reverse=True):
        return "times"
    if times[0] > 1 or times[-1] != 0:
        return "times"

    rows = record.get("weights")
    complete = isinstance(rows, list) and len(rows) == len(times) - 1
    if not complete or not all(_numbers(row, 4) for row in rows):
        return "weights"

    start, start_time = record.get("start"), record.get("start_time")
    inside = _numbers([start_time], 1) and times[0] <= start_time <= 1
    if not inside or start not in ("pinned", "free", "analytic"):
        return "start"

    if mean is None and (start == "analytic" or any(row[2] for row in rows)):
        return "mean (none)"
    strength = record.get("strength")
    if record.get("answers", 1) not in (1, 2) or not (strength is None or _numbers([strength], 1)):
        return "answers or strength"
    return None


def _mean(path: Path, entry: Any) -> Tensor | None:
    """Read the mean of a schedule from the file that its record names."""
    if entry is None:
        return None

    # The file, beside the schedule.
    name = str(_dict(entry).get("file"))
    file = path.with_name(Path(name).name or "mean")
    if file.name != name or not file.is_file():
        reason = f"of schedule {path.name} is not beside it; copy it too"
        raise FileNotFoundError(f"the mean {name!r:.200} {reason}")
    content = b"" if file.stat().st_size > MEAN_LIMIT else file.read_bytes()
    if hashlib.sha256(content).hexdigest() != _dict(entry).get("sha256"):
        raise ValueError(f"{name} is not the mean of schedule {path.name}; copy both again")

    # Its tensor.
    try:
        mean = safetensors.torch.load(content)["mean"]
    except Exception:  # whatever the bytes are
        mean = torch.empty(0)
    filled = mean.is_floating_point() and mean.ndim > 0 and mean.numel() > 0
    if not filled or not bool(mean.isfinite().all()):
        remedy = f"write schedule {path.name} again"
        raise ValueError(f"{name} holds no mean of finite numbers; {remedy}")
    return mean


def _numbers(values: Any, least: int) -> bool:
    """Return whether this is a list of at least so many moderate, finite numbers."""
    complete = isinstance(values, list) and len(values) >= least
    return complete and all(type(value) in (int, float) and -1e9 < value < 1e9 for value in values)


def _dict(value: Any) -> dict[str, Any]:
    """Return the value, or an empty dictionary in place of anything else."""
    return value if isinstance(value, dict) else {}


# ------------------------------------------------------------------------------
# The sampler
# ------------------------------------------------------------------------------


@torch.no_grad()
def sample_oss(
    model, x, sigmas, extra_args=None, callback=None, disable=None, *, schedule, flow, condition=0
) -> Tensor:
    """Run a schedule, called as the samplers of ComfyUI and k-diffusion are.

    Args:
        model: Called as model(x, sigma (B,), **extra_args); returns x0, guided or not.
        x: Latents (B, *E) at sigmas[0].
        sigmas: Those of the schedule, or a part of them, as when two experts share them.
        extra_args: Arguments of every call.
        callback: Called at each step with a dictionary, as by the other samplers.
        disable: Whether to hide the progress bar.
        schedule: The schedule to run.
        flow: Whether the model is a flow model.
        condition: Index of the mean for all samples, or for each one (B,).

    Returns:
        Latents (B, *E) at sigmas[-1].
    """
    extra_args = extra_args or {}
    guider = getattr(model, "inner_model", None)
    if hasattr(guider, "model_patcher"):  # in ComfyUI
        schedule.for_flow(is_flow(guider.model_patcher))
        setting = setting_of(guider.model_patcher, getattr(guider, "cfg", None))
        warn(schedule, {"shape": list(x.shape[1:]), **setting})

    # Times, and the size of the model's latents over x_t.
    begin, count = _part(schedule, sigmas, flow)
    times = schedule.clock(flow)[begin : begin + count + 1]
    scale = [1.0 if flow else 1 / (1 - t) for t in times]

    # First state.
    mean = _mean_of(schedule, x, condition)
    state = x / scale[0] if begin else _first_state(schedule, model, x, times[0], flow, mean)
    first, clean = state, []

    # Steps.
    for step in trange(count, disable=disable):
        latents = state * scale[step]
        sigma = x.new_full((len(x),), times[step] * scale[step])
        denoised, answers = _denoise(model, latents, sigma, extra_args, schedule.answers)
        if callback is not None:
            progress = {"x": latents, "i": step, "sigma": sigmas[step], "sigma_hat": sigmas[step]}
            callback({**progress, "denoised": denoised})
        clean = [*answers, *clean]
        terms = zip(schedule.weights[begin + step], [state, first, mean, *clean], strict=False)
        state = sum((weight * term for weight, term in terms if weight != 0), torch.zeros_like(x))

    # What a mask protects stays exactly.
    mask = extra_args.get("denoise_mask")
    if mask is not None and times[-1] == 0:
        state = state * mask + model.latent_image * (1 - mask)
    return state * scale[-1]


def _part(schedule: Schedule, sigmas: Tensor, flow: bool) -> tuple[int, int]:
    """Return the step of the schedule that the sigmas begin with, and their number of steps."""
    schedule_sigmas = schedule.sigmas(flow)
    part = sigmas.float().cpu().flatten()
    count = len(sigmas) - 1
    for begin in range(len(schedule_sigmas) - count) if count > 0 else ():
        window = schedule_sigmas[begin : begin + count + 1]
        if not torch.allclose(window, part, rtol=1e-4, atol=1e-7):
            continue
        rows = enumerate(schedule.weights[begin : begin + count], start=1)
        if begin and any(row[1] or any(row[3 + schedule.answers * n :]) for n, row in rows):
            problem = "remember those before; give one sampler all of its sigmas"
            raise ValueError(f"steps of schedule {schedule.name} {problem}")
        return begin, count
    remedy = "connect the SIGMAS of its OSS Schedule node"
    raise ValueError(f"the sigmas are not those of schedule {schedule.name}; {remedy}")


def _first_state(schedule, model, x, t: float, flow: bool, mean: Tensor | float) -> Tensor:
    """Return the state at the first time t, from latents x that the caller has scaled for it."""
    # The noise and the image under it.
    image, noise = getattr(model, "latent_image", None), getattr(model, "noise", None)
    image = torch.zeros_like(x) if image is None else image.to(x)
    if flow:
        noise = (x - (1 - t) * image) / t
    elif noise is None:  # ComfyUI's own is better: x may be scaled by sqrt(1 + sigma^2)
        noise = (x - image) * (1 - t) / t

    # Where the schedule begins, and the analytic jump.
    start_time = t if schedule.start == "pinned" else schedule.start_time
    state = start_time * noise.to(x) + (1 - start_time) * image
    ratio = t / start_time if schedule.start == "analytic" else 1.0
    return ratio * state + (1 - ratio) * mean


def _denoise(model, x, sigma, extra_args: dict[str, Any], count: int) -> tuple[Tensor, list]:
    """Call the model; return its x0, and the `count` predictions that the steps weigh."""
    if count == 1:
        denoised = model(x, sigma, **extra_args)
        return denoised, [denoised]

    # Ask ComfyUI for the guided and the unguided prediction, before it mixes them.
    apart: dict[str, Any] = {}

    def record(arguments):
        apart.update(arguments)
        return arguments["denoised"]

    options = {**extra_args.get("model_options", {}), "disable_cfg1_optimization": True}
    options["sampler_post_cfg_function"] = [record, *options.get("sampler_post_cfg_function", [])]
    denoised = model(x, sigma, **{**extra_args, "model_options": options})
    answers: list[Any] = [apart.get("cond_denoised"), apart.get("uncond_denoised")]
    if any(answer is None for answer in answers):
        remedy = "sample with a negative prompt and CFG"
        raise ValueError(f"the schedule weighs guided and unguided answers apart; {remedy}")

    # Keep what a mask protects.
    mask = extra_args.get("denoise_mask")
    if mask is not None:
        answers = [answer * mask + model.latent_image * (1 - mask) for answer in answers]
    return denoised, answers


def _mean_of(schedule: Schedule, x: Tensor, condition: int | Tensor) -> Tensor | float:
    """Return the mean (B, *E), or (*E) for all samples; 0 if the schedule has none."""
    mean, index = schedule.mean, torch.as_tensor(condition)
    if mean is None:
        return 0.0
    count = len(mean)
    if not 0 <= int(index.min()) <= int(index.max()) < count:
        conditions = f"{count} conditions, 0 to {count - 1}"
        raise ValueError(f"schedule {schedule.name} has means of {conditions}")

    # Unpack 2 x 2 latents from one token, as in the pipelines of FLUX.
    packed = mean.ndim == 3 and x.ndim == 4 and mean.shape[2] == 4 * x.shape[1]
    if packed and mean[0].numel() == x[0].numel():
        patches = mean.reshape(count, x.shape[2] // 2, x.shape[3] // 2, -1, 2, 2)
        mean = patches.permute(0, 3, 1, 4, 2, 5).reshape(count, *x.shape[1:])
    if mean.ndim > 1 and mean.shape[1:] != x.shape[1:]:
        shapes = f"{tuple(mean.shape[1:])}, the latents have {tuple(x.shape[1:])}"
        raise ValueError(f"schedule {schedule.name} has a mean of shape {shapes}")

    rows = mean.to(x)[index.to(x.device)]
    return rows if mean.ndim > 1 or index.ndim == 0 else rows.reshape(-1, *[1] * (x.ndim - 1))


def for_k_diffusion(file, flow: bool | None = None, condition=0, webui: bool = False):
    """Return a sampler with k-diffusion's arguments, and the sigmas (K + 1,) to call it with.

    Args:
        file: The schedule's file.
        flow: Whether the model is a flow model; None: as the file says.
        condition: Index of the mean for all samples, or for each one (B,).
        webui: Whether the sampler ignores the sigmas that it gets and runs the
            schedule's.
    """
    schedule = load(file)
    flow = schedule.for_flow(flow)
    schedule_sigmas = schedule.sigmas(flow)
    options = {"schedule": schedule, "flow": flow, "condition": condition}

    def sampler(model, x, sigmas, extra_args=None, callback=None, disable=None):
        if webui:
            x = x * (float(schedule_sigmas[0]) / float(sigmas[0]))
            sigmas = schedule_sigmas.to(x.device)
        return sample_oss(model, x, sigmas, extra_args, callback, disable, **options)

    return sampler, schedule_sigmas


# ------------------------------------------------------------------------------
# Where a schedule holds
# ------------------------------------------------------------------------------


def outside(measured: dict[str, Any], setting: dict[str, Any]) -> list[str]:
    """Return a message on each part of a setting that lies outside a certificate.

    Args:
        measured: The certificate of a schedule; empty where it has none.
        setting: Value on each axis; None where it is unknown.
    """
    messages = []
    for axis, value in setting.items():
        base = measured["base"].get(axis) if measured else None
        if value is None or base is None or value == base:
            continue
        if axis == "shape" and len(value) != len(base):
            continue

        # Cells at this value, or the two around it.
        cells = [cell for cell in measured["cells"] if cell["axis"] == axis]
        near = [cell for cell in cells if value is True or cell["value"] == value]
        if not near and isinstance(value, float):
            points = [*cells, {"value": base, "loss": 0.0}]
            for low, high in pairwise(sorted(points, key=lambda point: point["value"])):
                if low["value"] < value < high["value"]:
                    near += [low, high]
        if not near:
            values = ", ".join(map(str, [base, *(cell["value"] for cell in cells)]))
            messages.append(f"nothing was measured at {axis}={value}, only at {values}")
            continue

        # The largest loss there.
        worst = max(near, key=lambda point: point["loss"])
        if worst["loss"] > measured["tolerance"]:
            low, high = worst["loss_interval"][:2]
            loss = f"{worst['loss']:.1f} dB ({low:.1f} to {high:.1f}, n={worst['n']}"
            place = f"{axis}={value} is outside of its range: at {worst['value']}"
            messages.append(f"{place} it lost {loss}; gain {worst['gain']:+.1f})")
    return messages


def warn(schedule: Schedule, setting: dict[str, Any]) -> list[str]:
    """Return the warnings about a schedule in such a setting, and log each one once."""
    try:
        messages = outside(schedule.measured, setting)
    except DAMAGE:
        messages = ["its certificate is damaged; certify it again"]
    for text in messages:
        if (schedule.name, text) not in warned:
            warned.add((schedule.name, text))
            logging.warning("OSS schedule %s: %s", schedule.name, text)
    return messages


def setting_of(patcher, cfg: float | None) -> dict[str, Any]:
    """Return the setting of a ComfyUI MODEL and its guidance, on the axes of a certificate."""
    setting: dict[str, Any] = {"guidance": None if cfg is None else float(cfg)}
    if patcher is not None:
        setting["dtype"] = str(patcher.model.get_dtype()).split(".")[-1]
        setting["lora"] = bool(patcher.patches) or ""
    return setting


def is_flow(patcher) -> bool | None:
    """Return whether a ComfyUI MODEL is a flow model; None without a model."""
    return patcher and isinstance(patcher.get_model_object("model_sampling"), model_sampling.CONST)


def describe(schedule: Schedule) -> str:
    """Return a few lines on what a schedule is for and where it holds."""
    # The schedule and its search.
    model, strength = _dict(schedule.about.get("model")), schedule.strength
    begin = "pure noise" if strength is None else f"an image, denoise={strength:g}"
    calls = f"{len(schedule.weights)} network calls, {schedule.start} start at {begin}"
    network = f"{model.get('name', '?')}, guidance {_dict(model.get('guidance')).get('scale', '?')}"
    lines = [f"{schedule.name}: {calls}", f"searched on {network}"]

    # Its certificate.
    try:
        for cell in schedule.measured["cells"]:
            psnr = f"{cell['psnr']:.1f} dB to its teacher"
            rival = f"{cell['baseline']:.1f} by {schedule.measured['baseline']}"
            loss = f"loss {cell['loss']:.1f}, n={cell['n']}"
            lines.append(f"{cell['axis']}={cell['value']}: {psnr}, {rival}, {loss}")
    except DAMAGE:
        remedy = "where it holds was not measured (oss-exp task=certify)"
        lines.append(f"it has no certificate: {remedy}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------
# The nodes
# ------------------------------------------------------------------------------

INPUTS = {
    "model": ("MODEL",),
    "latent_image": ("LATENT",),
    "positive": ("CONDITIONING",),
    "negative": ("CONDITIONING",),
    "seed": ("INT", {"default": 0, "min": 0, "max": 2**64 - 1, "control_after_generate": True}),
    "cfg": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 100.0, "step": 0.1, "round": 0.01}),
    "denoise": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 1.0, "step": 0.01}),
    "condition": ("INT", {"default": 0, "min": 0, "max": 100000}),
}


class _Node:
    """The inputs that the nodes have, and how they find a schedule by its name."""

    CATEGORY = "sampling/oss"
    FUNCTION = "run"
    REQUIRED = ""  # names of inputs
    OPTIONAL = ""

    @classmethod
    def INPUT_TYPES(cls):
        """Return the inputs, with a fresh list of the schedules."""
        files = folder_paths.get_filename_list(FOLDER)
        names = [n for n in files if n.endswith(".json") and not n.endswith(".mean.json")]
        inputs = {"schedule": (names or [f"none in models/{FOLDER}"],), **INPUTS}
        return {
            "required": {name: inputs[name] for name in cls.REQUIRED.split()},
            "optional": {name: inputs[name] for name in cls.OPTIONAL.split()},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, schedule):
        """Return True, or what is wrong with the schedule."""
        try:
            cls.find(schedule)
        except (OSError, ValueError) as error:
            return str(error)
        return True

    @classmethod
    def IS_CHANGED(cls, schedule, **_):
        """Return a value that changes with the schedule's file."""
        path = folder_paths.get_full_path(FOLDER, schedule) or __file__
        return Path(path).read_text(errors="replace")

    @staticmethod
    def find(name: str) -> Schedule:
        """Load the schedule of this name from ComfyUI's folders."""
        if (path := folder_paths.get_full_path(FOLDER, name)) is None:
            raise ValueError(f"there is no schedule {name!r:.200}; put one into models/{FOLDER}")
        return load(path)

    @classmethod
    def prepare(cls, name: str, model, denoise: float, condition: int):
        """Return SIGMAS, SAMPLER and the description of a schedule."""
        schedule = cls.find(name)
        if abs(denoise - schedule.denoise) > 0.005:
            begin = "pure noise" if schedule.denoise == 1 else "an image"
            remedy = f"set denoise={schedule.denoise:.2f}, or search another"
            raise ValueError(f"schedule {schedule.name} begins at {begin}: {remedy}")

        flow = schedule.for_flow(is_flow(model))
        options = {"schedule": schedule, "flow": flow, "condition": condition}
        sampler = samplers.KSAMPLER(sample_oss, options)
        return schedule.sigmas(flow), sampler, describe(schedule)


class OSSSchedule(_Node):
    """A schedule as SIGMAS and SAMPLER, for SamplerCustom and SamplerCustomAdvanced."""

    RETURN_TYPES = ("SIGMAS", "SAMPLER", "STRING")
    RETURN_NAMES = ("sigmas", "sampler", "about")
    REQUIRED = "schedule denoise"
    OPTIONAL = "model condition"

    def run(self, schedule, denoise=1.0, model=None, condition=0):
        """Return the node's outputs."""
        return self.prepare(schedule, model, denoise, condition)


class OSSSampler(_Node):
    """A sampler that follows a schedule, in the place of KSampler."""

    RETURN_TYPES = ("LATENT",)
    REQUIRED = "model schedule seed cfg positive negative latent_image denoise"
    OPTIONAL = "condition"

    def run(
        self, model, schedule, seed, cfg, positive, negative, latent_image, denoise=1.0, condition=0
    ):
        """Return the node's outputs."""
        sigmas, sampler, _ = self.prepare(schedule, model, denoise, condition)
        latent = sample.fix_empty_latent_channels(model, latent_image["samples"])
        noise = sample.prepare_noise(latent, seed, latent_image.get("batch_index"))
        options = {
            "noise_mask": latent_image.get("noise_mask"),
            "callback": latent_preview.prepare_callback(model, len(sigmas) - 1),
            "disable_pbar": not utils.PROGRESS_BAR_ENABLED,
            "seed": seed,
        }
        arguments = (model, noise, cfg, sampler, sigmas, positive, negative, latent)
        samples = sample.sample_custom(*arguments, **options)
        return ({**latent_image, "samples": samples},)


class OSSRange(_Node):
    """The certificate of a schedule, and whether a model and its guidance are inside it."""

    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("range",)
    OUTPUT_NODE = True
    REQUIRED = "schedule"
    OPTIONAL = "model cfg"

    def run(self, schedule, model=None, cfg=None):
        """Return the node's output and its text in the interface."""
        content = self.find(schedule)
        text = "\n".join([describe(content), *warn(content, setting_of(model, cfg))])
        return {"ui": {"text": [text]}, "result": (text,)}


if folder_paths is not None:
    folders, _ = folder_paths.folder_names_and_paths.setdefault(FOLDER, ([], set()))
    folders.append(str(Path(folder_paths.models_dir) / FOLDER))
    folders.append(str(Path(__file__).parent / "schedules"))

NODE_CLASS_MAPPINGS = {"OSSSchedule": OSSSchedule, "OSSSampler": OSSSampler, "OSSRange": OSSRange}
NODE_DISPLAY_NAME_MAPPINGS = {name: name.replace("OSS", "OSS ") for name in NODE_CLASS_MAPPINGS}
