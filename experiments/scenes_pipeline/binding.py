"""Keep all encoded scenes of two garments, and a third of the others.

python -m experiments.scenes_pipeline.binding --latents FILE --output FILE [--twice TASK]

A network learns late which garment is where and which has which colour; single garments, colours
and numbers it draws well long before. With `--twice`, the scenes of one task are in the file twice.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from experiments.common import command_line
from oss_exp.data.captioned import CaptionedLatents
from oss_exp.geneval.rules import TASKS

BINDING = ("two_object", "position", "color_attr")
OTHERS = 3  # of so many other scenes one is kept


def main(latents: Path, output: Path, twice: str | None) -> None:
    """Write the kept rows of a file that `latents.py` wrote, where tasks take turns."""
    scenes = CaptionedLatents(latents)

    number = torch.arange(len(scenes))
    task = number % len(TASKS)
    binds = torch.tensor([name in BINDING for name in TASKS])[task]
    kept = number[binds | (number // len(TASKS) % OTHERS == 0)]
    if twice is not None:
        kept = torch.cat([kept, number[task == TASKS.index(twice)]])

    tensors = {"latents": scenes.latents[kept].half(), "labels": scenes.labels[kept]}
    save_file(tensors, output, {"captions": json.dumps(scenes.captions)})


if __name__ == "__main__":
    parser = command_line(__doc__)
    parser.add_argument("--latents", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--twice", choices=TASKS, metavar="TASK", help=" | ".join(TASKS))
    main(**vars(parser.parse_args()))
