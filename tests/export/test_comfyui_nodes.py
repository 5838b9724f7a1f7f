"""The nodes, and the sampler in them, make the samples that oss_exp makes itself."""

import ast
import importlib.util
import json
import shutil
import subprocess
import sys
import types
from pathlib import Path

import comfy_stand_in as comfy
import pytest
import torch

import oss_exp.export.comfyui_nodes
from oss_exp.distances import XtMSE
from oss_exp.export.numbers import ComfyUINodes, save_in_numbers
from oss_exp.files import ASSETS, shipped_schedule
from oss_exp.noise import DDIMSchedule, DDPMPath, FlowSchedule, scaled_linear_betas
from oss_exp.schedule import Analytic, FittedSteps, StepSchedule
from oss_exp.solvers import Euler, sample
from oss_exp.solvers.dpm_solver_pp import DPMSolverPP
from oss_exp.stepsize import OSSAve, OSSFit, OSSShared, Problem
from oss_exp.velocity import BoundVelocity, standard_normal_velocity

CODE = Path(oss_exp.export.comfyui_nodes.__file__)
PATH = DDPMPath(scaled_linear_betas(1000, 0.00085, 0.012))
CLOCK = {True: "flow time", False: "DDPM index"}
STEPS = 5
GUIDANCE = 2.5
SMALL = {"band": None, "refine": False}
STRATEGIES = {
    "Euler list": (OSSAve(start="free", aggregate="median", **SMALL), Euler()),
    "orders": (OSSShared(start="pinned", **SMALL), DPMSolverPP(order=3)),
    "orders, analytic": (OSSShared(start="analytic", **SMALL), DPMSolverPP(order=3)),
    "fitted": (OSSFit(start="pinned", history=2, **SMALL), Euler()),
    "fitted, analytic": (OSSFit(start="analytic", history=3, **SMALL), Euler()),
    "strength": (OSSShared(start="pinned", **SMALL), DPMSolverPP(order=2)),
}


def draw(shape: tuple[int, ...], seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return values.reshape(-1, *[1] * (like.ndim - 1)).to(like)


def denoiser(velocity, flow: bool):
    """x0 of ComfyUI's latents, flow time or sigma / alpha."""

    def denoise(x: torch.Tensor, sigma: torch.Tensor, **_) -> torch.Tensor:
        t = sigma if flow else sigma / (1 + sigma)
        x = x if flow else x * rows(1 - t, x)
        return x - rows(t, x) * velocity(x, t)

    return denoise


def plan(
    name: str, velocity, flow: bool, mixed: bool = False
) -> tuple[StepSchedule, DPMSolverPP | Euler]:
    strategy, solver = STRATEGIES[name]
    grid = FlowSchedule().nodes(16) if flow else DDIMSchedule(PATH.betas).nodes(16)
    if name == "strength":
        grid = grid[grid < 0.7]
    steps = strategy.plan(
        Problem(velocity, draw((8, 64), 2) * grid[0], grid, solver, XtMSE()), [STEPS]
    )[STEPS]
    guidance = {"scale": GUIDANCE if mixed else 1.0, "channels": None, "interval": None}
    provenance = {
        "native": {"clock": CLOCK[flow]},
        "model": {"name": "mixture", "guidance": guidance},
    }

    return StepSchedule(steps.times, steps.start, steps.steps, provenance=provenance), solver


def guided(velocity) -> BoundVelocity:
    def both(x: torch.Tensor, t: torch.Tensor, _: None) -> torch.Tensor:
        return torch.stack([velocity(x, t), standard_normal_velocity(x, t)], dim=1)

    return BoundVelocity(both, None, mix=(GUIDANCE, 1 - GUIDANCE))


@pytest.fixture
def nodes(tmp_path, monkeypatch):
    """The file inside of (the stand-in of) ComfyUI, beside its models."""
    display = comfy.install(monkeypatch, tmp_path / "models")
    spec = importlib.util.spec_from_file_location("custom_nodes.oss_exp", CODE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    module.shown = display
    module.models = tmp_path / "models" / "oss_schedules"
    module.models.mkdir(parents=True)
    return module


@pytest.fixture
def k_diffusion(monkeypatch):
    """The samplers and wrappers of k-diffusion; the rest of its package imports ten libraries that these do not use."""
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None:
        pytest.skip("k-diffusion is not installed: pip install --no-deps k-diffusion torchdiffeq")
    package = types.ModuleType("k_diffusion")
    package.__path__ = list(spec.submodule_search_locations)
    monkeypatch.setitem(sys.modules, "k_diffusion", package)

    return types.SimpleNamespace(
        sampling=importlib.import_module("k_diffusion.sampling"),
        external=importlib.import_module("k_diffusion.external"),
    )


# --------------------------------------------------------------------------------------------------
# Equality
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flow", [True, False], ids=["flow", "sigma"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_samples_are_our_own(name, flow, nodes, velocity):
    """By SamplerCustom's way through ComfyUI: an image under the noise where the schedule begins at one."""
    steps, solver = plan(name, velocity, flow)
    save_in_numbers(steps, nodes.models / "x.json", solver)
    noise = draw((3, 64))
    image = draw((3, 64), 3) if name == "strength" else torch.zeros(3, 64, dtype=torch.float64)
    state = steps.start_time * noise + (1 - steps.start_time) * image
    expected = sample(solver, velocity, state, steps)
    sampling = (
        comfy.CONST()
        if flow
        else comfy.EPS(float(nodes.load(nodes.models / "x.json").sigmas(False)[0]))
    )
    model = comfy.Patcher(sampling, denoiser(velocity, flow))
    denoise = 1.0 if name != "strength" else steps.start_time
    sigmas, sampler, text = nodes.OSSSchedule().run("x.json", denoise, model)

    assert text.startswith("x: 5 network calls")
    assert sigmas.dtype == torch.float32

    result = comfy.CFGGuider(model).sample(noise, image, sampler, sigmas)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["orders, analytic", "fitted, analytic"])
def test_guided(name, nodes, velocity):
    """Fitted steps weigh the two answers apart: the guider mixes them, and the sampler takes them before."""
    mixed = guided(velocity)
    steps, solver = plan(name, mixed, True, mixed=True)
    save_in_numbers(steps, nodes.models / "x.json", solver, apart=True)

    assert nodes.load(nodes.models / "x.json").answers == (2 if "fitted" in name else 1)

    model = comfy.Patcher(
        comfy.CONST(), denoiser(velocity, True), denoiser(standard_normal_velocity, True)
    )
    latent = {"samples": torch.zeros(3, 64, dtype=torch.float64), "batch_index": None}
    (out,) = nodes.OSSSampler().run(model, "x.json", 7, GUIDANCE, [], [], latent)
    noise = comfy.prepare_noise(latent["samples"], 7)

    torch.testing.assert_close(
        out["samples"], sample(solver, mixed, noise, steps), rtol=0, atol=1e-5
    )
    assert [step for step, total, _ in nodes.shown["steps"] if total == STEPS] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("kind", ["epsilon", "v"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_networks_of_k_diffusion(name, kind, k_diffusion, nodes, velocity, tmp_path):
    """Its wrappers are the models; and its own Euler sampler makes the same of a list."""
    steps, solver = plan(name, velocity, False)
    sampler, sigmas = nodes.for_k_diffusion(save_in_numbers(steps, tmp_path / "x.json", solver))
    kept = torch.cumprod(1 - PATH.betas.double(), 0)

    def network(x: torch.Tensor, clock: torch.Tensor) -> torch.Tensor:
        t = (
            PATH.canonical(clock)
            if kind == "epsilon"
            else (ratio := (clock * torch.pi / 2).tan()) / (1 + ratio)
        )
        scale = rows(t**2 + (1 - t) ** 2, x) ** 0.5
        state = x * scale
        t = rows(t, x)
        v = velocity(state, t.flatten())
        x0 = state - t * v
        eps = state + (1 - t) * v

        return eps if kind == "epsilon" else ((1 - t) * eps - t * x0) / scale

    model = k_diffusion.external.VDenoiser(network)
    if kind == "epsilon":
        model = k_diffusion.external.DiscreteEpsDDPMDenoiser(network, kept, quantize=False)
    noise = draw((3, 64))
    found = sampler(model, noise * sigmas[0], sigmas, disable=True)
    expected = sample(solver, velocity, noise * steps.start_time, steps)

    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)

    webui, _ = nodes.for_k_diffusion(tmp_path / "x.json", webui=True)
    others = torch.tensor([9.0, 1.0, 0.0])
    torch.testing.assert_close(
        webui(model, noise * 9, others, disable=True), expected, rtol=0, atol=1e-5
    )

    if name == "Euler list":
        pinned = StepSchedule(steps.times, provenance=steps.provenance)
        sampler, sigmas = nodes.for_k_diffusion(save_in_numbers(pinned, tmp_path / "y.json"))
        own = k_diffusion.sampling.sample_euler(model, noise * sigmas[0], sigmas, disable=True)
        torch.testing.assert_close(
            sampler(model, noise * sigmas[0], sigmas, disable=True), own, rtol=0, atol=1e-5
        )


def test_each_condition_has_its_mean(nodes, velocity, tmp_path):
    mean = draw((3, 64), 3)
    steps = StepSchedule(
        [0.8, 0.5, 0.0], Analytic(mean), provenance={"native": {"clock": "flow time"}}
    )
    file = save_in_numbers(steps, tmp_path / "x.json")
    group = torch.tensor([2, 0, 1, 2])
    noise = draw((4, 64))

    for condition, chosen in ((group, group), (1, torch.ones(4, dtype=torch.long))):
        sampler, sigmas = nodes.for_k_diffusion(file, condition=condition)
        result = sampler(denoiser(velocity, True), noise * sigmas[0], sigmas, disable=True)
        torch.testing.assert_close(
            result, sample(Euler(), velocity, noise, steps, chosen), rtol=0, atol=1e-5
        )

    sampler, sigmas = nodes.for_k_diffusion(file, condition=3)
    with pytest.raises(ValueError, match="has means of 3 conditions, 0 to 2"):
        sampler(denoiser(velocity, True), noise, sigmas)


@pytest.mark.slow
def test_packed_means_are_unpacked(nodes):
    """Pipelines of FLUX hold 2 x 2 latents in one."""
    from diffusers import FluxPipeline

    latents = draw((2, 4, 6, 8))
    packed = FluxPipeline._pack_latents(latents, 2, 4, 6, 8)
    schedule = types.SimpleNamespace(mean=packed, name="x")
    assert torch.equal(
        nodes._mean_of(schedule, torch.zeros(5, 4, 6, 8, dtype=torch.float64), 1), latents[1]
    )


def test_two_experts_share_a_list(nodes, velocity, tmp_path):
    """First-order steps remember nothing: two samplers, each with its part, do what one does; others are refused."""
    sigmas_of = {}

    for name in ("Euler list", "orders"):
        steps, solver = plan(name, velocity, True)
        save_in_numbers(steps, nodes.models / "x.json", solver)
        model = comfy.Patcher(comfy.CONST(), denoiser(velocity, True))
        sigmas_of[name] = sigmas, sampler, _ = nodes.OSSSchedule().run("x.json", 1.0, model)
        noise = draw((3, 64))
        nothing = torch.zeros(3, 64, dtype=torch.float64)
        half = comfy.CFGGuider(model).sample(noise, nothing, sampler, sigmas[:3])

        if name == "Euler list":
            result = comfy.CFGGuider(model).sample(nothing, half, sampler, sigmas[2:])
            whole = comfy.CFGGuider(model).sample(noise, nothing, sampler, sigmas)
            torch.testing.assert_close(result, whole, rtol=0, atol=1e-5)
        else:
            with pytest.raises(
                ValueError, match="remember those before; give one sampler all of its sigmas"
            ):
                comfy.CFGGuider(model).sample(nothing, half, sampler, sigmas[2:])

    with pytest.raises(ValueError, match="the sigmas are not those of schedule x"):
        comfy.CFGGuider(model).sample(noise, nothing, sampler, torch.tensor([1.0, 0.5, 0.0]))


@pytest.mark.parametrize("name", ["Euler list", "fitted, analytic"])
def test_what_a_mask_keeps_stays(name, nodes, velocity):
    steps, solver = plan(name, velocity, True)
    save_in_numbers(steps, nodes.models / "x.json", solver)
    model = comfy.Patcher(comfy.CONST(), denoiser(velocity, True))
    image = draw((3, 64), 3)
    mask = (torch.arange(64) < 32).double().expand(3, 64)
    (out,) = nodes.OSSSampler().run(
        model, "x.json", 7, 1.0, [], [], {"samples": image, "noise_mask": mask}
    )

    assert torch.equal(out["samples"][:, 32:], image[:, 32:])
    assert (out["samples"] - image)[:, :32].abs().min() > 0


def test_an_interrupt_goes_through(nodes, velocity):
    save_in_numbers(
        *plan("orders", velocity, True)[:1], nodes.models / "x.json", DPMSolverPP(order=3)
    )
    sigmas, sampler, _ = nodes.OSSSchedule().run("x.json")
    calls = []

    def interrupt(step, *_):
        calls.append(step)
        if step == 1:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        comfy.CFGGuider(comfy.Patcher(comfy.CONST(), denoiser(velocity, True))).sample(
            draw((1, 64)), torch.zeros(1, 64), sampler, sigmas, callback=interrupt
        )

    assert calls == [0, 1]


# --------------------------------------------------------------------------------------------------
# The file, alone
# --------------------------------------------------------------------------------------------------

ALONE = """
import json, sys
sys.modules["oss_exp"] = None
import torch
import nodes

sampler, sigmas = nodes.for_k_diffusion("x.json")
noise = torch.tensor(json.loads(sys.argv[1]), dtype=torch.float64)
found = sampler(lambda x, sigma: x - sigma[:, None] * (x * sigma[:, None] ** 2 - 0.5), noise * sigmas[0], sigmas)
print(json.dumps(found.tolist()))
assert [name for name in sys.modules if name.startswith(("oss_exp", "diffusers", "comfy"))] == ["oss_exp"]
"""


@pytest.mark.slow
def test_one_file_without_oss_exp(tmp_path):
    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return x * rows(t, x) ** 2 - 0.5

    steps, solver = plan("fitted, analytic", velocity, True)
    save_in_numbers(steps, tmp_path / "x.json", solver)
    shutil.copy(CODE, tmp_path / "nodes.py")
    noise = draw((3, 64))
    process = subprocess.run(
        [sys.executable, "-c", ALONE, json.dumps(noise.tolist())],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )

    assert process.returncode == 0, process.stderr

    result = torch.tensor(json.loads(process.stdout), dtype=torch.float64)
    torch.testing.assert_close(result, sample(solver, velocity, noise, steps), rtol=0, atol=1e-5)


def test_the_file_is_short():
    """Lines of code: blank lines, comments and docstrings are not counted."""
    source = CODE.read_text()
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            docstrings |= {*range(node.body[0].lineno, node.body[0].end_lineno + 1)}

    code = [
        line
        for number, line in enumerate(source.splitlines(), start=1)
        if number not in docstrings and line.strip() and not line.strip().startswith("#")
    ]

    assert len(code) < 400


def test_exported_folder(tmp_path, velocity):
    steps, _ = plan("fitted, analytic", velocity, True)
    text = ComfyUINodes().write(steps, tmp_path / "oss_exp")
    assert "mixture_5.json\nRestart ComfyUI once" in text
    assert (tmp_path / "oss_exp" / "__init__.py").read_text() == CODE.read_text()

    earlier = 'FORMAT = "oss_exp/scheduler"  # of another version'
    (tmp_path / "oss_exp" / "__init__.py").write_text(earlier)
    ComfyUINodes().write(steps, tmp_path / "oss_exp")  # and again

    assert (tmp_path / "oss_exp" / "__init__.py").read_text() == CODE.read_text()

    names = {file.name for file in (tmp_path / "oss_exp" / "schedules").iterdir()}
    assert names == {"mixture_5.json", "mixture_5.mean.json", "mixture_5.mean.safetensors"}

    (tmp_path / "__init__.py").write_text("NODE_CLASS_MAPPINGS = {}")
    with pytest.raises(ValueError, match=r"holds another __init__\.py; choose a folder of its own"):
        ComfyUINodes().write(steps, tmp_path)


def test_shipped_schedules(nodes):
    """Small, certified, of our own networks, and the nodes run them."""
    shipped = sorted(
        path
        for path in (ASSETS / "schedules").glob("*.json")
        if not path.name.endswith(".mean.json")
    )

    assert len(shipped) >= 2
    assert sum(path.stat().st_size for path in (ASSETS / "schedules").iterdir()) < 300_000

    for path in shipped:
        steps = StepSchedule.load(shipped_schedule(path.name))
        assert (ASSETS / f"{steps.about('model')['name']}.safetensors").is_file()
        assert {cell.axis for cell in steps.range.cells} >= {"base", "dtype", "guidance"}
        schedule = nodes.load(save_in_numbers(steps, nodes.models / path.name))
        assert "at 5" in nodes.warn(schedule, {"guidance": 5.0})[0]
        assert nodes.warn(schedule, {"guidance": 1.0, "dtype": "float8_e4m3fn"}) == []


# --------------------------------------------------------------------------------------------------
# Files and inputs
# --------------------------------------------------------------------------------------------------


def test_files_appear_without_a_restart(nodes, velocity):
    def listed():
        return nodes.OSSSchedule.INPUT_TYPES()["required"]["schedule"][0]

    assert listed() == ["none in models/oss_schedules"]
    assert "there is no schedule" in nodes.OSSSampler.VALIDATE_INPUTS(listed()[0])

    save_in_numbers(*plan("fitted", velocity, True)[:1], nodes.models / "x.json")
    assert listed() == ["x.json"]
    assert nodes.OSSSampler.VALIDATE_INPUTS("x.json") is True

    before = nodes.OSSSchedule.IS_CHANGED("x.json")
    save_in_numbers(*plan("Euler list", velocity, True)[:1], nodes.models / "x.json")
    assert nodes.OSSSchedule.IS_CHANGED("x.json", denoise=1.0) != before

    for node in nodes.NODE_CLASS_MAPPINGS.values():
        assert {*node.INPUT_TYPES()} == {"required", "optional"}
        assert callable(getattr(node, node.FUNCTION))


GOOD = {
    "format": "oss_exp/scheduler",
    "version": 1,
    "times": [1.0, 0.5, 0.0],
    "weights": [[0.5, 0, 0, 0.5]] * 2,
}
GOOD |= {
    "start": "pinned",
    "start_time": 1.0,
    "mean": None,
    "provenance": {"native": {"clock": "flow time"}},
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{", "x.json is not complete JSON"),
        ("[" * 100_000, "x.json is not complete JSON"),
        (
            "[]",
            "x.json is no oss_exp/scheduler of version 1; where oss_exp is, make one by oss-exp task=export",
        ),
        ("\udcff", "x.json is not complete JSON"),
        ("", "x.json is not complete JSON"),
        ({"format": "oss_exp/step_schedule"}, "is no oss_exp/scheduler of version 1"),
        ({"version": 2}, "is no oss_exp/scheduler of version 1"),
        ({"queries": [1]}, "has 'queries', which these nodes do not know; update them"),
        ({"times": [0.5, 1.0, 0.0]}, "has wrong times"),
        ({"times": [float("nan"), 0.5, 0.0]}, "has wrong times"),
        ({"times": [True, 0.5, 0.0]}, "has wrong times"),
        ({"times": [1.0, 0.5]}, "has wrong times"),
        ({"times": "1, 0.5, 0"}, "has wrong times"),
        ({"weights": [[1.0] * 4]}, "has wrong weights"),
        ({"weights": [[1e300] * 4] * 2}, "has wrong weights"),
        ({"weights": {"0": 1}}, "has wrong weights"),
        ({"weights": [[0.5, 0, 0.1, 0.5]] * 2}, "has wrong mean"),
        ({"start": "__import__"}, "has wrong start"),
        ({"start": "analytic"}, "has wrong mean"),
        ({"start_time": 0.2}, "has wrong start"),
        ({"answers": 10**9}, "has wrong answers or strength"),
        (
            {"mean": {"file": "../secret.safetensors", "sha256": "0"}},
            "is not beside it; copy it too",
        ),
        ({"mean": {"file": "/etc/passwd"}}, "is not beside it; copy it too"),
        ({"mean": ["x"]}, "is not beside it; copy it too"),
        ({"mean": {"file": "x.json", "sha256": "0"}}, "x.json is not the mean of schedule x.json"),
    ],
)
def test_wrong_files_leave_the_interface_working(change, message, nodes):
    text = change if isinstance(change, str) else json.dumps(GOOD | change)
    (nodes.models / "x.json").write_text(text, errors="surrogateescape")
    (nodes.models / "good.json").write_text(json.dumps(GOOD))
    assert message in nodes.OSSSchedule.VALIDATE_INPUTS("x.json")
    assert nodes.OSSRange.INPUT_TYPES()["required"]["schedule"][0] == ["good.json", "x.json"]
    nodes.OSSSchedule.IS_CHANGED("x.json")
    assert nodes.OSSSchedule.VALIDATE_INPUTS("good.json") is True


@pytest.mark.parametrize(
    "name", ["../good.json", "/etc/passwd", "", "none in models/oss_schedules", "x.mean.json"]
)
def test_names_do_not_leave_the_folder(name, nodes):
    (nodes.models.parent / "good.json").write_text(json.dumps(GOOD))
    assert "there is no schedule" in nodes.OSSSchedule.VALIDATE_INPUTS(name)


def test_wrong_use_says_what_is_right(nodes, velocity):
    (nodes.models / "x.json").write_text(json.dumps(GOOD))
    (nodes.models / "inside.json").write_text(json.dumps(GOOD | {"strength": 0.6}))
    (nodes.models / "unknown.json").write_text(json.dumps(GOOD | {"provenance": {}}))
    sigma = comfy.Patcher(comfy.EPS(), denoiser(velocity, False))

    for name, denoise, model, message in [
        ("x.json", 0.6, None, r"begins at pure noise: set denoise=1\.00"),
        ("inside.json", 1.0, None, r"begins at an image: set denoise=0\.60"),
        ("x.json", 1.0, sigma, "is for a flow model, and the model is one of sigma / alpha"),
        ("unknown.json", 1.0, None, "is for one of no known kind; connect a model that says"),
    ]:
        with pytest.raises(ValueError, match=message):
            nodes.OSSSchedule().run(name, denoise, model)

    sigmas, sampler, _ = nodes.OSSSchedule().run("x.json")
    with pytest.raises(
        ValueError, match="is for a flow model, and the model is one of sigma"
    ):  # the wrong way round
        comfy.CFGGuider(sigma).sample(draw((1, 64)), torch.zeros(1, 64), sampler, sigmas)

    fitted = StepSchedule(
        GOOD["times"],
        steps=FittedSteps(torch.ones(2, 5), torch.zeros(1)),
        provenance={
            "native": {"clock": "flow time"},
            "model": {"guidance": {"scale": 3.0}},
        },
    )

    save_in_numbers(fitted, nodes.models / "apart.json", apart=True)
    sampler, sigmas = nodes.for_k_diffusion(nodes.models / "apart.json")
    with pytest.raises(
        ValueError, match="weighs guided and unguided answers apart; sample with a negative prompt"
    ):
        sampler(lambda x, sigma, **_: x, draw((1, 64)), sigmas)
