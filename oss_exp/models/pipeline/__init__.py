"""Any pipeline of diffusers as a model: the pipeline runs its own loop, and a search steers it.

A pipeline's `__call__` encodes prompts and prepares states and conditions. Then, over and over, it
takes a time from its scheduler, calls its network, and asks the scheduler for the next state. Here
a probe takes the scheduler's place: its `step` hands the network's output to the search and
returns the state that the search wants evaluated next; the call is suspended in between. So
guidance, masks, image conditions, ControlNets, adapters, offloading and quantised weights are the
pipeline's own.

    model.py         `Pipeline`, the model, and `PipelineSchedule`, the pipeline's own times
    arguments.py     which arguments a call may have
    convention.py    the clock, parameterization and sign of its network
    probe.py         the scheduler that asks a search for every step
    calls.py         all suspended calls
    loop.py          one suspended call
    fingerprint.py   the hash of all weights and adapters
    pretrained.py    loading from a folder or the hub
    quantization.py  quantised weights
"""

from oss_exp.models.pipeline.arguments import is_pipeline
from oss_exp.models.pipeline.model import Pipeline, PipelineSchedule, decoded

__all__ = ["Pipeline", "PipelineSchedule", "decoded", "is_pipeline"]
