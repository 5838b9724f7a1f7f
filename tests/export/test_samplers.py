"""A list goes to a sampler that takes the steps the schedule was planned for, or nowhere."""

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

from oss_exp.export.comfyui import ComfyUI
from oss_exp.export.diffusers import Diffusers, diffusers_call
from oss_exp.export.k_diffusion import KDiffusion
from oss_exp.export.numbers import save_in_numbers
from oss_exp.export.oss_scheduler import OSSScheduler
from oss_exp.export.webui import WebUI
from oss_exp.noise import DDPMPath, EDMPath, scaled_linear_betas
from oss_exp.schedule import Free, SolverSteps, StepSchedule
from oss_exp.solvers import sample
from oss_exp.solvers.dpm2 import DPM2
from oss_exp.solvers.dpm_solver_pp import DPMSolverPP
from oss_exp.solvers.heun import Heun

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PATH = DDPMPath(scaled_linear_betas())
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
        (
            ComfyUI(),
            planned("UniPC", order=3, times=[0.9, 0.0]),
            "euler",
        ),  # one step is everybody's
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
def test_the_sampler_is_named(exporter, steps, sampler, tmp_path):
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
        (
            ComfyUI(),
            planned("UniPC", orders=torch.ones(5, dtype=torch.int64)),
            "planned for steps of UniPC",
        ),  # corrects
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
def test_no_list_where_no_sampler_takes_the_steps(exporter, steps, message, tmp_path):
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
def test_the_named_samplers_are_what_they_are_called(solver, clock, velocity):
    """Each written here as its paper has it, in sigma: what they make is our sample."""
    steps = StepSchedule(TIMES)
    noise = torch.randn(4, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigmas = steps.times if clock == FLOW else EDMPath().native(steps.times)

    def slope(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        if clock == FLOW:
            return velocity(x, sigma.expand(len(x)))
        t = sigma / (1 + sigma)  # latents x0 + sigma eps; dx / dsigma = eps
        return x * (1 - t) + (1 - t) * velocity(x * (1 - t), t.expand(len(x)))

    x = noise * sigmas[0]
    older = None

    for sigma, after in pairwise(sigmas):
        d = slope(x, sigma)
        step = after - sigma

        if isinstance(solver, DPMSolverPP):
            clean = x - sigma * d
            ratio = after / sigma
            guess = clean
            if older is not None and after > 0:
                r = (older[1] / sigma).log() / (sigma / after).log()
                guess = clean + (clean - older[0]) / (2 * r)
            x = ratio * x + (1 - ratio) * guess
            older = (clean, sigma)
            continue

        if after > 0 and isinstance(solver, Heun):
            d = (d + slope(x + step * d, after)) / 2
        elif after > 0:
            middle = (sigma * after).sqrt()
            d = slope(x + (middle - sigma) * d, middle)
        x = x + step * d

    torch.testing.assert_close(
        x, sample(solver, velocity, noise * steps.start_time, steps), rtol=0, atol=1e-9
    )


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
        (
            FlowMatchEulerDiscreteScheduler(shift_terminal=0.25),
            planned(),
        ),  # which is where the last call is
        (
            MiniMaxH3Scheduler(),
            planned(),
        ),  # K + 1 numbers, unshifted, and a velocity towards the data
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
    if scheduler is ZERO_SNR:  # for which diffusers has 4096
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


@pytest.mark.parametrize("kind", every_scheduler(), ids=lambda kind: kind.__name__)
def test_every_scheduler_gets_its_list_or_one_line(kind, tmp_path):
    scheduler = kind(**REQUIRED.get(kind.__name__, {}))
    texts = {
        (clock, len(times) - 1): refusal(
            diffusers_call, planned(clock=clock, times=times), scheduler
        )
        for clock in (FLOW, CHAIN)
        for times in (TIMES, [0.9, 0.0])
    }

    assert not any("\n" in text for text in texts.values())

    runs = {key for key, text in texts.items() if not text}
    assert ({1, 5} <= {count for _, count in runs}) == (kind.__name__ in RUNS)
    assert len({clock for clock, _ in runs}) < 2  # a scheduler is for one kind of network

    # Ours in the place of the network's own scheduler: the clock is that of its chain, or it is refused.
    steps = planned(times=[0.9, 0.5, 0.0])
    file = save_in_numbers(steps, tmp_path / "x.json")
    text = refusal(OSSScheduler.from_schedule, file, scheduler.config)

    assert "\n" not in text

    if not text and hasattr(scheduler, "alphas_cumprod"):
        alphas_cumprod = scheduler.alphas_cumprod.double()
        ratios = ((1 - alphas_cumprod) / alphas_cumprod).sqrt()
        index = OSSScheduler.from_schedule(file, scheduler.config).timesteps.long()
        ratio = EDMPath().native(steps.times[:-1])
        assert bool(((ratios[index] <= ratio * 1.001) & (ratio <= ratios[index + 1] * 1.001)).all())


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
def test_mu_of_pipelines_with_a_rule_of_their_own_is_asked_for(place, tmp_path):
    pipeline(tmp_path, "Flux2Pipeline", FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
    with pytest.raises(
        ValueError, match=r"Flux2Pipeline does not compute mu .*; set task\.exporter\.mu"
    ):
        Diffusers(str(tmp_path / place), height=512, width=512).write(
            planned(), tmp_path / "d.json"
        )


def test_a_linear_shift_needs_a_mu_above_0(tmp_path):
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="linear")
    pipeline(tmp_path, None, scheduler)
    with pytest.raises(ValueError, match="mu must be above 0"):
        Diffusers(str(tmp_path), mu=-0.5).write(planned(), tmp_path / "d.json")


def test_other_first_latents_are_said(tmp_path):
    """Pinned to 0.98 of the noise; pipelines of flow models begin with all of it."""
    text = Diffusers("FlowMatchEulerDiscreteScheduler").write(planned(), tmp_path / "d.json")
    assert (
        "Give it latents=noise * 0.98, for the search began with other noise than it does." in text
    )

    free = StepSchedule(TIMES, Free(), provenance=planned().provenance)
    assert "latents" not in Diffusers("FlowMatchEulerDiscreteScheduler").write(
        free, tmp_path / "d.json"
    )

    text = Diffusers("EulerDiscreteScheduler").write(planned(clock=CHAIN), tmp_path / "d.json")
    assert "latents" not in text


def test_an_array_is_asked_for_where_a_list_does_not_do(tmp_path):
    pipeline(tmp_path, None, unipc())
    assert "sigmas=numpy.array([0.98, 0.9," in Diffusers(str(tmp_path)).write(
        planned("UniPC"), tmp_path / "d.json"
    )
