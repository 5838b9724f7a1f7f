"""The fingerprint of a pipeline: a hash of all that determines its velocity."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# Attributes of a layer of peft that change what its adapters do.
ADAPTER_SETTINGS = ("scaling", "active_adapters", "disable_adapters", "merged_adapters")
DECODERS = ("vae", "vqvae", "vocoder")
NUMBERS = 1024  # hashed numbers of every weight


def pipeline_fingerprint(components: Mapping[str, Any], has_images: bool, formula: str) -> str:
    """Return the SHA-256 of a pipeline's weights, adapters and convention.

    Every weight, quantised or not, enters with its name, shape, type and up to 1,024 numbers.

    Args:
        components: The pipeline's parts by name. Parts without weights do not count.
        has_images: The call has images. Otherwise parts that only decode do not count.
        formula: Identifies how the network was trained.
    """
    digest = hashlib.sha256()
    ignored = ("safety_checker",) if has_images else ("safety_checker", *DECODERS)
    for name, part in sorted(components.items()):
        if not isinstance(part, nn.Module) or name in ignored:
            continue

        # Weights.
        for key, weight in _weights(part):
            header = f"{name}.{key} {tuple(weight.shape)} {weight.dtype}"
            digest.update(header.encode() + _sampled_bytes(weight))

        # Settings of adapters, and of the processors of image prompts.
        for key, module in part.named_modules():
            for owner in (module, getattr(module, "processor", None)):
                settings = [getattr(owner, attribute, None) for attribute in ADAPTER_SETTINGS]
                settings.append(getattr(owner, "scale", None) if owner is not module else None)
                if any(settings):
                    digest.update(f"{name}.{key} {settings}".encode())
    digest.update(formula.encode())
    return digest.hexdigest()


def _weights(part: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield all weights and buffers of a part by name, as plain tensors.

    Offloaded weights come from host memory, and quantised ones as the tensors they consist of.
    """
    # Offloaded weights.
    offloaded = {}
    for name, module in part.named_modules():
        weights_map = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        if weights_map:
            for key in module.state_dict():
                if key in weights_map:
                    offloaded[f"{name}.{key}".lstrip(".")] = weights_map[key]

    # All weights.
    for name, value in part.state_dict().items():
        if not isinstance(value, Tensor):
            continue
        weight: Any = offloaded.get(name, value)
        inner = weight.__tensor_flatten__()[0] if hasattr(weight, "__tensor_flatten__") else []
        if not inner:
            yield name, weight
        for attribute in inner:
            yield f"{name}.{attribute}", getattr(weight, attribute)


def _sampled_bytes(weight: Tensor) -> bytes:
    """Return the bytes of 1,024 evenly spaced numbers of a tensor, or of all if it has fewer."""
    count = min(weight.numel(), NUMBERS)
    places = torch.linspace(0, weight.numel() - 1, count, dtype=torch.float64).long()
    places = places.to(weight.device)
    numbers = weight.detach().flatten()
    if weight.element_size() == 1:  # float8 cannot be indexed on some devices
        numbers = numbers.view(torch.uint8)
    return numbers[places].cpu().contiguous().view(torch.uint8).numpy().tobytes()
