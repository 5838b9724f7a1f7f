"""MAR: tokens of an image in random order, each made by a small diffusion network (Li et al. 2024, arXiv 2406.11838).

In every iteration a transformer sees the tokens that are known and gives each place of the image a context; its head,
a network on single tokens, makes those of some more places from noise, given their contexts. The head is what is
searched and what a step schedule runs. Weights are called as in the public files.
Legend: B samples, M rows; L places, one for each token of an image, n of them, V that are known; D token dims;
E context dims; S class tokens; R answers, 2 under guidance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from oss_exp.checks import require_range
from oss_exp.models.checkpoints.weights import xavier
from oss_exp.models.families.backbones import require_multiple
from oss_exp.models.families.dit import Frequencies
from oss_exp.models.families.published import Published
from oss_exp.models.guidance import NO_CLASS, Guidance
from oss_exp.noise import DDIMSchedule
from oss_exp.schedule import StepSchedule, group_mean
from oss_exp.solvers import Euler, Solver, Watch, sample
from oss_exp.velocity import BoundVelocity

CONTEXT_STEPS = (
    100  # of the head for each token that later `search_iterations` find known; the authors' number
)

layer_norm = partial(nn.LayerNorm, eps=1e-6)

# --------------------------------------------------------------------------------------------------------------
# Networks
# --------------------------------------------------------------------------------------------------------------


class HeadBlock(nn.Module):
    """h (M, n, W), y (M, n, W) -> (M, n, W)."""

    def __init__(self, width: int):
        super().__init__()
        self.in_ln = layer_norm(width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, dim=-1)
        return h + gate * self.mlp(torch.addcmul(shift, self.in_ln(h), 1 + scale))


class HeadEnd(nn.Module):
    """h (M, n, W), y (M, n, W) -> (M, n, out)."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(y).chunk(2, dim=-1)
        return self.linear(torch.addcmul(shift, F.layer_norm(h, h.shape[-1:], eps=1e-6), 1 + scale))


class Head(nn.Module):
    """x (M, n, D), clock (M,) in DDPM indices, contexts z (M, n, E) -> (M, n, 2 D): eps, and the learned variance."""

    def __init__(self, token_dim: int, context_dim: int, depth: int, width: int):
        super().__init__()
        embed = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.frequencies, self.time_embed = Frequencies(), nn.ModuleDict({"mlp": embed})
        self.cond_embed = nn.Linear(context_dim, width)
        self.input_proj = nn.Linear(token_dim, width)
        self.res_blocks = nn.ModuleList(HeadBlock(width) for _ in range(depth))
        self.final_layer = HeadEnd(width, 2 * token_dim)

    def forward(self, x: Tensor, clock: Tensor, z: Tensor) -> Tensor:
        h = self.input_proj(x)
        y = self.time_embed["mlp"](self.frequencies(clock).to(h))[:, None] + self.cond_embed(z)
        for block in self.res_blocks:
            h = block(h, y)
        return self.final_layer(h, y)


class MARNetwork(nn.Module):
    """Head, encoder and decoder on images of `channels` x `size` x `size` (latents) in patches of `patch` x `patch`.

    Called, it is the head: x (M, n, D), clock (M,), contexts (M, n, E) -> eps (M, n, D).
    buffer_size: S, class tokens in front. diffloss_d, diffloss_w: depth and width of the head.
    """

    adaptive_norms: ClassVar[tuple[str, ...]] = ("adaLN_modulation", "time_embed")

    FILES = ("checkpoint-last.pth",)

    def __init__(
        self,
        channels: int,
        size: int,
        num_classes: int,
        patch: int,
        encoder_embed_dim: int,
        encoder_depth: int,
        encoder_num_heads: int,
        decoder_embed_dim: int,
        decoder_depth: int,
        decoder_num_heads: int,
        mlp_ratio: float,
        buffer_size: int,
        diffloss_d: int,
        diffloss_w: int,
    ):
        super().__init__()
        require_range(
            at_least=1, channels=channels, size=size, num_classes=num_classes, patch=patch
        )
        require_range(
            at_least=1, encoder_embed_dim=encoder_embed_dim, encoder_num_heads=encoder_num_heads
        )
        require_range(
            at_least=1, decoder_embed_dim=decoder_embed_dim, decoder_num_heads=decoder_num_heads
        )
        require_range(at_least=1, encoder_depth=encoder_depth, decoder_depth=decoder_depth)
        require_range(
            at_least=1, buffer_size=buffer_size, diffloss_d=diffloss_d, diffloss_w=diffloss_w
        )
        require_range(above=0, at_most=64, mlp_ratio=mlp_ratio)
        require_multiple(size, patch)
        self.side, self.patch, self.buffer_size = size // patch, patch, buffer_size
        places, token_dim = self.side**2, channels * patch**2

        def learned(*shape: int) -> nn.Parameter:
            return nn.Parameter(0.02 * torch.randn(shape))

        def blocks(width: int, depth: int, heads: int) -> nn.ModuleList:
            return nn.ModuleList(
                Block(width, heads, mlp_ratio, qkv_bias=True, norm_layer=layer_norm)
                for _ in range(depth)
            )

        self.class_emb = nn.Embedding(num_classes, encoder_embed_dim)
        self.fake_latent = learned(1, encoder_embed_dim)  # in the place of a class
        self.z_proj = nn.Linear(token_dim, encoder_embed_dim)
        self.z_proj_ln = layer_norm(encoder_embed_dim)
        self.encoder_pos_embed_learned = learned(1, buffer_size + places, encoder_embed_dim)
        self.encoder_blocks = blocks(encoder_embed_dim, encoder_depth, encoder_num_heads)
        self.encoder_norm = layer_norm(encoder_embed_dim)

        self.decoder_embed = nn.Linear(encoder_embed_dim, decoder_embed_dim)
        self.mask_token = learned(1, 1, decoder_embed_dim)
        self.decoder_pos_embed_learned = learned(1, buffer_size + places, decoder_embed_dim)
        self.decoder_blocks = blocks(decoder_embed_dim, decoder_depth, decoder_num_heads)
        self.decoder_norm = layer_norm(decoder_embed_dim)
        self.diffusion_pos_embed_learned = learned(1, places, decoder_embed_dim)
        self.diffloss = nn.ModuleDict(
            {"net": Head(token_dim, decoder_embed_dim, diffloss_d, diffloss_w)}
        )
        self.apply(xavier)

    def forward(self, x: Tensor, clock: Tensor, contexts: Tensor) -> Tensor:
        return self.diffloss["net"](x, clock, contexts).chunk(2, dim=-1)[0]

    def encode(self, known: Tensor, places: Tensor, classes: Tensor) -> Tensor:
        """Tokens known (M, V, D) of places (M, V), classes (M,), NO_CLASS for none -> (M, S + V, encoder_embed_dim)."""
        positions = self.encoder_pos_embed_learned
        label = torch.where(
            classes[:, None] == NO_CLASS, self.fake_latent, self.class_emb(classes.clamp(min=0))
        )
        first = label[:, None] + positions[:, : self.buffer_size]
        rest = self.z_proj(known.to(first)) + positions[0, self.buffer_size :][places]
        h = self.z_proj_ln(torch.cat([first, rest], dim=1))
        for block in self.encoder_blocks:
            h = block(h)
        return self.encoder_norm(h)

    def decode(self, encoded: Tensor, places: Tensor) -> Tensor:
        """What `encode` gave of places (M, V) -> contexts of all places (M, L, E)."""
        h = self.decoder_embed(encoded)
        known = h[:, self.buffer_size :]
        tokens = self.mask_token.to(h).expand(len(h), self.side**2, -1)
        tokens = tokens.scatter(1, places[..., None].expand_as(known), known)
        h = torch.cat([h[:, : self.buffer_size], tokens], dim=1) + self.decoder_pos_embed_learned
        for block in self.decoder_blocks:
            h = block(h)
        return self.decoder_norm(h)[:, self.buffer_size :] + self.diffusion_pos_embed_learned

    def patchify(self, images: Tensor) -> Tensor:
        """(M, channels, size, size) -> (M, L, D)."""
        return F.pixel_unshuffle(images, self.patch).flatten(2).mT

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """(M, L, D) -> (M, channels, size, size)."""
        return F.pixel_shuffle(tokens.mT.unflatten(2, (self.side, self.side)), self.patch)

    def translate(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The public keys are ours."""
        return tensors


# --------------------------------------------------------------------------------------------------------------
# The model
# --------------------------------------------------------------------------------------------------------------


class MAR(Published):
    """A `MARNetwork` at one of its sizes, its head behind canonical time. An event is an image's tokens (L, D).

    The velocity, which is what strategies see, is the head's on the L places of an image in some iterations, which have
    an equal share of them: a later iteration those that stay unknown longer. Where an iteration has fewer unknown
    places than its share, their contexts come again in others' places. The schedule found runs in every iteration of
    `generate` (Optimal Stepsize, arXiv 2503.21774, sec. 4.1.4, which searches the first).

    num_iter:          iterations; each makes at least one token.
    guidance:          of the last iteration; it grows to that from 1 as 1 + (scale - 1) (share of known tokens).
    search_iterations: the velocity's, from 0; null: the first of each quarter. What is known before a later one is
                       made of the class alone, of seeded noise.
    search_cfg:        the velocity's scale; null: those of its iterations (almost 1 in the first).
    seed:              of the orders in which tokens are made, and of that noise.
    published:         as for `Published`.
    """

    def __init__(
        self,
        num_iter: int,
        search_iterations: Sequence[int] | None = None,
        search_cfg: float | None = None,
        seed: int = 0,
        **published: Any,
    ):
        require_range(at_least=1, num_iter=num_iter)
        require_range(at_least=0, seed=seed)
        quarters = sorted({quarter * num_iter // 4 for quarter in range(4)})
        searched = quarters if search_iterations is None else sorted(set(search_iterations))
        if not searched or searched[0] < 0 or searched[-1] >= num_iter:
            raise ValueError(
                f"search_iterations must be some of 0 to {num_iter - 1}, which num_iter={num_iter} makes, got "
                f"{search_iterations}"
            )
        require_range(at_least=-1000, at_most=1000, search_cfg=search_cfg)
        super().__init__(**published)
        if num_iter > self.event_shape[0]:
            raise ValueError(
                f"num_iter={num_iter} exceeds the {self.event_shape[0]} tokens of an image (event_shape), of which "
                "every iteration makes at least one; choose fewer"
            )
        _require_plain(self.guidance)
        if len(searched) > self.event_shape[0]:
            raise ValueError(
                f"search_iterations has {len(searched)} entries, and an image {self.event_shape[0]} tokens for them; "
                "choose fewer"
            )
        self.num_iter, self.search_iterations, self.search_cfg, self.seed = (
            num_iter,
            searched,
            search_cfg,
            seed,
        )
        self.unknown = unknown_before(self.event_shape[0], num_iter)

    def velocity(self, condition: Tensor | None, guidance: Guidance | None = None) -> BoundVelocity:
        guidance = guidance or self.guidance
        classes, of_sample = self._classes(condition, 1, guidance).unique(return_inverse=True)
        noise = [
            np.random.default_rng((self.seed, label + 1)).standard_normal(
                self.event_shape, dtype=np.float32
            )
            for label in classes.tolist()
        ]
        grid = DDIMSchedule(self.path.betas).nodes(CONTEXT_STEPS)
        steps = StepSchedule(grid)
        noise = torch.from_numpy(np.stack(noise)).to(classes.device) * steps.start_time
        labels = None if condition is None else classes
        tokens = self._make(
            Euler(), steps, noise, labels, None, guidance, self.search_iterations[-1]
        )

        # A token that was made stays: what an earlier iteration knew is among the tokens of the last.
        orders, contexts, scales = self.orders(noise), [], []
        iterations = self.search_iterations[::-1]
        used = [
            self.scale(guidance, each) if self.search_cfg is None else self.search_cfg
            for each in iterations
        ]
        shares = torch.arange(self.event_shape[0], device=classes.device).tensor_split(
            len(iterations)
        )
        for iteration, scale, share in zip(iterations, used, shares, strict=True):
            unknown = self.unknown[iteration]
            found = self.contexts(
                tokens, orders[:, unknown:], classes, any(each != 1 for each in used)
            )
            contexts.append(at(found, orders[:, share % unknown]))
            scales.append(
                torch.full((len(share), 1), scale, dtype=torch.float64, device=classes.device)
            )
        in_place = orders.argsort(dim=1)
        contexts, scales = at(torch.cat(contexts, dim=1), in_place), torch.cat(scales)[in_place]
        return self._bind(contexts, None if condition is None else of_sample, scales)

    def sample(
        self,
        solver: Solver,
        steps: StepSchedule,
        noise: Tensor,
        condition: Tensor | None = None,
        group: Tensor | None = None,
        watch: Watch | None = None,
    ) -> Tensor:
        """noise (B, L, D) at steps.start_time -> tokens (B, L, D), by the same steps in every iteration.

        Each token has its own noise, the same in whatever iteration it is made. A schedule's means, of which `group`
        (B,) says each sample's, are those of the velocity's iteration and serve in all. `watch` is never told: a step
        predicts the tokens of one iteration, not an image.
        """
        return self._make(solver, steps, noise, condition, group, self.guidance, self.num_iter)

    @property
    def image_shape(self) -> tuple[int, ...]:
        return tuple(self.backbone.unpatchify(torch.empty(1, *self.event_shape)).shape[1:])

    def loss(self, network: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """The head's, on the places of a random order that are unknown, given the others.

        Their share is the same for all of a step's images, cos(pi u / 2) of a uniform u: as often as `sample` meets it
        (MaskGIT, arXiv 2202.04200).
        """
        x0, noise, t = network.patchify(batch["x0"]), network.patchify(batch["noise"]), batch["t"]
        places = self.orders(noise)
        unknown = math.ceil(math.cos(math.pi / 2 * float(batch["shared"][0])) * places.shape[1])
        hidden, known = places[:, :unknown], places[:, unknown:]
        contexts = network.decode(network.encode(at(x0, known), known, batch["label"]), known)
        tokens = {
            "x0": at(x0, hidden),
            "noise": at(noise, hidden),
            "t": t,
            "label": at(contexts, hidden),
        }
        return super().loss(network, tokens)

    def decode(self, x0: Tensor) -> Tensor:
        """Tokens (B, L, D) -> pixels."""
        return self.decoder(self.backbone.unpatchify(x0))

    def orders(self, noise: Tensor) -> Tensor:
        """noise (B, L, D) -> the places of each sample (B, L), first those that stay unknown longest.

        A function of the seed and of the noise's signs: the same for teacher and student, in any batch, at any start.
        """
        signs = np.packbits((noise > 0).flatten(1).cpu().numpy(), axis=1)
        seeds = [(self.seed, int.from_bytes(row.tobytes(), "big")) for row in signs]
        orders = np.stack(
            [np.random.default_rng(seed).permutation(noise.shape[1]) for seed in seeds]
        )
        return torch.from_numpy(orders).to(noise.device)

    def scale(self, guidance: Guidance, iteration: int) -> float:
        """Of guidance in an iteration: linear in the tokens that are known after it (after the last, all but one)."""
        places = self.event_shape[0]
        return 1 + (guidance.scale - 1) * (places - max(self.unknown[iteration + 1], 1)) / places

    def contexts(self, tokens: Tensor, known: Tensor, classes: Tensor, guided: bool) -> Tensor:
        """tokens (B, L, D), known (B, V) places, classes (B,) -> (B, L, R, E); guided: without the class as well."""
        labels = torch.cat([classes, torch.full_like(classes, NO_CLASS)]) if guided else classes
        copies = len(labels) // len(classes)
        everything = at(tokens, known).repeat(copies, 1, 1), known.repeat(copies, 1), labels
        parts = zip(*(each.split(self.micro_batch) for each in everything), strict=True)
        found = [
            self.backbone.decode(self.backbone.encode(x, where, y), where) for x, where, y in parts
        ]
        return torch.cat(found).unflatten(0, (copies, -1)).movedim(0, 2)

    @torch.no_grad()
    def _make(
        self,
        solver: Solver,
        steps: StepSchedule,
        noise: Tensor,
        condition: Tensor | None,
        group: Tensor | None,
        guidance: Guidance,
        iterations: int,
    ) -> Tensor:
        """The first so many iterations; places that are still unknown have zeros."""
        classes = self._classes(condition, len(noise), guidance)
        orders, tokens = self.orders(noise), torch.zeros_like(noise)
        rows = torch.arange(len(noise), device=noise.device)
        mean = None if steps.mean is None else group_mean(steps.mean, noise, group)
        for iteration in range(iterations):
            before, after = self.unknown[iteration], self.unknown[iteration + 1]
            places, scale = (
                orders[:, after:before].sort(dim=1).values,
                self.scale(guidance, iteration),
            )
            contexts = self.contexts(tokens, orders[:, before:], classes, scale != 1)
            velocity = self._bind(at(contexts, places), rows, scale)
            own = steps if mean is None else steps.with_mean(at(mean, places))
            made = sample(
                solver, velocity, at(noise, places), own, group=None if mean is None else rows
            )
            tokens = tokens.scatter(1, places[..., None].expand_as(made), made)
        return tokens

    def _bind(self, contexts: Tensor, rows: Tensor | None, scale: float | Tensor) -> BoundVelocity:
        """contexts (U, n, R, E), rows (B,) of them for each sample, None for the first -> v(x (M, n, D), t (M,)).

        scale: of the guidance, one or (U, n, 1).
        """
        answers = contexts.shape[2]

        def guided(x: Tensor, t: Tensor, rows: Tensor | None) -> Tensor:
            z = contexts[:1].expand(len(x), -1, -1, -1) if rows is None else contexts[rows]
            z = z.movedim(2, 0).flatten(0, 1)
            v = self._velocity(x.repeat(answers, 1, 1), t.repeat(answers), z).unflatten(
                0, (answers, -1)
            )
            if answers == 1:
                return v[0]
            own = scale
            if isinstance(scale, Tensor):
                own = (scale[:1] if rows is None else scale[rows]).to(v)
            return own * v[0] + (1 - own) * v[1]

        kind = BoundVelocity if answers == 1 else Guided
        return kind(guided, rows, max(1, self.micro_batch // answers))

    def _classes(self, condition: Tensor | None, count: int, guidance: Guidance) -> Tensor:
        """Of each sample, NO_CLASS without a condition; ValueError for what the network does not know."""
        _require_plain(guidance)
        if condition is None:
            if guidance.scale != 1:
                raise ValueError(
                    f"model.guidance.scale={guidance.scale} needs class labels; set data.classes, or scale 1"
                )
            return torch.full((count,), NO_CLASS, device=self.backbone.fake_latent.device)
        if not bool(((condition >= 0) & (condition < self.num_classes)).all()):
            raise ValueError(
                f"{self.name} has {self.num_classes} classes, got {condition.unique().tolist()}"
            )
        return condition


class Guided(BoundVelocity):
    """Two network rows for each row of x, mixed within.

    Steps that are fitted to the two answers would hold one iteration's scale, and the others have their own.
    """

    def rows_at(self, t: Tensor) -> Tensor:
        return torch.full_like(t, 2)


def unknown_before(places: int, num_iter: int) -> list[int]:
    """Of so many places, how many are unknown before each iteration, and 0: a cosine (MaskGIT, arXiv 2202.04200)."""
    unknown = [places]
    for iteration in range(1, num_iter):
        wanted = math.floor(places * math.cos(math.pi / 2 * iteration / num_iter))
        unknown.append(max(1, min(unknown[-1] - 1, wanted)))
    return [*unknown, 0]


def at(x: Tensor, places: Tensor) -> Tensor:
    """x (B, L, ...), places (B, n) -> (B, n, ...)."""
    return x[torch.arange(len(x), device=x.device)[:, None], places]


def _require_plain(guidance: Guidance) -> None:
    if guidance.channels is not None or guidance.interval is not None:
        raise ValueError(
            f"MAR guides all channels at all times; set model.guidance to a scale alone, got {guidance}"
        )
