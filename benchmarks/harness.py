"""How everything here is timed: variants take turns in one process, and only their ratios within a round are believed.

A round takes one sample of each variant, one after the other, so a machine whose speed drifts slows all alike. A sample repeats its call until it has
lasted `MIN_SECONDS`; it is thrown away and taken again if other work used more than `MAX_OTHER` of a core meanwhile, on the cores that this process may
use. That is known on Linux and for work on the CPU; elsewhere, and on a GPU, no sample is thrown away, and the record says so.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tstitch.errors import InputError
from tstitch.tune import wait_for

MIN_SECONDS = 0.12  # a shorter sample says more about the clock and the scheduler
MAX_OTHER = 0.12  # of one core
PATIENCE = 20  # samples of a variant that may be thrown away in one round
PAUSE = 2.0  # seconds to wait after one
PRODUCT = "matrix product "  # opens the names of the variants that measure the machine's limit

Call = Callable[[], object]


class Clocks(NamedTuple):
    """Seconds since some fixed moment."""

    wall: float
    own: float  # computed by this process, all threads together
    busy: float | None  # computed by anyone on the cores that this process may use; None where the system does not say


def read_clocks() -> Clocks:
    """Clocks of now."""
    return Clocks(time.perf_counter(), time.process_time(), _busy_seconds())


def _busy_seconds() -> float | None:
    try:
        lines = Path("/proc/stat").read_text().splitlines()
    except OSError:
        return None
    cores = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    # user, nice, system, idle, iowait, irq, softirq, steal; a guest's time is in user's already.
    ticks = [[int(word) for word in line.split()[1:9]] for line in lines if line.split()[0] in cores]
    return sum(sum(core) - core[3] - core[4] for core in ticks) / os.sysconf("SC_CLK_TCK")


def disturbed(before: Clocks, after: Clocks) -> bool:
    """Whether other work ran between two readings. The kernel counts in ticks, so one tick is never held against anybody."""
    if before.busy is None or after.busy is None:
        return False
    other = (after.busy - before.busy) - (after.own - before.own)
    return other > MAX_OTHER * (after.wall - before.wall) + 1 / os.sysconf("SC_CLK_TCK")


@dataclass
class Comparison:
    """Seconds of one call of each variant, a figure for each round.

    Args:
        seconds: variant -> figures; figure k of every variant is of round k.
        reckoned: what was not timed but follows from what was, such as the sum of two variants: name -> a figure for each round. Variants can be compared
            with it.
        discarded: samples that were thrown away.
        gated: whether disturbed samples were looked for.
    """

    seconds: dict[str, list[float]] = field(default_factory=dict)
    reckoned: dict[str, list[float]] = field(default_factory=dict)
    discarded: int = 0
    gated: bool = False

    def median(self, name: str) -> float:
        """Median seconds of one call."""
        return statistics.median(self.seconds[name])

    def speed(self, name: str, reference: str) -> float:
        """How many times as fast as the reference: the median of the rounds' own ratios."""
        theirs = (self.seconds | self.reckoned)[reference]
        return statistics.median(their / our for our, their in zip(self.seconds[name], theirs, strict=True))

    def of_peak(self, name: str, flops: float, product: str) -> float:
        """Fraction of the matrix product's FLOP/s that a variant of so many FLOPs a call reaches, in its median round."""
        return flops / product_flops(product) * self.speed(name, product)


def compare(calls: Mapping[str, Call], device: torch.device, rounds: int = 7, *, gate: bool = True, clocks: Callable[[], Clocks] = read_clocks) -> Comparison:
    """Time variants against each other.

    Args:
        calls: variant -> what is timed; each is called once before, to warm up.
        rounds: samples of each variant that are kept, at least 1.
        gate: throw disturbed samples away; a GPU's never are.
        clocks: the clocks; tests bring their own.

    Raises:
        InputError: if other work never lets a whole round through. Where that happens later, the rounds until then are returned.
    """
    for call in tqdm(calls.values(), desc="warm up", unit="variant"):
        call()
    wait_for(device)
    result = Comparison(gated=clocks().busy is not None and gate and device.type == "cpu")
    repeats, done = dict.fromkeys(calls, 1), []
    with tqdm(total=rounds * len(calls), desc="rounds", unit="sample") as bar:
        while len(done) < rounds:
            figures: dict[str, float] = {}
            for name, call in calls.items():
                figure = None
                for _ in range(PATIENCE + 1):
                    figure, repeats[name] = _sample(call, repeats[name], device, clocks, result.gated)
                    if figure is not None:
                        break
                    result.discarded += 1
                    time.sleep(PAUSE)
                    bar.set_postfix_str(f"{result.discarded} thrown away")
                if figure is None:
                    break
                figures[name] = figure
                bar.update()
            if len(figures) < len(calls):
                break
            done.append(figures)
    if not done:
        raise InputError("other work on this machine disturbs every sample; stop it, or take disturbed samples too with --no-gate")
    if len(done) < rounds:
        tqdm.write(f"warning: other work disturbs; stopped after {len(done)} of {rounds} rounds", file=sys.stderr)
    result.seconds = {name: [figures[name] for figures in done] for name in calls}
    return result


def _sample(call: Call, repeats: int, device: torch.device, clocks: Callable[[], Clocks], gated: bool) -> tuple[float | None, int]:
    """Seconds of one call, or None if the sample was disturbed; and how many repeats it took."""
    while True:
        wait_for(device)
        before = clocks()
        for _ in range(repeats):
            call()
        wait_for(device)
        after = clocks()
        lasted = after.wall - before.wall
        if lasted >= MIN_SECONDS:
            return (None if gated and disturbed(before, after) else lasted / repeats), repeats
        repeats = max(repeats + 1, math.ceil(1.1 * repeats * MIN_SECONDS / max(lasted, 1e-6)))


def _product_size(device_type: str) -> int:
    return 2048 if device_type == "cpu" else 8192


def product_flops(name: str) -> float:
    """FLOPs of a matrix product by its name, such as "matrix product fp32 2048"."""
    return 2 * float(name.rsplit(" ", 1)[1]) ** 3


def matrix_product(name: str, dtype: torch.dtype, device: torch.device) -> dict[str, Call]:
    """A square matrix product as a variant {name: call}: the limit that fractions of peak refer to, measured among the others.

    Args:
        name: of the number type, such as "fp32".
    """
    size = _product_size(device.type)
    a, b, out = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(3))
    return {f"{PRODUCT}{name} {size}": lambda: torch.mm(a, b, out=out)}


def dit_flops(config: Mapping[str, int | float | bool], batch: int) -> int:
    """FLOPs of one forward of a DiT or SiT: two for each multiply-add of its linears (patches, time, adaLN, blocks, output) and of q k^T and p v.

    What is done once for each element (norms, GELU, softmax, gates, rotations) is left out, as everybody does.

    Args:
        config: the model's `config`.
        batch: images, guidance's second half included.
    """
    d, patch, depth = config["hidden_size"], config["patch_size"], config["depth"]
    tokens, pixels = (config["input_size"] // patch) ** 2, patch**2 * config["in_channels"]
    block = 3 * d * d + d * d + 2 * d * int(d * config["mlp_ratio"])
    each_token = pixels * d + depth * block + d * pixels * (1 + config["learn_sigma"])
    each_image = 256 * d + d * d + depth * 6 * d * d + 2 * d * d
    return 2 * batch * (tokens * each_token + depth * 2 * tokens**2 * d + each_image)
