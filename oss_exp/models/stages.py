"""A model with other parameters in every stage of the way from noise to data.

The stages are consecutive and cut at nodes of a step schedule (OSS, arXiv 2503.21774, section 4.2.3; experts by noise
level as in eDiff-I, arXiv 2211.01324). A folder holds them: `stages.json`, `schedule.json`, and what each stage
changed, `stage_<k>.safetensors`. The network that they began as is not in it but known by its hash.
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

FORMAT, VERSION = "oss_exp/stages", 1
DOWN, UP = (
    ".lora_A",
    ".lora_B",
)  # after a weight's name: (r, in) and (out, r), whose product is its change
BASE = -1  # the stage that changes nothing


class StagesRecord(Record):
    """stages.json, in the words of a `StageFolder`."""

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
    """stage_<k>.json: what a stage is and how its training went. times: its first and its last; steps: between them."""

    class Training(Record):
        """losses: of every step; loss_before, loss_after: of the same examples; peak_bytes: of memory."""

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
    """finetune.json: the model that the stages began as, and those that are there."""

    stages: list[StageRecord]


@dataclass(frozen=True)
class StageFolder:
    """What task=finetune writes. base: name and sha256 of the model; cuts: S - 1 canonical times, noise first."""

    path: Path
    base: Mapping[str, str]
    cuts: tuple[float, ...]

    @classmethod
    def load(cls, path: str | Path) -> StageFolder:
        path = Path(path).expanduser()
        remedy = "make the folder again with oss-exp task=finetune"
        record = load_record(path / "stages.json", StagesRecord, "record of stages", remedy)
        return cls(path, record.base.model_dump(), tuple(record.cuts))

    def save(self) -> None:
        record = {"base": dict(self.base), "cuts": list(self.cuts)}
        record = {"format": FORMAT, "version": VERSION, **record}
        write_atomically(self.path / "stages.json", json.dumps(record, indent=2) + "\n")

    def __len__(self) -> int:
        return len(self.cuts) + 1

    @property
    def schedule(self) -> Path:
        return self.path / "schedule.json"

    def file(self, stage: int) -> Path:
        return self.path / f"stage_{stage}.safetensors"

    def save_stage(
        self, stage: int, tensors: Mapping[str, Tensor], about: Mapping[str, Any]
    ) -> None:
        """tensors: parameters of the backbone by name, or their low-rank changes; those that are absent stay as is."""
        save_asset(
            self.file(stage), {name: tensor.cpu() for name, tensor in tensors.items()}, about
        )

    def hash_of(self, stage: int) -> str:
        """SHA-256 of a stage's file, which is whole. FileNotFoundError or ValueError says what it lacks."""
        path = self.file(stage)
        remedy = f"train it with task=finetune task.stage={stage} task.output={self.path}"
        if not path.is_file() or not path.with_suffix(".json").is_file():
            raise FileNotFoundError(
                f"{self.path} has {len(self)} stages and lacks {path.name} or its .json; {remedy}"
            )
        beside = path.with_suffix(".json")
        expected = load_record(
            beside, Provenance, "provenance of a stage", remedy, TABLE_LIMIT
        ).sha256
        if (found := file_sha256(path)) != expected:
            raise ValueError(
                f"{path} is damaged: its SHA-256 is {found[:12]}..., expected {expected[:12]}...; {remedy}"
            )
        return found


class Staged(Model):
    """`base` with the parameters of the stage that a row's time is in; a time on a cut is in the stage that it starts.

    split: False: the base's own parameters at all times, of a model that lends its backbone to stages.
    ValueError where the stages are another model's, FileNotFoundError where one is missing.
    """

    def __init__(self, base: Model, parameters: StageParameters, split: bool = True):
        super().__init__()
        folder = parameters.folder
        if type(base).sample is not Model.sample:
            raise ValueError(
                f"{base.name} samples in a loop of its own, which has no stages; choose another model"
            )
        if folder.base["sha256"] != base.fingerprint:
            raise ValueError(
                f"the stages in {folder.path} began as {folder.base['name']} ({folder.base['sha256']:.12}), this model "
                f"is {base.name} ({base.fingerprint:.12}); choose the model that they were made from"
            )
        self.base, self.parameters_of, self.split = base, parameters, split
        self.name = f"{base.name}_staged" if split else base.name
        self.path, self.event_shape, self.num_classes = (
            base.path,
            base.event_shape,
            base.num_classes,
        )
        self.guidance = base.guidance
        self.cuts = torch.tensor(folder.cuts, dtype=torch.float64)
        identity = " ".join([base.fingerprint, *map(repr, folder.cuts), *parameters.hashes])
        self.fingerprint = sha256(identity.encode()) if split else base.fingerprint
        self.eval().requires_grad_(False)

    @classmethod
    def load(cls, base: Model, folder: str | Path) -> Staged:
        """base: the model that the stages in this folder began as, with a backbone."""
        folder = StageFolder.load(folder)
        return cls(base, StageParameters(base.backbone, folder, range(len(folder))))

    @property
    def needs_classes(self) -> bool:
        return self.base.needs_classes

    @property
    def original(self) -> Model:
        return Staged(self.base, self.parameters_of, split=False)

    def stage_at(self, t: Tensor) -> Tensor:
        """t (M,) -> (M,) numbers of stages, of which 0 is the noisiest."""
        return (
            (t[:, None] <= self.cuts.to(t.device)).sum(dim=1)
            if self.split
            else torch.full_like(t, BASE).long()
        )

    def velocity(self, condition: Tensor | None, guidance: Guidance | None = None) -> BoundVelocity:
        bound = self.base.velocity(condition, guidance)

        def routed(x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
            stages = self.stage_at(t)
            rows = [(stages == stage).nonzero()[:, 0] for stage in stages.unique()]
            parts = []
            for chosen in rows:
                self.parameters_of.use(int(stages[chosen[0]]))
                parts.append(
                    bound.fn(x[chosen], t[chosen], None if condition is None else condition[chosen])
                )
            return torch.cat(parts)[torch.cat(rows).argsort()]

        return replace(bound, fn=routed)

    def decode(self, x0: Tensor) -> Tensor:
        return self.base.decode(x0)


class StageParameters:
    """A backbone that has the parameters of one stage at a time; those of the others stay in their files.

    Of the base's own parameters, the ones that some stage changes are kept in host memory.
    """

    def __init__(self, backbone: nn.Module, folder: StageFolder, stages: Sequence[int]):
        self.backbone, self.folder, self.stages = backbone, folder, stages
        self.hashes = [folder.hash_of(stage) for stage in stages]
        own = dict(backbone.named_parameters())
        self.kept: dict[str, Tensor] = {}
        for stage in stages:
            for name, shape in _changed_shapes(folder.file(stage)).items():
                if name not in own or shape != tuple(own[name].shape):
                    raise ValueError(
                        f"{folder.file(stage)} changes {name:.80}, which the network lacks at that shape"
                    )
                if name not in self.kept:
                    self.kept[name] = own[name].detach().cpu().clone()
        self.now = BASE

    @torch.no_grad()
    def use(self, stage: int) -> None:
        """The backbone becomes that of this stage, on the device where it is; BASE: as it was."""
        if stage == self.now:
            return
        changed = {} if stage == BASE else self._changed(stage)
        for name, parameter in self.backbone.named_parameters():
            if name in self.kept:
                parameter.copy_(changed.get(name, self.kept[name]))
        self.now = stage

    def _changed(self, stage: int) -> dict[str, Tensor]:
        if stage not in self.stages:
            raise ValueError(
                f"stage {stage} of {self.folder.path} is not loaded, only {list(self.stages)}"
            )
        with safe_open(self.folder.file(stage), "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        changed = {}
        for key, tensor in tensors.items():
            if key.endswith(DOWN):
                name = key.removesuffix(DOWN)
                changed[name] = self.kept[name] + tensors[name + UP].float() @ tensor.float()
            elif not key.endswith(UP):
                changed[key] = tensor
        return changed


def _changed_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The weights that a stage's file changes, with their shapes; of two low-rank factors that of their product."""

    def read() -> dict[str, tuple[int, ...]]:
        with safe_open(path, "pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118

    with path.open("rb") as file:
        start = file.read(8)
    shapes, found = parse_safetensors(start, f"stage {path}", read), {}
    for key, shape in shapes.items():
        name = key.removesuffix(DOWN).removesuffix(UP)
        if name == key:
            found[name] = shape
            continue
        down, up = shapes.get(name + DOWN, ()), shapes.get(name + UP, ())
        if len(down) != 2 or len(up) != 2 or down[0] != up[1]:
            raise ValueError(
                f"{path} has factors of {name:.80} of shapes {down} and {up}, which have no product"
            )
        found[name] = (up[0], down[1])
    return found
