"""MAR computes what the authors' networks and their stochastic sampler compute (oracles G)."""

import json
import math
from functools import partial
from itertools import count, pairwise

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from helpers import ORACLES
from hydra.utils import instantiate
from models.common import composed, difference, without_prefix
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from oss_exp.models.checkpoints.weights import randomise
from oss_exp.models.decoders.ldm_vae import LDMVAE
from oss_exp.models.families.mar import MAR, MARNetwork, at, unknown_before
from oss_exp.models.guidance import Guidance
from oss_exp.models.parameterization import NoisePrediction
from oss_exp.noise import DDIMSchedule, DDPMPath, cosine_betas
from oss_exp.schedule import Analytic, Free, StepSchedule
from oss_exp.solvers import Euler, nfe, sample
from oss_exp.stepsize.oss.strategies import OSSFit
from oss_exp.stepsize.problem import Problem
from oss_exp.tensors import rowwise
from oss_exp.velocity import joined

BETAS = cosine_betas(1000, 0.999)
FORM = NoisePrediction(DDPMPath(BETAS), 0.99995072)
GRID = DDIMSchedule(BETAS).nodes(4)
STEPS = StepSchedule(GRID)
SIZES = {"a": (4, 4, 1), "p2": (3, 12, 2)}  # channels, size, patch
with safe_open(ORACLES / "mar_tiny.safetensors", "pt") as file:
    METADATA = file.metadata()
META = {key: json.loads(METADATA[key]) for key in ("meta", "extra")}
RUNS = {run["prefix"]: run for run in META["extra"]["sample_runs"]}


def network(tag: str) -> MARNetwork:
    channels, size, patch = SIZES[tag]
    public = META["meta"][tag]["init_kwargs"]
    prefixes = ("encoder", "decoder", "mlp", "buffer", "diffloss")
    arguments = {key: value for key, value in public.items() if key.startswith(prefixes)}
    return MARNetwork(channels, size, public["class_num"], patch, **arguments)


def mar(
    tag: str = "a", checkpoint="random", scale: float = 3.0, num_iter: int = 5, **changes
) -> MAR:
    """Build a model of the small networks of the oracles."""
    channels, size, patch = SIZES[tag]
    full = {
        "event_shape": ((size // patch) ** 2, channels * patch**2),
        "num_classes": META["meta"][tag]["init_kwargs"]["class_num"],
        "checkpoint": "nowhere",
        "backbone": Backbone(tag),
        "decoder": nn.Identity,
    }

    arguments = {
        "search_iterations": [0],
        "search_cfg": None,
        "seed": 0,
        "dtype": "float64",
        "micro_batch": 7,
    } | changes

    return MAR(
        num_iter,
        name="mar",
        size="full",
        sizes={"full": full},
        parameterization=FORM,
        guidance=Guidance(scale),
        checkpoint=str(checkpoint),
        source="the authors",
        **arguments,
    )


class Backbone(partial):
    """A partial as Hydra makes it, whose `func` is the network's class."""

    def __new__(cls, tag):
        return super().__new__(cls, MARNetwork, tag)

    def __call__(self):
        return network(*self.args)


@pytest.fixture(scope="module")
def arrays():
    return load_file(ORACLES / "mar_tiny.safetensors")


@pytest.fixture(scope="module")
def files(arrays, tmp_path_factory):
    """The authors' checkpoints, with the trained weights and their average, which is used."""
    paths = {}

    for tag in SIZES:
        public = without_prefix(arrays, f"{tag}.sd.")
        average = {key: tensor.float() for key, tensor in public.items()}
        paths[tag] = tmp_path_factory.mktemp(tag) / "checkpoint-last.pth"
        trained = {key: torch.zeros_like(tensor) for key, tensor in average.items()}
        content = {"model": trained, "model_ema": average, "optimizer": {"state": {}}, "epoch": 3}
        torch.save(content, paths[tag])

    return paths


@pytest.fixture
def tokens():
    return torch.randn(4, 16, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


# --------------------------------------------------------------------------------------------------
# The networks
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tag", SIZES)
def test_contexts_are_those_of_the_original(files, arrays, tag):
    backbone = mar(tag, files[tag], dtype="float32").backbone
    f = f"{tag}.enc."
    places = (arrays[f + "mask"] == 0).nonzero()[:, 1].view(3, -1)
    public = arrays[f + "class_embedding"]
    label = torch.full((3,), -1)
    for row in (0, 1):  # the third row has no class
        label[row] = (backbone.class_emb.weight - public[row]).abs().sum(1).argmin()

    for name, visible in (("", places), ("_allmasked", places[:, :0])):
        encoded = backbone.encode(at(arrays[f + "tokens"], visible), visible, label)
        assert difference(encoded, arrays[f"{tag}.enc{name}.out"]) < 1e-5
        assert difference(backbone.decode(encoded, visible), arrays[f"{tag}.dec{name}.out"]) < 1e-5


@pytest.mark.parametrize("tag", SIZES)
def test_the_head_is_that_of_the_original(files, arrays, tag):
    head = mar(tag, files[tag], dtype="float32").backbone.diffloss["net"]
    x = arrays[f"{tag}.mlp.x"]
    clock = arrays[f"{tag}.mlp.t"].float()
    z = arrays[f"{tag}.mlp.c"]

    assert difference(head(x[:, None], clock, z[:, None])[:, 0], arrays[f"{tag}.mlp.out"]) < 1e-5

    half = len(x) // 2
    out = head(x[:half].repeat(2, 1)[:, None], clock, z[:, None])[:, 0]
    eps = out[:half, : x.shape[1]]
    free = out[half:, : x.shape[1]]

    expected = arrays[f"{tag}.mlp.out_cfg2.5"][:half, : x.shape[1]]
    assert difference(2.5 * eps - 1.5 * free, expected) < 1e-5


@pytest.mark.parametrize("tag", SIZES)
def test_patches_are_those_of_the_original(arrays, tag):
    assert torch.equal(
        network(tag).unpatchify(arrays[f"{tag}.patchify.out"]), arrays[f"{tag}.patchify.in"]
    )


def test_full_size_has_the_weights_of_the_public_file():
    """With the head they are the authors' 208, 479 and 943 million numbers, rounded up."""
    expected = json.loads((ORACLES / "mar_fullsize_keys.json").read_text())["mar_base"]
    numbers = {}

    for name in ("mar_base", "mar_large", "mar_huge"):
        with torch.device("meta"):
            state = instantiate(composed(f"model={name}").model.sizes.full.backbone)().state_dict()
        numbers[name] = sum(value.numel() for value in state.values())
        if name == "mar_base":
            shapes = {key: list(value.shape) for key, value in state.items()}
            assert shapes == expected["state_dict"]

    assert numbers["mar_base"] == expected["n_params"] == 207_924_768
    assert [math.ceil(numbers[name] / 1e6) for name in ("mar_large", "mar_huge")] == [479, 943]


def test_a_public_file_and_our_own_are_the_same_model(files, tmp_path):
    model = mar(checkpoint=files["a"], dtype="float32")
    torch.save(model.backbone.state_dict(), tmp_path / "own.pt")
    assert mar(checkpoint=files["a"].parent, dtype="float32").fingerprint == model.fingerprint
    assert mar(checkpoint=tmp_path / "own.pt", dtype="float32").fingerprint == model.fingerprint
    torch.save({**model.backbone.state_dict(), "more": torch.zeros(3)}, tmp_path / "own.pt")
    with pytest.raises(ValueError, match="1 weights differ, first more"):
        mar(checkpoint=tmp_path / "own.pt")


# --------------------------------------------------------------------------------------------------
# The sampler of the released code
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("prefix", RUNS)
def test_the_stochastic_sampler_is_that_of_the_original(files, arrays, prefix, dtype, monkeypatch):
    """With their orders, noises and steps the contexts and tokens of every iteration are theirs."""
    run = RUNS[prefix]
    tensors = without_prefix(arrays, prefix)
    model = mar(
        run["model"], files[run["model"]], run["cfg"], run["num_iter"], dtype=dtype, micro_batch=64
    )
    if run["cfg_schedule"] == "linear":
        scales = [model.scale(model.guidance, k) for k in range(run["num_iter"])]
        assert scales == pytest.approx(run["cfg_iter"], rel=1e-6)
    else:
        monkeypatch.setattr(MAR, "scale", lambda self, guidance, iteration: guidance.scale)

    # Their orders, and their sampler in the place of ours.
    monkeypatch.setattr(MAR, "orders", lambda self, noise: tensors["orders"])
    sampler = OriginalSampler(tensors, run["temperature"])
    model.backbone.diffloss["net"].register_forward_hook(sampler.record)
    monkeypatch.setattr("oss_exp.models.families.mar.sample", sampler)

    noise = torch.zeros(run["bsz"], *model.event_shape, dtype=getattr(torch, dtype))
    labels = None if run["labels"] is None else torch.tensor(run["labels"])
    images = model.generate(Euler(), STEPS, noise, labels)
    final, tolerance = ("final", 2e-5) if dtype == "float32" else ("final64", 1e-8)
    assert difference(images, tensors[final]) < tolerance


class OriginalSampler:
    """The authors' sampler and noises in the place of `sample`; it checks every iteration."""

    def __init__(self, tensors: dict[str, torch.Tensor], temperature: float):
        self.tensors = tensors
        self.temperature = temperature
        self.iterations = count()
        self.head_call = None

    def record(self, module, inputs, output) -> None:
        """Remember a call of the head, as its forward hook."""
        self.head_call = (*inputs, output)

    def __call__(self, solver, velocity, noise, steps, group):
        tensors = self.tensors
        name = f"iter{next(self.iterations)}."
        rows = noise.shape[0] * noise.shape[1]  # theirs has more, for rows without class
        noises = [tensors[name + "noise_init"], *tensors[name + "noise_steps"]]
        noises = [values[:rows].view(noise.shape).to(noise) for values in noises]

        tokens = self.ancestral(velocity, noises)
        assert difference(self.head_call[2].flatten(0, 1), tensors[name + "z"]) < 2e-5
        assert difference(tokens.flatten(0, 1), tensors[name + "diffloss_out"][:rows]) < 2e-5
        return tokens

    def ancestral(self, velocity, noises):
        """Sample by Ho et al. 2020, algorithm 2, with Nichol & Dhariwal 2021, eq. 15."""
        # The respaced chain.
        x, *noises = noises
        times = DDIMSchedule(BETAS).nodes(len(noises))
        indices = FORM.path.native(times).round().long()[:-1]
        alphas_cumprod = torch.cumprod(1 - BETAS, 0)[indices]
        before = torch.cat([alphas_cumprod[1:], torch.ones(1, dtype=torch.float64)])
        beta = 1 - alphas_cumprod / before
        small = beta * (1 - before) / (1 - alphas_cumprod)
        small[-1] = small[-2]

        for i, noise in enumerate(noises):
            # The predicted x0.
            t = times[i].expand(len(x))
            state = x / rowwise(FORM.path.scale(t), x)
            eps = state + rowwise(1 - t, x) * velocity(state, t)
            x0 = (x - (1 - alphas_cumprod[i]).sqrt() * eps) / alphas_cumprod[i].sqrt()

            # The posterior's mean and, but for the last step, its noise.
            x = before[i].sqrt() * beta[i] * x0 + (1 - beta[i]).sqrt() * (1 - before[i]) * x
            x = x / (1 - alphas_cumprod[i])
            if i + 1 < len(noises):
                share = (self.head_call[3][: len(x)].chunk(2, dim=-1)[1] + 1) / 2
                log_variance = share * beta[i].log() + (1 - share) * small[i].log()
                x = x + self.temperature * noise * (log_variance / 2).exp()
        return x


@pytest.mark.parametrize("num_steps", [5, 10, 25, 50, 100, 500, 1000])
def test_the_chain_is_that_of_the_original(num_steps):
    chains = json.loads((ORACLES / "mar_diffusion.json").read_text())["respaced_cosine"]
    respaced = chains[str(num_steps)]
    nodes = DDIMSchedule(BETAS).nodes(num_steps)

    assert FORM.path.native(nodes)[:-1].round().tolist() == respaced["timestep_map"][::-1]
    assert nodes[0] <= FORM.time_max

    alphas_cumprod = torch.tensor(respaced["alphas_cumprod"][::-1], dtype=torch.float64)
    sigma = (1 - alphas_cumprod).sqrt()
    torch.testing.assert_close(
        nodes[:-1], sigma / (sigma + alphas_cumprod.sqrt()), rtol=1e-12, atol=0
    )


def test_an_euler_step_is_their_ddim_step():
    case = json.loads((ORACLES / "mar_diffusion.json").read_text())["p_mean_variance_unit"]
    x = torch.tensor(case["x"], dtype=torch.float64)
    out = torch.tensor(case["model_output"], dtype=torch.float64)
    expected = torch.tensor(case["ddim_eta0"], dtype=torch.float64)
    times = DDIMSchedule(BETAS).nodes(10).flip(0)

    for i in range(10):  # row i is asked at index i of the respaced chain
        t = times[i + 1].view(1)
        t_next = times[i].view(1)
        state = x[i : i + 1] / FORM.path.scale(t)
        v = FORM.velocity(out[i : i + 1, :3], state, t)
        result = (state + (t_next - t) * v) * FORM.path.scale(t_next)
        assert difference(result, expected[i : i + 1]) < 1e-5


# --------------------------------------------------------------------------------------------------
# The velocity and the token loop
# --------------------------------------------------------------------------------------------------


def test_every_iteration_makes_a_token():
    for places in (1, 2, 16, 256):
        for num_iter in range(1, places + 1):
            unknown = unknown_before(places, num_iter)
            assert len(unknown) == num_iter + 1
            assert (unknown[0], unknown[-1]) == (places, 0)
            assert all(now > then for now, then in pairwise(unknown))


def test_orders_are_the_samples_own(tokens):
    model = mar()
    orders = model.orders(tokens)
    assert torch.equal(orders.sort(dim=1).values, torch.arange(16).expand(4, 16))
    assert len({tuple(row) for row in orders.tolist()}) == 4
    assert torch.equal(model.orders(0.3 * tokens[2:3].float()), orders[2:3])
    assert not torch.equal(mar(seed=1).orders(tokens), orders)

    many = torch.randn(2000, 16, 4, generator=torch.Generator().manual_seed(1))
    first = model.orders(many)[:, 0]
    assert (first.bincount(minlength=16) - 125).abs().max() < 50
    assert many[torch.arange(2000), first].mean().abs() < 0.05  # the order does not tell the noise


@pytest.mark.parametrize("search_iterations", [[0], [2], None])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_velocity_rows_are_independent(scale, search_iterations, tokens, monkeypatch):
    monkeypatch.setattr("oss_exp.models.families.mar.CONTEXT_STEPS", 10)
    model = mar(scale=scale, search_iterations=search_iterations)
    classes = torch.tensor([3, 1, 3, 0])
    v = model.velocity(classes)
    t = torch.rand(12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x = torch.cat([tokens, tokens.flip(0), -tokens])
    together = v(x, t)
    for row in range(12):
        alone = model.velocity(classes[row % 4 : row % 4 + 1])(x[row : row + 1], t[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-9, atol=1e-9)

    torch.testing.assert_close(
        v.subset(torch.tensor([2, 3]))(x[2:4], t[2:4]), together[2:4], rtol=1e-9, atol=1e-9
    )
    assert (together[0] - v(x, t.flip(0))[0]).abs().max() > 1e-3


def test_velocity_of_a_later_iteration_knows_some_tokens(tokens, monkeypatch):
    """Every unknown token has a context of its own; known tokens repeat those of others."""
    monkeypatch.setattr("oss_exp.models.families.mar.CONTEXT_STEPS", 10)
    classes = torch.tensor([3])
    t = torch.full((1,), 0.5, dtype=torch.float64)
    model = mar(search_iterations=[2])

    assert model.unknown[2] == 12

    noise = np.random.default_rng((0, 4)).standard_normal((1, 16, 4), dtype=np.float32)
    order = model.orders(torch.from_numpy(noise))[0]
    x = tokens[:1, :1].expand(1, 16, 4)
    result = model.velocity(classes)(x, t)[0]

    torch.testing.assert_close(result[order[12:]], result[order[:4]])
    assert (result[order[0]] - result[order[1]]).abs().max() > 1e-4
    assert (result - mar().velocity(classes)(x, t)[0]).abs().max() > 1e-4


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_velocity_of_several_iterations_has_a_share_of_each(scale, tokens, monkeypatch):
    """The places that stay unknown longest are the last iteration's, at its guidance scale."""
    monkeypatch.setattr("oss_exp.models.families.mar.CONTEXT_STEPS", 10)
    classes = torch.tensor([3])
    t = torch.full((1,), 0.5, dtype=torch.float64)
    noise = np.random.default_rng((0, 4)).standard_normal((1, 16, 4), dtype=np.float32)
    order = mar().orders(torch.from_numpy(noise))[0]
    x = tokens[:1, :1].expand(1, 16, 4)
    result = mar(scale=scale, search_iterations=[0, 3]).velocity(classes)(x, t)[0]
    for iteration, places in ((3, order[:8]), (0, order[8:])):
        alone = mar(scale=scale, search_iterations=[iteration]).velocity(classes)(x, t)[0]
        torch.testing.assert_close(result[places], alone[places], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("search_cfg", [None, 1, 2.0])
def test_guidance_is_linear_in_its_scale(search_cfg, tokens):
    """The velocity is linear in the scale: the iteration's, or that of `search_cfg`."""
    classes = torch.tensor([3, 1, 3, 0])
    t = torch.full((4,), 0.5, dtype=torch.float64)
    one = mar(search_cfg=1).velocity(classes)
    two = mar(search_cfg=2).velocity(classes)
    scale = 1 + 2 * 1 / 16 if search_cfg is None else search_cfg
    model = mar(search_cfg=search_cfg)

    assert model.unknown[1] == 15

    velocity = model.velocity(classes)
    expected = torch.lerp(one(tokens, t), two(tokens, t), scale - 1)
    torch.testing.assert_close(velocity(tokens, t), expected, rtol=1e-9, atol=1e-9)
    assert nfe(Euler(), STEPS, velocity) == (4 if search_cfg == 1 else 8)
    assert torch.equal(
        mar(scale=7.0, search_cfg=search_cfg).velocity(classes, Guidance(3.0))(tokens, t),
        velocity(tokens, t),
    )


def test_an_unguided_model_needs_no_classes(tokens):
    model = mar(scale=1.0)
    t = torch.full((4,), 0.5, dtype=torch.float64)
    v = model.velocity(None)
    torch.testing.assert_close(v(tokens, t)[1:], v(tokens[1:], t[1:]), rtol=1e-9, atol=1e-9)
    assert model.sample(Euler(), STEPS, tokens).isfinite().all()


def test_one_iteration_is_sampling_the_velocity(tokens):
    classes = torch.tensor([3, 1, 3, 0])
    mean = torch.randn(10, 16, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    times_per_sample = torch.stack([GRID * factor for factor in (1, 0.9, 0.8, 0.7)])
    model = mar(num_iter=1)

    for steps in (
        STEPS,
        StepSchedule(GRID[1:], Analytic(mean, float(GRID[0]))),
        StepSchedule(times_per_sample, Free(float(GRID[0])), samples=(0, 1, 2, 3)),
    ):
        expected = sample(Euler(), model.velocity(classes), tokens, steps, group=classes)
        torch.testing.assert_close(
            model.sample(Euler(), steps, tokens, classes, classes), expected, rtol=1e-8, atol=1e-8
        )


@pytest.mark.parametrize("polish", [0, 2])
def test_fitted_steps_do_not_use_a_mean_that_the_next_context_does_not_have(tokens, polish):
    """The mean of a search is that of its contexts; images have contexts of their own."""
    classes = torch.tensor([3, 1, 3, 0])
    grid = DDIMSchedule(BETAS).nodes(8)
    velocity = mar().velocity(classes)
    problem = Problem(velocity, tokens, grid, group=classes, num_groups=10)
    steps = OSSFit("pinned", refine=False, polish=polish).plan(problem, [2])[2]
    assert not steps.mean.any()
    assert not steps.steps.weights[:, 2].any()

    at_two_scales = joined([velocity, mar(scale=2.0).velocity(classes)])
    assert not at_two_scales.has_means


@pytest.mark.parametrize("start", ["pinned", "analytic"])
def test_images_do_not_depend_on_their_batch(tokens, start):
    classes = torch.tensor([3, 1, 3, 0])
    mean = torch.randn(10, 16, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    steps = STEPS if start == "pinned" else StepSchedule(GRID[1:], Analytic(mean, float(GRID[0])))
    model = mar()
    images = model.generate(Euler(), steps, tokens, classes)

    assert images.shape == (4, 4, 4, 4)
    assert torch.equal(model.generate(Euler(), steps, tokens, classes), images)

    turned = model.generate(Euler(), steps, tokens.flip(0), classes.flip(0)).flip(0)
    torch.testing.assert_close(turned, images, rtol=1e-7, atol=1e-7)

    for row in range(4):
        alone = mar(micro_batch=1).generate(
            Euler(), steps, tokens[row : row + 1], classes[row : row + 1]
        )
        torch.testing.assert_close(alone, images[row : row + 1], rtol=1e-7, atol=1e-7)


class TrainingStep:
    """A training step of a fixed batch, and the contexts that it decodes."""

    def __init__(self, monkeypatch):
        self.model = mar("p2", num_iter=4)
        draw = torch.Generator().manual_seed(0)
        shape = (3, *self.model.image_shape)
        self.x0 = torch.randn(shape, generator=draw, dtype=torch.float64)
        self.noise = torch.randn(shape, generator=draw, dtype=torch.float64)
        self.tokens = self.model.backbone.patchify(self.x0)
        self.contexts = []
        decode = MARNetwork.decode

        def record(network, *arguments):
            self.contexts.append(decode(network, *arguments))
            return self.contexts[-1]

        monkeypatch.setattr(MARNetwork, "decode", record)

    def num_unknown(self, share: float) -> int:
        return math.ceil(math.cos(math.pi / 2 * share) * self.model.event_shape[0])

    def places(self) -> torch.Tensor:
        """Return the places of the tokens (3, count) in their orders, unknown ones first."""
        return self.model.orders(self.model.backbone.patchify(self.noise))

    def changed(self, places: torch.Tensor) -> torch.Tensor:
        """Return the images with other tokens at these places (3, n)."""
        index = places[:, :, None].expand(-1, -1, self.tokens.shape[2])
        return self.model.backbone.unpatchify(self.tokens.scatter(1, index, 7.0))

    def loss(self, x0: torch.Tensor, share: float) -> torch.Tensor:
        batch = {
            "x0": x0,
            "noise": self.noise,
            "t": torch.full((3,), 0.4, dtype=torch.float64),
            "label": torch.tensor([0, -1, 2]),
            "shared": torch.full((3,), share),
        }
        return self.model.loss(self.model.backbone, batch)


@pytest.fixture
def training(monkeypatch) -> TrainingStep:
    return TrainingStep(monkeypatch)


def test_patches_are_a_round_trip(training):
    assert torch.equal(training.model.backbone.unpatchify(training.tokens), training.x0)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_training_hides_the_unknown_tokens(training, share):
    """They change the loss, whose targets they are, and no context."""
    hidden = training.places()[:, : training.num_unknown(share)]
    assert not torch.equal(
        training.loss(training.x0, share), training.loss(training.changed(hidden), share)
    )
    assert torch.equal(*training.contexts)


@pytest.mark.parametrize("share", [0.5, 0.99])
def test_training_shows_the_known_tokens(training, share):
    visible = training.places()[:, training.num_unknown(share) :]
    training.loss(training.x0, share)
    training.loss(training.changed(visible), share)
    assert not torch.equal(*training.contexts)


def test_the_last_step_of_training_has_one_unknown_token(training):
    assert training.num_unknown(0.99) == 1


def test_training_asks_the_head_for_what_sampling_reads():
    """With all tokens unknown, the loss is the error of the head's eps at x_t."""
    model = mar("a", num_iter=4)
    draw = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 2, *model.image_shape, generator=draw, dtype=torch.float64)
    t = torch.tensor([0.7, 0.2], dtype=torch.float64)
    classes = torch.tensor([1, 2])
    loss = model.loss(
        model.backbone,
        {"x0": x0, "noise": noise, "t": t, "label": classes, "shared": torch.zeros(2)},
    )
    clean = model.backbone.patchify(x0)
    eps = model.backbone.patchify(noise)
    x = rowwise(1 - t, clean) * clean + rowwise(t, clean) * eps
    v = model.velocity(classes, Guidance(1.0))(x, t)
    error = (rowwise(1 - t, x) * v + x - eps).square().mean()  # eps_hat = x + (1 - t) v

    assert float(loss) == pytest.approx(float(error), rel=1e-5)


def test_tokens_depend_on_those_before(tokens):
    """The noise of the last token reaches that token only, the noise of the first reaches all."""
    model = mar(num_iter=16)
    classes = torch.tensor([3])
    order = model.orders(tokens[:1])[0]
    before = model.sample(Euler(), STEPS, tokens[:1], classes)
    for place, reached in ((order[0], 1), (order[-1], 16)):
        changed = tokens[:1].clone()
        changed[:, place] *= 1.1
        after = model.sample(Euler(), STEPS, changed, classes)
        assert ((after - before).abs().amax(-1) > 1e-9).sum() == reached


# --------------------------------------------------------------------------------------------------
# The VAE
# --------------------------------------------------------------------------------------------------

VAE_CONFIG = {
    "latent_channels": 4,
    "block_out_channels": [8, 8, 16],
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
}


ATTENTION_NAMES = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out": "proj_out",
}


def ldm_name(key: str, top: int) -> str:
    """Translate a decoder's key from diffusers' names to latent diffusion's."""
    parts = key.split(".")

    if parts[1] == "conv_norm_out":
        parts[1] = "norm_out"
    elif parts[1] == "mid_block":
        if parts[2] == "resnets":
            parts[1:4] = ["mid", f"block_{int(parts[3]) + 1}"]
        else:
            inner = ATTENTION_NAMES[parts[4]]
            parts[1:-1] = ["mid", "attn_1", inner]
    elif parts[1] == "up_blocks":
        parts[1:3] = ["up", str(top - int(parts[2]))]
        parts[3:5] = ["block", parts[4]] if parts[3] == "resnets" else ["upsample"]

    return ".".join(parts).replace("conv_shortcut", "nin_shortcut")


@pytest.fixture(scope="module")
def autoencoder() -> AutoencoderKL:
    vae = AutoencoderKL(**VAE_CONFIG).requires_grad_(False)
    randomise(vae, torch.Generator().manual_seed(0))
    return vae


@pytest.fixture(scope="module")
def ldm_weights(autoencoder) -> dict[str, torch.Tensor]:
    """The autoencoder's weights as latent diffusion's code has them."""
    tensors = {}
    for key, value in autoencoder.state_dict().items():
        if key.startswith("decoder."):
            kernel = ".attentions." in key and value.ndim == 2
            key = ldm_name(key, top=2)
            value = value[..., None, None] if kernel else value
        tensors[key] = value
    return tensors


def ldm_vae(checkpoint) -> LDMVAE:
    return LDMVAE(
        str(checkpoint), scaling_factor=0.2325, micro_batch=2, source="the authors", **VAE_CONFIG
    )


def test_translated_names_are_those_of_latent_diffusion(ldm_weights):
    levels = {key.split(".")[2] for key in ldm_weights if key.startswith("decoder.up.")}
    assert levels == {"0", "1", "2"}
    assert ldm_weights["decoder.mid.attn_1.proj_out.weight"].shape == (16, 16, 1, 1)
    assert "decoder.up.1.block.0.nin_shortcut.weight" in ldm_weights
    assert "decoder.up.2.upsample.conv.bias" in ldm_weights
    assert "decoder.up.0.upsample.conv.bias" not in ldm_weights


def test_a_vae_of_latent_diffusion_decodes_as_diffusers_does(autoencoder, ldm_weights, tmp_path):
    torch.save({"model": ldm_weights}, tmp_path / "kl16.ckpt")
    autoencoder.save_pretrained(tmp_path / "vae")
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    expected = (autoencoder.decode(latents / 0.2325).sample / 2 + 0.5).clamp(0, 1)

    for checkpoint in (tmp_path, tmp_path / "kl16.ckpt", tmp_path / "vae"):
        pixels = ldm_vae(checkpoint)(latents)
        torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-5)


def test_a_vae_of_another_architecture_is_refused(ldm_weights, tmp_path):
    extra = {"decoder.up.2.attn.0.q.weight": torch.zeros(3)}
    torch.save({"model": ldm_weights | extra}, tmp_path / "kl16.ckpt")
    with pytest.raises(ValueError, match="of another architecture"):
        ldm_vae(tmp_path)


def test_the_vae_of_conf_is_the_authors(monkeypatch):
    """It has the 43.0 million numbers of the decoder with widths 128 (1, 1, 2, 2, 4)."""
    monkeypatch.setattr("oss_exp.models.decoders.image.randomise", lambda *_: None)
    with torch.device("meta"):
        vae = instantiate(
            composed("model=mar_base").model.sizes.full.decoder, checkpoint="random"
        )()

    def conv(a, b, kernel=3):
        return a * b * kernel**2 + b

    def resnet(a, b):
        return 2 * a + 2 * b + conv(a, b) + conv(b, b) + (0 if a == b else conv(a, b, 1))

    widths = [128, 128, 256, 256, 512]
    expected = (
        conv(16, 16, 1) + conv(16, 512) + 2 * resnet(512, 512) + 2 * 512 + 4 * conv(512, 512, 1)
    )
    width = 512

    for level in reversed(range(5)):
        expected += resnet(width, widths[level]) + 2 * resnet(widths[level], widths[level])
        width = widths[level]
        expected += conv(width, width) if level else 0

    expected += 2 * 128 + conv(128, 3)
    assert sum(p.numel() for p in vae.parameters()) == expected
    assert vae.scaling_factor == 0.2325


# --------------------------------------------------------------------------------------------------
# The models of conf/, and bad input
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "scale"), [("mar_base", 2.9), ("mar_large", 3.0), ("mar_huge", 3.2)]
)
def test_models_of_conf_make_images_and_fit_their_public_files(name, scale):
    model = instantiate(composed(f"model={name}").model, size="tiny", num_iter=3)
    assert (model.name, model.guidance, model.needs_classes) == (
        f"{name}_tiny",
        Guidance(scale),
        True,
    )

    noise = (
        torch.randn(2, *model.event_shape, generator=torch.Generator().manual_seed(0))
        * STEPS.start_time
    )
    pixels = model.generate(Euler(), STEPS, noise, torch.tensor([0, 999]))

    assert pixels.shape == (2, 3, 16, 16)
    assert 0 < pixels.std() < 1

    full = composed(f"model={name}").model.sizes.full
    assert tuple(full.event_shape) == (full.backbone.size**2, full.backbone.channels)
    assert full.checkpoint == f"pretrained_models/mar/{name}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_iter": 17}, "num_iter=17 exceeds the 16 tokens"),
        ({"num_iter": 0}, "num_iter must be at least 1, got 0"),
        ({"search_iterations": [5]}, r"must be some of 0 to 4, which num_iter=5 makes, got \[5\]"),
        ({"search_iterations": [0, -1]}, r"must be some of 0 to 4, .* got \[0, -1\]"),
        ({"search_iterations": []}, r"must be some of 0 to 4, .* got \[\]"),
        ({"search_cfg": 1e30}, "search_cfg must be from -1000 to 1000, got"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        mar(**changes)


def test_conditions_that_do_not_fit_are_refused(tokens):
    model = mar()
    with pytest.raises(ValueError, match=r"scale=3.0 needs class labels; set data\.classes"):
        model.velocity(None)
    with pytest.raises(ValueError, match="mar has 10 classes, got"):
        model.sample(Euler(), STEPS, tokens, torch.tensor([0, 1, 2, 10]))
    with pytest.raises(ValueError, match="guides all channels at all times"):
        model.velocity(torch.tensor([0]), Guidance(2.0, channels=3))
