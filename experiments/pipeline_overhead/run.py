"""What a pipeline costs as a model: velocities through its suspended loop, over the same bare calls of its network.

python -m experiments.pipeline_overhead.run [--repeats 9] [--threads 1] [--device cpu]

A FluxPipeline with random weights, two prompts, a network of a few microseconds' work and one of about 20 ms. In every
repeat, in turn: the network's module alone with the arguments that the pipeline gave it; the same velocities through
`Pipeline`, one time a call; all times of a search round in one call. On a CPU, which others may
share, seconds are the process's own.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel, T5Tokenizer

from experiments.common import keep, table
from oss_exp.models.pipeline import Pipeline
from oss_exp.models.tiny.parts import clip_bytes

PROMPTS = ["a red boot", "a blue bag"]
CALLS = 20  # in a row, of which each gives one number
NETWORKS = {
    "tiny": {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "size": 16},
    "of 20 ms": {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 8, "size": 32},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    rows = []
    for name, config in NETWORKS.items():
        ways = contestants(options.device, **config)
        for run in ways.values():
            run()  # warm
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(options.repeats):
            for way, run in ways.items():
                seconds[way].append(timed(run, options.device))
        bare = seconds.pop("bare")
        cells = [name, f"{1000 * statistics.median(bare) / CALLS:.2f}"]
        for taken in seconds.values():
            ratios = [one / other for one, other in zip(taken, bare, strict=True)]
            cells.append(f"{statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})")
        more = 1e6 * statistics.median(
            (one - other) / CALLS for one, other in zip(seconds["velocity"], bare, strict=True)
        )
        rows.append([*cells, f"{more:.0f}"])
    header = [
        "network",
        "ms a bare call",
        *(f"{way} / bare" for way in seconds),
        "microseconds a velocity more",
    ]
    keep(__file__, f"overhead_{options.device}.md", table(header, rows))


def contestants(device: str, **config: int) -> dict[str, Callable[[], Any]]:
    """Each makes CALLS calls of the same network with the same arguments, two prompts a call."""
    pipe = pipeline(**config).to(device)
    size = 2 * config["size"]
    model = Pipeline(
        pipe, PROMPTS, height=size, width=size, guidance_scale=3.5, max_sequence_length=16
    )
    x = torch.randn(2, *model.event_shape, generator=torch.Generator().manual_seed(0)).to(device)
    times = torch.linspace(1, 0.05, CALLS, dtype=torch.float64)
    velocity, given = model.velocity(None), []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: given.append(kwargs), with_kwargs=True
    )
    for t in times:
        velocity(x, t.expand(2))
    hook.remove()
    together = x.repeat(CALLS, 1, 1)

    def bare() -> None:
        for kwargs in given:
            pipe.transformer(**kwargs)

    def one_by_one() -> None:
        for t in times:
            velocity(x, t.expand(2))

    return {
        "bare": torch.no_grad()(bare),
        "velocity": torch.no_grad()(one_by_one),
        "round": torch.no_grad()(lambda: velocity(together, times.repeat_interleave(2))),
    }


def pipeline(size: int, **config: int) -> FluxPipeline:
    torch.manual_seed(0)
    tokenizer, ends = clip_bytes(80)
    text = {
        "vocab_size": 600,
        "hidden_size": 24,
        "intermediate_size": 32,
        "max_position_embeddings": 80,
    }
    clip = CLIPTextModel(CLIPTextConfig(**text, num_hidden_layers=2, num_attention_heads=3, **ends))
    words = [
        (word, -3.0) for word in ("<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz,.")
    ]
    t5 = T5EncoderModel(
        T5Config(vocab_size=40, d_model=20, d_kv=5, d_ff=32, num_layers=2, num_heads=4)
    )
    transformer = FluxTransformer2DModel(
        in_channels=16,
        attention_head_dim=24,
        joint_attention_dim=20,
        pooled_projection_dim=24,
        guidance_embeds=True,
        axes_dims_rope=(8, 8, 8),
        **config,
    )
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    vae = AutoencoderKL(
        latent_channels=4,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        scaling_factor=0.4,
        shift_factor=0.1,
        **blocks,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = FluxPipeline(
        scheduler, vae, clip, tokenizer, t5, T5Tokenizer(vocab=words, extra_ids=0), transformer
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def timed(run: Callable[[], Any], device: str) -> float:
    if device == "cpu":
        started = time.process_time()
        run()
        return time.process_time() - started
    torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
