"""Pipelines of diffusers: folders of parts, whose own configs count, and the networks of prompts among them.

A family is a file beside this one: what its parts are, how its network is asked, and what its latents become.
Legend: M rows, *E event dims, P prompts; t (M,) float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue, TypeAdapter
from torch import Tensor, nn

from oss_exp.checks import require_range
from oss_exp.files import load_record, sha256
from oss_exp.models.checkpoints.weights import digest, locate, randomise
from oss_exp.models.guidance import Guidance
from oss_exp.models.network import Dtype, Network, settings_named
from oss_exp.models.parameterization import Parameterization
from oss_exp.models.text.encoders import Answer, TextModel, open_text_model, random_text_model
from oss_exp.velocity import BoundVelocity

OTHERS = ("scheduler", "safety_checker", "feature_extractor", "image_encoder")  # parts of any class, or none
CONFIG, WEIGHTS = ("config.json",), "diffusion_pytorch_model.safetensors"
FILES = {  # that a part needs, by the first word of its name: of every line one, the config first
    "scheduler": (("scheduler_config.json",),),
    "text": (CONFIG, ("model.safetensors", "model.safetensors.index.json")),
    "tokenizer": (  # old layout or new
        ("tokenizer_config.json",),
        ("vocab.json", "tokenizer.json"),
        ("merges.txt", "tokenizer.json"),
        ("special_tokens_map.json", "tokenizer_config.json"),
    ),
    "transformer": (CONFIG, (WEIGHTS, f"{WEIGHTS}.index.json")),
    "unet": (CONFIG, (WEIGHTS, f"{WEIGHTS}.index.json")),
    "vae": (CONFIG, (WEIGHTS, "diffusion_pytorch_model.bin")),
}


class Pipeline:
    """A pipeline folder, or that of a hub id with all files that are needed; or random weights in their place.

    kind:       diffusers' class. parts: of which classes each part is; () where that does not matter.
    sizes:      by name the `checkpoint` and, for random weights, the configs of the parts as diffusers writes them.
    checkpoint: a folder, a hub id, `random`, or null: that of the size. source: where the public one is had.

    ValueError for a pipeline of other parts, FileNotFoundError for what is not there; no weight has been read then.
    Afterwards `configs` has the config of every part, and `folder` is None for random weights.
    """

    def __init__(
        self,
        kind: str,
        parts: Mapping[str, Sequence[str]],
        size: str,
        sizes: Mapping[str, Mapping[str, Any]],
        checkpoint: str | None,
        source: str,
    ):
        self.kind, self.parts, self.source = kind, parts, source
        self.checkpoint = checkpoint or sizes[size]["checkpoint"]
        self.size, self.folder, self.configs = size, None, sizes[size]
        if self.checkpoint != "random":
            self.folder = self._folder()
            self.files = {part: self._locate(part) for part in parts}
            self.configs = {part: read_object(files[0]) for part, files in self.files.items()}

    def making(self, part: str) -> AbstractContextManager[None]:
        """What goes wrong within, in the making of a part of random weights, is said of the part's settings."""
        return settings_named(f"sizes.{self.size}.{part}") if self.folder is None else nullcontext()

    def network(self, part: str) -> nn.Module:
        """diffusers' network of a part's config; where its weights are in files it has none yet, on device meta."""
        import diffusers

        with self.making(part), torch.device("cpu" if self.folder is None else "meta"):
            network = getattr(diffusers, self.parts[part][0]).from_config(self.configs[part])
        with self.making(part):
            channels, answers = network.config.in_channels, network.config.out_channels or network.config.in_channels
            require_range(at_least=1, in_channels=channels)
            if channels != answers:
                raise ValueError(
                    f"the {part} of {self.checkpoint} takes {channels} channels, gives {answers}; choose a "
                    "model.checkpoint that makes pictures of text alone, not of inpainting or upscaling"
                )
        return network

    def weights(self, part: str) -> str:
        """The file of a part's weights, or `random`."""
        return "random" if self.folder is None else str(self.files[part][-1])

    def text_model(self, part: str, tokenizer: str, answer: Answer, length: int | None = None) -> TextModel:
        """The text encoder of two parts; `answer` and `length` as TextModel takes them."""
        kind = self.parts[part][0]
        if self.folder is None:
            with self.making(part):
                return random_text_model(kind, self.configs[part], answer, length)
        words = self.parts[tokenizer][0]
        return open_text_model(kind, self.files[part][-1], words, self.folder / tokenizer, answer, length)

    def _folder(self) -> Path:
        index = locate(self.checkpoint, ("model_index.json",), self.source)
        if index.name != "model_index.json":
            raise ValueError(
                f"model.checkpoint={self.checkpoint} is a file and should be a pipeline folder; make one with "
                f"{self.kind}.from_single_file(FILE).save_pretrained(FOLDER) of diffusers"
            )
        kinds = {part: kind[-1] for part, kind in read_object(index).items() if isinstance(kind, list) and kind}
        for part in sorted({*self.parts, *kinds} - {*OTHERS}):
            expected = self.parts.get(part, (None,))
            if kinds.get(part) not in expected:
                raise ValueError(
                    f"{index} is of another kind of model: its {part} is {kinds.get(part)}, that of a {self.kind} is "
                    f"{' or '.join(map(str, expected))}; choose another model.checkpoint"
                )
        return index.parent

    def _locate(self, part: str) -> list[Path]:
        needed = FILES[part.partition("_")[0]]
        return [locate(self.checkpoint, [f"{part}/{file}" for file in files], self.source) for files in needed]


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object of diffusers, without its notes about itself."""
    record = load_record(file, TypeAdapter(dict[str, JsonValue]), "config", "get it again")
    return {key: value for key, value in record.items() if not key.startswith("_")}


# --------------------------------------------------------------------------------------------------------------
# Networks of prompts
# --------------------------------------------------------------------------------------------------------------


class Prompted(Network):
    """A network whose condition is a prompt's number.

    prompts:        those that conditions number.
    encoder_sha256: of the text encoder, which makes the velocity too.
    backbone:       around a `network`, not yet filled, and the encodings of all prompts.
    checkpoint:     the file of the network's weights, or `random`. weights_set: as Network's.
    """

    def __init__(
        self,
        name: str,
        prompts: Sequence[str],
        encoder_sha256: str,
        backbone: nn.Module,
        parameterization: Parameterization,
        event_shape: Sequence[int],
        decoder: nn.Module,
        guidance: Guidance,
        micro_batch: int,
        dtype: Dtype,
        checkpoint: str,
        weights_set: str | None = None,
    ):
        self.prompts, self.encoder_sha256 = list(prompts), encoder_sha256
        super().__init__(
            name=name,
            backbone=backbone,
            parameterization=parameterization,
            event_shape=event_shape,
            num_classes=None,
            decoder=decoder,
            guidance=guidance,
            micro_batch=micro_batch,
            dtype=dtype,
            checkpoint=checkpoint,
            weights_set=weights_set,
        )

    @property
    def num_conditions(self) -> int:
        return len(self.prompts)

    def velocity(self, condition: Tensor | None, guidance: Guidance | None = None) -> BoundVelocity:
        """condition: numbers of prompts (B,)."""
        if condition is None or condition.is_floating_point() or condition.ndim != 1:
            raise ValueError(f"{self.name} needs the numbers of prompts; set data=prompts data.prompts=FILE")
        if not bool(((condition >= 0) & (condition < len(self.prompts))).all()):
            raise ValueError(
                f"{self.name} has {len(self.prompts)} prompts and is asked for number {int(condition.max())}; "
                "set data=prompts data.prompts=FILE"
            )
        return (guidance or self.guidance).bind(self._velocity, condition, self.micro_batch)

    def _load(self, checkpoint: str) -> str:
        """Fill the network; the hash is of it and the text encoder, for both make the velocity."""
        network = self.backbone.network
        if checkpoint == "random":
            randomise(network, torch.Generator().manual_seed(0))
        else:
            self._fill(Path(checkpoint), lambda tensors: {f"network.{key}": each for key, each in tensors.items()})
        return sha256(f"{digest(network.state_dict())} {self.encoder_sha256}".encode())


class PromptedBackbone(nn.Module):
    """A network of diffusers and the encodings of prompts.

    tables: encodings (P + 1, ...) by name of all prompts and, where -1 finds it, of the one that stands for none.
    """

    def __init__(self, network: nn.Module, **tables: Tensor):
        super().__init__()
        self.network = network
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=False)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = True) -> Any:
        """The file's tensors themselves become the weights: a large network is in memory once."""
        return super().load_state_dict(state_dict, strict, assign)

    def to(self, dtype: torch.dtype) -> PromptedBackbone:
        """All numbers to dtype, but those that diffusers wants in float32 not to less."""
        kept = set(self.network._keep_in_fp32_modules or ()) if dtype.itemsize < 4 else set()
        for name, tensor in chain(self.named_parameters(), self.named_buffers()):
            tensor.data = tensor.data.to(dtype if kept.isdisjoint(name.split(".")) else torch.float32)
        return self


def require_features(pipeline: Pipeline, taker: str, encodings: Tensor, features: int) -> None:
    """ValueError where encodings (P, ..., D) do not have the features D that the network `taker` has been built for."""
    if encodings.shape[-1] != features:
        with pipeline.making(taker):
            raise ValueError(
                f"the text encoder of {pipeline.checkpoint} gives {encodings.shape[-1]} features, its {taker} takes "
                f"{features}; choose a model.checkpoint whose parts belong together"
            )


def require_multiples(of: int, **pixels: int) -> None:
    """ValueError for a side of a picture that is no multiple of so many pixels."""
    for name, value in pixels.items():
        if value < of or value % of:
            raise ValueError(f"{name} must be a multiple of {of} pixels, got {value!r}")
