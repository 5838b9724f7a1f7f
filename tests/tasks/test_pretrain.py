"""The task `pretrain`: exact resume, any number of ranks, and weights that run as a model."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from helpers import metrics_of, run_cli, run_two_ranks
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import TensorDataset

from oss_exp.cli import CONF
from oss_exp.files import sha256
from oss_exp.tasks.pretrain import Examples, LogitNormalTimes, PretrainModule, UniformTimes

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

LATENTS = [  # the images are latents of one channel
    "model.decoder._target_=oss_exp.VAE",
    "+model.decoder.checkpoint=random",
    "+model.decoder.scaling_factor=1.0",
    "+model.decoder.micro_batch=1",
    "+model.decoder.source=none",
    "+model.decoder.latent_channels=1",
]


def settings(folder, *more: str) -> list[str]:
    """Return the arguments of a tiny training of 12 steps in a folder."""
    return [*TINY, "task.max_steps=12", "task.save_every=4", f"hydra.run.dir={folder}", *more]


def losses_of(folder) -> list[float]:
    """Return the loss of every step of a training."""
    return json.loads((folder / "training.json").read_text())["losses"]


def weights_of(folder) -> dict[str, torch.Tensor]:
    """Return the weights that a training wrote."""
    return load_file(folder / "dit_fashion.safetensors")


def checkpoint_of(folder) -> dict:
    """Return the last checkpoint of a training."""
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run_cli(*settings(folder))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("folders", "message"),
    [
        ([str(label) for label in range(11)], "images has 11 classes, model=dit_fashion has 10"),
        (["."], "images has no classes"),
    ],
)
def test_images_need_the_classes_of_the_model_before_the_first_step(
    folders, message, tmp_path, capsys
):
    for name in folders:
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(folder / "x.png")
    images = [
        "images=image_folder",
        f"images.root={tmp_path / 'images'}",
        "images.size=8",
        "images.channels=1",
    ]

    arguments = settings(tmp_path / "run", *images)
    arguments.remove("images=digits")
    with pytest.raises(SystemExit):
        run_cli(*arguments)

    assert f"oss-exp: {message}" in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_run_leaves_weights_provenance_grids_and_a_picture(whole):
    record = json.loads((whole / "dit_fashion.json").read_text())
    pictures = sorted(path.name for path in (whole / "samples").iterdir())

    assert record["sha256"] == sha256((whole / "dit_fashion.safetensors").read_bytes())
    assert record["training"]["steps"] == 12
    assert record["training"]["loss"] == pytest.approx(np.mean(losses_of(whole)[-4:]))
    assert record["made_by"].startswith("oss-exp task=pretrain model=dit_fashion")
    assert record["data"]["images"] == 1797
    assert pictures == [f"step_{step:06d}.png" for step in (4, 8, 12)]
    assert Image.open(whole / "samples" / "step_000012.png").size == (8 * 10 + 2, 10 * 10 + 2)
    assert (whole / "training.png").stat().st_size > 5000


NETWORK = [setting for setting in TINY if setting.startswith("model")]


def test_the_run_and_its_checkpoint_are_the_model(whole):
    """They hold the average of the weights, which the run writes in half precision."""
    files = [whole, whole / "checkpoints" / "last.ckpt", whole / "dit_fashion.safetensors"]
    models = []
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for file in files:
            cfg = compose("config", [*NETWORK, f"model.checkpoint={file}"])
            models.append(instantiate(cfg.model))
    run, last, written = (model.backbone.state_dict() for model in models)

    assert models[0].fingerprint == models[2].fingerprint != models[1].fingerprint
    for key, value in written.items():
        assert torch.equal(run[key], value)
        assert torch.equal(last[key].half().float(), value)


@pytest.mark.slow
def test_the_written_weights_run_as_a_model(whole, tmp_path):
    run_cli(
        *NETWORK,
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

    rows = metrics_of(tmp_path)["rows"]
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
    first = tmp_path / "first"
    second = tmp_path / "second"
    run_cli(*settings(first, *FLAT), f"task.max_steps={steps}", f"task.save_every={every}")
    run_cli(*settings(second, *FLAT), f"task.save_every={then}", f"task.resume={first}")

    assert losses_of(second) == losses_of(flat)
    if steps < 12:
        rates = checkpoint_of(second)["lr_schedulers"]
        assert [rate["last_epoch"] for rate in rates] == [12]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9")
def test_muon_goes_on_to_the_same_bits(tmp_path, monkeypatch, capsys):
    """Muon and AdamW have one state, which a checkpoint holds and a resumed run takes."""
    whole, rest = tmp_path / "whole", tmp_path / "rest"
    last, half = whole / "checkpoints" / "last.ckpt", tmp_path / "half.ckpt"
    settings = [*TINY, "task.optimizer=muon", "task.max_steps=6", "task.save_every=3"]

    save = PretrainModule.on_save

    def on_save(module: PretrainModule) -> None:
        if last.exists() and not half.exists():  # before the next checkpoint replaces it
            shutil.copy(last, half)
        save(module)

    monkeypatch.setattr(PretrainModule, "on_save", on_save)
    run_cli(*settings, f"hydra.run.dir={whole}")
    run_cli(*settings, f"task.resume={half}", f"hydra.run.dir={rest}")

    weights = weights_of(whole)
    assert all(torch.equal(weights[key], tensor) for key, tensor in weights_of(rest).items())

    with pytest.raises(SystemExit):
        run_cli(*settings, "task.optimizer=adamw", f"task.resume={half}", f"hydra.run.dir={rest}_")
    assert f"{half} has no `exp_avg` of weight" in capsys.readouterr().err


@pytest.mark.slow
def test_the_same_command_goes_on_in_its_folder_and_another_is_refused(whole, tmp_path, capsys):
    folder = tmp_path / "run"
    run_cli(*settings(folder, "task.max_steps=4", "logger=csv"))
    command = (folder / ".hydra" / "overrides.yaml").read_text()
    losses = checkpoint_of(folder)["progress"]["losses"]

    with pytest.raises(SystemExit):
        run_cli(*settings(folder, "task.learning_rate=1"))
    assert f"{folder} holds a run with another task.learning_rate" in capsys.readouterr().err
    assert (folder / ".hydra" / "overrides.yaml").read_text() == command

    run_cli(*settings(folder, "logger=csv"))
    assert losses_of(folder)[:4] == losses
    assert len(losses_of(folder)) == 12
    logs = [folder / "csv" / f"version_{part}" / "metrics.csv" for part in range(2)]
    assert [len(log.read_text().splitlines()) for log in logs] == [1 + 1, 1 + 2]  # every save_every

    with pytest.raises(SystemExit):
        run_cli(*settings(folder, "task.max_steps=3"))
    assert "has taken 12 steps, more than task.max_steps=3" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_may_begin_from_weights(whole, tmp_path):
    file = whole / "dit_fashion.safetensors"
    still = ["task.max_steps=1", "task.learning_rate=1e-30", f"task.init_from={file}"]

    run_cli(*settings(tmp_path, *still))

    weights = weights_of(tmp_path)
    record = json.loads((tmp_path / "dit_fashion.json").read_text())
    assert all(torch.equal(weights[key], tensor) for key, tensor in weights_of(whole).items())
    assert record["init_from"] == {"file": file.name, "sha256": sha256(file.read_bytes())}


@pytest.mark.slow
def test_a_foreign_checkpoint_removes_no_file(whole, tmp_path):
    """Lightning's callbacks remove their previous file, whose name they read from a checkpoint."""
    victim = tmp_path / "victim.ckpt"
    victim.write_text("mine")
    names = {
        "best_model_path": str(victim),
        "last_model_path": str(victim),
        "dirpath": str(tmp_path),
    }
    callback = "ModelCheckpoint{{'monitor': None, 'mode': 'min', 'every_n_train_steps': {}}}"
    callbacks = [callback.format(0), callback.format(1), "ModelCheckpoint"]
    content = {**checkpoint_of(whole), "callbacks": dict.fromkeys(callbacks, names)}
    torch.save(content, tmp_path / "foreign.ckpt")

    resume = f"task.resume={tmp_path / 'foreign.ckpt'}"
    run_cli(*settings(tmp_path / "run", "task.max_steps=14", resume))

    assert victim.read_text() == "mine"
    assert len(losses_of(tmp_path / "run")) == 14


def without_progress(content: dict) -> dict:
    return {key: value for key, value in content.items() if key != "progress"}


def of_another_network(content: dict) -> dict:
    weights = dict(content["state_dict"])
    weights[next(iter(weights))] = torch.zeros(3)
    return {**content, "state_dict": weights}


def without_moments(content: dict) -> dict:
    return {**content, "optimizer_states": [{"state": {0: {}}, "param_groups": []}]}


def with_text_for_losses(content: dict) -> dict:
    return {**content, "progress": {"losses": ["1"], "seconds": 1.0}}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: [1, 2], "is not from a training"),
        (without_progress, "`progress` is missing"),
        (of_another_network, "is of another network"),
        (without_moments, "has no `exp_avg` of weight 0"),
        (with_text_for_losses, "must be"),
    ],
)
def test_a_checkpoint_of_other_content_is_refused(damage, message, whole, tmp_path, capsys):
    file = tmp_path / "damaged.ckpt"
    torch.save(damage(checkpoint_of(whole)), file)

    with pytest.raises(SystemExit):
        run_cli(*settings(tmp_path / "run", f"task.resume={file}"))

    error = capsys.readouterr().err
    assert message in error
    assert str(file) in error
    assert "Traceback" not in error


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, capsys):
    file = tmp_path / "damaged.ckpt"
    file.write_bytes(b"no checkpoint")
    with pytest.raises(SystemExit):
        run_cli(*settings(tmp_path / "run", f"task.resume={file}"))
    assert "or is damaged" in capsys.readouterr().err


SMALL = {
    "flux_fashion": ["model.backbone.network.num_single_layers=1"],
    "video_fashion": ["model.backbone.network.num_layers=1"],
    "mar_fashion": ["model.num_iter=4", "model.sizes.full.backbone.diffloss_w=16"],
}


IMAGES = {"flux_fashion": "coloured_fashion", "video_fashion": "moving_fashion"}  # with captions
COUNTS = ["data.search_samples=2", "data.eval_samples=2", "data.per_sample=2"]
RUN = ["num_teacher_steps=6", "num_steps=[2]", "stepsize=[ddim,oss_shared]", "logger=none"]


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_the_small_relatives_of_large_networks_are_trained_and_run(name, tmp_path, fashion):
    network = [f"model={name}", *SMALL[name]]
    images = IMAGES.get(name)
    prompts = ["data=prompts", f"data.prompts={images}.txt"]
    training = ["trainer.precision=32-true", "task.batch_size=4", "task.max_steps=3"]

    # From captions or classes to weights.
    data = [f"images={images}"] if images else []
    data += [f"images.root={fashion}"]
    every = ["task.save_every=3", "logger=none", f"hydra.run.dir={tmp_path}"]
    run_cli("task=pretrain", *network, *data, *training, *every)
    record = json.loads((tmp_path / f"{name}.json").read_text())
    picture = Image.open(tmp_path / "samples" / "step_000003.png")
    assert record["training"]["steps"] == 3
    assert picture.size == (34 * 8 + 2, 34 * 10 + 2)

    # From weights to a comparison.
    weights = f"model.checkpoint={tmp_path / f'{name}.safetensors'}"
    conditions = prompts if images else []
    folder = f"hydra.run.dir={tmp_path / 'run'}"
    run_cli(*network, weights, *conditions, *COUNTS, *RUN, folder)
    assert len(metrics_of(tmp_path / "run")["rows"]) == 2


@pytest.mark.slow
def test_two_ranks_take_the_steps_of_one(whole, tmp_path):
    one = tmp_path / "one"
    two = tmp_path / "two"
    run_cli(*settings(one, "trainer.precision=64-true"))
    run_two_ranks(*settings(two, "trainer.precision=64-true"), folder=tmp_path)

    np.testing.assert_allclose(losses_of(two), losses_of(one), rtol=1e-5)
    weights = weights_of(two)
    for key, tensor in weights_of(one).items():
        torch.testing.assert_close(weights[key], tensor, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------
# Examples
# ------------------------------------------------------------------------------------------------


def examples(dropout: float = 0.25, count: int = 10) -> Examples:
    images = TensorDataset(torch.arange(count).float().view(count, 1, 1, 1), torch.arange(count))
    return Examples(images, seed=3, label_dropout=dropout, times=UniformTimes(), batch_size=4)


def test_each_pass_shows_every_image_once_in_another_order():
    stream = examples(dropout=0.0)
    passes = [[stream[10 * epoch + i]["label"] for i in range(10)] for epoch in range(3)]
    assert all(sorted(labels) == list(range(10)) for labels in passes)
    assert passes[0] != passes[1] != passes[2]


def test_an_example_is_a_function_of_its_number_alone():
    forward = [examples()[i] for i in range(40)]
    stream = examples()
    for i in reversed(range(40)):
        item = stream[i]
        for key in item:
            assert torch.equal(torch.as_tensor(item[key]), torch.as_tensor(forward[i][key]))


def test_examples_share_a_number_in_their_batch_alone():
    items = [examples()[i] for i in range(40)]
    shared = [item["shared"] for item in items]
    assert shared == [shared[i // 4 * 4] for i in range(40)]
    assert len(set(shared)) == 10
    assert len({float(item["noise"]) for item in items}) == 40
    assert len({float(item["t"]) for item in items}) == 40


def test_labels_are_dropped_as_often_as_asked():
    labels = [examples()[i]["label"] for i in range(2000)]
    assert np.mean([label == -1 for label in labels]) == pytest.approx(0.25, abs=0.03)


def test_pictures_are_mirrored_as_often_as_asked_and_nothing_else_changes():
    images = TensorDataset(torch.arange(6.0).view(1, 1, 2, 3), torch.zeros(1))
    plain, mirrored = (
        Examples(images, 3, 0.0, UniformTimes(), batch_size=4, horizontal_flip=share)
        for share in (0.0, 0.3)
    )
    (picture, _), flips = images[0], 0
    for i in range(1000):
        before, after = plain[i], mirrored[i]
        is_flipped = torch.equal(after["x0"], picture.flip(-1))
        assert is_flipped or torch.equal(after["x0"], picture)
        assert torch.equal(before["x0"], picture)
        assert torch.equal(before["noise"], after["noise"])
        assert before["t"] == after["t"]
        flips += is_flipped
    assert flips / 1000 == pytest.approx(0.3, abs=0.05)


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
        (["task.horizontal_flip=-1"], "task.horizontal_flip must be a finite number from 0 to 1"),
        ([*LATENTS, "task.horizontal_flip=0.5"], "mirrors pictures, .* works on latents"),
        (["task.times.std=0"], "task.times.std must be a finite number above 0"),
        (["task.resume=/nowhere"], "no checkpoint /nowhere"),
        (["trainer.precision=bf16-true"], "precision=bf16-true: half weights .* 16-mixed, bf16-mi"),
        (["trainer.precision=16-true"], "precision=16-true: half weights cannot be trained"),
        (["model.dtype=bfloat16"], "dtype=bfloat16: half weights .*; set model.dtype=float32"),
        (["task.batch_size=7", "trainer=ddp_spawn_cpu"], "cannot be split evenly over 2 ranks"),
    ],
)
def test_settings_that_cannot_train_are_refused(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_cli(*settings(tmp_path, *arguments))
    assert re.search(message, capsys.readouterr().err)
    assert not list(tmp_path.rglob("*.ckpt"))


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
