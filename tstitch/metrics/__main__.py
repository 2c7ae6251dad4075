"""Measure samples against a reference with ADM's definitions: FID, sFID, Inception score, precision and recall.

    python dit/evaluator.py REF.npz SAMPLES.npz --json result.json          # images (arr_0) or statistics (mu, sigma, mu_s, sigma_s)
    python dit/evaluator.py train SAMPLES.npz --extractor emoji             # FD-emoji, against the bundled reference (train, held_out)
    python dit/evaluator.py data/my_pictures SAMPLES.npz --extractor emoji  # against one's own pictures, a folder for each class
    python dit/evaluator.py IMAGES.npz --save-statistics statistics.npz     # statistics for later
    python dit/evaluator.py --compare a.json b.json                         # results side by side, and what sets them apart

Settings of the samples are read from SAMPLES.json, which the generators write, and stored with the result.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tstitch.cli import MACHINE, OUTPUT, help_group, new_parser, parse_device, positive_int, run
from tstitch.errors import InputError
from tstitch.files import check_file, read_json, write_json
from tstitch.metrics.evaluate import evaluate, measure
from tstitch.metrics.extractors import EXTRACTORS, Extractor, create_extractor, open_batch
from tstitch.metrics.npz import Batch, save_statistics
from tstitch.presets import ROOT
from tstitch.results import comparison_table, markdown_table

# ADM's README for its ADM-G+U samples at 256x256. The port of the network and float64 distances move the last digits.
SELF_TEST_FILES = ("VIRTUAL_imagenet256_labeled.npz", "admnet_guided_upsampled_imagenet256.npz")
PUBLISHED = {"fid": 3.943, "sfid": 6.140, "inception_score": 215.84, "precision": 0.8265, "recall": 0.5309}
TOLERANCE = 0.01  # relative


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__)
    parser.add_argument("reference", nargs="?", metavar="REF", help="an .npz, a folder of class folders, or, with --extractor emoji, train or held_out")
    parser.add_argument("samples", nargs="?", type=Path, metavar="SAMPLES", help="samples .npz")
    mode = help_group(parser, "what to do, other than to measure SAMPLES").add_mutually_exclusive_group()
    mode.add_argument("--compare", nargs="+", type=Path, metavar="RESULT", help="tabulate results that --json wrote, and say which settings differ")
    mode.add_argument(
        "--self-test", action="store_true", help=f"measure ADM-G+U's published samples: REF and SAMPLES, or {', '.join(SELF_TEST_FILES)} in pretrained_models"
    )
    network = help_group(parser, "feature network")
    network.add_argument("--extractor", choices=EXTRACTORS, default="inception", help="feature network; inception needs its weights file")
    network.add_argument("--backend", choices=["torch", "tensorflow"], default="torch", help="what runs Inception; tensorflow runs ADM's own graph")
    network.add_argument("--graph", type=Path, metavar="FILE", help="ADM's classify_image_graph_def.pb, for --backend tensorflow")
    machine = help_group(parser, MACHINE)
    machine.add_argument("--batch-size", type=positive_int, default=64, help="images at a time")
    network.add_argument("--max-images", type=positive_int, metavar="N", help="precision and recall look at the first N images of each file (default: all)")
    machine.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    output = help_group(parser, OUTPUT)
    output.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    output.add_argument("--save-statistics", type=Path, metavar="FILE", help="write mu, sigma, mu_s, sigma_s of SAMPLES (of REF where it is alone) here, .npz")
    return parser.parse_args(argv)


def load_extractor(args: argparse.Namespace) -> Extractor:
    """The extractor that the command line asks for."""
    device = parse_device(args.device)
    if args.backend == "torch":
        if args.graph:
            raise InputError("--graph belongs to --backend tensorflow; pass both or neither")
        return create_extractor(args.extractor, device)
    if args.extractor != "inception":
        raise InputError("--backend tensorflow runs Inception alone; leave --extractor or --backend out")
    from tstitch.metrics.tensorflow_graph import TensorFlowInception

    return TensorFlowInception(args.graph)


def check(args: argparse.Namespace) -> None:
    """Refuse, before any work, what cannot end well."""
    if args.reference is None:
        raise InputError("pass REF.npz and SAMPLES.npz, or --compare RESULT ...; --help has examples")
    if args.samples is None and (args.json or not args.save_statistics):
        raise InputError("pass SAMPLES.npz too; one file alone is for --save-statistics")
    if args.save_statistics and args.save_statistics.suffix != ".npz":
        raise InputError(f"--save-statistics writes an .npz file, got {args.save_statistics}")
    for path in (args.json, args.save_statistics):
        if path:
            check_file(path)
    named = args.extractor == "emoji" and args.reference in ("train", "held_out")
    if not named and not Path(args.reference).is_dir():  # a folder may be a reference, and is looked at when its pictures' size is known
        Batch(args.reference)
    if args.samples:
        Batch(args.samples)


def compare(paths: list[Path]) -> None:
    """Print results side by side."""
    results = [read_json(path) for path in paths]
    for path, result in zip(paths, results, strict=True):
        if not isinstance(result, dict) or not {"name", "metrics", "settings"} <= result.keys():
            raise InputError(f"{path} is no result of this program; pass files that --json wrote")
    print(comparison_table(results))


def self_test(args: argparse.Namespace) -> None:
    """Measure published samples; where something is missing, say what to fetch and stop without an error."""
    reference, samples = args.reference or ROOT / "pretrained_models" / SELF_TEST_FILES[0], args.samples or ROOT / "pretrained_models" / SELF_TEST_FILES[1]
    missing = [str(path) for path in (reference, samples) if not Path(path).is_file()]
    if missing:
        print(f"skipped: no {' and no '.join(missing)}; fetch them from openai/guided-diffusion (pretrained_models/readme.txt), or pass REF and SAMPLES")
        return
    try:
        extractor = load_extractor(args)
    except InputError as error:
        print(f"skipped: {error}")
        return
    result, _ = evaluate(reference, samples, extractor, batch_size=args.batch_size, max_images=args.max_images)
    measured = {name: float("nan") if result["metrics"][name] is None else result["metrics"][name] for name in PUBLISHED}
    print(markdown_table(["metric", "published", "measured"], [[name, f"{PUBLISHED[name]:.4f}", f"{measured[name]:.4f}"] for name in PUBLISHED]))
    wrong = [name for name, wanted in PUBLISHED.items() if not abs(measured[name] - wanted) <= TOLERANCE * wanted]
    if wrong:
        raise InputError(f"{', '.join(wrong)} lie more than {TOLERANCE:.0%} from the published numbers; check that these are the published files and weights")


def main(argv: list[str] | None = None) -> None:
    """Compare results, or measure and print."""
    args = parse_args(argv)
    if args.compare:
        return compare(args.compare)
    if args.self_test:
        return self_test(args)
    check(args)
    extractor = load_extractor(args)
    if args.samples is None:
        got = measure(open_batch(args.reference, extractor), extractor, args.batch_size, score=False)
    else:
        result, got = evaluate(args.reference, args.samples, extractor, batch_size=args.batch_size, max_images=args.max_images)
        print(comparison_table([result]))
        print(*result["notes"], sep="\n")
        if args.json:
            write_json(args.json, result)
    if args.save_statistics:
        save_statistics(args.save_statistics, got.pooled, got.spatial)
    return None


if __name__ == "__main__":
    run(main)
