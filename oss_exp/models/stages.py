"""A model with different parameters in every stage of the way from noise to data.

The stages are consecutive, and cut at nodes of a step schedule (OSS, arXiv 2503.21774, section
4.2.3; experts by noise level as in eDiff-I, arXiv 2211.01324). They are in a folder with
`stages.json`, `schedule.json`, and the changes of every stage, `stage_<k>.safetensors`. The folder
does not contain the network that the stages began as, only its hash.

Legend: M rows, S stages.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ConfigDict, field_validator
from safetensors import safe_open
from torch import Tensor, nn

from oss_exp.checks import Name
from oss_exp.files import (
    TABLE_LIMIT,
    Count,
    Numbers,
    Provenance,
    Record,
    load_record,
    parse_safetensors,
    save_asset,
    sha256,
    write_atomically,
)
from oss_exp.models.base import Model
from oss_exp.models.checkpoints.weights import file_sha256
from oss_exp.models.guidance import Guidance
from oss_exp.velocity import BoundVelocity

FORMAT = "oss_exp/stages"
VERSION = 1

# Endings after a weight's name: factors (r, in) and (out, r), whose product is its change.
DOWN = ".lora_A"
UP = ".lora_B"

BASE = -1  # the stage that changes nothing


class StagesRecord(Record):
    """The content of stages.json, with the fields of a `StageFolder`."""

    model_config = ConfigDict(extra="forbid")

    class Base(Record):
        """The model that the stages began as."""

        name: Name
        sha256: str

    format: Literal["oss_exp/stages"]
    version: Literal[1]
    base: Base
    cuts: list[float]

    @field_validator("cuts")
    @classmethod
    def _decreasing(cls, cuts: list[float]) -> list[float]:
        if not all(a > b for a, b in pairwise([1.0, *cuts, 0.0])):
            raise ValueError(f"must be times between 1 and 0, noise first, got {cuts[:8]}")
        return cuts


class StageRecord(Provenance):
    """The content of stage_<k>.json: a stage and its training.

    Attributes:
        times: First and last canonical time of the stage.
        steps: Number of steps between them.
    """

    class Training(Record):
        """The course of a training.

        Attributes:
            losses: Loss of every step.
            loss_before: Loss of some examples before the training.
            loss_after: Loss of the same examples after it.
            peak_bytes: Peak memory.
        """

        model_config = ConfigDict(extra="allow")

        losses: Numbers
        loss_before: float
        loss_after: float
        seconds: float
        peak_bytes: Count

    stage: Count
    times: tuple[float, float]
    steps: Count
    parameters: Count
    training: Training


class FinetuneRecord(StagesRecord.Base):
    """The content of finetune.json: the model that the stages began as, and the finished stages."""

    stages: list[StageRecord]


@dataclass(frozen=True)
class StageFolder:
    """A folder of stages, as task=finetune writes it.

    Attributes:
        path: The folder.
        base: Name and sha256 of the model that the stages began as.
        cuts: S - 1 canonical times, noise first.
    """

    path: Path
    base: Mapping[str, str]
    cuts: tuple[float, ...]

    @classmethod
    def load(cls, path: str | Path) -> StageFolder:
        """Read stages.json. Raises FileNotFoundError or ValueError if it is missing or damaged."""
        path = Path(path).expanduser()
        remedy = "make the folder again with oss-exp task=finetune"
        record = load_record(path / "stages.json", StagesRecord, "record of stages", remedy)
        return cls(path, record.base.model_dump(), tuple(record.cuts))

    def save(self) -> None:
        """Write stages.json."""
        record = {
            "format": FORMAT,
            "version": VERSION,
            "base": dict(self.base),
            "cuts": list(self.cuts),
        }
        write_atomically(self.path / "stages.json", json.dumps(record, indent=2) + "\n")

    def __len__(self) -> int:
        return len(self.cuts) + 1

    @property
    def schedule(self) -> Path:
        """The file of the step schedule."""
        return self.path / "schedule.json"

    def file(self, stage: int) -> Path:
        """Return the file of a stage."""
        return self.path / f"stage_{stage}.safetensors"

    def save_stage(
        self, stage: int, tensors: Mapping[str, Tensor], about: Mapping[str, Any]
    ) -> None:
        """Write the file of a stage.

        Args:
            stage: Its number.
            tensors: Parameters of the backbone by name, or their low-rank changes. Absent ones
                are those of the base.
            about: Provenance.
        """
        on_host = {name: tensor.cpu() for name, tensor in tensors.items()}
        save_asset(self.file(stage), on_host, about)

    def hash_of(self, stage: int) -> str:
        """Return the SHA-256 of a stage's file.

        Raises:
            FileNotFoundError: If the file or its provenance is missing.
            ValueError: If one of them is damaged.
        """
        path = self.file(stage)
        beside = path.with_suffix(".json")
        remedy = f"train it with task=finetune task.stage={stage} task.output={self.path}"
        if not path.is_file() or not beside.is_file():
            raise FileNotFoundError(
                f"{self.path} has {len(self)} stages and lacks {path.name} or its .json; {remedy}"
            )

        record = load_record(beside, Provenance, "provenance of a stage", remedy, TABLE_LIMIT)
        actual = file_sha256(path)
        if actual != record.sha256:
            raise ValueError(
                f"{path} is damaged: its SHA-256 is {actual[:12]}..., "
                f"expected {record.sha256[:12]}...; {remedy}"
            )
        return actual


class Staged(Model):
    """A model whose rows are evaluated with the parameters of the stage that their time is in.

    A time on a cut is in the stage that begins there.

    Args:
        base: The model that the stages began as.
        parameters: Parameters of the stages.
        split: False uses the base's own parameters at all times, though its backbone is shared
            with stages.

    Raises:
        ValueError: If the stages are another model's.
    """

    def __init__(self, base: Model, parameters: StageParameters, split: bool = True):
        super().__init__()

        # Checks.
        folder = parameters.folder
        if type(base).sample is not Model.sample:
            raise ValueError(
                f"{base.name} samples in a loop of its own, which has no stages; "
                "choose another model"
            )
        if folder.base["sha256"] != base.fingerprint:
            raise ValueError(
                f"the stages in {folder.path} began as {folder.base['name']} "
                f"({folder.base['sha256']:.12}), this model is {base.name} "
                f"({base.fingerprint:.12}); choose the model that they were made from"
            )

        # The base's properties.
        self.base = base
        self.parameters_of = parameters
        self.split = split
        self.name = f"{base.name}_staged" if split else base.name
        self.path = base.path
        self.event_shape = base.event_shape
        self.num_classes = base.num_classes
        self.guidance = base.guidance

        # Stages.
        self.cuts = torch.tensor(folder.cuts, dtype=torch.float64)
        identity = " ".join([base.fingerprint, *map(repr, folder.cuts), *parameters.hashes])
        self.fingerprint = sha256(identity.encode()) if split else base.fingerprint
        self.eval().requires_grad_(False)

    @classmethod
    def load(cls, base: Model, folder: str | Path) -> Staged:
        """Load all stages of a folder.

        Args:
            base: The model that the stages began as; it has a backbone.
            folder: The folder.

        Raises:
            FileNotFoundError: If a stage is missing.
            ValueError: If the stages are another model's, or damaged.
        """
        stages = StageFolder.load(folder)
        return cls(base, StageParameters(base.backbone, stages, range(len(stages))))

    @property
    def needs_classes(self) -> bool:
        return self.base.needs_classes

    @property
    def original(self) -> Model:
        return Staged(self.base, self.parameters_of, split=False)

    def stage_at(self, t: Tensor) -> Tensor:
        """Return the number of the stage at every time t (M,); 0 is the noisiest."""
        if not self.split:
            return torch.full_like(t, BASE).long()
        return (t[:, None] <= self.cuts.to(t.device)).sum(dim=1)

    def velocity(self, condition: Tensor | None, guidance: Guidance | None = None) -> BoundVelocity:
        bound = self.base.velocity(condition, guidance)

        def routed(x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
            """Evaluate the rows of every stage together, and restore their order."""
            stages = self.stage_at(t)
            rows = []
            parts = []
            for stage in stages.unique():
                chosen = (stages == stage).nonzero()[:, 0]
                conditions = None if condition is None else condition[chosen]
                self.parameters_of.use(int(stage))
                rows.append(chosen)
                parts.append(bound.fn(x[chosen], t[chosen], conditions))
            return torch.cat(parts)[torch.cat(rows).argsort()]

        return replace(bound, fn=routed)

    def decode(self, x0: Tensor) -> Tensor:
        return self.base.decode(x0)


class StageParameters:
    """A backbone with the parameters of one stage at a time; the other stages stay in their files.

    Those parameters of the base that some stage changes are copied to host memory.

    Args:
        backbone: The backbone.
        folder: The folder of the stages.
        stages: The stages that may be used.

    Raises:
        FileNotFoundError: If a stage is missing.
        ValueError: If a stage is damaged, or does not fit the backbone.
    """

    def __init__(self, backbone: nn.Module, folder: StageFolder, stages: Sequence[int]):
        self.backbone = backbone
        self.folder = folder
        self.stages = stages
        self.hashes = [folder.hash_of(stage) for stage in stages]
        self.current = BASE

        # The base's own parameters.
        parameters = dict(backbone.named_parameters())
        self.originals: dict[str, Tensor] = {}
        for stage in stages:
            for name, shape in _changed_shapes(folder.file(stage)).items():
                if name not in parameters or shape != tuple(parameters[name].shape):
                    raise ValueError(
                        f"{folder.file(stage)} changes {name:.80}, "
                        "which the network lacks at that shape"
                    )
                if name not in self.originals:
                    self.originals[name] = parameters[name].detach().cpu().clone()

    @torch.no_grad()
    def use(self, stage: int) -> None:
        """Give the backbone the parameters of a stage, or its own ones for BASE."""
        if stage == self.current:
            return
        changed = {} if stage == BASE else self._changed(stage)
        for name, parameter in self.backbone.named_parameters():
            if name in self.originals:
                parameter.copy_(changed.get(name, self.originals[name]))
        self.current = stage

    def _changed(self, stage: int) -> dict[str, Tensor]:
        """Return the parameters that a stage changes, low-rank changes applied."""
        if stage not in self.stages:
            raise ValueError(
                f"stage {stage} of {self.folder.path} is not loaded, only {list(self.stages)}"
            )
        with safe_open(self.folder.file(stage), "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118

        # Products of factors, and whole parameters.
        changed = {}
        for key, tensor in tensors.items():
            if key.endswith(DOWN):
                name = key.removesuffix(DOWN)
                change = tensors[name + UP].float() @ tensor.float()
                changed[name] = self.originals[name] + change
            elif not key.endswith(UP):
                changed[key] = tensor
        return changed


def _changed_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights that a stage changes; for two factors, of their product."""

    def read() -> dict[str, tuple[int, ...]]:
        with safe_open(path, "pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118

    with path.open("rb") as file:
        start = file.read(8)
    shapes = parse_safetensors(start, f"stage {path}", read)

    changed = {}
    for key, shape in shapes.items():
        name = key.removesuffix(DOWN).removesuffix(UP)
        if name == key:
            changed[name] = shape
            continue

        # Factors.
        down = shapes.get(name + DOWN, ())
        up = shapes.get(name + UP, ())
        if len(down) != 2 or len(up) != 2 or down[0] != up[1]:
            raise ValueError(
                f"{path} has factors of {name:.80} of shapes {down} and {up}, which have no product"
            )
        changed[name] = (up[0], down[1])
    return changed
