"""Public names are importable, and code and configurations give classes the same defaults."""

import ast
import inspect
import subprocess
import sys
from dataclasses import fields, is_dataclass
from itertools import chain
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import Tensor, nn

import oss_exp
from oss_exp.names import named_object

CONF = Path(__file__).parents[1] / "conf"
# Groups of options of a run, which build no public class.
OF_A_RUN = {"base", "experiment", "hydra", "logger", "paths", "scale", "task", "trainer"}
FILES = sorted(file for file in CONF.glob("*/*.yaml") if file.parent.name not in OF_A_RUN)

# For a class that several yamls build: the yaml with its defaults, and the key in it. Any other
# class has the one yaml that builds it, or none (EDMPath, VPPath, ScorePrediction).
YAML_OF_DEFAULTS = {
    "ClosedForm": ("stepsize/fm", ""),
    "DDIMSchedule": ("noise_schedule/ddim", ""),
    "EDMSchedule": ("noise_schedule/edm", ""),
    "FlowSchedule": ("noise_schedule/fm", ""),
    "GITS": ("stepsize/gits", ""),
    "GaussianMixture.from_asset": ("model/mixture_fashion", ""),
    "IPNDM": ("solver/ipndm", ""),
    "Inception": ("distance/features", ""),
    "LogSNRSchedule": ("noise_schedule/logsnr", ""),
    "OSSShared": ("stepsize/oss_shared", ""),
    "Pipeline.from_pretrained": ("model/pipeline", ""),
    "XtMSE": ("distance/xt_mse", ""),
    "UNet": ("model/unet_fashion", "backbone"),
    "DDPMPath": ("model/dit_xl_2_256", "parameterization.path"),
    "DataPrediction": ("model/video_fashion", "parameterization"),
    "EDMPrediction": ("model/edm_afhqv2_64", "parameterization"),
    "FlowPath": ("model/dit_fashion", "parameterization.path"),
    "FlowVelocity": ("model/dit_fashion", "parameterization"),
    "Guidance": ("model/dit_fashion", "guidance"),
    "NoisePrediction": ("model/dit_xl_2_256", "parameterization"),
    "cosine_betas": ("noise_schedule/cosine", "betas"),
    "fashion_mnist": ("images/fashion_mnist", ""),
    "linear_betas": ("noise_schedule/ddim", "betas"),
}
FUNCTIONS = [
    "GaussianMixture.from_asset",
    "FashionDetector.from_asset",
    "FashionFeatures.from_asset",
    "cosine_betas",
    "linear_betas",
    "scaled_linear_betas",
]
OTHER_DEFAULTS = {
    "VAE": "those of diffusers.AutoencoderKL; a pipeline's config holds what differs from them",
    "LDMVAE": "as VAE",
    "FashionDetector.from_asset": "its file is named by the class",
    "FashionFeatures.from_asset": "its file is named by the class",
}
PUBLIC_CLASSES = [name for name in oss_exp.PUBLIC if name[0].isupper()]


# --------------------------------------------------------------------------------------------------
# Names
# --------------------------------------------------------------------------------------------------


def test_editors_see_the_names_that_are_imported_when_they_are_used():
    tree = ast.parse(Path(oss_exp.__file__).read_text())
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    modules = {}
    for statement in block.body:
        [alias] = statement.names
        assert alias.name == alias.asname
        modules[alias.name] = statement.module

    assert modules == {name: f"oss_exp.{place}" for name, place in oss_exp.PUBLIC.items()}
    assert oss_exp.__all__ == [*oss_exp.PUBLIC]
    assert not oss_exp.PUBLIC.keys() & oss_exp.CONFIGURED.keys()


def test_importing_the_package_loads_neither_torch_nor_numpy():
    code = (
        "import sys, oss_exp; dir(oss_exp); "
        "print(sorted({'torch', 'numpy', 'hydra', 'scipy'} & sys.modules.keys()))"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert process.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "file", sorted(CONF.rglob("*.yaml")), ids=lambda file: f"{file.parent.name}/{file.stem}"
)
def test_targets_are_public_names(file):
    for node in targets(OmegaConf.load(file)).values():
        package, _, name = node._target_.partition(".")
        if package == "oss_exp":
            owner, _, method = name.partition(".")
            assert owner in {**oss_exp.PUBLIC, **oss_exp.CONFIGURED}
            assert not method or inspect.ismethod(getattr(named_object(f"oss_exp.{owner}"), method))


# --------------------------------------------------------------------------------------------------
# Defaults
# --------------------------------------------------------------------------------------------------


def targets(node, key: str = "") -> dict[str, DictConfig]:
    """Return {key: node} of every node with a `_target_`, from the top down."""
    nodes = {key: node} if isinstance(node, DictConfig) and "_target_" in node else {}
    names = node if isinstance(node, DictConfig) else range(len(node))
    for name in names:
        below = node._get_node(name)
        if isinstance(below, DictConfig | ListConfig):
            nodes |= targets(below, f"{key}.{name}".lstrip("."))
    return nodes


def composed(file: Path) -> DictConfig:
    """Return the configuration that an option of a group gives."""
    group = file.parent.name
    name = file.stem

    with initialize_config_dir(str(CONF), version_base="1.3"):
        # A pipeline chooses options of other groups, which must be there.
        if group == "model":
            config = compose("config", [f"model={name}"])
        else:
            config = compose(overrides=[f"+{group}={name}"])
    if group == "exporter":
        return config.task.exporter
    return config[group][name] if group in ("stepsize", "metric") else config[group]


@pytest.fixture(scope="module")
def nodes() -> dict[str, dict[tuple[str, str], DictConfig]]:
    """The nodes that build a public object: {name: {(yaml, key): node}}."""
    nodes_of = {}
    for file in FILES:
        for key, node in targets(composed(file)).items():
            package, _, name = node._target_.partition(".")
            if package == "oss_exp":
                nodes_of.setdefault(name, {})[f"{file.parent.name}/{file.stem}", key] = node
    return nodes_of


def node_of_defaults(nodes, name: str) -> DictConfig:
    """Return the node with the defaults of a class or function."""
    return nodes[name][YAML_OF_DEFAULTS.get(name, next(iter(nodes[name])))]


def same(one, other) -> bool:
    """Return whether two values are equal, also those that compare by identity."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, nn.Module):
        return type(one) is type(other) and same(one.state_dict(), other.state_dict())
    if is_dataclass(one):
        if type(one) is not type(other):
            return False
        names = [field.name for field in fields(one)]
        return all(same(getattr(one, name), getattr(other, name)) for name in names)

    if isinstance(one, dict):
        if one.keys() != other.keys():
            return False
        return all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.parametrize("name", PUBLIC_CLASSES)
def test_a_public_class_needs_no_arguments(name):
    kind = getattr(oss_exp, name)
    assert isinstance(kind(), kind)


@pytest.mark.slow
def test_defaults_are_those_of_the_yaml(nodes):
    for name in chain(PUBLIC_CLASSES, FUNCTIONS):
        if name in nodes:
            built = instantiate(node_of_defaults(nodes, name), _convert_="all")
            assert same(built, named_object(f"oss_exp.{name}")()), name


@pytest.mark.slow
def test_every_simple_default_is_that_of_the_yaml(nodes):
    """Also those of classes and functions that need some arguments."""
    for name in nodes.keys() - OTHER_DEFAULTS.keys():
        node = node_of_defaults(nodes, name)
        for parameter in inspect.signature(named_object(f"oss_exp.{name}")).parameters.values():
            simple = isinstance(parameter.default, bool | int | float | str | tuple | None)
            if parameter.name not in node or not simple:
                continue
            value = node[parameter.name]
            value = list(value) if OmegaConf.is_list(value) else value
            assert same(parameter.default, value), f"{name}: {parameter.name}"


@pytest.mark.slow
def test_classes_that_yamls_build_with_several_values_name_one_of_them(nodes):

    def num_values(name: str) -> int:
        return len({OmegaConf.to_yaml(node) for node in nodes.get(name, {}).values()})

    ambiguous = {name for name in PUBLIC_CLASSES if num_values(name) > 1}
    assert ambiguous <= YAML_OF_DEFAULTS.keys()
    assert all(place in nodes[name] for name, place in YAML_OF_DEFAULTS.items())


@pytest.mark.slow
def test_the_keys_of_yamls_are_parameters_with_annotations(nodes):
    """The border checks values by these annotations."""
    for name, places in nodes.items():
        target = named_object(f"oss_exp.{name}")
        parameters = inspect.signature(target).parameters
        is_open = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        is_plain_class = inspect.isclass(target) and not is_dataclass(target)
        hints = get_type_hints(target.__init__ if is_plain_class else target)

        for place, node in places.items():
            keys = {key for key in node if not key.startswith("_")}
            unknown = keys - parameters.keys()
            assert is_open or not unknown, f"{place}: {unknown}"
            assert keys & parameters.keys() <= hints.keys()
