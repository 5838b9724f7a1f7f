"""The task `finetune`: what each stage learns, from which states, however the work is divided."""

import json
import random
import shutil

import pytest
import torch
from helpers import kill_at, metrics_of, random_weights, run_cli, run_two_ranks
from safetensors.torch import load_file

from oss_exp.models.stages import DOWN, UP
from oss_exp.schedule import StepSchedule
from oss_exp.tasks.finetune import spans

MODEL = [
    "model=dit_fashion",
    "model.event_shape=[1,8,8]",
    "model.backbone.size=8",
    "model.backbone.num_layers=1",
    "model.backbone.num_attention_heads=2",
    "model.backbone.attention_head_dim=8",
]
SEARCH = [
    "stepsize=ddim",
    "num_teacher_steps=10",
    "data.search_samples=2",
    "data.batch_size=4",
    "logger=none",
]
TASK = [
    "task=finetune",
    "task.num_stages=2",
    "task.trajectories=6",
    "task.batch_size=4",
    "task.precision=32-true",
    "task.max_steps=6",
    "task.save_every=2",
    "task.warmup_steps=1",
]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    """The setting of random weights of the model."""
    return random_weights(tmp_path_factory.mktemp("weights") / "tiny.safetensors", *MODEL)


def settings(weights: str, folder, *more: str) -> list[str]:
    """Return the arguments of a small finetuning in a folder."""
    return [*TASK, *MODEL, *SEARCH, weights, "num_steps=[3]", f"hydra.run.dir={folder}", *more]


def tuned(weights: str, folder, *more: str):
    """Finetune in a folder; return the folder of its stages."""
    run_cli(*settings(weights, folder, *more))
    return folder / "stages"


def stage(folder, number: int) -> dict[str, torch.Tensor]:
    """Return the weights of a stage."""
    return load_file(folder / f"stage_{number}.safetensors")


def record(folder, number: int) -> dict:
    """Return the record of a stage."""
    return json.loads((folder / f"stage_{number}.json").read_text())


def assert_same(one, two, stages: int = 2) -> None:
    for number in range(stages):
        first = stage(one, number)
        second = stage(two, number)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def whole(weights, tmp_path_factory):
    """The stages of an undisturbed run."""
    return tuned(weights, tmp_path_factory.mktemp("whole"))


# ------------------------------------------------------------------------------------------------
# What is learnt
# ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_leaves_stages_with_their_cuts_and_steps(whole):
    schedule = StepSchedule.load(whole / "schedule.json")
    cuts = json.loads((whole / "stages.json").read_text())["cuts"]
    stages = json.loads((whole.parent / "finetune.json").read_text())["stages"]

    assert cuts == [schedule.times[1]]
    assert [record(whole, number)["steps"] for number in range(2)] == [1, 2]
    assert [entry["stage"] for entry in stages] == [0, 1]
    assert (whole.parent / "stages.png").stat().st_size > 5000


@pytest.mark.slow
def test_stages_run_as_a_model_against_the_pictures_of_its_base(whole, weights, tmp_path):
    staged = [*MODEL, weights, f"stages={whole}", "num_teacher_steps=10"]
    staged += ["data.eval_samples=4", "logger=none"]
    schedule = f"task.schedule={whole / 'schedule.json'}"
    run_cli("task=evaluate", *staged, schedule, f"hydra.run.dir={tmp_path / 'evaluate'}")
    evaluated = metrics_of(tmp_path / "evaluate")
    assert evaluated["model"]["name"] == "dit_fashion_staged"

    search = ["stepsize=[ddim,oss_shared]", "num_steps=[3]", "data.search_samples=2"]
    run_cli(*staged, *search, f"hydra.run.dir={tmp_path / 'compare'}")
    rows = metrics_of(tmp_path / "compare")["rows"]
    (ddim,) = [row for row in rows if row["strategy"] == "ddim"]
    assert ddim["psnr"] == evaluated["rows"][0]["psnr"]


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["jump", "progressive"])
def test_every_stage_comes_nearer_to_the_teacher(weights, tmp_path, objective):
    longer = [
        "task.max_steps=60",
        "task.save_every=60",
        "task.learning_rate=0.001",
        "num_steps=[4]",
    ]
    folder = tuned(weights, tmp_path, f"task.objective={objective}", *longer)
    for number in range(2):
        training = record(folder, number)["training"]
        assert training["loss_after"] < 0.3 * training["loss_before"]


@pytest.mark.slow
def test_the_teachers_own_steps_have_nothing_to_learn(weights, tmp_path):
    folder = tuned(
        weights, tmp_path, "stepsize=fm", "num_steps=[10]", "task.max_steps=1", "task.save_every=1"
    )
    for number in range(2):
        assert record(folder, number)["training"]["loss_before"] < 1e-12
        assert stage(folder, number) == {}  # the weights are those of the model


@pytest.mark.slow
def test_states_are_the_teachers_and_later_the_students(weights, tmp_path):
    folder = tuned(weights, tmp_path, "task.objective=progressive", "num_steps=[4]")
    teacher = load_file(folder / "states" / "teacher" / "000000.safetensors")
    assert teacher["states"].shape == (4, 5, 1, 8, 8)
    start = load_file(folder / "states" / "student_1" / "000001.safetensors")["x"]
    assert start.shape == (2, 1, 8, 8)  # six trajectories in batches of four
    second = load_file(folder / "states" / "teacher" / "000001.safetensors")["states"][:, 2]
    error = float((start - second).pow(2).mean())
    assert 0 < error < float((second - second.flip(0)).pow(2).mean())


@pytest.mark.slow
def test_images_train_stages_by_the_models_own_loss(weights, tmp_path):
    folder = tuned(weights, tmp_path, "task.objective=diffusion", "images=digits")
    assert not (folder / "states").exists()
    assert record(folder, 1)["training"]["loss_after"] > 0


@pytest.fixture(scope="module", params=["adaln", "lora"])
def partly(request, weights, tmp_path_factory):
    """The kind of parameters that are trained, and the stages of the run."""
    kind = request.param
    folder = tmp_path_factory.mktemp(kind)
    return kind, tuned(weights, folder, f"task.trainable={kind}", "task.lora_rank=2")


@pytest.mark.slow
def test_few_parameters_may_be_trained(partly, whole):
    kind, folder = partly
    tensors = stage(folder, 0)
    names = stage(whole, 0).keys()

    assert record(folder, 0)["parameters"] < record(whole, 0)["parameters"]
    if kind == "adaln":
        assert tensors.keys() < names
        assert any("norm1.linear" in name for name in tensors)
    else:
        ups = [tensor for name, tensor in tensors.items() if name.endswith(UP)]
        downs = [tensor for name, tensor in tensors.items() if name.endswith(DOWN)]
        assert {name.removesuffix(DOWN).removesuffix(UP) for name in tensors} < names
        assert len(ups) + len(downs) == len(tensors)
        assert all(tensor.shape[1] == 2 for tensor in ups)
        assert all(tensor.shape[0] == 2 for tensor in downs)
        assert any(bool(tensor.any()) for tensor in ups)


@pytest.mark.slow
def test_few_parameters_are_trained_on_the_states_of_all(partly, whole):
    _, folder = partly
    first = load_file(next((folder / "states" / "teacher").iterdir()))
    expected = load_file(whole / "states" / "teacher" / "000000.safetensors")
    assert torch.equal(first["states"], expected["states"])


@pytest.mark.slow
def test_stages_of_few_parameters_run_as_a_model(partly, weights, tmp_path):
    _, folder = partly
    stages = [f"stages={folder}", f"task.schedule={folder / 'schedule.json'}"]
    counts = ["num_teacher_steps=10", "data.eval_samples=2", "logger=none"]
    run_cli("task=evaluate", *MODEL, weights, *stages, *counts, f"hydra.run.dir={tmp_path}")
    assert (tmp_path / "metrics.json").is_file()


@pytest.mark.parametrize(("steps", "stages"), [(5, 5), (7, 3), (10, 4)])
def test_stages_share_the_steps_evenly(steps, stages):
    parts = spans(steps, stages)
    lengths = [len(part) for part in parts]
    assert [step for part in parts for step in part] == list(range(steps))
    assert max(lengths) - min(lengths) <= 1


# ------------------------------------------------------------------------------------------------
# How the work is divided
# ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_stages_of_separate_jobs_are_those_of_one_run(whole, weights, tmp_path):
    output = tmp_path / "shared"
    for number in (1, 0):
        job = [f"task.stage={number}", f"task.output={output}"]
        run_cli(*settings(weights, tmp_path / str(number), *job))
    assert_same(whole, output)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits(whole, weights, tmp_path):
    checkpoint = "stages/checkpoints/stage_0.ckpt"
    kill_at(checkpoint, tmp_path, settings(weights, tmp_path), delay=random.random() / 5)
    assert not (tmp_path / "stages" / "stage_1.json").exists()
    assert_same(whole, tuned(weights, tmp_path))


@pytest.mark.slow
def test_stages_that_exist_are_not_trained_again(whole, weights, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*.safetensors")}
    run_cli(*settings(weights, tmp_path, f"task.output={whole}"))
    assert before == {path: path.stat().st_mtime_ns for path in whole.rglob("*.safetensors")}


@pytest.mark.slow
def test_two_ranks_go_on_where_one_batch_of_states_is_missing(whole, weights, tmp_path):
    shutil.copytree(whole / "states", tmp_path / "stages" / "states")
    batch = tmp_path / "stages" / "states" / "teacher" / "000001.safetensors"
    batch.unlink()

    run_two_ranks(*settings(weights, tmp_path), folder=tmp_path)

    states = load_file(whole / "states" / "teacher" / batch.name)["states"]
    torch.testing.assert_close(load_file(batch)["states"], states)
    assert record(tmp_path / "stages", 1)["training"]["steps"] == 6


@pytest.mark.slow
def test_two_ranks_take_the_steps_of_one(weights, tmp_path):
    progressive = ["task.objective=progressive", "num_steps=[4]", "task.precision=64-true"]
    one = tuned(weights, tmp_path / "one", *progressive)
    run_two_ranks(*settings(weights, tmp_path / "two", *progressive), folder=tmp_path)
    two = tmp_path / "two" / "stages"

    for number in range(2):
        tensors = stage(two, number)
        for name, tensor in stage(one, number).items():
            torch.testing.assert_close(tensors[name], tensor, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------
# What does not fit
# ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("task.num_stages=1", "task.num_stages must be a whole number of at least 2"),
        ("task.num_stages=4", "task.num_stages=4 exceeds the 3 steps of the schedule"),
        ("task.stage=2", "task.stage must be all, or a number from 0 to 1"),
        ("task.objective=jumps", "task.objective must be one of jump, progressive, diffusion"),
        ("task.objective=diffusion", "needs images: images=fashion_mnist_32"),
        ("images=digits", "task.objective=jump takes no images"),
        ("task.precision=bf16-true", "must be one of 16-mixed, bf16-mixed, 32-true, 64-true"),
        ("+trainer.precision=bf16-true", "trainer.precision=bf16-true: half weights cannot be"),
        ("model.dtype=float16", "model.dtype=float16: half weights cannot be trained"),
        ("model.dtype=bfloat16 task.trainable=lora", "bfloat16: half weights cannot be trained"),
        ("task.trainable=half", "task.trainable must be one of full, adaln, lora"),
        (
            "task.trainable=lora task.lora_rank=0",
            "task.lora_rank must be a whole number of at least 1",
        ),
        ("solver=heun", "task.objective=jump trains jumps of solver=euler"),
        ("num_steps=[3,4]", "one stepsize and one K in num_steps"),
        ("stepsize=oss", "has a time for every sample"),
        ("stepsize=oss_fit", "has fitted steps"),
        ("task.schedule=none.json", "step schedule none.json does not exist"),
        ("stages=nowhere", "record of stages nowhere/stages.json does not exist"),
    ],
)
def test_bad_values_end_with_one_message(weights, tmp_path, capsys, values, message):
    with pytest.raises(SystemExit):
        run_cli(*settings(weights, tmp_path, *values.split()))
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("stage_*.safetensors"))
    assert not list(tmp_path.rglob("teacher/*.safetensors"))


@pytest.mark.slow
def test_a_schedule_of_another_model_is_refused(weights, tmp_path, whole, capsys):
    other = random_weights(tmp_path / "other.safetensors", *MODEL, "model.backbone.num_layers=2")
    schedule = f"task.schedule={whole / 'schedule.json'}"
    with pytest.raises(SystemExit):
        run_cli(*settings(other, tmp_path / "run", "model.backbone.num_layers=2", schedule))
    assert "was searched on model 'dit_fashion'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_folder_of_another_configuration_is_refused(weights, tmp_path, whole, capsys):
    with pytest.raises(SystemExit):
        run_cli(*settings(weights, tmp_path, f"task.output={whole}", "task.learning_rate=0.1"))
    assert "holds a run with another task" in capsys.readouterr().err


def test_models_without_weights_and_with_loops_are_refused(tmp_path, capsys):
    run = [
        "task=finetune",
        "model=mixture_fashion",
        "stepsize=ddim",
        "logger=none",
        f"hydra.run.dir={tmp_path}",
    ]
    with pytest.raises(SystemExit):
        run_cli(*run)
    assert "task=finetune trains networks" in capsys.readouterr().err
