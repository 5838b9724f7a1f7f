"""The speed of full-size networks on a GPU: bare, in a search and in sampling.

python -m experiments.gpu_speed.run [--output FOLDER] [--seconds 150] [--dry]

DiT-XL/2, EDM's ADM for ImageNet 64 and a transformer of FLUX's shape, all with random weights, the
last one in bfloat16. Measurements that do not fit into the time are skipped and listed; every
result is written at once. --dry: the same at small sizes on the CPU.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from experiments.common import command_line, configuration, table
from oss_exp.files import write_atomically
from oss_exp.models.base import Model
from oss_exp.noise import FlowSchedule
from oss_exp.solvers import Euler, sample
from oss_exp.stepsize import Band, ClosedForm, OSSShared, Problem
from oss_exp.tasks import border
from oss_exp.velocity import BoundVelocity

GOAL = 3  # per cent of a search or of sampling outside of the network, at most
COLUMNS = {
    "rows": "rows a call",
    "bare": "images/s bare",
    "sampling": "in sampling",
    "search": "in the search",
    "sampling_outside": "outside, %, sampling",
    "search_outside": "outside, %, search",
    "memory": "memory bare, GiB",
    "search_memory": "of the search, GiB",
}


@dataclass
class Sizes:
    """The sizes of the measurements.

    Attributes:
        device: Device of all networks.
        steps: Network calls of an image.
        nodes: Teacher steps.
        samples: Images of a search.
        repeats: Repeats of a bare call.
        full: Whether networks have their full size.
        compiler: Backend of torch.compile.
    """

    device: torch.device
    steps: int = 10
    nodes: int = 48
    samples: int = 4
    repeats: int = 5
    full: bool = True
    compiler: str = "inductor"


@dataclass
class Network:
    """A bound network.

    Attributes:
        velocity: Its velocity.
        shape: Shape of a sample.
        rows: Rows of a call.
        blocks: Its equal parts, which are compiled once for all.
    """

    velocity: BoundVelocity
    shape: tuple[int, ...]
    rows: int
    blocks: list[nn.Module]


def published(sizes: Sizes, model: str, rows: int, *settings: str) -> Network:
    """Return a network of conf/model with random weights."""
    size = "full" if sizes.full else "tiny"
    overrides = [f"model={model}", f"model.size={size}", f"model.sizes.{size}.checkpoint=random"]
    cfg = configuration(*overrides, f"model.micro_batch={rows}", *settings)
    network: Model = border.build(cfg.model, "model", Model).to(sizes.device)
    classes = torch.arange(sizes.samples, device=sizes.device)
    blocks = []
    for module in network.modules():
        if type(module).__name__ == "BasicTransformerBlock":
            blocks.append(module)
    return Network(network.velocity(classes), network.event_shape, rows, blocks)


def dit(sizes: Sizes) -> Network:
    decoder = f"model.sizes.{'full' if sizes.full else 'tiny'}.decoder.checkpoint=random"
    return published(sizes, "dit_xl_2_256", 32, decoder, "model.dtype=bfloat16")


def adm(sizes: Sizes) -> Network:
    return published(sizes, "edm_imagenet64", 64, "model.dtype=float16")


def flux(sizes: Sizes) -> Network:
    """Return a transformer of FLUX.1's shape at 1024 x 1024 pixels and 512 words."""
    # Random weights.
    small = {
        "num_layers": 1,
        "num_single_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
    }
    small |= {"joint_attention_dim": 32, "pooled_projection_dim": 16, "axes_dims_rope": (4, 6, 6)}
    settings: dict[str, Any] = {} if sizes.full else small
    with torch.device("meta"):
        network = FluxTransformer2DModel(guidance_embeds=True, **settings).to(torch.bfloat16)
    network = network.to_empty(device=sizes.device).eval().requires_grad_(False)
    for weight in network.parameters():
        weight.normal_(std=0.02)

    # Fixed inputs.
    side, words = (64, 512) if sizes.full else (4, 8)
    grid = torch.cartesian_prod(torch.arange(1), torch.arange(side), torch.arange(side))
    text = torch.zeros(words, network.config.joint_attention_dim)
    fixed = {"img_ids": grid.float(), "txt_ids": torch.zeros(words, 3), "text": text}
    places = {name: each.to(sizes.device, torch.bfloat16) for name, each in fixed.items()}
    pooled = torch.zeros(1, network.config.pooled_projection_dim, device=sizes.device).bfloat16()

    def fn(x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        output = network(
            hidden_states=x.bfloat16(),
            encoder_hidden_states=places["text"].expand(len(x), -1, -1),
            pooled_projections=pooled.expand(len(x), -1),
            timestep=t.bfloat16(),
            guidance=torch.full_like(t, 3.5, dtype=torch.bfloat16),
            img_ids=places["img_ids"],
            txt_ids=places["txt_ids"],
            return_dict=False,
        )[0]
        return output.to(x)

    blocks = [*network.transformer_blocks, *network.single_transformer_blocks]
    return Network(BoundVelocity(fn, micro_batch=4), (side * side, 64), 4, blocks)


NETWORKS: dict[str, Callable[[Sizes], Network]] = {
    "DiT-XL/2, bfloat16": dit,
    "ADM ImageNet 64, float16": adm,
    "FLUX's shape, bfloat16": flux,
}


class Clock:
    """Seconds of the device within network calls, and of everything around them."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.events: list[tuple[Any, Any]] = []
        self.rows = 0
        self.inside = self.total = 0.0

    def counted(self, velocity: BoundVelocity) -> BoundVelocity:
        """Return the same velocity with calls that are timed on the device."""

        def fn(x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
            start = self._mark()
            output = velocity.fn(x, t, condition)
            self.events.append((start, self._mark()))
            self.rows += len(x)
            return output

        return replace(velocity, fn=fn)

    @contextmanager
    def running(self) -> Iterator[None]:
        self.events.clear()
        self.rows = 0
        self._wait()
        started = time.perf_counter()
        yield
        self._wait()
        self.total = time.perf_counter() - started

        self.inside = 0.0
        for start, end in self.events:
            self.inside += start.elapsed_time(end) / 1e3 if self.cuda else end - start

    @property
    def outside(self) -> float:
        """Return the share of time outside the network, in per cent."""
        return 100 * (1 - self.inside / self.total)

    def _mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


@torch.no_grad()
def speed(name: str, sizes: Sizes, result: dict[str, Any], done: Callable[[], None]) -> Network:
    """Fill in images a second, the shares outside the network, and GiB; return the network.

    `done` is called after each of them.
    """
    # The network, beside those that were built before it.
    before = torch.cuda.memory_allocated() / 2**30 if sizes.device.type == "cuda" else 0.0
    network = NETWORKS[name](sizes)

    # Bare calls.
    clock = Clock(sizes.device)
    memory(sizes.device)
    rows = torch.randn(network.rows, *network.shape, device=sizes.device)
    rows = rows[: network.rows - network.rows % sizes.samples or None]
    result["rows"] = len(rows)
    seconds = bare_seconds(network, rows, clock, sizes.repeats)
    result["bare"] = len(rows) / seconds / sizes.steps
    result["memory"] = memory(sizes.device) - before
    done()

    # Sampling.
    velocity = clock.counted(network.velocity)
    noise = torch.randn(sizes.samples, *network.shape, device=sizes.device)
    grid = FlowSchedule().nodes(sizes.nodes).to(sizes.device)
    problem = Problem(velocity, noise, grid, Euler())
    steps = ClosedForm().plan(problem, [sizes.steps])[sizes.steps]
    search = OSSShared("pinned", Band(8, 1), False)
    short = Problem(velocity, noise, FlowSchedule().nodes(4).to(sizes.device), Euler())
    sample(Euler(), velocity, noise, search.plan(short, [2])[2])  # loads their kernels
    with clock.running():
        sample(Euler(), velocity, noise, steps)
    result["sampling"] = sizes.samples / clock.total
    result["sampling_outside"] = clock.outside
    done()

    # The search.
    with clock.running():
        search.plan(problem, [sizes.steps])
    result["search_calls"] = len(clock.events)
    result["search_seconds"] = clock.total
    result["search"] = clock.rows / clock.total / sizes.steps
    result["search_outside"] = clock.outside
    result["search_memory"] = memory(sizes.device) - before
    done()
    return network


def bare_seconds(network: Network, rows: Tensor, clock: Clock, repeats: int) -> float:
    """Return the seconds of one call of these rows, the best of a few."""
    t = torch.full((len(rows),), 0.5, dtype=torch.float64, device=rows.device)
    best = float("inf")
    for _ in range(repeats + 1):  # the first one warms up
        with clock.running():
            network.velocity(rows, t)
        best = min(best, clock.total)
    return best


@torch.no_grad()
def faster(
    network: Network, sizes: Sizes, times: dict[str, float], done: Callable[[], None]
) -> None:
    """Fill in the milliseconds of a call: plain, with compiled blocks, and as a CUDA graph.

    `done` is called after each of them.
    """
    clock = Clock(sizes.device)
    rows = torch.randn(sizes.samples, *network.shape, device=sizes.device)

    # As it is.
    times["plain"] = 1e3 * bare_seconds(network, rows, clock, sizes.repeats)
    done()

    # With compiled blocks.
    if network.blocks:
        for block in network.blocks:
            block.compile(dynamic=False, backend=sizes.compiler)
        with clock.running():
            network.velocity(rows, rows.new_full((len(rows),), 0.5, dtype=torch.float64))
        times["compiled, first call"] = 1e3 * clock.total
        times["compiled"] = 1e3 * bare_seconds(network, rows, clock, sizes.repeats)
        done()

    # As a graph.
    if clock.cuda:
        times["as a graph"] = 1e3 * graphed_seconds(network, rows, clock, sizes.repeats)
        done()


def graphed_seconds(network: Network, rows: Tensor, clock: Clock, repeats: int) -> float:
    """Return the seconds of one call that is replayed as a CUDA graph."""
    t = torch.full((len(rows),), 0.5, dtype=torch.float64, device=rows.device)
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        network.velocity(rows, t)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        network.velocity(rows, t)
    best = float("inf")
    for _ in range(repeats):
        with clock.running():
            graph.replay()
        best = min(best, clock.total)
    return best


@torch.no_grad()
def inner_products(sizes: Sizes) -> list[dict[str, Any]]:
    """Measure the inner products <u_p, u_q> in float64 and float32.

    The second float32 variant has compensated sums over slices.
    """
    count, features = (64, 4096 * 64) if sizes.full else (8, 4096)
    vectors = torch.randn(sizes.samples, count, features, device=sizes.device)
    vectors[:, 1:] = vectors[:, :1] + 1e-3 * vectors[:, 1:]  # neighbours on a path nearly cancel
    exact = torch.bmm(vectors.double(), vectors.double().mT)

    # Time and error of every variant.
    variants = {
        "float64": lambda: torch.bmm(vectors.double(), vectors.double().mT),
        "float32": lambda: torch.bmm(vectors, vectors.mT).double(),
        "float32, compensated": lambda: compensated(vectors),
    }
    results = []
    for name, multiply in variants.items():
        clock = Clock(sizes.device)
        seconds = []
        for _ in range(sizes.repeats + 1):
            with clock.running():
                products = multiply()
            seconds.append(clock.total)
        distances = squared_distances(products)
        expected = squared_distances(exact)
        error = (distances - expected).abs().max() / expected.max()
        results.append({"way": name, "ms": 1e3 * min(seconds), "error of distances": float(error)})
    return results


def squared_distances(products: Tensor) -> Tensor:
    """Return |u_p - u_q|^2 of inner products (B, P, P), which a search compares."""
    squares = products.diagonal(dim1=1, dim2=2)
    return squares[:, :, None] + squares[:, None] - 2 * products


def compensated(vectors: Tensor, features: int = 512) -> Tensor:
    """Return inner products (B, P, P) of float32 vectors (B, P, F).

    The sums of slices are compensated (Neumaier).
    """
    total = 0
    correction = 0
    for part in vectors.split(features, dim=2):
        term = torch.bmm(part, part.mT)
        new = total + term
        correction = correction + (term - (new - total))
        total = new
    assert isinstance(total, Tensor)
    return total.double() + correction


def memory(device: torch.device) -> float:
    """Return the peak in GiB since the last call; 0 on a CPU."""
    if device.type != "cuda":
        return 0.0
    most = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return most


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--output", type=Path, default=Path("outputs/gpu"))
    parser.add_argument(
        "--seconds", type=float, default=150, help="after which no measurement is begun"
    )
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    sizes = Sizes(torch.device("cuda"))
    if options.dry:
        sizes = Sizes(
            torch.device("cpu"),
            steps=2,
            nodes=8,
            samples=2,
            repeats=1,
            full=False,
            compiler="eager",
        )

    end = time.monotonic() + options.seconds
    card = torch.cuda.get_device_name() if sizes.device.type == "cuda" else "a CPU, small sizes"
    results: dict[str, Any] = {"device": card, "speed": {}, "faster": {}, "left out": []}
    networks: dict[str, Network] = {}

    def measure(name: str) -> None:
        result = results["speed"].setdefault(name, {})
        networks[name] = speed(name, sizes, result, lambda: save(options.output, results))

    def hasten(name: str) -> None:
        times = results["faster"].setdefault(name, {})
        faster(networks[name], sizes, times, lambda: save(options.output, results))

    # Compiling may be slow, and capturing may fail: they come last.
    measurements = [("inner products", lambda: results.update(products=inner_products(sizes)))]
    measurements += [(name, partial(measure, name)) for name in NETWORKS]
    measurements += [(f"{name}, faster", partial(hasten, name)) for name in NETWORKS]
    for name, work in measurements:
        if time.monotonic() > end:
            results["left out"].append(name)
            continue
        try:
            work()
        except Exception as error:  # the others are measured all the same
            results["left out"].append(f"{name}: {type(error).__name__}: {str(error)[:300]}")
        save(options.output, results)
    save(options.output, results)
    print((options.output / "speed.md").read_text())


def save(folder: Path, results: dict[str, Any]) -> None:
    """Write speed.json and speed.md with the results so far."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "speed.json", json.dumps(results, indent=1))

    # Searching and sampling.
    parts = [f"On {results['device']}; goal: at most {GOAL} % outside of the network.\n"]
    rows = []
    for name, row in results["speed"].items():
        rows.append([name, *(f"{row[key]:.3g}" if key in row else "-" for key in COLUMNS)])
    parts.append(table(["network", *COLUMNS.values()], rows))

    # Faster calls.
    rows = []
    for name, times in results["faster"].items():
        for variant, milliseconds in times.items():
            rows.append([name, variant, f"{milliseconds:.2f}"])
    parts.append(table(["network", "way", "ms a call"], rows))

    # Inner products.
    if products := results.get("products"):
        rows = [
            [row["way"], f"{row['ms']:.3g}", f"{row['error of distances']:.1e}"] for row in products
        ]
        parts.append(table(["inner products", "ms", "error of distances"], rows))
    parts += [f"left out: {reason}\n" for reason in results["left out"]]
    write_atomically(folder / "speed.md", "\n".join(parts))


if __name__ == "__main__":
    main()
