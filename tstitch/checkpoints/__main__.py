"""Look into checkpoints, convert them, and examine the machine.

    python -m tstitch.checkpoints inspect FILE ...                       # whose it is, which model, what it holds
    python -m tstitch.checkpoints convert 0400000.pt --out dit.safetensors
    python -m tstitch.checkpoints doctor                                 # versions, devices, weights, one step

`convert` reads checkpoints of DiT, fast-DiT, T-Stitch, GTA, SiT, REPA and diffusers' DiTTransformer2DModel, and writes safetensors with the published
names and the model's configuration, which every script here takes.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tstitch.checkpoints.convert import convert, inspect
from tstitch.checkpoints.doctor import examine
from tstitch.checkpoints.layouts import model_name
from tstitch.cli import DTYPES, new_parser, positive_int, run
from tstitch.errors import InputError


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__)
    parser.prog = "python -m tstitch.checkpoints"
    commands = parser.add_subparsers(dest="command", required=True)
    strict: dict[str, Any] = {"formatter_class": parser.formatter_class, "allow_abbrev": False}
    look = commands.add_parser("inspect", help="say what is in checkpoint files", **strict)
    look.add_argument("files", type=Path, nargs="+", metavar="FILE", help="safetensors, .pt or .bin")
    look.add_argument("--json", action="store_true", help="print JSON")
    change = commands.add_parser("convert", help="write a checkpoint as safetensors with its configuration inside", **strict)
    change.add_argument("file", type=Path, metavar="FILE", help="safetensors, .pt or .bin")
    change.add_argument("--out", type=Path, required=True, metavar="FILE", help="safetensors file to write")
    change.add_argument("--dtype", choices=DTYPES, default="fp32", help="number type to store; fp16 halves the file")
    change.add_argument("--use", choices=["ema", "model"], help="which weights of a training checkpoint (default: the moving average where there is one)")
    change.add_argument("--num-heads", type=positive_int, help="attention heads, for a width that was not published")
    change.add_argument("--input-size", type=positive_int, metavar="N", help="height and width of the latents, where the file does not tell")
    change.add_argument("--num-classes", type=positive_int, help="number of classes, for a label table that has no null label")
    change.add_argument("--posenc", choices=["rope", "gta"], help="position encoding, where the file does not tell")
    change.add_argument("--kind", choices=["DiT", "SiT"], help="what a bare state dict is; a SiT's flow is the published one (default: DiT)")
    health = commands.add_parser("doctor", help="examine versions, devices, weights and disk, and sample one step", **strict)
    health.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args(argv)


def show(found: dict[str, Any]) -> None:
    """Print one file's findings, a line each."""
    print(found["file"])
    shown = {key: value for key, value in found.items() if key not in ("file", "notes") and value is not None}
    shown |= {key: f"{found[key]:,}" for key in ("parameters", "bytes")}
    if found["config"]:
        shown["config"] = [f"{key} {value}" for key, value in found["config"].items()]
    for key, value in [*shown.items(), *(("note", note) for note in found["notes"])]:
        print(f"  {key:10}  {', '.join(value) if isinstance(value, list) else value}")


def doctor(as_json: bool) -> None:
    """Print the examination.

    Raises:
        InputError: if something that is needed is missing or fails.
    """
    findings = []
    for finding in examine():
        findings.append(finding)
        if not as_json:
            print(f"{finding.state:8}  {finding.what:24}  {finding.detail}", flush=True)
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    if bad := [finding.what for finding in findings if finding.bad]:
        raise InputError(f"{', '.join(bad)} {'is' if len(bad) == 1 else 'are'} missing or failed; see the table above")


def main(argv: list[str] | None = None) -> None:
    """Run one of the three commands."""
    args = parse_args(argv)
    if args.command == "doctor":
        doctor(args.json)
    elif args.command == "inspect":
        found = [inspect(path) for path in args.files]
        if args.json:
            print(json.dumps(found, indent=2))
        else:
            for one in found:
                show(one)
    else:
        told = {"num_heads": args.num_heads, "input_size": args.input_size, "num_classes": args.num_classes, "posenc": args.posenc}
        published = convert(args.file, args.out, DTYPES[args.dtype], args.use, args.kind, **told)
        for note in published.notes:
            print(note)
        print(f"wrote {args.out}: {model_name(published.config)}, {args.dtype}")


if __name__ == "__main__":
    run(main)
