"""How probable a flow model finds data, in bits per dimension with the standard error.

A latent or a pixel x of D dimensions has the density p(x) of the model's ODE (`Sampler.sample_ode_likelihood`), and -log2 p(x) / D bits per dimension. Such
a density may exceed 1 and its bits be negative, so figures are comparable only between models of the same latents.

Pictures have 8-bit levels k. A model of pixels gives them the probability of their cell, x(u) = 2 (k + u) / 256 - 1 for u in [0, 1)^D, which is the cell that
the model's samples are rounded to k from. Noise u ~ q makes that a bound that can be drawn (Jensen's inequality; Theis et al. 2016, arXiv:1511.01844,
Section 3.1, for uniform q; Ho et al. 2019, "Flow++", arXiv:1902.00275, Section 3.1, for any q), and bits of a bound are an upper limit of the true bits:

    log P(k) = log of the integral of p(x(u)) (2 / 256)^D du >= E_q [log p(x(u)) - log q(u)] + D log (2 / 256)

Item i draws its latent from the posterior, its u and its probes from the seed plus i, whatever its batch, the number of processes, or an interruption.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sit.cli import transport_words
from sit.transport import Sampler, Transport
from sit.transport.ode import ADAPTIVE
from tstitch.autoencoder import PIXELS, Autoencoder
from tstitch.cli import positive_int
from tstitch.data import Features, ImageLatents, check_vae, open_features
from tstitch.errors import InputError
from tstitch.files import atomic_path, check_folder, read_json, write_json
from tstitch.generate import Ranks, fix_arithmetic
from tstitch.guidance import Denoiser
from tstitch.noise import SampleNoise
from tstitch.pictures import ImageFolder

DEQUANTIZATIONS = ("none", "uniform", "gaussian")
SAMPLING_WORDS = {"png": False, "class_labels": None, "num_images": None, "max_batch": None}  # of the generator, with their defaults
GAUSSIAN_WIDTH = 1 / 6  # standard deviation in levels: a cell ends three of them from its middle
MOST_CALLS = 2**32  # of the model along one trajectory: each of the --probes has so many numbers of its own


def add_likelihood_args(parser: argparse.ArgumentParser) -> None:
    """Add the words of --likelihood; `wants_likelihood`, `open_likelihood_data` and `measure_likelihood` read them."""
    group = parser.add_argument_group("likelihood of data, in place of sampling (ODE only, without guidance)")
    group.add_argument("--likelihood", action="store_true", help="measure bits per dimension of data, given their labels")
    group.add_argument("--features-path", type=Path, help="data: features from dit/extract_features.py")
    group.add_argument("--data-path", type=Path, help="data: folder of class folders of pictures, encoded with --vae")
    group.add_argument("--num-likelihood-samples", type=positive_int, metavar="N", help="items, drawn from the data without repeats (default: all)")
    group.add_argument(
        "--dequantization", choices=DEQUANTIZATIONS, help="noise within a level: uniform (default of pixels), gaussian (narrow); none (default of latents)"
    )
    group.add_argument("--probes", type=positive_int, metavar="K", help="trajectories of each item, with a random probe each, to average (default: 1)")


def wants_likelihood(args: argparse.Namespace, *, equation: str, cfg_scale: float) -> bool:
    """Whether --likelihood is asked for, checked before anything is loaded.

    Args:
        equation: "ODE" or "SDE".

    Raises:
        InputError: if its words contradict one another or the rest.
    """
    if not args.likelihood:
        words = ("features_path", "data_path", "num_likelihood_samples", "dequantization", "probes")
        given = [f"--{word.replace('_', '-')}" for word in words if getattr(args, word) is not None]
        if given:
            raise InputError(f"{', '.join(given)} belong to --likelihood; pass that too, or leave them out")
        return False
    idle = [f"--{word.replace('_', '-')}" for word, default in SAMPLING_WORDS.items() if getattr(args, word, default) != default]
    if idle:
        raise InputError(f"{', '.join(idle)} belong to sampling, and --likelihood samples nothing; leave them out")
    if equation != "ODE":
        raise InputError("--likelihood follows the ODE; an SDE has no path back, so pass ODE")
    if cfg_scale != 1:
        raise InputError(f"--likelihood is that of the model itself, and guidance is no density; pass --cfg-scale 1, not {cfg_scale:g}")
    if (args.features_path is None) == (args.data_path is None):
        raise InputError("--likelihood is measured on data: pass either --features-path or --data-path")
    return True


def open_likelihood_data(args: argparse.Namespace, *, image_size: int, num_classes: int, vae: str, device: torch.device) -> Features:
    """Open the data that --likelihood names, for a model of so many classes; pictures are not mirrored.

    Raises:
        InputError: if they are missing or damaged, have more classes, or another autoencoder made them.
    """
    if args.data_path is not None:
        data: Features = ImageLatents(ImageFolder(args.data_path, image_size), vae, device, flip=False)
    else:
        data = open_features(args.features_path)
        check_vae(data, vae)
    if data.num_classes > num_classes:
        raise InputError(f"the data have {data.num_classes} classes, the model {num_classes}; pass data that it was trained for")
    return data


def draw_data(data: Features, index: Tensor, seed: int) -> Tensor:
    """Latents (n, C, h, w) of the items `index` (n,): posterior, and mirror image where both are stored, are drawn from seed + item."""
    rows = []
    with torch.random.fork_rng(devices=[]):
        for i in index:
            torch.manual_seed(seed + int(i))
            rows.append(data.latents(i[None]))
    return torch.cat(rows)


def dequantize(levels: Tensor, how: str, noise: SampleNoise) -> tuple[Tensor, Tensor]:
    """Pixels x(u) in [-1, 1) of levels 0..255 (N, ...), float32, and D log(2 / 256) - log q(u) (N,), which makes log p(x) a bound on log P(levels).

    gaussian: u is normal around 1/2 with GAUSSIAN_WIDTH, truncated to [0, 1); Zheng et al. 2023, arXiv:2305.03935, truncate so. It suits a model that was
    trained on the levels themselves and is narrow around them; a model that is even over a cell loses half a bit by it.
    """
    u = torch.special.ndtr(noise(-1, levels.cpu().double()))  # uniform
    log_q = torch.zeros_like(u)
    if how == "gaussian":
        below = 0.5 * math.erfc(0.5 / GAUSSIAN_WIDTH / math.sqrt(2))  # what lies under 0, and as much over 1
        deviations = torch.special.ndtri(below + u * (1 - 2 * below))
        u = 0.5 + GAUSSIAN_WIDTH * deviations
        log_q = -0.5 * deviations**2 - math.log(GAUSSIAN_WIDTH * math.sqrt(2 * math.pi) * (1 - 2 * below))
    x = 2 * (levels.cpu() + u) / 256 - 1
    return x.float(), (math.log(2 / 256) - log_q).flatten(1).sum(dim=1)


def sign_probe(noise: SampleNoise, first: int, once: bool) -> Callable[[int, Tensor], Tensor]:
    """Signs for call k of a trajectory, from stream first + k of each sample, or with `once` the same from stream `first` for all calls."""
    drawn: dict[int, Tensor] = {}

    def probe(k: int, like: Tensor) -> Tensor:
        number = first if once else first + k
        if number not in drawn:
            drawn.clear()
            drawn[number] = torch.where(noise(number, like) < 0, -1.0, 1.0).to(like)
        return drawn[number]

    return probe


class LikelihoodFolder:
    """A measurement on disk: likelihood.npz and, last, likelihood.json; until then likelihood_work/ with config.json and a file for each finished chunk.

    Args:
        chunks: items (n,) that are walked together.
    """

    def __init__(self, folder: Path, chunks: Sequence[Tensor]) -> None:
        self.folder, self.chunks, self.work, self.result = folder, chunks, folder / "likelihood_work", folder / "likelihood.json"

    def chunk(self, c: int) -> Path:
        """Log-likelihoods of a chunk, float64 (n,)."""
        return self.work / f"{c:06d}.npy"

    def left(self) -> list[int]:
        """Chunks that are still to be measured."""
        if self.result.exists():
            return []
        done = {path.name for path in self.work.glob("*.npy")}
        return [c for c in range(len(self.chunks)) if self.chunk(c).name not in done]

    def begin(self, config: dict[str, Any]) -> None:
        """Prepare for the chunks that are left.

        Raises:
            InputError: if the folder belongs to another measurement, naming what differs, or cannot be written.
        """
        check_folder(self.folder)
        begun = self.work / "config.json"
        found = read_json(self.result)["settings"] if self.result.exists() else read_json(begun) if begun.exists() else config
        differ = [key for key in config if found.get(key) != config[key]]
        if differ:
            raise InputError(f"{self.folder} holds another measurement (other {', '.join(differ)}); remove it or choose another folder")
        if not self.result.exists():
            write_json(begun, config)

    def fill(self, log_likelihood: Callable[[Tensor], Tensor], mine: Sequence[int], main: bool) -> None:
        """Measure this rank's chunks; the main one shows the progress of all ranks and waits for them."""
        count = sum(map(len, self.chunks))

        def finished() -> int:
            return count - sum(len(self.chunks[c]) for c in self.left()) if main else 0

        with tqdm(total=count, initial=finished(), desc="likelihood", unit="image", disable=not main) as bar:
            for c in mine:
                logp = log_likelihood(self.chunks[c])
                with atomic_path(self.chunk(c)) as temporary:
                    np.save(temporary, logp.numpy())
                bar.update(finished() - bar.n)
            # Looked up, not met at a barrier, which would time out where one rank is slow.
            while main and bar.n < count:
                bar.update(finished() - bar.n)
                time.sleep(0.2)

    def finish(self, config: dict[str, Any], size: int, unit: str) -> dict[str, Any]:
        """The result, which is written where it is not there yet; `size` is D, how many of the unit an item has."""
        if not self.result.exists():
            logp = np.concatenate([np.load(self.chunk(c)) for c in range(len(self.chunks))])
            bits = -logp / (size * math.log(2))
            with atomic_path(self.folder / "likelihood.npz") as temporary:
                np.savez(temporary, index=torch.cat(self.chunks).numpy(), logp=logp, bits_per_dim=bits)
            figures = {"bits_per_dim": float(bits.mean()), "standard_error": float(bits.std(ddof=1) / math.sqrt(len(bits))), "num_images": len(bits)}
            write_json(self.result, {**figures, "unit": unit, "dimensions": size, "settings": config})
        shutil.rmtree(self.work, ignore_errors=True)
        return read_json(self.result)


def measure_likelihood(
    ranks: Ranks, args: argparse.Namespace, model: Denoiser, transport: Transport, data: Features, *, method: str, num_steps: int, atol: float, rtol: float,
    seed: int, batch: int, folder: Path, device: torch.device, settings: Mapping[str, Any],
) -> None:  # fmt: skip
    """Measure the data's likelihood and write folder/likelihood.json and .npz (index, logp in nats, bits_per_dim); every rank calls it, rank 0 prints.

    With dequantization, logp is a draw of the bound on log P(k). The standard error is that of the mean over items, and holds what the draws of data,
    noise and probes add.

    Args:
        args: what `add_likelihood_args` asked for, and --tf32.
        model: called as model(x, t, y=y), in eval mode on the device; has a latent_shape.
        method, num_steps, atol, rtol: of `sit.transport.ODE`.
        batch: items that a rank walks together; an adaptive method shares its steps among them, so it is part of what decides the last digits.
        settings: what else the result belongs to, such as hashes of weights; JSON.

    Raises:
        InputError: on all ranks, if the data do not fit, or the folder belongs to another measurement; on one, if a likelihood is not finite.
    """
    fix_arithmetic(device, args.tf32)
    main, pixels, probes, count = ranks.rank == 0, data.index.get("vae") == PIXELS, args.probes or 1, args.num_likelihood_samples or len(data)
    how = args.dequantization or ("uniform" if pixels else "none")
    walk_with = partial(Sampler(transport).sample_ode_likelihood, method, num_steps, atol, rtol)
    with ranks.agree():
        if how != "none" and not pixels:
            raise InputError(f"--dequantization {how} is for models of pixels (--vae none), latents have no levels; leave it out")
        if tuple(data.latent_shape) != tuple(model.latent_shape):
            raise InputError(
                f"the data are of shape {data.latent_shape}, the model of {model.latent_shape}; pass data or an --image-size that it was trained for"
            )
        if not 2 <= count <= len(data):
            raise InputError(f"{count} of {len(data)} items cannot be measured; pass --num-likelihood-samples 2 or more, and not more than there are")
        walk_with()  # refuses what cannot be walked
    # Items lie class by class, so the first ones would be no fair draw.
    index = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:count].sort().values
    config = {
        **settings, "flow": transport_words(transport), "method": method, "num_steps": num_steps, "atol": atol, "rtol": rtol, "probes": probes,
        "dequantization": how, "num_images": count, "seed": seed, "batch_size": batch, "tf32": args.tf32, "device": device.type,
        "data": {key: value for key, value in data.index.items() if key not in ("vae", "class_names", "damaged")}  # the VAE's hash says which it is
        | {"labels": hashlib.sha256(data.labels.numpy().tobytes()).hexdigest()[:16]},
        "threads": torch.get_num_threads() if device.type == "cpu" else None, "torch": torch.__version__,
    }  # fmt: skip
    config = json.loads(json.dumps(config))  # as it is read back
    store = LikelihoodFolder(folder, index.split(batch))
    with ranks.agree():
        if main:
            store.begin(config)
    left = ranks.gather(store.left() if main else None)[0]
    with ranks.agree():
        if left and not store.work.is_dir():
            raise InputError(f"rank {ranks.rank} does not see {store.work}; choose a folder on a disk that all machines share")

    def log_likelihood(items: Tensor) -> Tensor:
        noise = SampleNoise((seed + items).tolist())
        x, correction = draw_data(data, items, seed), torch.zeros(len(items), dtype=torch.float64)
        if how != "none":
            x, correction = dequantize(Autoencoder(PIXELS).decode(x), how, noise)
        walks = [walk_with(sign_probe(noise, k * MOST_CALLS, once=method in ADAPTIVE)) for k in range(probes)]
        logp = correction + torch.stack([walk(x.to(device), model, y=data.labels[items].to(device))[0].cpu().double() for walk in walks]).mean(dim=0)
        if not logp.isfinite().all():
            raise InputError(f"the likelihood of items {items[~logp.isfinite()].tolist()} is not finite; pass smaller --atol and --rtol, or another method")
        return logp

    store.fill(log_likelihood, left[ranks.rank :: ranks.size], main)
    if main:
        unit = "bits per pixel channel" if pixels else "bits per latent dimension"
        result = store.finish(config, math.prod(data.latent_shape), unit)
        said, of = ("bits per dimension", f"{how} dequantization") if how != "none" else (unit, "a density, without dequantization")
        print(f"{result['bits_per_dim']:.3f} +- {result['standard_error']:.3f} {said} over {count} images ({of})")
