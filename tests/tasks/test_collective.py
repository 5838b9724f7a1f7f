"""Ranks agree on the work that is left, whatever other jobs write meanwhile."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import lightning as L
import pytest
import torch
from helpers import free_port, run_ranks
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from oss_exp.data.noise import TRAINING, NoiseDataset
from oss_exp.tasks import jumps
from oss_exp.tasks.collective import agreed

WORLD = 2


def trainer_of(rank: int, port: int) -> L.Trainer:
    """Return the trainer of one of two ranks on the CPU."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0"}
    return L.Trainer(
        accelerator="cpu",
        devices=WORLD,
        strategy=DDPStrategy(timeout=timedelta(seconds=60)),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )


def agree(rank: int, port: int) -> None:
    """Check that both ranks have the answers of rank 0, which alone looks."""
    trainer = trainer_of(rank, port)
    looks = []

    def look() -> list[int]:
        looks.append(rank)
        return looks

    assert agreed(trainer, look) == [0]
    assert agreed(trainer, look) == [0, 0]
    assert looks == ([0, 0] if rank == 0 else [])


class Blind(jumps.States):
    """States of which rank 1 takes every file for one that another job has just written."""

    def missing(self, name: str) -> list[list[int]]:
        return [] if int(os.environ["LOCAL_RANK"]) == 1 else super().missing(name)


def make_states(rank: int, port: int, folder: str) -> None:
    """Make the states that are missing, on a rank."""
    noises = NoiseDataset(0, TRAINING, 7, (2,), None)
    states = Blind(Path(folder), noises, 2)
    states.make(
        "twice", nn.Identity(), lambda batch: {"x": 2 * batch["noise"]}, trainer_of(rank, port)
    )
    for number in range(7):
        assert torch.equal(states.row("twice", number)["x"], 2 * noises[number]["noise"])


@pytest.mark.slow
def test_every_rank_has_the_answer_of_rank_0():
    run_ranks(agree, WORLD, free_port())


@pytest.mark.slow
def test_ranks_that_see_different_files_make_those_that_rank_0_lacks(tmp_path):
    run_ranks(make_states, WORLD, free_port(), str(tmp_path))
    assert len(list((tmp_path / "twice").glob("*.safetensors"))) == 4


def test_one_process_looks_itself():
    trainer = L.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    assert agreed(trainer, lambda: "seen") == "seen"
