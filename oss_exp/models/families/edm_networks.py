"""The U-Nets of EDM (Karras et al. 2022, arXiv 2206.00364): ADM (Dhariwal & Nichol) and DDPM++ / NCSN++ (Song et al.).

One own block serves both, and by other names the guided-diffusion U-Nets; diffusers' UNet2DModel could give only ADM.
Our weights are called as in EDM's files, without `model.`, and q, k, v are innermost among the channels of `qkv`.
Dropout is for training and left out. Legend: M rows; C channels; a class is a number, or -1 for none.
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
HEAD_CHANNELS = 64  # of ADM; where there are fewer channels it has no attention, even if asked for
GUIDED_ENDS = {  # our modules -> guided-diffusion's
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
GUIDED_ATTENTION = {
    "norm2": "norm",
    "qkv": "qkv",
    "proj": "proj_out",
}  # a layer of its own, after the residual one


class Resample(nn.Module):
    """Twice as large or half as large, with the separable filter `taps`; (M, C, H, W) -> (M, C, 2 H or H / 2, ...)."""

    def __init__(self, taps: Sequence[int], up: bool, padding: int | None = None):
        super().__init__()
        line = torch.tensor(taps, dtype=torch.float32)
        self.register_buffer(
            "kernel", (line.outer(line) / line.sum() ** 2)[None, None], persistent=False
        )
        self.up, self.padding = up, (len(taps) - 1) // 2 if padding is None else padding

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.kernel.expand(x.shape[1], -1, -1, -1)
        convolve, kernel = (F.conv_transpose2d, 4 * kernel) if self.up else (F.conv2d, kernel)
        return convolve(x, kernel, stride=2, padding=self.padding, groups=x.shape[1])


class Block(nn.Module):
    """x (M, C, H, W), embedding (M, E) -> (M, out_channels, H', W'): two convolutions, then attention.

    resample:       on the way of both x and its residual; None: the size stays.
    heads:          of the attention; 0: there is none.
    skip_scale:     of the sums with the residuals.
    adaptive_scale: the embedding scales and shifts after the second norm; else it is added before.
    resample_proj:  a resampling block projects its residual even where its channels stay.
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
        self.heads, self.skip_scale, self.adaptive_scale = heads, skip_scale, adaptive_scale
        self.resample = resample or nn.Identity()
        self.norm0 = norm(channels, eps)
        self.conv0 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.affine = nn.Linear(emb_channels, out_channels * (2 if adaptive_scale else 1))
        self.norm1 = norm(out_channels, eps)
        self.conv1 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        project = channels != out_channels or (resample is not None and resample_proj)
        self.skip = nn.Conv2d(channels, out_channels, 1) if project else nn.Identity()
        if heads:
            self.norm2 = norm(out_channels, eps)
            self.qkv = nn.Conv2d(out_channels, 3 * out_channels, 1)
            self.proj = nn.Conv2d(out_channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv0(self.resample(F.silu(self.norm0(x))))
        params = self.affine(embedding)[:, :, None, None]
        if self.adaptive_scale:
            scale, shift = params.chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm1(h), scale + 1)
        else:
            h = self.norm1(h + params)
        x = (self.conv1(F.silu(h)) + self.skip(self.resample(x))) * self.skip_scale
        return (self.proj(self._attend(x)) + x) * self.skip_scale if self.heads else x

    def _attend(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm2(x)).flatten(2).unflatten(1, (self.heads, -1, 3))
        q, k, v = qkv.permute(
            3, 0, 1, 4, 2
        ).contiguous()  # (M, heads, H W, C / heads): what fast kernels take
        return F.scaled_dot_product_attention(q, k, v).mT.reshape(x.shape)


class Residual(nn.Conv2d):
    """The level above (M, C, 2 H, 2 W) -> (M, out_channels, H, W), beside the blocks of NCSN++: convolved, then halved.

    The convolution also gives the border that the filter `taps` reaches for, so nothing is padded between the two.
    """

    def __init__(self, channels: int, out_channels: int, taps: Sequence[int]):
        super().__init__(channels, out_channels, 3, padding=1 + (len(taps) - 1) // 2)
        self.resample = Resample(taps, up=False, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        return self.resample(super().forward(x))


class Fourier(nn.Module):
    """Frequencies drawn from N(0, 16^2), part of the checkpoint; without one, that law's quantiles.

    They stay as wide as they are, whatever the dtype of the weights becomes.
    """

    def __init__(self, num: int):
        super().__init__()
        self.register_buffer("freqs", 16 * torch.special.ndtri((torch.arange(num) + 0.5) / num))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Fourier:
        self.freqs = self.freqs.to(fn(self.freqs).device)
        return self


class _UNet(nn.Module):
    """What ADM and Song share: the encoder, the decoder with its skips, and the names in EDM's files.

    block:      (channels, out_channels, resample, heads) -> Block.
    stem:       channels of the first convolution.
    heads:      channels -> heads of an attention.
    everywhere: every block of the decoder at an attention resolution has one; else only the last.
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
                f"channel_mult must have positive numbers for as many levels as img_resolution={img_resolution} can "
                f"be halved, got the widths {list(widths)}"
            )
        self.img_channels = img_channels
        block = partial(block, eps=eps)
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        levels = [(img_resolution >> level, width) for level, width in enumerate(widths)]
        channels, above, skips = stem, img_channels, [stem]
        for size, width in levels:
            name = f"{size}x{size}"
            if size == img_resolution:
                self.enc[f"{name}_conv"] = nn.Conv2d(img_channels, stem, 3, padding=1)
            else:
                self.enc[f"{name}_down"] = block(channels, channels, Resample(taps, up=False), 0)
                skips.append(channels)
                if residual:
                    self.enc[f"{name}_aux_residual"] = Residual(above, channels, taps)
                    above = channels
            for index in range(num_blocks):
                attention = heads(width) if size in attn_resolutions else 0
                self.enc[f"{name}_block{index}"] = block(channels, width, None, attention)
                channels = width
                skips.append(channels)
        for size, width in reversed(levels):
            name = f"{size}x{size}"
            if size == levels[-1][0]:
                self.dec[f"{name}_in0"] = block(channels, channels, None, heads(channels))
                self.dec[f"{name}_in1"] = block(channels, channels, None, 0)
            else:
                self.dec[f"{name}_up"] = block(channels, channels, Resample(taps, up=True), 0)
            for index in range(num_blocks + 1):
                asked = size in attn_resolutions and (everywhere or index == num_blocks)
                self.dec[f"{name}_block{index}"] = block(
                    channels + skips.pop(), width, None, heads(width) if asked else 0
                )
                channels = width
        self.out_norm, self.out_conv = (
            norm(channels, eps),
            nn.Conv2d(channels, out_channels, 3, padding=1),
        )

    def _run(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x (M, C, H, W), embedding (M, E) -> (M, C, H, W); what the network says of its own variance is dropped."""
        above, skips = x, []
        for layer in self.enc.values():
            if isinstance(layer, Residual):
                x = skips[-1] = above = (x + layer(above)) * math.sqrt(0.5)
            else:
                x = layer(x, embedding) if isinstance(layer, Block) else layer(x)
                skips.append(x)
        for name, layer in self.dec.items():
            x = layer(torch.cat([x, skips.pop()], dim=1) if "_block" in name else x, embedding)
        return self.out_conv(F.silu(self.out_norm(x)))[:, : self.img_channels]

    def to_public(self, layout: str) -> dict[str, Tensor]:
        """The weights as a file of `layout` has them. ValueError: no such layout."""
        own = self.state_dict()
        if layout == "own":
            return own
        if layout != "edm":
            raise ValueError(f"layout must be one of {', '.join(self.LAYOUTS)}, got {layout!r}")
        public = {self._edm_name(key): tensor for key, tensor in own.items()}
        for (
            name,
            module,
        ) in self.named_modules():  # EDM keeps a filter beside each weight that follows it
            if isinstance(module, Residual):
                public[f"model.{name}.resample_filter"] = module.resample.kernel
            elif isinstance(module, Block) and isinstance(module.resample, Resample):
                for part in ("conv0", "skip"):
                    public[f"model.{name}.{part}.resample_filter"] = module.resample.kernel.clone()
        return public

    def translate(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A file's tensors by our names, whichever of `LAYOUTS` it has; strange ones keep theirs."""
        if not any(key.startswith("model.") for key in tensors):
            return dict(tensors)
        own = {self._edm_name(key): key for key in self.state_dict()}
        # Next to the network there are a preconditioning's constants (`u`) and the filters, which are settings here.
        kept = (
            key
            for key in tensors
            if key.startswith("model.") and not key.endswith(".resample_filter")
        )
        return {own.get(key, key): tensors[key] for key in kept}

    def _edm_name(self, key: str) -> str:
        return f"model.{key}"


class ADM(_UNet):
    """The U-Net of Dhariwal & Nichol 2021 (arXiv 2105.05233), in EDM's files or in guided-diffusion's.

    label_dim:        classes; 0: none.
    out_channels:     of the file's last convolution; twice img_channels where it also learned a variance.
    adaptive_scale:   guided-diffusion's use_scale_shift_norm.
    legacy_attention: in a guided-diffusion file the heads, not q, k, v, are outermost in `qkv`, as where
                      use_new_attention_order is off; consistency-models files have q, k, v outermost.
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
        self.model_channels, self.label_dim, self.legacy_attention = (
            model_channels,
            label_dim,
            legacy_attention,
        )
        self.map_layer0 = nn.Linear(model_channels, emb_channels)
        self.map_layer1 = nn.Linear(emb_channels, emb_channels)
        if label_dim:
            self.map_label = nn.Linear(label_dim, emb_channels, bias=False)

    def forward(self, x: Tensor, clock: Tensor, classes: Tensor) -> Tensor:
        """x (M, C, H, W), clock (M,) float32 or wider, classes (M,) -> (M, C, H, W)."""
        angles = clock[:, None] * frequencies(
            self.model_channels // 2, self.model_channels // 2, clock
        )
        embedding = torch.cat([angles.cos(), angles.sin()], dim=1).to(self.map_layer0.weight.dtype)
        embedding = self.map_layer1(F.silu(self.map_layer0(embedding)))
        if self.label_dim:
            embedding = embedding + self.map_label(one_hot(classes, self.label_dim).to(embedding))
        return self._run(x, F.silu(embedding))

    def to_public(self, layout: str) -> dict[str, Tensor]:
        if layout != "guided_diffusion":
            return super().to_public(layout)
        names = self._guided_names()
        return {
            names[key]: self._from_own(key, tensor) for key, tensor in self.state_dict().items()
        }

    def translate(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not any(key.startswith("input_blocks.") for key in tensors):
            return super().translate(tensors)
        own = {name: key for key, name in self._guided_names().items()}
        return {own.get(name, name): self._to_own(name, tensor) for name, tensor in tensors.items()}

    def _from_own(self, key: str, tensor: Tensor) -> Tensor:
        if key == "map_label.weight":
            return tensor.T
        if ".qkv." in key:
            outer = 1 if self.legacy_attention else 0
            return tensor.unflatten(0, (-1, HEAD_CHANNELS, 3)).movedim(2, outer).flatten(0, 2)
        return tensor

    def _to_own(self, name: str, tensor: Tensor) -> Tensor:
        if name == "label_emb.weight":
            return tensor.T
        if ".proj_out." in name or ".qkv." in name:
            tensor = (
                tensor[..., None] if tensor.ndim == 3 else tensor
            )  # some files convolve over one long axis
        if (
            ".qkv." in name and len(tensor) % (3 * HEAD_CHANNELS) == 0
        ):  # else it is refused for its shape
            outer, shape = (
                (1, (-1, 3, HEAD_CHANNELS))
                if self.legacy_attention
                else (0, (3, -1, HEAD_CHANNELS))
            )
            return tensor.unflatten(0, shape).movedim(outer, 2).flatten(0, 2)
        return tensor

    def _guided_names(self) -> dict[str, str]:
        """Our name of every weight -> guided-diffusion's, which counts layers where EDM counts resolutions."""
        places = {
            f"enc.{name}": (f"input_blocks.{count}", 0) for count, name in enumerate(self.enc)
        }
        group, layer, count = "middle_block", 0, 0
        for name, block in self.dec.items():
            if "_block" in name:
                group, layer, count = f"output_blocks.{count}", 0, count + 1
            places[f"dec.{name}"] = (group, layer)
            layer += 1 + bool(block.heads)
        names = {}
        for key in self.state_dict():
            *module, kind = key.split(".")
            if module[0] in GUIDED_ENDS:
                names[key] = f"{GUIDED_ENDS[module[0]]}.{kind}"
                continue
            (group, layer), part = places[".".join(module[:2])], ".".join(module[2:])
            if part in GUIDED_ATTENTION:
                names[key] = f"{group}.{layer + 1}.{GUIDED_ATTENTION[part]}.{kind}"
            elif part:
                names[key] = f"{group}.{layer}.{GUIDED_RESIDUAL[part]}.{kind}"
            else:  # the first convolution
                names[key] = f"{group}.{layer}.{kind}"
        return names


class Song(_UNet):
    """DDPM++ and NCSN++ of Song et al. 2021 (arXiv 2011.13456) in EDM's files.

    label_dim, augment_dim: classes, and numbers that told the network of augmentations in training; 0: none.
    embedding_type:         of the clock, `positional` (DDPM++) or `fourier` (NCSN++).
    encoder_type:           `standard` (DDPM++) or `residual` (NCSN++), where the image enters every level.
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
        self.img_resolution, self.label_dim = img_resolution, label_dim
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
        """x (M, C, H, W), clock (M,) float32 or wider, classes (M,), augment (M, augment_dim) -> (M, C, H, W)."""
        half = self.noise_channels // 2
        if self.map_noise is None:
            angles = clock[:, None] * frequencies(half, half - 1, clock)
        else:
            angles = clock[:, None] * (2 * math.pi * self.map_noise.freqs.to(clock))
        embedding = torch.cat([angles.sin(), angles.cos()], dim=1).to(self.map_layer0.weight.dtype)
        if self.label_dim:
            labels = one_hot(classes, self.label_dim).to(embedding)
            embedding = embedding + self.map_label(labels * math.sqrt(self.label_dim))
        if augment is not None:
            embedding = embedding + self.map_augment(augment.to(embedding))
        return self._run(x, F.silu(self.map_layer1(F.silu(self.map_layer0(embedding)))))

    def _edm_name(self, key: str) -> str:
        place = f"model.dec.{self.img_resolution}x{self.img_resolution}_aux_"
        return f"model.{key}" if not key.startswith("out_") else place + key.removeprefix("out_")


def norm(channels: int, eps: float) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, channels // 4), channels, eps)


def frequencies(num: int, last: int, like: Tensor) -> Tensor:
    """(num,) 10000^(-k / last) for k = 0, 1, ..."""
    return (1 / 10000) ** (torch.arange(num, dtype=like.dtype, device=like.device) / last)


def one_hot(classes: Tensor, num_classes: int) -> Tensor:
    """(M,) -> (M, num_classes); a row of zeros for none."""
    return classes[:, None] == torch.arange(num_classes, device=classes.device)
