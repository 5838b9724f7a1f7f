"""How ranks agree, through torch.distributed."""

import torch
import torch.distributed as dist
from torch import Tensor

from oss_exp.stepsize import Collective


class DistributedCollective(Collective):
    """Sums and gathers over the default process group; a single process without one is its own world."""

    def sum(self, tensor: Tensor) -> Tensor:
        if not _distributed():
            return tensor
        total = _reachable(tensor).clone()
        dist.all_reduce(total)
        return total.to(tensor.device)

    def gather(self, tensor: Tensor) -> Tensor:
        if not _distributed():
            return tensor
        home, tensor = tensor.device, _reachable(tensor)
        # Ranks may hold different numbers of rows: pad to the longest, then cut.
        lengths = [torch.zeros(1, dtype=torch.long, device=tensor.device) for _ in range(dist.get_world_size())]
        dist.all_gather(lengths, torch.tensor([len(tensor)], device=tensor.device))
        longest = max(int(length) for length in lengths)
        padded = torch.cat([tensor, tensor.new_zeros(longest - len(tensor), *tensor.shape[1:])])
        parts = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(parts, padded)
        return torch.cat([part[: int(length)] for part, length in zip(parts, lengths, strict=True)]).to(home)


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _reachable(tensor: Tensor) -> Tensor:
    """Where the group can take it: NCCL does not see host memory."""
    return tensor.cuda() if dist.get_backend() == "nccl" else tensor
