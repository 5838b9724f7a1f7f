"""The needs of a network of 20 B parameters on 64 GPUs, computed on the meta device.

python -m experiments.scaling.plan

QwenImageTransformer2DModel at 1024 x 1024, in bfloat16, machines of 8 GPUs. Nothing is allocated:
operations are counted in a forward pass on the meta device, bytes from the parameters. Times are
those of the link and of the arithmetic alone.
"""

from __future__ import annotations

import math

import torch
from diffusers import QwenImageTransformer2DModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from experiments.common import command_line, keep, table

MACHINES, GPUS = 8, 8  # and GPUs of each
TOKENS, WORDS, CHANNELS = 4096, 512, 64  # of a sample
NODES, SAMPLES = 100, 64
ARITHMETIC, LINK = 400e12, 400e9  # operations and bytes a second that a GPU reaches
BYTES = 2  # of a number in bfloat16
PEAK = 9.6  # peak of a search over its teacher's states, experiments/memory
SPLIT = ("attn", "img_mlp", "txt_mlp", "img_mod", "txt_mod")  # of a block, by tensor parallelism


def build() -> nn.Module:
    with torch.device("meta"):
        return QwenImageTransformer2DModel().to(torch.bfloat16).eval()


def size(module: nn.Module) -> int:
    """Return the bytes of its weights."""
    return BYTES * sum(weight.numel() for weight in module.parameters())


@torch.no_grad()
def operations(network: nn.Module) -> int:
    """Count the operations of a forward pass of one sample."""
    text = torch.empty(
        1, WORDS, network.config.joint_attention_dim, dtype=torch.bfloat16, device="meta"
    )
    side = math.isqrt(TOKENS)
    with FlopCounterMode(display=False) as counter:
        network(
            hidden_states=torch.empty(1, TOKENS, CHANNELS, dtype=torch.bfloat16, device="meta"),
            encoder_hidden_states=text,
            timestep=torch.empty(1, dtype=torch.bfloat16, device="meta"),
            img_shapes=[[(1, side, side)]],
        )
    return counter.get_total_flops()


def main() -> None:
    command_line(__doc__).parse_args()
    network = build()
    blocks = list(network.transformer_blocks)
    whole = size(network)
    block = size(blocks[0])
    split = sum(
        size(part) for each in blocks for name, part in each.named_children() if name in SPLIT
    )
    width = network.config.num_attention_heads * network.config.attention_head_dim
    stream = BYTES * (TOKENS + WORDS) * width  # one sample's residual stream
    activations = stream * (1 + 3 + 4)  # with queries, keys and values, and the widest layer
    state = 4 * TOKENS * CHANNELS
    seconds = operations(network) / ARITHMETIC

    # Bytes of weights on a GPU, ranks, bytes that a GPU sends in a call of one sample, and seconds
    # of its arithmetic.
    layouts = {
        "whole on every GPU (ddp)": (whole, MACHINES * GPUS, 0.0, seconds),
        "FSDP2 within a machine": (
            whole / GPUS + 2 * block,
            MACHINES * GPUS,
            whole * (GPUS - 1) / GPUS,
            seconds,
        ),
        "tensor parallel within a machine": (
            split / GPUS + (whole - split),
            MACHINES,
            len(blocks) * 2 * stream * 2 * (GPUS - 1) / GPUS,
            seconds / GPUS,
        ),
    }
    rows = []
    for name, (weights, ranks, sent, arithmetic) in layouts.items():
        samples = math.ceil(SAMPLES / ranks)
        search = PEAK * samples * (NODES + 1) * state
        figures = [
            weights / 1e9,
            activations / 1e9,
            search / 1e9,
            (weights + activations + search) / 1e9,
        ]
        figures += [sent / 1e9, 1e3 * sent / LINK, 1e3 * arithmetic]
        rows.append([name, str(ranks), str(samples), *(f"{figure:.1f}" for figure in figures)])
    header = [
        "way",
        "ranks",
        "samples a rank",
        "weights, GB",
        "a call, GB",
        "search, GB",
        "in all, GB",
    ]
    header += ["sent a call, GB", "ms", "arithmetic, ms"]
    summary = (
        f"{whole / BYTES / 1e9:.2f} B parameters, {whole / 1e9:.1f} GB; "
        f"{len(blocks)} blocks of {block / 1e9:.2f} GB; "
        f"{seconds * ARITHMETIC / 1e12:.0f} TFLOP a sample's call; "
        f"its state is {state / 1e6:.2f} MB."
    )
    keep(__file__, "plan.md", f"{summary}\n\n{table(header, rows)}")


if __name__ == "__main__":
    main()
