"""What a run does: Lightning modules over search and evaluation, and the data they draw."""

import logging
import warnings

# Lightning's hardware report and advertisements go, its warnings stay, but for three that do not concern our users.
logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # its own use of PyTorch
warnings.filterwarnings(
    "ignore", message=".*does not have many workers.*"
)  # noises are drawn in microseconds
warnings.filterwarnings(
    "ignore", message=".*Using `DistributedSampler`.*"
)  # repeated samples are dropped by index
