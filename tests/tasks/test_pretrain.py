"""Training: exact resume, any number of ranks, and a network that learns the exact velocity of a mixture."""

import json
import re

import numpy as np
import pytest
import torch
from helpers import run_cli, run_two_ranks
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import TensorDataset

from oss_exp.cli import CONF
from oss_exp.files import sha256
from oss_exp.tasks.pretrain import Examples, LogitNormalTimes, UniformTimes

TINY = [
    "task=pretrain",
    "model=dit_fashion",
    "images=digits",
    "model.event_shape=[1,8,8]",
    "model.backbone.size=8",
    "model.backbone.num_layers=1",
    "model.backbone.num_attention_heads=2",
    "model.backbone.attention_head_dim=8",
    "trainer.precision=32-true",
    "task.batch_size=8",
    "task.warmup_steps=2",
    "logger=none",
]


def settings(folder, *more: str) -> list[str]:
    return [*TINY, "task.max_steps=12", "task.save_every=4", f"hydra.run.dir={folder}", *more]


def outcome(folder):
    return load_file(folder / "dit_fashion.safetensors"), json.loads(
        (folder / "training.json").read_text()
    )["losses"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run_cli(*settings(folder))
    return folder


@pytest.mark.slow
def test_images_of_more_classes_than_the_model_or_of_none_are_refused_before_the_first_step(
    tmp_path, capsys
):
    arguments = [argument for argument in TINY if argument != "images=digits"]
    for folders, words in (
        (11, "images has 11 classes, model=dit_fashion has 10"),
        (0, "images has no classes"),
    ):
        for label in range(folders or 1):
            folder = tmp_path / str(folders) / (str(label) if folders else "")
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8)).save(folder / "x.png")
        images = [
            "images=image_folder",
            f"images.root={tmp_path / str(folders)}",
            "images.size=8",
            "images.channels=1",
        ]
        with pytest.raises(SystemExit):
            run_cli(
                *arguments,
                *images,
                "task.max_steps=1",
                "task.save_every=1",
                f"hydra.run.dir={tmp_path / 'run'}",
            )
        assert f"oss-exp: {words}" in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_run_leaves_weights_provenance_grids_and_a_picture(whole):
    record = json.loads((whole / "dit_fashion.json").read_text())
    assert record["sha256"] == sha256((whole / "dit_fashion.safetensors").read_bytes())
    assert record["training"]["steps"] == 12
    assert record["made_by"].startswith("oss-exp task=pretrain model=dit_fashion")
    assert record["data"]["images"] == 1797
    assert record["training"]["loss"] == pytest.approx(np.mean(outcome(whole)[1][-4:]))
    assert [path.name for path in sorted((whole / "samples").iterdir())] == [
        f"step_{s:06d}.png" for s in (4, 8, 12)
    ]
    assert Image.open(whole / "samples" / "step_000012.png").size == (8 * 10 + 2, 10 * 10 + 2)
    assert (whole / "training.png").stat().st_size > 5000


def test_the_run_and_its_checkpoint_are_the_model(whole):
    """The average, which is what the run writes in half precision."""
    shape = [argument for argument in TINY if argument.startswith("model")]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        models = [
            instantiate(compose("config", [*shape, f"model.checkpoint={path}"]).model)
            for path in (
                whole,
                whole / "checkpoints" / "last.ckpt",
                whole / "dit_fashion.safetensors",
            )
        ]
    run, last, written = (model.backbone.state_dict() for model in models)
    assert models[0].fingerprint == models[2].fingerprint != models[1].fingerprint
    for key, value in written.items():
        assert torch.equal(run[key], value)
        assert torch.equal(last[key].half().float(), value)


@pytest.mark.slow
def test_the_written_weights_run_as_a_model(whole, tmp_path):
    network = [argument for argument in TINY if argument.startswith("model")]
    run_cli(
        *network,
        f"model.checkpoint={whole / 'dit_fashion.safetensors'}",
        "stepsize=[edm,oss_shared]",
        "num_steps=[3]",
        "num_teacher_steps=8",
        "data.search_samples=4",
        "data.eval_samples=4",
        "data.per_sample=4",
        "data.classes=all",
        "model.guidance.scale=1.5",
        "logger=none",
        f"hydra.run.dir={tmp_path}",
    )
    rows = json.loads((tmp_path / "metrics.json").read_text())["rows"]
    assert [row["nfe"] for row in rows] == [6, 6]


FLAT = ["task.learning_rate=1e-30"]  # so that another end of its half cosine changes nothing


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flat")
    run_cli(*settings(folder, *FLAT))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("steps", "every", "then"), [(3, 2, 4), (8, 8, 4), (4, 4, 1), (4, 4, 20), (12, 4, 4)]
)
def test_a_run_goes_on_to_max_steps_whatever_the_lengths_were(flat, tmp_path, steps, every, then):
    first = settings(tmp_path / "first", *FLAT)
    run_cli(*first, f"task.max_steps={steps}", f"task.save_every={every}")
    more = settings(
        tmp_path / "then", *FLAT, f"task.save_every={then}", f"task.resume={tmp_path / 'first'}"
    )
    run_cli(*more)
    assert (
        json.loads((tmp_path / "then" / "training.json").read_text())["losses"] == outcome(flat)[1]
    )
    if steps < 12:
        kept = torch.load(tmp_path / "then" / "checkpoints" / "last.ckpt", weights_only=True)
        assert [rate["last_epoch"] for rate in kept["lr_schedulers"]] == [12]


@pytest.mark.slow
def test_the_same_command_goes_on_in_its_folder_and_another_is_refused(whole, tmp_path, capsys):
    folder = tmp_path / "run"
    run_cli(*settings(folder, "task.max_steps=4"))
    command = (folder / ".hydra" / "overrides.yaml").read_text()
    with pytest.raises(SystemExit):
        run_cli(*settings(folder, "task.learning_rate=1"))
    assert f"{folder} holds a run with another task.learning_rate" in capsys.readouterr().err
    assert (folder / ".hydra" / "overrides.yaml").read_text() == command
    before = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["progress"][
        "losses"
    ]
    run_cli(*settings(folder))
    assert outcome(folder)[1][:4] == before
    assert len(outcome(folder)[1]) == 12
    with pytest.raises(SystemExit):
        run_cli(*settings(folder, "task.max_steps=3"))
    assert "has taken 12 steps, more than task.max_steps=3" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_may_begin_from_weights(whole, tmp_path):
    weights = whole / "dit_fashion.safetensors"
    still = ["task.max_steps=1", "task.learning_rate=1e-30", f"task.init_from={weights}"]
    run_cli(*settings(tmp_path, *still))
    found, given = outcome(tmp_path)[0], load_file(weights)
    assert all(torch.equal(found[key], tensor) for key, tensor in given.items())
    about = json.loads((tmp_path / "dit_fashion.json").read_text())
    assert about["init_from"] == {"file": weights.name, "sha256": sha256(weights.read_bytes())}


@pytest.mark.slow
def test_a_checkpoint_of_somebody_else_removes_nothing_and_is_read_as_data(whole, tmp_path, capsys):
    """Lightning's callbacks remove the file that they kept before, whose name they read from a checkpoint."""
    victim, path = tmp_path / "victim.ckpt", tmp_path / "given.ckpt"
    victim.write_text("mine")
    kept = torch.load(whole / "checkpoints" / "last.ckpt", weights_only=True)
    names = {
        "best_model_path": str(victim),
        "last_model_path": str(victim),
        "dirpath": str(tmp_path),
    }
    keys = [
        f"ModelCheckpoint{{'monitor': None, 'mode': 'min', 'every_n_train_steps': {n}}}"
        for n in (0, 1)
    ]
    torch.save({**kept, "callbacks": dict.fromkeys([*keys, "ModelCheckpoint"], names)}, path)
    run_cli(*settings(tmp_path / "run", "task.max_steps=14", f"task.resume={path}"))
    assert victim.read_text() == "mine"
    assert len(outcome(tmp_path / "run")[1]) == 14

    other = {**kept["state_dict"], next(iter(kept["state_dict"])): torch.zeros(3)}
    broken = {
        "is not from a training": [1, 2],
        "`progress` is missing": {key: value for key, value in kept.items() if key != "progress"},
        "is of another network": {**kept, "state_dict": other},
        "has no `exp_avg` of weight 0": {
            **kept,
            "optimizer_states": [{"state": {0: {}}, "param_groups": []}],
        },
        "must be": {**kept, "progress": {"losses": ["1"], "seconds": 1.0}},
    }
    for message, content in broken.items():
        torch.save(content, path)
        with pytest.raises(SystemExit):
            run_cli(*settings(tmp_path / "refused", f"task.resume={path}"))
        error = capsys.readouterr().err
        assert message in error
        assert str(path) in error
        assert "Traceback" not in error
    path.write_bytes(b"no checkpoint")
    with pytest.raises(SystemExit):
        run_cli(*settings(tmp_path / "refused", f"task.resume={path}"))
    assert "or is damaged" in capsys.readouterr().err


SMALL = {
    "flux_fashion": ["images=coloured_fashion", "model.backbone.network.num_single_layers=1"],
    "video_fashion": ["images=moving_fashion", "model.backbone.network.num_layers=1"],
    "mar_fashion": ["model.num_iter=4", "model.sizes.full.backbone.diffloss_w=16"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_the_relatives_of_large_networks_are_trained(name, tmp_path, fashion):
    """From captions or tokens to weights that run as a model."""
    run = [
        "task=pretrain",
        f"model={name}",
        *SMALL[name],
        f"images.root={fashion}",
        "trainer.precision=32-true",
    ]
    more = ["task.batch_size=4", "task.max_steps=3", "task.save_every=3", "logger=none"]
    run_cli(*run, *more, f"hydra.run.dir={tmp_path}")
    record = json.loads((tmp_path / f"{name}.json").read_text())
    assert record["training"]["steps"] == 3
    shown = Image.open(tmp_path / "samples" / "step_000003.png").size
    assert shown == (34 * 8 + 2, 34 * 10 + 2)
    network = [f"model={name}", *(each for each in SMALL[name] if each.startswith("model"))]
    prompts = (
        [] if name == "mar_fashion" else ["data=prompts", f"data.prompts={SMALL[name][0][7:]}.txt"]
    )
    counts = [
        "data.search_samples=2",
        "data.eval_samples=2",
        "data.per_sample=2",
        "num_teacher_steps=6",
    ]
    weights = f"model.checkpoint={tmp_path / f'{name}.safetensors'}"
    run_cli(
        *network, *prompts, weights, *counts, "num_steps=[2]", "stepsize=[ddim,oss_shared]", "logger=none",
        f"hydra.run.dir={tmp_path / 'run'}",
    )  # fmt: skip
    assert len(json.loads((tmp_path / "run" / "metrics.json").read_text())["rows"]) == 2


@pytest.mark.slow
def test_two_ranks_take_the_steps_of_one(whole, tmp_path):
    run_cli(*settings(tmp_path / "one", "trainer.precision=64-true"))
    run_two_ranks(*settings(tmp_path / "two", "trainer.precision=64-true"), folder=tmp_path)
    (one, losses), (two, losses_of_two) = outcome(tmp_path / "one"), outcome(tmp_path / "two")
    np.testing.assert_allclose(losses_of_two, losses, rtol=1e-5)
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------
# Examples
# ------------------------------------------------------------------------------------------------


def examples(dropout: float = 0.25, count: int = 10) -> Examples:
    images = TensorDataset(torch.arange(count).float().view(count, 1, 1, 1), torch.arange(count))
    return Examples(images, seed=3, label_dropout=dropout, times=UniformTimes(), batch_size=4)


def test_each_pass_shows_every_image_once_in_another_order():
    stream = examples(dropout=0.0)
    passes = [[stream[10 * epoch + i]["label"] for i in range(10)] for epoch in range(3)]
    assert all(sorted(shown) == list(range(10)) for shown in passes)
    assert passes[0] != passes[1] != passes[2]


def test_an_example_is_a_function_of_its_number_alone():
    forward = [examples()[i] for i in range(40)]
    stream = examples()
    for i in reversed(range(40)):
        item = stream[i]
        assert all(
            torch.equal(torch.as_tensor(item[key]), torch.as_tensor(forward[i][key]))
            for key in item
        )
    assert [item["shared"] for item in forward] == [
        forward[i // 4 * 4]["shared"] for i in range(40)
    ]
    assert len({item["shared"] for item in forward}) == 10
    assert (
        len({float(item["noise"]) for item in forward})
        == len({float(item["t"]) for item in forward})
        == 40
    )


def test_labels_are_dropped_as_often_as_asked():
    labels = [examples()[i]["label"] for i in range(2000)]
    assert np.mean([label == -1 for label in labels]) == pytest.approx(0.25, abs=0.03)


def test_logit_normal_times_are_log_normal_sigmas():
    """arXiv 2206.00364, table 1: ln sigma ~ N(P_mean, P_std^2), with sigma = t / (1 - t)."""
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    t = LogitNormalTimes(-1.2, 1.2)(u)
    log_sigma = (t / (1 - t)).log()
    assert float(log_sigma.mean()) == pytest.approx(-1.2, abs=1e-3)
    assert float(log_sigma.std()) == pytest.approx(1.2, abs=1e-3)


# ------------------------------------------------------------------------------------------------
# Bad input
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["model.event_shape=[1,16,16]"],
            r"items of shape \(1, 8, 8\), model=dit_fashion takes \(1, 16, 16\)",
        ),
        (["task.max_steps=0"], "task.max_steps must be a whole number"),
        (["task.batch_size=many"], "task.batch_size must be a whole number"),
        (["task.label_dropout=2"], "task.label_dropout must be a finite number from 0 to 1"),
        (["task.times.std=0"], "task.times.std must be a finite number above 0"),
        (["task.resume=/nowhere"], "no checkpoint /nowhere"),
        (["task.batch_size=7", "trainer=ddp_spawn_cpu"], "cannot be split evenly over 2 ranks"),
    ],
)
def test_settings_that_cannot_train_are_refused(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_cli(*settings(tmp_path, *arguments))
    assert re.search(message, capsys.readouterr().err)


def test_a_model_without_weights_to_train_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_cli("task=pretrain", "model=mixture_digits", "logger=none", f"hydra.run.dir={tmp_path}")
    assert "trains networks" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["model=flux_fashion", "images=digits"],
            "model=flux_fashion needs images with captions, these have classes",
        ),
        (
            ["model=mar_fashion", "images=moving_fashion"],
            "model=mar_fashion needs images with classes, these have cap",
        ),
        (
            ["model=open_sora_1_2", "images=coloured_fashion"],
            "made of published parts, which are not trained here",
        ),
        (
            ["model=flux_dev", "images=coloured_fashion"],
            "a pipeline of published parts, which task=pretrain does not",
        ),
    ],
)
def test_models_and_data_that_do_not_go_together_are_refused(
    arguments, message, tmp_path, capsys, fashion
):
    root = [] if "images=digits" in arguments else [f"images.root={fashion}"]
    with pytest.raises(SystemExit):
        run_cli("task=pretrain", *arguments, *root, "logger=none", f"hydra.run.dir={tmp_path}")
    assert message in capsys.readouterr().err
