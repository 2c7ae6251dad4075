"""What every trainer shares: a loop that survives a kill, EMA, atomic checkpoints.

Everything random in step k comes from `step_seed(seed, k, part)`: the batch, the timesteps, the noise, the dropped labels. A part is what one process
computes at once: with P processes that accumulate A times, the global batch has P * A parts. So a resumed run draws what the undisturbed run would have
drawn, no generator state has to be stored, and two processes train as one that accumulates twice.
"""

from __future__ import annotations

import json
import math
import pickle
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from tstitch.checkpoints import load_strict
from tstitch.errors import InputError
from tstitch.files import atomic_path, write_json
from tstitch.tune import peak_memory

Losses = Callable[[nn.Module, int, int], dict[str, Tensor]]  # (model, step, part) -> scalars; "loss" is differentiated
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def step_seed(seed: int, step: int, part: int = 0) -> int:
    """Seed of one part of a training step: a 32-bit mix of (seed, step, part), so that neighbours share no stream."""
    value = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + part * 0x94D049BB133111EB) & (2**64 - 1)
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return (value ^ (value >> 31)) & 0xFFFFFFFF


def cosine_lr(step: int, max_steps: int, warmup_steps: int = 0, floor: float = 0.0) -> float:
    """Learning-rate factor in [floor, 1]: linear warm-up, then half a cosine down to `floor` at max_steps."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def snr_weights(alphas_cumprod: np.ndarray, gamma: float | None) -> Tensor:
    """Loss weight of each timestep for noise prediction, min(SNR, gamma) / SNR; all ones without gamma.

    Hang et al. 2023, arXiv:2303.09556, Eq. 6: the many nearly clean timesteps, whose noise is hard to see, no longer drown the others.
    """
    if gamma is None:
        return torch.ones(len(alphas_cumprod))
    snr = alphas_cumprod / (1 - alphas_cumprod)
    return torch.from_numpy(np.minimum(snr, gamma) / snr).float()


def draw_batch(
    weights: Tensor | None, num_items: int, *, step: int, part: int, num_parts: int, size: int, seed: int, generator: torch.Generator | None = None
) -> Tensor:
    """Items (size,) that part `part` of step `step` sees.

    Without weights every item comes once an epoch, in an order that depends on (seed, epoch); batches run on across the end of an epoch. With weights
    (num_items,) items are drawn with replacement, from the generator, or else from torch's global one.
    """
    if weights is not None:
        return torch.multinomial(weights, size, replacement=True, generator=generator)
    position = (step * num_parts + part) * size + torch.arange(size)
    epochs = position // num_items
    index = torch.empty(size, dtype=torch.long)
    for epoch in epochs.unique().tolist():
        index[epochs == epoch] = _epoch_order(num_items, seed, epoch)[position[epochs == epoch] % num_items]
    return index


@lru_cache(maxsize=2)
def _epoch_order(num_items: int, seed: int, epoch: int) -> Tensor:
    """A permutation of the items; its seed is that of a step that no run has."""
    return torch.randperm(num_items, generator=torch.Generator().manual_seed(step_seed(seed, -1 - epoch)))


Batch = tuple[Tensor, ...]


def _begin_stream(device: torch.device) -> None:
    """Let a thread wait for its own work on a GPU, not for all that the step has been given."""
    if device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream(device))


class Prefetcher:
    """Draws each part's batch while the one before it is computed, in a thread.

    A batch is drawn from a generator of its own, seeded as its part is; whoever takes it finds torch's global generator in that one's state. So all that is
    drawn afterwards is what it would be if the batch had been drawn from the global generator, which a thread must not share.

    Args:
        draw: called as draw(step, part, generator), gives tensors on the CPU.
        following: the (step, part) that this process computes after a given one; None after the last.
        seed: of the run.
        device: on which `draw` may compute; of a GPU the thread has a stream of its own.
    """

    def __init__(
        self,
        draw: Callable[[int, int, torch.Generator], Batch],
        following: Callable[[int, int], tuple[int, int] | None],
        seed: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.draw, self.following, self.seed = draw, following, seed
        self._thread = ThreadPoolExecutor(1, initializer=_begin_stream, initargs=(torch.device(device),))
        self._ahead: tuple[tuple[int, int], Future[tuple[Batch, Tensor]]] | None = None

    def _drawn(self, step: int, part: int) -> tuple[Batch, Tensor]:
        generator = torch.Generator().manual_seed(step_seed(self.seed, step, part))
        return self.draw(step, part, generator), generator.get_state()

    def take(self, step: int, part: int) -> Batch:
        """The batch of a part; leaves torch's global generator as if it had just been drawn from it."""
        if self._ahead is not None and self._ahead[0] == (step, part):
            batch, state = self._ahead[1].result()
        else:
            batch, state = self._drawn(step, part)
        following = self.following(step, part)
        self._ahead = following and (following, self._thread.submit(self._drawn, *following))
        torch.set_rng_state(state)
        return batch


class EMA:
    """Exponential moving average of a module's parameters; of sharded parameters, this process's shards.

    Early on the decay is (1 + step) / (10 + step), so that a short run is not an average with its random start.

    Args:
        warm_up: False for an average that goes on from another run, which shall not be forgotten.
    """

    def __init__(self, model: nn.Module, decay: float, warm_up: bool = True) -> None:
        self.average = [local(p).clone() for p in model.parameters()]
        self.decay, self.warm_up = decay, warm_up

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move the average towards `model` after optimizer step number `step` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step)) if self.warm_up else self.decay
        torch._foreach_lerp_(self.average, [local(p) for p in model.parameters()], 1 - decay)

    @contextmanager
    def lent_to(self, model: nn.Module) -> Iterator[None]:
        """Let `model` hold the average inside a with block; its own parameters come back at the end, bit for bit."""
        own = [local(p).clone() for p in model.parameters()]
        try:
            self._copy(self.average, model)
            yield
            # A forward pass may have left a sharded model's root whole; its shards are what is copied back.
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()
        finally:
            self._copy(own, model)

    @torch.no_grad()
    def _copy(self, values: list[Tensor], model: nn.Module) -> None:
        torch._foreach_copy_([local(p) for p in model.parameters()], values)


def local(parameter: Tensor) -> Tensor:
    """Detached values of a parameter, or of this process's shard of it; shares its memory."""
    values = parameter.detach()
    return values.to_local() if isinstance(values, DTensor) else values


def checkpoint_files(folder: Path) -> list[Path]:
    """Checkpoints in `folder`, oldest first; their names are their steps."""
    return sorted((path for path in folder.glob("*.pt") if path.stem.isdigit()), key=lambda path: int(path.stem))


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write {step:07d}.pt atomically and remove all but the newest `keep` checkpoints."""
    path = folder / f"{step:07d}.pt"
    with atomic_path(path) as temporary:
        torch.save(state, temporary)
    for old in checkpoint_files(folder)[:-keep]:
        old.unlink()
    return path


class JsonLines:
    """A log of one JSON object a line; opening it at step k forgets the lines of later steps, which a resumed run writes again."""

    def __init__(self, path: Path, step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        with atomic_path(path) as temporary:
            temporary.write_text("".join(line + "\n" for line in kept))
        self.path = path

    def write(self, row: dict[str, Any]) -> None:
        """Append one line."""
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")


def fit(
    model: nn.Module, losses: Losses, *, accelerator: Accelerator, optimizer: torch.optim.Optimizer, folder: Path, config: dict[str, Any],
    max_steps: int, items_per_step: int, accumulation: int = 1,
    lr_factor: Callable[[int], float] = lambda step: 1.0, ema_decay: float = 0.999, clip_norm: float | None = 1.0, seed: int = 0,
    ckpt_every: int = 500, keep: int = 2, log_every: int = 50,
    evaluate: Callable[[nn.Module, int], dict[str, float]] | None = None, eval_every: int = 0,
    resume: bool | Path = True, start_from: Callable[[], dict[str, Any]] | None = None,
    rehearse: Callable[[Callable[[], object], int], None] | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Train `model` to `max_steps`; a run that was killed goes on from its newest checkpoint.

    Args:
        model: the bare module; it is prepared (device, distribution, mixed precision) here.
        losses: called as losses(model, step, part), returns scalars; "loss" is differentiated, all are logged. Runs under `step_seed` of (step, part).
        folder: run folder, on a disk that all processes share; gets config.json, log.jsonl and checkpoints/{step:07d}.pt with keys model, ema, opt,
            args, step, warm_up, log (and scaler in fp16).
        config: plain values that describe the run, "max_steps" among them; a folder begun with another config is refused. Only a run of constant
            "lr_schedule" may be made longer: any other would have learned differently from its first step.
        items_per_step: global batch, for the rate that is shown.
        accumulation: parts that a process computes one after another before each optimizer step; they share the work of a batch that does not fit.
        lr_factor: factor on the optimizer's learning rate for a step.
        clip_norm: largest gradient norm, None for no clipping.
        evaluate: called by every process as evaluate(model that holds the EMA, in eval mode, step) after each `eval_every` steps; what it returns is logged.
        resume: False starts anew and refuses a folder that already holds checkpoints; a file is the checkpoint to go on from, of the same config.
        start_from: where a new run begins, called then: gives {"source", "model", "ema", "opt"}, a file and what another trainer wrote there; "ema" and
            "opt" may be missing.
        rehearse: called in place of training and writing, once all is checked: rehearse(what takes one part of a step, the step where training begins).

    Returns:
        The moving average as a full state dict on the CPU (empty on all processes but the first, and after a rehearsal).

    Raises:
        InputError: if the folder belongs to another run, or start_from to another model; by all processes if what is learned is no longer finite, and then
            nothing is written or removed.
    """
    checkpoints = folder / "checkpoints"
    precision = accelerator.mixed_precision
    config = config | {"max_steps": max_steps, "num_processes": accelerator.num_processes, "accumulation": accumulation, "mixed_precision": precision}
    state = _resumable_state(checkpoints, config, resume) or (start_from() if start_from else {})
    base_lrs = [group["lr"] for group in optimizer.param_groups]
    prepared, stepper, ema = _restore(state, model, optimizer, accelerator, ema_decay, state.get("source", checkpoints))
    start: int = state.get("step", 0)
    if rehearse is not None:
        take = partial(take_step, prepared, losses, start, accelerator=accelerator, optimizer=stepper, clip_norm=clip_norm, seed=seed)
        rehearse(take, start)
        return {}
    log = _Log(folder, accelerator, start, max_steps, items_per_step, *state.get("log", (0, {})))
    del state  # several times the model
    if accelerator.is_main_process:
        write_json(folder / "config.json", config)
        for left_by_a_kill in checkpoints.glob(".*.tmp.pt"):
            left_by_a_kill.unlink()

    for step in range(start, max_steps):
        for group, base in zip(stepper.param_groups, base_lrs, strict=True):
            group["lr"] = base * lr_factor(step)
        log.add(take_step(prepared, losses, step, accelerator=accelerator, optimizer=stepper, accumulation=accumulation, clip_norm=clip_norm, seed=seed))
        ema.update(prepared, step)
        done = step + 1
        if done % log_every == 0 or done == max_steps:
            log.write_means(done, stepper.param_groups[0]["lr"])
        evaluates, saves = (every > 0 and (done % every == 0 or done == max_steps) for every in (eval_every, ckpt_every))
        if evaluates or saves:
            _check_weights(prepared, ema, accelerator, log, done)
        if evaluate is not None and evaluates:
            with log.clock_stopped(), ema.lent_to(prepared):  # the rate is that of training
                prepared.eval()
                log.write(evaluate(accelerator.unwrap_model(prepared), done), done)
                prepared.train()
        # After the evaluation: a kill between the two repeats it, and does not lose it.
        if saves:
            whole = _whole_state(prepared, stepper, ema, accelerator) | {"log": log.state()}  # gathered by all processes
            if accelerator.is_main_process:
                save_checkpoint(checkpoints, done, whole | {"args": config, "step": done, "warm_up": ema.warm_up}, keep)
    log.bar.close()
    if start == max_steps:  # no step of this call has looked at them
        _check_weights(prepared, ema, accelerator, log, start)
    with ema.lent_to(prepared):
        average = full_state(prepared)
    accelerator.wait_for_everyone()
    return average


def _check_weights(prepared: nn.Module, ema: EMA, accelerator: Accelerator, log: _Log, step: int) -> None:
    """Refuse weights that are not finite; every process calls it, and all raise if a shard of one is not."""
    held = [local(p) for p in prepared.parameters()] + ema.average
    wrong = torch.stack([~values.isfinite().all() for values in held]).any()
    if accelerator.reduce(wrong.float(), "sum").item():
        raise log.diverged("the weights are", step)


class _Log:
    """What a run writes and shows: means of the loss terms since the last line, and the rate of training.

    Args:
        start: step from which the run goes on.
        count, sums: the `state` of that step; a resumed run writes the same next line.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, start: int, max_steps: int, items_per_step: int, count: int, sums: dict[str, Tensor]) -> None:
        self.accelerator, self.items_per_step, self.count, self.checkpoints = accelerator, items_per_step, count, folder / "checkpoints"
        self.sums = {name: value.to(accelerator.device) for name, value in sums.items()}
        main = accelerator.is_main_process
        self.lines = JsonLines(folder / "log.jsonl", start) if main else None
        self.bar = tqdm(total=max_steps, initial=start, desc=folder.name, unit="step", disable=not main, mininterval=1.0)
        self._since, self._rated, self._moved = time.perf_counter(), start, False

    def add(self, terms: dict[str, Tensor]) -> None:
        """Count a step."""
        for name, value in terms.items():  # on the device: reading a loss at every step would stall a GPU
            self.sums[name] = self.sums.get(name, 0) + value
        self.count += 1
        self._moved |= not self.accelerator.optimizer_step_was_skipped
        self.bar.update()

    def write(self, row: dict[str, float], step: int) -> None:
        """Write one line."""
        self.accelerator.log(row, step=step)
        if self.lines is not None and row:
            self.lines.write({"step": step, **{name: float(f"{value:.6g}") for name, value in row.items()}})

    def write_means(self, step: int, lr: float) -> None:
        """Write the means of the steps since the last time, and begin anew.

        Raises:
            InputError: if they are not finite, by all processes, which have the same means.
        """
        means = {name: self.accelerator.reduce(value, "mean").item() / self.count for name, value in self.sums.items()}
        wrong = [name for name, value in means.items() if not math.isfinite(value)]
        # The scaler of fp16 skips steps that overflow, at first to find its scale; JSON has no word for what they measured.
        skipped = self.accelerator.scaler is not None and (self._moved or wrong == ["grad_norm"])
        if wrong and not skipped:
            raise self.diverged(f"{', '.join(wrong)} {'are' if len(wrong) > 1 else 'is'}", step)
        means = {name: value for name, value in means.items() if name not in wrong}
        now = time.perf_counter()
        rate = (step - self._rated) / (now - self._since)
        self.write(means | {"lr": lr, "steps_per_s": rate, "images_per_s": rate * self.items_per_step}, step)
        shown = {name: f"{value:.4f}" for name, value in means.items()}
        peak = peak_memory(self.accelerator.device) / 2**30
        self.bar.set_postfix(shown | {"images/s": f"{rate * self.items_per_step:.0f}", "peak": f"{peak:.1f} GiB"})
        self.sums, self.count, self._since, self._rated, self._moved = {}, 0, now, step, False

    def diverged(self, what: str, step: int) -> InputError:
        """What to raise when `what` was not finite at a step."""
        self.bar.close()  # else the message would stand in its line
        files = checkpoint_files(self.checkpoints)
        kept = f"the last checkpoint, {files[-1]}, is kept" if files else "there is no checkpoint before it"
        return InputError(
            f"training diverged: at step {step} {what} not finite (NaN or infinity); {kept}, and nothing is exported. "
            "Pass a lower --lr, --clip-norm 1, or --mixed-precision bf16 or no, and another run folder"
        )

    @contextmanager
    def clock_stopped(self) -> Iterator[None]:
        """Leave what is done inside a with block out of the rate."""
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began

    def state(self) -> tuple[int, dict[str, Tensor]]:
        """Steps and sums since the last line, the mean of all processes; every process calls it."""
        return self.count, {name: self.accelerator.reduce(value, "mean") for name, value in self.sums.items()}


def take_step(
    prepared: nn.Module,
    losses: Losses,
    step: int,
    *,
    accelerator: Accelerator,
    optimizer: torch.optim.Optimizer,
    accumulation: int = 1,
    clip_norm: float | None = 1.0,
    seed: int = 0,
) -> dict[str, Tensor]:
    """One optimizer step of a prepared model, without its moving average; arguments as in `fit`.

    Returns:
        The mean loss terms of this process's parts and, with clip_norm, grad_norm; float32 scalars on the device.
    """
    means: dict[str, Tensor] = {}
    for k in range(accumulation):
        part = accelerator.process_index * accumulation + k
        torch.manual_seed(step_seed(seed, step, part))
        with accelerator.no_sync(prepared) if k + 1 < accumulation else nullcontext():
            terms = losses(prepared, step, part)
            accelerator.backward(terms["loss"] / accumulation)
        for name, value in terms.items():
            means[name] = means.get(name, 0) + value.detach().float() / accumulation
    if clip_norm is not None:
        norm = accelerator.clip_grad_norm_(prepared.parameters(), clip_norm)
        means["grad_norm"] = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).float()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return means


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the whole state dict on the CPU, gathered from all shards; empty on all processes but the first."""
    state = cast(dict[str, Tensor], get_model_state_dict(model, options=FULL))  # whole and of plain modules: nothing but tensors
    return {name: value.clone() for name, value in state.items()}


def _whole_state(prepared: nn.Module, stepper: Any, ema: EMA, accelerator: Accelerator) -> dict[str, Any]:  # noqa: ANN401  (accelerate's optimizer)
    """What a checkpoint has of model, optimizer, moving average and gradient scaler; every process calls it."""
    whole: dict[str, Any] = {"model": full_state(prepared), "opt": get_optimizer_state_dict(prepared, stepper.optimizer, options=FULL)}
    with ema.lent_to(prepared):
        whole["ema"] = full_state(prepared)
    if accelerator.scaler is not None:
        whole["scaler"] = accelerator.scaler.state_dict()
    return whole


def named_optimizer_state(state: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """An optimizer's state dict with parameter names for keys; torch's own counts parameters, in the model's order.

    Raises:
        InputError: if it belongs to another model.
    """
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    if all(isinstance(number, str) for number in numbers):
        return state
    names = [name for name, _ in model.named_parameters()]
    if len(numbers) != len(names):
        raise InputError(f"the optimizer state is of {len(numbers)} parameters, the model has {len(names)}; pass the checkpoint of this model")
    groups = [group | {"params": [names[number] for number in group["params"]]} for group in state["param_groups"]]
    return {"state": {names[number]: value for number, value in state["state"].items()}, "param_groups": groups}


def _restore(
    state: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator, ema_decay: float, source: str | Path
) -> tuple[nn.Module, Any, EMA]:
    """Prepare model and optimizer, with the weights, moving average and optimizer state that `state` has of them."""
    ours = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    if state:
        load_strict(model, state["model"], source)
        load_strict(model, state.get("ema", state["model"]), source)  # the moving average starts from these
    prepared, stepper = accelerator.prepare(model, optimizer)
    ema = EMA(prepared, ema_decay, warm_up=state.get("warm_up", "ema" not in state))
    whole = StateDictOptions(full_state_dict=True)
    if state:
        set_model_state_dict(prepared, dict(state["model"]), options=whole)
    if "opt" in state:
        named = named_optimizer_state(state["opt"], model)
        # A fused optimizer counts its steps on the device; the file may be of one that did not.
        groups = [group | {"fused": ours[0].get("fused")} for group in named["param_groups"]]
        set_optimizer_state_dict(prepared, stepper.optimizer, named | {"param_groups": groups}, options=whole)
        for group, values in zip(stepper.param_groups, ours, strict=True):
            group.update(values)  # the command line's, not the file's
    if "scaler" in state and accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(state["scaler"])
    return prepared, stepper, ema


def _resumable_state(checkpoints: Path, config: dict[str, Any], resume: bool | Path) -> dict[str, Any] | None:
    """The checkpoint from which a run goes on: the newest of its folder, or the file that `resume` is; None at its start."""
    files = checkpoint_files(checkpoints) if checkpoints.is_dir() else []
    instead = "choose another --results-dir"
    if isinstance(resume, Path):
        files, checkpoints, instead = [resume], resume, "pass another checkpoint"
    if not files:
        return None
    if not resume:
        raise InputError(f"{checkpoints} already holds checkpoints; continue them with --autoresume or choose another --results-dir")
    try:
        state = torch.load(files[-1], map_location="cpu", weights_only=True, mmap=True)
        began, step, _ = dict(state["args"]), state["step"], state["model"].keys() | state["opt"].keys()
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, LookupError, TypeError, ValueError, AttributeError):
        remedy = instead if isinstance(resume, Path) else f"remove it, or pass it with --load-ckpt and {instead}"
        raise InputError(f"{files[-1]} is damaged or another trainer's; {remedy}") from None
    growing = {"max_steps"} if config.get("lr_schedule") == "constant" else set()
    changed = sorted(k for k in (config.keys() | began.keys()) - growing if config.get(k) != began.get(k))
    if changed:
        was = ", ".join(f"{k}={began.get(k)!r:.100}" for k in changed)
        raise InputError(f"{checkpoints} was begun with {was}; pass the same values or {instead}")
    if step > config["max_steps"]:
        raise InputError(f"{checkpoints} is at step {step} already; pass a larger --max-steps or {instead}")
    return {"source": files[-1], **state}
