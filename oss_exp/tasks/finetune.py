"""Give every stage of a step schedule parameters of its own, which all begin as the model's (OSS, section 4.2.3).

objective `jump`: no data; from the teacher's state at a step's first time, one Euler jump is to reach its state at the
last (BOSS, arXiv 2312.16414, trains so). `progressive`: the same, but from the states that the stages before it, as
they were trained, really come to. `diffusion`: the model's own loss on images, at times within the stage.

All is kept in task.output, which several jobs with a stage each may share: the teacher's states, checkpoints, and what
`stages=FOLDER` loads. What is there is not made again, so a run that was killed goes on with the same command.
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
from oss_exp.tasks.compatibility import check_fits, require_same
from oss_exp.tasks.jumps import Jumps, States, jump_loss, student_states, teacher_states
from oss_exp.tasks.pretrain import Examples, Times, load_images, require_fitting
from oss_exp.tasks.run import Run
from oss_exp.tasks.search import plan
from oss_exp.tasks.task import Count, Positive, Share, Whole
from oss_exp.tasks.training import Precision, Training, TrainingTask, fit, origin

LORA = re.compile(r"(?P<layer>.+)\.lora_(?P<part>[AB])\.stage\.weight")  # peft's names
CHECKED = 256  # examples that a stage is measured on before and after


@dataclass(frozen=True, kw_only=True)
class Finetune(TrainingTask):
    """Train `stage` (all: one after the other, from the noise on) of the `num_stages` of a schedule.

    schedule: a step schedule's file; null: plan the one `stepsize` for the one K of num_steps. stage: from 0, the
    noisiest, on. trajectories: of the teacher, to learn jumps from.
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
                f"task.stage must be all, or a number from 0 to {self.num_stages - 1}, got {self.stage}"
            )

    def __call__(self, cfg: DictConfig) -> Logger | None:
        output = Path(self.output)
        if (self.objective == "diffusion") != ("images" in cfg):
            wants = (
                "takes no images"
                if "images" in cfg
                else "needs images: images=fashion_mnist_32, or other"
            )
            raise ValueError(f"task.objective={self.objective} {wants}")
        require_same(cfg, output, "stage", "output")
        asked = OmegaConf.to_yaml(cfg, resolve=True)
        images = load_images(cfg.images) if "images" in cfg else None
        run = Run(cfg)
        if not isinstance(run.setting.model, Network):
            raise ValueError(
                f"task=finetune trains networks; model={run.setting.model.name} has no weights to train"
            )
        if self.trainable == "adaln" and not adaptive_norms(run.setting.model.backbone):
            raise ValueError(
                f"task.trainable=adaln: model={run.setting.model.name} names no adaptive layer norms; choose full or "
                "lora"
            )
        if images is not None:
            _check_images(images, run.setting.model, run.data.prompts)
        if self.objective != "diffusion" and not isinstance(run.setting.solver, Euler):
            raise ValueError(
                f"task.objective={self.objective} trains jumps of solver=euler; choose it, or diffusion"
            )
        steps = _schedule(self, run, output)
        stages = spans(steps.num_steps, self.num_stages)
        base = {"name": run.setting.model.name, "sha256": run.setting.model.fingerprint}
        folder = StageFolder(
            output, base, tuple(float(steps.times[span.start]) for span in stages[1:])
        )
        rank_zero_only(folder.save)()
        rank_zero_only(write_atomically)(output / "config.yaml", asked)
        logger = border.build(cfg.logger, "logger", Logger | None)
        for stage in range(len(folder)) if self.stage == "all" else [self.stage]:
            if not folder.file(stage).with_suffix(".json").is_file():
                _train(self, run, folder, steps, stages, stage, images, logger)
        if rank_zero_only.rank == 0:
            _report(folder, Path(cfg.paths.output_dir))
        return logger


def spans(num_steps: int, num_stages: int) -> list[range]:
    """The steps of each stage, as even as whole numbers allow."""
    if num_stages > num_steps:
        raise ValueError(
            f"task.num_stages={num_stages} exceeds the {num_steps} steps of the schedule, at whose times stages are "
            "cut; choose fewer stages or a schedule with more steps"
        )
    ends = [stage * num_steps // num_stages for stage in range(num_stages + 1)]
    return list(starmap(range, pairwise(ends)))


def _check_images(images: Dataset, model: Network, prompts: list[str] | None) -> None:
    require_fitting(images, model)
    if getattr(images, "captions", None) != prompts:
        raise ValueError(
            f"the captions of `images` are not the prompts of model={model.name}, which they number; choose images "
            "that belong together with data.prompts"
        )


def _schedule(task: Finetune, run: Run, output: Path) -> StepSchedule:
    """The one of task.output; else task.schedule; else one is planned. It is left in task.output."""
    kept = output / "schedule.json"
    path = kept if kept.is_file() else task.schedule and Path(task.schedule).expanduser()
    if path is None:
        if len(run.strategies) != 1 or len(run.num_steps) != 1:
            raise ValueError(
                "stages are cut at one schedule: set task.schedule=FILE.json, or one stepsize and one K in num_steps, "
                f"got {list(run.strategies)} and {run.num_steps}"
            )
        spans(run.num_steps[0], task.num_stages)  # a misfit shows before the work
        plan(run)
        path = run.file(next(iter(run.strategies)), run.num_steps[0])
    steps = StepSchedule.load(path)
    check_fits(run.setting, run.cfg, path, steps, task.allow_other_model)
    if steps.per_sample or isinstance(steps.steps, FittedSteps):
        kind = "a time for every sample" if steps.per_sample else "fitted steps"
        raise ValueError(
            f"step schedule {path} has {kind}; stages need times for all and plain steps, such as oss_ave's"
        )
    spans(steps.num_steps, task.num_stages)
    rank_zero_only(steps.save)(kept)
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
    """Write the stage's file."""
    setting, span = run.setting, stages[stage]
    network, clean = (
        setting.model,
        0.0 if span.stop == steps.num_steps else float(steps.times[span.stop]),
    )
    if task.objective == "diffusion":
        noisy = float(steps.start_time if stage == 0 else steps.times[span.start])
        examples = Examples(
            images, task.seed, task.label_dropout, Within(clean, noisy), task.batch_size
        )
        loss = partial(_diffusion_loss, network)
    else:
        states = States(
            folder.path / "states",
            run.data.noises(TRAINING, task.trajectories),
            run.data.batch_size,
        )
        states.make("teacher", network, partial(teacher_states, setting, steps), run.trainer)
        progressive, start = task.objective == "progressive", None
        for before in range(stage if progressive else 0):
            model = Staged(network, StageParameters(network.backbone, folder, [before]))
            times = steps.times[stages[before].start : stages[before].stop + 1]
            student = partial(student_states, replace(setting, model=model), states, start, times)
            start = f"student_{before + 1}"
            states.make(start, model, student, run.trainer)
            model.parameters_of.use(BASE)
        examples = Jumps(states, span, task.seed, progressive, start)
        loss = partial(jump_loss, setting, steps, span, progressive)
    torch.manual_seed(task.seed + stage)  # of low-rank changes, the same on every rank
    with trained(network.backbone, task.trainable, task.lora_rank) as parameters:
        last = folder.path / "checkpoints" / f"stage_{stage}.ckpt"
        module = StageModule(
            network, parameters, loss, examples, checkpoint=last, **task.settings()
        )
        trainer = fit(
            run.cfg,
            task,
            module,
            logger,
            last if last.is_file() else None,
            precision=task.precision,
        )
    if rank_zero_only.rank == 0:
        # What a spawned process did is there alone.
        checkpoint = torch.load(last, map_location="cpu", weights_only=True)
        average = [checkpoint["state_dict"][f"average.{i}"] for i in range(len(parameters))]
        record = {
            **origin(),
            "stage": stage,
            "times": [float(steps.times[span.start]), clean],
            "steps": len(span),
            "parameters": sum(each.numel() for each in average),
            "training": {"steps": task.max_steps, **checkpoint["progress"]},
        }
        better = (
            record["training"]["loss_after"] < record["training"]["loss_before"]
        )  # else it stays as it was
        folder.save_stage(
            stage, dict(zip(parameters, average, strict=True)) if better else {}, record
        )
    trainer.strategy.barrier("the stage is on disk")


# --------------------------------------------------------------------------------------------------------------
# What a stage learns
# --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Within(Times):
    """t uniform between two times."""

    low: float
    high: float

    def __call__(self, u: Tensor) -> Tensor:
        return self.low + (self.high - self.low) * u


def _diffusion_loss(network: Network, batch: Mapping[str, Tensor]) -> Tensor:
    return network.loss(network.backbone, batch)


# --------------------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------------------


@contextmanager
def trained(backbone: nn.Module, kind: str, rank: int) -> Iterator[dict[str, nn.Parameter]]:
    """The parameters to train, by the names that stages are saved under; afterwards the backbone is as it was."""
    tuner = _low_rank(backbone, rank) if kind == "lora" else None
    chosen, adaptive = {}, adaptive_norms(backbone)
    for name, parameter in backbone.named_parameters():
        if kind == "full" or (kind == "adaln" and name in adaptive):
            chosen[name] = parameter
        elif kind == "lora" and (match := LORA.fullmatch(name)):
            chosen[f"{match['layer']}.weight{DOWN if match['part'] == 'A' else UP}"] = parameter
    before = [parameter.detach().cpu().clone() for parameter in chosen.values()]
    for parameter in chosen.values():
        parameter.requires_grad_(True)
    backbone.train()
    try:
        yield chosen
    finally:
        with torch.no_grad():
            for parameter, value in zip(chosen.values(), before, strict=True):
                parameter.copy_(value)
        if tuner is not None:
            tuner.unload()
        backbone.requires_grad_(False).eval()


def _low_rank(backbone: nn.Module, rank: int) -> Any:
    """peft's low-rank changes of all linear layers, which begin as none."""
    try:
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel
    except ImportError:
        raise ValueError("task.trainable=lora needs peft: pip install 'oss_exp[lora]'") from None
    linear = [name for name, module in backbone.named_modules() if type(module) is nn.Linear]
    return LoraModel(backbone, LoraConfig(r=rank, lora_alpha=rank, target_modules=linear), "stage")


class StageModule(Training):
    """Trains some parameters of a network in place, and keeps their averages, which are the stage's."""

    def __init__(
        self,
        network: Network,
        parameters: Mapping[str, nn.Parameter],
        loss: Callable[[Mapping[str, Tensor]], Tensor],
        examples: Dataset,
        **training: Any,
    ):
        super().__init__(examples, **training)
        self.model, self.find_loss, self.strict_loading = network, loss, False
        self.trained = list(parameters.values())
        self.average = nn.ParameterList(
            nn.Parameter(each.detach().clone(), False) for each in self.trained
        )
        self.checked: dict[str, float] = {}  # the loss of the first examples before and after
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
        used = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else used
        self.peak_bytes = max(self.peak_bytes, used)
        if self.seen == self.max_steps:
            self.checked["loss_after"] = self._check()

    @torch.no_grad()
    def _check(self) -> float:
        """The averages' mean loss on the first examples."""
        self._swap()
        batches = torch.arange(CHECKED).split(self.batch_size)
        losses = []
        for batch in batches:
            items = default_collate([self.examples[i] for i in batch.tolist()])
            losses.append(
                float(self.loss(self.trainer.strategy.batch_to_device(items))) * len(batch)
            )
        self._swap()
        return sum(losses) / CHECKED

    def _swap(self) -> None:
        for parameter, average in zip(self.trained, self.average, strict=True):
            parameter.data, average.data = average.data, parameter.data

    def progress(self) -> dict[str, Any]:
        return {**super().progress(), **self.checked, "peak_bytes": self.peak_bytes}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        own = {id(parameter) for parameter in (*self.trained, *self.average)}
        kept = {name for name, parameter in self.named_parameters() if id(parameter) in own}
        checkpoint["state_dict"] = {
            key: value for key, value in checkpoint["state_dict"].items() if key in kept
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.checked = {
            key: value for key, value in checkpoint["progress"].items() if key.startswith("loss_")
        }
        self.peak_bytes = checkpoint["progress"]["peak_bytes"]


def _report(folder: StageFolder, run_folder: Path) -> None:
    """finetune.json: all that is known of the stages that are there."""
    files = [folder.file(stage).with_suffix(".json") for stage in range(len(folder))]
    made = [file for file in files if file.is_file()]
    stages = [
        load_record(file, StageRecord, "record of a stage", limit=TABLE_LIMIT) for file in made
    ]
    record = FinetuneRecord(**folder.base, stages=stages)
    write_atomically(run_folder / "finetune.json", record.model_dump_json() + "\n")
    missing = [str(stage) for stage, file in enumerate(files) if not file.is_file()]
    told = (
        f"still to train: stages {', '.join(missing)}"
        if missing
        else f"run it with stages={folder.path}"
    )
    PlainConsole().print(f"{folder.path}: {told}", soft_wrap=True)
