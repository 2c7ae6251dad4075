"""Beta schedules, and which of their steps a shorter process keeps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tstitch.errors import InputError

BETA_SCHEDULES = ("linear", "squaredcos_cap_v2")


def named_betas(name: str, num_steps: int) -> np.ndarray:
    """Betas of a named schedule, float64 (num_steps,), ascending in t.

    "linear": Ho et al. 2020, arXiv:2006.11239, 1e-4 to 0.02 at 1000 steps, scaled by 1000 / num_steps. "squaredcos_cap_v2": Nichol and Dhariwal 2021,
    arXiv:2102.09672, Eq. 17, betas capped at 0.999.
    """
    if name == "linear":
        scale = 1000 / num_steps
        return np.linspace(scale * 1e-4, scale * 0.02, num_steps, dtype=np.float64)
    if name == "squaredcos_cap_v2":

        def alpha_bar(u: float) -> float:
            return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

        return np.array([min(1 - alpha_bar((i + 1) / num_steps) / alpha_bar(i / num_steps), 0.999) for i in range(num_steps)])
    raise InputError(f"unknown noise schedule '{name}'; choose from {', '.join(BETA_SCHEDULES)}")


def space_timesteps(num_timesteps: int, spec: str | Sequence[int]) -> list[int]:
    """Timesteps that a respaced process keeps, ascending.

    Args:
        num_timesteps: length of the original process.
        spec: "" keeps all; "100" spreads 100 evenly over it; "10,15,20" cuts it into three equal sections and spreads 10, 15 and 20 over them;
            "ddim50" takes the smallest whole stride that gives 50 (Song et al. 2021, arXiv:2010.02502), starting at 0.

    Raises:
        InputError: if the spec asks for no steps, for more than there are, or for a DDIM stride that does not exist.
    """
    if isinstance(spec, str) and spec.startswith("ddim"):
        wanted = _parse_count(spec.removeprefix("ddim"), spec)
        for whole in range(1, num_timesteps + 1):
            if len(range(0, num_timesteps, whole)) == wanted:
                return list(range(0, num_timesteps, whole))
        raise InputError(f"no whole stride gives {wanted} of {num_timesteps} timesteps; use '{wanted}' instead of '{spec}'")
    if isinstance(spec, str):
        counts = [_parse_count(part, spec) for part in spec.split(",")] if spec else [num_timesteps]
    else:
        counts = [_parse_count(str(part), str(spec)) for part in spec]
    size, extra = divmod(num_timesteps, len(counts))
    kept, start = [], 0
    for section, count in enumerate(counts):
        length = size + (section < extra)
        if count > length:
            raise InputError(f"cannot take {count} steps out of {length} timesteps; ask for at most {length}")
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        # Accumulated, not multiplied: the rounding of the sum decides ties, and published results hang on it.
        position = 0.0
        for _ in range(count):
            kept.append(start + round(position))
            position += stride
        start += length
    return kept


def _parse_count(text: str, spec: str) -> int:
    if not text.strip().isdigit() or int(text) < 1:
        raise InputError(f"'{spec}' is no number of sampling steps; use 1 to 1000, or a form like 'ddim50' or '10,15,20'")
    return int(text)
