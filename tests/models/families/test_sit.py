"""SiT-XL/2 is DiT's network with another clock and another answer."""

import json

import pytest
import torch
from helpers import ORACLES
from hydra.utils import instantiate
from models.common import composed, without_prefix
from safetensors.torch import load_file

from oss_exp.models.families.sit import SiT
from oss_exp.models.parameterization import FlowVelocity
from oss_exp.noise import FlowPath

TINY = {"channels": 4, "num_classes": 10, "patch": 2, "num_layers": 2, "num_attention_heads": 4}


def test_the_velocity_is_minus_the_answer_at_the_mirrored_time():
    """The architecture is DiT's, so the authors' DiT answers for SiT's weights too (oracles F)."""
    arrays = load_file(ORACLES / "dit_tiny.safetensors")
    backbone = SiT(size=8, attention_head_dim=8, **TINY).eval().requires_grad_(False)
    original = {key: value.float() for key, value in without_prefix(arrays, "sd.").items()}
    backbone.load_state_dict(backbone.translate(original))
    flow = FlowVelocity(FlowPath(time_scale=1.0))
    classes = torch.where(arrays["y"] == 10, -1, arrays["y"])

    x = arrays["x"]
    t = 1 - arrays["t_frac"].double()
    velocity = flow.velocity(backbone(*flow.inputs(x, t), classes), x, t)

    expected = -arrays["forward_t_frac"][:, :4]

    assert float((velocity - expected).abs().max() / expected.abs().max()) < 1e-4


@pytest.mark.slow
def test_the_preset_has_the_weights_of_the_public_file():
    full = composed("model=sit_xl_2_256").model.sizes.full
    with torch.device("meta"):
        backbone = instantiate(full.backbone)()

    assert isinstance(backbone, SiT)

    # Each weight is one number in memory.
    zero = torch.zeros((), dtype=torch.bfloat16)
    state = {key: zero.expand(weight.shape) for key, weight in backbone.state_dict().items()}
    backbone.load_state_dict(state, assign=True)
    expected = json.loads((ORACLES / "dit_fullsize_keys.json").read_text())["state_dict"]
    shapes = {key: list(value.shape) for key, value in backbone.to_public("original").items()}

    assert shapes == expected | {"pos_embed": [1, 256, 1152]}
