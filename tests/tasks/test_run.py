"""Whole runs of search, compare and evaluate on the digits mixture: files and numbers."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import metrics_of, run_cli, run_two_ranks
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import OmegaConf

from oss_exp.cli import CONF
from oss_exp.data.noise import HELD_OUT, NoiseDataset
from oss_exp.evaluation.psnr import CEILING, psnr
from oss_exp.files import ASSETS, sha256
from oss_exp.models.families.mixture import GaussianMixture
from oss_exp.models.guidance import Guidance
from oss_exp.noise import EDMPath, FlowPath, FlowSchedule
from oss_exp.provenance import native_times
from oss_exp.schedule import StepSchedule
from oss_exp.solvers import Euler, sample

STRATEGIES = [
    "ddim",
    "ddim_analytic",
    "edm",
    "fm",
    "logsnr",
    "oss",
    "oss_ave",
    "oss_fit",
    "oss_shared",
    "quadratic",
]
SMALL = [
    "model=mixture_digits",
    "num_teacher_steps=20",
    "num_steps=[2,4]",
    "data.search_samples=6",
    "data.eval_samples=8",
    "data.per_sample=4",
    "logger=none",
    "trainer.enable_progress_bar=false",
]


def oss_exp(folder: Path, *arguments: str) -> Path:
    """Run the command line with `folder` as the run folder, which is returned."""
    run_cli(*SMALL, *arguments, f"hydra.run.dir={folder}")
    return folder


def row(folder: Path, strategy: str, num_steps: int) -> dict:
    """Return the measurements of one schedule of a run."""
    rows = {(row["strategy"], row["num_steps"]): row for row in metrics_of(folder)["rows"]}
    return rows[strategy, num_steps]


def means(folder: Path) -> dict[tuple[str, int], float]:
    """Return the mean PSNR of every strategy and number of steps."""
    rows = metrics_of(folder)["rows"]
    return {(row["strategy"], row["num_steps"]): row["psnr"]["mean"] for row in rows}


def schedules(folder: Path) -> dict[str, StepSchedule]:
    """Return the step schedules of a run by the names of their files."""
    files = (folder / "schedules").glob("*.json")
    return {file.stem: StepSchedule.load(file) for file in files if ".mean" not in file.name}


def times(folder: Path, *strategies: str) -> dict[str, list]:
    """Return the times of the schedules of a run, or of these strategies of it."""
    plans = schedules(folder).items()
    return {name: plan.times.tolist() for name, plan in plans if name.startswith(strategies or "")}


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> Path:
    """The folder of a comparison of all strategies with 2 and 4 steps."""
    return oss_exp(tmp_path_factory.mktemp("compared") / "run")


@pytest.fixture(scope="module")
def again(tmp_path_factory) -> Path:
    """The folder of the same comparison, run a second time."""
    return oss_exp(tmp_path_factory.mktemp("again") / "run")


def direct_psnr(
    steps: StepSchedule, guidance: float = 1.0, classes: list[int] | None = None
) -> torch.Tensor:
    """Return the PSNR of the held-out samples by the library alone, without a task."""
    model = GaussianMixture.from_asset(
        "mixture_digits.safetensors", guidance=Guidance(guidance), micro_batch=4096
    )
    count = 8 if steps.samples is None else 4
    items = list(NoiseDataset(0, HELD_OUT, count, model.event_shape, classes))
    noise = torch.stack([item["noise"] for item in items])
    labels = None if classes is None else torch.tensor([item["label"] for item in items])

    velocity = model.velocity(labels, Guidance(guidance))
    teacher = sample(Euler(), velocity, noise, StepSchedule(FlowSchedule(shift=1.0).nodes(20)))
    student = sample(Euler(), velocity, noise, steps, group=labels)
    return psnr(model.decode(student), model.decode(teacher))


# ------------------------------------------------------------------------------------------------
# The files of a run
# ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_comparison_leaves_exactly_these_files(compared):
    expected = {
        ".hydra/config.yaml",
        ".hydra/hydra.yaml",
        ".hydra/overrides.yaml",
        ".lock",
        "config.yaml",
        "metrics.json",
        "report.html",
        "samples.npz",
        "samples.png",
        "schedules.png",
        "table.md",
        "teacher.json",
        "trajectories.npz",
    }
    for strategy in STRATEGIES:
        analytic = any(word in strategy for word in ("analytic", "fit", "shared"))
        suffixes = [".json", ".mean.json", ".mean.safetensors"] if analytic else [".json"]
        for k in (2, 4):
            expected |= {f"schedules/{strategy}_{k}{suffix}" for suffix in suffixes}

    files = {path for path in compared.rglob("*") if path.is_file()}
    assert {path.relative_to(compared).as_posix() for path in files} == expected


@pytest.mark.slow
def test_every_step_schedule_records_its_setting(compared):
    plans = schedules(compared)
    weights = (ASSETS / "mixture_digits.safetensors").read_bytes()

    assert set(plans) == {f"{name}_{k}" for name in STRATEGIES for k in (2, 4)}
    for steps in plans.values():
        record = steps.provenance
        teacher = record["teacher"]
        assert record["model"]["name"] == "mixture_digits"
        assert record["model"]["sha256"] == sha256(weights)
        assert teacher["num_steps"] == 20
        assert teacher["noise_schedule"] == {"_target_": "oss_exp.FlowSchedule", "shift": 1.0}
        assert record["solver"]["_target_"] == "oss_exp.Euler"
        assert record["distance"]["_target_"] == "oss_exp.XtMSE"
        assert record["seed"] == 0


@pytest.mark.slow
def test_every_step_schedule_records_its_strategy_and_its_costs(compared):
    for name, steps in schedules(compared).items():
        strategy, k = name.rsplit("_", 1)
        searched = strategy.startswith("oss")
        record = steps.provenance
        planning = record["planning"]
        assert steps.num_steps == int(k)
        assert record["strategy"]["name"] == strategy
        assert record["strategy"]["baseline"] == (not searched)
        assert planning["search_samples"] == (4 if strategy == "oss" else 6)
        assert (planning["network_calls_per_sample"] > 20) == searched
        assert planning["seconds"] >= 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "classes"),
    [
        ([], None),
        (["model.guidance.scale=2"], "all"),
        (["data.classes=[3]", "model.guidance.scale=2"], [3]),
    ],
)
def test_classes_are_those_that_the_model_needs(settings, classes, tmp_path):
    folder = oss_exp(tmp_path / "run", "task=search", "stepsize=fm", "num_steps=[2]", *settings)
    assert schedules(folder)["fm_2"].about("model")["classes"] == classes
    assert OmegaConf.load(folder / "config.yaml").data.classes == classes


def test_every_step_schedule_lists_its_times_in_the_clock_of_the_model(tmp_path):
    folder = oss_exp(
        tmp_path / "run",
        "task=search",
        "stepsize=[fm,edm,oss]",
        "num_steps=[4]",
        "noise_schedule=edm",
    )

    path = FlowPath(shift=1.0, time_scale=1.0)
    for steps in schedules(folder).values():
        native = steps.about("native")
        assert native["clock"] == "flow time"
        tau = torch.tensor(native["times"], dtype=torch.float64)
        torch.testing.assert_close(path.canonical(tau), steps.times)


def test_a_time_at_infinite_sigma_is_listed_as_none():
    native = native_times(EDMPath(), torch.tensor([1.0, 0.5, 0.0]))
    assert native == {"clock": "sigma", "times": [None, 1.0, 0.0]}


@pytest.mark.slow
def test_a_search_leaves_step_schedules_and_no_measurement(tmp_path, compared):
    folder = oss_exp(tmp_path / "run", "task=search", "stepsize=[edm,oss_ave]")
    files = {path.name for path in folder.iterdir()}

    assert times(folder) == times(compared, "edm", "oss_ave")
    assert files == {"config.yaml", "teacher.json", "schedules", "schedules.png", ".hydra", ".lock"}


@pytest.mark.slow
def test_the_saved_configuration_is_resolved_and_has_the_given_values(compared):
    text = (compared / "config.yaml").read_text()
    config = OmegaConf.create(text)

    assert "${" not in text
    assert config.num_steps == [2, 4]
    assert config.num_teacher_steps == 20
    assert config.data.search_samples == 6
    assert config.paths.output_dir == str(compared)
    assert set(config.stepsize) == set(STRATEGIES)


# ------------------------------------------------------------------------------------------------
# What the numbers mean
# ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_psnr_of_a_run_is_that_of_its_saved_schedule(strategy, k, compared):
    direct = direct_psnr(schedules(compared)[f"{strategy}_{k}"])
    result = row(compared, strategy, k)
    assert result["psnr"]["mean"] == pytest.approx(float(direct.mean()), abs=1e-4)
    assert result["psnr"]["n"] == len(direct)
    assert result["per_image"]["index"] == list(range(HELD_OUT, HELD_OUT + len(direct)))
    assert result["per_image"]["psnr"] == pytest.approx(direct.tolist(), abs=1e-3)
    assert result["nfe"] == k


@pytest.mark.slow
def test_per_sample_rows_are_measured_on_the_samples_that_they_were_planned_for(compared):
    steps = schedules(compared)["oss_4"]
    assert steps.samples == tuple(range(HELD_OUT, HELD_OUT + 4))
    for result in metrics_of(compared)["rows"]:
        assert result["psnr"]["n"] == (4 if result["strategy"] == "oss" else 8)


@pytest.mark.slow
def test_two_identical_runs_are_equal(compared, again):
    assert times(again) == times(compared)
    assert means(again) == means(compared)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_batch_size_changes_nothing(batch_size, compared, tmp_path):
    folder = oss_exp(tmp_path / "run", f"data.batch_size={batch_size}")
    assert times(folder) == times(compared)
    assert means(folder) == pytest.approx(means(compared), abs=1e-3)  # float32 states


@pytest.mark.slow
def test_pictures_are_those_of_the_first_samples_whatever_the_batch_size(compared, tmp_path):
    folder = oss_exp(tmp_path / "run", "data.batch_size=3", "stepsize=[edm,oss]")
    with np.load(folder / "samples.npz") as small, np.load(compared / "samples.npz") as whole:
        assert small["teacher"].shape == whole["teacher"].shape == (8, 8, 8, 1)
        assert (small["teacher"] == whole["teacher"]).all()


@pytest.fixture(scope="module")
def trajectories(compared) -> dict[str, np.ndarray]:
    """The states on the way (x0/LABEL) and their times (times/LABEL) of the comparison."""
    with np.load(compared / "trajectories.npz") as file:
        return dict(file)


@pytest.mark.slow
def test_trajectories_are_the_predictions_on_the_way_to_the_samples(compared, trajectories):
    oss = {f"oss K={k}" for k in (2, 4)}  # too few for samples.npz
    labels = {key.removeprefix("x0/") for key in trajectories if key.startswith("x0/")}
    with np.load(compared / "samples.npz") as file:
        samples = dict(file)

    assert labels == {*samples, *oss}
    for label, pictures in samples.items():
        states = trajectories[f"x0/{label}"]
        assert np.array_equal(states[:, -1], pictures[:4])
        if "fit" not in label:  # Euler's last step goes to its prediction
            assert np.array_equal(states[:, -2], pictures[:4])


@pytest.mark.slow
def test_trajectories_have_the_times_of_their_schedules(compared, trajectories):
    teacher = [1, 0.85, 0.75, 0.6, 0.45, 0.3, 0.2, 0.05, 0]

    assert trajectories["x0/teacher"].shape == (4, 9, 8, 8, 1)
    assert trajectories["times/teacher"] == pytest.approx(np.array([teacher] * 4), abs=1e-12)
    for name, steps in schedules(compared).items():
        strategy, k = name.rsplit("_", 1)
        expected = np.broadcast_to(steps.times, (4, steps.num_steps + 1))
        assert np.array_equal(trajectories[f"times/{strategy} K={k}"], expected)


@pytest.mark.slow
def test_there_are_as_many_trajectories_as_asked_for(trajectories, tmp_path):
    folder = oss_exp(
        tmp_path / "run", "data.batch_size=3", "stepsize=[edm,oss]", "evaluation.trajectories=5"
    )

    with np.load(folder / "trajectories.npz") as small:
        states = small["x0/edm K=4"].astype(int)
        assert len(states) == 5
        assert np.abs(states[:4] - trajectories["x0/edm K=4"]).max() <= 1
        assert "times/oss K=4" not in small, "oss has only four samples"
        assert "x0/oss K=4" not in small


@pytest.mark.slow
def test_a_run_without_trajectories_has_a_page_without_them(compared, tmp_path, capsys):
    folder = oss_exp(tmp_path / "run", "evaluation.trajectories=0", "stepsize=edm")
    assert not (folder / "trajectories.npz").exists()
    assert "<h2>On the way</h2>" in (compared / "report.html").read_text()
    assert "<h2>On the way</h2>" not in (folder / "report.html").read_text()
    for wrong in ("-1", "1.5", "true"):
        with pytest.raises(SystemExit):
            oss_exp(tmp_path / "wrong", f"evaluation.trajectories={wrong}")
        assert "evaluation.trajectories must be a whole number" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["edm_2", "oss_ave_4", "oss_shared_4", "oss_4"])
def test_evaluating_a_saved_schedule_gives_the_psnr_of_the_comparison(name, compared, tmp_path):
    folder = oss_exp(
        tmp_path / "run", "task=evaluate", f"task.schedule={compared / 'schedules' / name}.json"
    )
    strategy, k = name.rsplit("_", 1)
    assert metrics_of(folder)["rows"] == [row(compared, strategy, int(k))]
    assert times(folder) == {name: times(compared)[name]}


@pytest.mark.slow
def test_evaluating_a_run_measures_all_its_schedules(compared, tmp_path, capsys):
    folder = oss_exp(tmp_path / "run", "task=evaluate", f"task.schedule={compared}")
    assert means(folder) == means(compared)
    assert times(folder) == times(compared)

    # Two of one strategy and budget, and none.
    again = tmp_path / "again"
    shutil.copytree(compared / "schedules", again)
    shutil.copy(again / "edm_2.json", again / "edm_2_copy.json")
    (tmp_path / "empty").mkdir()
    for place, message in (("again", "are both schedules of edm with 2"), ("empty", "no step")):
        with pytest.raises(SystemExit):
            oss_exp(tmp_path / "x", "task=evaluate", f"task.schedule={tmp_path / place}")
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_evaluating_without_a_schedule_plans_one(compared, tmp_path):
    folder = oss_exp(tmp_path / "run", "task=evaluate", "stepsize=edm")
    assert means(folder) == {("edm", k): means(compared)["edm", k] for k in (2, 4)}


@pytest.mark.slow
def test_guidance_doubles_the_network_rows(tmp_path):
    folder = oss_exp(
        tmp_path / "run", "data.classes=all", "model.guidance.scale=2", "stepsize=[edm,oss_shared]"
    )
    plans = schedules(folder)

    for name in ("edm_2", "edm_4", "oss_shared_2", "oss_shared_4"):
        strategy, k = name.rsplit("_", 1)
        direct = direct_psnr(plans[name], guidance=2.0, classes=list(range(10)))
        result = row(folder, strategy, int(k))
        assert result["nfe"] == 2 * int(k)
        assert result["psnr"]["mean"] == pytest.approx(float(direct.mean()), abs=1e-4)


@pytest.mark.slow
def test_heun_counts_its_second_calls(tmp_path):
    folder = oss_exp(tmp_path / "run", "solver=heun", "stepsize=edm")
    assert [row(folder, "edm", k)["nfe"] for k in (2, 4)] == [3, 7]


@pytest.mark.slow
def test_a_student_with_the_teachers_steps_is_the_teacher(tmp_path):
    folder = oss_exp(tmp_path / "run", "stepsize=[fm,edm]", "num_steps=[20]")
    exact = {"mean": CEILING, "low": CEILING, "high": CEILING, "n": 8}
    assert row(folder, "fm", 20)["psnr"] == exact
    assert row(folder, "edm", 20)["psnr"]["mean"] < CEILING


@pytest.mark.slow
def test_another_seed_measures_other_noises(compared, tmp_path):
    folder = oss_exp(tmp_path / "run", "data.seed=1", "stepsize=edm")
    before = row(compared, "edm", 4)["psnr"]["mean"]
    assert row(folder, "edm", 4)["psnr"]["mean"] != pytest.approx(before, abs=1e-3)


def test_one_held_out_sample_has_no_interval(tmp_path):
    folder = oss_exp(tmp_path / "run", "data.eval_samples=1", "stepsize=[edm,oss]", "num_steps=[2]")
    for strategy in ("edm", "oss"):
        psnr = row(folder, strategy, 2)["psnr"]
        assert (psnr["n"], psnr["low"]) == (1, None)


@pytest.mark.parametrize(
    ("values", "option"),
    [
        ("stepsize=[ddim,oss] data.search_samples=1", "raise data.search_samples, or use fewer"),
        ("stepsize=[ddim,oss] data.per_sample=1", "raise data.per_sample (at most data.eval_sam"),
        ("stepsize=oss data.eval_samples=1", "raise data.per_sample (at most data.eval_samples)"),
        ("task=calibrate stepsize=ddim task.samples=1", "raise task.samples, or use fewer devices"),
    ],
)
@pytest.mark.parametrize("rank", ["0", "1"])
def test_every_rank_says_that_some_would_have_no_noise(
    values, option, rank, tmp_path, capsys, monkeypatch
):
    """Each of two ranks ends at once, without the other."""
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setenv("NODE_RANK", "0")
    monkeypatch.setattr(rank_zero_only, "rank", int(rank))
    ranks = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
    with pytest.raises(SystemExit):
        oss_exp(tmp_path, *values.split(), *ranks)
    printed = capsys.readouterr().err
    assert "every rank needs a noise, and 2 ranks share 1" in printed
    assert option in printed
    assert not (tmp_path / "schedules").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "values",
    ["stepsize=[ddim,oss_ave] data.per_sample=1", "stepsize=oss data.search_samples=1"],
)
def test_noises_that_no_strategy_uses_may_be_fewer_than_ranks(values, tmp_path):
    arguments = ["task=search", *values.split()]
    run_two_ranks(*SMALL, *arguments, "hydra.run.dir=two", folder=tmp_path)
    oss_exp(tmp_path / "one", *arguments)
    assert times(tmp_path / "two") == times(tmp_path / "one")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="gloo")
def test_two_processes_give_the_schedules_and_the_psnr_of_one(compared, tmp_path):
    # An odd number of search samples and of images: a rank repeats one, which must not count twice.
    settings = ["data.search_samples=5", "data.eval_samples=7", "data.per_sample=3"]
    run_two_ranks(*SMALL, *settings, "hydra.run.dir=two", folder=tmp_path)
    two = tmp_path / "two"
    one = oss_exp(tmp_path / "one", *settings)

    assert times(two) == times(one)
    assert means(two) == pytest.approx(means(one), abs=1e-3)  # float32 states
    for result, expected in zip(metrics_of(two)["rows"], metrics_of(one)["rows"], strict=True):
        assert result["per_image"]["index"] == expected["per_image"]["index"]
    with np.load(two / "trajectories.npz") as states, np.load(one / "trajectories.npz") as expected:
        assert list(states) == list(expected)
        for key, values in expected.items():
            assert np.abs(states[key].astype(float) - values).max() <= 1


# ------------------------------------------------------------------------------------------------
# Solvers, orders, calibration, every strategy
# ------------------------------------------------------------------------------------------------

MULTISTEP = ["solver=dpm_solver_pp", "stepsize=[ddim,oss_shared]"]


@pytest.fixture(scope="module")
def multistep(tmp_path_factory) -> Path:
    return oss_exp(tmp_path_factory.mktemp("multistep") / "run", *MULTISTEP)


@pytest.mark.slow
def test_searched_orders_are_saved_run_and_drawn(multistep, tmp_path):
    orders = schedules(multistep)["oss_shared_4"].orders.tolist()
    assert orders[0] == 1  # it has no history yet
    assert orders[-1] == 1  # no polynomial in log-SNR reaches 0

    saved = f"task.schedule={multistep / 'schedules' / 'oss_shared_4.json'}"
    evaluated = oss_exp(tmp_path / "again", "solver=dpm_solver_pp", "task=evaluate", saved)
    assert metrics_of(evaluated)["rows"] == [row(multistep, "oss_shared", 4)]
    assert "oss_shared K=4 analytic start, orders 1-" in (multistep / "report.html").read_text()


@pytest.mark.slow
def test_states_in_host_memory_change_nothing(multistep, tmp_path, capsys):
    folder = oss_exp(tmp_path / "run", *MULTISTEP, "offload_states=true")
    assert times(folder) == times(multistep)

    for name in ("offload_states", "keep_calls"):
        with pytest.raises(SystemExit):
            oss_exp(tmp_path / "none", f"{name}=maybe")
        assert f"{name} must be true or false, got 'maybe'" in capsys.readouterr().err


@pytest.mark.slow
def test_fixed_orders_ignore_what_the_search_chose(multistep, tmp_path):
    fixed = oss_exp(tmp_path / "run", *MULTISTEP, "run_orders=fixed")
    assert times(fixed) == times(multistep)
    assert means(fixed)["ddim", 4] == means(multistep)["ddim", 4]
    ramp = schedules(multistep)["oss_shared_4"].orders.tolist() == [1, 2, 2, 1]
    assert (means(fixed)["oss_shared", 4] == means(multistep)["oss_shared", 4]) == ramp


@pytest.mark.slow
def test_orders_searched_with_another_solver_are_refused(multistep, tmp_path):
    saved = f"task.schedule={multistep / 'schedules' / 'oss_shared_4.json'}"
    with pytest.raises(SystemExit):
        oss_exp(tmp_path / "run", "task=evaluate", saved, "solver=unipc")
    oss_exp(tmp_path / "fixed", "task=evaluate", saved, "solver=unipc", "run_orders=fixed")


@pytest.mark.slow
def test_the_spread_is_the_amplitude_relative_to_the_teachers(compared):
    model = GaussianMixture.from_asset(
        "mixture_digits.safetensors", guidance=Guidance(), micro_batch=4096
    )
    items = list(NoiseDataset(0, HELD_OUT, 8, model.event_shape, None))
    noise = torch.stack([item["noise"] for item in items])

    def amplitudes(steps: StepSchedule) -> np.ndarray:
        samples = sample(Euler(), model.velocity(None), noise, steps).flatten(1)
        low, high = np.quantile(samples, [0.05, 0.95], axis=1)
        return high - low

    teacher = amplitudes(StepSchedule(FlowSchedule(shift=1.0).nodes(20)))
    student = amplitudes(schedules(compared)["edm_4"])
    expected = np.mean(student / teacher)
    assert row(compared, "edm", 4)["spread"]["mean"] == pytest.approx(expected, rel=1e-5)


@pytest.fixture(scope="module")
def calibration(tmp_path_factory) -> str:
    """The setting of a solver that is calibrated for the comparison."""
    folder = tmp_path_factory.mktemp("calibration") / "run"
    oss_exp(folder, "task=calibrate", "task.samples=8", "num_steps=[4]")
    return f"solver.calibration={folder / 'calibration.json'}"


@pytest.mark.slow
def test_calibration_changes_the_students_and_not_the_teacher(compared, calibration, tmp_path):
    run = oss_exp(tmp_path / "run", calibration, "stepsize=[edm,oss_shared]")

    assert times(run) == times(compared, "edm", "oss_shared")
    with np.load(run / "samples.npz") as changed, np.load(compared / "samples.npz") as plain:
        assert (changed["teacher"] == plain["teacher"]).all()
        assert (changed["edm K=4"] != plain["edm K=4"]).any()
    assert calibration.endswith(metrics_of(run)["solver"]["calibration"])


@pytest.mark.slow
def test_a_schedule_planned_with_a_calibration_is_one_without(multistep, calibration, tmp_path):
    planned = oss_exp(tmp_path / "run", *MULTISTEP, "task=search", calibration)
    steps = schedules(planned)["oss_shared_4"]
    assert steps.orders is not None
    assert steps.about("solver") == schedules(multistep)["oss_shared_4"].about("solver")

    saved = f"task.schedule={planned / 'schedules' / 'oss_shared_4.json'}"
    evaluated = oss_exp(tmp_path / "again", "solver=dpm_solver_pp", "task=evaluate", saved)
    assert means(evaluated)["oss_shared", 4] == means(multistep)["oss_shared", 4]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("model=mixture_fashion", "made for model"),
        ("num_teacher_steps=30", "a teacher of 20 steps"),
    ],
)
def test_a_calibration_of_another_model_or_teacher_is_refused(
    other, message, calibration, tmp_path
):
    with pytest.raises(SystemExit):
        oss_exp(tmp_path, calibration, "stepsize=edm", other)
    assert message in (tmp_path / "error.log").read_text()


@pytest.mark.slow
def test_fitted_steps_are_evaluated_at_the_guidance_that_they_were_fitted_at(compared, tmp_path):
    saved = f"task.schedule={compared / 'schedules' / 'oss_fit_4.json'}"
    evaluated = oss_exp(tmp_path / "heun", "task=evaluate", saved, "solver=heun")
    assert row(evaluated, "oss_fit", 4)["nfe"] == 4  # its steps need no solver

    guided = ["data.classes=all", "model.guidance.scale=2"]
    with pytest.raises(SystemExit):
        oss_exp(tmp_path / "run", "task=evaluate", saved, *guided)
    assert "fitted at model.guidance=" in (tmp_path / "run" / "error.log").read_text()


@pytest.mark.slow
def test_every_strategy_runs_with_every_kind_of_solver(tmp_path):
    files = (CONF / "stepsize").glob("*.yaml")
    strategies = {file.stem for file in files} - {"pipeline"}  # of pipelines alone
    chosen = [f"stepsize=[{','.join(sorted(strategies))}]", "num_steps=[5]"]  # which all have
    chosen += [f"stepsize.{name}.iterations=3" for name in ("bns", "dyweight", "gs", "ld3")]

    for solver in ("unipc", "heun"):
        folder = oss_exp(tmp_path / solver, *chosen, f"solver={solver}")
        assert {name for name, _ in means(folder)} == strategies
    unipc = times(tmp_path / "unipc")
    assert unipc["ld3_5"] != unipc["ddim_5"]
