"""One call of a pipeline, suspended inside its loop.

The call runs in a greenlet, in the caller's thread: grad mode, autocast and CUDA streams are the
caller's. The probe is in the pipeline only while the call runs, so the pipeline is unchanged
whenever the caller has control.

Legend: B samples, each with its prompt; R outputs of a guided call; *E a state's dims, as the
scheduler sees it.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from greenlet import error as GreenletError
from greenlet import getcurrent
from torch import Tensor, nn

from oss_exp.models.pipeline.arguments import call_parameters
from oss_exp.models.pipeline.convention import NetworkConvention
from oss_exp.models.pipeline.probe import Driver, Reply, Request, make_probe
from oss_exp.tensors import rowwise

DENOISERS = ("unet", "transformer", "transformer_2", "prior", "decoder")


class Loop(Driver):
    """A suspended call of a pipeline, which evaluates its network at any state and time.

    Args:
        pipe: The pipeline.
        convention: How its network was trained.
        call: Arguments of the call.
        apart: Keep the conditional and unconditional outputs of a step apart.

    Attributes:
        first_state: The call's own first state (B, *E).
        first_output: The network's output there.
        start_image: For a call that begins at an image, that image in the layout of a state.
        loop_clock: The latest time that was requested, in the loop's clock, () float64.
        network_clock: The number that the network received as its time then, ().
        rows: Number of network rows in the latest step.
        thread: The thread that started the call, and the only one that can go on with it.
    """

    def __init__(
        self, pipe: Any, convention: NetworkConvention, call: Mapping[str, Any], apart: bool
    ):
        super().__init__()
        self.pipe = pipe
        self.convention = convention
        self.call_arguments = {} if "output_type" in call else {"output_type": "pt"}
        self.call_arguments |= call
        self.apart = apart
        self.thread = threading.current_thread()
        self.kind = type(pipe).__name__
        self.probe = make_probe(
            pipe.scheduler, convention, "strength" in call_parameters(type(pipe))
        )
        self.denoisers = []
        for name in DENOISERS:
            part = getattr(pipe, name, None)
            if isinstance(part, nn.Module):
                self.denoisers.append(part)

        # The call.
        self.started = False
        self.state: Tensor | None = None  # what the latest step gave the loop
        self.left_on_pipe: dict[str, Any] = {}  # such as SVD's guidance of a batch

        # The latest step.
        self.outputs: list[Tensor] = []
        self.rows = 0.0
        self.loop_clock: Tensor | None = None
        self.network_clock: Tensor | None = None

        # Images in the loop.
        self.start_image: Tensor | None = None
        self.masked_image: Tensor | None = None  # what a masked loop restores after every step
        self.mask: Tensor | None = None  # 1 where it does
        self.reading_mask = False

    def run(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.pipe(**self.call_arguments)

    # Beginning and end.

    def begin(self, count: int) -> None:
        """Run up to the network's first output, for `count` prompts.

        Raises:
            ValueError: If the call fails, or has a loop that is not known here.
        """
        # Up to the first step. Draws without the call's generator are the same every time too.
        self.started = True
        device = self.pipe._execution_device
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                torch.manual_seed(0)
                reply = self._resume(None)
        except ValueError as error:  # mostly about a size
            raise ValueError(f"the call of {self.kind} fails: {error}") from error
        if not isinstance(reply, Reply):
            raise ValueError(f"{self.kind} ended without asking its scheduler for a step")

        # The first state. DiTPipeline steps every state twice under guidance.
        states = reply.state
        self.first_output = reply.output
        self.copies = max(len(states) // count, 1)
        self.first_state = states[:count]

        if self.start_image is not None:
            self._check_start_image(self.start_image, states)
            self.start_image = self.first_state.float()
        if not torch.equal(states, self._copied(self.first_state)):
            raise ValueError(
                f"{self.kind} has {len(states)} states for {count} prompts; give one image a prompt"
            )

    def _check_start_image(self, image: Tensor, states: Tensor) -> None:
        """Raise ValueError unless the image that the call puts noise on is its first state."""
        size = image.float().norm()
        state_size = states.float().norm()
        same_size = torch.isclose(size, state_size, rtol=1e-3)
        if image.numel() != states.numel() or not same_size:
            raise ValueError(
                f"{self.kind} puts noise on what is not its first state; that is not known here"
            )

    def require_no_memory(self) -> None:
        """Evaluate the first state again; raise ValueError if the network's output changes."""
        # The same state at the same time.
        sigmas = getattr(self.probe, "sigmas", self.probe.own_clock)
        first = self.probe.cut
        self.pending = Request(self.probe.own_clock[first], sigmas[first])
        again = self._resume(self._copied(self.first_state)).output

        # Comparison.
        if not bool(self.first_output.isfinite().all()):
            raise ValueError(
                f"the network of {self.kind} returns NaN or infinity at its first step; "
                "check its dtype"
            )

        difference = (again - self.first_output).float().norm()
        if not difference <= 1e-2 * self.first_output.float().norm():
            raise ValueError(
                f"{self.kind} answers the same state at the same time otherwise in its next step: "
                "its guidance has a momentum, or draws numbers, and its loop is no ODE; "
                "call it without"
            )

    def finish(self, x0: Tensor) -> Any:
        """Let the call end with x0 (B, *E) as its last state, and return what it returns."""
        self.ending = True
        if self.start_image is not None:
            x0 = x0 + self.start_image.to(x0)
        return self._resume(self._copied(x0.to(self.first_state.dtype)))

    def release(self) -> None:
        """End the call where it is. An offloaded network leaves the GPU, as at a call's end."""
        if self and not self.dead:
            try:
                with self._probe_in_place():
                    self.throw()
            except (GreenletError, ValueError):  # ValueError: the parent is in another thread
                return  # the call ends with its own thread
        if self.started:
            self.started = False
            self.pipe.maybe_free_model_hooks()

    # Velocities.

    def velocity(self, x: Tensor, time: float, mix: tuple[float, ...]) -> Tensor:
        """Return v (B, *E) at x (B, *E), all at one canonical time.

        With several weights in `mix`, return the R outputs apart, (B, R, *E), whose sum with these
        weights v is.

        For a call that begins at an image, x is the state minus the image's share of it,
        x_t - (1 - t) image, and v is the velocity of that x. So x begins at pure noise, as for
        other calls, and solvers make the same steps of both.
        """
        if self.start_image is None:
            return self._state_velocity(x, time, mix)
        image = self.start_image.to(x)
        v = self._state_velocity(x + (1 - time) * image, time, mix)
        return v + (image if len(mix) == 1 else image[:, None])

    def _state_velocity(self, x: Tensor, time: float, mix: tuple[float, ...]) -> Tensor:
        """Return the velocity of the loop's own state."""
        # One step of the loop.
        t = x.new_full((len(x),), time, dtype=torch.float64)
        network_input, clock = self.convention.network_input(x, t)
        loop_clock = self.probe.before_shift(clock[0])
        self.loop_clock = loop_clock
        self.pending = Request(loop_clock.float(), self.convention.sigma(t[0]).float())
        self.rows = 0.0
        reply = self._resume(self._copied(network_input.to(self.first_state.dtype)))

        # Its velocities.
        outputs = reply.output[None] if len(mix) == 1 else self._guided_outputs(reply.output, mix)
        velocities = []
        for output in outputs:
            velocities.append(self.convention.velocity(output[: len(x)].to(x), x, t))

        # A masked loop restores the image outside of its mask: there, x0 is the image.
        if self.masked_image is not None:
            if self.mask is None:
                self.mask = self._read_mask()[: len(x)].to(x)
            to_image = (x - self.masked_image[: len(x)].to(x)) / rowwise(t, x)
            velocities = [torch.lerp(velocity, to_image, self.mask) for velocity in velocities]
        return velocities[0] if len(mix) == 1 else torch.stack(velocities, dim=1)

    def outputs_apart(self, output: Tensor) -> Tensor:
        """Return the network's outputs in the latest step apart, (R, B, *E).

        Args:
            output: What the pipeline made of them, (B, *E).

        Raises:
            ValueError: If they do not match.
        """
        rows = torch.cat(self.outputs)
        if rows.ndim > 1 and rows.shape[1] == 2 * output.shape[1]:
            rows = rows.chunk(2, dim=1)[0]  # without a variance, or an image's tokens
        if rows.shape[1:] != output.shape[1:] or len(rows) % len(output) or self.copies > 1:
            raise ValueError(
                f"the network of {self.kind} answers {tuple(rows.shape)}, of which its loop makes "
                f"{tuple(output.shape)} in a way that is not known here; "
                "call it with guidance_apart=False"
            )
        return rows.unflatten(0, (-1, len(output)))

    def _guided_outputs(self, output: Tensor, mix: tuple[float, ...]) -> Tensor:
        """Return the R outputs (R, B, *E) whose sum with the weights `mix` is `output` (B, *E).

        Raises ValueError if it is not.
        """
        parts = self.outputs_apart(output)
        if len(parts) == 1:  # outside of an interval of guidance
            return output.expand(len(mix), *output.shape)

        weights = parts.new_tensor(mix, dtype=torch.float64)
        total = torch.einsum("r,r...->...", weights, parts.double())
        rounding = max(1e-3, 8 * torch.finfo(output.dtype).eps)
        is_sum = (total - output).norm() <= rounding * output.double().norm()
        if len(parts) != len(mix) or not is_sum:
            raise ValueError(
                f"the guidance of {self.kind} is no sum of its network's answers with weights that "
                "are the same at all times, such as one that is rescaled; "
                "call it with guidance_apart=False"
            )
        return parts

    def noised(self, image: Tensor) -> Tensor:
        """Return what the call takes for its image with noise on it.

        Before the loop, this is the call's first state. It gets the image alone, and so reveals
        the image in a state's layout. In the loop, it is what the loop puts outside of a mask: the
        state itself, or 1 to read the mask.
        """
        if self.state is None:
            self.start_image = image
            return image
        self.masked_image = image
        return torch.ones_like(self.state) if self.reading_mask else self.state

    def _read_mask(self) -> Tensor:
        """Return 1 where the loop puts the image, at the cost of one uncounted network call."""
        rows = self.rows
        self.reading_mask = True
        mask = self._resume(self._copied(torch.zeros_like(self.first_state))).state
        self.reading_mask = False
        self.rows = rows
        return mask

    def _copied(self, states: Tensor) -> Tensor:
        """Repeat the states as often as the loop has them."""
        if self.copies == 1:
            return states
        return states.repeat(self.copies, *[1] * (states.ndim - 1))

    # Switching into the call.

    def _resume(self, state: Tensor | None) -> Any:
        """Go on with the call, from a state or from its beginning, up to its next step."""
        self.state = state
        self.outputs.clear()
        grad = state is not None and state.requires_grad
        with self._probe_in_place(), torch.set_grad_enabled(grad):
            return self.switch() if state is None else self.switch(state)

    @contextmanager
    def _probe_in_place(self) -> Iterator[None]:
        """Put the probe and the counting hooks into the pipeline while its call runs."""
        grad = torch.is_grad_enabled()
        before = dict(self.pipe.__dict__)
        quiet = {"scheduler": self.probe, "_progress_bar_config": {"disable": True}}

        try:
            try:
                self.parent = getcurrent()
                self.pipe.__dict__ |= self.left_on_pipe
                self.pipe.__dict__ |= quiet
                for part in self.denoisers:
                    part.register_forward_hook(self._record_call, with_kwargs=True)
                yield
            finally:
                self._restore(grad, before)
        finally:
            self._restore(grad, before)  # again, as Ctrl-C may have interrupted the first time

    def _restore(self, grad: bool, before: Mapping[str, Any]) -> None:
        """Leave the pipeline as it was; remember what the call left on it."""
        torch.set_grad_enabled(grad)
        for name in ("scheduler", "_progress_bar_config"):
            if name in before:
                self.pipe.__dict__[name] = before[name]
            else:
                self.pipe.__dict__.pop(name, None)

        # Attributes that the call set.
        for name, value in self.pipe.__dict__.items():
            if before.get(name, self) is not value:
                self.left_on_pipe[name] = value

        # Hooks. Their handles may be missing after Ctrl-C.
        for part in self.denoisers:
            hooks = list(part._forward_hooks.items())
            for number, hook in hooks:
                if hook == self._record_call:
                    part._forward_hooks_with_kwargs.pop(number, None)
                    part._forward_hooks.pop(number, None)

    def _record_call(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        """Record a network call: its rows, its outputs and the time that it received."""
        # Rows. Z-Image's network takes a list of states.
        for value in (*args, *kwargs.values()):
            if isinstance(value, list) or (isinstance(value, Tensor) and value.ndim > 1):
                self.rows += len(value)
                break

        # Outputs.
        if self.apart:
            outputs = output if isinstance(output, Tensor) else output[0]
            self.outputs.append(torch.stack(outputs) if isinstance(outputs, list) else outputs)

        # Time. Where tokens have times of their own, those of a clean condition are the first.
        name, position = _time_argument(type(module))
        positional = args[position] if name and position < len(args) else None
        clock = kwargs.get(name, positional)
        if isinstance(clock, Tensor) and clock.numel() > 0:
            self.network_clock = clock.detach().flatten()[-1]


@functools.cache
def _time_argument(network: type) -> tuple[str, int]:
    """Return name and position of the time among the arguments of a network's `forward`."""
    names = list(inspect.signature(network.forward).parameters)[1:]
    for name in ("timestep", "timesteps", "t"):
        if name in names:
            return name, names.index(name)
    return "", 0
