"""Train the scenes' transformer: `task=pretrain` with Muon and DiT's initial weights.

    python -m experiments.scenes_pipeline.train task=pretrain model=flux_scenes ...

takes what `oss-exp` takes. On one core Muon (https://kellerjordan.github.io/posts/muon) learns
more from an example than AdamW. It is in torch from 2.9 on. A run does not resume; train on with
`task.init_from`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from oss_exp import cli
from oss_exp.models.checkpoints.weights import xavier
from oss_exp.tasks import pretrain

SPEED = 2.0  # Muon's learning rate is so many times AdamW's
DECAY = 0.01
ZERO = (
    "norm1.linear",
    "norm1_context.linear",
    "norm.linear",
    "norm_out.linear",
    "network.proj_out",
)


class MuonAndAdamW(torch.optim.AdamW):
    """Muon for the matrices of the blocks, AdamW for all other weights.

    Args:
        matrices: Weights (m, n) that Muon changes.
        others: Weights that AdamW changes.
        learning_rate: AdamW's learning rate.
    """

    def __init__(self, matrices: list[Tensor], others: list[Tensor], learning_rate: float):
        super().__init__(others, lr=learning_rate)
        self.muon = torch.optim.Muon(  # with steps of the size of AdamW's (arXiv 2502.16982)
            matrices, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw"
        )

    def step(self, closure: Any = None) -> Any:
        """Take a step of both."""
        loss = super().step(closure)
        self.muon.param_groups[0]["lr"] = SPEED * self.param_groups[0]["lr"]
        self.muon.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients."""
        super().zero_grad(set_to_none)
        self.muon.zero_grad(set_to_none)


def initialise(network: nn.Module) -> None:
    """Give a FLUX transformer DiT's initial weights: every block is the identity at first."""
    for name, module in network.named_modules():
        xavier(module)
        if name.endswith(ZERO):
            nn.init.zeros_(module.weight)


class Module(pretrain.PretrainModule):
    """`task=pretrain`'s training with these initial weights and this optimizer."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        if not self.about["init_from"]:
            initialise(self.network)
            self.model.backbone.load_state_dict(self.network.state_dict())

    def configure_optimizers(self) -> dict[str, Any]:
        settings = super().configure_optimizers()
        schedule = settings["lr_scheduler"]["scheduler"]
        matrices, others = split(self.network.named_parameters())
        optimizer = MuonAndAdamW(matrices, others, self.learning_rate)
        rate = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule.lr_lambdas)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rate, "interval": "step"}}


def split(parameters: Iterable[tuple[str, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the matrices of the blocks, and all other parameters."""
    matrices, others = [], []
    for name, parameter in parameters:
        in_blocks = "transformer_blocks" in name and parameter.ndim == 2
        (matrices if in_blocks else others).append(parameter)
    return matrices, others


if __name__ == "__main__":
    pretrain.PretrainModule = Module
    cli.main()
