"""Networks refuse weights of another network, and answer every row on its own."""

from pathlib import Path

import pytest
import torch

from oss_exp.distances import Perceptual
from oss_exp.files import save_asset
from oss_exp.models.decoders.image import Pixels
from oss_exp.models.families.backbones import DiT, UNet
from oss_exp.models.guidance import Guidance
from oss_exp.models.network import Network
from oss_exp.models.parameterization import EDMPrediction, FlowVelocity
from oss_exp.noise import FlowPath

EDM_FORM = EDMPrediction(0.8, 0.002, 80.0, 1000.0)
FLOW = FlowVelocity(FlowPath(1.0, 1000.0))


def unet(width: int = 8, num_classes: int | None = 3, patch: int = 2) -> UNet:
    return UNet(
        channels=1,
        size=16,
        num_classes=num_classes,
        patch=patch,
        layers_per_block=1,
        block_out_channels=[width, width],
        down_block_types=["DownBlock2D", "AttnDownBlock2D"],
        up_block_types=["AttnUpBlock2D", "UpBlock2D"],
        attention_head_dim=4,
        norm_num_groups=4,
    )


def dit() -> DiT:
    return DiT(
        channels=2,
        size=16,
        num_classes=3,
        patch=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
    )


def network(
    backbone, form=EDM_FORM, shape=(1, 16, 16), checkpoint="untrained", num_classes=3, **more
) -> Network:
    settings = {
        "decoder": Pixels(),
        "guidance": Guidance(),
        "micro_batch": 5,
        "dtype": "float32",
        **more,
    }
    return Network("tiny", backbone, form, shape, num_classes, checkpoint=checkpoint, **settings)


def randomise(module: torch.nn.Module) -> None:
    """Draw all weights, biases too."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)


@pytest.fixture
def random_network():
    torch.manual_seed(0)
    model = network(unet())
    randomise(model)
    return model


def states(count: int, *shape: int):
    x = torch.randn(count, *shape, generator=torch.Generator().manual_seed(1))
    return x, torch.linspace(0.05, 1, count, dtype=torch.float64)


@pytest.mark.parametrize(
    "backbone", [unet(), unet(patch=1), dit()], ids=["unet", "unet on pixels", "dit"]
)
def test_backbones_keep_shapes_and_have_a_label_for_no_class(backbone):
    randomise(backbone)
    shape = (2, 16, 16) if isinstance(backbone, DiT) else (1, 16, 16)
    x, t = states(4, *shape)
    output = backbone.eval()(x, t.float(), torch.tensor([-1, 0, 1, 2]))

    assert output.shape == x.shape

    outputs = backbone(
        x[:1].expand(4, -1, -1, -1), t[:1].float().expand(4), torch.tensor([-1, 0, 1, 2])
    )
    assert len({float(row.sum()) for row in outputs}) == 4


def test_rows_micro_batches_and_clocks_are_independent(random_network):
    x, t = states(12, 1, 16, 16)
    labels = torch.tensor([0, 1, 2])
    f = random_network.velocity(labels)
    whole = f(x, t)
    for m in range(12):
        alone = random_network.velocity(labels[m % 3 : m % 3 + 1])(x[m : m + 1], t[m : m + 1])
        torch.testing.assert_close(alone, whole[m : m + 1], rtol=1e-4, atol=1e-4)


def test_guidance_acts_on_the_velocity(random_network):
    x, t = states(3, 1, 16, 16)
    labels = torch.tensor([0, 1, 2])
    guided = random_network.velocity(labels, Guidance(3.0))(x, t)
    conditional = random_network.velocity(labels)(x, t)
    free = random_network.velocity(None)(x, t)
    torch.testing.assert_close(guided, free + 3 * (conditional - free), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "guidance", [Guidance(), Guidance(2.0), Guidance(2.0, interval=[0.3, 0.6])]
)
def test_a_layer_can_be_a_distance(random_network, guidance):
    """The features of a row do not depend on the other rows."""
    distance = Perceptual(layer="backbone.network.mid_block", min_time=0.01, norm=2).bind(
        random_network
    )
    x, t = states(6, 1, 16, 16)
    f = random_network.velocity(torch.tensor([0, 1, 2]), guidance)
    whole = distance.features(x, t, f)
    for m in range(6):
        alone = distance.features(x[m : m + 1], t[m : m + 1], f.subset(torch.tensor([m % 3])))
        torch.testing.assert_close(alone, whole[m : m + 1], rtol=1e-3, atol=1e-3)


def test_saved_weights_are_read_back(random_network, tmp_path):
    digest = save_asset(
        tmp_path / "tiny.safetensors", random_network.backbone.state_dict(), {"name": "tiny"}
    )
    again = network(unet(), checkpoint=str(tmp_path / "tiny.safetensors"))
    assert again.fingerprint == digest
    x, t = states(3, 1, 16, 16)
    assert torch.equal(again.velocity(None)(x, t), random_network.velocity(None)(x, t))
    assert not any(parameter.requires_grad for parameter in again.parameters())
    assert not again.training


# --------------------------------------------------------------------------------------------------
# Bad input
# --------------------------------------------------------------------------------------------------


def saved(tmp_path, tensors) -> str:
    """Save weights and return the file's name."""
    save_asset(tmp_path / "w.safetensors", tensors, {})
    return str(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    "other",
    [lambda: unet(width=12), lambda: unet(num_classes=4), lambda: unet(patch=1), dit],
    ids=["width", "classes", "patch", "kind"],
)
def test_a_checkpoint_of_another_architecture_is_refused(other, tmp_path):
    with pytest.raises(
        ValueError, match=r"is of another architecture than model=tiny: \d+ weights differ, first "
    ):
        network(unet(), checkpoint=saved(tmp_path, other().state_dict()))


def test_a_missing_and_a_left_over_weight_are_refused(tmp_path):
    tensors = unet().state_dict()
    extra = {"extra": torch.zeros(1)}
    message = r"1 weights differ.*extra: \(1,\) in the file, absent in the network"
    with pytest.raises(ValueError, match=message):
        network(unet(), checkpoint=saved(tmp_path, tensors | extra))
    first = sorted(tensors)[0]
    del tensors[first]
    with pytest.raises(ValueError, match=f"1 weights differ, first {first}: absent in the file"):
        network(unet(), checkpoint=saved(tmp_path, tensors))


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_truncated_weights_are_refused(keep, tmp_path):
    path = saved(tmp_path, unet().state_dict())
    data = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "w.safetensors").write_bytes(data[:keep])
    with pytest.raises(ValueError, match="is damaged or was replaced"):
        network(unet(), checkpoint=path)


def test_a_changed_byte_is_refused(tmp_path):
    path = saved(tmp_path, unet().state_dict())
    data = bytearray((tmp_path / "w.safetensors").read_bytes())
    data[-5] ^= 1
    (tmp_path / "w.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="SHA-256"):
        network(unet(), checkpoint=path)


@pytest.fixture
def tensors(random_network) -> dict[str, torch.Tensor]:
    return random_network.backbone.state_dict()


def test_weights_without_provenance_have_the_same_fingerprint(tensors, tmp_path):
    expected = save_asset(tmp_path / "with.safetensors", tensors, {})
    (tmp_path / "without.safetensors").write_bytes((tmp_path / "with.safetensors").read_bytes())

    model = network(unet(), checkpoint=str(tmp_path / "without.safetensors"))

    assert model.fingerprint == expected


def test_rounded_weights_are_another_model(random_network, tensors, tmp_path):
    rounded = {f"module.{name}": tensor.half() for name, tensor in tensors.items()}
    torch.save({"model": rounded}, tmp_path / "half.pt")
    exact = save_asset(tmp_path / "exact.safetensors", tensors, {})

    model = network(unet(), checkpoint=str(tmp_path / "half.pt"))

    assert model.fingerprint not in (exact, random_network.fingerprint)
    for name, tensor in model.backbone.state_dict().items():
        torch.testing.assert_close(tensor, tensors[name], rtol=1e-3, atol=1e-3)


@pytest.fixture
def run_folder(tensors, tmp_path) -> Path:
    """The folder of a training whose weights are 0, and their average is `tensors`."""
    file = tmp_path / "run" / "checkpoints" / "last.ckpt"
    file.parent.mkdir(parents=True)
    trained = {f"network.{name}": torch.zeros_like(tensor) for name, tensor in tensors.items()}
    average = {f"model.backbone.{name}": tensor for name, tensor in tensors.items()}
    content = {"state_dict": trained | average, "optimizer_states": [{"state": {}}]}
    torch.save(content | {"progress": {"losses": [1.0]}}, file)
    return tmp_path / "run"


@pytest.mark.parametrize("checkpoint", [".", "checkpoints", "checkpoints/last.ckpt"])
def test_a_training_gives_its_average(run_folder, tensors, checkpoint):
    model = network(unet(), checkpoint=str(run_folder / checkpoint))
    for name, tensor in model.backbone.state_dict().items():
        assert torch.equal(tensor, tensors[name])


def test_a_training_gives_another_set_by_its_name(run_folder):
    model = network(unet(), checkpoint=str(run_folder), weights_set="state_dict.network")
    assert not any(tensor.any() for tensor in model.backbone.state_dict().values())


def test_a_folder_without_weights_or_with_several_files_is_refused(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"has no weights .* nor a run's checkpoints/last\.ckpt"
    ):
        network(unet(), checkpoint=str(tmp_path))

    for name in ("a.safetensors", "b.pt"):
        (tmp_path / name).touch()
    with pytest.raises(
        ValueError, match=r"has 2 files of weights \(a\.safetensors, b\.pt\); give one"
    ):
        network(unet(), checkpoint=str(tmp_path))


def test_a_missing_checkpoint_is_refused_with_the_names_of_the_shipped_ones():
    with pytest.raises(
        FileNotFoundError, match=r"nowhere\.safetensors is neither .*mixture_fashion\.safetensors"
    ):
        network(unet(), checkpoint="nowhere.safetensors")


def test_classes_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="has 3 classes"):
        network(unet()).velocity(torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="has no classes"):
        network(unet(num_classes=None), num_classes=None).velocity(torch.tensor([0]))


def test_an_image_size_that_patches_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="size must be a multiple of patch, got 16 and 3"):
        unet(patch=3)
