"""A run that was killed computes nothing twice, and ends with the results of an undisturbed run."""

import fcntl
import shutil

import pytest
import torch
from helpers import metrics_of, run_cli
from PIL import Image

from oss_exp.evaluation.classifier import FashionFeatures
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


def outcome(folder) -> tuple[dict, list]:
    """Return the schedules and measurements of a run, without the time that it took."""
    plans = {}
    for path in (folder / "schedules").glob("*_[0-9].json"):
        steps = StepSchedule.load(path)
        fitted = str(getattr(steps.steps, "weights", None))
        plans[path.stem] = (steps.times.tolist(), str(steps.orders), fitted)
    rows = metrics_of(folder)["rows"]
    for row in rows:
        row["planning"].pop("seconds")
    return plans, rows


# ------------------------------------------------------------------------------------------------
# Calls
# ------------------------------------------------------------------------------------------------


class Network:
    """A network that counts its calls."""

    def __init__(self, calls: Calls):
        self.count = 0
        self.velocity = calls.recorded(BoundVelocity(self.answer, torch.arange(3), 64))

    def answer(self, x, t, condition):
        self.count += 1
        return x * t[:, None].to(x) + condition[:, None]

    def work(self, calls: int, first: float = 1.0) -> torch.Tensor:
        x = torch.full((3, 2), first)
        for _ in range(calls):
            x = x + self.velocity(x, torch.full((3,), 0.5, dtype=torch.float64))
        return x


def work(folder, calls: int, first: float = 1.0) -> tuple[torch.Tensor, int]:
    """Return the result of the work in a folder, and how often the network ran for it."""
    log = Calls(folder, rank=0)
    network = Network(log)
    with log.of("work"):
        return network.work(calls, first), network.count


def test_logged_calls_are_answered_from_the_file(tmp_path):
    expected, count = work(tmp_path, 5)
    assert count == 5

    result, count = work(tmp_path, 5)
    assert count == 0
    assert torch.equal(result, expected)
    assert work(tmp_path, 8)[1] == 3
    assert work(tmp_path, 8)[1] == 0


@pytest.mark.parametrize("length", [0, 3, 20, 150, -1, -30])
def test_a_file_that_was_cut_short_answers_what_it_still_can(tmp_path, length):
    expected, _ = work(tmp_path, 4)
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()

    file.write_bytes(content[:length])
    result, count = work(tmp_path, 4)

    assert torch.equal(result, expected)
    assert 1 <= count <= 4
    assert file.read_bytes() == content


def test_zeros_at_the_end_are_no_answer(tmp_path):
    """A file system may leave them after a power cut."""
    expected, _ = work(tmp_path, 4)
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()

    file.write_bytes(content + bytes(64))
    assert work(tmp_path, 5)[1] == 1

    file.write_bytes(bytes(len(content)))
    result, count = work(tmp_path, 4)
    assert torch.equal(result, expected)
    assert count == 4


def test_a_record_that_declares_more_than_an_answer_can_have_is_not_read(tmp_path):
    expected, _ = work(tmp_path, 4)
    (file,) = tmp_path.iterdir()
    question, answer, _ = HEAD.unpack(file.read_bytes()[: HEAD.size])

    file.write_bytes(HEAD.pack(question, answer, 1 << 62))
    result, count = work(tmp_path, 4)

    assert torch.equal(result, expected)
    assert count == 4


def test_calls_that_the_disk_has_no_room_for_are_refused(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    message = (
        r"they come to about .* GB are free; free space, or, for a search, set keep_calls=false"
    )
    with pytest.raises(OSError, match=message), Calls(tmp_path, rank=0).of("work", 2 * free):
        pass


def test_damaged_and_other_calls_are_computed_again(tmp_path):
    expected, _ = work(tmp_path, 4)
    (file,) = tmp_path.iterdir()
    content = bytearray(file.read_bytes())

    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    result, count = work(tmp_path, 4)

    assert torch.equal(result, expected)
    assert 0 < count < 4
    assert work(tmp_path, 4, first=2.0)[1] == 4


def test_gradients_go_through_the_network(tmp_path):
    log = Calls(tmp_path, rank=0)
    network = Network(log)
    t = torch.full((3,), 0.5, requires_grad=True)
    for _ in range(2):
        with log.of("work"):
            network.velocity(torch.ones(3, 2), t).sum().backward()
    assert network.count == 2


@pytest.mark.slow
def test_a_finished_run_leaves_no_log_of_calls(whole, tmp_path):
    assert not (whole / "calls").exists()
    run_cli(*RUN, "keep_calls=false", f"hydra.run.dir={tmp_path}")
    assert outcome(tmp_path) == outcome(whole)


# ------------------------------------------------------------------------------------------------
# Runs
# ------------------------------------------------------------------------------------------------


def test_statistics_go_on_where_they_were_killed(tmp_path, monkeypatch):
    """Ten batches; the first run ends in its sixth."""
    images = tmp_path / "images"
    images.mkdir()
    for i in range(20):
        Image.new("L", (28, 28), 12 * i).save(images / f"{i}.png")
    called = []
    forward = FashionFeatures.forward

    def ends_once(self, images):
        called.append(len(images))
        if len(called) == 6:
            raise SystemExit(143)
        return forward(self, images)

    monkeypatch.setattr(FashionFeatures, "forward", ends_once)
    folder = ["images=image_folder", f"images.root={images}", "images.size=28", "images.channels=1"]
    run = ["task=statistics", *folder, "task.batch_size=2"]

    def write(name: str) -> bytes:
        file = tmp_path / f"{name}.npz"
        run_cli(*run, f"task.output={file}", f"hydra.run.dir={tmp_path / name}")
        return file.read_bytes()

    with pytest.raises(SystemExit, match="143"):
        write("killed")
    assert write("killed") == write("whole")

    assert len(called) == 6 + 5 + 10
    assert not (tmp_path / "killed" / "calls").exists()


@pytest.mark.slow
def test_schedules_that_are_there_are_not_searched_again(whole, tmp_path):
    run_cli(*RUN, "task=search", f"hydra.run.dir={tmp_path}")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}

    (tmp_path / "schedules" / "oss_best_4.json").unlink()
    run_cli(*RUN, "task=search", f"hydra.run.dir={tmp_path}")

    changed = {path.name for path in before if path.stat().st_mtime_ns != before[path]}
    searched = {f"oss_best_{k}{suffix}.json" for k in (2, 4) for suffix in ("", ".mean")}
    assert changed - {"teacher.json"} == searched


MEASURED = [
    "model=dit_fashion",
    "stepsize=[ddim,oss]",
    "num_steps=[2]",
    "num_teacher_steps=4",
    "metric=[fid,kid,class_agreement]",
    "metric.kid.subset_size=4",
]


@pytest.fixture
def killed(tmp_path, monkeypatch):
    """The folder of an evaluation that died at its third batch, with all before it on disk."""
    step = evaluate.EvaluateModule.test_step

    def dies(self, batch, batch_idx):
        if batch_idx == 2:
            raise RuntimeError("killed")
        step(self, batch, batch_idx)

    monkeypatch.setattr(evaluate, "KEPT_EVERY", -1)
    with monkeypatch.context() as patch:
        patch.setattr(evaluate.EvaluateModule, "test_step", dies)
        with pytest.raises(RuntimeError, match="killed"):
            run_cli(*RUN, *MEASURED, f"hydra.run.dir={tmp_path / 'killed'}")
    return tmp_path / "killed"


@pytest.mark.slow
def test_an_evaluation_goes_on_after_its_last_batch(killed, tmp_path, monkeypatch):
    expected = tmp_path / "whole"
    run_cli(*RUN, *MEASURED, f"hydra.run.dir={expected}")
    step = evaluate.EvaluateModule.test_step
    batches = []

    def counted(self, batch, batch_idx):
        batches.append(self.batches)
        step(self, batch, batch_idx)

    monkeypatch.setattr(evaluate.EvaluateModule, "test_step", counted)
    run_cli(*RUN, *MEASURED, f"hydra.run.dir={killed}")

    assert batches == [2, 2, 2]
    assert outcome(killed) == outcome(expected)
    for name in ("samples.npz", "trajectories.npz"):
        assert (killed / name).read_bytes() == (expected / name).read_bytes()
    assert not (killed / "evaluation").exists()


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
