"""Who runs which step: the one rule of T-Stitch, for any number of denoisers in any order.

A schedule is a list of shares. With shares (0.4, 0.6) and 50 steps the first denoiser takes steps 0..19 and the second steps 20..49; step 0 is the
noisiest. A share f of N steps is floor(f * N + 1e-6) steps, cumulative; the last leg takes what is left. Pure Python: the legs are known before the
first step, so nothing on a device is ever asked which step it is.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tstitch.errors import InputError

RULES = ("step", "t", "sigma", "snr")
DIFFUSION_STEPS = 1000  # training timesteps of the published models, which switch_by="t" divides by


class Leg(NamedTuple):
    """Steps start <= i < stop belong to one denoiser."""

    denoiser: int
    start: int
    stop: int


class Span(NamedTuple):
    """Progress start <= p < stop in [0, 1] belongs to one denoiser."""

    denoiser: int
    start: float
    stop: float


def _float32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


@dataclass(frozen=True)
class StitchSchedule:
    """Shares of a trajectory, noisiest part first.

    Args:
        fractions: share of each leg, each in [0, 1], sum 1. With switch_by "sigma" or "snr": empty.
        order: denoiser of each leg; () means 0, 1, 2, ... A denoiser may come back: fractions (0.2, 0.6, 0.2), order (0, 1, 0).
        switch_by: "step" counts sampling steps. "t" asks the training timestep, as the published DiT code does. "sigma" and "snr" ask the
            noise level sigma_t / alpha_t, or (alpha_t / sigma_t) ** 2.
        thresholds: for "sigma" and "snr", the level at which leg k hands over to leg k + 1: leg k runs while sigma >= thresholds[k]
            (descending), or while snr < thresholds[k] (ascending). One fewer than the legs.

    Raises:
        InputError: if the shares, the order or the thresholds contradict each other.
    """

    fractions: tuple[float, ...] = ()
    order: tuple[int, ...] = ()
    switch_by: str = "step"
    thresholds: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("fractions", "order", "thresholds"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.switch_by not in RULES:
            raise InputError(f"unknown switch_by '{self.switch_by}'; choose from {', '.join(RULES)}")
        if self.switch_by in ("step", "t"):
            self._check_fractions()
        else:
            self._check_thresholds()
        if not self.order:
            object.__setattr__(self, "order", tuple(range(self.num_legs)))
        if len(self.order) != self.num_legs or any(not isinstance(k, int) or k < 0 for k in self.order):
            raise InputError(f"order {list(self.order)} must name one denoiser (0, 1, ...) for each of the {self.num_legs} legs")

    def _check_fractions(self) -> None:
        if self.thresholds:
            raise InputError(f"switch_by='{self.switch_by}' takes fractions, not thresholds; leave thresholds out")
        if not self.fractions:
            raise InputError("no fractions given; pass one share for each denoiser, e.g. 0.4 0.6")
        if any(not 0 <= f <= 1 for f in self.fractions):
            raise InputError(f"fractions must each lie in [0, 1], got {list(self.fractions)}")
        if abs(math.fsum(self.fractions) - 1) > 1e-6:
            raise InputError(f"fractions sum to {math.fsum(self.fractions):g}, expected 1; got {list(self.fractions)}")

    def _check_thresholds(self) -> None:
        if self.fractions:
            raise InputError(f"switch_by='{self.switch_by}' takes thresholds, not fractions; see StitchSchedule.from_thresholds")
        ordered = sorted(self.thresholds, reverse=self.switch_by == "sigma")
        if any(not level > 0 for level in self.thresholds) or list(self.thresholds) != ordered:
            direction = "descending" if self.switch_by == "sigma" else "ascending"
            raise InputError(f"{self.switch_by} thresholds must be positive and {direction}, got {list(self.thresholds)}")

    @classmethod
    def from_ratio(cls, ratio: float, switch_by: str = "step") -> StitchSchedule:
        """Two denoisers: the small one takes the share `ratio` in [0, 1], the large one the rest."""
        if not 0 <= ratio <= 1:
            raise InputError(f"ratio must lie in [0, 1], got {ratio:g}")
        return cls((ratio, 1 - ratio), switch_by=switch_by)

    @classmethod
    def from_thresholds(cls, thresholds: Sequence[float], switch_by: str = "sigma", order: Sequence[int] = ()) -> StitchSchedule:
        """Hand over at noise levels; see the class for their order."""
        return cls((), tuple(order), switch_by, tuple(thresholds))

    @property
    def num_legs(self) -> int:
        """Number of legs, those of no steps included."""
        return len(self.fractions) or len(self.thresholds) + 1

    @property
    def num_denoisers(self) -> int:
        """Smallest number of denoisers that this schedule can run on."""
        return max(self.order) + 1

    def check_denoisers(self, num_denoisers: int) -> None:
        """Refuse to run on fewer denoisers than the schedule names.

        Raises:
            InputError: if one is not there.
        """
        if self.num_denoisers > num_denoisers:
            raise InputError(f"schedule {self} needs {self.num_denoisers} denoisers, got {num_denoisers}")

    def legs(self, num_steps: int, timesteps: Sequence[float] | None = None, sigmas: Sequence[float] | None = None) -> list[Leg]:
        """Cut a trajectory of `num_steps` steps; legs of no steps are left out.

        Args:
            num_steps: solver steps, at least 1.
            timesteps: for switch_by "t", the training timestep of each step, noisiest first.
            sigmas: for "sigma" and "snr", sigma_t / alpha_t of each step, noisiest first.

        Raises:
            InputError: if num_steps < 1, or the rule lacks its timesteps or sigmas.
        """
        if num_steps < 1:
            raise InputError(f"the number of steps must be at least 1, got {num_steps}")
        if self.switch_by == "step":
            owners = [self._leg_at_step(i, num_steps) for i in range(num_steps)]
        else:
            name, levels = ("timesteps", timesteps) if self.switch_by == "t" else ("sigmas", sigmas)
            if levels is None or len(levels) != num_steps:
                raise InputError(f"switch_by='{self.switch_by}' needs the {name} of all {num_steps} steps, noisiest first")
            owners = [self._leg_at_level(float(level)) for level in levels]
        legs: list[Leg] = []
        for i, owner in enumerate(owners):
            if legs and owners[i - 1] == owner:
                legs[-1] = legs[-1]._replace(stop=i + 1)
            else:
                legs.append(Leg(self.order[owner], i, i + 1))
        return legs

    def denoiser_at(self, step: int, num_steps: int) -> int:
        """Denoiser of step 0 <= step < num_steps under the step rule."""
        if self.switch_by != "step":
            raise InputError(f"a schedule that switches by {self.switch_by} cannot be asked by step alone; use legs()")
        if not 0 <= step < num_steps:
            raise InputError(f"step {step} is not in 0..{num_steps - 1}")
        return self.order[self._leg_at_step(step, num_steps)]

    def denoiser_at_progress(self, progress: float) -> int:
        """Denoiser at progress in [0, 1) along the trajectory, for solvers that choose their own steps."""
        if self.switch_by != "step":
            raise InputError(f"a schedule that switches by {self.switch_by} cannot be asked by progress alone; use legs()")
        if not 0 <= progress < 1:
            raise InputError(f"progress must lie in [0, 1), got {progress:g}")
        for k in range(self.num_legs - 1):
            if progress < math.fsum(self.fractions[: k + 1]) - 1e-9:
                return self.order[k]
        return self.order[-1]

    def spans(self) -> list[Span]:
        """Parts of the trajectory in [0, 1], in order, for solvers that choose their own steps; neighbours of one denoiser are one span, empty ones left out.

        Raises:
            InputError: if the schedule does not switch by shares of the steps.
        """
        if self.switch_by != "step":
            raise InputError(f"a solver that chooses its own steps needs shares, not switch_by='{self.switch_by}'; use fractions")
        spans: list[Span] = []
        stop = 0.0
        for k in range(self.num_legs):
            start, stop = stop, 1.0 if k == self.num_legs - 1 else min(1.0, math.fsum(self.fractions[: k + 1]))
            if stop - start < 1e-6:
                stop = start
            elif spans and spans[-1].denoiser == self.order[k]:
                spans[-1] = spans[-1]._replace(stop=stop)
            else:
                spans.append(Span(self.order[k], start, stop))
        spans[-1] = spans[-1]._replace(stop=1.0)
        return spans

    def _leg_at_step(self, step: int, num_steps: int) -> int:
        for k in range(self.num_legs - 1):
            if step < math.floor(math.fsum(self.fractions[: k + 1]) * num_steps + 1e-6):
                return k
        return self.num_legs - 1

    def _leg_at_level(self, level: float) -> int:
        if self.switch_by == "sigma":
            return next((k for k, threshold in enumerate(self.thresholds) if level >= threshold), self.num_legs - 1)
        if self.switch_by == "snr":
            snr = 1 / level**2 if level > 0 else math.inf
            return next((k for k, threshold in enumerate(self.thresholds) if snr < threshold), self.num_legs - 1)
        # The published two-model and many-model rules differ in their last bit, which decides timesteps that fall on a boundary.
        if self.num_legs == 2:
            return 0 if level / DIFFUSION_STEPS >= 1 - self.fractions[0] else 1
        progress, milestone = _float32(1 - level / DIFFUSION_STEPS), 0.0
        for k, fraction in enumerate(self.fractions[:-1]):
            milestone += _float32(fraction)
            if progress <= _float32(milestone):
                return k
        return self.num_legs - 1

    def describe(self, names: Sequence[str] | None = None) -> str:
        """Shares in percent, e.g. "S:40 XL:60"; legs of no share are left out."""
        label = [names[k] if names else str(k) for k in self.order]
        if not self.fractions:
            sign = ">=" if self.switch_by == "sigma" else "<"
            return " ".join([f"{n}:{self.switch_by}{sign}{v:g}" for n, v in zip(label[:-1], self.thresholds, strict=True)] + [f"{label[-1]}:rest"])
        shares = " ".join(f"{n}:{round(100 * f, 2):g}" for n, f in zip(label, self.fractions, strict=True) if f > 0)
        return shares if self.switch_by == "step" else f"{shares} by {self.switch_by}"

    def __str__(self) -> str:
        return self.describe()

    def to_json(self) -> str:
        """One JSON object with the four arguments."""
        return json.dumps({"fractions": self.fractions, "order": self.order, "switch_by": self.switch_by, "thresholds": self.thresholds})

    @classmethod
    def from_json(cls, text: str) -> StitchSchedule:
        """Inverse of to_json; unknown keys are an error."""
        try:
            return cls(**json.loads(text))
        except (json.JSONDecodeError, TypeError) as error:
            raise InputError(f"not a stitch schedule: {error}; expected JSON with fractions, order, switch_by, thresholds") from None


def steps_by_denoiser(legs: Sequence[Leg], num_denoisers: int) -> list[int]:
    """Number of steps that each denoiser takes."""
    return [sum(leg.stop - leg.start for leg in legs if leg.denoiser == k) for k in range(num_denoisers)]


def three_way_allocations(parts: int = 10) -> list[StitchSchedule]:
    """All shares (a, b, c) of three denoisers on a grid of 1 / parts: 66 schedules for tenths."""
    return [StitchSchedule((a / parts, b / parts, (parts - a - b) / parts)) for a in range(parts + 1) for b in range(parts + 1 - a)]


def two_way_ratios(parts: int = 10) -> list[StitchSchedule]:
    """The small model's share 0, 1/parts, ..., 1: 11 schedules for tenths."""
    return [StitchSchedule.from_ratio(k / parts) for k in range(parts + 1)]
