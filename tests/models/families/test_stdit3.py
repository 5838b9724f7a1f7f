"""Open-Sora 1.2 computes what the authors' network, sampler and search compute (oracles H)."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import ORACLES, run_cli
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from models.common import composed, difference, without_prefix
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5EncoderModel, T5TokenizerFast

from oss_exp.data.prompts import read_prompts
from oss_exp.distances import Select, XtMSE
from oss_exp.models.decoders.image import Pixels
from oss_exp.models.decoders.video_vae import VideoVAE
from oss_exp.models.families.open_sora import OpenSora, public_t5, time_shift
from oss_exp.models.families.stdit3 import STDiT3, position_table, rotate
from oss_exp.models.guidance import Guidance
from oss_exp.noise import FlowSchedule
from oss_exp.schedule import Free, StepSchedule
from oss_exp.solvers import Euler, sample
from oss_exp.stepsize import Problem
from oss_exp.stepsize.oss.band import layers
from oss_exp.stepsize.oss.objectives import PerSample
from oss_exp.stepsize.oss.recursion import recurse

FACTS = json.loads((ORACLES / "stdit3_rflow.json").read_text())
VIDEO = {"num_frames": 51, "height": 256, "width": 384}  # of the sampler's and the search's cases


def tiny() -> STDiT3:
    return STDiT3(4, 32, num_layers=2, num_heads=4, text_features=24, text_tokens=7, image_size=512)


@pytest.fixture(scope="module")
def arrays():
    tensors = load_file(ORACLES / "stdit3_tiny.safetensors")
    return {key.removeprefix("a."): value for key, value in tensors.items()}


@pytest.fixture(scope="module")
def weights(arrays):
    """The authors' state dict of a small network."""
    return {key: value.float() for key, value in without_prefix(arrays, "sd.").items()}


@pytest.fixture
def filled(weights):
    network = tiny().requires_grad_(False)
    network.load_state_dict(weights)
    return network


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    monkeypatch.setenv("OSS_EXP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


class FixedEncoder:
    """A text encoder with the same encoding for every prompt."""

    def __init__(self, **encodings: torch.Tensor):
        self.encodings = encodings
        self.fingerprint = "given"

    def __call__(self, prompts):
        encoded = {}
        for name, tensor in self.encodings.items():
            encoded[name] = tensor.expand(len(prompts), *tensor.shape[1:])
        return encoded

    def cuts(self, prompts):
        return {}


@pytest.fixture
def build(arrays, weights, tmp_path):
    """A function that builds the model of the sampler's case from a file in the public layout."""
    null = arrays["rflow.y_null"][0, 0]  # of that case, not of the state dict
    save_file(weights | {"y_embedder.y_embedding": null}, tmp_path / "model.safetensors")
    text_encoder = partial(
        FixedEncoder, text=arrays["rflow.y"][:, 0], mask=arrays["rflow.mask"].bool()
    )

    full = {
        "network": tiny,
        "text_encoder": text_encoder,
        "decoder": Pixels,
        "checkpoint": "nowhere",
    }
    settings = {
        "guidance": Guidance(4.0),
        "fps": 24,
        "checkpoint": str(tmp_path),
        "dtype": "float32",
        "prompts": ["a cat", "a dog"],
        "ending": "",
        "micro_batch": 64,
        "source": "the authors",
        **VIDEO,
    }

    def make(**changes) -> OpenSora:
        return OpenSora("open_sora", "full", {"full": full}, **(settings | changes))

    return make


@pytest.fixture(scope="module")
def yaml():
    return composed("model=open_sora_1_2", "data=prompts", "noise_schedule=open_sora")


@pytest.fixture(scope="module")
def noise():
    return torch.randn(3, 4, 5, 6, 9, generator=torch.Generator().manual_seed(0))


# --------------------------------------------------------------------------------------------------
# The network
# --------------------------------------------------------------------------------------------------


def answer(network: STDiT3, arrays, case: str, rows: slice = slice(None)) -> torch.Tensor:
    """Ask a network for the answer to some rows of a case."""
    x, text, clock, fps = (arrays[f"{case}.{name}"][rows] for name in ("x", "y", "timestep", "fps"))
    mask = arrays.get(f"{case}.mask", torch.ones(2, 7))[rows].bool()
    noisy = None
    if case != "c2":
        noisy = arrays.get(f"{case}.x_mask", torch.ones(2, x.shape[2], dtype=bool))[rows]
    size = float(arrays[f"{case}.height"][0] * arrays[f"{case}.width"][0]) ** 0.5
    dtype = network.final_layer.linear.weight.dtype
    return network(x.to(dtype), clock, text[:, 0].to(dtype), mask, fps, size, noisy)


@pytest.mark.parametrize("case", ["c0", "c1", "c2", "c3"])
def test_answers_are_those_of_the_original(filled, arrays, case):
    """The cases have prompts of several lengths, an odd height, a picture and fixed frames."""
    assert difference(answer(filled, arrays, case), arrays[f"{case}.out"]) < 1e-4
    assert difference(answer(filled.double(), arrays, case), arrays[f"{case}.out64"]) < 1e-6


def test_rows_are_independent(filled, arrays):
    whole = answer(filled.double(), arrays, "c3")
    alone = torch.cat([answer(filled, arrays, "c3", slice(row, row + 1)) for row in range(2)])
    torch.testing.assert_close(alone, whole, rtol=0, atol=1e-12)


def test_positions_are_those_of_the_original(filled, arrays):
    rotated = rotate(arrays["rope.in"], filled.rope.angles(5))
    torch.testing.assert_close(rotated, arrays["rope.out"], rtol=0, atol=1e-6)
    for key, rows, columns, scale, base in (
        ("h2_w2_scale0.7_base2", 2, 2, 0.7, 2),
        ("h4_w6_scale0.3_base5", 4, 6, 0.3, 5),
        ("h6_w6_scale1.9_base6", 6, 6, 1.9, 6),
    ):
        table = position_table(rows, columns, scale, base, 32).float()
        torch.testing.assert_close(table, arrays[f"pos_embed.{key}"][0], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_full_size_has_the_weights_of_the_public_file(yaml):
    with torch.device("meta"):
        network = instantiate(yaml.model.sizes.full.network)()
    expected = json.loads((ORACLES / "stdit3_fullsize_keys.json").read_text())["STDiT3-XL/2"]
    state = network.state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == expected["state_dict"]
    counted = sum(value.numel() for value in state.values())
    assert (
        counted - 300 * 4096 == expected["n_params"] == 1_207_643_972
    )  # the null prompt is no parameter of theirs


# --------------------------------------------------------------------------------------------------
# The sampler and the search
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case", FACTS["timestep_transform"], ids=lambda case: f"{case['height']}p{case['num_frames']}"
)
def test_noise_schedule_open_sora_is_the_transform_of_the_original(case):
    shift = time_shift(case["num_frames"], case["height"], case["width"])
    nodes = FlowSchedule(shift).nodes(case["num_steps"])
    expected = torch.tensor([*case["t_out"], 0.0], dtype=torch.float64) / 1000
    torch.testing.assert_close(nodes, expected, rtol=0, atol=1e-7)  # theirs has one root in float32


def euler(model: OpenSora, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    """Sample the first prompt with Euler's method."""
    velocity = model.velocity(torch.zeros(len(noise), dtype=int))
    return sample(Euler(), velocity, noise, StepSchedule(times, Free()))


@pytest.mark.parametrize("name", ["transform1", "transform0"])
def test_the_sampler_is_that_of_the_original(build, arrays, name):
    """6 steps at guidance 4, at times that are no whole numbers."""
    shift = time_shift(**VIDEO) if name == "transform1" else 1.0
    result = euler(build(), arrays["rflow.z"], FlowSchedule(shift).nodes(6))
    assert difference(result, arrays[f"rflow.final_{name}"]) < 1e-4


@pytest.fixture(scope="module")
def released_grid() -> torch.Tensor:
    return FlowSchedule(time_shift(**VIDEO)).nodes(FACTS["oss"]["N"])


def test_the_grid_is_that_of_the_released_search(arrays, released_grid):
    expected = arrays["oss.fm_steps"]
    torch.testing.assert_close(released_grid.flip(0).float(), expected, rtol=0, atol=1e-6)


def test_the_search_is_that_of_the_released_code(build, arrays, released_grid):
    N, M = FACTS["oss"]["N"], FACTS["oss"]["M"]
    f = build().velocity(torch.zeros(1, dtype=int))
    distance = Select(XtMSE(), frames=2, channels=4)
    problem = Problem(f, arrays["rflow.z"], released_grid, Euler(), distance)
    assert difference(problem.teacher.states[-1], arrays["oss.teacher_final"]) < 1e-4

    edges = layers(problem.num_nodes, [M], "free", 1, "cpu")
    path = recurse(problem, edges, [M], "free", PerSample()).paths[M]
    [nodes] = path.nodes.T.tolist()
    assert [N - node for node in reversed(nodes)] == FACTS["oss"]["schedule"]


def test_the_student_is_that_of_the_released_code(build, arrays, released_grid):
    N = FACTS["oss"]["N"]
    nodes = [N - node for node in reversed(FACTS["oss"]["schedule"])]
    student = euler(build(), arrays["rflow.z"], released_grid[[*nodes, N]])
    assert difference(student, arrays["oss.student_final"]) < 1e-4


def test_velocities_are_those_of_the_released_code(build, arrays, released_grid):
    f = build().velocity(torch.zeros(1, dtype=int))
    times = released_grid.flip(0)
    for index, v in zip(arrays["oss.v_indices"].tolist(), arrays["oss.v_at_index"], strict=True):
        assert difference(f(arrays["rflow.z"], times[[index]])[0], v) < 1e-4


# --------------------------------------------------------------------------------------------------
# The model
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(yaml, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OSS_EXP_CACHE", str(tmp_path_factory.mktemp("cache")))
        return instantiate(
            yaml.model, size="tiny", dtype="float64", prompts=read_prompts("prompts.txt")
        )


@pytest.mark.parametrize("interval", [None, [0.3, 0.8]])
def test_the_null_prompt_has_as_many_tokens_as_the_prompt(small, noise, interval):
    numbers = torch.tensor([4, 0, 8])
    t = torch.tensor([0.5, 0.9, 0.7], dtype=torch.float64)
    assert len(set(small.backbone.mask[numbers].sum(1).tolist())) == 3

    conditional = small.backbone(noise.double(), 1000 * t, numbers)
    free = small.backbone(noise.double(), 1000 * t, -1 - numbers)

    assert (conditional - free).abs().amax((1, 2, 3, 4)).min() > 1e-3

    scales = torch.tensor([7.0, 1.0 if interval else 7.0, 7.0])[:, None, None, None, None]
    expected = free + scales * (conditional - free)
    result = small.velocity(numbers, Guidance(7.0, interval=interval))(noise.double(), t)

    torch.testing.assert_close(result, expected, rtol=0, atol=1e-9)


def test_the_decoder_takes_17_frames_at_a_time(small, noise):
    pixels = small.decode(noise)
    assert pixels.shape == (3, 3, 17, 12, 18)
    assert 0 <= float(pixels.min()) < float(pixels.max()) <= 1

    one_after_the_other = torch.cat([noise[:1], noise[1:2]], dim=2)
    expected = torch.cat([pixels[:1], pixels[1:2]], dim=2)
    torch.testing.assert_close(small.decode(one_after_the_other), expected, rtol=0, atol=1e-5)
    assert small.decode(noise[:1, :, :1]).shape == (1, 3, 1, 12, 18)  # a picture

    latents = noise[:1] * torch.tensor([3.85, 2.32, 2.33, 3.06]).view(4, 1, 1, 1)
    latents += torch.tensor([-0.1, 0.34, 0.27, 0.98]).view(4, 1, 1, 1)
    vae = small.decoder.temporal_vae
    frames = vae.decoder(vae.post_quant_conv(latents))[0].transpose(0, 1)

    torch.testing.assert_close(
        small.decoder.spatial_vae(frames), pixels[0].transpose(0, 1), rtol=0, atol=1e-5
    )


def test_time_is_doubled_in_order_and_only_the_past_is_seen(small, noise):
    """The two channels of every pair become neighbouring frames."""
    decoder = small.decoder.temporal_vae.decoder
    x = noise[:1].repeat(1, 4, 1, 1, 1)  # 16 channels
    output = decoder.conv_blocks[1](x)
    later = torch.cat([x[:, :, :3], x[:, :, 3:] + 1], dim=2)

    assert decoder.conv_blocks[1](later)[:, :, :3].equal(output[:, :, :3])
    assert output.shape[1] == 2 * x.shape[1]

    doubled = decoder.doubled(x, 1)
    for channel, frame in ((0, 0), (5, 3), (15, 4)):
        for half in range(2):
            assert doubled[0, channel, 2 * frame + half].equal(output[0, 2 * channel + half, frame])


def test_the_decoder_reads_the_public_layout(small, yaml, noise, tmp_path):
    state = {
        key.replace("spatial_vae.", "spatial_vae.module."): value
        for key, value in small.decoder.state_dict().items()
    }
    others = (
        "spatial_vae.module.encoder.conv_in.bias",
        "temporal_vae.quant_conv.conv.bias",
        "scale",
        "shift",
    )
    save_file(state | {key: torch.zeros(1) for key in others}, tmp_path / "model.safetensors")
    make = instantiate(yaml.model.sizes.tiny.decoder)

    assert make(checkpoint=str(tmp_path))(noise).equal(small.decode(noise))

    state.pop("temporal_vae.decoder.conv1.conv.bias")
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"(?s)another architecture than model\.decoder.*conv1\.conv\.bias"
    ):
        make(checkpoint=str(tmp_path))


def test_the_full_decoder_is_the_public_one(yaml):
    """The count is that of the public file, less its encoder and the part in space."""
    full = yaml.model.sizes.full.decoder
    with torch.device("meta"):
        decoder = VideoVAE("random", full.scale, full.shift, full.temporal, full.spatial, "")
    assert (
        sum(weight.numel() for weight in decoder.temporal_vae.decoder.parameters()) == 165_265_924
    )


@pytest.fixture
def t5_folder(tmp_path) -> Path:
    """A folder with a small T5 encoder and its tokenizer."""
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocabulary += [("▁a", -1.0), ("▁red", -2.0), ("▁cat", -2.0)]
    T5TokenizerFast(vocab=vocabulary, extra_ids=0).save_pretrained(tmp_path / "tokenizer")

    config = T5Config(vocab_size=6, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    torch.manual_seed(0)
    T5EncoderModel(config).eval().save_pretrained(tmp_path / "text_encoder")
    return tmp_path


def test_t5_is_read_from_a_folder(t5_folder):
    """The mask is of the prompt's tokens and their end; later tokens change nothing."""
    encoded = public_t5(str(t5_folder), 6, "the authors")(["a red cat", "cat"])
    model = T5EncoderModel.from_pretrained(t5_folder / "text_encoder").eval()
    expected = model(torch.tensor([[5, 1]])).last_hidden_state

    assert encoded["mask"].tolist() == [[True] * 4 + [False] * 2, [True] * 2 + [False] * 4]
    assert encoded["text"].dtype == torch.bfloat16
    torch.testing.assert_close(encoded["text"][1:, :2].float(), expected, rtol=0, atol=0.02)


def test_a_folder_of_t5_must_be_whole(t5_folder):
    with pytest.raises(ValueError, match="is a file; give a folder"):
        public_t5(str(t5_folder / "text_encoder" / "config.json"), 6, "the authors")

    (t5_folder / "tokenizer" / "tokenizer_config.json").unlink()
    message = r"tokenizer_config\.json.*the authors.*text_encoder\.checkpoint"
    with pytest.raises(FileNotFoundError, match=message):
        public_t5(str(t5_folder), 6, "the authors")


def test_prompts_end_as_captions_do(small, yaml):
    assert yaml.model.ending == "aesthetic score: 6.5."
    lengths = small.backbone.mask.sum(1).tolist()
    for prompt, length in zip(small.prompts, lengths, strict=True):
        whole = f"{prompt} {yaml.model.ending}"
        assert length == min(80, len(whole) + 1)  # a token for every byte, and the end


def test_the_yaml_has_two_sizes(small, yaml):
    assert (small.name, small.event_shape, small.guidance) == (
        "open_sora_1_2_tiny",
        (4, 5, 6, 9),
        Guidance(7.0),
    )
    assert [yaml.model[name] for name in ("num_frames", "height", "width")] == [102, 720, 1280]
    assert instantiate(yaml.noise_schedule).shift == pytest.approx(1.875 * 30**0.5)


def test_the_noise_schedule_is_that_of_the_number_of_frames():
    chosen = composed("model=open_sora_1_2", "noise_schedule=open_sora", "model.num_frames=51")
    assert instantiate(chosen.noise_schedule).shift == pytest.approx(1.875 * 15**0.5)


@pytest.mark.slow
def test_tiny_runs_from_the_command_line(tmp_path):
    (tmp_path / "two.txt").write_text("a cat\na dog\n")

    run_cli(
        "model=open_sora_1_2",
        "model.size=tiny",
        "noise_schedule=open_sora",
        "data=prompts",
        f"data.prompts={tmp_path / 'two.txt'}",
        "data.search_samples=2",
        "data.eval_samples=3",
        "num_teacher_steps=5",
        "num_steps=[2]",
        "stepsize=[fm,oss_shared]",
        "logger=none",
        "trainer.enable_progress_bar=false",
        f"hydra.run.dir={tmp_path / 'run'}",
    )

    rows = json.loads((tmp_path / "run" / "metrics.json").read_text())["rows"]
    assert [row["strategy"] for row in rows] == ["fm", "oss_shared"]
    assert all(row["psnr"]["mean"] > 5 for row in rows)

    schedule = StepSchedule.load(tmp_path / "run" / "schedules" / "oss_shared_2.json")
    assert schedule.about("model")["name"] == "open_sora_1_2_tiny"


# --------------------------------------------------------------------------------------------------
# Bad input
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [0, 2, 16, 18, 50])
def test_frames_that_make_no_whole_groups_are_refused(build, frames):
    with pytest.raises(ValueError, match=f"must be 1 or a multiple of 17, got {frames}; choose "):
        build(num_frames=frames, checkpoint="nowhere")


def test_settings_without_meaning_are_refused(build, weights, tmp_path):
    weights = dict(weights)
    with pytest.raises(ValueError, match="height must be at least 8, got 7"):
        build(height=7)

    with pytest.raises(ValueError, match="set data=prompts"):
        build().velocity(None)

    with pytest.raises(ValueError, match="has 2 prompts and is asked for number 2"):
        build().velocity(torch.tensor([0, 2]))

    with pytest.raises(FileNotFoundError, match=r"no file, folder or hub id.*the authors"):
        build(checkpoint="nowhere")

    del weights["t_block.1.bias"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"1 weights differ, first network\.t_block\.1\.bias: absent"
    ):
        build()


def test_a_size_that_does_not_exist_is_refused(yaml):
    with pytest.raises(
        InstantiationException, match=r"size must be one of full, tiny, got 'small'"
    ):
        instantiate(yaml.model, size="small")


def test_a_text_encoder_of_another_shape_is_refused(yaml):
    with pytest.raises(
        InstantiationException,
        match=r"gives \(40, 16\) tokens and features, the network takes \(80, 1",
    ):
        instantiate(yaml.model, size="tiny", sizes={"tiny": {"text_encoder": {"length": 40}}})
