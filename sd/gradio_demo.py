"""The web page: stitch models with a slider, and see what it costs.

    python sd/gradio_demo.py                                   # http://127.0.0.1:7860
    python sd/gradio_demo.py --host 0.0.0.0 --auth me:secret   # for others on this network
    python sd/gradio_demo.py --share                           # behind a public address of gradio's

Tabs of bundled models work offline at once. The tabs of Stable Diffusion and SDXL fetch their weights when they are first used.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sd.page.classes import class_backbones
from sd.page.page import CSS, build_page, theme
from sd.page.prompts import prompt_backbones
from tstitch.cli import DTYPES, MACHINE, help_group, new_parser, parse_device, positive_int, run
from tstitch.errors import InputError


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__)
    page = help_group(parser, "page")
    page.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 lets the whole network in")
    page.add_argument("--port", type=positive_int, help="port to listen on (default: the first free one from 7860)")
    page.add_argument("--share", action="store_true", help="also open a public address for a week, through gradio's servers")
    page.add_argument("--auth", action="append", default=[], metavar="USER:PASSWORD", help="who may enter; may be given several times")
    machine = help_group(parser, MACHINE)
    machine.add_argument("--concurrency", type=positive_int, default=1, metavar="N", help="runs at once; the others wait in a queue")
    machine.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    machine.add_argument("--dtype", choices=DTYPES, help="number type of the weights (default: fp32, of Stable Diffusion on an accelerator fp16)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Build the page and serve it until interrupted."""
    args = parse_args(argv)
    users = [tuple(pair.split(":", 1)) for pair in args.auth]
    if any(len(pair) != 2 or not all(pair) for pair in users):
        raise InputError("--auth is USER:PASSWORD, e.g. --auth me:secret")
    device = str(parse_device(args.device))
    if args.port is not None and args.port > 65535:
        raise InputError(f"--port must lie in 1..65535, got {args.port}")
    backbones = [*class_backbones(device, args.dtype or "fp32"), *prompt_backbones(device, args.dtype)]
    page = build_page(backbones, args.concurrency)
    try:
        page.launch(
            server_name=args.host, server_port=args.port, share=args.share, auth=users or None, theme=theme(), css_paths=[CSS], footer_links=[], show_error=True
        )
    except OSError:
        place = f"{args.host}:{args.port}" if args.port else args.host
        raise InputError(f"could not listen on {place}, which is in use or not this machine's; choose another --port or --host") from None


if __name__ == "__main__":
    run(main)
