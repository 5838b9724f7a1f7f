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
from export.common import PATH, draw

import oss_exp.export.comfyui_nodes
from oss_exp.distances import XtMSE
from oss_exp.export.numbers import ComfyUINodes, save_in_numbers
from oss_exp.files import ASSETS, shipped_schedule
from oss_exp.noise import DDIMSchedule, FlowSchedule
from oss_exp.schedule import Analytic, FittedSteps, StepSchedule
from oss_exp.solvers import Euler, sample
from oss_exp.solvers.dpm_solver_pp import DPMSolverPP
from oss_exp.stepsize import OSSAve, OSSFit, OSSShared, Problem
from oss_exp.tensors import rowwise
from oss_exp.velocity import BoundVelocity, standard_normal_velocity

CODE = Path(oss_exp.export.comfyui_nodes.__file__)
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


def denoiser(velocity, flow: bool):
    """Turn a velocity into a denoiser of ComfyUI, in flow time or in sigma / alpha."""

    def denoise(x: torch.Tensor, sigma: torch.Tensor, **_) -> torch.Tensor:
        t = sigma if flow else sigma / (1 + sigma)
        x = x if flow else x * rowwise(1 - t, x)
        return x - rowwise(t, x) * velocity(x, t)

    return denoise


def plan(
    name: str, velocity, flow: bool, mixed: bool = False
) -> tuple[StepSchedule, DPMSolverPP | Euler]:
    """Search a schedule; return it with the provenance that an export needs, and its solver."""
    strategy, solver = STRATEGIES[name]
    grid = FlowSchedule().nodes(16) if flow else DDIMSchedule(PATH.betas).nodes(16)
    if name == "strength":
        grid = grid[grid < 0.7]
    problem = Problem(velocity, draw((8, 64), 2) * grid[0], grid, solver, XtMSE())
    steps = strategy.plan(problem, [STEPS])[STEPS]
    guidance = {"scale": GUIDANCE if mixed else 1.0, "channels": None, "interval": None}
    provenance = {
        "native": {"clock": CLOCK[flow]},
        "model": {"name": "mixture", "guidance": guidance},
    }

    return StepSchedule(steps.times, steps.start, steps.steps, provenance=provenance), solver


def guided(velocity) -> BoundVelocity:
    """Mix a velocity with that of standard normal data, as guidance does."""

    def both(x: torch.Tensor, t: torch.Tensor, _: None) -> torch.Tensor:
        return torch.stack([velocity(x, t), standard_normal_velocity(x, t)], dim=1)

    return BoundVelocity(both, None, mix=(GUIDANCE, 1 - GUIDANCE))


@pytest.fixture
def nodes(tmp_path, monkeypatch):
    """The file of nodes, loaded by a stand-in of ComfyUI that has a folder of schedules."""
    display = comfy.install(monkeypatch, tmp_path / "models")
    spec = importlib.util.spec_from_file_location("custom_nodes.oss_exp", CODE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    module.display = display
    module.models = tmp_path / "models" / "oss_schedules"
    module.models.mkdir(parents=True)
    return module


@pytest.fixture
def k_diffusion(monkeypatch):
    """The samplers and wrappers of k-diffusion, without the libraries that its package imports."""
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
    """A schedule for image-to-image begins at an image under noise."""
    # Our sample.
    steps, solver = plan(name, velocity, flow)
    noise = draw((3, 64))
    image = draw((3, 64), 3) if name == "strength" else torch.zeros(3, 64, dtype=torch.float64)
    state = steps.start_time * noise + (1 - steps.start_time) * image
    expected = sample(solver, velocity, state, steps)

    # ComfyUI's, by SamplerCustom.
    file = save_in_numbers(steps, nodes.models / "x.json", solver)
    sampling = comfy.CONST() if flow else comfy.EPS(float(nodes.load(file).sigmas(False)[0]))
    model = comfy.Patcher(sampling, denoiser(velocity, flow))
    denoise = 1.0 if name != "strength" else steps.start_time
    sigmas, sampler, text = nodes.OSSSchedule().run("x.json", denoise, model)

    assert text.startswith("x: 5 network calls")
    assert sigmas.dtype == torch.float32

    result = comfy.CFGGuider(model).sample(noise, image, sampler, sigmas)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["orders, analytic", "fitted, analytic"])
def test_guided_samples_are_our_own(name, nodes, velocity):
    """Fitted steps weigh the guided and the unguided answer apart."""
    mixed = guided(velocity)
    steps, solver = plan(name, mixed, True, mixed=True)
    file = save_in_numbers(steps, nodes.models / "x.json", solver, apart=True)
    assert nodes.load(file).answers == (2 if "fitted" in name else 1)

    # A sample with guidance, from the seed 7.
    unguided = denoiser(standard_normal_velocity, True)
    model = comfy.Patcher(comfy.CONST(), denoiser(velocity, True), unguided)
    latent = {"samples": torch.zeros(3, 64, dtype=torch.float64), "batch_index": None}
    (out,) = nodes.OSSSampler().run(model, "x.json", 7, GUIDANCE, [], [], latent)
    noise = comfy.prepare_noise(latent["samples"], 7)

    expected = sample(solver, mixed, noise, steps)
    torch.testing.assert_close(out["samples"], expected, rtol=0, atol=1e-5)
    progress = [step for step, total, _ in nodes.display["steps"] if total == STEPS]
    assert progress == [0, 1, 2, 3, 4]


class Network:
    """A network of k-diffusion (prediction epsilon or v) whose answer is the exact one."""

    def __init__(self, velocity, kind: str):
        self.velocity = velocity
        self.kind = kind

    def __call__(self, x: torch.Tensor, clock: torch.Tensor) -> torch.Tensor:
        if self.kind == "epsilon":
            t = PATH.canonical(clock)
        else:
            sigma = (clock * torch.pi / 2).tan()
            t = sigma / (1 + sigma)
        scale = rowwise(t**2 + (1 - t) ** 2, x) ** 0.5
        state = x * scale
        v = self.velocity(state, t)
        t = rowwise(t, x)
        x0 = state - t * v
        eps = state + (1 - t) * v
        return eps if self.kind == "epsilon" else ((1 - t) * eps - t * x0) / scale


@pytest.fixture(params=["epsilon", "v"])
def k_diffusion_model(request, k_diffusion, velocity):
    """A wrapper of k-diffusion around an exact network."""
    network = Network(velocity, request.param)
    if request.param == "v":
        return k_diffusion.external.VDenoiser(network)
    alphas_cumprod = torch.cumprod(1 - PATH.betas.double(), 0)
    return k_diffusion.external.DiscreteEpsDDPMDenoiser(network, alphas_cumprod, quantize=False)


@pytest.mark.parametrize("name", STRATEGIES)
def test_samples_of_k_diffusion_are_our_own(name, k_diffusion_model, nodes, velocity, tmp_path):
    steps, solver = plan(name, velocity, False)
    file = save_in_numbers(steps, tmp_path / "x.json", solver)
    noise = draw((3, 64))
    expected = sample(solver, velocity, noise * steps.start_time, steps)

    sampler, sigmas = nodes.for_k_diffusion(file)
    result = sampler(k_diffusion_model, noise * sigmas[0], sigmas, disable=True)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)

    # A web UI gives sigmas of its own.
    sampler, _ = nodes.for_k_diffusion(file, webui=True)
    others = torch.tensor([9.0, 1.0, 0.0])
    result = sampler(k_diffusion_model, noise * 9, others, disable=True)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


def test_a_list_gives_the_sample_of_k_diffusions_own_euler_sampler(
    k_diffusion, k_diffusion_model, nodes, velocity, tmp_path
):
    steps, _ = plan("Euler list", velocity, False)
    pinned = StepSchedule(steps.times, provenance=steps.provenance)
    sampler, sigmas = nodes.for_k_diffusion(save_in_numbers(pinned, tmp_path / "x.json"))
    x = draw((3, 64)) * sigmas[0]

    expected = k_diffusion.sampling.sample_euler(k_diffusion_model, x, sigmas, disable=True)
    result = sampler(k_diffusion_model, x, sigmas, disable=True)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


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
        expected = sample(Euler(), velocity, noise, steps, chosen)
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)

    sampler, sigmas = nodes.for_k_diffusion(file, condition=3)
    with pytest.raises(ValueError, match="has means of 3 conditions, 0 to 2"):
        sampler(denoiser(velocity, True), noise, sigmas)


@pytest.mark.slow
def test_packed_means_are_unpacked(nodes):
    """Pipelines of FLUX hold 2 x 2 latents as one."""
    from diffusers import FluxPipeline

    latents = draw((2, 4, 6, 8))
    packed = FluxPipeline._pack_latents(latents, 2, 4, 6, 8)
    schedule = types.SimpleNamespace(mean=packed, name="x")
    like = torch.zeros(5, 4, 6, 8, dtype=torch.float64)
    assert torch.equal(nodes._mean_of(schedule, like, 1), latents[1])


@pytest.fixture
def two_experts(nodes, velocity):
    """A function: search a schedule by name; return a guider, the noise, its sampler and sigmas."""

    def load(name: str):
        steps, solver = plan(name, velocity, True)
        save_in_numbers(steps, nodes.models / "x.json", solver)
        model = comfy.Patcher(comfy.CONST(), denoiser(velocity, True))
        sigmas, sampler, _ = nodes.OSSSchedule().run("x.json", 1.0, model)
        return comfy.CFGGuider(model), draw((3, 64)), sampler, sigmas

    return load


EMPTY = torch.zeros(3, 64, dtype=torch.float64)


def test_two_samplers_may_share_a_list_of_first_order_steps(two_experts):
    guider, noise, sampler, sigmas = two_experts("Euler list")
    expected = guider.sample(noise, EMPTY, sampler, sigmas)

    halfway = guider.sample(noise, EMPTY, sampler, sigmas[:3])
    result = guider.sample(EMPTY, halfway, sampler, sigmas[2:])

    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


def test_two_samplers_may_not_share_steps_that_remember_those_before(two_experts):
    guider, noise, sampler, sigmas = two_experts("orders")
    halfway = guider.sample(noise, EMPTY, sampler, sigmas[:3])

    message = "remember those before; give one sampler all of its sigmas"
    with pytest.raises(ValueError, match=message):
        guider.sample(EMPTY, halfway, sampler, sigmas[2:])
    with pytest.raises(ValueError, match="the sigmas are not those of schedule x"):
        guider.sample(noise, EMPTY, sampler, torch.tensor([1.0, 0.5, 0.0]))


@pytest.mark.parametrize("name", ["Euler list", "fitted, analytic"])
def test_the_masked_part_of_an_image_stays(name, nodes, velocity):
    steps, solver = plan(name, velocity, True)
    save_in_numbers(steps, nodes.models / "x.json", solver)
    model = comfy.Patcher(comfy.CONST(), denoiser(velocity, True))
    image = draw((3, 64), 3)
    mask = (torch.arange(64) < 32).double().expand(3, 64)
    latent = {"samples": image, "noise_mask": mask}
    (out,) = nodes.OSSSampler().run(model, "x.json", 7, 1.0, [], [], latent)

    assert torch.equal(out["samples"][:, 32:], image[:, 32:])
    assert (out["samples"] - image)[:, :32].abs().min() > 0


def test_an_interrupt_goes_through(nodes, velocity):
    steps, solver = plan("orders", velocity, True)
    save_in_numbers(steps, nodes.models / "x.json", solver)
    model = comfy.Patcher(comfy.CONST(), denoiser(velocity, True))
    sigmas, sampler, _ = nodes.OSSSchedule().run("x.json")
    calls = []

    def interrupt(step, *_):
        calls.append(step)
        if step == 1:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        comfy.CFGGuider(model).sample(
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

def denoise(x, sigma):
    sigma = sigma[:, None]
    return x - sigma * (x * sigma**2 - 0.5)

result = sampler(denoise, noise * sigmas[0], sigmas)
print(json.dumps(result.tolist()))
packages = ("oss_exp", "diffusers", "comfy")
assert [name for name in sys.modules if name.startswith(packages)] == ["oss_exp"]
"""


@pytest.mark.slow
def test_the_file_works_where_oss_exp_is_not_installed(tmp_path):
    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return x * rowwise(t, x) ** 2 - 0.5

    steps, solver = plan("fitted, analytic", velocity, True)
    save_in_numbers(steps, tmp_path / "x.json", solver)
    shutil.copy(CODE, tmp_path / "nodes.py")
    noise = draw((3, 64))
    command = [sys.executable, "-c", ALONE, json.dumps(noise.tolist())]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    assert process.returncode == 0, process.stderr
    result = torch.tensor(json.loads(process.stdout), dtype=torch.float64)
    torch.testing.assert_close(result, sample(solver, velocity, noise, steps), rtol=0, atol=1e-5)


def test_the_file_has_fewer_than_400_lines_of_code():
    """Blank lines, comments and docstrings are not counted."""
    source = CODE.read_text()
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            docstrings |= {*range(node.body[0].lineno, node.body[0].end_lineno + 1)}

    count = 0
    for number, line in enumerate(source.splitlines(), start=1):
        text = line.strip()
        count += number not in docstrings and text != "" and not text.startswith("#")
    assert count < 400


def test_an_exported_folder_has_the_nodes_and_the_schedule(tmp_path, velocity):
    steps, _ = plan("fitted, analytic", velocity, True)
    code = tmp_path / "oss_exp" / "__init__.py"

    text = ComfyUINodes().write(steps, tmp_path / "oss_exp")
    assert "mixture_5.json\nRestart ComfyUI once" in text
    assert code.read_text() == CODE.read_text()
    names = {file.name for file in (tmp_path / "oss_exp" / "schedules").iterdir()}
    assert names == {"mixture_5.json", "mixture_5.mean.json", "mixture_5.mean.safetensors"}

    # Nodes of another version are replaced.
    code.write_text('FORMAT = "oss_exp/scheduler"  # of another version')
    ComfyUINodes().write(steps, tmp_path / "oss_exp")
    assert code.read_text() == CODE.read_text()


def test_a_folder_of_other_nodes_is_not_overwritten(tmp_path):
    steps = StepSchedule([1.0, 0.5, 0.0], provenance={"native": {"clock": "flow time"}})
    (tmp_path / "__init__.py").write_text("NODE_CLASS_MAPPINGS = {}")
    with pytest.raises(ValueError, match=r"holds another __init__\.py; choose a folder of its own"):
        ComfyUINodes().write(steps, tmp_path)


def test_shipped_schedules_are_small_certified_and_loadable(nodes):
    """They are small and certified, for networks of the package, and the nodes load them."""
    files = sorted((ASSETS / "schedules").glob("*.json"))
    shipped = [file for file in files if not file.name.endswith(".mean.json")]
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
            "x.json is no oss_exp/scheduler of version 1; "
            "where oss_exp is, make one by oss-exp task=export",
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
def test_schedule_names_cannot_leave_the_folder(name, nodes):
    (nodes.models.parent / "good.json").write_text(json.dumps(GOOD))
    assert "there is no schedule" in nodes.OSSSchedule.VALIDATE_INPUTS(name)


@pytest.fixture
def sigma_model(velocity) -> comfy.Patcher:
    """A model of sigma / alpha."""
    return comfy.Patcher(comfy.EPS(), denoiser(velocity, False))


def test_a_schedule_of_another_strength_is_refused(nodes):
    (nodes.models / "x.json").write_text(json.dumps(GOOD))
    (nodes.models / "inside.json").write_text(json.dumps(GOOD | {"strength": 0.6}))

    with pytest.raises(ValueError, match=r"begins at pure noise: set denoise=1\.00"):
        nodes.OSSSchedule().run("x.json", 0.6, None)
    with pytest.raises(ValueError, match=r"begins at an image: set denoise=0\.60"):
        nodes.OSSSchedule().run("inside.json", 1.0, None)


def test_a_schedule_for_another_kind_of_model_is_refused(nodes, sigma_model):
    (nodes.models / "x.json").write_text(json.dumps(GOOD))
    (nodes.models / "unknown.json").write_text(json.dumps(GOOD | {"provenance": {}}))

    message = "is for a flow model, and the model is one of sigma / alpha"
    with pytest.raises(ValueError, match=message):
        nodes.OSSSchedule().run("x.json", 1.0, sigma_model)
    with pytest.raises(ValueError, match="is for one of no known kind; connect a model that says"):
        nodes.OSSSchedule().run("unknown.json", 1.0, None)

    # The sampler checks again.
    sigmas, sampler, _ = nodes.OSSSchedule().run("x.json")
    guider = comfy.CFGGuider(sigma_model)
    with pytest.raises(ValueError, match="is for a flow model, and the model is one of sigma"):
        guider.sample(draw((1, 64)), torch.zeros(1, 64), sampler, sigmas)


def test_answers_apart_need_a_negative_prompt(nodes):
    provenance = {"native": {"clock": "flow time"}, "model": {"guidance": {"scale": 3.0}}}
    weights = FittedSteps(torch.ones(2, 5), torch.zeros(1))
    fitted = StepSchedule(GOOD["times"], steps=weights, provenance=provenance)
    file = save_in_numbers(fitted, nodes.models / "apart.json", apart=True)
    sampler, sigmas = nodes.for_k_diffusion(file)

    message = "weighs guided and unguided answers apart; sample with a negative prompt"
    with pytest.raises(ValueError, match=message):
        sampler(lambda x, sigma, **_: x, draw((1, 64)), sigmas)
