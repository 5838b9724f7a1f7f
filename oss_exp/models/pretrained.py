"""Pipelines of diffusers from folders and the hub, adapters on top, and what their calls are given as files."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from oss_exp.models.network import Dtype
from oss_exp.models.quantization import Quantization, loading_options
from oss_exp.scheduler_config import read_scheduler_config


def loaded(
    pipeline: str | Path,
    pipeline_class: str | None,
    dtype: Dtype | Mapping[str, Dtype],
    given: Collection[str],
    quantization: Quantization | None = None,
    quantized: Collection[str] = (),
) -> Any:
    """The pipeline of a folder or a hub id, to be called with arguments of these names.

    quantized: the parts that are, of those that it has.
    Raises ValueError or FileNotFoundError for what is not there, or not known here, before gigabytes are loaded.
    """
    import diffusers
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    kind = getattr(diffusers, pipeline_class or "DiffusionPipeline", None)
    if not (isinstance(kind, type) and issubclass(kind, DiffusionPipeline)):
        raise ValueError(
            f"pipeline_class={pipeline_class} is no pipeline of diffusers; null takes the folder's own"
        )
    require_arguments(kind, given)
    if (file := Path(pipeline) / "scheduler" / "scheduler_config.json").is_file():
        read_scheduler_config(file)
    by_part = isinstance(dtype, Mapping)
    dtypes = (
        {part: getattr(torch, each) for part, each in dtype.items()}
        if by_part
        else getattr(torch, dtype)
    )
    options = {"torch_dtype": dtypes, "use_safetensors": True, "trust_remote_code": False}
    computed = dtypes.get("default", torch.float32) if isinstance(dtypes, dict) else dtypes
    options |= loading_options(quantization, quantized, computed)
    try:
        return kind.from_pretrained(str(pipeline), **options)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"pipeline {pipeline} is neither a folder that diffusers' save_pretrained wrote nor to be had from the "
            f"hub ({reason}); give a folder with a model_index.json, or size=tiny for a small random one"
        ) from None


def require_arguments(kind: type, given: Collection[str]) -> None:
    """ValueError for an argument that a pipeline's call needs, and is neither given nor what conditions number."""
    takes = inspect.signature(kind.__call__).parameters
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    for name, each in takes.items():
        if (
            each.default is each.empty
            and each.kind not in several
            and name not in ("self", numbered(takes), *given)
        ):
            raise ValueError(
                f"{kind.__name__} needs {name}; add call.{name}{'=FILE' * of_images(name)}"
            )


def numbered(takes: Collection[str]) -> str:
    """The argument, of those that a call takes, that conditions number; empty where there is none."""
    return next((name for name in ("prompt", "class_labels", "image") if name in takes), "")


def of_images(argument: str) -> bool:
    """Whether an argument of a call takes images."""
    return argument == "image" or argument.endswith("_image")


def with_images(call: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call with images in the place of their files, without those that are None."""
    opened = {key: images(value) if of_images(key) else value for key, value in call.items()}
    return {key: value for key, value in opened.items() if value is not None or not of_images(key)}


def images(value: Any) -> Any:
    """The images of a file or of a list of files; anything else as it is."""
    if isinstance(value, str | Path):
        from torchvision.transforms.v2.functional import to_pil_image

        from oss_exp.image_files import read_image

        return to_pil_image(read_image(Path(value).expanduser(), channels=3, background="white"))
    return [images(each) for each in value] if isinstance(value, Sequence) else value
