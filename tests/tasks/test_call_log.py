"""What was computed before a kill is not computed again, and the results are those of a run that was let alone."""

import fcntl
import json
import shutil

import pytest
import torch
from helpers import run_cli

from oss_exp.schedule import StepSchedule
from oss_exp.tasks import evaluate
from oss_exp.tasks.call_log import HEAD, Calls
from oss_exp.velocity import BoundVelocity

RUN = [
    "model=mixture_digits",
    "num_teacher_steps=12",
    "num_steps=[2,4]",
    "data.search_samples=4",
    "data.per_sample=2",
]
RUN += [
    "data.eval_samples=12",
    "data.batch_size=4",
    "logger=none",
    "trainer.enable_progress_bar=false",
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run_cli(*RUN, f"hydra.run.dir={folder}")
    return folder


def outcome(folder) -> tuple[dict, dict]:
    """Schedules and measurements: all but how long it took."""
    plans = {
        path.stem: StepSchedule.load(path) for path in (folder / "schedules").glob("*_[0-9].json")
    }
    times = {
        name: (plan.times.tolist(), str(plan.orders), str(getattr(plan.steps, "weights", None)))
        for name, plan in plans.items()
    }
    rows = json.loads((folder / "metrics.json").read_text())["rows"]
    for row in rows:
        row["planning"].pop("seconds")
    return times, rows


# ------------------------------------------------------------------------------------------------
# Calls
# ------------------------------------------------------------------------------------------------


class Network:
    """Counts what it is asked."""

    def __init__(self, calls: Calls):
        self.asked = 0
        self.velocity = calls.kept(BoundVelocity(self.answer, torch.arange(3), 64))

    def answer(self, x, t, condition):
        self.asked += 1
        return x * t[:, None].to(x) + condition[:, None]

    def work(self, calls: int, first: float = 1.0) -> torch.Tensor:
        x = torch.full((3, 2), first)
        for _ in range(calls):
            x = x + self.velocity(x, torch.full((3,), 0.5, dtype=torch.float64))
        return x


def done(folder, calls: int, first: float = 1.0) -> tuple[torch.Tensor, int]:
    """What the work comes to, and how often the network ran for it."""
    kept = Calls(folder, rank=0)
    network = Network(kept)
    with kept.of("work"):
        return network.work(calls, first), network.asked


def test_calls_that_were_made_are_answered_from_the_file(tmp_path):
    expected, asked = done(tmp_path, 5)
    assert asked == 5
    found, asked = done(tmp_path, 5)
    assert asked == 0
    assert torch.equal(found, expected)
    assert done(tmp_path, 8)[1] == 3
    assert done(tmp_path, 8)[1] == 0


@pytest.mark.parametrize("kept_bytes", [0, 3, 20, 150, -1, -30])
def test_a_file_that_was_cut_short_answers_what_it_still_can(tmp_path, kept_bytes):
    expected, _ = done(tmp_path, 4)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:kept_bytes])
    found, asked = done(tmp_path, 4)
    assert torch.equal(found, expected)
    assert 1 <= asked <= 4
    assert file.read_bytes() == whole


def test_zeros_at_the_end_are_no_answer(tmp_path):
    """A file system may leave such after a power cut."""
    expected, _ = done(tmp_path, 4)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole + bytes(64))
    assert done(tmp_path, 5)[1] == 1
    file.write_bytes(bytes(len(whole)))
    found, asked = done(tmp_path, 4)
    assert torch.equal(found, expected)
    assert asked == 4


def test_a_record_that_declares_more_than_an_answer_can_have_is_not_read(tmp_path):
    expected, _ = done(tmp_path, 4)
    (file,) = tmp_path.iterdir()
    question, answer, _ = HEAD.unpack(file.read_bytes()[: HEAD.size])
    file.write_bytes(HEAD.pack(question, answer, 1 << 62))
    found, asked = done(tmp_path, 4)
    assert torch.equal(found, expected)
    assert asked == 4


def test_calls_that_the_disk_has_no_room_for_are_refused(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    message = r"they come to about .* GB are free; free space, or set keep_calls=false"
    with pytest.raises(OSError, match=message), Calls(tmp_path, rank=0).of("work", 2 * free):
        pass


def test_damage_is_found_and_other_questions_are_not_answered(tmp_path):
    expected, _ = done(tmp_path, 4)
    (file,) = tmp_path.iterdir()
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    found, asked = done(tmp_path, 4)
    assert torch.equal(found, expected)
    assert 0 < asked < 4
    assert done(tmp_path, 4, first=2.0)[1] == 4


def test_gradients_go_through_the_network(tmp_path):
    kept = Calls(tmp_path, rank=0)
    network = Network(kept)
    t = torch.full((3,), 0.5, requires_grad=True)
    for _ in range(2):
        with kept.of("work"):
            network.velocity(torch.ones(3, 2), t).sum().backward()
    assert network.asked == 2


@pytest.mark.slow
def test_a_finished_run_leaves_no_calls_and_none_are_kept_unasked(whole, tmp_path):
    assert not (whole / "calls").exists()
    run_cli(*RUN, "keep_calls=false", f"hydra.run.dir={tmp_path}")
    assert outcome(tmp_path) == outcome(whole)


# ------------------------------------------------------------------------------------------------
# Runs
# ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_schedules_that_are_there_are_not_searched_again(whole, tmp_path):
    run_cli(*RUN, "task=search", f"hydra.run.dir={tmp_path}")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    (tmp_path / "schedules" / "oss_best_4.json").unlink()
    run_cli(*RUN, "task=search", f"hydra.run.dir={tmp_path}")
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    changed = {path.name for path in before if before[path] != after[path]}
    assert changed - {"teacher.json"} == {
        "oss_best_2.json",
        "oss_best_2.mean.json",
        "oss_best_4.json",
        "oss_best_4.mean.json",
    }


@pytest.mark.slow
def test_an_evaluation_goes_on_after_the_batches_that_it_has(tmp_path, monkeypatch):
    more = [
        "model=dit_fashion",
        "stepsize=[ddim,oss]",
        "metric=[fid,kid,class_agreement]",
        "num_steps=[2]",
    ]
    more += ["num_teacher_steps=4", "metric.kid.subset_size=4"]
    run_cli(*RUN, *more, f"hydra.run.dir={tmp_path / 'whole'}")
    monkeypatch.setattr(evaluate, "KEPT_EVERY", -1)
    step, asked = evaluate.EvaluateModule.test_step, []

    def dies(self, batch, batch_idx):
        if batch_idx == 2:
            raise RuntimeError("killed")
        step(self, batch, batch_idx)

    def counted(self, batch, batch_idx):
        asked.append(self.batches)
        step(self, batch, batch_idx)

    monkeypatch.setattr(evaluate.EvaluateModule, "test_step", dies)
    with pytest.raises(RuntimeError, match="killed"):
        run_cli(*RUN, *more, f"hydra.run.dir={tmp_path / 'killed'}")
    monkeypatch.setattr(evaluate.EvaluateModule, "test_step", counted)
    run_cli(*RUN, *more, f"hydra.run.dir={tmp_path / 'killed'}")
    assert asked == [2, 2, 2]
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")
    for name in ("samples.npz", "trajectories.npz"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / "killed" / "evaluation").exists()


@pytest.mark.slow
def test_a_folder_of_another_configuration_is_refused(whole, capsys):
    with pytest.raises(SystemExit):
        run_cli(*RUN, "num_teacher_steps=10", f"hydra.run.dir={whole}")
    assert "holds a run with another num_teacher_steps" in capsys.readouterr().err


def test_two_processes_do_not_work_in_one_folder(tmp_path, capsys):
    with (tmp_path / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(SystemExit):
            run_cli(*RUN, f"hydra.run.dir={tmp_path}")
    assert f"another process works in {tmp_path}" in capsys.readouterr().err
    assert not (tmp_path / "schedules").exists()
