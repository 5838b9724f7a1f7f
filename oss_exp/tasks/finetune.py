"""Finetune a network in stages: every stage of a step schedule gets its own parameters.

All stages begin with the model's parameters (OSS, section 4.2.3). There are three objectives:

- `jump` needs no images. From the teacher's state at a step's first time, one Euler jump should
  reach the teacher's state at its last time (as in BOSS, arXiv 2312.16414).
- `progressive` does the same, but from the states that the earlier, trained stages lead to.
- `diffusion` is the model's training loss on images, at times within the stage.

Everything is saved in task.output: the teacher's states, the checkpoints, and what
`stages=FOLDER` loads. Several jobs may share this folder, with one stage each. Files that exist
are used, so a run that was killed resumes with the same command.
"""

from __future__ import annotations

import re
import resource
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise, starmap
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from oss_exp.data.noise import TRAINING
from oss_exp.escaping import PlainConsole
from oss_exp.files import TABLE_LIMIT, load_record, write_atomically
from oss_exp.models.network import Network, adaptive_norms
from oss_exp.models.stages import (
    BASE,
    DOWN,
    UP,
    FinetuneRecord,
    Staged,
    StageFolder,
    StageParameters,
    StageRecord,
)
from oss_exp.schedule import FittedSteps, StepSchedule
from oss_exp.solvers import Euler
from oss_exp.tasks import border
from oss_exp.tasks.collective import agreed
from oss_exp.tasks.compatibility import check_fits, require_same
from oss_exp.tasks.jumps import Jumps, States, jump_loss, student_states, teacher_states
from oss_exp.tasks.pretrain import Examples, Times, load_images, require_fitting
from oss_exp.tasks.run import Run
from oss_exp.tasks.search import plan
from oss_exp.tasks.task import Count, Positive, Share, Whole
from oss_exp.tasks.training import Precision, Training, TrainingTask, fit, origin, require_wide

LORA = re.compile(r"(?P<layer>.+)\.lora_(?P<part>[AB])\.stage\.weight")  # peft's names
CHECKED = 256  # examples on which a stage is measured before and after


@dataclass(frozen=True, kw_only=True)
class Finetune(TrainingTask):
    """Train `stage`, or one stage after the other, of a schedule cut into `num_stages`.

    Attributes:
        schedule: Path of a step schedule. None: plan the one `stepsize` for the one K of
            num_steps.
        allow_other_model: Accept a schedule that was searched on other weights.
        num_stages: Number of stages.
        stage: Number of the stage, from 0, the noisiest; "all": from the noise on.
        objective: See the module.
        trainable: All parameters, only those of adaptive layer norms, or low-rank changes.
        lora_rank: Rank of the low-rank changes.
        trajectories: Trajectories of the teacher from which jumps are learned.
        precision: Precision of the training.
        output: The folder of the stages.
    """

    schedule: str | None = None
    allow_other_model: bool = False
    num_stages: Annotated[int, Ge(2)] = 5
    stage: Literal["all"] | Whole = "all"
    objective: Literal["jump", "progressive", "diffusion"] = "jump"
    trainable: Literal["full", "adaln", "lora"] = "full"
    lora_rank: Count = 8
    trajectories: Count = 4096
    max_steps: Count = 1000
    learning_rate: Positive = 3.0e-4
    warmup_steps: Whole = 50
    ema_decay: Share = 0.99
    precision: Precision = "bf16-mixed"
    save_every: Count = 250
    output: str

    def __post_init__(self) -> None:
        if self.stage != "all" and self.stage >= self.num_stages:
            raise ValueError(
                f"task.stage must be all, or a number from 0 to {self.num_stages - 1}, got "
                f"{self.stage}"
            )

    def __call__(self, cfg: DictConfig) -> Logger | None:
        # Configuration and images.
        output = Path(self.output)
        if (self.objective == "diffusion") != ("images" in cfg):
            advice = "needs images: images=fashion_mnist_32 or others"
            if "images" in cfg:
                advice = "takes no images"
            raise ValueError(f"task.objective={self.objective} {advice}")
        require_same(cfg, output, "stage", "output")
        config_text = OmegaConf.to_yaml(cfg, resolve=True)
        images = load_images(cfg.images) if "images" in cfg else None

        # Model and schedule.
        run = Run(cfg)
        network = self._network(run)
        if images is not None:
            _check_images(images, network, run.data.prompts)
        steps = _schedule(self, run, output)
        stages = spans(steps.num_steps, self.num_stages)

        # The folder of the stages.
        base = {"name": network.name, "sha256": network.fingerprint}
        ends = tuple(float(steps.times[span.start]) for span in stages[1:])
        folder = StageFolder(output, base, ends)
        rank_zero_only(folder.save)()
        rank_zero_only(write_atomically)(output / "config.yaml", config_text)

        # Training.
        logger = border.build(cfg.logger, "logger", Logger | None)
        for stage in range(len(folder)) if self.stage == "all" else [self.stage]:
            if not agreed(run.trainer, folder.file(stage).with_suffix(".json").is_file):
                _train(self, run, folder, steps, stages, stage, images, logger)
        if rank_zero_only.rank == 0:
            _report(folder, Path(cfg.paths.output_dir))
        return logger

    def _network(self, run: Run) -> Network:
        """Return the network to train; raise ValueError if it or the rest does not suit."""
        model = run.setting.model
        if not isinstance(model, Network):
            raise ValueError(
                f"task=finetune trains networks; model={model.name} has no weights to train"
            )
        require_wide(run.trainer, model.backbone.parameters())  # the trainer of their states

        if self.trainable == "adaln" and not adaptive_norms(model.backbone):
            raise ValueError(
                f"task.trainable=adaln: model={model.name} names no adaptive layer norms; choose "
                "full or lora"
            )

        if self.objective != "diffusion" and not isinstance(run.setting.solver, Euler):
            raise ValueError(
                f"task.objective={self.objective} trains jumps of solver=euler; choose it, or "
                "task.objective=diffusion"
            )
        return model


def spans(num_steps: int, num_stages: int) -> list[range]:
    """Return the steps of every stage, as even as whole numbers allow."""
    if num_stages > num_steps:
        raise ValueError(
            f"task.num_stages={num_stages} exceeds the {num_steps} steps of the schedule; "
            "choose fewer stages or a schedule with more steps"
        )
    ends = [stage * num_steps // num_stages for stage in range(num_stages + 1)]
    return list(starmap(range, pairwise(ends)))


def _check_images(images: Dataset, model: Network, prompts: list[str] | None) -> None:
    require_fitting(images, model)
    if getattr(images, "captions", None) != prompts:
        raise ValueError(
            f"the captions of `images` differ from the prompts of model={model.name}; choose "
            "images that belong to data.prompts"
        )


def _schedule(task: Finetune, run: Run, output: Path) -> StepSchedule:
    """Return the schedule of task.output, that of task.schedule, or a planned one.

    It is saved in task.output.
    """
    # The file, planned if there is none.
    saved = output / "schedule.json"
    is_saved = agreed(run.trainer, saved.is_file)
    path = saved if is_saved else task.schedule and Path(task.schedule).expanduser()
    if path is None:
        if len(run.strategies) != 1 or len(run.num_steps) != 1:
            raise ValueError(
                "task=finetune needs one schedule: set task.schedule=FILE.json, or one stepsize "
                f"and one K in num_steps, got {list(run.strategies)} and {run.num_steps}"
            )

        spans(run.num_steps[0], task.num_stages)  # raises before the work
        plan(run)
        path = run.file(next(iter(run.strategies)), run.num_steps[0])

    # Its fit.
    steps = StepSchedule.load(path)
    check_fits(run.setting, run.cfg, path, steps, task.allow_other_model)
    if steps.per_sample or isinstance(steps.steps, FittedSteps):
        kind = "a time for every sample" if steps.per_sample else "fitted steps"
        raise ValueError(
            f"step schedule {path} has {kind}; stages need one schedule for all samples, with "
            "plain steps, such as that of oss_ave"
        )

    spans(steps.num_steps, task.num_stages)
    rank_zero_only(steps.save)(saved)
    return steps


def _train(
    task: Finetune,
    run: Run,
    folder: StageFolder,
    steps: StepSchedule,
    stages: Sequence[range],
    stage: int,
    images: Any,
    logger: Logger | None,
) -> None:
    """Train one stage, and write its file."""
    network = run.setting.model
    span = stages[stage]
    is_last = span.stop == steps.num_steps
    end = 0.0 if is_last else float(steps.times[span.stop])

    # Examples and their loss.
    if task.objective == "diffusion":
        start = float(steps.start_time if stage == 0 else steps.times[span.start])
        times = Within(end, start)
        examples = Examples(images, task.seed, task.label_dropout, times, task.batch_size)
        loss = partial(_diffusion_loss, network)
    else:
        examples = _jumps(task, run, folder, steps, stages, stage)
        loss = partial(jump_loss, run.setting, steps, span, task.objective == "progressive")

    # Training; low-rank changes begin alike on every rank.
    torch.manual_seed(task.seed + stage)
    with training_mode(network.backbone, task.trainable, task.lora_rank) as parameters:
        last = folder.path / "checkpoints" / f"stage_{stage}.ckpt"
        module = StageModule(
            network, parameters, loss, examples, checkpoint=last, **task.settings()
        )
        resume = last if last.is_file() else None
        trainer = fit(run.cfg, task, module, logger, resume, precision=task.precision)

    # The stage's file. The weights come from the checkpoint, because a spawned process has them.
    if rank_zero_only.rank == 0:
        checkpoint = torch.load(last, map_location="cpu", weights_only=True)
        average = [checkpoint["state_dict"][f"average.{i}"] for i in range(len(parameters))]
        progress = checkpoint["progress"]
        record = {
            **origin(),
            "stage": stage,
            "times": [float(steps.times[span.start]), end],
            "steps": len(span),
            "parameters": sum(tensor.numel() for tensor in average),
            "training": {"steps": task.max_steps, **progress},
        }
        # A stage that training has not improved stays as it was.
        is_better = progress["loss_after"] < progress["loss_before"]
        tensors = dict(zip(parameters, average, strict=True)) if is_better else {}
        folder.save_stage(stage, tensors, record)
    trainer.strategy.barrier("the stage is on disk")


def _jumps(
    task: Finetune,
    run: Run,
    folder: StageFolder,
    steps: StepSchedule,
    stages: Sequence[range],
    stage: int,
) -> Jumps:
    """Return the jumps that a stage learns, after computing the states that are missing."""
    setting = run.setting
    network = setting.model
    noises = run.data.noises(TRAINING, task.trajectories)
    states = States(folder.path / "states", noises, run.data.batch_size)
    states.make("teacher", network, partial(teacher_states, setting, steps), run.trainer)

    # Progressive: states that the earlier stages lead to.
    progressive = task.objective == "progressive"
    start = None
    for earlier in range(stage if progressive else 0):
        model = Staged(network, StageParameters(network.backbone, folder, [earlier]))
        span = stages[earlier]
        times = steps.times[span.start : span.stop + 1]
        student = partial(student_states, replace(setting, model=model), states, start, times)
        start = f"student_{earlier + 1}"
        states.make(start, model, student, run.trainer)
        model.parameters_of.use(BASE)

    return Jumps(states, stages[stage], task.seed, progressive, start)


# --------------------------------------------------------------------------------------------------
# The objective `diffusion`
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Within(Times):
    """Times that are uniform between two times."""

    low: float
    high: float

    def __call__(self, u: Tensor) -> Tensor:
        return self.low + (self.high - self.low) * u


def _diffusion_loss(network: Network, batch: Mapping[str, Tensor]) -> Tensor:
    return network.loss(network.backbone, batch)


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


@contextmanager
def training_mode(backbone: nn.Module, kind: str, rank: int) -> Iterator[dict[str, nn.Parameter]]:
    """Give the parameters to train, and restore the backbone afterwards.

    Args:
        backbone: The network.
        kind: "full", "adaln" or "lora".
        rank: Rank of low-rank changes.

    Yields:
        The parameters, by the names that stages are saved under.
    """
    # Parameters by their names.
    tuner = _low_rank(backbone, rank) if kind == "lora" else None
    adaptive = adaptive_norms(backbone)
    parameters: dict[str, nn.Parameter] = {}
    for name, parameter in backbone.named_parameters():
        if kind == "full" or (kind == "adaln" and name in adaptive):
            parameters[name] = parameter
        elif kind == "lora" and (match := LORA.fullmatch(name)):
            suffix = DOWN if match["part"] == "A" else UP
            parameters[f"{match['layer']}.weight{suffix}"] = parameter

    # Training mode, undone at the end.
    originals = []
    for parameter in parameters.values():
        originals.append(parameter.detach().cpu().clone())
        parameter.requires_grad_(True)
    backbone.train()

    try:
        yield parameters
    finally:
        with torch.no_grad():
            for parameter, original in zip(parameters.values(), originals, strict=True):
                parameter.copy_(original)
        if tuner is not None:
            tuner.unload()
        backbone.requires_grad_(False).eval()


def _low_rank(backbone: nn.Module, rank: int) -> Any:
    """Add peft's low-rank changes to all linear layers; they begin as zero."""
    try:
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel
    except ImportError:
        raise ValueError("task.trainable=lora needs peft: pip install 'oss_exp[lora]'") from None
    linear = [name for name, module in backbone.named_modules() if type(module) is nn.Linear]
    return LoraModel(backbone, LoraConfig(r=rank, lora_alpha=rank, target_modules=linear), "stage")


class StageModule(Training):
    """The training of some parameters of a network, in place.

    The stage's parameters are their averages.

    Args:
        network: The network.
        parameters: The parameters to train, by name.
        loss: The loss of a batch, () float32.
        examples: The training examples.
        training: Arguments of `Training`.
    """

    def __init__(
        self,
        network: Network,
        parameters: Mapping[str, nn.Parameter],
        loss: Callable[[Mapping[str, Tensor]], Tensor],
        examples: Dataset,
        **training: Any,
    ):
        super().__init__(examples, **training)
        self.model = network
        self.find_loss = loss
        self.strict_loading = False
        self.trained = list(parameters.values())
        self.average = nn.ParameterList()
        for parameter in self.trained:
            self.average.append(nn.Parameter(parameter.detach().clone(), False))
        self.checked: dict[str, float] = {}  # loss on the first examples, before and after
        self.peak_bytes = 0

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return self.find_loss(batch)

    def weights(self) -> tuple[list[Tensor], list[Tensor]]:
        return self.trained, list(self.average)

    def on_train_start(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        if not self.checked:
            self.checked["loss_before"] = self._check()

    def on_save(self) -> None:
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if torch.cuda.is_available():
            used = torch.cuda.max_memory_allocated()
        self.peak_bytes = max(self.peak_bytes, used)
        if self.steps_taken == self.max_steps:
            self.checked["loss_after"] = self._check()

    @torch.no_grad()
    def _check(self) -> float:
        """Return the mean loss of the averaged parameters on the first examples."""
        self._swap()
        total = 0.0
        for numbers in torch.arange(CHECKED).split(self.batch_size):
            batch = default_collate([self.examples[i] for i in numbers.tolist()])
            loss = self.loss(self.trainer.strategy.batch_to_device(batch))
            total += float(loss) * len(numbers)
        self._swap()
        return total / CHECKED

    def _swap(self) -> None:
        for parameter, average in zip(self.trained, self.average, strict=True):
            parameter.data, average.data = average.data, parameter.data

    def progress(self) -> dict[str, Any]:
        return {**super().progress(), **self.checked, "peak_bytes": self.peak_bytes}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        stage_ids = {*map(id, self.trained), *map(id, self.average)}
        state = {}
        for name, parameter in self.named_parameters():
            if id(parameter) in stage_ids and name in checkpoint["state_dict"]:
                state[name] = checkpoint["state_dict"][name]
        checkpoint["state_dict"] = state

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        progress = checkpoint["progress"]
        self.checked = {key: value for key, value in progress.items() if key.startswith("loss_")}
        self.peak_bytes = progress["peak_bytes"]


def _report(folder: StageFolder, run_folder: Path) -> None:
    """Write finetune.json, the records of all trained stages, and print what is missing."""
    # Records of the stages on disk.
    stages = []
    missing = []
    for stage in range(len(folder)):
        file = folder.file(stage).with_suffix(".json")
        if file.is_file():
            record = load_record(file, StageRecord, "record of a stage", limit=TABLE_LIMIT)
            stages.append(record)
        else:
            missing.append(str(stage))

    record = FinetuneRecord(**folder.base, stages=stages)
    write_atomically(run_folder / "finetune.json", record.model_dump_json() + "\n")

    # The next command.
    advice = f"run it with stages={folder.path}"
    if missing:
        advice = f"still to train: stages {', '.join(missing)}"
    PlainConsole().print(f"{folder.path}: {advice}", soft_wrap=True)
