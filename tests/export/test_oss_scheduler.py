"""Pipelines of diffusers with an OSSScheduler make the samples that oss_exp makes itself."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

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
from export.common import PATH, SD, draw

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
from oss_exp.tensors import rowwise
from oss_exp.velocity import BoundVelocity

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


def plan(
    strategy: str, solver: str, velocity, grid: torch.Tensor, noise: torch.Tensor
) -> StepSchedule:
    problem = Problem(velocity, noise * float(grid[0]), grid, SOLVERS[solver], XtMSE())
    return STRATEGIES[strategy].plan(problem, [STEPS])[STEPS]


def load(steps: StepSchedule, solver: str, folder: Path, *arguments, **more) -> OSSScheduler:
    """Save a schedule and load the scheduler from its file."""
    file = save_in_numbers(steps, folder / "x.json", SOLVERS[solver])
    return OSSScheduler.from_schedule(file, *arguments, **more)


# --------------------------------------------------------------------------------------------------
# Plain loops around an exact velocity
# --------------------------------------------------------------------------------------------------


class ExactNetwork:
    """A network of any prediction type whose answer is the mixture's exact one."""

    def __init__(self, velocity, prediction: str):
        self.velocity = velocity
        self.prediction = prediction

    def __call__(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        if self.prediction == "flow_prediction":
            return self.velocity(latents, (timestep.double() / 1000).expand(len(latents)))
        t = PATH.canonical(timestep.double()).expand(len(latents))
        scale = rowwise(PATH.scale(t), latents)
        x = latents / scale
        v = self.velocity(x, t)
        t = rowwise(t, x)
        x0 = x - t * v
        eps = x + (1 - t) * v
        v_native = scale * ((1 - t) * eps - t * x0)

        return {"epsilon": eps, "sample": x0, "v_prediction": v_native}[self.prediction]


def loop(scheduler: OSSScheduler, network, noise: torch.Tensor, begin: bool = True) -> torch.Tensor:
    """Run a scheduler as pipelines of diffusers do."""
    latents = scheduler.begin(noise) if begin else noise
    scheduler.set_timesteps(STEPS)
    latents = latents * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        output = network(scheduler.scale_model_input(latents, t), t)
        latents = scheduler.step(output, t, latents).prev_sample
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
def test_a_loop_of_diffusers_makes_our_own_samples(
    strategy, solver, prediction, velocity, tmp_path
):
    grid = GRIDS.get(prediction, GRIDS["ddpm"])
    noise = draw((6, 64))
    steps = plan(strategy, solver, velocity, grid, draw((8, 64), 2))
    if solver not in ("euler", "unipc bh1"):
        assert int(steps.orders.max()) > 1
    expected = sample(SOLVERS[solver], velocity, noise * float(grid[0]), steps)
    scheduler = load(steps, solver, tmp_path, {"prediction_type": prediction, **SD})
    network = ExactNetwork(velocity, prediction)
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
    steps = StepSchedule([0.8, 0.5, 0.2, 0.1, 0.05, 0.0], Analytic(draw((3, 64), 3)))
    noise = draw((4, 64))
    group = torch.tensor([2, 0, 1, 2])
    scheduler = load(steps, "euler", tmp_path)

    with pytest.raises(ValueError, match=r"means of 3 conditions; set scheduler\.condition"):
        scheduler.begin(noise)

    scheduler.condition = group
    expected = sample(Euler(), velocity, noise, steps, group)
    torch.testing.assert_close(
        loop(scheduler, ExactNetwork(velocity, "flow_prediction"), noise),
        expected,
        rtol=0,
        atol=1e-5,
    )


def test_rounding_in_half_precision_does_not_add_up(velocity, tmp_path):
    """The latents are rounded between the steps; the states behind them are not."""
    steps = plan("oss_fit", "euler", velocity, GRIDS["flow_prediction"], draw((8, 64), 2))
    scheduler = load(steps, "euler", tmp_path)
    network = ExactNetwork(lambda x, t: velocity(x.double(), t), "flow_prediction")
    noise = draw((6, 64), dtype=torch.float32).half()
    result = loop(scheduler, network, noise)

    assert result.dtype == torch.float16
    torch.testing.assert_close(
        result.double(), sample(Euler(), velocity, noise.double(), steps), rtol=0, atol=5e-3
    )


def test_the_clock_is_that_of_our_paths(tmp_path):
    # The last two calls are cleaner than index 0.
    times = [TIME_MAX, 0.9, 0.5, 0.1, 0.02, 0.005, 0.0]

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
def test_on_an_euler_schedulers_times_its_own_run_comes_out(name, tmp_path):
    """The network's clock, its input's scale and the meaning of its answer are all the same."""
    original = EULERS[name]
    original.set_timesteps(STEPS)
    sigmas = original.sigmas.double()
    is_flow = isinstance(original, FlowMatchEulerDiscreteScheduler)
    times = sigmas if is_flow else sigmas / (1 + sigmas)
    steps = StepSchedule(1 - times if name == "inverted" else times)
    noise = draw((2, 64))

    def network(latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return (latents * 0.3 + timestep / 500).sin()

    # The scheduler's own run.
    latents = noise * getattr(original, "init_noise_sigma", steps.start_time)
    for t in original.timesteps:
        network_input = latents
        if hasattr(original, "scale_model_input"):
            network_input = original.scale_model_input(latents, t)
        latents = original.step(network(network_input, t), t, latents).prev_sample

    # Ours.
    scheduler = load(steps, "euler", tmp_path, original.config)
    torch.testing.assert_close(
        scheduler.timesteps, original.timesteps.float(), rtol=1e-4, atol=2e-3
    )
    torch.testing.assert_close(loop(scheduler, network, noise), latents, rtol=2e-3, atol=2e-3)


def test_a_chain_without_signal_at_its_end_is_run_from_pure_noise(velocity, tmp_path):
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
        scale = rowwise(path.scale(t), latents)
        x = latents / scale
        v = velocity(x, t)
        t = rowwise(t, x)
        return scale * ((1 - t) * (x + (1 - t) * v) - t * (x - t * v))

    noise = draw((3, 64))
    result = loop(scheduler, network, noise)
    torch.testing.assert_close(result, sample(Euler(), velocity, noise, steps), rtol=0, atol=1e-6)


def test_a_config_without_a_prediction_type_is_of_an_epsilon_network(tmp_path):
    assert load(StepSchedule([0.9, 0.5, 0.0]), "euler", tmp_path, SD).prediction == "epsilon"


def test_the_shifted_chain_of_cogvideox_has_its_indices(tmp_path):
    """Its signal-to-noise ratio is shifted before its end is cut to pure noise."""
    original = CogVideoXDDIMScheduler(
        snr_shift_scale=3.0, rescale_betas_zero_snr=True, prediction_type="v_prediction"
    )
    alphas_cumprod = original.alphas_cumprod.double()
    ratio = ((1 - alphas_cumprod[[700, 300]]) / alphas_cumprod[[700, 300]]).sqrt()
    steps = StepSchedule([*(ratio / (1 + ratio)).tolist(), 0.0])

    timesteps = load(steps, "euler", tmp_path, original.config).timesteps
    torch.testing.assert_close(timesteps, torch.tensor([700.0, 300.0]), rtol=0, atol=5e-3)


# --------------------------------------------------------------------------------------------------
# Pipelines of diffusers
# --------------------------------------------------------------------------------------------------


def lively(network: torch.nn.Module) -> torch.nn.Module:
    """Add noise to all weights, so that none is zero."""
    torch.manual_seed(0)
    for weight in network.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    return network.eval()


def behind_time(parameterization: Parameterization, network) -> BoundVelocity:
    """Turn network(latents, clock) into a velocity in canonical time."""

    def fn(x: torch.Tensor, t: torch.Tensor, _: None) -> torch.Tensor:
        question, clock = parameterization.inputs(x, t)
        return parameterization.velocity(network(question, clock), x, t)

    return BoundVelocity(fn, None, 60)


def packed(latents: torch.Tensor) -> torch.Tensor:
    """Pack latents (B, 4, 4, 6) as the FLUX pipeline holds them."""
    return FluxPipeline._pack_latents(latents, len(latents), 4, 4, 6)


@pytest.fixture(scope="module")
def flux_transformer() -> FluxTransformer2DModel:
    return lively(
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


def flux_velocity(transformer, text: torch.Tensor, pooled: torch.Tensor) -> BoundVelocity:
    """The transformer's velocity on unpacked latents (B, 4, 4, 6)."""
    ids = FluxPipeline._prepare_latent_image_ids(3, 2, 3, "cpu", torch.float32)

    def fn(x: torch.Tensor, t: torch.Tensor, _: None) -> torch.Tensor:
        output = transformer(
            packed(x),
            timestep=t.float(),
            img_ids=ids,
            txt_ids=torch.zeros(6, 3),
            encoder_hidden_states=text.expand(len(x), -1, -1),
            pooled_projections=pooled.expand(len(x), -1),
        ).sample
        return FluxPipeline._unpack_latents(output, 32, 48, 8)

    return BoundVelocity(fn, None, 60)


@pytest.mark.parametrize(
    ("strategy", "solver"), [("oss_ave", "euler"), ("oss_shared", "unipc"), ("oss_fit", "euler")]
)
@torch.no_grad()
def test_the_flux_pipeline_makes_our_samples(strategy, solver, flux_transformer, tmp_path):
    text = draw((1, 6, 8), 5, dtype=torch.float32)
    pooled = draw((1, 8), 6, dtype=torch.float32)
    noise = draw((2, 4, 4, 6), dtype=torch.float32)
    velocity = flux_velocity(flux_transformer, text, pooled)
    steps = plan(
        strategy,
        solver,
        velocity,
        FlowSchedule(1.0).nodes(16),
        draw((4, 4, 4, 6), 2, dtype=torch.float32),
    )
    expected = packed(sample(SOLVERS[solver], velocity, noise, steps))

    # The pipeline.
    scheduler = load(steps, solver, tmp_path, FlowMatchEulerDiscreteScheduler().config)
    pipe = FluxPipeline(scheduler, None, None, None, None, None, flux_transformer)
    pipe.set_progress_bar_config(disable=True)
    call = {"height": 32, "width": 48, "output_type": "latent"}
    call |= {"prompt_embeds": text.expand(2, -1, -1), "pooled_prompt_embeds": pooled.expand(2, -1)}

    # An analytic start needs the mean as the pipeline packs it.
    latents = packed(noise)
    if steps.mean is not None:
        with pytest.raises(ValueError, match="the schedule's mean has shape"):
            scheduler.begin(latents)
        scheduler.mean = packed(scheduler.mean)
        latents = scheduler.begin(latents)

    result = pipe(num_inference_steps=STEPS, latents=latents, **call).images
    assert (expected - packed(noise)).std() > 0.1
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"has 5 steps, 28 were asked; set num_inference_steps=5"):
        pipe(latents=latents, **call)


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    return lively(
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


def guided_velocity(unet, prediction: str, text: torch.Tensor, empty: torch.Tensor):
    """The velocity of a Stable Diffusion U-Net with guidance 2."""

    def network(latents: torch.Tensor, clock: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        hidden_states = prompt.expand(len(latents), -1, -1)
        return unet(latents, clock, encoder_hidden_states=hidden_states).sample

    def guided(latents: torch.Tensor, clock: torch.Tensor) -> torch.Tensor:
        unconditional = network(latents, clock, empty)
        return unconditional + 2 * (network(latents, clock, text) - unconditional)

    kind = {"epsilon": NoisePrediction, "v_prediction": VPVelocity}[prediction]
    return behind_time(kind(PATH, TIME_MAX), guided)


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
def test_the_stable_diffusion_pipeline_makes_our_samples(
    strategy, solver, prediction, unet, tmp_path
):
    text = draw((1, 6, 8), 5, dtype=torch.float32)
    empty = draw((1, 6, 8), 6, dtype=torch.float32)
    noise = draw((2, 4, 8, 8), dtype=torch.float32)
    grid = GRIDS["ddpm"]
    velocity = guided_velocity(unet, prediction, text, empty)
    steps = plan(strategy, solver, velocity, grid, draw((4, 4, 8, 8), 2, dtype=torch.float32))
    expected = sample(SOLVERS[solver], velocity, noise * float(grid[0]), steps)

    # The pipeline.
    own = DDIMScheduler(**SD, prediction_type=prediction, clip_sample=False, steps_offset=1)
    scheduler = load(steps, solver, tmp_path, own.config)
    parts = (None, None, None, unet, scheduler, None, None)
    pipe = StableDiffusionPipeline(*parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    call = {"guidance_scale": 2.0, "height": 64, "width": 64, "num_inference_steps": STEPS}
    call |= {"prompt_embeds": text.expand(2, -1, -1), "output_type": "latent"}
    call |= {"negative_prompt_embeds": empty.expand(2, -1, -1)}

    # An analytic start needs latents from the scheduler.
    latents = noise
    if isinstance(steps.start, Analytic):
        message = r"give the pipeline latents=scheduler\.begin\(noise\)"
        with pytest.raises(ValueError, match=message):
            pipe(latents=noise, **call)
        latents = scheduler.begin(noise)

    result = pipe(latents=latents, **call).images
    assert (expected - noise).std() > 0.1
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.fixture
def dit_pipeline() -> DiTPipeline:
    """A small DiT pipeline in float64, which draws its noise itself."""
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
    return pipe


def guided_dit(transformer, labels: torch.Tensor):
    """The network of a DiT with guidance 1.5 on all channels."""

    def network(latents: torch.Tensor, clock: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        classes = classes.repeat(len(latents) // len(classes))
        return transformer(latents, timestep=clock, class_labels=classes).sample[:, :4]

    def guided(latents: torch.Tensor, clock: torch.Tensor) -> torch.Tensor:
        unconditional = network(latents, clock, torch.full_like(labels, 1000))
        return unconditional + 1.5 * (network(latents, clock, labels) - unconditional)

    return guided


@torch.no_grad()
def test_the_dit_pipeline_makes_our_samples_of_its_own_noise(dit_pipeline, tmp_path, monkeypatch):
    path = DDPMPath(linear_betas(1000, 1e-4, 0.02))
    labels = torch.tensor([3, 0, 3])
    grid = DDIMSchedule(path.betas).nodes(16)
    solver = SOLVERS["dpm_solver_pp"]

    # Our sample.
    guided = guided_dit(dit_pipeline.transformer, labels)
    velocity = behind_time(NoisePrediction(path, float(grid[0])), guided)
    search_noise = draw((6, 4, 8, 8), 2)
    steps = plan("oss_shared", "dpm_solver_pp", velocity, grid, search_noise)
    noise = draw((3, 4, 8, 8))
    expected = sample(solver, velocity, noise * float(grid[0]), steps)

    # The latents that the pipeline decodes.
    decoded = []

    def decode(latents: torch.Tensor) -> SimpleNamespace:
        decoded.append(latents)
        return SimpleNamespace(sample=latents[:, :3])

    monkeypatch.setattr(dit_pipeline.vae, "decode", decode)
    config = dit_pipeline.scheduler.config
    dit_pipeline.scheduler = load(steps, "dpm_solver_pp", tmp_path, config, extra_call=True)
    draws = torch.Generator().manual_seed(1)
    call = {"guidance_scale": 1.5, "num_inference_steps": STEPS, "output_type": "np"}
    dit_pipeline(labels.tolist(), generator=draws, **call)

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
def test_the_file_works_where_oss_exp_is_not_installed(tmp_path):
    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return x * rowwise(t, x) ** 2 - 0.5

    # A schedule in numbers, one with its solver's name only, and the module.
    solver = SOLVERS["dpm_solver_pp"]
    noise = draw((3, 4))
    search_noise = draw((8, 4), 2)
    grid = FlowSchedule(1.0).nodes(16)
    steps = plan("oss_shared", "dpm_solver_pp", velocity, grid, search_noise)
    save_in_numbers(steps, tmp_path / "x.json", solver)
    steps.save(tmp_path / "raw.json")
    shutil.copy(oss_exp.export.oss_scheduler.__file__, tmp_path)

    # A process without oss_exp.
    refuse = "import sys; sys.modules['oss_exp'] = None\n"
    check = ALONE.replace('== "oss_exp"]', '== "oss_exp" and sys.modules[name] is not None]')
    command = [sys.executable, "-c", refuse + check, json.dumps(noise.tolist())]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    assert process.returncode == 0, process.stderr
    latents, refusal = process.stdout.splitlines()
    expected = sample(solver, velocity, noise, steps)
    result = torch.tensor(json.loads(latents), dtype=torch.float64)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)
    message = "raw.json has its solver's name and not its numbers; rewrite it where oss_exp is"
    assert message in refusal


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

    expected = in_numbers(steps, UniPC(order=2, variant="bh2", lower_order_final=True))
    assert scheduler.weights == expected["weights"]


def test_save_pretrained_and_from_pretrained_are_a_round_trip(tmp_path):
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
def test_schedules_that_a_scheduler_cannot_run_are_refused(steps, solver, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        save_in_numbers(steps, tmp_path / "x.json", solver)
    assert list(tmp_path.iterdir()) == []


PINNED = StepSchedule([1.0, 0.5, 0.0])
ANALYTIC = StepSchedule([0.8, 0.5, 0.0], Analytic(ZEROS))


def test_a_network_of_a_chain_needs_its_betas(tmp_path):
    message = "needs the betas of the training; give from_schedule the config"
    with pytest.raises(ValueError, match=message):
        load(ANALYTIC, "euler", tmp_path, prediction_type="epsilon")


@pytest.mark.parametrize(
    "scheduler",
    [DDIMScheduler(**SD, rescale_betas_zero_snr=True), EDMEulerScheduler()],
    ids=["epsilon", "EDM"],
)
def test_pure_noise_is_refused_where_sigma_is_infinite(scheduler, tmp_path):
    with pytest.raises(ValueError, match=r"begins at t = 1, where sigma is infinite"):
        load(PINNED, "euler", tmp_path, scheduler.config)


def test_a_config_without_meaning_is_refused(tmp_path):
    config = UniPCMultistepScheduler(use_flow_sigmas=True).config
    message = "use_flow_sigmas=True with prediction_type=epsilon is no flow network"
    with pytest.raises(ValueError, match=message):
        load(ANALYTIC, "euler", tmp_path, config)
    with pytest.raises(ValueError, match="prediction_type must be one of flow_prediction, eps"):
        load(ANALYTIC, "euler", tmp_path, prediction_type="score")


def test_an_analytic_start_needs_begin_or_an_extra_call(tmp_path):
    message = r"latents=scheduler\.begin\(noise\), or build the scheduler with extra_call"
    with pytest.raises(ValueError, match=message):
        load(ANALYTIC, "euler", tmp_path).set_timesteps(2)
    with pytest.raises(ValueError, match="makes the first state itself"):
        load(ANALYTIC, "euler", tmp_path, extra_call=True).begin(torch.zeros(1, 4))


def test_steps_out_of_order_are_refused(tmp_path):
    scheduler = load(ANALYTIC, "euler", tmp_path)
    latents = torch.zeros(1, 4)
    scheduler.begin(latents)

    with pytest.raises(ValueError, match="call set_timesteps"):
        scheduler.step(latents, scheduler.timesteps[0], latents)
    scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match="runs through all of its times"):
        scheduler.step(latents, scheduler.timesteps[1], latents)
    with pytest.raises(ValueError, match="not from inside; search one for image-to-image"):
        scheduler.set_begin_index(1)


def test_missing_and_damaged_files_are_refused(tmp_path):
    file = save_in_numbers(ANALYTIC, tmp_path / "x.json", SOLVERS["euler"])
    mean = tmp_path / "x.mean.safetensors"

    mean.write_bytes(b"other")
    with pytest.raises(ValueError, match=r"is not the one of schedule .*copy both again"):
        OSSScheduler.from_schedule(file)
    mean.unlink()
    with pytest.raises(FileNotFoundError, match="copy it too"):
        OSSScheduler.from_schedule(file)
    file.write_text("{")
    with pytest.raises(ValueError, match="not complete JSON"):
        OSSScheduler.from_schedule(file)
    with pytest.raises(FileNotFoundError, match=r"y\.json does not exist"):
        OSSScheduler.from_schedule(tmp_path / "y.json")
