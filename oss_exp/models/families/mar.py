"""Run MAR, which makes the tokens of an image in random order (Li et al. 2024, arXiv 2406.11838).

In each iteration a transformer sees the tokens that are known and returns a context for
each place of the image. Its head, a diffusion network on single tokens, makes some more
tokens from noise, given their contexts. The head is searched, and a step schedule runs
it. Weights have the names of the public files.
Shapes: B samples, M rows; L places, one for each token of an image, n of them, V that
are known; D token dimensions; E context dimensions; S class tokens; R answers, 2 under
guidance.
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

CONTEXT_STEPS = 100  # of the head, for tokens before a search iteration; the authors' number

layer_norm = partial(nn.LayerNorm, eps=1e-6)

# ------------------------------------------------------------------------------
# Networks
# ------------------------------------------------------------------------------


class HeadBlock(nn.Module):
    """A residual block of the head."""

    def __init__(self, width: int):
        super().__init__()
        self.in_ln = layer_norm(width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        """Return (M, n, W) from h (M, n, W), modulated by y (M, n, W)."""
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, dim=-1)
        return h + gate * self.mlp(torch.addcmul(shift, self.in_ln(h), 1 + scale))


class HeadEnd(nn.Module):
    """The last layer of the head."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        """Return (M, n, out) from h (M, n, W), modulated by y (M, n, W)."""
        shift, scale = self.adaLN_modulation(y).chunk(2, dim=-1)
        h = F.layer_norm(h, h.shape[-1:], eps=1e-6)
        return self.linear(torch.addcmul(shift, h, 1 + scale))


class Head(nn.Module):
    """The diffusion network on single tokens."""

    def __init__(self, token_dim: int, context_dim: int, depth: int, width: int):
        super().__init__()
        embed = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.frequencies = Frequencies()
        self.time_embed = nn.ModuleDict({"mlp": embed})
        self.cond_embed = nn.Linear(context_dim, width)
        self.input_proj = nn.Linear(token_dim, width)
        self.res_blocks = nn.ModuleList(HeadBlock(width) for _ in range(depth))
        self.final_layer = HeadEnd(width, 2 * token_dim)

    def forward(self, x: Tensor, clock: Tensor, z: Tensor) -> Tensor:
        """Return eps and the learned variance, together (M, n, 2 D).

        Args:
            x: Tokens (M, n, D).
            clock: DDPM indices (M,).
            z: Contexts (M, n, E).
        """
        h = self.input_proj(x)
        time = self.time_embed["mlp"](self.frequencies(clock).to(h))
        y = time[:, None] + self.cond_embed(z)
        for block in self.res_blocks:
            h = block(h, y)
        return self.final_layer(h, y)


class MARNetwork(nn.Module):
    """The head, the encoder and the decoder of MAR. Called, it is the head.

    Args:
        channels: Channels of the images (latents).
        size: Their height and width.
        num_classes: Number of classes.
        patch: Height and width of a token.
        encoder_embed_dim: Features of the encoder.
        encoder_depth: Its blocks.
        encoder_num_heads: Heads of its attentions.
        decoder_embed_dim: Features of the decoder.
        decoder_depth: Its blocks.
        decoder_num_heads: Heads of its attentions.
        mlp_ratio: Hidden features of an MLP, as a multiple.
        buffer_size: S, class tokens in front.
        diffloss_d: Depth of the head.
        diffloss_w: Width of the head.
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

        self.side = size // patch
        self.patch = patch
        self.buffer_size = buffer_size
        places = self.side**2
        token_dim = channels * patch**2

        def learned(*shape: int) -> nn.Parameter:
            return nn.Parameter(0.02 * torch.randn(shape))

        def blocks(width: int, depth: int, heads: int) -> nn.ModuleList:
            build = partial(Block, width, heads, mlp_ratio, qkv_bias=True, norm_layer=layer_norm)
            return nn.ModuleList(build() for _ in range(depth))

        # Encoder.
        self.class_emb = nn.Embedding(num_classes, encoder_embed_dim)
        self.fake_latent = learned(1, encoder_embed_dim)  # in the place of a class
        self.z_proj = nn.Linear(token_dim, encoder_embed_dim)
        self.z_proj_ln = layer_norm(encoder_embed_dim)
        self.encoder_pos_embed_learned = learned(1, buffer_size + places, encoder_embed_dim)
        self.encoder_blocks = blocks(encoder_embed_dim, encoder_depth, encoder_num_heads)
        self.encoder_norm = layer_norm(encoder_embed_dim)

        # Decoder.
        self.decoder_embed = nn.Linear(encoder_embed_dim, decoder_embed_dim)
        self.mask_token = learned(1, 1, decoder_embed_dim)
        self.decoder_pos_embed_learned = learned(1, buffer_size + places, decoder_embed_dim)
        self.decoder_blocks = blocks(decoder_embed_dim, decoder_depth, decoder_num_heads)
        self.decoder_norm = layer_norm(decoder_embed_dim)
        self.diffusion_pos_embed_learned = learned(1, places, decoder_embed_dim)

        # Head.
        head = Head(token_dim, decoder_embed_dim, diffloss_d, diffloss_w)
        self.diffloss = nn.ModuleDict({"net": head})
        self.apply(xavier)

    def forward(self, x: Tensor, clock: Tensor, contexts: Tensor) -> Tensor:
        """Return eps (M, n, D) for tokens x (M, n, D), clock (M,) and contexts (M, n, E)."""
        return self.diffloss["net"](x, clock, contexts).chunk(2, dim=-1)[0]

    def encode(self, known: Tensor, places: Tensor, classes: Tensor) -> Tensor:
        """Return the features (M, S + V, encoder_embed_dim) of known tokens.

        Args:
            known: Tokens (M, V, D).
            places: Their places (M, V).
            classes: Classes (M,), NO_CLASS for none.
        """
        positions = self.encoder_pos_embed_learned
        embedded = self.class_emb(classes.clamp(min=0))
        label = torch.where(classes[:, None] == NO_CLASS, self.fake_latent, embedded)
        front = label[:, None] + positions[:, : self.buffer_size]
        tokens = self.z_proj(known.to(front)) + positions[0, self.buffer_size :][places]
        h = self.z_proj_ln(torch.cat([front, tokens], dim=1))
        for block in self.encoder_blocks:
            h = block(h)
        return self.encoder_norm(h)

    def decode(self, encoded: Tensor, places: Tensor) -> Tensor:
        """Return contexts (M, L, E) of all places, from the features of known ones (M, V)."""
        h = self.decoder_embed(encoded)
        features = h[:, self.buffer_size :]
        tokens = self.mask_token.to(h).expand(len(h), self.side**2, -1)
        tokens = tokens.scatter(1, places[..., None].expand_as(features), features)
        h = torch.cat([h[:, : self.buffer_size], tokens], dim=1) + self.decoder_pos_embed_learned
        for block in self.decoder_blocks:
            h = block(h)
        return self.decoder_norm(h)[:, self.buffer_size :] + self.diffusion_pos_embed_learned

    def patchify(self, images: Tensor) -> Tensor:
        """Return the tokens (M, L, D) of images (M, channels, size, size)."""
        return F.pixel_unshuffle(images, self.patch).flatten(2).mT

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """Return the images (M, channels, size, size) of tokens (M, L, D)."""
        return F.pixel_shuffle(tokens.mT.unflatten(2, (self.side, self.side)), self.patch)

    def translate(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a public file's tensors, whose keys are ours."""
        return tensors


# ------------------------------------------------------------------------------
# The model
# ------------------------------------------------------------------------------


class MAR(Published):
    """A `MARNetwork` at one of its sizes, its head in canonical time.

    An event is an image's tokens (L, D). The velocity that strategies see is the
    head's, on the L places of an image in some iterations, which have an equal share of
    them: a later iteration has those that stay unknown longer. If an iteration has
    fewer unknown places than its share, their contexts are repeated. The resulting
    schedule runs in every iteration of `sample` (Optimal Stepsize, arXiv 2503.21774,
    sec. 4.1.4, searches the first).

    Args:
        num_iter: Iterations; each makes at least one token. The guidance is that of the
            last one; it grows to that from 1, as 1 + (scale - 1) (share of known
            tokens).
        search_iterations: Iterations of the velocity, from 0; None: the first of each
            quarter. The tokens that are known before a later one are made of the class
            alone, from seeded noise.
        search_cfg: Scale of the velocity; None: those of its iterations (almost 1 in
            the first).
        seed: Seed of the orders in which tokens are made, and of that noise.
        published: Arguments of `Published`.
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
                f"search_iterations must be some of 0 to {num_iter - 1}, which num_iter={num_iter} "
                f"makes, got {search_iterations}"
            )
        require_range(at_least=-1000, at_most=1000, search_cfg=search_cfg)
        super().__init__(**published)

        # Ranges that depend on the image.
        places = self.event_shape[0]
        if num_iter > places:
            raise ValueError(
                f"num_iter={num_iter} exceeds the {places} tokens of an image (event_shape), of "
                "which every iteration makes at least one; choose fewer"
            )
        _require_plain(self.guidance)
        if len(searched) > places:
            raise ValueError(
                f"search_iterations has {len(searched)} entries, and an image {places} tokens for "
                "them; choose fewer"
            )

        self.num_iter = num_iter
        self.search_iterations = searched
        self.search_cfg = search_cfg
        self.seed = seed
        self.unknown = unknown_before(places, num_iter)

    def velocity(self, condition: Tensor | None, guidance: Guidance | None = None) -> BoundVelocity:
        """Return the head's velocity on an image's places, at the search iterations.

        Args:
            condition: Classes (B,); None for none.
            guidance: Guidance in the place of the model's.
        """
        # Tokens of each class, as far as the last iteration needs them.
        guidance = guidance or self.guidance
        classes, of_sample = self._classes(condition, 1, guidance).unique(return_inverse=True)
        steps = StepSchedule(DDIMSchedule(self.path.betas).nodes(CONTEXT_STEPS))
        noise = self._class_noise(classes) * steps.start_time
        labels = None if condition is None else classes
        count = self.search_iterations[-1]
        tokens = self._make(Euler(), steps, noise, labels, None, guidance, count)

        # Contexts. A token stays once it is made, so these tokens hold those of earlier iterations.
        iterations = self.search_iterations[::-1]
        used = [self._search_scale(guidance, iteration) for iteration in iterations]
        guided = any(scale != 1 for scale in used)
        places = torch.arange(self.event_shape[0], device=classes.device)
        shares = places.tensor_split(len(iterations))

        orders = self.orders(noise)
        contexts, scales = [], []
        for iteration, scale, share in zip(iterations, used, shares, strict=True):
            unknown = self.unknown[iteration]
            every = self.contexts(tokens, orders[:, unknown:], classes, guided)
            contexts.append(at(every, orders[:, share % unknown]))
            scales.append(
                torch.full((len(share), 1), scale, dtype=torch.float64, device=share.device)
            )

        # In the order of the places.
        in_place = orders.argsort(dim=1)
        rows = None if condition is None else of_sample
        context = at(torch.cat(contexts, dim=1), in_place)
        return self._bind(context, rows, torch.cat(scales)[in_place])

    def _search_scale(self, guidance: Guidance, iteration: int) -> float:
        """Return the scale of guidance in a search iteration."""
        return self.scale(guidance, iteration) if self.search_cfg is None else self.search_cfg

    def _class_noise(self, classes: Tensor) -> Tensor:
        """Return the seeded noise (U, L, D) of classes (U,)."""
        noise = []
        for label in classes.tolist():
            generator = np.random.default_rng((self.seed, label + 1))
            noise.append(generator.standard_normal(self.event_shape, dtype=np.float32))
        return torch.from_numpy(np.stack(noise)).to(classes.device)

    def sample(
        self,
        solver: Solver,
        steps: StepSchedule,
        noise: Tensor,
        condition: Tensor | None = None,
        group: Tensor | None = None,
        watch: Watch | None = None,
    ) -> Tensor:
        """Return tokens (B, L, D), made with the same steps in every iteration.

        Args:
            solver: The head's solver.
            steps: The head's schedule.
            noise: Noise (B, L, D) at steps.start_time, each token's own, whatever its
                iteration.
            condition: Classes (B,); None for none.
            group: Index (B,) of each sample's mean, of those of the schedule. They
                belong to the iterations of the velocity, and serve in all.
            watch: Never called: a step predicts the tokens of one iteration, not an
                image.
        """
        return self._make(solver, steps, noise, condition, group, self.guidance, self.num_iter)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """The shape of an image (latents)."""
        return tuple(self.backbone.unpatchify(torch.empty(1, *self.event_shape)).shape[1:])

    def loss(self, network: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the loss of the head on the unknown places of a random order, given the others.

        The share of unknown places is the same for all images of a step, cos(pi u / 2)
        of a uniform u: as often as `sample` meets it (MaskGIT, arXiv 2202.04200).

        Args:
            network: The network in training.
            batch: `x0` and `noise` (B, channels, size, size), `t` (B,), `label` (B,),
                `shared`, whose first entry is u.
        """
        # Hidden and known places.
        x0, noise = network.patchify(batch["x0"]), network.patchify(batch["noise"])
        orders = self.orders(noise)
        share = math.cos(math.pi / 2 * float(batch["shared"][0]))
        unknown = math.ceil(share * orders.shape[1])
        hidden, places = orders[:, :unknown], orders[:, unknown:]

        # The head's batch.
        encoded = network.encode(at(x0, places), places, batch["label"])
        contexts = network.decode(encoded, places)
        tokens = {
            "x0": at(x0, hidden),
            "noise": at(noise, hidden),
            "t": batch["t"],
            "label": at(contexts, hidden),
        }
        return super().loss(network, tokens)

    def decode(self, x0: Tensor) -> Tensor:
        """Return the pixels of tokens (B, L, D)."""
        return self.decoder(self.backbone.unpatchify(x0))

    def orders(self, noise: Tensor) -> Tensor:
        """Return the places of each sample (B, L), first those that stay unknown longest.

        They depend on the seed and on the signs of the noise (B, L, D): the same for
        teacher and student, in any batch, at any start.
        """
        signs = np.packbits((noise > 0).flatten(1).cpu().numpy(), axis=1)
        orders = []
        for row in signs:
            generator = np.random.default_rng((self.seed, int.from_bytes(row.tobytes(), "big")))
            orders.append(generator.permutation(noise.shape[1]))
        return torch.from_numpy(np.stack(orders)).to(noise.device)

    def scale(self, guidance: Guidance, iteration: int) -> float:
        """Return the scale of guidance in an iteration.

        It is linear in the number of tokens that are known after it; after the last,
        all but one.
        """
        places = self.event_shape[0]
        known_after = places - max(self.unknown[iteration + 1], 1)
        return 1 + (guidance.scale - 1) * known_after / places

    def contexts(self, tokens: Tensor, known: Tensor, classes: Tensor, guided: bool) -> Tensor:
        """Return the contexts (B, L, R, E) of all places.

        Args:
            tokens: Tokens (B, L, D).
            known: Places (B, V) whose tokens are known.
            classes: Classes (B,), NO_CLASS for none.
            guided: Whether to return contexts without the class as well.
        """
        labels = torch.cat([classes, torch.full_like(classes, NO_CLASS)]) if guided else classes
        copies = len(labels) // len(classes)

        # In micro-batches.
        inputs = (at(tokens, known).repeat(copies, 1, 1), known.repeat(copies, 1), labels)
        parts = []
        for x, places, y in zip(*(part.split(self.micro_batch) for part in inputs), strict=True):
            parts.append(self.backbone.decode(self.backbone.encode(x, places, y), places))
        return torch.cat(parts).unflatten(0, (copies, -1)).movedim(0, 2)

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
        """Return the tokens after the first iterations; unknown places have zeros."""
        classes = self._classes(condition, len(noise), guidance)
        orders, tokens = self.orders(noise), torch.zeros_like(noise)
        rows = torch.arange(len(noise), device=noise.device)
        mean = None if steps.mean is None else group_mean(steps.mean, noise, group)
        index = None if mean is None else rows

        for iteration in range(iterations):
            # Contexts of the places to fill.
            before, after = self.unknown[iteration], self.unknown[iteration + 1]
            places = orders[:, after:before].sort(dim=1).values
            scale = self.scale(guidance, iteration)
            contexts = self.contexts(tokens, orders[:, before:], classes, scale != 1)
            velocity = self._bind(at(contexts, places), rows, scale)

            # Their tokens.
            schedule = steps if mean is None else steps.with_mean(at(mean, places))
            part = sample(solver, velocity, at(noise, places), schedule, group=index)
            tokens = tokens.scatter(1, places[..., None].expand_as(part), part)
        return tokens

    def _bind(self, contexts: Tensor, rows: Tensor | None, scale: float | Tensor) -> BoundVelocity:
        """Return the velocity v(x (M, n, D), t (M,)) of tokens with these contexts.

        Args:
            contexts: Contexts (U, n, R, E).
            rows: Which of them (B,) are each sample's; None: the first.
            scale: Scale of guidance, one or (U, n, 1).
        """
        answers = contexts.shape[2]

        def guided(x: Tensor, t: Tensor, rows: Tensor | None) -> Tensor:
            # All answers.
            z = contexts[:1].expand(len(x), -1, -1, -1) if rows is None else contexts[rows]
            z = z.movedim(2, 0).flatten(0, 1)
            v = self._velocity(x.repeat(answers, 1, 1), t.repeat(answers), z)
            v = v.unflatten(0, (answers, -1))
            if answers == 1:
                return v[0]

            # Their mix.
            weight = scale
            if isinstance(scale, Tensor):
                weight = (scale[:1] if rows is None else scale[rows]).to(v)
            return weight * v[0] + (1 - weight) * v[1]

        kind = BoundVelocity if answers == 1 else Guided
        micro_batch = max(1, self.micro_batch // answers)
        return kind(guided, rows, micro_batch, has_means=False)  # each token has its context's

    def _classes(self, condition: Tensor | None, count: int, guidance: Guidance) -> Tensor:
        """Return the class of each sample, NO_CLASS without a condition."""
        _require_plain(guidance)
        if condition is None:
            if guidance.scale != 1:
                raise ValueError(
                    f"model.guidance.scale={guidance.scale} needs class labels; "
                    "set data.classes, or scale 1"
                )
            return torch.full((count,), NO_CLASS, device=self.backbone.fake_latent.device)

        if not bool(((condition >= 0) & (condition < self.num_classes)).all()):
            raise ValueError(
                f"{self.name} has {self.num_classes} classes, got {condition.unique().tolist()}"
            )
        return condition


class Guided(BoundVelocity):
    """A velocity with two network rows for each row of x, which it mixes itself.

    Fitted steps do not see the two answers, for they would hold the scale of one
    iteration, and the others have their own.
    """

    def rows_at(self, t: Tensor) -> Tensor:
        """Return the number of network rows (M,) at times t (M,)."""
        return torch.full_like(t, 2)


def unknown_before(places: int, num_iter: int) -> list[int]:
    """Return how many places are unknown before each iteration, and 0 at the end.

    The numbers follow a cosine (MaskGIT, arXiv 2202.04200).
    """
    unknown = [places]
    for iteration in range(1, num_iter):
        cosine = math.floor(places * math.cos(math.pi / 2 * iteration / num_iter))
        unknown.append(max(1, min(unknown[-1] - 1, cosine)))
    return [*unknown, 0]


def at(x: Tensor, places: Tensor) -> Tensor:
    """Return x (B, L, ...) at places (B, n), shape (B, n, ...)."""
    return x[torch.arange(len(x), device=x.device)[:, None], places]


def _require_plain(guidance: Guidance) -> None:
    """Raise a ValueError unless guidance is the same for all channels and times."""
    if guidance.channels is not None or guidance.interval is not None:
        raise ValueError(
            f"MAR guides all channels at all times; set model.guidance to a scale alone, "
            f"got {guidance}"
        )
