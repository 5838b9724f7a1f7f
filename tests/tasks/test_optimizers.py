"""Muon beside AdamW: each has its weights, and both their steps, state and groups."""

import pytest
import torch
from torch import nn

from oss_exp.tasks.optimizers import DECAY, MuonAndAdamW, split

pytestmark = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9")


def network() -> nn.Module:
    """Return a network of two blocks between a first and a last layer."""
    torch.manual_seed(0)
    blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
    return nn.ModuleDict({"first": nn.Linear(4, 6), "blocks": blocks, "last": nn.Linear(6, 3)})


def trained(optimizer_of, steps: int = 3) -> nn.Module:
    """Return the network after some steps on random gradients."""
    module = network()
    optimizers = optimizer_of(module)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for parameter in module.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        for optimizer in optimizers:
            optimizer.step()
    return module


def test_it_is_muon_on_the_matrices_of_blocks_and_adamw_elsewhere():
    def both(module):
        return [MuonAndAdamW(module.named_parameters(), 1e-2)]

    def each(module):
        matrices = [block.weight for block in module["blocks"]]
        others = [p for p in module.parameters() if not any(p is matrix for matrix in matrices)]
        return [
            torch.optim.AdamW(others, lr=1e-2, weight_decay=DECAY),
            torch.optim.Muon(matrices, lr=2e-2, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw"),
        ]

    found = trained(both).state_dict()
    for key, tensor in trained(each).state_dict().items():
        assert torch.equal(found[key], tensor), key


def test_a_step_of_muon_changes_no_direction_more_than_another():
    module = network()
    before = module["blocks"][0].weight.detach().clone()
    optimizer = MuonAndAdamW(module.named_parameters(), 1e-2)
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()

    change = module["blocks"][0].weight.detach() - (1 - 2e-2 * DECAY) * before
    singular = torch.linalg.svdvals(change)
    assert singular.max() < 3 * singular.min()  # those of the gradient differ much more
    assert float(torch.linalg.cond(module["blocks"][0].weight.grad)) > 6


def test_a_kernel_takes_the_steps_of_its_matrix():
    kernels = nn.ModuleList([nn.Conv2d(4, 5, 3), nn.Conv2d(6, 6, 3, groups=6)])
    kernel, depthwise = (convolution.weight for convolution in kernels)
    assert split(kernels.named_parameters())[0] == [kernel]  # one channel has no matrix

    matrix = nn.Parameter(kernel.detach().flatten(1).clone())
    muon = torch.optim.Muon([matrix], lr=2e-2, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw")
    optimizer = MuonAndAdamW(kernels.named_parameters(), 1e-2)
    for seed in range(3):
        gradient = torch.randn(kernel.shape, generator=torch.Generator().manual_seed(seed))
        kernel.grad, matrix.grad = gradient, gradient.flatten(1)
        depthwise.grad = torch.ones_like(depthwise)
        optimizer.step()
        muon.step()

    assert torch.equal(kernel.flatten(1), matrix)
    assert torch.equal(kernel.grad, gradient)
    assert optimizer.state[kernel]["momentum_buffer"].shape == kernel.shape


def test_a_saved_state_goes_on_to_the_same_bits():
    def resumed(module):
        first = MuonAndAdamW(module.named_parameters(), 1e-2)
        for parameter in module.parameters():
            parameter.grad = torch.ones_like(parameter)
        first.step()
        second = MuonAndAdamW(module.named_parameters(), 1e-2)
        second.load_state_dict(first.state_dict())
        return [second if reload else first]

    weights = {}
    for reload in (True, False):
        weights[reload] = trained(resumed).state_dict()
    for key, tensor in weights[True].items():
        assert torch.equal(weights[False][key], tensor)


def test_a_network_without_blocks_is_refused():
    assert split(nn.Linear(3, 3).named_parameters())[0] == []
    with pytest.raises(ValueError, match="no matrix in a block; use adamw"):
        MuonAndAdamW(nn.Linear(3, 3).named_parameters(), 1e-3)
