"""The weights of a network are found in a file, whatever wraps them; averages come first."""

import re
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from omegaconf import OmegaConf

from oss_exp.models.checkpoints import safe_pickle
from oss_exp.models.checkpoints.weights import locate, read, read_for, spelled

NETWORK = {
    "layers.0.weight": torch.zeros(2, 3),
    "layers.0.bias": torch.zeros(2),
    "out.weight": torch.zeros(1, 2),
}


def weights(value: float = 1.0, prefix: str = "") -> dict[str, torch.Tensor]:
    """Weights of the network, filled with a value."""
    return {f"{prefix}{key}": torch.full_like(tensor, value) for key, tensor in NETWORK.items()}


def value_in_file(folder: Path, content, weights_set=None, translate=dict) -> float:
    """Return the value that fills the weights read from a torch file of this content."""
    torch.save(content, folder / "x.pt")
    return value_of(read_for(folder / "x.pt", NETWORK, translate, weights_set, "model=tiny"))


def value_of(tensors) -> float:
    """Return the one value that fills all weights."""
    assert tensors.keys() == NETWORK.keys()
    [value] = torch.cat([tensor.float().flatten() for tensor in tensors.values()]).unique().tolist()
    return value


# --------------------------------------------------------------------------------------------------
# Prefixes and containers
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "module.",
        "_orig_mod.",
        "module._orig_mod.",
        "_orig_mod.module.",
        "model.",
        "net.",
        "model.diffusion_model.",
        "ema_model.",
        "transformer.",
        "_fsdp_wrapped_module.",
        "whatever.it.is.called.",
    ],
)
@pytest.mark.parametrize(
    "container", [None, "state_dict", "module", "model_state_dict", "params_ema", "net"]
)
def test_prefixes_and_containers_of_weights_are_removed(prefix, container, tmp_path):
    tensors = weights(prefix=prefix)
    assert value_in_file(tmp_path, {container: tensors, "epoch": 3} if container else tensors) == 1
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors")
    assert value_of(read_for(tmp_path / "x.safetensors", NETWORK, dict, None, "model=tiny")) == 1


def test_weights_are_found_beside_other_tensors(tmp_path):
    assert (
        value_in_file(tmp_path, {"n_averaged": torch.tensor(3), **weights(prefix="module.")}) == 1
    )
    loss = {f"loss.layers.{i}.weight": torch.zeros(9) for i in range(9)}
    content = {
        "state_dict": {**weights(prefix="model."), **loss},
        "callbacks": {"ema": weights(3)},
    }
    assert value_in_file(tmp_path, content) == 1
    content = {"generator": weights(), "discriminator": {"layers.0.weight": torch.zeros(9)}}
    assert value_in_file(tmp_path, content) == 1


def test_prefixes_come_off_before_public_names_are_translated(tmp_path):
    """A prefix that belongs to the public names stays on."""

    def translate(tensors):
        if not all(key.startswith("model.") for key in tensors):
            raise ValueError("not the public layout")
        return {key.removeprefix("model."): tensor for key, tensor in tensors.items()}

    for prefix in ("model.", "module.model.", "ema.module.model."):
        assert value_in_file(tmp_path, weights(prefix=prefix), translate=translate) == 1
    with pytest.raises(ValueError, match="not the public layout"):
        value_in_file(tmp_path, weights(), translate=translate)


# --------------------------------------------------------------------------------------------------
# Several sets
# --------------------------------------------------------------------------------------------------


def flattened(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Name tensors as latent diffusion's average does, without dots."""
    return {f"{prefix}{key.replace('.', '')}": tensor for key, tensor in tensors.items()}


@pytest.mark.parametrize(
    "content",
    [
        {"model": weights(0), "ema_model": weights(), "step": 3},
        {"model": weights(0), "model_ema": weights()},
        {"model": weights(0), "ema_0.9999": weights()},
        {"params": weights(0), "params_ema": weights()},
        {"model_state_dict": weights(0), "ema_state_dict": weights(prefix="module.")},
        {"state_dict": {"net": weights(0), "EMA": weights()}},
        {"model": weights(0), "swa": OrderedDict(weights()), "optimizer": {"ema": weights(3)}},
        {"state_dict": {**weights(0, "model."), **weights(1, "ema_model.")}},
        {
            "state_dict": {
                **weights(0, "net.module."),
                **weights(1, "net_ema.module."),
                "net_ema.decay": torch.zeros(()),
            }
        },
        {
            "model": weights(0),
            "ema": {
                **weights(0, "online_model."),
                **weights(1, "ema_model."),
                "step": torch.zeros(1),
            },
        },
        {  # latent diffusion's
            "state_dict": {
                **weights(0, "model.diffusion_model."),
                "model_ema.decay": torch.zeros(()),
                "model_ema.num_updates": torch.zeros(()),
                **flattened(weights(), "model_ema.diffusion_model"),
            }
        },
    ],
    ids=lambda content: "-".join(content),
)
def test_the_average_is_taken_of_several_sets(content, tmp_path):
    assert value_in_file(tmp_path, content) == 1


SEVERAL = {
    "two averages": (
        {"model": weights(0), "model_ema1": weights(1), "model_ema2": weights(2)},
        "model_ema1, model_ema2",
    ),
    "no average": ({"G": weights(0), "G_old": weights(1)}, "G, G_old"),
    "under prefixes": ({**weights(0, "student."), **weights(1, "teacher.")}, "student, teacher"),
    "a list": (
        {"model": weights(0), "ema": {"decay": 0.9, "shadow_params": [torch.zeros(1)]}},
        "model",
    ),
    "another network": ({"model": weights(0), "ema": {"layers.0.weight": torch.zeros(9)}}, "model"),
}


@pytest.mark.parametrize("kind", SEVERAL)
def test_without_one_sure_average_the_sets_are_listed(kind, tmp_path):
    content, names = SEVERAL[kind]
    with pytest.raises(
        ValueError, match=rf"x\.pt h.*choose one with model\.weights_set=NAME: .*{names}$"
    ):
        value_in_file(tmp_path, content)

    with pytest.raises(
        ValueError,
        match=r"has no set of weights 'other'; choose one with model\.weights_set=NAME: ",
    ):
        value_in_file(tmp_path, content, "other")


def test_a_set_can_be_chosen(tmp_path):
    content = {"model": weights(0), "ema1": weights(1, "module."), "ema2": weights(2)}
    for name, value in {"model": 0, "ema1": 1, "ema1.module": 1, "ema2": 2}.items():
        assert value_in_file(tmp_path, content, name) == value
    assert value_in_file(tmp_path, SEVERAL["under prefixes"][0], "teacher") == 1
    assert value_in_file(tmp_path, SEVERAL["a list"][0], "model") == 0


def test_weights_that_differ_are_counted_once(tmp_path):
    renamed = {key.replace("layers", "blocks"): tensor for key, tensor in weights().items()}
    with pytest.raises(
        ValueError,
        match=r"than model=tiny: 2 weights differ, first blocks\.0\.bias: \(2,\) in the file, ",
    ):
        value_in_file(tmp_path, renamed)

    with pytest.raises(
        ValueError,
        match=r"1 weights differ, first out\.weight: \(5,\) in the file, \(1, 2\) in the net",
    ):
        value_in_file(
            tmp_path, {"module": weights(prefix="net.") | {"net.out.weight": torch.zeros(5)}}
        )

    with pytest.raises(
        ValueError,
        match="in its set 'b', is of another architecture than model=tiny: 1 weights differ",
    ):
        value_in_file(
            tmp_path, {"a": {"w": torch.zeros(1)}, "b": weights() | {"more": torch.zeros(1)}}
        )


def test_a_prefix_of_only_some_names_is_refused(tmp_path):
    content = {
        f"module.{key}" if key.startswith("layers") else key: tensor
        for key, tensor in weights().items()
    }
    with pytest.raises(
        ValueError,
        match=r"weights of model=tiny, but 'module\.' before only 2 of its 3 names; save it",
    ):
        value_in_file(tmp_path, {"state_dict": content})


# --------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("listed", "present"),
    [
        (
            "unet/diffusion_pytorch_model.safetensors",
            "unet/diffusion_pytorch_model.fp16.safetensors",
        ),
        ("unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.bin"),
        (
            "unet/diffusion_pytorch_model.safetensors",
            "unet/diffusion_pytorch_model.safetensors.index.fp16.json",
        ),
        ("text_encoder/model.safetensors", "text_encoder/pytorch_model.bin"),
        ("text_encoder/model.safetensors", "text_encoder/pytorch_model.bin.index.json"),
        ("model.safetensors", "pytorch_model.fp16.bin"),
    ],
)
def test_the_same_weights_by_other_names_are_found(listed, present, tmp_path):
    (tmp_path / present).parent.mkdir(exist_ok=True)
    (tmp_path / present).touch()
    assert locate(str(tmp_path), [listed], "") == tmp_path / present
    (tmp_path / listed).touch()
    assert locate(str(tmp_path), [listed], "") == tmp_path / listed
    assert spelled(["x.pt", listed])[:2] == ["x.pt", listed]


def test_shards_may_be_torch_files(tmp_path):
    names = {key: f"part{i}.bin" for i, key in enumerate(NETWORK)}
    for key, tensor in weights().items():
        torch.save({key: tensor}, tmp_path / names[key])
    (tmp_path / "x.index.json").write_text(f'{{"weight_map": {names!r}}}'.replace("'", '"'))
    assert value_of(read(tmp_path / "x.index.json")) == 1
    (tmp_path / "x.index.json").write_text('{"weight_map": {"a": "x.index.json"}}')  # itself
    with pytest.raises(ValueError, match=r"x\.index\.json is cut short, or neither"):
        read(tmp_path / "x.index.json")


def test_settings_and_numbers_beside_weights_are_passed_over(tmp_path):
    settings = {
        "cfg": OmegaConf.create({"a": [1]}),
        "loss": np.float64(3),
        "where": Path("x"),
        "history": np.arange(3),
    }
    assert (
        value_in_file(tmp_path, {"model": weights(), "hyper_parameters": settings, **settings}) == 1
    )


class Net(torch.nn.Linear):
    """A class of the user."""


def test_a_whole_file_is_not_called_damaged(tmp_path):
    torch.save(Net(2, 1), tmp_path / "module.pt")
    torch.save({"net": Net(2, 1)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    torch.jit.script(torch.nn.Linear(1, 1)).save(tmp_path / "script.pt")
    np.savez(tmp_path / "arrays.npz", w=np.zeros(1))
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(99))
    (tmp_path / "pointer.pt").write_bytes(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
    )
    reasons = {
        "module.pt": r"holds more than tensors \(.*test_sets\.Net\), and nothing of it was run; "
        r".*state_dict\(\)",
        "old.pt": r"holds more than tensors \(.*test_sets\.Net\)",
        "script.pt": r"is a program \(TorchScript\)",
        "arrays.npz": "is a zip archive of something else",
        "x.gguf": "is a GGUF file",
        "pointer.pt": "is a pointer of Git LFS",
    }

    for name, reason in reasons.items():
        with pytest.raises(ValueError, match=rf"checkpoint .*{re.escape(name)} {reason}") as caught:
            read(tmp_path / name)
        assert "damaged" not in str(caught.value)


def pack(path: Path, **files: bytes) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(f"x/{name.replace('_', '.')}", data)


def test_an_archive_that_unpacks_to_more_than_it_may_is_refused(tmp_path):
    pack(tmp_path / "bomb.pt", data_pkl=b"\x80\x02}.", zeros=bytes(1 << 20))
    with pytest.raises(ValueError, match="unpacks to more than"):
        read(tmp_path / "bomb.pt")


def test_a_header_longer_than_its_file_is_refused(tmp_path):
    header = (1 << 30).to_bytes(8, "little") + b"{}" + bytes(99)
    (tmp_path / "x.safetensors").write_bytes(header)
    with pytest.raises(ValueError, match="whose header of 1024 MiB is larger than"):
        read(tmp_path / "x.safetensors")


def test_a_tensor_larger_than_its_numbers_is_refused(tmp_path):
    torch.save({"w": torch.zeros(1).expand(1 << 40)}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="holds a tensor without its numbers at 'w'"):
        read(tmp_path / "x.pt")


@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_a_pickle_of_too_many_steps_is_refused(form, tmp_path, monkeypatch):
    monkeypatch.setattr(safe_pickle, "STEPS", 1000)
    start = b"\x80\x04\x95" + (3000).to_bytes(8, "little")
    if form == "torch":
        torch.save({}, tmp_path / "empty", _use_new_zipfile_serialization=False)
        start = (tmp_path / "empty").read_bytes()[:-40]
    (tmp_path / "x").write_bytes(start + b"]" * 3000 + b".")
    with pytest.raises(ValueError, match=r"more than 1,000 steps|damaged"):
        read(tmp_path / "x")


def test_too_many_names_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(safe_pickle, "STEPS", 1000)
    torch.save({str(i): torch.zeros(1) for i in range(99)}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="of names, more than is read"):
        read(tmp_path / "x.pt")


def test_objects_within_themselves_are_read_once(tmp_path):
    content = {"model": weights()}
    for _ in range(60):  # 2^60 paths lead to the weights
        content = {"a": content, "b": content}
    with pytest.raises(ValueError, match="where only tensors belong"):
        value_in_file(tmp_path, content)
    content = {"model": weights()}
    content["itself"] = content
    assert value_in_file(tmp_path, content) == 1
