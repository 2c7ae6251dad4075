"""Encode a folder of pictures once, so that training needs neither pictures nor autoencoder.

    python dit/extract_features.py --data-path imagenet/train --features-path features
    torchrun --nproc-per-node 8 dit/extract_features.py --data-path imagenet/train --features-path features

With the same --batch-size and OMP_NUM_THREADS the result is the same, byte for byte, from any number of processes. A run that was killed goes on where it
was when it is started again, with any number of processes. A picture that cannot be decoded is named and left out; the run then fails at its end, unless
--skip-bad says that this is well.
"""

from __future__ import annotations

import argparse
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tstitch.autoencoder import Autoencoder
from tstitch.cli import DATA, DTYPES, MACHINE, OUTPUT, add_dry_run_arg, help_group, new_parser, parse_device, positive_int, run
from tstitch.data import WRITERS, FeatureWriter, describe, open_features
from tstitch.dry_run import MEASURED_ON_CPU, Files, Work, count_flops, module_bytes, show_memory, show_plan
from tstitch.errors import InputError
from tstitch.files import check_folder
from tstitch.pictures import DamagedPictureError, ImageFolder
from tstitch.tune import measure_seconds


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__)
    data = help_group(parser, DATA)
    data.add_argument("--data-path", type=Path, required=True, metavar="FOLDER", help="folder with a folder of pictures for each class")
    data.add_argument("--image-size", type=positive_int, default=256, metavar="PIXELS", help="pictures are scaled and cropped to this square")
    data.add_argument("--vae", default="ema", help="mse or ema (Stable Diffusion), a folder in diffusers format, a hub name, or none: pixels")
    data.add_argument("--flip", action=argparse.BooleanOptionalAction, default=True, help="keep the mirrored pictures too; not for letters or flags")
    data.add_argument("--skip-bad", action="store_true", help="succeed although some pictures could not be decoded")
    output = help_group(parser, OUTPUT)
    output.add_argument("--features-path", type=Path, default=Path("features"), metavar="FOLDER", help="folder to write, on a disk that all processes share")
    output.add_argument("--layout", choices=WRITERS, default="store", help="store: memory-mapped, a new draw each epoch; files: fast-DiT's, a frozen draw")
    machine = help_group(parser, MACHINE)
    machine.add_argument("--batch-size", type=positive_int, default=32, metavar="N", help="pictures in one call of the autoencoder, on each process")
    machine.add_argument("--num-workers", type=positive_int, default=8, metavar="N", help="threads that decode pictures, on each process")
    machine.add_argument("--dtype", choices=DTYPES, default="fp32", help="number type of the autoencoder's weights")
    machine.add_argument("--device", default="auto", help="auto, cpu, cuda (each process takes its own), mps")
    add_dry_run_arg(parser)
    return parser.parse_args(argv)


def plan_extraction(args: argparse.Namespace, pictures: ImageFolder, autoencoder: Autoencoder, writer: FeatureWriter, processes: int) -> None:
    """Answer --dry-run: what encoding what is left will cost; pictures are read in threads beside it."""
    left = len(pictures) if writer.check() is None else 0 if writer.finished.exists() else sum(map(len, writer.todo(args.batch_size)))
    views = len(writer.views(torch.zeros(1, dtype=torch.long), torch.zeros(1, 3, 8, 8)))
    n = min(args.batch_size, len(pictures), MEASURED_ON_CPU if autoencoder.device.type == "cpu" else args.batch_size)
    latents = "x".join(map(str, writer.index["latent_shape"]))
    noise = torch.randint(256, (n, 3, args.image_size, args.image_size), dtype=torch.uint8)
    flops = count_flops(lambda: autoencoder.encode(noise, args.batch_size)) / n
    (seconds,) = measure_seconds([lambda: autoencoder.encode(noise, args.batch_size)], autoencoder.device, 2)
    show_plan(
        [
            (
                "pictures",
                f"{len(pictures)} in {pictures.num_classes} classes, {args.data_path}" + ("" if left == len(pictures) else f"; {left} of them are left"),
            ),
            ("encoding", f"{autoencoder.source}, {args.dtype} on {autoencoder.device}: {args.image_size}x{args.image_size} pixels -> {latents}"),
            ("layout", f"{args.layout}, {views} view{'s' if views > 1 else ''} of each picture"),
        ],
        [Work("encoding", left * views, flops, seconds / n)],
        how=f"an estimate from {n} pictures at once, where reading them is not slower",
        memory=show_memory(autoencoder.device, module_bytes(autoencoder.vae)),
        files=[Files(f"{len(pictures)} features", writer.nbytes, args.features_path)],
        ranks=processes,
    )


def decode_ahead(pictures: ImageFolder, batches: list[Tensor], threads: int) -> Iterator[tuple[Tensor, list[Tensor | None]]]:
    """Batches of items with their pictures, None for a damaged one; two batches are decoded while one is encoded."""

    def decode(item: int) -> Tensor | None:
        try:
            return pictures.image(item)
        except DamagedPictureError as error:
            tqdm.write(f"left out: {error}", file=sys.stderr)
            return None

    with ThreadPoolExecutor(threads) as pool:  # threads serve: Pillow decodes and scales outside the interpreter lock
        ahead: deque = deque()
        for items in batches:
            ahead.append((items, [pool.submit(decode, item) for item in items.tolist()]))
            if len(ahead) == 3:
                first, futures = ahead.popleft()
                yield first, [future.result() for future in futures]
        for items, futures in ahead:
            yield items, [future.result() for future in futures]


def encode(args: argparse.Namespace, pictures: ImageFolder, autoencoder: Autoencoder, writer: FeatureWriter, processes: PartialState) -> None:
    """Encode this process's share of the batches that are left."""
    todo = writer.todo(args.batch_size)
    processes.wait_for_everyone()  # all must have read what is left before anyone writes, or they would share it out differently
    mine = todo[processes.process_index :: processes.num_processes]
    name = "encode" if processes.num_processes == 1 else f"encode, process 1 of {processes.num_processes}"
    with tqdm(total=sum(map(len, mine)), desc=name, unit="image", disable=not processes.is_main_process) as bar:
        for items, images in decode_ahead(pictures, mine, args.num_workers):
            good = torch.tensor([image is not None for image in images])
            writer.mark(items[~good].tolist(), writer.DAMAGED)
            if good.any():
                views = writer.views(items[good], torch.stack([image for image in images if image is not None]))
                writer.write(items[good].tolist(), torch.stack([autoencoder.encode(view, args.batch_size) for view in views], dim=1).numpy())
            bar.update(len(items))
    processes.wait_for_everyone()


def conclude(args: argparse.Namespace, pictures: ImageFolder, writer: FeatureWriter) -> None:
    """Account for every picture, and make the features readable."""
    damaged = [pictures.names[item] for item in writer.items_with(writer.DAMAGED)]
    if len(damaged) == len(pictures) or (damaged and not args.skip_bad):
        names = ", ".join(damaged[:10]) + (", ..." if len(damaged) > 10 else "")
        found = f"{len(damaged)} of {len(pictures)} pictures could not be decoded ({names})"
        raise InputError(f"{found}; mend them, or accept their loss with --skip-bad, and run again: what is done stays")
    writer.finish(pictures.names)
    features = open_features(args.features_path)
    left_out = f", {len(damaged)} damaged pictures left out" if damaged else ""
    print(f"{len(features)} features {features.latent_shape} of {features.num_classes} classes{left_out} -> {args.features_path}")


def main(argv: list[str] | None = None) -> None:
    """Lay the files out, share the work, conclude."""
    args = parse_args(argv)
    device = parse_device(args.device)
    # A process may wait long for a slower one, so the usual ten minutes will not do.
    processes = PartialState(cpu=device.type == "cpu", timeout=timedelta(days=7))
    pictures = ImageFolder(args.data_path, args.image_size)
    check_folder(args.features_path)
    autoencoder = Autoencoder(args.vae, device, DTYPES[args.dtype])
    index = describe(pictures, autoencoder, mirrors=2 if args.flip else 1) | {"vae_dtype": args.dtype}
    writer = WRITERS[args.layout](args.features_path, index, pictures.labels)
    if args.dry_run:
        if processes.is_main_process:
            plan_extraction(args, pictures, autoencoder, writer, processes.num_processes)
        processes.destroy_process_group()
        return
    if processes.is_main_process:
        writer.begin()
    processes.wait_for_everyone()
    encode(args, pictures, autoencoder, writer, processes)
    if processes.is_main_process:
        conclude(args, pictures, writer)
    processes.destroy_process_group()


if __name__ == "__main__":
    run(main)
