"""Overrides that are refused: names of earlier versions, and values that no task reads."""

import pytest
from helpers import run_cli

FAST = [
    "stepsize=[fm,edm]",
    "num_steps=[1]",
    "num_teacher_steps=2",
    "data.search_samples=1",
    "data.eval_samples=2",
]


def refused(capsys, folder, *arguments: str) -> str:
    """Return the one message with which a command is refused."""
    with pytest.raises(SystemExit) as stop:
        run_cli(*arguments, f"hydra.run.dir={folder}")
    assert stop.value.code == 1
    assert not (folder / "metrics.json").exists()
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "task=export task.schedule=x.json task.to=comfyui",
            "oss-exp: task.to=comfyui is now exporter=comfyui",
        ),
        ("solver=null", "solver=null does not exist; choose from adams_bashforth"),
        ("stepsize=oss_shred", "stepsize=oss_shred does not exist; did you mean oss_shared"),
        ("evaluation.metrics=[psnr,fid]", "evaluation.metrics=[psnr,fid] is now metric=[fid]"),
        ("evaluation.metrics=[psnr]", "evaluation.metrics=[psnr] is now metric=[]"),
        ("metric=[psnr,fid]", "metric=[psnr,fid] is now metric=[fid]"),
        (
            "evaluation.kid.subset_size=16",
            "evaluation.kid.subset_size=16 is now metric.kid.subset_size=16",
        ),
        ("task=finetune data@task.images=digits", "data@task.images=digits is now images=digits"),
        ("task=statistics data.split=test", "data.split=test is now images.split=test"),
        (
            "task=pretrain data=digits",
            "data=digits does not exist; digits is an option of another group: images=digits",
        ),
        (
            "model=sd15 model.checkpoint=folder",
            "model.checkpoint=folder is now model.pipeline=folder",
        ),
        ("model=wan2_1_14b model.frames=5", "model.frames=5 is now model.call.num_frames=5"),
        (
            "model=sd15 model._target_=oss_exp.Flux",
            "model._target_ is oss_exp.Flux, which is a pipeline of diffusers now",
        ),
        ("stepsize=[]", "stepsize=[] chooses none; choose from ays"),
        ("stepsize=[ddim,ddim]", "stepsize=[ddim,ddim] names ddim twice; name it once"),
        (
            "task=import_sigmas task.sigmas=1.0,0.5,0",
            "write a list, 'task.sigmas=[1.0,0.5,0]', or text, 'task.sigmas=\"1.0,0.5,0\"', or ",
        ),
        ("noise_schedule=karras", "karras is an option of another group: stepsize=karras"),
    ],
)
def test_names_of_earlier_versions_say_what_they_are_now(arguments, message, tmp_path, capsys):
    assert message in refused(capsys, tmp_path, *arguments.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "task=search metric=fid",
            "the command sets metric, which task=search does not read; it reads data",
        ),
        ("images=digits", "the command sets images, which task=compare does not read"),
        ("exporter=comfyui", "the command sets exporter, which task=compare does not read"),
        (
            "task=statistics solver=heun",
            "the command sets solver, which task=statistics does not read",
        ),
        (
            "task=pretrain num_steps=[5]",
            "num_steps does not exist here; did you mean task.max_steps?",
        ),
        ("teacher_steps=9", "teacher_steps does not exist here; did you mean num_teacher_steps?"),
        ("data.sed=1", "data.sed does not exist here; did you mean data.seed"),
        ("task=search run_orders=fixed", "run_orders does not exist here; `--cfg job` shows"),
        ("task=search evaluation.trajectories=0", "evaluation.trajectories does not exist here"),
        (
            "task=fit_mixture experiment=table_2",
            "experiment=table_2 sets model, which task=fit_mixture does not read",
        ),
        ("metric.fid.num_images=10", "metric.fid.num_images belongs to metric=fid, which"),
        ("trainer.num_nodes=2", "trainer.num_nodes belongs to trainer=ddp, which is not chosen"),
        ("scale=small", "scale=small sets task.scale, which task=compare does not read"),
        ("task=reproduce scale=tiny", "task=reproduce does not read data; leave out scale=tiny"),
        ("+images=digits", "+images=digits does nothing: task=compare does not read images"),
        ("+number=1", "+number=1 does nothing: task=compare does not read number"),
        (
            "task=import_sigmas task.sigmas=[1] task.network=eps +data.seed=1",
            "task=import_sigmas does not read data; leave out what sets it",
        ),
        (
            "experiment=leaderboard stepsize=[oss_fit]",
            "stepsize has settings of oss_ave, oss_shared, not chosen; choose that as well, or "
            "leave out experiment=leaderboard",
        ),
        (
            "task=fit_classifier images.split=test",
            "images.split=test does nothing here: train and test are read",
        ),
        ("task=fit_classifier images=digits", "images must have a train and a test split"),
        (
            "task=fit_detector images=digits",
            "task=fit_detector draws scenes of its own from images=fashion_scenes",
        ),
        (
            "task=fit_mixture scale=tiny",
            "task=fit_mixture does not read data; leave out scale=tiny",
        ),
    ],
)
def test_what_the_task_does_not_read_is_refused(arguments, message, tmp_path, capsys):
    assert message in refused(capsys, tmp_path, *arguments.split())


@pytest.mark.slow
def test_entries_below_what_is_read_may_be_added(tmp_path):
    run_cli(
        *FAST,
        "+trainer.max_time=00:01:00:00",
        "evaluation.trajectories=0",
        f"hydra.run.dir={tmp_path}",
    )
    assert (tmp_path / "metrics.json").is_file()
