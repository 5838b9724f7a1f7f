"""A list is exported only for samplers that take the steps the schedule was planned for."""

import json
import math
from itertools import pairwise
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LTXEulerAncestralRFScheduler,
    MiniMaxH3Scheduler,
    UniPCMultistepScheduler,
)
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from export.common import PATH, SD

from oss_exp.export.comfyui import ComfyUI
from oss_exp.export.diffusers import Diffusers, diffusers_call
from oss_exp.export.k_diffusion import KDiffusion
from oss_exp.export.numbers import save_in_numbers
from oss_exp.export.oss_scheduler import OSSScheduler
from oss_exp.export.webui import WebUI
from oss_exp.noise import EDMPath
from oss_exp.schedule import Free, SolverSteps, StepSchedule
from oss_exp.solvers import sample
from oss_exp.solvers.dpm2 import DPM2
from oss_exp.solvers.dpm_solver_pp import DPMSolverPP
from oss_exp.solvers.heun import Heun

FLOW = "flow time"
CHAIN = "DDPM index"
TIMES = [0.98, 0.9, 0.78, 0.59, 0.25, 0.0]
WHOLE = [
    *PATH.canonical(torch.tensor([999.0, 700, 500, 300, 100], dtype=torch.float64)).tolist(),
    0.0,
]
ZERO_SNR = EulerDiscreteScheduler(
    **SD, rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing"
)


def planned(
    solver: str = "Euler", clock: str = FLOW, times=TIMES, orders=None, **settings
) -> StepSchedule:
    provenance = {
        "native": {"clock": clock},
        "solver": {"_target_": f"oss_exp.{solver}", **settings},
    }
    return StepSchedule(times, steps=SolverSteps(orders), provenance=provenance)


def unipc(**settings) -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", **settings
    )


# --------------------------------------------------------------------------------------------------
# Lists
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("exporter", "steps", "sampler"),
    [
        (ComfyUI(), planned(), "euler"),
        (ComfyUI(), StepSchedule(TIMES, provenance={"native": {"clock": FLOW}}), "euler"),
        (ComfyUI(), planned("Heun", clock=FLOW), "heun"),
        (ComfyUI(), planned("DPMSolverPP", orders=torch.ones(5, dtype=torch.int64)), "euler"),
        # All samplers take the same first step.
        (ComfyUI(), planned("UniPC", order=3, times=[0.9, 0.0]), "euler"),
        (ComfyUI(), planned("DPM2", CHAIN), "dpm_2"),
        (
            ComfyUI(),
            planned("DPMSolverPP", CHAIN, order=3, orders=torch.tensor([1, 2, 2, 2, 1])),
            "dpmpp_2m",
        ),
        (KDiffusion(), planned("DPMSolverPP", CHAIN), "sample_dpmpp_2m"),
        (WebUI(), planned("DPMSolverPP", CHAIN), "DPM++ 2M"),
    ],
)
def test_an_export_names_the_sampler_that_takes_the_steps(exporter, steps, sampler, tmp_path):
    text = exporter.write(steps, tmp_path / "x.json")
    assert f"with {sampler}" in text or f"{sampler}(model" in text
    if isinstance(exporter, ComfyUI):
        nodes = json.loads((tmp_path / "x.json").read_text())
        assert nodes["sampler"]["inputs"]["sampler_name"] == sampler


@pytest.mark.parametrize(
    ("exporter", "steps", "message"),
    [
        (
            ComfyUI(),
            planned("UniPC", order=3),
            r"planned for steps of UniPC\(order=3, .* do not take on a flow model",
        ),
        # It corrects its steps at order 1 too.
        (
            ComfyUI(),
            planned("UniPC", orders=torch.ones(5, dtype=torch.int64)),
            "planned for steps of UniPC",
        ),
        (ComfyUI(), planned("DPM2"), "planned for steps of DPM2"),
        (ComfyUI(), planned("DPMSolverPP"), "planned for steps of DPMSolverPP"),
        (ComfyUI(), planned("Heun", CHAIN), r"planned for steps of Heun\(clock='t'\)"),
        (
            KDiffusion(),
            planned("DPMSolverPP", CHAIN, order=3),
            "which sample_euler, sample_heun, sample_dpm_2, sample_dp",
        ),
        (
            WebUI(),
            planned("DPM2", CHAIN),
            "which Euler, Heun, DPM.. 2M do not take on such a model; plan with solver=euler",
        ),
        (
            ComfyUI(),
            StepSchedule(TIMES, steps=SolverSteps(torch.tensor([1, 2, 1, 1, 1]))),
            "does not name a kind",
        ),
        (
            ComfyUI(network="eps"),
            planned(),
            "planned for a network of kind flow, task.exporter.network=eps is another",
        ),
    ],
)
def test_no_list_is_written_where_no_sampler_takes_the_steps(exporter, steps, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        exporter.write(steps, tmp_path / "x.json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("solver", "clock"),
    [
        (Heun(clock="t"), FLOW),
        (Heun(clock="sigma"), CHAIN),
        (DPM2(), CHAIN),
        (DPMSolverPP(order=2), CHAIN),
    ],
)
def test_our_solvers_are_the_samplers_that_exports_name(solver, clock, velocity):
    """The samplers are written here as their papers have them, in sigma."""
    steps = StepSchedule(TIMES)
    noise = torch.randn(4, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigmas = steps.times if clock == FLOW else EDMPath().native(steps.times)

    def slope(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        if clock == FLOW:
            return velocity(x, sigma.expand(len(x)))
        t = sigma / (1 + sigma)  # latents x0 + sigma eps; dx / dsigma = eps
        return x * (1 - t) + (1 - t) * velocity(x * (1 - t), t.expand(len(x)))

    step = {Heun: heun_step, DPM2: dpm2_step, DPMSolverPP: DPMPP2M()}[type(solver)]
    x = noise * sigmas[0]
    for sigma, sigma_next in pairwise(sigmas):
        x = step(slope, x, sigma, sigma_next)

    expected = sample(solver, velocity, noise * steps.start_time, steps)
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-9)


def heun_step(slope, x, sigma, sigma_next):
    """Karras et al. 2022, algorithm 1; the last step is Euler's."""
    step = sigma_next - sigma
    d = slope(x, sigma)
    if sigma_next > 0:
        d = (d + slope(x + step * d, sigma_next)) / 2
    return x + step * d


def dpm2_step(slope, x, sigma, sigma_next):
    """DPM-Solver-2 with its midpoint in log sigma; the last step is Euler's."""
    d = slope(x, sigma)
    if sigma_next > 0:
        middle = (sigma * sigma_next).sqrt()
        d = slope(x + (middle - sigma) * d, middle)
    return x + (sigma_next - sigma) * d


class DPMPP2M:
    """DPM-Solver++(2M): Lu et al. 2022, algorithm 2; its first and last steps are of order 1."""

    def __init__(self):
        self.previous = None

    def __call__(self, slope, x, sigma, sigma_next):
        x0 = x - sigma * slope(x, sigma)
        d = x0
        if self.previous is not None and sigma_next > 0:
            x0_previous, sigma_previous = self.previous
            r = (sigma_previous / sigma).log() / (sigma / sigma_next).log()
            d = x0 + (x0 - x0_previous) / (2 * r)
        self.previous = (x0, sigma)
        ratio = sigma_next / sigma
        return ratio * x + (1 - ratio) * d


# --------------------------------------------------------------------------------------------------
# Schedulers of diffusers
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheduler", "steps"),
    [
        (unipc(solver_order=3), planned("UniPC", order=3)),
        (unipc(solver_order=3), planned("UniPC", order=3, times=[1.0, *TIMES[1:]])),
        (
            unipc(solver_order=2, flow_shift=3.0),
            planned("UniPC", order=3, orders=torch.tensor([1, 2, 2, 2, 1])),
        ),
        (DPMSolverMultistepScheduler(**SD), planned("DPMSolverPP", CHAIN, WHOLE)),
        (DPMSolverMultistepScheduler(**SD, solver_order=1), planned("Euler", CHAIN, WHOLE)),
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True, shift=3.0), planned()),
        # The schedule's last call is at 0.25.
        (FlowMatchEulerDiscreteScheduler(shift_terminal=0.25), planned()),
        # It takes K + 1 numbers without a shift, and its velocity points to the data.
        (MiniMaxH3Scheduler(), planned()),
        (ZERO_SNR, planned(clock=CHAIN, times=[1.0, *TIMES[1:]])),
    ],
)
def test_a_scheduler_that_takes_the_steps_is_accepted(scheduler, steps):
    call = diffusers_call(steps, scheduler)
    scheduler.set_timesteps(**call.arguments)
    sigmas = scheduler.sigmas.double()
    if call.network == "eps":
        sigmas = sigmas / (1 + sigmas)
    if scheduler.config.get("invert_sigmas"):
        sigmas = 1 - sigmas
    expected = steps.times.clone()
    if scheduler is ZERO_SNR:  # diffusers has 4096 in place of infinity
        assert call.sigmas[0] == pytest.approx(4096, rel=1e-6)
        expected[0] = 4096 / 4097

    torch.testing.assert_close(sigmas, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("scheduler", "steps", "message"),
    [
        (
            LTXEulerAncestralRFScheduler(),
            planned(),
            "calls the network 6 times where the schedule has 5 steps",
        ),
        (
            FlowMatchEulerDiscreteScheduler(),
            planned("UniPC", order=3),
            r"takes other steps than UniPC\(order=3",
        ),
        (
            FlowMatchEulerDiscreteScheduler(),
            planned("Heun", FLOW),
            "calls the network again within a step",
        ),
        (
            unipc(),
            planned(),
            "takes other steps than Euler, for which the schedule was planned; choose another",
        ),
        (unipc(solver_order=3), planned("UniPC", order=2), "takes other steps"),
        (unipc(solver_type="bh1"), planned("UniPC"), "takes other steps"),
        (
            DPMSolverMultistepScheduler(**SD),
            planned("Euler", CHAIN, WHOLE),
            "takes other steps than Euler",
        ),
        (
            DPMSolverMultistepScheduler(**SD, algorithm_type="sde-dpmsolver++"),
            planned("DPMSolverPP", CHAIN, WHOLE),
            "steps at random",
        ),
        (
            FlowMatchEulerDiscreteScheduler(),
            planned(clock=CHAIN),
            "planned for a network of kind eps, FlowMatch.* flow",
        ),
        (
            EulerDiscreteScheduler(**SD),
            planned(clock=FLOW),
            "planned for a network of kind flow, EulerDis.* for eps",
        ),
    ],
)
def test_a_scheduler_that_takes_other_steps_is_refused(scheduler, steps, message):
    with pytest.raises(ValueError, match=message):
        diffusers_call(steps, scheduler)


def every_scheduler() -> list[type]:
    kinds = [getattr(diffusers, name) for name in dir(diffusers) if name.endswith("Scheduler")]
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, SchedulerMixin)]


REQUIRED = {
    "AmusedScheduler": {"mask_token_id": 0},
    "VQDiffusionScheduler": {"num_vec_classes": 8},
    "RFD4ProteinaScheduler": {
        "schedule_mode": "log",
        "noise_mode": "tan",
        "tsr_k": 1.0,
        "tsr_sigma": 1.0,
    },
}
RUNS = {
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMapEulerDiscreteScheduler",
    "MiniMaxH3Scheduler",
}


def refusal(call, *arguments) -> str:
    """Return the text of the ValueError that a call raises, empty where it raises none."""
    try:
        call(*arguments)
    except ValueError as error:
        return str(error)
    return ""


EVERY_SCHEDULER = pytest.mark.parametrize("kind", every_scheduler(), ids=lambda kind: kind.__name__)


@EVERY_SCHEDULER
def test_every_scheduler_gets_its_list_or_a_refusal_of_one_line(kind):
    scheduler = kind(**REQUIRED.get(kind.__name__, {}))
    runs = set()
    for clock in (FLOW, CHAIN):
        for times in (TIMES, [0.9, 0.0]):
            text = refusal(diffusers_call, planned(clock=clock, times=times), scheduler)
            assert "\n" not in text
            if not text:
                runs.add((clock, len(times) - 1))

    assert ({1, 5} <= {count for _, count in runs}) == (kind.__name__ in RUNS)
    assert len({clock for clock, _ in runs}) < 2  # a scheduler is for one kind of network


@EVERY_SCHEDULER
def test_our_scheduler_has_the_clock_of_every_scheduler_that_it_replaces(kind, tmp_path):
    """A scheduler that it cannot replace is refused in one line."""
    scheduler = kind(**REQUIRED.get(kind.__name__, {}))
    steps = planned(times=[0.9, 0.5, 0.0])
    file = save_in_numbers(steps, tmp_path / "x.json")

    text = refusal(OSSScheduler.from_schedule, file, scheduler.config)
    assert "\n" not in text
    if text or not hasattr(scheduler, "alphas_cumprod"):
        return

    # The ratio sigma / alpha lies between those of the neighbouring indices.
    alphas_cumprod = scheduler.alphas_cumprod.double()
    ratios = ((1 - alphas_cumprod) / alphas_cumprod).sqrt()
    index = OSSScheduler.from_schedule(file, scheduler.config).timesteps.long()
    ratio = EDMPath().native(steps.times[:-1])
    assert bool((ratios[index] <= ratio * 1.001).all())
    assert bool((ratio <= ratios[index + 1] * 1.001).all())


# --------------------------------------------------------------------------------------------------
# What the exporter of diffusers writes
# --------------------------------------------------------------------------------------------------


def pipeline(folder: Path, kind: str | None, scheduler: SchedulerMixin) -> Path:
    scheduler.save_pretrained(folder / "scheduler")
    if kind is not None:
        (folder / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    return folder


@pytest.mark.parametrize("place", ["", "scheduler", "scheduler/scheduler_config.json"])
def test_mu_is_computed_with_the_schedulers_own_constants(place, tmp_path):
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        base_image_seq_len=256,
        max_image_seq_len=8192,
    )

    pipeline(tmp_path, "QwenImagePipeline", scheduler)
    Diffusers(str(tmp_path / place), height=1328, width=1328).write(planned(), tmp_path / "d.json")
    exported = json.loads((tmp_path / "d.json").read_text())

    assert exported["mu"] == pytest.approx(0.5 + 0.4 * (83 * 83 - 256) / (8192 - 256), abs=1e-12)
    assert exported["sigmas"][1] == pytest.approx(0.9 / (0.9 + math.exp(exported["mu"]) * 0.1))
    assert exported["runs"] == {"network": "flow", "sigmas": TIMES}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_train_timesteps", 0, "must be at least 1, got 0"),
        ("num_train_timesteps", 10**12, "must be at most 100000, got 10"),
        ("num_train_timesteps", 1000.5, "must be a whole number"),
        ("shift", -1, "must be greater than 0.0, got -1"),
        ("shift", math.inf, "must be a finite number"),
        ("trained_betas", [0.1] * 100_001, "must be a list of at most 100000"),
    ],
)
def test_numbers_that_no_scheduler_has_are_refused_by_name(field, value, message, tmp_path):
    file = tmp_path / "scheduler_config.json"
    file.write_text(json.dumps({"_class_name": "FlowMatchEulerDiscreteScheduler", field: value}))
    with pytest.raises(ValueError, match=rf"{file}: field `{field}.*` {message}.*; get it again"):
        Diffusers(str(file)).own_scheduler()


@pytest.mark.parametrize("place", ["", "scheduler"])
def test_pipelines_that_compute_mu_themselves_need_it_from_the_user(place, tmp_path):
    pipeline(tmp_path, "Flux2Pipeline", FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
    exporter = Diffusers(str(tmp_path / place), height=512, width=512)
    message = r"Flux2Pipeline does not compute mu .*; set task\.exporter\.mu"
    with pytest.raises(ValueError, match=message):
        exporter.write(planned(), tmp_path / "d.json")


def test_a_linear_shift_needs_a_mu_above_0(tmp_path):
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="linear")
    pipeline(tmp_path, None, scheduler)
    with pytest.raises(ValueError, match="mu must be above 0"):
        Diffusers(str(tmp_path), mu=-0.5).write(planned(), tmp_path / "d.json")


def test_a_pinned_start_needs_latents_of_less_noise(tmp_path):
    """Pipelines of flow models begin with all of the noise, the schedule with 0.98 of it."""
    text = Diffusers("FlowMatchEulerDiscreteScheduler").write(planned(), tmp_path / "d.json")
    message = "Give it latents=noise * 0.98, for the search began with other noise than it does."
    assert message in text


@pytest.mark.parametrize(
    ("scheduler", "steps"),
    [
        (
            "FlowMatchEulerDiscreteScheduler",
            StepSchedule(TIMES, Free(), provenance=planned().provenance),
        ),
        ("EulerDiscreteScheduler", planned(clock=CHAIN)),
    ],
    ids=["free start", "chain"],
)
def test_other_starts_need_no_latents(scheduler, steps, tmp_path):
    assert "latents" not in Diffusers(scheduler).write(steps, tmp_path / "d.json")


def test_sigmas_are_an_array_for_schedulers_that_take_no_list(tmp_path):
    pipeline(tmp_path, None, unipc())
    text = Diffusers(str(tmp_path)).write(planned("UniPC"), tmp_path / "d.json")
    assert "sigmas=numpy.array([0.98, 0.9," in text
