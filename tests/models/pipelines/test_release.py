"""Suspended calls of a pipeline end: at errors, at Ctrl-C, with their model and at exit."""

import gc
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from models.pipelines.images import stable_diffusion
from models.pipelines.videos import wan_two_experts

import oss_exp
from oss_exp.models.pipeline import Pipeline
from oss_exp.models.pipeline.loop import Loop

TESTS = Path(__file__).parents[2]


class Thrown(Exception):
    pass


@pytest.fixture(scope="module")
def family():
    torch.manual_seed(0)
    return stable_diffusion()


def suspended(family) -> Pipeline:
    """Return a model with one suspended call."""
    model = Pipeline(family.pipe, family.prompts, **family.call)
    call_network(model)
    return model


def call_network(model: Pipeline) -> torch.Tensor:
    """Ask a model for a velocity, which leaves a suspended call."""
    x = torch.ones(len(model.prompts), *model.event_shape)
    return model.velocity(None)(x, torch.full((len(x),), 0.5, dtype=torch.float64))


def suspended_calls() -> int:
    """Count the suspended calls that exist."""
    gc.collect()
    loops = [candidate for candidate in gc.get_objects() if isinstance(candidate, Loop)]
    return sum(not loop.dead for loop in loops)


def raises_at(pipe, call: int, error: type[BaseException]):
    """Register a hook that raises in the network's call of this number."""
    calls = 0

    def hook(*_) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            signal.raise_signal(signal.SIGINT) if error is KeyboardInterrupt else throw(error)

    return pipe.unet.register_forward_pre_hook(hook)


def throw(error: type[BaseException]) -> None:
    raise error("in the network")


@pytest.mark.slow
@pytest.mark.parametrize("error", [Thrown, KeyboardInterrupt])
def test_an_error_in_the_network_ends_its_call(family, error):
    """It reaches the user with its traceback, and the pipeline is as before."""
    scheduler = family.pipe.scheduler
    bar = family.pipe._progress_bar_config
    before = suspended_calls()
    draw = random.Random(0)

    # Ten errors.
    for _ in range(10):
        hook = raises_at(family.pipe, draw.randint(1, 12), error)
        model = Pipeline(family.pipe, family.prompts, **family.call)
        with pytest.raises(error) as caught:
            oss_exp.search(model, num_steps=2, num_teacher_steps=6)
        hook.remove()
        assert any(entry.path.name == "pipeline_stable_diffusion.py" for entry in caught.traceback)
        assert family.pipe.scheduler is scheduler
        assert family.pipe._progress_bar_config is bar
        assert torch.is_grad_enabled()
        del caught, model

    assert not family.pipe.unet._forward_hooks
    assert suspended_calls() == before

    oss_exp.search(
        Pipeline(family.pipe, family.prompts, **family.call), num_steps=2, num_teacher_steps=4
    )


@pytest.mark.slow
def test_a_model_that_is_no_longer_used_ends_its_calls(family):
    before = suspended_calls()
    model = suspended(family)
    assert suspended_calls() == before + 1
    del model
    assert suspended_calls() == before
    assert torch.is_grad_enabled()


@pytest.mark.slow
def test_a_model_may_go_inside_another_ones_call(family):
    """The garbage collector may run anywhere."""
    scheduler = family.pipe.scheduler
    other = Pipeline(family.pipe, family.prompts, **family.call)
    expected = call_network(other)
    references = [suspended(family)]

    def drop(*_) -> None:
        references.clear()
        gc.collect()
        assert family.pipe.scheduler is not scheduler  # the other call's probe

    hook = family.pipe.unet.register_forward_pre_hook(drop)
    assert torch.equal(call_network(other), expected)

    hook.remove()
    other.release()
    assert family.pipe.scheduler is scheduler


def test_a_model_of_an_ended_thread_can_be_used(family):
    """Its calls end with the thread; releasing them here does nothing."""
    models = []
    thread = threading.Thread(
        target=lambda: models.append(Pipeline(family.pipe, family.prompts, **family.call))
    )
    thread.start()
    thread.join()
    begun = threading.Thread(target=lambda: call_network(models[0]))
    begun.start()
    begun.join()

    assert call_network(models[0]).isfinite().all()  # in a new call

    models[0].release()
    assert not models[0].calls


def test_a_model_that_another_thread_uses_is_refused_until_released(family):
    """An error tells where its call is suspended; once released there, it can be used here."""
    model = suspended(family)
    errors = []
    go = threading.Event()

    def use() -> None:
        try:
            call_network(model)
        except ValueError as error:
            errors.append(str(error))
        go.wait()
        call_network(model)
        model.release()

    # Refused there.
    thread = threading.Thread(target=use)
    thread.start()
    while not errors:
        time.sleep(0.01)

    assert re.search("suspended in another thread, MainThread, .* or call its release", errors[0])

    # Released here, used there.
    call_network(model)
    model.release()
    go.set()
    thread.join()
    call_network(model)
    model.release()


def test_release_frees_the_hooks_of_the_pipeline(family, monkeypatch):
    """An offloaded network leaves the GPU, as at the end of a whole call."""
    freed = []
    model = suspended(family)
    monkeypatch.setattr(
        type(family.pipe), "maybe_free_model_hooks", lambda pipe: freed.append(pipe)
    )
    model.release()

    assert freed == [family.pipe]

    model.release()
    assert freed == [family.pipe]

    hook = raises_at(family.pipe, 1, Thrown)
    with pytest.raises(Thrown):
        call_network(model)

    hook.remove()
    assert freed == [family.pipe] * 2


def test_the_parts_of_an_offloaded_pipeline_stay_in_host_memory(monkeypatch):
    """Device `meta` stands in for a GPU."""
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.empty_device_cache", lambda *_: None)
    family = stable_diffusion()
    model = Pipeline(family.pipe, family.prompts, **family.call)
    family.pipe.enable_model_cpu_offload(device="meta")

    for device in ("cpu", "meta"):
        model.to(device)
        assert family.pipe._execution_device.type == "meta"
        assert family.pipe.unet.device.type == "cpu"


PROGRAM = """
import sys
import torch
from models.pipelines.images import stable_diffusion
from oss_exp.models.pipeline import Pipeline

family = stable_diffusion()
model = Pipeline(family.pipe, family.prompts, **family.call)
x = torch.ones(2, *model.event_shape)
model.velocity(None)(x, torch.full((2,), 0.5, dtype=torch.float64))
print("suspended", len(model.calls))
"""


@pytest.mark.slow
def test_the_end_of_the_interpreter_ends_suspended_calls():
    command = [sys.executable, "-W", "error::ResourceWarning", "-c", PROGRAM]
    run = subprocess.run(command, capture_output=True, text=True, cwd=TESTS, env=None, check=True)
    assert run.stdout == "suspended 1\n"
    assert "Exception" not in run.stderr
    assert "greenlet" not in run.stderr


def test_a_cache_in_the_network_is_refused():
    from diffusers import FirstBlockCacheConfig

    family = wan_two_experts()
    family.pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match="the transformer of WanPipeline has a cache"):
        Pipeline(family.pipe, family.prompts, **family.call)


def test_a_loop_with_a_memory_is_refused(family):
    """With momentum in its guidance, an answer depends on the one before."""
    sums = {}

    def momentum(module, arguments, output):
        size = len(output[0])
        sums[size] = output[0] - 0.75 * sums.get(size, 0)
        return (sums[size], *output[1:])

    hook = family.pipe.unet.register_forward_hook(momentum)
    model = Pipeline(family.pipe, family.prompts, **family.call)
    with pytest.raises(
        ValueError, match=r"StableDiffusionPipeline answers the same state .* otherwise"
    ):
        oss_exp.search(model, num_steps=2, num_teacher_steps=4)

    hook.remove()
    model.release()
    oss_exp.search(
        Pipeline(family.pipe, family.prompts, **family.call), num_steps=2, num_teacher_steps=4
    )
