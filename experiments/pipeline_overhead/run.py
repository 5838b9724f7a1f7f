"""The overhead of a pipeline as a model: velocities in its loop against bare network calls.

python -m experiments.pipeline_overhead.run [--repeats 9] [--threads 1] [--device cpu]

A FluxPipeline with random weights and two prompts, with a tiny network and one of about 20 ms a
call. In every repeat there are, in turn, the network's module alone with the arguments that the
pipeline passed; the same velocities through `Pipeline`, one time a call; and all times of a search
round in one call. On a CPU, which may be shared, seconds are the process's own.
"""

from __future__ import annotations

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

from experiments.common import command_line, keep, table
from oss_exp.models.pipeline import Pipeline
from oss_exp.models.tiny.parts import clip_bytes

PROMPTS = ["a red boot", "a blue bag"]
CALLS = 20  # in a row, timed together
NETWORKS = {
    "tiny": {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "size": 16},
    "of 20 ms": {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 8, "size": 32},
}


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    rows = []
    for name, sizes in NETWORKS.items():
        seconds = measured(options.device, options.repeats, sizes)
        bare = seconds.pop("bare")
        row = [name, f"{1000 * statistics.median(bare) / CALLS:.2f}"]

        # Ratios to the bare calls.
        for times in seconds.values():
            ratios = [value / reference for value, reference in zip(times, bare, strict=True)]
            row.append(f"{statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})")

        # What one velocity adds.
        pairs = zip(seconds["velocity"], bare, strict=True)
        added = statistics.median((value - reference) / CALLS for value, reference in pairs)
        rows.append([*row, f"{1e6 * added:.0f}"])

    ratio_names = [f"{contestant} / bare" for contestant in seconds]
    header = ["network", "ms a bare call", *ratio_names, "microseconds a velocity more"]
    keep(__file__, f"overhead_{options.device}.md", table(header, rows))


def measured(device: str, repeats: int, sizes: dict[str, int]) -> dict[str, list[float]]:
    """Return the seconds of every contestant in every repeat."""
    runs = contestants(device, **sizes)
    for run in runs.values():
        run()  # warm up
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            seconds[name].append(timed(run, device))
    return seconds


def contestants(device: str, **sizes: int) -> dict[str, Callable[[], Any]]:
    """Return functions that make CALLS calls of the same network with the same arguments."""
    pipe = pipeline(**sizes).to(device)
    side = 2 * sizes["size"]
    model = Pipeline(
        pipe, PROMPTS, height=side, width=side, guidance_scale=3.5, max_sequence_length=16
    )
    x = torch.randn(2, *model.event_shape, generator=torch.Generator().manual_seed(0)).to(device)
    times = torch.linspace(1, 0.05, CALLS, dtype=torch.float64)
    velocity = model.velocity(None)

    # Record the network's arguments.
    arguments = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: arguments.append(kwargs), with_kwargs=True
    )
    for t in times:
        velocity(x, t.expand(2))
    hook.remove()

    # The contestants.
    def bare() -> None:
        for kwargs in arguments:
            pipe.transformer(**kwargs)

    def one_by_one() -> None:
        for t in times:
            velocity(x, t.expand(2))

    rows = x.repeat(CALLS, 1, 1)
    return {
        "bare": torch.no_grad()(bare),
        "velocity": torch.no_grad()(one_by_one),
        "round": torch.no_grad()(lambda: velocity(rows, times.repeat_interleave(2))),
    }


def pipeline(size: int, **sizes: int) -> FluxPipeline:
    """Return a FluxPipeline with small random parts."""
    torch.manual_seed(0)

    # Text encoders.
    tokenizer, ends = clip_bytes(80)
    clip_sizes = {
        "vocab_size": 600,
        "hidden_size": 24,
        "intermediate_size": 32,
        "max_position_embeddings": 80,
    }
    clip = CLIPTextModel(
        CLIPTextConfig(**clip_sizes, num_hidden_layers=2, num_attention_heads=3, **ends)
    )
    words = ("<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz,.")
    t5_tokenizer = T5Tokenizer(vocab=[(word, -3.0) for word in words], extra_ids=0)
    t5 = T5EncoderModel(
        T5Config(vocab_size=40, d_model=20, d_kv=5, d_ff=32, num_layers=2, num_heads=4)
    )

    # Network.
    transformer = FluxTransformer2DModel(
        in_channels=16,
        attention_head_dim=24,
        joint_attention_dim=20,
        pooled_projection_dim=24,
        guidance_embeds=True,
        axes_dims_rope=(8, 8, 8),
        **sizes,
    )

    # Autoencoder.
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        scaling_factor=0.4,
        shift_factor=0.1,
    )

    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = FluxPipeline(scheduler, vae, clip, tokenizer, t5, t5_tokenizer, transformer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def timed(run: Callable[[], Any], device: str) -> float:
    """Return the seconds of a run; on a CPU those that the process itself worked."""
    if device == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
