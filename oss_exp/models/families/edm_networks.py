"""Define the U-Nets of EDM (Karras et al. 2022, arXiv 2206.00364): ADM, DDPM++ and NCSN++.

ADM is by Dhariwal & Nichol, DDPM++ and NCSN++ are by Song et al. One block serves them
all, and, with other names, the U-Nets of guided-diffusion; UNet2DModel of diffusers
could express only ADM. Our weights have the names of EDM's files without `model.`, and
q, k, v are innermost among the channels of `qkv`. Dropout is for training and left out.
Shapes: M rows, C channels, E embedding channels. A class is a number, or -1 for none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oss_exp.checks import require_choice, require_range

EmbeddingType = Literal["positional", "fourier"]
EncoderType = Literal["standard", "residual"]
HEAD_CHANNELS = 64  # of ADM, which has no attention where there are fewer channels
GUIDED_ENDS = {  # our modules -> those of guided-diffusion
    "map_layer0": "time_embed.0",
    "map_layer1": "time_embed.2",
    "map_label": "label_emb",
    "out_norm": "out.0",
    "out_conv": "out.2",
}
GUIDED_RESIDUAL = {
    "norm0": "in_layers.0",
    "conv0": "in_layers.2",
    "affine": "emb_layers.1",
    "norm1": "out_layers.0",
    "conv1": "out_layers.3",
    "skip": "skip_connection",
}
GUIDED_ATTENTION = {"norm2": "norm", "qkv": "qkv", "proj": "proj_out"}  # a layer of its own


class Resample(nn.Module):
    """A change of size by a factor of two, with a separable filter.

    Args:
        taps: The filter, along one axis.
        up: Whether images become twice as large, not half as large.
        padding: Padding of the convolution; None: the size stays a multiple.
    """

    def __init__(self, taps: Sequence[int], up: bool, padding: int | None = None):
        super().__init__()
        line = torch.tensor(taps, dtype=torch.float32)
        kernel = line.outer(line) / line.sum() ** 2
        self.register_buffer("kernel", kernel[None, None], persistent=False)
        self.up = up
        self.padding = (len(taps) - 1) // 2 if padding is None else padding

    def forward(self, x: Tensor) -> Tensor:
        """Return images (M, C, 2 H, 2 W) or (M, C, H / 2, W / 2) from x (M, C, H, W)."""
        kernel = self.kernel.expand(x.shape[1], -1, -1, -1)
        groups = x.shape[1]
        if self.up:
            kernel = 4 * kernel
            return F.conv_transpose2d(x, kernel, stride=2, padding=self.padding, groups=groups)
        return F.conv2d(x, kernel, stride=2, padding=self.padding, groups=groups)


class Block(nn.Module):
    """Two convolutions, then attention.

    Args:
        channels: Channels of the input.
        out_channels: Channels of the output.
        resample: Change of size of both the input and its residual; None: the size
            stays.
        heads: Heads of the attention; 0: there is none.
        emb_channels: Channels of the embedding.
        skip_scale: Factor of the sums with the residuals.
        eps: Epsilon of the norms.
        adaptive_scale: Whether the embedding scales and shifts after the second norm,
            not only shifts before it.
        resample_proj: Whether a block with `resample` projects its residual even if the
            number of channels stays.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        resample: Resample | None,
        heads: int,
        *,
        emb_channels: int,
        skip_scale: float,
        eps: float,
        adaptive_scale: bool,
        resample_proj: bool,
    ):
        super().__init__()
        self.heads = heads
        self.skip_scale = skip_scale
        self.adaptive_scale = adaptive_scale

        # Convolutions.
        self.resample = resample or nn.Identity()
        self.norm0 = norm(channels, eps)
        self.conv0 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.affine = nn.Linear(emb_channels, out_channels * (2 if adaptive_scale else 1))
        self.norm1 = norm(out_channels, eps)
        self.conv1 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        project = channels != out_channels or (resample is not None and resample_proj)
        self.skip = nn.Conv2d(channels, out_channels, 1) if project else nn.Identity()

        # Attention.
        if heads:
            self.norm2 = norm(out_channels, eps)
            self.qkv = nn.Conv2d(out_channels, 3 * out_channels, 1)
            self.proj = nn.Conv2d(out_channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Return (M, out_channels, H', W') from x (M, C, H, W) and an embedding (M, E)."""
        h = self.conv0(self.resample(F.silu(self.norm0(x))))

        # The embedding, at the second norm.
        params = self.affine(embedding)[:, :, None, None]
        if self.adaptive_scale:
            scale, shift = params.chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm1(h), scale + 1)
        else:
            h = self.norm1(h + params)

        # Residual and attention.
        x = (self.conv1(F.silu(h)) + self.skip(self.resample(x))) * self.skip_scale
        if not self.heads:
            return x
        return (self.proj(self._attend(x)) + x) * self.skip_scale

    def _attend(self, x: Tensor) -> Tensor:
        """Return the attention of the places among each other, (M, C, H, W)."""
        qkv = self.qkv(self.norm2(x)).flatten(2).unflatten(1, (self.heads, -1, 3))
        q, k, v = qkv.permute(3, 0, 1, 4, 2).contiguous()  # (M, heads, H W, C / heads)
        return F.scaled_dot_product_attention(q, k, v).mT.reshape(x.shape)


class Residual(nn.Conv2d):
    """The image that enters a level of NCSN++: the level above, convolved, then halved.

    The convolution also computes the border that the filter `taps` reaches for, so
    nothing is padded between the two.
    """

    def __init__(self, channels: int, out_channels: int, taps: Sequence[int]):
        super().__init__(channels, out_channels, 3, padding=1 + (len(taps) - 1) // 2)
        self.resample = Resample(taps, up=False, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        """Return (M, out_channels, H, W) from the level above (M, C, 2 H, 2 W)."""
        return self.resample(super().forward(x))


class Fourier(nn.Module):
    """The frequencies of a clock, drawn from N(0, 16^2) and part of the checkpoint.

    Without a checkpoint they are the quantiles of that law. Their dtype stays, whatever
    that of the weights becomes.
    """

    def __init__(self, num: int):
        super().__init__()
        self.register_buffer("freqs", 16 * torch.special.ndtri((torch.arange(num) + 0.5) / num))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Fourier:
        self.freqs = self.freqs.to(fn(self.freqs).device)
        return self


class _UNet(nn.Module):
    """The encoder and the decoder that ADM and Song share, and the names in EDM's files.

    Args:
        img_resolution: Height and width of the images.
        img_channels: Their channels.
        out_channels: Channels of the last convolution.
        stem: Channels of the first convolution.
        widths: Channels of each level.
        num_blocks: Blocks of a level of the encoder.
        attn_resolutions: Sizes of the levels with attention.
        taps: Filter of the changes of size.
        residual: Whether the image enters every level of the encoder.
        heads: Heads of an attention, as a function of its channels.
        everywhere: Whether every block of the decoder at an attention resolution has
            one, not only the last.
        block: Builds a Block from (channels, out_channels, resample, heads).
        eps: Epsilon of the norms.
    """

    def __init__(
        self,
        *,
        img_resolution: int,
        img_channels: int,
        out_channels: int,
        stem: int,
        widths: Sequence[int],
        num_blocks: int,
        attn_resolutions: Sequence[int],
        taps: Sequence[int],
        residual: bool,
        heads: Callable[[int], int],
        everywhere: bool,
        block: Callable[..., Block],
        eps: float,
    ):
        super().__init__()
        require_range(
            at_least=1,
            img_resolution=img_resolution,
            img_channels=img_channels,
            num_blocks=num_blocks,
        )
        if not widths or min(widths) < 4 or img_resolution % 2 ** (len(widths) - 1):
            raise ValueError(
                f"channel_mult must have positive numbers for as many levels as "
                f"img_resolution={img_resolution} can be halved, got the widths {list(widths)}"
            )

        self.img_channels = img_channels
        block = partial(block, eps=eps)
        levels = [(img_resolution >> level, width) for level, width in enumerate(widths)]

        # Encoder.
        self.enc = nn.ModuleDict()
        channels, above, skips = stem, img_channels, [stem]
        for size, width in levels:
            name = f"{size}x{size}"
            if size == img_resolution:
                self.enc[f"{name}_conv"] = nn.Conv2d(img_channels, stem, 3, padding=1)
            else:
                half = Resample(taps, up=False)
                self.enc[f"{name}_down"] = block(channels, channels, half, 0)
                skips.append(channels)
                if residual:
                    self.enc[f"{name}_aux_residual"] = Residual(above, channels, taps)
                    above = channels
            for index in range(num_blocks):
                attention = heads(width) if size in attn_resolutions else 0
                self.enc[f"{name}_block{index}"] = block(channels, width, None, attention)
                channels = width
                skips.append(channels)

        # Decoder.
        self.dec = nn.ModuleDict()
        for size, width in reversed(levels):
            name = f"{size}x{size}"
            if size == levels[-1][0]:
                self.dec[f"{name}_in0"] = block(channels, channels, None, heads(channels))
                self.dec[f"{name}_in1"] = block(channels, channels, None, 0)
            else:
                self.dec[f"{name}_up"] = block(channels, channels, Resample(taps, up=True), 0)
            for index in range(num_blocks + 1):
                attends = size in attn_resolutions and (everywhere or index == num_blocks)
                attention = heads(width) if attends else 0
                channels += skips.pop()
                self.dec[f"{name}_block{index}"] = block(channels, width, None, attention)
                channels = width

        # Last convolution.
        self.out_norm = norm(channels, eps)
        self.out_conv = nn.Conv2d(channels, out_channels, 3, padding=1)

    def _run(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Return the network's answer (M, C, H, W), without its variance."""
        # Encoder.
        above, skips = x, []
        for layer in self.enc.values():
            if isinstance(layer, Residual):
                above = (x + layer(above)) * math.sqrt(0.5)
                x = skips[-1] = above
            else:
                x = layer(x, embedding) if isinstance(layer, Block) else layer(x)
                skips.append(x)

        # Decoder.
        for name, layer in self.dec.items():
            if "_block" in name:
                x = torch.cat([x, skips.pop()], dim=1)
            x = layer(x, embedding)
        return self.out_conv(F.silu(self.out_norm(x)))[:, : self.img_channels]

    def to_public(self, layout: str) -> dict[str, Tensor]:
        """Return the weights as a file of `layout` has them.

        Raises:
            ValueError: There is no such layout.
        """
        weights = self.state_dict()
        if layout == "own":
            return weights
        if layout != "edm":
            raise ValueError(f"layout must be one of {', '.join(self.LAYOUTS)}, got {layout!r}")
        public = {self._edm_name(key): tensor for key, tensor in weights.items()}

        # EDM stores a filter beside each weight that follows it.
        for name, module in self.named_modules():
            if isinstance(module, Residual):
                public[f"model.{name}.resample_filter"] = module.resample.kernel
            elif isinstance(module, Block) and isinstance(module.resample, Resample):
                for part in ("conv0", "skip"):
                    public[f"model.{name}.{part}.resample_filter"] = module.resample.kernel.clone()
        return public

    def translate(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a file's tensors, in any of `LAYOUTS`, by our names; unknown names stay."""
        if not any(key.startswith("model.") for key in tensors):
            return dict(tensors)

        # Without the constants of a preconditioning (`u`) and the filters, which are settings here.
        names = {self._edm_name(key): key for key in self.state_dict()}
        translated = {}
        for key, tensor in tensors.items():
            if key.startswith("model.") and not key.endswith(".resample_filter"):
                translated[names.get(key, key)] = tensor
        return translated

    def _edm_name(self, key: str) -> str:
        """Return the name of a weight in EDM's files."""
        return f"model.{key}"


class ADM(_UNet):
    """The U-Net of Dhariwal & Nichol 2021 (arXiv 2105.05233), for files of EDM or guided-diffusion.

    Args:
        img_resolution: Height and width of the images.
        img_channels: Their channels.
        out_channels: Channels of the last convolution; twice img_channels if the
            network learned a variance too.
        label_dim: Number of classes; 0: none.
        model_channels: Channels that the multiples count.
        channel_mult: Channels of each level, as multiples.
        channel_mult_emb: Channels of the embedding, as a multiple.
        num_blocks: Blocks of a level.
        attn_resolutions: Sizes of the levels with attention.
        adaptive_scale: use_scale_shift_norm of guided-diffusion.
        legacy_attention: Whether the heads, not q, k, v, are outermost in `qkv` of a
            guided-diffusion file, as without use_new_attention_order. In files of
            consistency-models, q, k, v are.
    """

    FILES = ("edm-imagenet-64x64-cond-adm.pkl", "edm_bedroom256_ema.pt")
    LAYOUTS = ("own", "edm", "guided_diffusion")

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        out_channels: int,
        label_dim: int,
        model_channels: int,
        channel_mult: Sequence[int],
        channel_mult_emb: int,
        num_blocks: int,
        attn_resolutions: Sequence[int],
        adaptive_scale: bool,
        legacy_attention: bool = False,
    ):
        require_range(at_least=4, model_channels=model_channels)
        require_range(at_least=0, label_dim=label_dim)
        require_range(at_least=img_channels, out_channels=out_channels)
        require_range(at_least=1, channel_mult_emb=channel_mult_emb)

        # U-Net.
        emb_channels = model_channels * channel_mult_emb
        super().__init__(
            img_resolution=img_resolution,
            img_channels=img_channels,
            out_channels=out_channels,
            stem=model_channels * channel_mult[0],
            widths=[model_channels * mult for mult in channel_mult],
            num_blocks=num_blocks,
            attn_resolutions=attn_resolutions,
            taps=(1, 1),
            residual=False,
            heads=lambda channels: channels // HEAD_CHANNELS,
            everywhere=True,
            block=partial(
                Block,
                emb_channels=emb_channels,
                skip_scale=1.0,
                adaptive_scale=adaptive_scale,
                resample_proj=False,
            ),
            eps=1e-5,
        )

        # Embedding of the clock and the class.
        self.model_channels = model_channels
        self.label_dim = label_dim
        self.legacy_attention = legacy_attention
        self.map_layer0 = nn.Linear(model_channels, emb_channels)
        self.map_layer1 = nn.Linear(emb_channels, emb_channels)
        if label_dim:
            self.map_label = nn.Linear(label_dim, emb_channels, bias=False)

    def forward(self, x: Tensor, clock: Tensor, classes: Tensor) -> Tensor:
        """Return the network's answer (M, C, H, W).

        Args:
            x: Images (M, C, H, W).
            clock: The network's clock (M,), float32 or wider.
            classes: Classes (M,), -1 for none.
        """
        half = self.model_channels // 2
        angles = clock[:, None] * frequencies(half, half, clock)
        embedding = torch.cat([angles.cos(), angles.sin()], dim=1).to(self.map_layer0.weight.dtype)
        embedding = self.map_layer1(F.silu(self.map_layer0(embedding)))
        if self.label_dim:
            embedding = embedding + self.map_label(one_hot(classes, self.label_dim).to(embedding))
        return self._run(x, F.silu(embedding))

    def to_public(self, layout: str) -> dict[str, Tensor]:
        """Return the weights as a file of `layout` has them."""
        if layout != "guided_diffusion":
            return super().to_public(layout)
        names = self._guided_names()
        public = {}
        for key, tensor in self.state_dict().items():
            public[names[key]] = self._to_guided(key, tensor)
        return public

    def translate(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a file's tensors, in any of `LAYOUTS`, by our names; unknown names stay."""
        if not any(key.startswith("input_blocks.") for key in tensors):
            return super().translate(tensors)
        keys = {name: key for key, name in self._guided_names().items()}
        translated = {}
        for name, tensor in tensors.items():
            translated[keys.get(name, name)] = self._from_guided(name, tensor)
        return translated

    def _to_guided(self, key: str, tensor: Tensor) -> Tensor:
        """Return one of our weights in the form of guided-diffusion."""
        if key == "map_label.weight":
            return tensor.T
        if ".qkv." in key:
            outer = 1 if self.legacy_attention else 0
            return tensor.unflatten(0, (-1, HEAD_CHANNELS, 3)).movedim(2, outer).flatten(0, 2)
        return tensor

    def _from_guided(self, name: str, tensor: Tensor) -> Tensor:
        """Return one of guided-diffusion's weights in our form."""
        if name == "label_emb.weight":
            return tensor.T
        attention = ".proj_out." in name or ".qkv." in name
        if attention and tensor.ndim == 3:  # some files convolve over one long axis
            tensor = tensor[..., None]

        # Another number of channels is refused later, for its shape.
        if ".qkv." in name and len(tensor) % (3 * HEAD_CHANNELS) == 0:
            outer = 1 if self.legacy_attention else 0
            sizes = (-1, 3, HEAD_CHANNELS) if self.legacy_attention else (3, -1, HEAD_CHANNELS)
            return tensor.unflatten(0, sizes).movedim(outer, 2).flatten(0, 2)
        return tensor

    def _guided_names(self) -> dict[str, str]:
        """Return guided-diffusion's name of each weight; it counts layers, EDM resolutions."""
        # Group and layer of each block.
        places = {}
        for count, name in enumerate(self.enc):
            places[f"enc.{name}"] = (f"input_blocks.{count}", 0)

        group, layer, count = "middle_block", 0, 0
        for name, block in self.dec.items():
            if "_block" in name:
                group, layer, count = f"output_blocks.{count}", 0, count + 1
            places[f"dec.{name}"] = (group, layer)
            layer += 1 + bool(block.heads)

        # Names within.
        names = {}
        for key in self.state_dict():
            *module, kind = key.split(".")
            if module[0] in GUIDED_ENDS:
                names[key] = f"{GUIDED_ENDS[module[0]]}.{kind}"
                continue
            group, layer = places[".".join(module[:2])]
            part = ".".join(module[2:])
            if part in GUIDED_ATTENTION:
                names[key] = f"{group}.{layer + 1}.{GUIDED_ATTENTION[part]}.{kind}"
            elif part:
                names[key] = f"{group}.{layer}.{GUIDED_RESIDUAL[part]}.{kind}"
            else:  # the first convolution
                names[key] = f"{group}.{layer}.{kind}"
        return names


class Song(_UNet):
    """DDPM++ and NCSN++ of Song et al. 2021 (arXiv 2011.13456), in EDM's files.

    Args:
        img_resolution: Height and width of the images.
        img_channels: Their channels.
        label_dim: Number of classes; 0: none.
        augment_dim: Numbers that described augmentations in training; 0: none.
        model_channels: Channels that the multiples count.
        channel_mult: Channels of each level, as multiples.
        channel_mult_emb: Channels of the embedding, as a multiple.
        channel_mult_noise: Channels of the embedded clock, as a multiple.
        num_blocks: Blocks of a level.
        attn_resolutions: Sizes of the levels with attention.
        embedding_type: Embedding of the clock, "positional" (DDPM++) or "fourier"
            (NCSN++).
        encoder_type: "standard" (DDPM++), or "residual" (NCSN++): the image enters
            every level.
        resample_filter: Filter of the changes of size.
    """

    FILES = (
        "edm-ffhq-64x64-uncond-vp.pkl",
        "edm-afhqv2-64x64-uncond-vp.pkl",
        "edm-cifar10-32x32-cond-vp.pkl",
        "edm-cifar10-32x32-uncond-vp.pkl",
    )
    LAYOUTS = ("own", "edm")

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int,
        augment_dim: int,
        model_channels: int,
        channel_mult: Sequence[int],
        channel_mult_emb: int,
        channel_mult_noise: int,
        num_blocks: int,
        attn_resolutions: Sequence[int],
        embedding_type: EmbeddingType,
        encoder_type: EncoderType,
        resample_filter: Sequence[int],
    ):
        require_choice(get_args(EmbeddingType), embedding_type=embedding_type)
        require_choice(get_args(EncoderType), encoder_type=encoder_type)
        require_range(at_least=4, model_channels=model_channels)
        require_range(at_least=0, label_dim=label_dim, augment_dim=augment_dim)
        require_range(
            at_least=1, channel_mult_emb=channel_mult_emb, channel_mult_noise=channel_mult_noise
        )

        # U-Net.
        emb_channels = model_channels * channel_mult_emb
        super().__init__(
            img_resolution=img_resolution,
            img_channels=img_channels,
            out_channels=img_channels,
            stem=model_channels,
            widths=[model_channels * mult for mult in channel_mult],
            num_blocks=num_blocks,
            attn_resolutions=attn_resolutions,
            taps=resample_filter,
            residual=encoder_type == "residual",
            heads=lambda channels: 1,
            everywhere=False,
            block=partial(
                Block,
                emb_channels=emb_channels,
                skip_scale=math.sqrt(0.5),
                adaptive_scale=False,
                resample_proj=True,
            ),
            eps=1e-6,
        )

        # Embedding of the clock, the class and the augmentations.
        self.img_resolution = img_resolution
        self.label_dim = label_dim
        self.noise_channels = model_channels * channel_mult_noise
        self.map_noise = Fourier(self.noise_channels // 2) if embedding_type == "fourier" else None

        if label_dim:
            self.map_label = nn.Linear(label_dim, self.noise_channels)
        if augment_dim:
            self.map_augment = nn.Linear(augment_dim, self.noise_channels, bias=False)
        self.map_layer0 = nn.Linear(self.noise_channels, emb_channels)
        self.map_layer1 = nn.Linear(emb_channels, emb_channels)

    def forward(
        self, x: Tensor, clock: Tensor, classes: Tensor, augment: Tensor | None = None
    ) -> Tensor:
        """Return the network's answer (M, C, H, W).

        Args:
            x: Images (M, C, H, W).
            clock: The network's clock (M,), float32 or wider.
            classes: Classes (M,), -1 for none.
            augment: Augmentations (M, augment_dim); None for none.
        """
        # Clock.
        half = self.noise_channels // 2
        if self.map_noise is None:
            angles = clock[:, None] * frequencies(half, half - 1, clock)
        else:
            angles = clock[:, None] * (2 * math.pi * self.map_noise.freqs.to(clock))
        embedding = torch.cat([angles.sin(), angles.cos()], dim=1).to(self.map_layer0.weight.dtype)

        # Class and augmentations.
        if self.label_dim:
            labels = one_hot(classes, self.label_dim).to(embedding)
            embedding = embedding + self.map_label(labels * math.sqrt(self.label_dim))
        if augment is not None:
            embedding = embedding + self.map_augment(augment.to(embedding))
        embedding = self.map_layer1(F.silu(self.map_layer0(embedding)))
        return self._run(x, F.silu(embedding))

    def _edm_name(self, key: str) -> str:
        if not key.startswith("out_"):
            return f"model.{key}"
        prefix = f"model.dec.{self.img_resolution}x{self.img_resolution}_aux_"
        return prefix + key.removeprefix("out_")


def norm(channels: int, eps: float) -> nn.GroupNorm:
    """Return the norm of so many channels."""
    return nn.GroupNorm(min(32, channels // 4), channels, eps)


def frequencies(num: int, last: int, like: Tensor) -> Tensor:
    """Return 10000^(-k / last) for k = 0, 1, ..., shape (num,)."""
    return (1 / 10000) ** (torch.arange(num, dtype=like.dtype, device=like.device) / last)


def one_hot(classes: Tensor, num_classes: int) -> Tensor:
    """Return classes (M,) as rows (M, num_classes); zeros for none."""
    return classes[:, None] == torch.arange(num_classes, device=classes.device)
