"""Pipelines of diffusers with an OSSScheduler make the samples that oss_exp makes itself."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)

import oss_exp.export.oss_scheduler
from oss_exp.distances import XtMSE
from oss_exp.export.numbers import in_numbers, save_in_numbers
from oss_exp.export.oss_scheduler import OSSScheduler
from oss_exp.models.parameterization import NoisePrediction, Parameterization, VPVelocity
from oss_exp.noise import DDIMSchedule, DDPMPath, FlowSchedule, linear_betas, scaled_linear_betas
from oss_exp.schedule import Analytic, FittedSteps, SolverSteps, StepSchedule
from oss_exp.solvers import Euler, sample
from oss_exp.solvers.adams_bashforth import AdamsBashforth
from oss_exp.solvers.deis import DEIS
from oss_exp.solvers.dpm_solver_pp import DPMSolverPP
from oss_exp.solvers.heun import Heun
from oss_exp.solvers.ipndm import IPNDM
from oss_exp.solvers.unipc import UniPC
from oss_exp.stepsize import OSSAve, OSSFit, OSSShared, Problem
from oss_exp.velocity import BoundVelocity

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PATH = DDPMPath(scaled_linear_betas(1000, 0.00085, 0.012))
TIME_MAX = float(PATH.canonical(torch.tensor(999.0, dtype=torch.float64)))
GRIDS = {"flow_prediction": FlowSchedule(1.0).nodes(16), "ddpm": DDIMSchedule(PATH.betas).nodes(16)}
SOLVERS = {
    "euler": Euler(),
    "dpm_solver_pp": DPMSolverPP(order=3, lower_order_final=True),
    "unipc": UniPC(order=3, variant="bh2", lower_order_final=True),
    "unipc bh1": UniPC(order=2, variant="bh1", lower_order_final=False),
    "adams_bashforth": AdamsBashforth(order=3),
    "ipndm": IPNDM(order=3, weights="exact"),
    "deis": DEIS(order=2, beta_d=19.9, beta_min=0.1),
}
STRATEGIES = {
    "oss_ave": OSSAve(start="free", band=None, refine=False, aggregate="median", chunk=8),
    "oss_shared": OSSShared(start="analytic", band=None, refine=False, objective="log_mean"),
    "oss_fit": OSSFit(
        start="analytic", band=None, refine=False, objective="log_mean", history=3, ridge=1e-6
    ),
    "oss_fit pinned": OSSFit(
        start="pinned", band=None, refine=False, objective="log_mean", history=2, ridge=1e-6
    ),
}
STEPS = 5


def rows(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return values.reshape(-1, *[1] * (like.ndim - 1)).to(like)


def draw(shape: tuple[int, ...], seed: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def plan(
    strategy: str, solver: str, velocity, grid: torch.Tensor, noise: torch.Tensor
) -> StepSchedule:
    problem = Problem(velocity, noise * float(grid[0]), grid, SOLVERS[solver], XtMSE())
    return STRATEGIES[strategy].plan(problem, [STEPS])[STEPS]


def load(steps: StepSchedule, solver: str, folder: Path, *arguments, **more) -> OSSScheduler:
    """By way of its file."""
    file = save_in_numbers(steps, folder / "x.json", SOLVERS[solver])
    return OSSScheduler.from_schedule(file, *arguments, **more)


# --------------------------------------------------------------------------------------------------
# Plain loops around an exact velocity
# --------------------------------------------------------------------------------------------------


class Answering:
    """What a network of this prediction type says of its latents: the mixture's exact velocity, in its words."""

    def __init__(self, velocity, prediction: str):
        self.velocity = velocity
        self.prediction = prediction

    def __call__(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        if self.prediction == "flow_prediction":
            return self.velocity(latents, (timestep.double() / 1000).expand(len(latents)))
        t = PATH.canonical(timestep.double()).expand(len(latents))
        scale = rows(PATH.scale(t), latents)
        x = latents / scale
        v = self.velocity(x, t)
        t = rows(t, x)
        x0 = x - t * v
        eps = x + (1 - t) * v

        return {"epsilon": eps, "sample": x0, "v_prediction": scale * ((1 - t) * eps - t * x0)}[
            self.prediction
        ]


def loop(scheduler: OSSScheduler, network, noise: torch.Tensor, begin: bool = True) -> torch.Tensor:
    """As pipelines do it."""
    latents = scheduler.begin(noise) if begin else noise
    scheduler.set_timesteps(STEPS)
    latents = latents * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        latents = scheduler.step(
            network(scheduler.scale_model_input(latents, t), t), t, latents
        ).prev_sample
    return latents


CASES = [("oss_shared", name, "flow_prediction") for name in SOLVERS]
CASES += [("oss_fit", "euler", "flow_prediction"), ("oss_fit pinned", "euler", "epsilon")]
CASES += [
    ("oss_ave", "dpm_solver_pp", kind)
    for kind in ("flow_prediction", "epsilon", "v_prediction", "sample")
]
CASES += [("oss_shared", "unipc", "epsilon"), ("oss_fit", "euler", "v_prediction")]


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "solver", "prediction"), CASES)
def test_samples_are_our_own(strategy, solver, prediction, velocity, tmp_path):
    grid = GRIDS.get(prediction, GRIDS["ddpm"])
    noise = draw((6, 64), dtype=torch.float64)
    steps = plan(strategy, solver, velocity, grid, draw((8, 64), 2, torch.float64))
    if solver not in ("euler", "unipc bh1"):
        assert int(steps.orders.max()) > 1
    expected = sample(SOLVERS[solver], velocity, noise * float(grid[0]), steps)
    scheduler = load(steps, solver, tmp_path, {"prediction_type": prediction, **SD})
    network = Answering(velocity, prediction)
    result = loop(scheduler, network, noise)

    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(loop(scheduler, network, noise), result, rtol=0, atol=0)  # and again

    if not isinstance(steps.start, Analytic):
        torch.testing.assert_close(
            loop(scheduler, network, noise, begin=False), result, rtol=0, atol=1e-12
        )
    spent = load(steps, solver, tmp_path, {"prediction_type": prediction, **SD}, extra_call=True)

    torch.testing.assert_close(loop(spent, network, noise, begin=False), result, rtol=0, atol=1e-12)
    assert len(spent.timesteps) == len(scheduler.timesteps) + 1


def test_each_condition_has_its_mean(velocity, tmp_path):
    steps = StepSchedule([0.8, 0.5, 0.2, 0.1, 0.05, 0.0], Analytic(draw((3, 64), 3, torch.float64)))
    noise = draw((4, 64), dtype=torch.float64)
    group = torch.tensor([2, 0, 1, 2])
    scheduler = load(steps, "euler", tmp_path)

    with pytest.raises(ValueError, match=r"means of 3 conditions; set scheduler\.condition"):
        scheduler.begin(noise)

    scheduler.condition = group
    expected = sample(Euler(), velocity, noise, steps, group)
    torch.testing.assert_close(
        loop(scheduler, Answering(velocity, "flow_prediction"), noise), expected, rtol=0, atol=1e-5
    )


def test_half_precision_does_not_add_up(velocity, tmp_path):
    """Latents are rounded between the steps; the states behind them are not."""
    steps = plan(
        "oss_fit", "euler", velocity, GRIDS["flow_prediction"], draw((8, 64), 2, torch.float64)
    )
    scheduler = load(steps, "euler", tmp_path)
    network = Answering(lambda x, t: velocity(x.double(), t), "flow_prediction")
    noise = draw((6, 64)).half()
    result = loop(scheduler, network, noise)

    assert result.dtype == torch.float16
    torch.testing.assert_close(
        result.double(), sample(Euler(), velocity, noise.double(), steps), rtol=0, atol=5e-3
    )


def test_the_clock_is_that_of_our_paths(tmp_path):
    times = [
        TIME_MAX,
        0.9,
        0.5,
        0.1,
        0.02,
        0.005,
        0.0,
    ]  # the last two calls are cleaner than index 0

    scheduler = load(StepSchedule(times), "euler", tmp_path, DDIMScheduler(**SD).config)
    expected = PATH.native(torch.tensor(times[:-1], dtype=torch.float64)).float()
    torch.testing.assert_close(scheduler.timesteps, expected, rtol=0, atol=2e-3)
    torch.testing.assert_close(scheduler.timesteps[1:4], expected[1:4], rtol=0, atol=1e-4)

    other = DDPMPath(linear_betas(1000, 1e-4, 0.02))
    scheduler = load(
        StepSchedule([0.9, 0.5, 0.0]),
        "euler",
        tmp_path,
        prediction_type="epsilon",
        beta_schedule="linear",
    )

    expected = other.native(torch.tensor([0.9, 0.5], dtype=torch.float64)).float()
    torch.testing.assert_close(scheduler.timesteps, expected, rtol=0, atol=1e-3)


CONTINUOUS = {
    "timestep_type": "continuous",
    "sigma_max": 700.0,
    "use_karras_sigmas": True,
    "sigma_min": 0.002,
}
EULERS = {
    "flow": FlowMatchEulerDiscreteScheduler(shift=3.0),
    "500 times": FlowMatchEulerDiscreteScheduler(num_train_timesteps=500),
    "inverted": FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
    "epsilon": EulerDiscreteScheduler(**SD),
    "400 steps": EulerDiscreteScheduler(
        **SD, num_train_timesteps=400, prediction_type="v_prediction"
    ),
    "continuous": EulerDiscreteScheduler(**SD, **CONTINUOUS, prediction_type="v_prediction"),
    "zero SNR": EulerDiscreteScheduler(
        **SD, rescale_betas_zero_snr=True, prediction_type="v_prediction"
    ),
    "EDM": EDMEulerScheduler(),
    "EDM, v": EDMEulerScheduler(prediction_type="v_prediction"),
}


@pytest.mark.parametrize("name", EULERS)
def test_networks_are_asked_as_their_own_scheduler_asks_them(name, tmp_path):
    """Clock, scaling and the meaning of the answer: an Euler scheduler's own run, on its own times, comes out."""
    original = EULERS[name]
    original.set_timesteps(STEPS)
    sigmas = original.sigmas.double()
    times = (
        sigmas / (1 + sigmas)
        if not isinstance(original, FlowMatchEulerDiscreteScheduler)
        else sigmas
    )
    steps = StepSchedule(1 - times if name == "inverted" else times)
    noise = draw((2, 64), dtype=torch.float64)

    def network(latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return (latents * 0.3 + timestep / 500).sin()

    latents = noise * getattr(original, "init_noise_sigma", steps.start_time)

    for t in original.timesteps:
        network_input = (
            original.scale_model_input(latents, t)
            if hasattr(original, "scale_model_input")
            else latents
        )
        latents = original.step(network(network_input, t), t, latents).prev_sample

    scheduler = load(steps, "euler", tmp_path, original.config)
    torch.testing.assert_close(
        scheduler.timesteps, original.timesteps.float(), rtol=1e-4, atol=2e-3
    )
    torch.testing.assert_close(loop(scheduler, network, noise), latents, rtol=2e-3, atol=2e-3)


def test_a_chain_without_signal_at_its_end_is_run_from_pure_noise(velocity, tmp_path):
    """At t = 1 exactly; and a config that leaves prediction_type out means epsilon."""
    path = DDPMPath(scaled_linear_betas(1000, 0.00085, 0.012, zero_snr=True))
    steps = StepSchedule([1.0, 0.8, 0.6, 0.4, 0.2, 0.0])
    config = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, **SD}
    scheduler = load(steps, "euler", tmp_path, config)

    torch.testing.assert_close(
        scheduler.timesteps, path.native(steps.times[:-1]).float(), rtol=0, atol=5e-3
    )
    assert scheduler.timesteps[0] == 999

    def network(latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        t = steps.times[scheduler.timesteps.tolist().index(float(timestep))].expand(len(latents))
        scale = rows(path.scale(t), latents)
        x = latents / scale
        v = velocity(x, t)
        t = rows(t, x)
        return scale * ((1 - t) * (x + (1 - t) * v) - t * (x - t * v))

    noise = draw((3, 64), dtype=torch.float64)
    result = loop(scheduler, network, noise)
    torch.testing.assert_close(result, sample(Euler(), velocity, noise, steps), rtol=0, atol=1e-6)
    assert load(StepSchedule([0.9, 0.5, 0.0]), "euler", tmp_path, SD).prediction == "epsilon"


def test_the_shifted_chain_of_cogvideox(tmp_path):
    """Its signal-to-noise ratio is shifted before the chain is cut to end without signal."""
    original = CogVideoXDDIMScheduler(
        snr_shift_scale=3.0, rescale_betas_zero_snr=True, prediction_type="v_prediction"
    )
    alphas_cumprod = original.alphas_cumprod.double()
    ratio = ((1 - alphas_cumprod[[700, 300]]) / alphas_cumprod[[700, 300]]).sqrt()
    steps = StepSchedule([*(ratio / (1 + ratio)).tolist(), 0.0])

    torch.testing.assert_close(
        load(steps, "euler", tmp_path, original.config).timesteps,
        torch.tensor([700.0, 300.0]),
        rtol=0,
        atol=5e-3,
    )


# --------------------------------------------------------------------------------------------------
# Pipelines of diffusers
# --------------------------------------------------------------------------------------------------


def lively(network: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    for weight in network.parameters():
        weight.data += 0.05 * torch.randn_like(weight)  # nothing is zero
    return network.eval()


def behind_time(parameterization: Parameterization, network) -> BoundVelocity:
    """network(latents, clock) as a velocity."""

    def fn(x: torch.Tensor, t: torch.Tensor, _: None) -> torch.Tensor:
        question, clock = parameterization.question(x, t)
        return parameterization.velocity(network(question, clock), x, t)

    return BoundVelocity(fn, None, 60)


@pytest.mark.parametrize(
    ("strategy", "solver"), [("oss_ave", "euler"), ("oss_shared", "unipc"), ("oss_fit", "euler")]
)
@torch.no_grad()
def test_flux_pipeline(strategy, solver, tmp_path):
    transformer = lively(
        FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=12,
            num_attention_heads=2,
            joint_attention_dim=8,
            pooled_projection_dim=8,
            axes_dims_rope=(4, 4, 4),
        )
    )

    pipe = FluxPipeline(
        FlowMatchEulerDiscreteScheduler(), None, None, None, None, None, transformer
    )
    pipe.set_progress_bar_config(disable=True)
    text = draw((1, 6, 8), 5)
    pooled = draw((1, 8), 6)
    ids = FluxPipeline._prepare_latent_image_ids(3, 2, 3, "cpu", torch.float32)

    def fn(x: torch.Tensor, t: torch.Tensor, _: None) -> torch.Tensor:
        many = {
            "encoder_hidden_states": text.expand(len(x), -1, -1),
            "pooled_projections": pooled.expand(len(x), -1),
        }
        found = transformer(
            FluxPipeline._pack_latents(x, len(x), 4, 4, 6),
            timestep=t.float(),
            img_ids=ids,
            txt_ids=torch.zeros(6, 3),
            **many,
        ).sample

        return FluxPipeline._unpack_latents(found, 32, 48, 8)

    velocity = BoundVelocity(fn, None, 60)
    noise = draw((2, 4, 4, 6))
    steps = plan(strategy, solver, velocity, FlowSchedule(1.0).nodes(16), draw((4, 4, 4, 6), 2))
    pipe.scheduler = scheduler = load(steps, solver, tmp_path, pipe.scheduler.config)
    latents = FluxPipeline._pack_latents(noise, 2, 4, 4, 6)
    if steps.mean is not None:
        with pytest.raises(ValueError, match="the schedule's mean has shape"):
            scheduler.begin(latents)
        scheduler.mean = FluxPipeline._pack_latents(scheduler.mean, 1, 4, 4, 6)
        latents = scheduler.begin(latents)
    ask = {
        "prompt_embeds": text.expand(2, -1, -1),
        "pooled_prompt_embeds": pooled.expand(2, -1),
        "height": 32,
    }
    ask |= {"width": 48, "output_type": "latent", "latents": latents}
    found = pipe(num_inference_steps=STEPS, **ask).images
    expected = FluxPipeline._pack_latents(
        sample(SOLVERS[solver], velocity, noise, steps), 2, 4, 4, 6
    )

    assert (expected - FluxPipeline._pack_latents(noise, 2, 4, 4, 6)).std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    with pytest.raises(ValueError, match=r"has 5 steps, 28 were asked; set num_inference_steps=5"):
        pipe(**ask)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "solver", "prediction"),
    [
        ("oss_ave", "dpm_solver_pp", "epsilon"),
        ("oss_shared", "unipc", "v_prediction"),
        ("oss_fit", "euler", "epsilon"),
    ],
)
@torch.no_grad()
def test_stable_diffusion_pipeline(strategy, solver, prediction, tmp_path):
    unet = lively(
        UNet2DConditionModel(
            sample_size=8,
            cross_attention_dim=8,
            attention_head_dim=4,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )
    )

    own = DDIMScheduler(**SD, prediction_type=prediction, clip_sample=False, steps_offset=1)
    pipe = StableDiffusionPipeline(
        None, None, None, unet, own, None, None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    text = draw((1, 6, 8), 5)
    free = draw((1, 6, 8), 6)
    noise = draw((2, 4, 8, 8))

    def guided(latents: torch.Tensor, clock: torch.Tensor) -> torch.Tensor:
        without, with_ = (
            unet(latents, clock, encoder_hidden_states=of.expand(len(latents), -1, -1)).sample
            for of in (free, text)
        )
        return without + 2 * (with_ - without)

    kind = {"epsilon": NoisePrediction, "v_prediction": VPVelocity}[prediction]
    velocity = behind_time(kind(PATH, TIME_MAX), guided)
    grid = GRIDS["ddpm"]
    steps = plan(strategy, solver, velocity, grid, draw((4, 4, 8, 8), 2))
    pipe.scheduler = load(steps, solver, tmp_path, pipe.scheduler.config)
    ask = {
        "prompt_embeds": text.expand(2, -1, -1),
        "negative_prompt_embeds": free.expand(2, -1, -1),
    }
    ask |= {
        "guidance_scale": 2.0,
        "height": 64,
        "width": 64,
        "output_type": "latent",
        "num_inference_steps": STEPS,
    }

    if isinstance(steps.start, Analytic):
        with pytest.raises(
            ValueError, match=r"give the pipeline latents=scheduler\.begin\(noise\)"
        ):
            pipe(latents=noise, **ask)
        noise_given = pipe.scheduler.begin(noise)
    else:
        noise_given = noise

    found = pipe(latents=noise_given, **ask).images
    expected = sample(SOLVERS[solver], velocity, noise * float(grid[0]), steps)
    assert (expected - noise).std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@torch.no_grad()
def test_dit_pipeline_draws_its_own_noise(tmp_path):
    transformer = lively(
        DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            norm_num_groups=4,
            sample_size=8,
            num_embeds_ada_norm=1000,
        ).double()
    )

    vae = AutoencoderKL(
        latent_channels=4, block_out_channels=(8,), norm_num_groups=4, scaling_factor=1.0
    )
    pipe = DiTPipeline(transformer, vae, DDIMScheduler(beta_schedule="linear"))
    pipe.set_progress_bar_config(disable=True)
    decoded = []
    vae.decode = lambda latents: (
        decoded.append(latents) or type("Out", (), {"sample": latents[:, :3]})()
    )
    path = DDPMPath(linear_betas(1000, 1e-4, 0.02))
    labels = torch.tensor([3, 0, 3])

    def network(latents: torch.Tensor, clock: torch.Tensor) -> torch.Tensor:
        both = [
            transformer(
                latents, timestep=clock, class_labels=classes.repeat(len(latents) // 3)
            ).sample[:, :4]
            for classes in (torch.full((3,), 1000), labels)
        ]
        return both[0] + 1.5 * (both[1] - both[0])

    grid = DDIMSchedule(path.betas).nodes(16)
    velocity = behind_time(NoisePrediction(path, float(grid[0])), network)
    steps = plan(
        "oss_shared", "dpm_solver_pp", velocity, grid, draw((6, 4, 8, 8), 2, torch.float64)
    )
    pipe.scheduler = load(steps, "dpm_solver_pp", tmp_path, pipe.scheduler.config, extra_call=True)
    generator = torch.Generator().manual_seed(1)
    pipe(
        labels.tolist(),
        guidance_scale=1.5,
        generator=generator,
        num_inference_steps=STEPS,
        output_type="np",
    )

    noise = draw((3, 4, 8, 8), dtype=torch.float64)
    expected = sample(SOLVERS["dpm_solver_pp"], velocity, noise * float(grid[0]), steps)
    torch.testing.assert_close(decoded[0], expected, rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------------------
# The file, alone
# --------------------------------------------------------------------------------------------------

ALONE = """
import json, sys
import torch
from oss_scheduler import OSSScheduler

scheduler = OSSScheduler.from_schedule("x.json")
latents = scheduler.begin(torch.tensor(json.loads(sys.argv[1]), dtype=torch.float64))
scheduler.set_timesteps(5, sigmas=None, mu=1.15)
for t in scheduler.timesteps:
    latents = scheduler.step(latents * (t / 1000) ** 2 - 0.5, t, latents, return_dict=False)[0]
print(json.dumps(latents.tolist()))
assert not [name for name in sys.modules if name.split(".")[0] == "oss_exp"]
try:
    OSSScheduler.from_schedule("raw.json")
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
def test_without_oss_exp(tmp_path):
    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return x * rows(t, x) ** 2 - 0.5

    noise = draw((3, 4), dtype=torch.float64)
    steps = plan(
        "oss_shared",
        "dpm_solver_pp",
        velocity,
        FlowSchedule(1.0).nodes(16),
        draw((8, 4), 2, torch.float64),
    )

    save_in_numbers(steps, tmp_path / "x.json", SOLVERS["dpm_solver_pp"])
    steps.save(tmp_path / "raw.json")
    shutil.copy(oss_exp.export.oss_scheduler.__file__, tmp_path)
    refuse = "import sys; sys.modules['oss_exp'] = None\n"
    check = ALONE.replace('== "oss_exp"]', '== "oss_exp" and sys.modules[name] is not None]')
    process = subprocess.run(
        [sys.executable, "-c", refuse + check, json.dumps(noise.tolist())],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )

    assert process.returncode == 0, process.stderr

    latents, refusal = process.stdout.splitlines()
    expected = sample(SOLVERS["dpm_solver_pp"], velocity, noise, steps)
    torch.testing.assert_close(
        torch.tensor(json.loads(latents), dtype=torch.float64), expected, rtol=0, atol=1e-6
    )
    assert (
        "raw.json has its solver's name and not its numbers; rewrite it where oss_exp is" in refusal
    )


def test_with_oss_exp_any_schedule_is_read(tmp_path, velocity):
    solver = {
        "_target_": "oss_exp.solvers.unipc.UniPC",
        "order": 2,
        "variant": "bh2",
        "lower_order_final": True,
    }
    steps = StepSchedule(
        [0.9, 0.5, 0.0], steps=SolverSteps(torch.tensor([1, 1])), provenance={"solver": solver}
    )
    scheduler = OSSScheduler.from_schedule(steps.save(tmp_path / "raw.json"))

    assert (
        scheduler.weights
        == in_numbers(steps, UniPC(order=2, variant="bh2", lower_order_final=True))["weights"]
    )


def test_config_goes_through_a_folder(tmp_path):
    scheduler = load(StepSchedule([1.0, 0.4, 0.0]), "euler", tmp_path)
    scheduler.save_pretrained(tmp_path / "saved")
    again = OSSScheduler.from_pretrained(tmp_path / "saved")
    assert again.weights == scheduler.weights
    assert torch.equal(again.timesteps, scheduler.timesteps)


# --------------------------------------------------------------------------------------------------
# Refusals
# --------------------------------------------------------------------------------------------------

GUIDED = {"model": {"guidance": {"scale": 2.0}}}
ZEROS = torch.zeros(1, 4)


@pytest.mark.parametrize(
    ("steps", "solver", "message"),
    [
        (StepSchedule([[1.0, 0.5, 0.0]], samples=(0,)), None, "times of its own for each sample"),
        (StepSchedule([1.0, 0.5, 0.0]), Heun(clock="t"), "calls the network again within a step"),
        (
            StepSchedule(
                [1.0, 0.5, 0.0], steps=FittedSteps(torch.ones(2, 4), ZEROS), provenance=GUIDED
            ),
            None,
            "guided and unguided answers apart",
        ),
        (
            StepSchedule([1.0, 0.5, 0.0], steps=SolverSteps(torch.tensor([1, 2]))),
            None,
            "names no solver",
        ),
        (
            StepSchedule([1.0, 0.5, 0.0], provenance={"solver": {"_target_": "os.system"}}),
            None,
            "no solver of oss_exp",
        ),
    ],
)
def test_what_a_scheduler_cannot_run_is_refused(steps, solver, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        save_in_numbers(steps, tmp_path / "x.json", solver)
    assert list(tmp_path.iterdir()) == []


def test_wrong_use_says_what_is_right(tmp_path):
    steps = StepSchedule([0.8, 0.5, 0.0], Analytic(ZEROS))
    whole = StepSchedule([1.0, 0.5, 0.0])
    with pytest.raises(
        ValueError, match=r"needs the betas of the training; give from_schedule the config"
    ):
        load(steps, "euler", tmp_path, prediction_type="epsilon")

    with pytest.raises(ValueError, match=r"begins at t = 1, where sigma is infinite"):
        load(whole, "euler", tmp_path, DDIMScheduler(**SD, rescale_betas_zero_snr=True).config)

    with pytest.raises(ValueError, match=r"begins at t = 1, where sigma is infinite"):
        load(whole, "euler", tmp_path, EDMEulerScheduler().config)

    with pytest.raises(
        ValueError, match="use_flow_sigmas=True with prediction_type=epsilon is no flow network"
    ):
        load(steps, "euler", tmp_path, UniPCMultistepScheduler(use_flow_sigmas=True).config)

    with pytest.raises(ValueError, match="prediction_type must be one of flow_prediction, eps"):
        load(steps, "euler", tmp_path, prediction_type="score")

    scheduler = load(steps, "euler", tmp_path)
    with pytest.raises(
        ValueError,
        match=r"latents=scheduler\.begin\(noise\), or build the scheduler with extra_call",
    ):
        scheduler.set_timesteps(2)

    scheduler.begin(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="call set_timesteps"):
        scheduler.step(torch.zeros(1, 4), scheduler.timesteps[0], torch.zeros(1, 4))

    with pytest.raises(ValueError, match="makes the first state itself"):
        load(steps, "euler", tmp_path, extra_call=True).begin(torch.zeros(1, 4))

    scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match="runs through all of its times"):
        scheduler.step(torch.zeros(1, 4), scheduler.timesteps[1], torch.zeros(1, 4))

    with pytest.raises(ValueError, match="not from inside; search one for image-to-image"):
        scheduler.set_begin_index(1)

    (tmp_path / "x.mean.safetensors").write_bytes(b"other")
    with pytest.raises(ValueError, match=r"is not the one of schedule .*copy both again"):
        OSSScheduler.from_schedule(tmp_path / "x.json")

    (tmp_path / "x.mean.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="copy it too"):
        OSSScheduler.from_schedule(tmp_path / "x.json")

    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ValueError, match="not complete JSON"):
        OSSScheduler.from_schedule(tmp_path / "x.json")

    with pytest.raises(FileNotFoundError, match=r"y\.json does not exist"):
        OSSScheduler.from_schedule(tmp_path / "y.json")
