"""The tasks of the command line: one file for every `task=`, and what they share."""

import logging
import warnings

# Lightning's hardware report and advertisements are switched off.
logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)

# So are three of its warnings: about its own use of PyTorch, ...
warnings.filterwarnings("ignore", message=".*LeafSpec.*")
# ... about few workers, although noises are drawn in microseconds, ...
warnings.filterwarnings("ignore", message=".*does not have many workers.*")
# ... and about repeated samples, which are dropped by index.
warnings.filterwarnings("ignore", message=".*Using `DistributedSampler`.*")
