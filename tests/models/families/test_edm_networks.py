"""EDM's networks compute what the released code (oracles E) and guided-diffusion compute."""

import json

import pytest
import torch
import torch.nn.functional as F
from helpers import ORACLES
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from models.common import composed, difference, without_prefix
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from oss_exp.models.checkpoints.weights import randomise
from oss_exp.models.families.edm_networks import ADM, Song
from oss_exp.models.parameterization import EDMPrediction, NoisePrediction, ScorePrediction
from oss_exp.noise import DDPMPath, VPPath, cosine_betas
from oss_exp.tensors import rowwise

CASES = {
    "adm_tiny": ("net",),
    "adm_tiny_2heads": ("net",),
    "song_ddpmpp_tiny": ("edm", "vp"),
    "song_ncsnpp_tiny": ("edm", "ve"),
    "iddpm_precond_tiny": ("net",),
}
PRECONDITIONINGS = {
    "EDMPrecond": EDMPrediction(sigma_data=0.5, sigma_min=0.002, sigma_max=80.0, time_scale=1.0),
    "VPPrecond": NoisePrediction(
        VPPath(beta_min=0.1, beta_max=20.0), time_max=0.99, time_scale=999.0
    ),
    "VEPrecond": ScorePrediction(sigma_min=0.002, sigma_max=100.0),
    "iDDPMPrecond": NoisePrediction(
        DDPMPath(cosine_betas(1000, 0.999)), time_max=0.9999, whole=True
    ),
}
ONLY_THEIRS = (
    "model_type",
    "use_fp16",
    "sigma_min",
    "sigma_max",
    "sigma_data",
    "dropout",
    "decoder_type",
)
YAMLS = {  # parameters of the public network
    "edm_imagenet64": 295_899_267,
    "edm_ffhq64": 61_805_571,
    "edm_afhqv2_64": 61_805_571,
    "edm_cifar10_cond": 55_735_299,
    "edm_cifar10_uncond": 55_733_891,
    "edm_bedroom256": 526_304_771,  # as diffusers' UNet2DModel of the same settings
}
FAMILIES = {
    "adm": lambda: ADM(16, 3, 3, 10, 16, [1, 4], 2, 1, [8], adaptive_scale=True),
    "adm_three_levels": lambda: ADM(16, 3, 3, 0, 32, [1, 2, 4], 4, 2, [8, 4], adaptive_scale=False),
    "adm_legacy": lambda: ADM(
        16, 3, 6, 10, 32, [2, 4], 4, 1, [8], adaptive_scale=True, legacy_attention=True
    ),
    "ddpmpp": lambda: Song(16, 3, 0, 9, 16, [2, 2], 4, 1, 1, [8], "positional", "standard", [1, 1]),
    "ncsnpp": lambda: Song(
        16, 3, 7, 9, 16, [1, 2, 2], 4, 2, 1, [8], "fourier", "residual", [1, 3, 3, 1]
    ),
}


def build(init: dict, out_channels: int = 3):
    """Build the network that EDM's own arguments describe, with EDM's defaults."""
    settings = {key: value for key, value in init.items() if key not in ONLY_THEIRS}
    settings.setdefault("channel_mult_emb", 4)
    if init["model_type"] == "DhariwalUNet":
        defaults = {"num_blocks": 3, "attn_resolutions": [32, 16, 8], "adaptive_scale": True}
        return ADM(out_channels=out_channels, **defaults | settings)

    return Song(**{"num_blocks": 4, "attn_resolutions": [16]} | settings)


def random_family(name: str, seed: int = 0):
    network = FAMILIES[name]().eval()
    randomise(network, torch.Generator().manual_seed(seed))
    return network


def inputs(clock: float = 0.7) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([-1.3, 0.1, 1.0]) * clock, torch.tensor([3, -1, 6])


# --------------------------------------------------------------------------------------------------
# The released code
# --------------------------------------------------------------------------------------------------


@pytest.fixture(params=[(file, tag) for file, tags in CASES.items() for tag in tags], ids="-".join)
def oracle(request):
    """The network with the oracle's weights, its preconditioning, and the arrays."""
    # The oracle.
    file, tag = request.param
    path = ORACLES / f"edm_{file}.safetensors"
    with safe_open(path, "pt") as opened:
        meta = json.loads(opened.metadata()["meta"])[tag]
    arrays = without_prefix(load_file(path), "" if tag == "net" else f"{tag}.")

    # The network.
    network = build(meta["init_kwargs"], out_channels=arrays["F"].shape[1]).eval()
    public = {key: array.float() for key, array in without_prefix(arrays, "sd.").items()}
    network.load_state_dict(network.translate(public))
    assert sum(parameter.numel() for parameter in network.parameters()) == meta["n_params"]
    return network, PRECONDITIONINGS[meta["class_name"]], arrays


def classes_of(arrays) -> Tensor:
    return arrays["class_labels"].argmax(1) if "class_labels" in arrays else none()


def none() -> Tensor:
    return torch.full((4,), -1)


@torch.no_grad()
def denoise(network, kind, x, sigma, classes, dtype=torch.float32, **extra):
    """Denoise x_native at sigma (4,) float64 in canonical time.

    Returns:
        D, and the network's input and clock.
    """
    t = sigma / (1 + sigma)
    x = (x.double() / rowwise(1 + sigma, x.double())).to(dtype)
    question, clock = kind.inputs(x, t)
    v = kind.velocity(network(question, clock, classes, **extra), x, t)
    return x - rowwise(t, x) * v, question, clock


def test_outputs_in_single_precision_are_those_of_the_original(oracle):
    network, kind, arrays = oracle
    x = arrays["x"]
    sigma = arrays["sigma"].double()
    classes = classes_of(arrays)
    denoised, question, clock = denoise(network, kind, x, sigma, classes)

    assert difference(denoised, arrays["D"]) < 1e-4
    assert difference(question, arrays["model_in"]) < 1e-6
    assert difference(clock, arrays["c_noise"]) < 1e-6

    with torch.no_grad():
        output = network(arrays["model_in"], arrays["c_noise"], classes)
    assert difference(output, arrays["F"][:, :3]) < 1e-4

    shared = denoise(network, kind, x, torch.full_like(sigma, 1.7), classes)[0]
    assert difference(shared, arrays["D_sigma_scalar_1.7"]) < 1e-4

    if "D_nolabel" in arrays:
        assert difference(denoise(network, kind, x, sigma, none())[0], arrays["D_nolabel"]) < 1e-4
    if "D_augment" in arrays:
        augmented = denoise(network, kind, x, sigma, classes, augment=arrays["augment_labels"])[0]
        assert difference(augmented, arrays["D_augment"]) < 1e-4


def test_outputs_in_double_precision_are_those_of_the_original(oracle):
    """Their F is of an input and a clock rounded to float32, their D is not."""
    network, kind, arrays = oracle
    network = network.double()
    classes = classes_of(arrays)
    with torch.no_grad():
        output = network(arrays["model_in"].double(), arrays["c_noise"].double(), classes)

    assert difference(output, arrays["F64"][:, :3]) < 1e-9

    sigma = arrays["sigma"].double()
    denoised, *_ = denoise(network, kind, arrays["x"], sigma, classes, torch.float64)
    assert difference(denoised, arrays["D64"]) < 1e-9


def full_size(yaml: str):
    """Build the backbone of a model's full size on the meta device."""
    size = composed(f"model={yaml}").model.sizes.full
    with torch.device("meta"):
        network = instantiate(size.backbone)()
    assert size.checkpoint in network.FILES
    return network


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["imagenet-64x64-cond-adm", "ffhq-64x64-uncond-vp", "ffhq-64x64-uncond-ve"]
)
def test_full_size_has_the_names_and_shapes_of_the_public_file(name):
    theirs = json.loads((ORACLES / "edm_fullsize_keys.json").read_text())[f"edm-{name}"]
    yamls = {"imagenet-64x64-cond-adm": "edm_imagenet64", "ffhq-64x64-uncond-vp": "edm_ffhq64"}
    yaml = yamls.get(name)
    with torch.device("meta"):
        network = full_size(yaml) if yaml else build(theirs["init_kwargs"])
    public = {key: list(tensor.shape) for key, tensor in network.to_public("edm").items()}
    assert public == theirs["state_dict"]
    assert sum(parameter.numel() for parameter in network.parameters()) == theirs["n_params"]


# --------------------------------------------------------------------------------------------------
# Preconditionings
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRECONDITIONINGS)
@pytest.mark.parametrize("t", [0.01, 0.4, 0.98])
def test_exact_answer_gives_the_exact_velocity(name, t):
    kind = PRECONDITIONINGS[name]
    x0, noise = torch.randn(
        2, 3, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    x = (1 - t) * x0 + t * noise
    times = torch.full((3,), t, dtype=torch.float64)
    velocity = kind.velocity(kind.target(x0, noise, times), x, times)
    torch.testing.assert_close(velocity, noise - x0, rtol=0, atol=1e-12)


def test_the_score_is_finite_at_both_ends():
    kind = PRECONDITIONINGS["VEPrecond"]
    x = torch.randn(2, 1, 4, 4)
    times = torch.tensor([0.0, 1.0], dtype=torch.float64)
    question, clock = kind.inputs(x, times)

    assert question.isfinite().all()
    assert clock.isfinite().all()
    assert kind.velocity(x, x, times).isfinite().all()


def test_the_range_of_the_score_must_not_be_empty():
    with pytest.raises(ValueError, match="sigma_min must be below sigma_max"):
        ScorePrediction(sigma_min=1.0, sigma_max=0.5)


def test_whole_clocks_are_the_nearest_in_sigma():
    kind = PRECONDITIONINGS["iDDPMPrecond"]
    t = torch.linspace(0, 0.999, 501, dtype=torch.float64)
    indices = torch.arange(-1, 1000, dtype=torch.float64)
    chain = kind.path.canonical(indices)
    gaps = (t / (1 - t))[:, None] - chain / (1 - chain)
    clock = kind.inputs(torch.zeros(501, 1, dtype=torch.float64), t)[1]
    assert clock.equal(indices[gaps.abs().argmin(1)])


# --------------------------------------------------------------------------------------------------
# Layouts
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layout"), [(name, layout) for name in FAMILIES for layout in FAMILIES[name]().LAYOUTS]
)
@torch.no_grad()
def test_layouts_are_round_trips(name, layout):
    network = random_family(name)
    other = random_family(name, seed=1)
    public = network.to_public(layout)
    assert layout == "own" or public.keys() != network.state_dict().keys()
    other.load_state_dict(other.translate(public))
    assert difference(other(*inputs()), network(*inputs())) < 1e-6


class Recorded(dict):
    """A dictionary that remembers the keys that were read."""

    def __init__(self, tensors):
        super().__init__(tensors)
        self.read = set()

    def __getitem__(self, key):
        self.read.add(key)
        return super().__getitem__(key)


class GuidedDiffusion:
    """UNetModel of guided-diffusion with resblock_updown, from its definition, on its own keys.

    Args:
        weights: tensors by the names of guided-diffusion.
        base: channels of the first layer.
        blocks: residual blocks a level.
        legacy: whether the heads are split before q, k and v.
        film: whether the embedding scales and shifts.
    """

    def __init__(self, weights, base: int, blocks: int, legacy: bool, film: bool):
        self.weights = weights
        self.base = base
        self.blocks = blocks
        self.legacy = legacy
        self.film = film

    def __call__(self, x: Tensor, clock: Tensor, classes: Tensor) -> Tensor:
        embedding = self.embed(clock, classes)

        # Down.
        h = x
        skips = []
        while self.has(f"input_blocks.{len(skips)}"):
            index = len(skips)
            down = index > 0 and index % (self.blocks + 1) == 0
            h = self.stage(f"input_blocks.{index}", h, embedding, half if down else None)
            skips.append(h)

        # Middle and up; the residual block after the first layer of a stage is the upsampling one.
        h = self.stage("middle_block", h, embedding)
        for index in range(len(skips)):
            h = torch.cat([h, skips.pop()], dim=1)
            h = self.stage(f"output_blocks.{index}", h, embedding, after=double)
        return self.conv("out.2", F.silu(self.norm("out.0", h)))

    def has(self, name: str) -> bool:
        return any(key.startswith(f"{name}.") for key in self.weights)

    def linear(self, name: str, h: Tensor) -> Tensor:
        return F.linear(h, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def conv(self, name: str, h: Tensor) -> Tensor:
        weight = self.weights[f"{name}.weight"]
        return F.conv2d(h, weight, self.weights[f"{name}.bias"], padding=weight.shape[-1] // 2)

    def norm(self, name: str, h: Tensor) -> Tensor:
        groups = min(32, h.shape[1] // 4)
        weight = self.weights[f"{name}.weight"]
        return F.group_norm(h, groups, weight, self.weights[f"{name}.bias"])

    def embed(self, clock: Tensor, classes: Tensor) -> Tensor:
        """Embed clock and classes (B,)."""
        half_width = self.base // 2
        rates = -torch.arange(half_width) * (torch.log(torch.tensor(10000.0)) / half_width)
        angles = clock[:, None] * rates.exp()
        waves = torch.cat([angles.cos(), angles.sin()], 1)
        embedding = self.linear("time_embed.2", F.silu(self.linear("time_embed.0", waves)))
        if "label_emb.weight" in self.weights:
            embedding = embedding + self.weights["label_emb.weight"][classes]
        return embedding

    def stage(self, name: str, h: Tensor, embedding: Tensor, first=None, after=None) -> Tensor:
        """Apply the layers name.0, name.1, ...; the first resizes by `first`, others by `after`."""
        layer = 0
        while self.has(f"{name}.{layer}"):
            path = f"{name}.{layer}"
            if f"{path}.qkv.weight" in self.weights:
                h = self.attention(path, h)
            elif f"{path}.in_layers.0.weight" in self.weights:
                h = self.residual(path, h, embedding, (after if layer else first) or keep)
            else:
                h = self.conv(path, h)
            layer += 1
        return h

    def residual(self, name: str, h: Tensor, embedding: Tensor, resize) -> Tensor:
        y = F.silu(self.norm(f"{name}.in_layers.0", h))
        y = self.conv(f"{name}.in_layers.2", resize(y))
        conditioning = self.linear(f"{name}.emb_layers.1", F.silu(embedding))[..., None, None]
        if self.film:
            scale, shift = conditioning.chunk(2, dim=1)
            y = self.norm(f"{name}.out_layers.0", y) * (1 + scale) + shift
        else:
            y = self.norm(f"{name}.out_layers.0", y + conditioning)
        y = self.conv(f"{name}.out_layers.3", F.silu(y))

        skip = f"{name}.skip_connection"
        h = resize(h)
        return (self.conv(skip, h) if f"{skip}.weight" in self.weights else h) + y

    def attention(self, name: str, h: Tensor) -> Tensor:
        qkv = self.conv(f"{name}.qkv", self.norm(f"{name}.norm", h)).flatten(2)
        rows = len(h) * (h.shape[1] // 64)
        if self.legacy:
            q, k, v = qkv.reshape(rows, 3 * 64, -1).split(64, dim=1)
        else:
            q, k, v = (part.reshape(rows, 64, -1) for part in qkv.chunk(3, dim=1))
        weight = torch.einsum("bct,bcs->bts", q, k).div(8).softmax(-1)
        values = torch.einsum("bts,bcs->bct", weight, v).reshape(h.shape)
        return h + self.conv(f"{name}.proj_out", values)


def keep(h: Tensor) -> Tensor:
    return h


def double(h: Tensor) -> Tensor:
    return F.interpolate(h, scale_factor=2)


def half(h: Tensor) -> Tensor:
    return F.avg_pool2d(h, 2)


@pytest.mark.parametrize(
    ("name", "base", "blocks"), [("adm", 16, 1), ("adm_three_levels", 32, 2), ("adm_legacy", 32, 1)]
)
@torch.no_grad()
def test_the_layout_of_guided_diffusion_is_its_network(name, base, blocks):
    network = random_family(name)
    public = Recorded(network.to_public("guided_diffusion"))
    x, clock, classes = inputs(300.0)
    classes = classes.abs()  # theirs always has one
    original = GuidedDiffusion(
        public, base, blocks, legacy="legacy" in name, film=name != "adm_three_levels"
    )
    expected = original(x, clock, classes)

    assert public.read == public.keys()
    assert difference(network(x, clock, classes), expected[:, :3]) < 1e-5


@pytest.mark.parametrize("name", ["adm", "adm_three_levels", "adm_legacy"])
@torch.no_grad()
def test_original_files_convolve_over_one_axis_in_the_attention(name):
    network = random_family(name)
    public = network.to_public("guided_diffusion")
    for key, weight in public.items():
        if ".qkv.w" in key or ".proj_out.w" in key:
            public[key] = weight[..., 0]

    other = random_family(name, seed=1)
    other.load_state_dict(other.translate(public))

    x, clock, classes = inputs(300.0)
    assert network(x, clock, classes.abs()).equal(other(x, clock, classes.abs()))


@pytest.mark.parametrize("name", ["adm", "ddpmpp"])
def test_names_of_no_layout_are_kept(name):
    network = random_family(name)
    public = network.to_public("edm") | {"model.enc.stranger": torch.ones(1)}
    assert "model.enc.stranger" in network.translate(public)


@pytest.mark.parametrize("name", ["adm", "ddpmpp"])
def test_an_unknown_layout_is_refused(name):
    with pytest.raises(ValueError, match="layout must be one of own, edm"):
        random_family(name).to_public("flax")


def test_names_of_no_block_of_guided_diffusion_are_kept():
    adm = random_family("adm")
    strange = {"stranger": torch.ones(1), "input_blocks.1.1.qkv.weight": torch.ones(96, 32, 1)}
    translated = adm.translate(adm.to_public("guided_diffusion") | strange)

    assert translated["stranger"].shape == (1,)
    assert any(tensor.shape == (96, 32, 1, 1) for tensor in translated.values())


def test_settings_without_meaning_are_refused():
    with pytest.raises(ValueError, match="embedding_type must be"):
        Song(16, 3, 0, 0, 16, [1], 4, 1, 1, [], "sine", "standard", [1, 1])

    with pytest.raises(ValueError, match="encoder_type must be"):
        Song(16, 3, 0, 0, 16, [1], 4, 1, 1, [], "fourier", "skip", [1, 1])


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_half_precision_weights_know_the_time_exactly(name):
    """A clock rounded to bfloat16 would be up to 2 off at 700."""
    network = random_family(name)
    x, clock, classes = inputs(703.3 if name != "ncsnpp" else 1.033)
    expected = network(x, clock, classes)
    output = network.bfloat16()(x.bfloat16(), clock, classes)
    assert output.dtype == torch.bfloat16
    assert (output - expected).square().mean() < 1e-3 * expected.square().mean()
    if name == "ncsnpp":
        assert network.map_noise.freqs.dtype == torch.float32


# --------------------------------------------------------------------------------------------------
# The configured models
# --------------------------------------------------------------------------------------------------


def tiny_model(yaml: str, *overrides: str):
    """Load a model of conf/ at its tiny size."""
    return instantiate(composed(f"model={yaml}", "model.size=tiny", *overrides).model)


@pytest.mark.slow
@pytest.mark.parametrize(("yaml", "parameters"), YAMLS.items())
def test_full_size_has_the_public_number_of_weights(yaml, parameters):
    assert sum(parameter.numel() for parameter in full_size(yaml).parameters()) == parameters


@pytest.mark.slow
@pytest.mark.parametrize("yaml", YAMLS)
def test_a_tiny_model_has_finite_velocities_at_all_times(yaml):
    tiny = tiny_model(yaml)
    assert any(getattr(module, "heads", 0) for module in tiny.backbone.modules())
    x = torch.randn(2, *tiny.event_shape, generator=torch.Generator().manual_seed(0))
    velocity = tiny.velocity(torch.tensor([1, 2]) if tiny.num_classes else None)
    for t in (1.0, 0.9, 0.3, 0.0):
        v = velocity(x, torch.full((2,), t, dtype=torch.float64))
        assert v.shape == x.shape
        assert bool(v.isfinite().all())
    assert tiny.fingerprint == tiny_model(yaml).fingerprint


@pytest.mark.slow
@pytest.mark.parametrize("layout", FAMILIES["adm"]().LAYOUTS)
def test_a_public_file_is_read_in_any_layout(layout, tmp_path):
    tiny = tiny_model("edm_bedroom256")
    public = tiny.backbone.to_public(layout)
    path = tmp_path / f"{layout}.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in public.items()}, path)

    assert tiny_model("edm_bedroom256", f"model.checkpoint={path}").fingerprint == tiny.fingerprint
    with pytest.raises(InstantiationException, match="is of another architecture"):
        tiny_model("edm_imagenet64", f"model.checkpoint={path}")
