"""The networks of EDM against the numbers of the released code (oracles E) and a plain guided-diffusion forward."""

import json

import pytest
import torch
import torch.nn.functional as F
from helpers import ORACLES
from hydra import compose, initialize_config_dir
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from oss_exp.cli import CONF
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
    """The network that EDM's own arguments describe; what they leave out is as in EDM."""
    settings = {"channel_mult_emb": 4} | {
        key: value for key, value in init.items() if key not in ONLY_THEIRS
    }
    if init["model_type"] == "DhariwalUNet":
        settings = {
            "num_blocks": 3,
            "attn_resolutions": [32, 16, 8],
            "adaptive_scale": True,
        } | settings
        return ADM(out_channels=out_channels, **settings)

    return Song(**{"num_blocks": 4, "attn_resolutions": [16]} | settings)


def random_family(name: str, seed: int = 0):
    network = FAMILIES[name]().eval()
    randomise(network, torch.Generator().manual_seed(seed))
    return network


def inputs(clock: float = 0.7) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([-1.3, 0.1, 1.0]) * clock, torch.tensor([3, -1, 6])


def distance(result: Tensor, expected: Tensor) -> float:
    return float((result - expected).abs().max() / expected.abs().max())


# --------------------------------------------------------------------------------------------------
# The released code
# --------------------------------------------------------------------------------------------------


@pytest.fixture(params=[(file, tag) for file, tags in CASES.items() for tag in tags], ids="-".join)
def oracle(request):
    """(the network with the oracle's weights, its preconditioning, the arrays)."""
    file, tag = request.param
    path = ORACLES / f"edm_{file}.safetensors"
    with safe_open(path, "pt") as opened:
        meta = json.loads(opened.metadata()["meta"])[tag]

    prefix = "" if tag == "net" else f"{tag}."
    arrays = {
        key.removeprefix(prefix): array
        for key, array in load_file(path).items()
        if key.startswith(prefix)
    }
    network = build(meta["init_kwargs"], out_channels=arrays["F"].shape[1]).eval()
    public = {
        key.removeprefix("sd."): array.float()
        for key, array in arrays.items()
        if key.startswith("sd.")
    }
    network.load_state_dict(network.translate(public))

    assert sum(parameter.numel() for parameter in network.parameters()) == meta["n_params"]

    return network, PRECONDITIONINGS[meta["class_name"]], arrays


def classes_of(arrays) -> Tensor:
    return arrays["class_labels"].argmax(1) if "class_labels" in arrays else none()


def none() -> Tensor:
    return torch.full((4,), -1)


@torch.no_grad()
def denoise(network, kind, x, sigma, classes, dtype=torch.float32, **extra):
    """x_native, sigma (4,) float64 -> D, by way of canonical time; and what the network was asked."""
    t = sigma / (1 + sigma)
    x = (x.double() / rowwise(1 + sigma, x.double())).to(dtype)
    question, clock = kind.question(x, t)
    v = kind.velocity(network(question, clock, classes, **extra), x, t)
    return x - rowwise(t, x) * v, question, clock


def test_single_precision(oracle):
    network, kind, arrays = oracle
    x = arrays["x"]
    sigma = arrays["sigma"].double()
    classes = classes_of(arrays)
    denoised, question, clock = denoise(network, kind, x, sigma, classes)

    assert distance(denoised, arrays["D"]) < 1e-4
    assert distance(question, arrays["model_in"]) < 1e-6
    assert distance(clock, arrays["c_noise"]) < 1e-6

    with torch.no_grad():
        output = network(arrays["model_in"], arrays["c_noise"], classes)
    assert distance(output, arrays["F"][:, :3]) < 1e-4

    shared = denoise(network, kind, x, torch.full_like(sigma, 1.7), classes)[0]
    assert distance(shared, arrays["D_sigma_scalar_1.7"]) < 1e-4

    if "D_nolabel" in arrays:
        assert distance(denoise(network, kind, x, sigma, none())[0], arrays["D_nolabel"]) < 1e-4
    if "D_augment" in arrays:
        augmented = denoise(network, kind, x, sigma, classes, augment=arrays["augment_labels"])[0]
        assert distance(augmented, arrays["D_augment"]) < 1e-4


def test_double_precision(oracle):
    """Their F is of an input and a clock that were rounded to float32, their D is not."""
    network, kind, arrays = oracle
    network = network.double()
    classes = classes_of(arrays)
    with torch.no_grad():
        output = network(arrays["model_in"].double(), arrays["c_noise"].double(), classes)

    assert distance(output, arrays["F64"][:, :3]) < 1e-9

    denoised = denoise(
        network, kind, arrays["x"], arrays["sigma"].double(), classes, torch.float64
    )[0]
    assert distance(denoised, arrays["D64"]) < 1e-9


def full_size(yaml: str):
    """The backbone of a model's full size, on the meta device."""
    with initialize_config_dir(str(CONF), version_base="1.3"), torch.device("meta"):
        size = compose("config", [f"model={yaml}"]).model.sizes.full
        network = instantiate(size.backbone)()
    assert size.checkpoint in network.FILES
    return network


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["imagenet-64x64-cond-adm", "ffhq-64x64-uncond-vp", "ffhq-64x64-uncond-ve"]
)
def test_full_size_names_and_shapes(name):
    theirs = json.loads((ORACLES / "edm_fullsize_keys.json").read_text())[f"edm-{name}"]
    yaml = {"imagenet-64x64-cond-adm": "edm_imagenet64", "ffhq-64x64-uncond-vp": "edm_ffhq64"}.get(
        name
    )
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
    assert (
        kind.velocity(kind.answer(x0, noise, times), x, times) - (noise - x0)
    ).abs().max() < 1e-12


def test_the_score_is_finite_at_both_ends():
    kind = PRECONDITIONINGS["VEPrecond"]
    x = torch.randn(2, 1, 4, 4)
    times = torch.tensor([0.0, 1.0], dtype=torch.float64)
    question, clock = kind.question(x, times)
    assert all(
        bool(values.isfinite().all()) for values in (question, clock, kind.velocity(x, x, times))
    )
    with pytest.raises(ValueError, match="sigma_min must be below sigma_max"):
        ScorePrediction(sigma_min=1.0, sigma_max=0.5)


def test_whole_clocks_are_the_nearest_in_sigma():
    kind = PRECONDITIONINGS["iDDPMPrecond"]
    t = torch.linspace(0, 0.999, 501, dtype=torch.float64)
    indices = torch.arange(-1, 1000, dtype=torch.float64)
    chain = kind.path.canonical(indices)
    gaps = (t / (1 - t))[:, None] - chain / (1 - chain)
    clock = kind.question(torch.zeros(501, 1, dtype=torch.float64), t)[1]
    assert clock.equal(indices[gaps.abs().argmin(1)])


# --------------------------------------------------------------------------------------------------
# Layouts
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layout"), [(name, layout) for name in FAMILIES for layout in FAMILIES[name]().LAYOUTS]
)
@torch.no_grad()
def test_round_trip(name, layout):
    network = random_family(name)
    other = random_family(name, seed=1)
    public = network.to_public(layout)
    assert layout == "own" or public.keys() != network.state_dict().keys()
    other.load_state_dict(other.translate(public))
    assert distance(other(*inputs()), network(*inputs())) < 1e-6


class Recorded(dict):
    """Remembers what was asked for."""

    def __init__(self, tensors):
        super().__init__(tensors)
        self.asked = set()

    def __getitem__(self, key):
        self.asked.add(key)
        return super().__getitem__(key)


def guided_diffusion(w, x, clock, classes, *, base, blocks, legacy, film):
    """UNetModel of guided-diffusion from its definition, on its own keys, with resblock_updown."""

    def linear(name, h):
        return F.linear(h, w[f"{name}.weight"], w[f"{name}.bias"])

    def conv(name, h):
        weight = w[f"{name}.weight"]
        return F.conv2d(h, weight, w[f"{name}.bias"], padding=weight.shape[-1] // 2)

    def norm(name, h):
        return F.group_norm(h, min(32, h.shape[1] // 4), w[f"{name}.weight"], w[f"{name}.bias"])

    def residual(name, h, resize):
        y = conv(f"{name}.in_layers.2", resize(F.silu(norm(f"{name}.in_layers.0", h))))
        conditioning = linear(f"{name}.emb_layers.1", F.silu(embedding))[..., None, None]
        if film:
            scale, shift = conditioning.chunk(2, dim=1)
            y = norm(f"{name}.out_layers.0", y) * (1 + scale) + shift
        else:
            y = norm(f"{name}.out_layers.0", y + conditioning)
        skip = f"{name}.skip_connection"
        h = resize(h)

        return (conv(skip, h) if f"{skip}.weight" in w else h) + conv(
            f"{name}.out_layers.3", F.silu(y)
        )

    def attention(name, h):
        qkv = conv(f"{name}.qkv", norm(f"{name}.norm", h)).flatten(2)
        heads = h.shape[1] // 64
        if legacy:  # split the heads, then q, k, v
            q, k, v = qkv.reshape(len(h) * heads, 3 * 64, -1).split(64, dim=1)
        else:
            q, k, v = (part.reshape(len(h) * heads, 64, -1) for part in qkv.chunk(3, dim=1))
        weight = torch.einsum("bct,bcs->bts", q, k).div(8).softmax(-1)

        return h + conv(
            f"{name}.proj_out", torch.einsum("bts,bcs->bct", weight, v).reshape(h.shape)
        )

    def stage(name, h, resize):
        """The layers name.0, name.1, ...; `resize` by layer."""
        layer = 0

        while any(key.startswith(f"{name}.{layer}.") for key in w):
            here = f"{name}.{layer}"
            if f"{here}.qkv.weight" in w:
                h = attention(here, h)
            elif f"{here}.in_layers.0.weight" in w:
                h = residual(here, h, resize(layer))
            else:
                h = conv(here, h)
            layer += 1

        return h

    def keep(layer):
        return lambda h: h

    def double(layer):
        return (lambda h: F.interpolate(h, scale_factor=2)) if layer else keep(layer)

    def half(layer):
        return lambda h: F.avg_pool2d(h, 2)

    angles = clock[:, None] * torch.exp(
        -torch.arange(base // 2) * (torch.log(torch.tensor(10000.0)) / (base // 2))
    )
    embedding = linear(
        "time_embed.2", F.silu(linear("time_embed.0", torch.cat([angles.cos(), angles.sin()], 1)))
    )
    if "label_emb.weight" in w:
        embedding = embedding + w["label_emb.weight"][classes]
    h = x
    skips = []
    count = 0

    while any(key.startswith(f"input_blocks.{count}.") for key in w):
        h = stage(f"input_blocks.{count}", h, half if count and count % (blocks + 1) == 0 else keep)
        skips.append(h)
        count += 1

    h = stage("middle_block", h, keep)
    for index in range(count):
        h = stage(f"output_blocks.{index}", torch.cat([h, skips.pop()], dim=1), double)

    return conv("out.2", F.silu(norm("out.0", h)))


@pytest.mark.parametrize(
    ("name", "base", "blocks"), [("adm", 16, 1), ("adm_three_levels", 32, 2), ("adm_legacy", 32, 1)]
)
@torch.no_grad()
def test_guided_diffusion(name, base, blocks):
    network = random_family(name)
    public = Recorded(network.to_public("guided_diffusion"))
    x, clock, classes = inputs(300.0)
    classes = classes.abs()  # theirs always has one
    settings = {"legacy": "legacy" in name, "film": name != "adm_three_levels"}
    expected = guided_diffusion(public, x, clock, classes, base=base, blocks=blocks, **settings)

    assert public.asked == public.keys()
    assert distance(network(x, clock, classes), expected[:, :3]) < 1e-5

    # Original files convolve over one axis in the attention.
    flat = {
        key: w[..., 0] if ".qkv.w" in key or ".proj_out.w" in key else w
        for key, w in public.items()
    }
    other = random_family(name, seed=1)
    other.load_state_dict(other.translate(flat))

    assert network(x, clock, classes).equal(other(x, clock, classes))


def test_strange_names_and_layouts_are_told():
    for name in ("adm", "ddpmpp"):
        network = random_family(name)
        assert "model.enc.stranger" in network.translate(
            network.to_public("edm") | {"model.enc.stranger": torch.ones(1)}
        )
        with pytest.raises(ValueError, match="layout must be one of own, edm"):
            network.to_public("flax")

    adm = random_family("adm")
    strange = {"stranger": torch.ones(1), "input_blocks.1.1.qkv.weight": torch.ones(96, 32, 1)}
    translated = adm.translate(adm.to_public("guided_diffusion") | strange)

    assert translated["stranger"].shape == (1,)
    assert any(tensor.shape == (96, 32, 1, 1) for tensor in translated.values())

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


@pytest.fixture
def model():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield lambda yaml, *more: instantiate(
            compose("config", [f"model={yaml}", "model.size=tiny", *more]).model
        )


@pytest.mark.slow
@pytest.mark.parametrize(("yaml", "parameters"), YAMLS.items())
def test_full_size(yaml, parameters):
    assert sum(parameter.numel() for parameter in full_size(yaml).parameters()) == parameters


@pytest.mark.slow
@pytest.mark.parametrize("yaml", YAMLS)
def test_tiny(model, yaml):
    tiny = model(yaml)
    assert any(getattr(module, "heads", 0) for module in tiny.backbone.modules())
    x = torch.randn(2, *tiny.event_shape, generator=torch.Generator().manual_seed(0))
    velocity = tiny.velocity(torch.tensor([1, 2]) if tiny.num_classes else None)
    for t in (1.0, 0.9, 0.3, 0.0):
        v = velocity(x, torch.full((2,), t, dtype=torch.float64))
        assert v.shape == x.shape
        assert bool(v.isfinite().all())
    assert tiny.fingerprint == model(yaml).fingerprint


@pytest.mark.slow
def test_a_public_file_is_read_whatever_its_layout_and_refused_when_it_is_of_another_network(
    model, tmp_path
):
    tiny = model("edm_bedroom256")
    fingerprints = set()

    for layout in tiny.backbone.LAYOUTS:
        path = tmp_path / f"{layout}.safetensors"
        save_file(
            {key: tensor.contiguous() for key, tensor in tiny.backbone.to_public(layout).items()},
            path,
        )
        fingerprints.add(model("edm_bedroom256", f"model.checkpoint={path}").fingerprint)
        with pytest.raises(InstantiationException, match="is of another architecture"):
            model("edm_imagenet64", f"model.checkpoint={path}")

    assert fingerprints == {tiny.fingerprint}
