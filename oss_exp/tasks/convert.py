"""Rewrite a public checkpoint as one safetensors file: `task=convert`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from oss_exp.escaping import PlainConsole
from oss_exp.files import save_asset
from oss_exp.models.checkpoints.weights import file_sha256, locate
from oss_exp.models.families.published import Published
from oss_exp.tasks import border
from oss_exp.tasks.task import Task


@dataclass(frozen=True, kw_only=True)
class Convert(Task):
    """Write the weights of `model` to `output` (.safetensors and .json), in float32.

    Attributes:
        layout: "own": the keys of this package; or a public layout of the model.
        output: Path of the weights.
    """

    layout: str = "own"
    output: str

    def __call__(self, cfg: DictConfig) -> None:
        kind = border.class_of(cfg.model, "model")
        if not (isinstance(kind, type) and issubclass(kind, Published)):
            raise ValueError(
                f"task=convert rewrites published checkpoints; {cfg.model._target_} has none"
            )
        output = Path(self.output)
        if output.suffix != ".safetensors":
            raise ValueError(f"task.output must end in .safetensors, got {output}")

        # Weights, by the keys of the layout.
        model = border.build(cfg.model, "model", dtype="float32")
        if self.layout == "own":
            tensors = model.backbone.state_dict()
        else:
            tensors = _to_public(model, self.layout)

        # Files; the hash is that of the numbers by our keys, whatever the layout.
        provenance = {
            "name": model.name,
            "layout": self.layout,
            "source": _source(cfg.model, type(model.backbone).FILES),
            "weights_sha256": model.fingerprint,
            "model": OmegaConf.to_container(cfg.model, resolve=True),
        }
        save_asset(output, tensors, provenance)
        parameters = sum(parameter.numel() for parameter in model.backbone.parameters())
        PlainConsole().print(
            f"{output}: {len(tensors)} tensors, {parameters:,} parameters", soft_wrap=True
        )


def _to_public(model: Published, layout: str) -> dict[str, Any]:
    """Return the weights in a public layout; the backbone refuses one that it does not have."""
    to_public = getattr(model.backbone, "to_public", None)
    if to_public is None:
        raise ValueError(
            f"task.layout must be own for model={model.name}, which has no public layout; got "
            f"{layout!r}"
        )
    return to_public(layout)


def _source(cfg: DictConfig, files: Sequence[str]) -> dict[str, str | None]:
    """Return the name and the hash of the file that the weights come from."""
    checkpoint = cfg.checkpoint or cfg.sizes[cfg.size].checkpoint
    if checkpoint == "random":
        return {"file": "random", "sha256": None}
    path = locate(checkpoint, files, cfg.source, own=True)
    return {"file": path.name, "sha256": file_sha256(path)}
