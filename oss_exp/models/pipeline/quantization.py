"""Quantised weights for a pipeline's denoisers.

int8 needs torchao and nf4 needs bitsandbytes. float8 needs no package: diffusers casts the weights
layer by layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

import torch

Quantization = Literal["float8", "int8", "nf4"]
PACKAGES = {"int8": "torchao", "nf4": "bitsandbytes"}


def loading_options(
    quantization: Quantization | None, parts: Iterable[str], dtype: torch.dtype
) -> dict[str, Any]:
    """Return arguments for a pipeline's `from_pretrained` that quantise weights as they load.

    Args:
        quantization: int8 (by torchao) or nf4 (4 bits, by bitsandbytes). Nothing is returned for
            None and for float8, which `cast_to_float8` applies after loading.
        parts: Names of the parts to quantise; those that the pipeline lacks are ignored.
        dtype: Type that 4-bit weights are computed in.

    Raises:
        ValueError: If the package is not installed.
    """
    if quantization is None or quantization == "float8":
        return {}
    package = PACKAGES[quantization]
    if find_spec(package) is None:
        raise ValueError(
            f"quantization={quantization} needs {package}, which is not installed: "
            f"pip install {package}, or choose quantization=float8, which needs nothing"
        )

    # Configuration of every part.
    diffusers: Any = import_module("diffusers")
    if quantization == "int8":
        int8 = import_module("torchao.quantization").Int8WeightOnlyConfig()
        config = diffusers.TorchAoConfig(int8)
    else:
        config = diffusers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    mapping = dict.fromkeys(parts, config)
    return {"quantization_config": diffusers.PipelineQuantizationConfig(quant_mapping=mapping)}


def cast_to_float8(pipe: Any, parts: Iterable[str]) -> None:
    """Store the weights of these parts in float8; layers are cast to the part's dtype when used.

    Norms and embeddings keep their type, which is the default of diffusers.
    """
    for name in parts:
        part: Any = getattr(pipe, name, None)
        if part is not None:
            part.enable_layerwise_casting(torch.float8_e4m3fn, part.dtype)
