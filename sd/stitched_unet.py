"""Several U-Nets in the place of one: each call of a pipeline goes to the U-Net whose step it belongs to.

The pipeline's loop is not ours, so the U-Net must find out which step it is called for. It asks the host, never the device: the pipeline says how many
calls its trajectory has (its `num_timesteps`, after image-to-image or `denoising_end` have cut it), the scheduler's `step` is counted while the pipeline
runs, and the scheduler's kind says how many calls make a step. The rule is that of `tstitch.schedule`. The timesteps that were called are held to the
scheduler's at the end.
"""

from __future__ import annotations

import functools
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin, PNDMScheduler, SchedulerMixin
from torch import Tensor, nn

from sd.offload import Switch
from tstitch.errors import InputError
from tstitch.schedule import Leg, StitchSchedule

UNET_OFFLOADS = ("none", "switch")


def small_folders(folder: Path) -> list[Path]:
    """The small U-Nets of a saved pipeline: unet_small, unet_small_2, unet_small_3, ..., the one for the noisiest steps first."""
    named = [(re.fullmatch(r"unet_small(?:_(\d+))?", path.name), path) for path in folder.glob("unet_small*") if path.is_dir()]
    return [path for _, path in sorted((int(name[1] or 1), path) for name, path in named if name)]


def steps_of_calls(scheduler: SchedulerMixin, num_calls: int) -> list[int]:
    """Step of each of the U-Net's calls: 0, 1, 2, ... for most schedulers; 0, 0, 1, 1, ... for second-order ones, whose last step takes a single call.

    PNDM starts with a step of two calls, or with three Runge-Kutta steps of four (Liu et al. 2022, arXiv:2202.09778).
    """
    start = ([2] if scheduler.config.skip_prk_steps else [4, 4, 4]) if isinstance(scheduler, PNDMScheduler) else []
    calls_per_step = chain(start, repeat(getattr(scheduler, "order", 1)))
    return list(islice((step for step, calls in enumerate(calls_per_step) for _ in range(calls)), num_calls))


@contextmanager
def _after_each_step(scheduler: SchedulerMixin, act: Callable[[], None]) -> Iterator[None]:
    """Call `act` after each `scheduler.step` inside the block."""
    step, own = scheduler.step, vars(scheduler).get("step")

    @functools.wraps(step)  # pipelines look at its signature
    def counted(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  (whatever the scheduler takes and gives)
        result = step(*args, **kwargs)
        act()
        return result

    scheduler.step = counted
    try:
        yield
    finally:
        del scheduler.step
        if own is not None:
            scheduler.step = own


class _Trip:
    """One call of a pipeline: which U-Net each of its calls belongs to, and how far it is."""

    def __init__(self, pipe: DiffusionPipeline, schedule: StitchSchedule) -> None:
        self.pipe, self.schedule = pipe, schedule
        self.legs: list[Leg] = []
        self.leg_of_call: list[int] = []  # empty until the first call: only then has the pipeline set its timesteps
        self.done = 0  # calls that the scheduler has turned into steps
        self.seen: list[tuple[int, Tensor | float]] = []  # (position, timestep) of each call
        self.timesteps: Tensor | None = None
        vars(pipe).pop("_num_timesteps", None)  # that of the call before

    def _plan(self) -> None:
        scheduler = self.pipe.scheduler
        self.timesteps = scheduler.timesteps
        # Pipelines that do not say it take all of the scheduler's timesteps.
        num_calls = vars(self.pipe).get("_num_timesteps") or len(self.timesteps) - (getattr(scheduler, "begin_index", None) or 0)
        steps = steps_of_calls(scheduler, num_calls)
        self.legs = self.schedule.legs(steps[-1] + 1)
        leg_of_step = [k for k, leg in enumerate(self.legs) for _ in range(leg.start, leg.stop)]
        self.leg_of_call = [leg_of_step[step] for step in steps]

    def advance(self, timestep: Tensor | float) -> tuple[int, int | None]:
        """U-Net of the call that is about to be made, and the one that follows it later, if any.

        Raises:
            InputError: if the trajectory has no more calls.
        """
        if not self.leg_of_call:
            self._plan()
        if self.done >= len(self.leg_of_call):
            raise self._unfit(f"calls its U-Net after all {self.done} timesteps of the trajectory")
        self.seen.append((self.done, timestep))
        leg = self.leg_of_call[self.done]
        return self.legs[leg].denoiser, self.legs[leg + 1].denoiser if leg + 1 < len(self.legs) else None

    @property
    def over(self) -> bool:
        """Whether the last step was taken."""
        return bool(self.leg_of_call) and self.done >= len(self.leg_of_call)

    def check(self) -> None:
        """Hold what the pipeline did to what was planned; one wait for the device, after everything else.

        Raises:
            InputError: if the U-Net was called for other timesteps than the scheduler's.
        """
        if not self.seen or getattr(self.pipe, "_interrupt", False):
            return
        if not self.over:
            raise self._unfit(f"took {self.done} of {len(self.leg_of_call)} steps of its scheduler")
        given = torch.stack([torch.as_tensor(t).flatten()[0].float() for _, t in self.seen]).tolist()
        planned = self.timesteps.float().tolist()
        # Where image-to-image begins is not known for every scheduler. Half precision may have rounded.
        begins = range(len(planned) - len(self.leg_of_call) + 1)
        if not any(all(abs(planned[b + k] - t) <= 4e-3 * abs(t) for (k, _), t in zip(self.seen, given, strict=True)) for b in begins):
            raise self._unfit("calls its U-Net for timesteps that are not its scheduler's")

    def _unfit(self, what: str) -> InputError:
        return InputError(f"{type(self.pipe).__name__} {what}, so its steps cannot be told apart; use it unstitched (sd.tstitch_sd_utils.unstitch)")


class StitchedUNet(ModelMixin):
    """U-Nets of one trajectory, noisiest part first; what is asked of it beyond a call, such as `config` or a LoRA, is asked of the last, the large one.

    Args:
        unets: at least two, which fit each other (`sd.tstitch_sd_utils.stitch` looks).
        offload: "none", or "switch": only the running U-Net lies on the accelerator (`sd.offload`).
        device: where they run, for "switch"; None: where the large one lies.

    Attributes:
        unets: the U-Nets.
        legs: who ran which steps in the last call of the pipeline.

    Raises:
        InputError: if `offload` is no such word.
    """

    def __init__(self, unets: Sequence[nn.Module], offload: str = "none", device: torch.device | None = None) -> None:
        super().__init__()
        if offload not in UNET_OFFLOADS:
            raise InputError(f"unknown offload '{offload}'; choose from {', '.join(UNET_OFFLOADS)}")
        self.offload = offload
        self.legs: list[Leg] = []
        self._trip: _Trip | None = None
        self._switch = Switch(unets, device or unets[-1].device) if offload == "switch" else None
        self.unets = nn.ModuleList(unets)

    @property
    def large(self) -> nn.Module:
        """The last U-Net."""
        return vars(self)["_modules"]["unets"][-1]

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "unets" not in vars(self).get("_modules", {}):
                raise
            return getattr(self.large, name)

    def __setattr__(self, name: str, value: Any) -> None:  # noqa: ANN401
        own = name in vars(self) or hasattr(type(self), name) or "unets" not in vars(self).get("_modules", {})
        if own or not hasattr(self.large, name):
            super().__setattr__(name, value)
        else:
            setattr(self.large, name, value)

    @contextmanager
    def routed(self, pipe: DiffusionPipeline, schedule: StitchSchedule) -> Iterator[None]:
        """Route the calls that `pipe` makes in this block; nothing of it is left afterwards, whatever happens inside.

        Raises:
            InputError: if a call is running already, or the pipeline's calls do not follow its scheduler.
        """
        if self._trip is not None:
            raise InputError("these U-Nets are sampling already; wait until they have finished, or load a second pipeline")
        schedule.check_denoisers(len(self.unets))
        self._trip = trip = _Trip(pipe, schedule)
        try:
            with _after_each_step(pipe.scheduler, self._step_done):
                yield
            trip.check()
        finally:
            self._trip, self.legs = None, trip.legs
            if self._switch is not None:
                self._switch.release()

    def _step_done(self) -> None:
        self._trip.done += 1
        if self._switch is not None and self._trip.over:
            self._switch.release()  # room for the decoder

    @torch.compiler.disable(recursive=False)  # a compiler sees the U-Nets, not the choice among them
    def forward(self, sample: Tensor, timestep: Tensor | float, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Call the U-Net whose step it is, with everything that was given.

        Raises:
            InputError: outside of the call of a stitched pipeline, where no step is known.
        """
        if self._trip is None:
            raise InputError("these U-Nets are stitched, but this call is not that of a stitched pipeline; call stitch(pipe) or unstitch(pipe) first")
        running, following = self._trip.advance(timestep)
        if self._switch is not None:
            self._switch.enter(running, following)
        return self.unets[running](sample, timestep, *args, **kwargs)

    @property
    def device(self) -> torch.device:
        """Where the U-Nets run."""
        return self._switch.device if self._switch is not None else super().device

    def to(self, *args: Any, **kwargs: Any) -> StitchedUNet:  # noqa: ANN401
        """As any module's; with offload="switch" the weights follow only when they are needed."""
        if self._switch is None:
            return super().to(*args, **kwargs)
        device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None:
            self._switch.to(device)
        kind = {name: value for name, value in (("dtype", dtype), ("memory_format", memory_format)) if value is not None}
        if kind:
            self._switch.release()
            for unet in self.unets:
                unet.to(**kind)
        return self

    def compile(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Compile each U-Net for itself."""
        for unet in self.unets:
            unet.compile(*args, **kwargs)

    def compile_repeated_blocks(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Compile the repeated blocks of each U-Net."""
        for unet in self.unets:
            unet.compile_repeated_blocks(*args, **kwargs)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:  # noqa: ANN401
        """Write the large U-Net to the folder, the others beside it: unet_small, unet_small_2, ..., as `get_tstitch_pipepline` reads them.

        Small U-Nets that an earlier pipeline left beside them are removed, lest they be read as this one's.
        """
        self.large.save_pretrained(save_directory, **kwargs)
        folders = [Path(save_directory).with_name("unet_small" if k == 1 else f"unet_small_{k}") for k in range(1, len(self.unets))]
        for unet, folder in zip(self.unets, folders, strict=False):
            unet.save_pretrained(folder, **kwargs)
        for left in set(small_folders(Path(save_directory).parent)) - set(folders):
            shutil.rmtree(left)
