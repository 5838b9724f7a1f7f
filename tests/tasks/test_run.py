"""Whole runs of search, compare and evaluate on the digits mixture: what they leave, and that the numbers are true."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import run_cli, run_two_ranks
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


def metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def row(folder: Path, strategy: str, num_steps: int) -> dict:
    (found,) = [
        r
        for r in metrics(folder)["rows"]
        if (r["strategy"], r["num_steps"]) == (strategy, num_steps)
    ]
    return found


def means(folder: Path) -> dict[tuple[str, int], float]:
    return {(r["strategy"], r["num_steps"]): r["psnr"]["mean"] for r in metrics(folder)["rows"]}


def schedules(folder: Path) -> dict[str, StepSchedule]:
    files = [
        path
        for path in (folder / "schedules").glob("*.json")
        if not path.name.endswith(".mean.json")
    ]
    return {path.stem: StepSchedule.load(path) for path in files}


def times(folder: Path) -> dict[str, list]:
    return {name: steps.times.tolist() for name, steps in schedules(folder).items()}


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> Path:
    """Run folder of a comparison of all strategies with 2 and 4 steps."""
    return oss_exp(tmp_path_factory.mktemp("compared") / "run")


@pytest.fixture(scope="module")
def again(tmp_path_factory) -> Path:
    """The same once more."""
    return oss_exp(tmp_path_factory.mktemp("again") / "run")


def direct_psnr(
    steps: StepSchedule, guidance: float = 1.0, classes: list[int] | None = None
) -> torch.Tensor:
    """PSNR of the held-out samples with the library alone: noises, teacher and student without a task."""
    model = GaussianMixture.from_asset(
        "mixture_digits.safetensors", guidance=Guidance(guidance), micro_batch=4096
    )
    data = NoiseDataset(0, HELD_OUT, 8 if steps.samples is None else 4, model.event_shape, classes)
    noise = torch.stack([item["noise"] for item in data])
    labels = None if classes is None else torch.tensor([item["label"] for item in data])
    velocity = model.velocity(labels, Guidance(guidance))
    teacher = sample(Euler(), velocity, noise, StepSchedule(FlowSchedule(shift=1.0).nodes(20)))
    student = sample(Euler(), velocity, noise, steps, group=labels)
    return psnr(model.decode(student), model.decode(teacher))


# ------------------------------------------------------------------------------------------------
# What a run leaves
# ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_comparison_leaves_exactly_these_files(compared):
    plans = [f"{name}_{k}" for name in STRATEGIES for k in (2, 4)]
    analytic = [
        plan for plan in plans if any(word in plan for word in ("analytic", "fit", "shared"))
    ]
    expected = {f"schedules/{plan}.json" for plan in plans}
    expected |= {
        f"schedules/{plan}.mean{suffix}"
        for plan in analytic
        for suffix in (".json", ".safetensors")
    }
    expected |= {
        "config.yaml",
        "metrics.json",
        "table.md",
        "schedules.png",
        "samples.png",
        "samples.npz",
    }
    expected |= {"trajectories.npz", "teacher.json"}
    expected |= {
        "report.html",
        ".lock",
        *(f".hydra/{name}.yaml" for name in ("config", "hydra", "overrides")),
    }
    left = {path.relative_to(compared).as_posix() for path in compared.rglob("*") if path.is_file()}
    assert left == expected


@pytest.mark.slow
def test_every_step_schedule_says_what_made_it(compared):
    plans = schedules(compared)
    assert set(plans) == {f"{name}_{k}" for name in STRATEGIES for k in (2, 4)}
    for name, steps in plans.items():
        strategy, k = name.rsplit("_", 1)
        assert steps.num_steps == int(k)
        about = steps.provenance
        assert about["model"]["name"] == "mixture_digits"
        assert about["model"]["sha256"] == sha256(
            (ASSETS / "mixture_digits.safetensors").read_bytes()
        )
        assert about["teacher"]["num_steps"] == 20
        assert about["teacher"]["noise_schedule"] == {
            "_target_": "oss_exp.FlowSchedule",
            "shift": 1.0,
        }
        assert about["solver"]["_target_"] == "oss_exp.Euler"
        assert about["distance"]["_target_"] == "oss_exp.XtMSE"
        assert about["strategy"]["name"] == strategy
        assert about["strategy"]["baseline"] == (not strategy.startswith("oss"))
        assert about["seed"] == 0
        planning = about["planning"]
        assert planning["search_samples"] == (4 if strategy == "oss" else 6)
        assert (planning["network_calls_per_sample"] > 20) == strategy.startswith("oss")
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
    for steps in schedules(folder).values():
        native = steps.about("native")
        assert native["clock"] == "flow time"
        tau = torch.tensor(native["times"], dtype=torch.float64)
        torch.testing.assert_close(FlowPath(shift=1.0, time_scale=1.0).canonical(tau), steps.times)
    assert native_times(EDMPath(), torch.tensor([1.0, 0.5, 0.0])) == {
        "clock": "sigma",
        "times": [None, 1.0, 0.0],
    }


@pytest.mark.slow
def test_a_search_leaves_step_schedules_and_no_measurement(tmp_path, compared):
    folder = oss_exp(tmp_path / "run", "task=search", "stepsize=[edm,oss_ave]")
    assert times(folder) == {
        name: t for name, t in times(compared).items() if name.startswith(("edm", "oss_ave"))
    }
    left = {path.name for path in folder.iterdir()}
    assert left == {"config.yaml", "teacher.json", "schedules", "schedules.png", ".hydra", ".lock"}


@pytest.mark.slow
def test_the_saved_configuration_is_resolved_and_holds_what_was_asked_for(compared):
    text = (compared / "config.yaml").read_text()
    config = OmegaConf.create(text)
    assert "${" not in text
    assert (config.num_steps, config.num_teacher_steps, config.data.search_samples) == (
        [2, 4],
        20,
        6,
    )
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
    found = row(compared, strategy, k)
    assert found["psnr"]["mean"] == pytest.approx(float(direct.mean()), abs=1e-4)
    assert found["psnr"]["n"] == len(direct)
    assert found["per_image"]["index"] == list(range(HELD_OUT, HELD_OUT + len(direct)))
    assert found["per_image"]["psnr"] == pytest.approx(direct.tolist(), abs=1e-3)
    assert found["nfe"] == k


@pytest.mark.slow
def test_per_sample_rows_are_measured_on_the_samples_that_they_were_planned_for(compared):
    steps = schedules(compared)["oss_4"]
    assert steps.samples == tuple(range(HELD_OUT, HELD_OUT + 4))
    assert [r["psnr"]["n"] for r in metrics(compared)["rows"]] == [
        4 if n == "oss" else 8 for n, _ in means(compared)
    ]


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


@pytest.mark.slow
def test_trajectories_are_the_predictions_on_the_way_to_the_samples(compared, tmp_path):
    with (
        np.load(compared / "trajectories.npz") as file,
        np.load(compared / "samples.npz") as samples,
    ):
        whole = dict(file)
        oss = {f"oss K={k}" for k in (2, 4)}  # too few for samples.npz
        assert {key.removeprefix("x0/") for key in whole if key.startswith("x0/")} == {
            *samples,
            *oss,
        }
        for label, pictures in samples.items():
            assert np.array_equal(whole[f"x0/{label}"][:, -1], pictures[:4])
            if "fit" not in label:
                assert np.array_equal(whole[f"x0/{label}"][:, -2], pictures[:4]), (
                    "Euler's last step goes all the way"
                )
    assert whole["x0/teacher"].shape == (4, 9, 8, 8, 1)
    assert whole["times/teacher"] == pytest.approx(
        np.array([[1, 0.85, 0.75, 0.6, 0.45, 0.3, 0.2, 0.05, 0]] * 4), abs=1e-12
    )
    for name, steps in schedules(compared).items():
        label = name.replace("_2", " K=2").replace("_4", " K=4")
        assert np.array_equal(
            whole[f"times/{label}"], np.broadcast_to(steps.times[..., :], (4, steps.num_steps + 1))
        )
    folder = oss_exp(
        tmp_path / "run", "data.batch_size=3", "stepsize=[edm,oss]", "evaluation.trajectories=5"
    )
    with np.load(folder / "trajectories.npz") as small:
        assert len(small["x0/edm K=4"]) == 5
        for key in ("times/oss K=4", "x0/oss K=4"):
            assert key not in small, "it has only four"
        assert np.abs(small["x0/edm K=4"][:4].astype(int) - whole["x0/edm K=4"]).max() <= 1


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
    (found,) = metrics(folder)["rows"]
    assert found == row(compared, strategy, int(k))
    assert times(folder) == {name: times(compared)[name]}


@pytest.mark.slow
def test_evaluating_without_a_schedule_plans_one(compared, tmp_path):
    folder = oss_exp(tmp_path / "run", "task=evaluate", "stepsize=edm")
    assert means(folder) == {("edm", k): means(compared)["edm", k] for k in (2, 4)}


@pytest.mark.slow
def test_guidance_doubles_the_network_rows(tmp_path):
    folder = oss_exp(
        tmp_path / "run", "data.classes=all", "model.guidance.scale=2", "stepsize=[edm,oss_shared]"
    )
    for strategy in ("edm", "oss_shared"):
        for k in (2, 4):
            direct = direct_psnr(
                schedules(folder)[f"{strategy}_{k}"], guidance=2.0, classes=list(range(10))
            )
            found = row(folder, strategy, k)
            assert found["nfe"] == 2 * k
            assert found["psnr"]["mean"] == pytest.approx(float(direct.mean()), abs=1e-4)


@pytest.mark.slow
def test_heun_counts_its_second_calls(tmp_path):
    folder = oss_exp(tmp_path / "run", "solver=heun", "stepsize=edm")
    assert [row(folder, "edm", k)["nfe"] for k in (2, 4)] == [3, 7]


@pytest.mark.slow
def test_a_student_with_the_teachers_steps_is_the_teacher(tmp_path):
    folder = oss_exp(tmp_path / "run", "stepsize=[fm,edm]", "num_steps=[20]")
    assert row(folder, "fm", 20)["psnr"] == {
        "mean": CEILING,
        "low": CEILING,
        "high": CEILING,
        "n": 8,
    }
    assert row(folder, "edm", 20)["psnr"]["mean"] < CEILING


@pytest.mark.slow
def test_another_seed_measures_other_noises(compared, tmp_path):
    folder = oss_exp(tmp_path / "run", "data.seed=1", "stepsize=edm")
    assert row(folder, "edm", 4)["psnr"]["mean"] != pytest.approx(
        row(compared, "edm", 4)["psnr"]["mean"], abs=1e-3
    )


def test_one_held_out_sample_has_no_interval(tmp_path):
    folder = oss_exp(tmp_path / "run", "data.eval_samples=1", "stepsize=[edm,oss]", "num_steps=[2]")
    assert [(r["psnr"]["n"], r["psnr"]["low"]) for r in metrics(folder)["rows"]] == [
        (1, None),
        (1, None),
    ]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="gloo")
def test_two_processes_give_the_schedules_and_the_psnr_of_one(compared, tmp_path):
    # An odd number of search samples and of images: a rank repeats one, which must not count twice.
    settings = ["data.search_samples=5", "data.eval_samples=7", "data.per_sample=3"]
    run_two_ranks(*SMALL, *settings, "hydra.run.dir=two", folder=tmp_path)
    one, two = oss_exp(tmp_path / "one", *settings), tmp_path / "two"
    assert times(two) == times(one)
    assert means(two) == pytest.approx(means(one), abs=1e-3)  # float32 states
    assert [r["per_image"]["index"] for r in metrics(two)["rows"]] == [
        r["per_image"]["index"] for r in metrics(one)["rows"]
    ]
    with np.load(two / "trajectories.npz") as found, np.load(one / "trajectories.npz") as expected:
        assert list(found) == list(expected)
        for key, values in expected.items():
            assert np.abs(found[key].astype(float) - values).max() <= 1


# ------------------------------------------------------------------------------------------------
# Solvers, orders, calibration, every strategy
# ------------------------------------------------------------------------------------------------

MULTISTEP = ["solver=dpm_solver_pp", "stepsize=[ddim,oss_shared]"]


@pytest.fixture(scope="module")
def multistep(tmp_path_factory) -> Path:
    return oss_exp(tmp_path_factory.mktemp("multistep") / "run", *MULTISTEP)


@pytest.mark.slow
def test_searched_orders_are_saved_run_and_drawn(multistep, tmp_path):
    steps = schedules(multistep)["oss_shared_4"]
    assert (
        steps.orders.tolist()[0] == steps.orders.tolist()[-1] == 1
    )  # warm-up; no polynomial in log-SNR reaches 0
    saved = f"task.schedule={multistep / 'schedules' / 'oss_shared_4.json'}"
    evaluated = oss_exp(tmp_path / "again", "solver=dpm_solver_pp", "task=evaluate", saved)
    assert metrics(evaluated)["rows"] == [row(multistep, "oss_shared", 4)]
    assert "oss_shared K=4 analytic start, orders 1-" in (multistep / "report.html").read_text()


@pytest.mark.slow
def test_states_in_host_memory_change_nothing(multistep, tmp_path, capsys):
    assert times(oss_exp(tmp_path / "run", *MULTISTEP, "offload_states=true")) == times(multistep)
    for name in ("offload_states", "keep_calls"):
        with pytest.raises(SystemExit):
            oss_exp(tmp_path / "none", f"{name}=maybe")
        assert f"{name} must be true or false, got 'maybe'" in capsys.readouterr().err


@pytest.mark.slow
def test_fixed_orders_ignore_what_the_search_chose(multistep, tmp_path):
    fixed = oss_exp(tmp_path / "run", *MULTISTEP, "run_orders=fixed")
    assert times(fixed) == times(multistep)
    assert means(fixed)["ddim", 4] == means(multistep)["ddim", 4]
    steps = schedules(multistep)["oss_shared_4"]
    assert (steps.orders.tolist() == [1, 2, 2, 1]) == (
        means(fixed)["oss_shared", 4] == means(multistep)["oss_shared", 4]
    )


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
    noise = torch.stack(
        [item["noise"] for item in NoiseDataset(0, HELD_OUT, 8, model.event_shape, None)]
    )
    plans = StepSchedule(FlowSchedule(shift=1.0).nodes(20)), schedules(compared)["edm_4"]
    velocity = model.velocity(None)
    teacher, student = (
        np.quantile(sample(Euler(), velocity, noise, p).flatten(1), [0.05, 0.95], axis=1)
        for p in plans
    )
    expected = np.mean((student[1] - student[0]) / (teacher[1] - teacher[0]))
    assert row(compared, "edm", 4)["spread"]["mean"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_calibration_changes_the_students_and_not_the_teacher(compared, tmp_path):
    table = (
        oss_exp(tmp_path / "table", "task=calibrate", "task.samples=8", "num_steps=[4]")
        / "calibration.json"
    )
    run = oss_exp(tmp_path / "run", f"solver.calibration={table}", "stepsize=[edm,oss_shared]")
    assert times(run) == {
        name: t for name, t in times(compared).items() if name.startswith(("edm", "oss_shared"))
    }
    with np.load(run / "samples.npz") as changed, np.load(compared / "samples.npz") as plain:
        assert (changed["teacher"] == plain["teacher"]).all()
        assert (changed["edm K=4"] != plain["edm K=4"]).any()
    for other, words in (
        ("model=mixture_fashion", "made for model"),
        ("num_teacher_steps=30", "a teacher of 20 steps"),
    ):
        with pytest.raises(SystemExit):
            oss_exp(tmp_path / "other", f"solver.calibration={table}", "stepsize=edm", other)
        assert words in (tmp_path / "other" / "error.log").read_text()


@pytest.mark.slow
def test_fitted_steps_are_evaluated_at_the_guidance_that_they_were_fitted_at(compared, tmp_path):
    saved = f"task.schedule={compared / 'schedules' / 'oss_fit_4.json'}"
    again = oss_exp(
        tmp_path / "again", "task=evaluate", saved, "solver=heun"
    )  # they need no solver
    assert row(again, "oss_fit", 4)["nfe"] == 4
    with pytest.raises(SystemExit):
        oss_exp(
            tmp_path / "run", "task=evaluate", saved, "data.classes=all", "model.guidance.scale=2"
        )
    assert "fitted at model.guidance=" in (tmp_path / "run" / "error.log").read_text()


@pytest.mark.slow
def test_every_strategy_runs_with_every_kind_of_solver(tmp_path):
    every = sorted(
        {file.stem for file in (CONF / "stepsize").glob("*.yaml")} - {"pipeline"}
    )  # of pipelines alone
    chosen = [f"stepsize=[{','.join(every)}]", "num_steps=[5]"]  # which all have
    chosen += [f"stepsize.{name}.iterations=3" for name in ("bns", "dyweight", "gs", "ld3")]
    for solver in ("unipc", "heun"):
        folder = oss_exp(tmp_path / solver, *chosen, f"solver={solver}")
        assert {name for name, _ in means(folder)} == set(every)
    assert times(tmp_path / "unipc")["ld3_5"] != times(tmp_path / "unipc")["ddim_5"]
