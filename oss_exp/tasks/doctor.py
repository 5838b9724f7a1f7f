"""`oss-exp doctor`: what is installed, what there is to compute on, and what is missing for what.

It reads no configuration, loads no network and fetches nothing.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

PACKAGES = (
    "oss_exp",
    "torch",
    "torchvision",
    "lightning",
    "hydra-core",
    "diffusers",
    "transformers",
    "wandb",
)
OPTIONAL = {
    "hydra-joblib-launcher": ("parallel sweeps", "pip install 'oss_exp[sweep]'"),
    "hydra-submitit-launcher": ("sweeps on Slurm", "pip install 'oss_exp[sweep]'"),
    "hydra-optuna-sweeper": ("sweeps that look for the best", "pip install 'oss_exp[sweep]'"),
    "peft": ("task=finetune with LoRA, model.loras", "pip install 'oss_exp[lora]'"),
    "torchao": ("model.quantization=float8 or int8", "pip install torchao"),
    "bitsandbytes": ("model.quantization=nf4", "pip install bitsandbytes"),
    "wandb-workspaces": ("reports in W&B", "pip install 'oss_exp[wandb-report]'"),
    "21cmpsdenoiser": ("model=psdenoiser_21cm", "pip install --no-deps 21cmpsdenoiser"),
}
GIB = 2**30


def report() -> None:
    """Print versions, devices, caches and the optional parts, each with what is missing."""
    console = Console()
    for title, rows in (
        ("Versions", _versions()),
        ("Devices", _devices()),
        ("Folders", _folders()),
        ("Optional parts", _optional()),
    ):
        table = Table(title=title, title_justify="left", show_header=False, box=None)
        for row in rows:
            table.add_row(*row)
        console.print(table, end="\n\n")


def _versions() -> Iterator[tuple[str, str]]:
    yield "python", f"{platform.python_version()}, {platform.system()} {platform.machine()}"
    for package in PACKAGES:
        yield package, _version(package) or "not installed; pip install oss_exp brings it"


def _devices() -> Iterator[tuple[str, str, str]]:
    yield "cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads", "trainer=cpu"
    for number in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(number)
        memory = f"{device.total_memory / GIB:.0f} GiB"
        yield f"cuda:{number}", f"{device.name}, {memory}", "trainer=gpu"
    if torch.backends.mps.is_available():
        yield "mps", "Apple GPU", "not supported, it has no float64; use trainer=cpu"
    if not torch.cuda.is_available():
        built = torch.version.cuda
        reason = "torch sees no GPU" if built else "this torch is built without CUDA"
        yield "cuda", reason, "large models need one; the shipped networks do not"


def _folders() -> Iterator[tuple[str, str, str]]:
    places = {
        "Encoded prompts": ("OSS_EXP_CACHE", "~/.cache/oss_exp"),
        "Image files": ("OSS_EXP_DATA", "/usr/share/datasets/fashion-mnist"),
        "Hub downloads": ("HF_HOME", "~/.cache/huggingface"),
        "Torch downloads": ("TORCH_HOME", "~/.cache/torch"),
    }
    for name, (variable, default) in places.items():
        path = Path(os.environ.get(variable, default)).expanduser()
        yield name, f"{path} (set by {variable})", _contents(path)


def _contents(path: Path) -> str:
    """Return how much a folder holds."""
    if not path.is_dir():
        return "not there"
    files = [file for file in path.rglob("*") if file.is_file() and not file.is_symlink()]
    size = sum(file.stat().st_size for file in files)
    return f"{len(files)} files, {size / GIB:.2f} GiB"


def _optional() -> Iterator[tuple[str, str, str]]:
    for package, (purpose, command) in OPTIONAL.items():
        installed = _version(package)
        yield package, installed or f"not installed; {command}", purpose


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
