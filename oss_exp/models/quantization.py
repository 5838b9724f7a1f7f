"""Quantised weights of a pipeline's denoisers, by name."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

import torch

Quantization = Literal["float8", "int8", "nf4"]
PACKAGES = {
    "int8": "torchao",
    "nf4": "bitsandbytes",
}  # float8 needs none: diffusers casts layer by layer


def loading_options(
    quantization: Quantization | None, parts: Iterable[str], dtype: torch.dtype
) -> dict[str, Any]:
    """Arguments of a pipeline's `from_pretrained` that quantise those of these parts that it has as it loads them.

    int8: weights, by torchao. nf4: weights in 4 bits, by bitsandbytes, computed with in dtype. float8: see `cast`.
    Raises ValueError where the package for it is not installed.
    """
    if quantization is None or quantization == "float8":
        return {}
    if find_spec(package := PACKAGES[quantization]) is None:
        raise ValueError(
            f"quantization={quantization} needs {package}, which is not installed: pip install {package}, or choose "
            "quantization=float8, which needs nothing"
        )
    diffusers: Any = import_module("diffusers")
    if quantization == "int8":
        config = diffusers.TorchAoConfig(
            import_module("torchao.quantization").Int8WeightOnlyConfig()
        )
    else:
        config = diffusers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    return {
        "quantization_config": diffusers.PipelineQuantizationConfig(
            quant_mapping=dict.fromkeys(parts, config)
        )
    }


def cast(pipe: Any, parts: Iterable[str]) -> None:
    """Keep the weights of these parts in float8, cast layer by layer to the parts' own dtype as they are used.

    Norms and embeddings stay as they are, as diffusers has it.
    """
    for name in parts:
        part: Any = getattr(pipe, name, None)
        if part is not None:
            part.enable_layerwise_casting(torch.float8_e4m3fn, part.dtype)
