"""Every family says which of its parameters are adaptive layer norms, for task=finetune task.trainable=adaln."""

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from oss_exp.cli import CONF
from oss_exp.models.network import adaptive_norms

# Layers by their last name: those that turn clock and condition into shifts, scales and gates, and one beside them.
FAMILIES = {
    "unet_fashion": ({"time_emb_proj", "linear_1", "linear_2"}, "conv1"),
    "dit_fashion": ({"linear", "linear_1", "linear_2", "proj_out_1"}, "proj_out_2"),
    "dit_xl_2_256": ({"linear", "linear_1", "linear_2", "proj_out_1"}, "proj_out_2"),
    "mar_fashion": ({"adaLN_modulation.1", "mlp.0", "mlp.2"}, "input_proj"),
    "open_sora_1_2": ({"scale_shift_table", "t_block.1"}, "proj"),
    "flux_fashion": ({"linear", "linear_1", "linear_2"}, "to_q"),
}
WITHOUT = ("edm_cifar10_cond", "edm_imagenet64")
PROMPTS = {"flux_fashion": "coloured_fashion.txt"}


def backbone(name: str):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        prompted = name in ("open_sora_1_2", "flux_fashion")
        prompts = (
            ["data=prompts", f"data.prompts={PROMPTS.get(name, 'prompts.txt')}"] if prompted else []
        )
        model = compose("config", [f"model={name}", *prompts]).model
    return instantiate(
        model, **({"size": "tiny"} if "tiny" in model.get("sizes", ()) else {})
    ).backbone


def layer(parameter: str) -> str:
    """The last name of a parameter's layer, with its number in a sequence, or of a bare parameter."""
    *layers, kind = parameter.split(".")
    if kind not in ("weight", "bias"):
        return kind
    return ".".join(layers[-2:]) if layers[-1].isdigit() else layers[-1]


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_names_its_adaptive_layer_norms(name):
    layers, beside = FAMILIES[name]
    network = backbone(name)
    names = adaptive_norms(network)
    assert {layer(name_) for name_ in names} == layers
    everything = {name_ for name_, _ in network.named_parameters()}
    assert set(names) < everything
    others = {layer(name_) for name_ in everything - set(names)}
    assert beside in {part for name_ in others for part in (name_, name_.split(".")[0])}


@pytest.mark.parametrize("name", WITHOUT)
def test_a_family_without_them_names_none(name):
    assert adaptive_norms(backbone(name)) == []
