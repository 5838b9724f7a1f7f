"""DiT-XL/2 computes what the authors' network, sampler and search compute (oracles F)."""

import json
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from helpers import ORACLES
from hydra.utils import instantiate
from models.common import composed, difference, without_prefix
from safetensors import safe_open
from safetensors.torch import load_file

from oss_exp.distances import XtMSE
from oss_exp.models.decoders.image import Pixels
from oss_exp.models.families.dit import LAYOUTS, PublishedDiT
from oss_exp.models.families.published import Published
from oss_exp.models.guidance import Guidance
from oss_exp.models.network import Network
from oss_exp.models.parameterization import NoisePrediction
from oss_exp.noise import DDIMSchedule, DDPMPath, linear_betas
from oss_exp.schedule import Free, StepSchedule
from oss_exp.solvers import Euler, sample
from oss_exp.stepsize import Problem
from oss_exp.stepsize.oss.band import layers
from oss_exp.stepsize.oss.objectives import PerSample
from oss_exp.stepsize.oss.recursion import recurse
from oss_exp.tensors import rowwise

BETAS = linear_betas(1000, 1e-4, 0.02)
EXACT = NoisePrediction(DDPMPath(BETAS), 0.99368716)
UNGUIDED = Guidance()
TINY = {"channels": 4, "num_classes": 10, "patch": 2, "num_layers": 2, "num_attention_heads": 4}
XL = {"channels": 4, "num_classes": 1000, "patch": 2, "num_layers": 28, "num_attention_heads": 16}


def tiny(size: int = 8, width: int = 32) -> PublishedDiT:
    return (
        PublishedDiT(size=size, attention_head_dim=width // 4, **TINY).eval().requires_grad_(False)
    )


@pytest.fixture(scope="module")
def arrays():
    return load_file(ORACLES / "dit_tiny.safetensors")


@pytest.fixture(scope="module")
def original(arrays):
    """The authors' state dict of a small network."""
    return {key: value.float() for key, value in without_prefix(arrays, "sd.").items()}


@pytest.fixture
def filled(original):
    network = tiny()
    network.load_state_dict(network.translate(original))
    return network


def model(backbone, form=EXACT, guidance=UNGUIDED, dtype="float32") -> Network:
    return Network(
        "dit",
        backbone,
        form,
        (4, 8, 8),
        10,
        Pixels(),
        guidance,
        8,
        dtype=dtype,
        checkpoint="untrained",
    )


# --------------------------------------------------------------------------------------------------
# The network
# --------------------------------------------------------------------------------------------------


def test_answers_are_those_of_the_original(filled, arrays):
    x = arrays["x"]
    y = arrays["y"]  # 10 is their null label

    for labels in (y, torch.where(y == 10, -1, y)):
        eps = filled(x, arrays["t"].float(), labels)
        assert difference(eps, arrays["forward"][:, :4]) < 1e-4
        eps = filled(x, arrays["t_frac"], labels)
        assert difference(eps, arrays["forward_t_frac"][:, :4]) < 1e-4

    wide = filled.double()(x.double(), arrays["t"].double(), y)
    assert difference(wide, arrays["forward64"][:, :4]) < 1e-9


def test_clocks_between_indices_are_not_rounded(filled):
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).expand(3, -1, -1, -1)
    eps = filled(x, torch.tensor([500.0, 500.25, 501.0]), torch.tensor([1, 1, 1]))
    assert (eps[0] - eps[1]).abs().max() > 1e-3
    assert (eps[1] - eps[2]).abs().max() > 1e-3


def test_training_drops_no_labels(filled, arrays):
    frozen = filled(arrays["x"], arrays["t"].float(), arrays["y"])
    assert torch.equal(filled.train()(arrays["x"], arrays["t"].float(), arrays["y"]), frozen)


def test_the_position_table_is_the_original_one(filled, arrays):
    assert (
        filled.to_public("original")["pos_embed"] - arrays["pos_embed_as_initialised"]
    ).abs().max() < 1e-6


# --------------------------------------------------------------------------------------------------
# Layouts
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_round_trips(filled, original, arrays, layout):
    public = filled.to_public(layout)
    if layout == "original":
        assert public.keys() == original.keys()
        names = original.keys() - {"pos_embed"}
        assert all(torch.equal(public[name], original[name]) for name in names)
    again = tiny()
    again.load_state_dict(again.translate(public))
    question = arrays["x"], arrays["t"].float(), arrays["y"]

    torch.testing.assert_close(again(*question), filled(*question), rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("size", [32, 64])
def test_full_size_has_the_weights_of_the_public_file(size):
    """They are the paper's 675 million numbers: 675.1 with the table of positions (256 x 256)."""
    with torch.device("meta"):
        network = PublishedDiT(size=size, attention_head_dim=72, **XL)

    # Each weight is one number in memory.
    zero = torch.zeros((), dtype=torch.bfloat16)
    state = {key: zero.expand(weight.shape) for key, weight in network.state_dict().items()}
    network.load_state_dict(state, assign=True)
    public = network.to_public("original")
    expected = json.loads((ORACLES / "dit_fullsize_keys.json").read_text())
    table = [1, (size // 2) ** 2, 1152]

    shapes = {key: list(value.shape) for key, value in public.items()}
    assert shapes == expected["state_dict"] | {"pos_embed": table}
    if size == 32:
        num_weights = sum(value.numel() for value in public.values())
        assert num_weights == expected["n_params"] == 675_129_632


def test_a_folder_that_diffusers_wrote_is_read(filled, arrays, tmp_path):
    filled.network.save_pretrained(tmp_path / "transformer")
    question = arrays["x"], torch.tensor([0.1, 0.4, 0.7, 0.9], dtype=torch.float64)
    expected = model(filled).velocity(torch.tensor([0, 3, 9, 1]))(*question)
    velocity = published(tmp_path).velocity(torch.tensor([0, 3, 9, 1]))(*question)
    assert torch.equal(velocity, expected)


def test_an_original_file_is_read(filled, original, arrays, tmp_path):
    torch.save(original, tmp_path / "DiT-XL-2-256x256.pt")
    files = published(tmp_path), published(tmp_path / "DiT-XL-2-256x256.pt")
    filled.network.save_pretrained(tmp_path / "hub" / "transformer")

    assert len({file.fingerprint for file in (*files, published(tmp_path / "hub"))}) == 1
    eps = files[0].backbone(arrays["x"], arrays["t"].float(), arrays["y"])
    assert difference(eps, arrays["forward"][:, :4]) < 1e-4


def published(checkpoint, size: int = 8) -> Published:
    """Build a small model of a checkpoint."""
    full = {
        "backbone": partial(PublishedDiT, size=size, attention_head_dim=8, **TINY),
        "decoder": Pixels,
        "event_shape": (4, size, size),
        "num_classes": 10,
        "checkpoint": "nowhere",
    }
    return Published(
        "dit",
        "full",
        {"full": full},
        EXACT,
        UNGUIDED,
        8,
        dtype="float32",
        checkpoint=str(checkpoint),
        source="the authors",
    )


# --------------------------------------------------------------------------------------------------
# The sampler and the search of the released code
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Released(NoisePrediction):
    """The released wrapper's scaling: alpha x / (1 + 1e-4 - t), and x itself at the first node."""

    start: float = field(kw_only=True)

    def inputs(self, x, t):
        factor = torch.where(t == self.start, 1.0, self._alpha(t) / (1 + 1e-4 - t))
        return rowwise(factor, x) * x, self.path.native(t).to(x)

    def velocity(self, output, x, t):
        x0 = self.inputs(x, t)[0] / rowwise(self._alpha(t), x) - rowwise(t / (1 - t), x) * output
        return (x - x0) / rowwise(t, x)

    @staticmethod
    def _alpha(t):
        return (1 - t) / torch.sqrt((1 - t) ** 2 + t**2)


@pytest.mark.parametrize("scale", [1.5, 4.0])
def test_guidance_of_the_velocity_is_theirs_of_the_noise(filled, arrays, scale):
    """The velocity is linear in eps at the same x, so guiding either one is the same."""
    half = len(arrays["cfg.x"]) // 2
    x = arrays["cfg.x"][:half]
    y = arrays["cfg.y"][:half]
    t = EXACT.path.canonical(arrays["cfg.t"][:half].double())
    state = x.double() / rowwise(EXACT.path.scale(t), x.double())
    for channels, name in ((3, ""), (None, "_allchannels")):
        eps = arrays[f"cfg.out_scale{scale}{name}"][:half, :4].double()
        v = model(filled, guidance=Guidance(scale, channels), dtype="float64").velocity(y)(state, t)
        assert difference(v, EXACT.velocity(eps, state, t)) < 1e-5


@pytest.mark.parametrize("size", ["5", "10", "20", "50", "100", "200"])
def test_noise_schedule_ddim_is_the_grid_of_the_released_code(size):
    """The indices are those of create_diffusion(str(N)), from 999 to 0, then clean data."""
    respaced = json.loads((ORACLES / "dit_diffusion.json").read_text())[size]
    nodes = DDIMSchedule(BETAS).nodes(int(size)).flip(0)
    expected = torch.tensor(respaced["fm_steps"], dtype=torch.float64)

    torch.testing.assert_close(nodes, expected, rtol=0, atol=1e-14)
    assert EXACT.path.native(nodes)[1:].round().tolist() == respaced["timestep_map"]
    assert nodes[-1] <= EXACT.time_max


@pytest.mark.parametrize(
    ("name", "guidance"), [("cfg1.5", Guidance(1.5, channels=3)), ("nocfg", UNGUIDED)]
)
@pytest.mark.parametrize("size", [10, 50, 200])
def test_velocities_are_those_of_the_released_wrapper(filled, arrays, size, name, guidance):
    """The wrapper adds 1e-4 and does not scale x at the first node: that moves v by up to 1.1 %."""
    f = f"wrap.N{size}."
    x = arrays[f"wrap.N{size}.x"].double()
    labels = arrays[f"wrap.N{size}.y"]
    grid = arrays[f + "fm_steps"]
    indices = arrays[f + "t_index"]
    exact = model(filled, EXACT, guidance, "float64").velocity(labels)
    form = Released(EXACT.path, EXACT.time_max, start=float(grid[-1]))
    released = model(filled, form, guidance, "float64").velocity(labels)

    for j, t in enumerate(grid[indices]):
        at = t.expand(len(x))
        assert difference(exact(x, at), arrays[f"{f}v_{name}_nofudge"][j]) < 1e-5
        assert difference(released(x, at), arrays[f"{f}v_{name}"][j].double()) < 1e-4
        assert difference(exact(x, at), arrays[f"{f}v_{name}"][j].double()) < 0.011


def test_the_search_is_that_of_the_released_code(filled, arrays):
    """Without its scaling the images move by 1.1 % and the schedules stay."""
    with safe_open(ORACLES / "dit_tiny.safetensors", "pt") as file:
        case = json.loads(file.metadata()["oss_end_to_end"])

    N, M = case["N"], case["M"]
    grid = DDIMSchedule(BETAS).nodes(N)
    noise = arrays["oss.z"]
    guidance = Guidance(case["cfg_scale"], channels=3)
    released = Released(EXACT.path, EXACT.time_max, start=float(grid[0]))

    for form, tolerance in ((released, 1e-5), (EXACT, 0.012)):
        # Teacher.
        f = model(filled, form, guidance).velocity(arrays["oss.y"])
        problem = Problem(f, noise, grid, Euler(), XtMSE())
        assert difference(problem.teacher.states[-1], arrays["oss.teacher_final"]) < tolerance

        # Schedules; theirs count from clean data.
        edges = layers(problem.num_nodes, [M], "free", 1, "cpu")
        path = recurse(problem, edges, [M], "free", PerSample()).paths[M]
        assert (N - path.nodes.T.flip(1)).tolist() == case["schedules"]

        # Student.
        nodes = N - torch.tensor([*reversed(case["median"]), 0])
        times = grid[nodes]
        student = sample(Euler(), f, noise, StepSchedule(times, Free(float(grid[0]))))
        assert difference(student, arrays["oss.student_median_final"]) < tolerance


# --------------------------------------------------------------------------------------------------
# The models of conf/
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "size"), [("dit_xl_2_256", 32), ("dit_xl_2_512", 64)])
def test_models_of_conf_make_images_and_fit_their_public_files(name, size):
    cfg = composed(f"model={name}").model
    tiny_model = instantiate(cfg, size="tiny")
    assert (tiny_model.name, tiny_model.guidance) == (f"{name}_tiny", Guidance(1.5, channels=3))
    assert tiny_model.path.canonical(torch.tensor(999.0)) <= tiny_model.parameterization.time_max

    steps = StepSchedule(DDIMSchedule(BETAS).nodes(3), Free())
    noise = torch.randn(2, *tiny_model.event_shape, generator=torch.Generator().manual_seed(0))
    pixels = tiny_model.generate(Euler(), steps, noise, torch.tensor([0, 999]))

    assert pixels.shape == (2, 3, 16, 16)
    assert 0 < pixels.std() < 1

    full = cfg.sizes.full
    with torch.device("meta"):
        backbone = instantiate(full.backbone)()
    assert tuple(full.event_shape) == (4, size, size)
    assert backbone.to_public("diffusers")["proj_out_2.weight"].shape == (32, 1152)
    assert backbone.network.pos_embed.pos_embed.shape == (1, (size // 2) ** 2, 1152)
    assert len(backbone.network.transformer_blocks) == 28


# --------------------------------------------------------------------------------------------------
# Bad input
# --------------------------------------------------------------------------------------------------


def test_the_file_of_another_image_size_is_refused(original):
    with pytest.raises(
        ValueError, match=r"pos_embed \(1, 16, 32\) is not the fixed table \(1, 64, 32\)"
    ):
        tiny(size=16).translate(original)
    with pytest.raises(ValueError, match="is not the fixed table"):
        tiny().translate(original | {"pos_embed": original["pos_embed"] + 1e-3})


@pytest.mark.parametrize(
    "name", ["blocks.1.attn.qkv.weight", "t_embedder.mlp.0.bias", "blocks.2.mlp.fc1.bias"]
)
def test_a_missing_or_left_over_weight_is_refused(original, name, tmp_path):
    changed = dict(original)
    if name in changed:
        del changed[name]
    else:
        changed[name] = torch.zeros(3)
    torch.save(changed, tmp_path / "w.pt")

    with pytest.raises(ValueError, match="weights differ"):
        published(tmp_path / "w.pt")


def test_embedders_that_differ_have_no_original_layout(filled):
    filled.network.transformer_blocks[1].norm1.emb.timestep_embedder.linear_1.bias[0] += 1
    with pytest.raises(ValueError, match=r"copies of t_embedder\.mlp\.0\.bias differ"):
        filled.to_public("original")
    assert len(filled.to_public("diffusers")) == len(filled.state_dict())


def test_an_unknown_layout_is_refused(filled):
    with pytest.raises(
        ValueError, match="layout must be one of own, original, diffusers, got 'timm'"
    ):
        filled.to_public("timm")
