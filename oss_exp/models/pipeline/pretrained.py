"""Pipelines of diffusers loaded from folders and from the hub, and images for their calls."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from oss_exp.models.network import Dtype
from oss_exp.models.pipeline.arguments import require_arguments, takes_images
from oss_exp.models.pipeline.quantization import Quantization, loading_options
from oss_exp.scheduler_config import read_scheduler_config


def load(
    pipeline: str | Path,
    pipeline_class: str | None,
    dtype: Dtype | Mapping[str, Dtype],
    arguments: Collection[str],
    quantization: Quantization | None = None,
    quantized: Collection[str] = (),
) -> Any:
    """Load a pipeline from a folder or the hub.

    Args:
        pipeline: Folder or hub id.
        pipeline_class: Class of diffusers; None for the folder's own.
        dtype: Type of all parts, or by part, with `default` for the others.
        arguments: Names of the arguments that it will be called with.
        quantization: How to quantise weights; None for not at all.
        quantized: Names of the parts to quantise, if the pipeline has them.

    Raises:
        ValueError: For a class or a scheduler that is not known, and for a missing argument of the
            call. Both are found before gigabytes are loaded.
        FileNotFoundError: If there is no such folder or hub id.
    """
    import diffusers
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    # Checks before loading.
    kind = getattr(diffusers, pipeline_class or "DiffusionPipeline", None)
    if not (isinstance(kind, type) and issubclass(kind, DiffusionPipeline)):
        raise ValueError(
            f"pipeline_class={pipeline_class} is no pipeline of diffusers; "
            "null takes the folder's own"
        )
    require_arguments(kind, arguments)
    file = Path(pipeline) / "scheduler" / "scheduler_config.json"
    if file.is_file():
        read_scheduler_config(file)

    # Types.
    if isinstance(dtype, Mapping):
        dtypes: Any = {part: getattr(torch, name) for part, name in dtype.items()}
        compute_dtype = dtypes.get("default", torch.float32)
    else:
        compute_dtype = dtypes = getattr(torch, dtype)

    # Weights. No code from the folder is run.
    options = {"torch_dtype": dtypes, "use_safetensors": True, "trust_remote_code": False}
    options |= loading_options(quantization, quantized, compute_dtype)
    try:
        return kind.from_pretrained(str(pipeline), **options)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"pipeline {pipeline} is neither a folder that diffusers' save_pretrained wrote nor "
            f"available from the hub ({reason}); give a folder with a model_index.json, "
            "or size=tiny for a small random one"
        ) from None


def with_images(call: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call with their image files opened; images of None are dropped."""
    opened = {}
    for name, value in call.items():
        if not takes_images(name):
            opened[name] = value
        elif (image := open_images(value)) is not None:
            opened[name] = image
    return opened


def open_images(value: Any) -> Any:
    """Open the image of a file, or the images of a list of files; return anything else as it is."""
    if isinstance(value, str | Path):
        from torchvision.transforms.v2.functional import to_pil_image

        from oss_exp.image_files import read_image

        return to_pil_image(read_image(Path(value).expanduser(), channels=3, background="white"))
    if isinstance(value, Sequence):
        return [open_images(item) for item in value]
    return value
