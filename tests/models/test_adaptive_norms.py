"""Every family names its adaptive layer norms, for task=finetune task.trainable=adaln."""

import pytest
from hydra.utils import instantiate
from models.common import composed

from oss_exp.models.network import adaptive_norms

# By family: the last names of the layers that make shifts, scales and gates, and another layer's.
FAMILIES = {
    "unet_fashion": ({"time_emb_proj", "linear_1", "linear_2"}, "conv1"),
    "dit_fashion": ({"linear", "linear_1", "linear_2", "proj_out_1"}, "proj_out_2"),
    "dit_xl_2_256": ({"linear", "linear_1", "linear_2", "proj_out_1"}, "proj_out_2"),
    "mar_fashion": ({"adaLN_modulation.1", "mlp.0", "mlp.2"}, "input_proj"),
    "open_sora_1_2": ({"scale_shift_table", "t_block.1"}, "proj"),
    "flux_fashion": ({"linear", "linear_1", "linear_2"}, "to_q"),
}
WITHOUT = ("edm_cifar10_cond", "edm_imagenet64")
PROMPTS = {"open_sora_1_2": "prompts.txt", "flux_fashion": "coloured_fashion.txt"}


def backbone(name: str):
    """Build the untrained backbone of a model of conf/, tiny where it has that size."""
    overrides = [f"model={name}"]
    if name in PROMPTS:
        overrides += ["data=prompts", f"data.prompts={PROMPTS[name]}"]
    model = composed(*overrides).model
    size = {"size": "tiny"} if "tiny" in model.get("sizes", ()) else {}
    return instantiate(model, **size).backbone


def layer(parameter: str) -> str:
    """Return the last name of a parameter's layer, with the number if it is in a sequence."""
    *layers, kind = parameter.split(".")
    if kind not in ("weight", "bias"):
        return kind
    return ".".join(layers[-2:]) if layers[-1].isdigit() else layers[-1]


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_names_its_adaptive_layer_norms(name):
    layers, other = FAMILIES[name]
    network = backbone(name)
    parameters = {parameter for parameter, _ in network.named_parameters()}

    norms = set(adaptive_norms(network))

    assert norms < parameters
    assert {layer(parameter) for parameter in norms} == layers
    others = {layer(parameter) for parameter in parameters - norms}
    assert other in others | {name.split(".")[0] for name in others}


@pytest.mark.parametrize("name", WITHOUT)
def test_a_family_without_them_names_none(name):
    assert adaptive_norms(backbone(name)) == []
