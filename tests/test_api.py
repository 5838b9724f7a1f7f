"""The public verbs give what their parts give, to the bit, and refuse wrong arguments."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from helpers import run_cli

import oss_exp
from oss_exp import solvers
from oss_exp.data.noise import HELD_OUT, NoiseDataset
from oss_exp.evaluation.comparison import NOTE, with_gains
from oss_exp.models.families.mixture import GaussianMixture
from oss_exp.models.guidance import Guidance
from oss_exp.report.results import read_run
from oss_exp.velocity import BoundVelocity

POINTS = torch.tensor([[2.0, 0.0], [-1.0, 1.5], [-1.0, -1.5]])
SHORT = {"num_teacher_steps": 20}


def velocity(x, t):
    """Return the exact velocity of data on three points."""
    t = t.to(x)[:, None]
    gap = x[:, None] - (1 - t[..., None]) * POINTS
    x0 = (-gap.square().sum(-1) / (2 * t**2)).softmax(-1) @ POINTS
    return (x - x0) / t


@pytest.fixture(scope="module")
def digits() -> GaussianMixture:
    return GaussianMixture.from_asset(
        "mixture_digits.safetensors", guidance=Guidance(), micro_batch=1024
    )


@pytest.fixture(scope="module")
def guided() -> GaussianMixture:
    return GaussianMixture.from_asset(
        "mixture_digits.safetensors", guidance=Guidance(scale=2.0), micro_batch=1024
    )


@pytest.fixture(scope="module")
def noise() -> torch.Tensor:
    return torch.randn(16, 2, generator=torch.Generator().manual_seed(0))


def drawn(first: int, count: int, model: GaussianMixture) -> torch.Tensor:
    """Return noises of the command line's seed."""
    dataset = NoiseDataset(0, first, count, model.event_shape, None)
    return torch.stack([dataset[i]["noise"] for i in range(count)])


def assert_same(a: oss_exp.StepSchedule, b: oss_exp.StepSchedule) -> None:
    """Assert that two schedules are equal, apart from their provenance."""
    assert torch.equal(a.times, b.times)
    assert a.start_time == b.start_time
    assert a.samples == b.samples


# --------------------------------------------------------------------------------------------------
# The import
# --------------------------------------------------------------------------------------------------


def test_the_package_is_imported_without_torch_in_less_than_three_tenths_of_a_second():
    """`python -X importtime -c "import oss_exp"` shows the parts."""
    command = (
        "import sys, time; start = time.perf_counter(); import oss_exp; "
        "print(time.perf_counter() - start, 'torch' in sys.modules)"
    )
    seconds = []
    for _ in range(3):
        process = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
        time, has_torch = process.stdout.split()
        seconds.append(float(time))
        assert has_torch == "False"

    assert min(seconds) < 0.3


@pytest.mark.slow
def test_the_verbs_need_no_hydra():
    heavy = {"hydra", "omegaconf", "lightning", "wandb"}
    command = f"import sys, oss_exp; oss_exp.compare; print({heavy} & {{*sys.modules}})"
    process = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    assert process.stdout.strip() == "set()", process.stderr


# --------------------------------------------------------------------------------------------------
# search
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "strategy", [oss_exp.OSSShared(), oss_exp.OSSAve(), oss_exp.OSS(), oss_exp.ClosedForm()]
)
def test_a_search_is_the_plan_of_its_strategy(noise, strategy):
    grid = oss_exp.FlowSchedule().nodes(20)
    problem = oss_exp.Problem(velocity, noise, grid, oss_exp.DPMSolverPP(), oss_exp.XtMSE())
    plans = strategy.plan(problem, [3, 5])

    result = oss_exp.search(velocity, noise, [5, 3], strategy=strategy, **SHORT)

    assert list(result) == [3, 5]
    for k in (3, 5):
        assert_same(result[k], plans[k])
        alone = oss_exp.search(velocity, noise, k, strategy=strategy, **SHORT)
        assert_same(alone, strategy.plan(problem, [k])[k])


def test_drawn_noises_are_those_of_the_command_line(digits):
    expected = oss_exp.search(digits, drawn(0, 6, digits), 3, **SHORT)
    assert_same(oss_exp.search(digits, 6, 3, **SHORT), expected)
    assert not torch.equal(oss_exp.search(digits, 6, 3, seed=1, **SHORT).times, expected.times)


def test_a_model_its_bound_velocity_and_a_function_have_one_schedule(digits):
    noise = drawn(0, 6, digits)
    bound = digits.velocity(None)
    assert isinstance(bound, BoundVelocity)
    first = oss_exp.search(digits, noise, 3, **SHORT)
    for other in (bound, lambda x, t: bound(x, t)):
        assert_same(oss_exp.search(other, noise, 3, **SHORT), first)


def test_a_teacher_that_begins_below_one_scales_the_noises(digits):
    teacher = oss_exp.EDMSchedule()
    grid = teacher.nodes(20)
    noise = drawn(0, 6, digits)
    rows = digits.velocity(None)
    problem = oss_exp.Problem(rows, noise * grid[0].float(), grid, oss_exp.Euler(), oss_exp.XtMSE())
    plan = oss_exp.OSSBest().plan(problem, [3])[3]

    steps = oss_exp.search(digits, noise, 3, teacher=teacher, solver=oss_exp.Euler(), **SHORT)
    assert_same(steps, plan)

    expected = solvers.sample(oss_exp.Euler(), rows, noise * float(grid[0]), plan)
    assert torch.equal(oss_exp.sample(digits, noise, steps), expected)


def test_conditions_are_taken_in_turn_and_have_means_of_their_own(guided):
    noise = drawn(0, 6, guided)
    condition = torch.tensor([3, 1])
    rows = condition[torch.arange(6) % 2]
    bound = guided.velocity(rows)
    grid = oss_exp.FlowSchedule().nodes(20)
    problem = oss_exp.Problem(
        bound,
        noise,
        grid,
        oss_exp.DPMSolverPP(),
        oss_exp.XtMSE(),
        group=rows,
        num_groups=guided.num_classes,
    )
    plan = oss_exp.OSSBest().plan(problem, [3])[3]

    steps = oss_exp.search(guided, noise, 3, condition=condition, **SHORT)
    assert_same(steps, plan)
    assert steps.about("model")["classes"] == [1, 3]

    expected = solvers.sample(oss_exp.DPMSolverPP(), bound, noise, plan, rows)
    assert torch.equal(oss_exp.sample(guided, noise, steps, condition=condition), expected)


def test_a_guided_model_gets_all_classes_in_turn(guided):
    assert_same(
        oss_exp.search(guided, 12, 3, **SHORT),
        oss_exp.search(guided, 12, 3, condition=torch.arange(guided.num_classes), **SHORT),
    )


def test_progress_is_drawn_if_asked_for(noise, capfd):
    oss_exp.search(velocity, noise, 3, **SHORT)
    assert capfd.readouterr() == ("", "")  # stderr is no terminal here
    oss_exp.search(velocity, noise, 3, progress=True, **SHORT)
    out, err = capfd.readouterr()
    assert out == ""
    assert "network calls a sample" in err


# --------------------------------------------------------------------------------------------------
# sample
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [oss_exp.Euler(), oss_exp.DPMSolverPP(order=3), oss_exp.Heun()])
def test_a_schedule_is_replayed_with_the_solver_it_was_searched_with(noise, solver, tmp_path):
    steps = oss_exp.search(velocity, noise, 4, solver=solver, **SHORT)
    expected = solvers.sample(solver, velocity, noise, steps)
    assert torch.equal(oss_exp.sample(velocity, noise, steps), expected)
    again = oss_exp.StepSchedule.load(steps.save(tmp_path / "steps.json"))
    assert solvers.solver_of(again) == solver
    assert torch.equal(oss_exp.sample(velocity, noise, again), expected)


@pytest.mark.slow
def test_a_schedule_of_the_command_line_is_sampled(digits, tmp_path):
    small = [
        "num_teacher_steps=20",
        "num_steps=[3]",
        "data.search_samples=6",
        "logger=none",
        "model=mixture_digits",
    ]
    search = ["task=search", "solver=unipc", "stepsize=[oss_shared]"]
    run_cli(*small, *search, f"hydra.run.dir={tmp_path}")

    steps = oss_exp.StepSchedule.load(tmp_path / "schedules" / "oss_shared_3.json")
    noise = drawn(HELD_OUT, 4, digits)
    expected = solvers.sample(solvers.solver_of(steps), digits.velocity(None), noise, steps)

    assert torch.equal(oss_exp.sample(digits, noise, steps), expected)
    assert torch.equal(oss_exp.sample(digits, 4, steps), expected)


@pytest.mark.slow
def test_the_command_line_measures_a_searched_schedule(digits, tmp_path):
    steps = oss_exp.search(digits, 6, 3, **SHORT)
    file = steps.save(tmp_path / "steps.json")
    small = ["num_teacher_steps=20", "data.eval_samples=12", "logger=none", "model=mixture_digits"]
    run_cli(
        *small,
        "task=evaluate",
        "solver=dpm_solver_pp",
        f"task.schedule={file}",
        f"hydra.run.dir={tmp_path}/run",
    )

    (result,) = read_run(tmp_path / "run")
    assert (result.strategy, result.num_steps, result.psnr.n) == ("OSSBest", 3, 12)


def test_times_by_hand_are_eulers(noise):
    steps = oss_exp.StepSchedule(torch.tensor([1.0, 0.5, 0.2, 0.0]))
    expected = solvers.sample(oss_exp.Euler(), velocity, noise, steps)
    assert torch.equal(oss_exp.sample(velocity, noise, steps), expected)


# --------------------------------------------------------------------------------------------------
# compare
# --------------------------------------------------------------------------------------------------


STRATEGIES = {
    "fm": oss_exp.ClosedForm(),
    "edm": oss_exp.ClosedForm(oss_exp.EDMSchedule()),
    "oss": oss_exp.OSS(),
    "oss_shared": oss_exp.OSSShared(),
}


@pytest.fixture(scope="module")
def comparison(digits):
    """A comparison of four strategies by the library."""
    return oss_exp.compare(digits, 6, [2, 4], held_out=40, strategies=STRATEGIES, **SHORT)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of the same comparison by the command line."""
    folder = tmp_path_factory.mktemp("compared")
    run_cli(
        "model=mixture_digits",
        "solver=dpm_solver_pp",
        f"stepsize=[{','.join(STRATEGIES)}]",
        "num_teacher_steps=20",
        "num_steps=[2,4]",
        "data.search_samples=6",
        "data.eval_samples=40",
        "logger=none",
        "trainer.enable_progress_bar=false",
        f"hydra.run.dir={folder}",
    )
    return folder


@pytest.mark.slow
def test_a_comparison_is_the_command_lines_to_the_digit(comparison, run):
    lines = with_gains(read_run(run))
    assert len(lines) == len(comparison.lines) == 8
    for ours, theirs in zip(comparison.lines, lines, strict=True):
        assert ours.result.values == theirs.result.values
        for name in ("strategy", "num_steps", "nfe", "baseline", "start", "psnr", "spread"):
            assert getattr(ours.result, name) == getattr(theirs.result, name), name
        assert ours.gain == theirs.gain
        calls = "network_calls_per_sample"
        assert ours.result.planning.get(calls) == theirs.result.planning.get(calls)

    for label, plans in comparison.schedules.items():
        for k, steps in plans.items():
            assert_same(steps, oss_exp.StepSchedule.load(run / "schedules" / f"{label}_{k}.json"))


@pytest.mark.slow
def test_a_schedule_says_what_the_command_lines_does(comparison, run):
    ours = comparison.schedules["oss_shared"][4].provenance
    theirs = oss_exp.StepSchedule.load(run / "schedules" / "oss_shared_4.json").provenance

    assert ours.keys() == theirs.keys()
    sections = "program versions teacher solver distance seed native strategy"
    for section in sections.split():
        assert ours[section] == theirs[section], section
    assert ours["planning"].keys() == theirs["planning"].keys()
    assert {**ours["model"], "prompts": None} == theirs["model"]


@pytest.mark.slow
def test_classes_are_compared_as_on_the_command_line(guided, tmp_path):
    run_cli(
        "model=mixture_digits",
        "model.guidance.scale=2.0",
        "solver=dpm_solver_pp",
        "stepsize=[fm,oss_shared]",
        "data.search_samples=6",
        "data.eval_samples=12",
        "num_teacher_steps=20",
        "num_steps=[3]",
        "logger=none",
        f"hydra.run.dir={tmp_path}",
    )
    strategies = {name: STRATEGIES[name] for name in ("fm", "oss_shared")}
    result = oss_exp.compare(guided, 6, 3, held_out=12, strategies=strategies, **SHORT)

    lines = with_gains(read_run(tmp_path))
    assert [line.result.nfe for line in lines] == [6, 6]
    assert len(result.lines) == 2
    for ours, theirs in zip(result.lines, lines, strict=True):
        assert ours.result.values == theirs.result.values
        assert ours.result.nfe == theirs.result.nfe
    saved = oss_exp.StepSchedule.load(tmp_path / "schedules" / "fm_3.json")
    assert {**result.about["model"], "prompts": None} == saved.about("model")


def test_batches_and_given_noises_change_nothing(digits, comparison):
    held_out = drawn(HELD_OUT, 40, digits)
    few = {name: STRATEGIES[name] for name in ("fm", "oss_shared")}
    result = oss_exp.compare(
        digits,
        drawn(0, 6, digits),
        [2, 4],
        held_out=held_out,
        strategies=few,
        batch_size=7,
        **SHORT,
    )

    expected = {(row["strategy"], row["num_steps"]): row["psnr"] for row in comparison.rows}
    for row in result.rows:
        psnr = expected[row["strategy"], row["num_steps"]]
        assert row["psnr"]["mean"] == pytest.approx(psnr["mean"], abs=1e-3)


def test_standard_strategies_that_do_not_fit_the_teacher_are_left_out(noise):
    """DDIM's second time of eight lies above the first of a teacher that begins at sigma 14.6."""
    teacher = oss_exp.EDMSchedule(sigma_max=14.6)
    options = {"num_steps": 8, "held_out": noise, "teacher": teacher, "num_teacher_steps": 16}
    labels = {row["strategy"] for row in oss_exp.compare(lambda x, t: x, noise, **options).rows}
    assert "oss_best" in labels
    assert "ddim" not in labels


def test_a_chosen_strategy_that_does_not_fit_the_teacher_is_refused(noise):
    teacher = oss_exp.EDMSchedule(sigma_max=14.6)
    options = {"num_steps": 8, "held_out": noise, "teacher": teacher, "num_teacher_steps": 16}
    mine = {"mine": oss_exp.ClosedForm(oss_exp.DDIMSchedule())}
    with pytest.raises(ValueError, match="above the teacher's first"):
        oss_exp.compare(lambda x, t: x, noise, strategies=mine, **options)


def test_a_function_is_compared_on_its_own_values(noise):
    result = oss_exp.compare(velocity, noise, 3, solver=oss_exp.Euler(), held_out=20, **SHORT)
    rows = {row["strategy"]: row for row in result.rows}
    assert rows.keys() == {"fm", "ddim", "edm", "logsnr", "gits", "oss_best"}

    held_out = NoiseDataset(0, HELD_OUT, 20, (2,), None)
    x = torch.stack([held_out[i]["noise"] for i in range(20)])
    teacher = solvers.trajectory(oss_exp.Euler(), velocity, x, oss_exp.FlowSchedule().nodes(20))[-1]
    gap = solvers.sample(oss_exp.Euler(), velocity, x, result.schedules["fm"][3]) - teacher
    expected = (-10 * gap.double().square().mean(1).log10()).clamp(max=120)
    assert rows["fm"]["per_image"]["psnr"] == pytest.approx(expected.tolist(), abs=1e-3)


def test_bound_conditions_are_taken_in_turn(digits):
    condition = torch.arange(4)
    bound = digits.velocity(condition)
    strategies = {"fm": oss_exp.ClosedForm()}
    noise = drawn(0, 4, digits)
    held_out = drawn(HELD_OUT, 8, digits)
    first = oss_exp.compare(
        bound, noise, 3, held_out=held_out, strategies=strategies, batch_size=3, **SHORT
    )

    tiled = digits.velocity(condition.repeat(2))
    steps = first.schedules["fm"][3]
    x0 = solvers.sample(oss_exp.DPMSolverPP(), tiled, held_out, steps)
    grid = oss_exp.FlowSchedule().nodes(20)
    teacher = solvers.trajectory(oss_exp.DPMSolverPP(), tiled, held_out, grid)[-1]
    expected = -10 * (x0 - teacher).double().square().flatten(1).mean(1).log10()

    assert first.rows[0]["per_image"]["psnr"] == pytest.approx(expected.tolist(), abs=1e-3)


def test_a_comparison_prints_itself(comparison):
    text = str(comparison)

    assert text == repr(comparison)
    assert text.startswith("mixture_digits: students against the 20-step teacher")
    for line in comparison.lines:
        assert str(line.result.psnr) in text
    assert " ".join(NOTE.split()) in " ".join(text.split())
    assert "\x1b" not in text  # no colours
    assert all(
        name in text
        for name in ("strategy", "NFE", "PSNR, dB", "gain, dB", "spread", "planning", "oss_shared")
    )


def test_long_labels_are_printed_whole(digits):
    label = "a strategy with a very long name " * 4
    result = oss_exp.compare(
        digits, 4, 2, held_out=4, strategies={label: oss_exp.ClosedForm()}, **SHORT
    )
    assert label.strip() in str(result)


def test_a_notebook_shows_a_table(comparison):
    html = comparison._repr_html_()
    assert html.count("<tr>") == 9
    assert "<td>oss_shared</td>" in html
    assert html.count("<th>*</th>") == 2  # a best baseline for each number of calls


def test_a_comparison_is_json(comparison):
    record = json.loads(json.dumps(comparison.to_dict()))

    strategies = [line.result.strategy for line in comparison.lines]
    assert [row["strategy"] for row in record["rows"]] == strategies
    assert record["rows"][0]["psnr"].keys() == {"mean", "low", "high", "n"}
    assert record["rows"][0]["gain"]["mean"] > 0
    assert [row["gain"] for row in record["rows"]].count(None) == 2
    assert record["solver"] == {
        "_target_": "oss_exp.DPMSolverPP",
        "order": 2,
        "lower_order_final": True,
        "calibration": None,
    }


# --------------------------------------------------------------------------------------------------
# Refusals
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_steps", "message"),
    [
        (0, r"num_steps must be whole numbers from 1 to 20 .*got \[0\].*num_teacher_steps"),
        (21, r"num_steps must be whole numbers from 1 to 20 .*got \[21\]"),
        (2.5, r"num_steps must be a whole number or a list of them, 5 or \[5, 10\], got 2.5"),
        ("abc", "num_steps must be a whole number or a list of them, .*got 'abc'"),
        (True, "num_steps must be a whole number or a list of them, .*got True"),
        ([5, "a"], "num_steps must be a whole number or a list of them, .*got"),
        ([], r"num_steps must be whole numbers .*got \[\]"),
    ],
)
@pytest.mark.parametrize("verb", [oss_exp.search, oss_exp.compare])
def test_a_wrong_num_steps_is_refused(noise, verb, num_steps, message):
    with pytest.raises(ValueError, match=message):
        verb(velocity, noise, num_steps, **SHORT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.to(torch.int64), "noise must be float32 or float64, got torch.int64"),
        (lambda x: x.half(), "noise must be float32 or float64, got torch.float16"),
        (lambda x: x / 0 * 0, "noise hold NaN or infinity"),
        (
            lambda x: x[0],
            r"noise must have the shape \(B, 1, 8, 8\), B at least 1, got \(1, 8, 8\)",
        ),
        (
            lambda x: x[:0],
            r"noise must have the shape \(B, 1, 8, 8\), B at least 1, got \(0, 1, 8, 8\)",
        ),
        (lambda x: x[:, :, :4], r"noise must have the shape \(B, 1, 8, 8\), .*got \(4, 1, 4, 8\)"),
        (
            lambda x: x.numpy(),
            r"noise must be a whole number of at least 1 or a tensor \(B, ...\), got",
        ),
        (lambda x: 0, "noise must be a whole number of at least 1 .*got 0"),
        (lambda x: 2.5, "noise must be a whole number of at least 1 .*got 2.5"),
    ],
)
def test_wrong_noises_are_refused(digits, change, message):
    noise = change(drawn(0, 4, digits))
    with pytest.raises(ValueError, match=message):
        oss_exp.search(digits, noise, 3, **SHORT)
    with pytest.raises(ValueError, match=message):
        oss_exp.sample(digits, noise, oss_exp.StepSchedule(torch.tensor([1.0, 0.0])))
    with pytest.raises(ValueError, match=message.replace("noise", "held_out", 1)):
        oss_exp.compare(digits, 4, 3, held_out=noise, **SHORT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"solver": oss_exp.Euler},
            r"solver must be an object such as Euler\(\), got the class Euler; call it",
        ),
        ({"solver": "euler"}, r"solver must be a Solver such as Euler\(\), got 'euler'"),
        (
            {"teacher": oss_exp.FlowSchedule},
            "teacher must be an object such as .*got the class FlowSchedule",
        ),
        ({"teacher": 100}, "teacher must be a NoiseSchedule such as .*got 100"),
        ({"distance": "xt_mse"}, "distance must be a Distance such as .*got 'xt_mse'"),
        (
            {"num_teacher_steps": 2.5},
            "num_teacher_steps must be a whole number of at least 1, got 2.5",
        ),
        ({"seed": -1}, "seed must be a whole number of at least 0, got -1"),
        (
            {"condition": "cat"},
            "condition must be a tensor with a row for each condition, got 'cat'",
        ),
        (
            {"condition": torch.tensor([10])},
            r"condition must be classes \(C,\) from 0 to 9, got \[10\]",
        ),
        (
            {"condition": torch.tensor([0.5])},
            r"condition must be classes \(C,\) from 0 to 9, got \[0.5\]",
        ),
    ],
)
@pytest.mark.parametrize("verb", [oss_exp.search, oss_exp.compare])
def test_wrong_options_are_refused(digits, verb, options, message):
    with pytest.raises(ValueError, match=message):
        verb(digits, 4, 3, **{**SHORT, **options})


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (
            oss_exp.OSSShared,
            r"must be an object such as OSSBest\(\), got the class OSSShared; call it",
        ),
        ("oss_shared", r"must be a StepsizeStrategy such as OSSBest\(\), got 'oss_shared'"),
        (oss_exp.Euler(), r"must be a StepsizeStrategy such as OSSBest\(\), got Euler"),
    ],
)
def test_wrong_strategies_are_refused(noise, strategy, message):
    with pytest.raises(ValueError, match="strategy " + message):
        oss_exp.search(velocity, noise, 3, strategy=strategy, **SHORT)
    with pytest.raises(ValueError, match=r"strategies\['mine'\] " + message):
        oss_exp.compare(velocity, noise, 3, strategies={"mine": strategy}, **SHORT)


@pytest.mark.parametrize("strategies", [["oss_shared"], {}, oss_exp.OSSShared()])
def test_strategies_other_than_a_dict_are_refused(noise, strategies):
    with pytest.raises(
        ValueError, match=r"strategies must be a dict such as \{'mine': OSSBest\(\)\}, got"
    ):
        oss_exp.compare(velocity, noise, 3, strategies=strategies, **SHORT)


@pytest.mark.parametrize("verb", [oss_exp.search, oss_exp.compare])
@pytest.mark.parametrize("wrong", ["a model", None, GaussianMixture])
def test_objects_that_are_no_velocity_are_refused(noise, verb, wrong):
    with pytest.raises(
        ValueError, match=r"velocity_or_model must be a function v\(x, t\) or a Model, got"
    ):
        verb(wrong, noise, 3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            lambda x, t: x.sum(1),
            r"must return a tensor of the shape of x, \(\d+, 2\), got .* shape \(\d+,\)",
        ),
        (
            lambda x, t: x[:, :1],
            r"must return a tensor of the shape of x, \(\d+, 2\), got .* shape \(\d+, 1\)",
        ),
        (lambda x, t: x.numpy(), r"must return a tensor of the shape of x, \(\d+, 2\), got array"),
        (lambda x, t: None, r"must return a tensor of the shape of x, \(\d+, 2\), got None"),
        (lambda x, t: x * float("nan"), "NaN or infini"),
        (lambda x, t: x / t.to(x)[:, None] ** 1000, "NaN or infini"),
    ],
)
def test_wrong_outputs_of_a_velocity_are_refused(noise, wrong, message):
    with pytest.raises(ValueError, match=message):
        oss_exp.search(wrong, noise, 3, **SHORT)
    with pytest.raises(ValueError, match=message):
        oss_exp.compare(wrong, noise, 3, strategies={"fm": oss_exp.ClosedForm()}, **SHORT)
    steps = oss_exp.StepSchedule(torch.tensor([1.0, 0.5, 0.25, 0.125, 0.0]))
    with pytest.raises(ValueError, match=message):
        oss_exp.sample(wrong, noise, steps)


def test_a_function_has_no_conditions_and_no_shape(noise):
    with pytest.raises(ValueError, match="condition is for models"):
        oss_exp.search(velocity, noise, 3, condition=torch.tensor([1]), **SHORT)
    with pytest.raises(
        ValueError, match="noise=8: a function does not tell the shape of its noises; give a tensor"
    ):
        oss_exp.search(velocity, 8, 3, **SHORT)


def test_a_distance_that_looks_inside_needs_a_model(noise):
    with pytest.raises(ValueError, match="Perceptual looks at a model's layer; give a Model"):
        oss_exp.search(velocity, noise, 3, distance=oss_exp.Perceptual("layer", 0.0), **SHORT)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (
            {5: None},
            r"steps must be a StepSchedule, got \{5: None\}; "
            r"choose one of its schedules, such as steps\[5\]",
        ),
        ("steps.json", "steps must be a StepSchedule, got 'steps.json'"),
        (torch.tensor([1.0, 0.0]), r"steps must be a StepSchedule, got a tensor of shape \(2,\)"),
    ],
)
def test_objects_that_are_no_schedule_are_refused(noise, steps, message):
    with pytest.raises(ValueError, match=message):
        oss_exp.sample(velocity, noise, steps)


def test_a_schedule_of_a_foreign_solver_needs_that_solver(noise):
    class Mine(oss_exp.Euler):
        pass

    steps = oss_exp.search(velocity, noise, 3, solver=Mine(), **SHORT)
    with pytest.raises(ValueError, match=r"Mine is no solver of oss_exp; give the solver itself"):
        oss_exp.sample(velocity, noise, steps)

    expected = oss_exp.sample(velocity, noise, steps, solver=oss_exp.Euler())
    assert torch.equal(oss_exp.sample(velocity, noise, steps, solver=Mine()), expected)


# ----------------------------------------------------------------------------------------------
# Several scales of guidance
# ----------------------------------------------------------------------------------------------

CLASSES = torch.arange(10)
AT_SCALES = {"num_steps": 5, "num_teacher_steps": 50, "strategy": oss_exp.OSSShared()}


def guided_digits(scale: float) -> GaussianMixture:
    return GaussianMixture.from_asset(
        "mixture_digits.safetensors", guidance=Guidance(scale=scale), micro_batch=4096
    )


def error_at(scale: float, steps: oss_exp.StepSchedule) -> float:
    """Return the mean log10 squared error to the teacher at a scale of guidance."""
    model = guided_digits(scale)
    solver = oss_exp.DPMSolverPP()
    noise = torch.randn(40, *model.event_shape, generator=torch.Generator().manual_seed(1))
    teacher = oss_exp.StepSchedule(oss_exp.FlowSchedule().nodes(50))
    expected = oss_exp.sample(model, noise, teacher, solver=solver, condition=CLASSES)
    x0 = oss_exp.sample(model, noise, steps, solver=solver, condition=CLASSES)
    return float((x0 - expected).flatten(1).square().mean(1).log10().mean())


def test_a_search_at_one_scale_is_that_of_a_model_with_this_scale():
    expected = oss_exp.search(guided_digits(3.0), 10, condition=CLASSES, **AT_SCALES)
    steps = oss_exp.search(guided_digits(1.0), 10, condition=CLASSES, guidance=[3.0], **AT_SCALES)
    assert torch.equal(steps.times, expected.times)
    assert steps.provenance["model"]["guidance_scales"] == [3.0]


@pytest.mark.slow
def test_a_schedule_for_all_scales_is_better_at_its_worst_than_those_for_one():
    scales = [1.0, 4.0]
    singles = [
        oss_exp.search(guided_digits(scale), 10, condition=CLASSES, **AT_SCALES) for scale in scales
    ]
    joint = oss_exp.search(guided_digits(1.0), 10, condition=CLASSES, guidance=scales, **AT_SCALES)
    worst = [max(error_at(scale, steps) for scale in scales) for steps in (joint, *singles)]
    assert worst[0] < min(worst[1:]) - 0.3


@pytest.mark.parametrize(
    ("model", "guidance", "message"),
    [
        (lambda x, t: -x, [1.0, 3.0], "a network with classes or prompts"),
        (guided_digits(1.0), 3.0, r"scales such as \[1, 3, 7\]"),
        (guided_digits(1.0), [], r"scales such as \[1, 3, 7\]"),
    ],
)
def test_scales_that_cannot_be_searched_are_refused(model, guidance, message):
    condition = CLASSES if isinstance(model, GaussianMixture) else None
    with pytest.raises(ValueError, match=message):
        oss_exp.search(
            model, torch.randn(4, 1, 8, 8), condition=condition, guidance=guidance, **AT_SCALES
        )
