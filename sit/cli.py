"""The words that all SiT scripts share: which flow, and which differential equation walks it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from sit.transport import DIFFUSION_FORMS, LAST_STEPS, LOSS_WEIGHTS, ODE, ODE_METHODS, PATHS, PREDICTIONS, SDE, SDE_METHODS, Transport, create_transport
from tstitch.checkpoints.convert import FLOW_WORDS
from tstitch.cli import MODELS, SAMPLING, help_group
from tstitch.errors import InputError

TRANSPORT_WORDS = FLOW_WORDS  # arguments of create_transport, as checkpoints store them
# Words of only one of the two equations, with their published defaults.
ODE_WORDS: dict[str, Any] = {"atol": 1e-6, "rtol": 1e-3, "reverse": False}
SDE_WORDS: dict[str, Any] = {"diffusion_form": "sigma", "diffusion_norm": 1.0, "last_step": "Mean", "last_step_size": 0.04}


def add_transport_args(parser: argparse.ArgumentParser) -> None:
    """Add the words of the flow; `transport_from` reads them."""
    group = help_group(parser, "flow (defaults: what the checkpoint says, else the published Linear path with velocity prediction)")
    group.add_argument("--path-type", choices=PATHS, help="interpolant between noise and data")
    group.add_argument("--prediction", choices=PREDICTIONS, help="what the model predicts")
    group.add_argument("--loss-weight", choices=LOSS_WEIGHTS, help="weight of score and noise losses; sampling does not use it")
    group.add_argument("--train-eps", type=float, help="time kept from the ends of [0, 1] in training, 0..0.5; sampling does not use it")
    group.add_argument("--sample-eps", type=float, help="the same in sampling, where something is singular at an end")


def transport_from(args: argparse.Namespace, said: Mapping[str, Any], source: object = "the checkpoint") -> Transport:
    """The flow of the command line, with what a checkpoint says for the words that were not given.

    Args:
        said: TRANSPORT_WORDS that a checkpoint stores; {} where it stores none.
        source: the checkpoint's name for the error.

    Raises:
        InputError: if a word is unknown, or path or prediction contradict the checkpoint.
    """
    given = given_words(args)
    for word in ("path_type", "prediction"):
        if given.get(word) not in (None, said.get(word, given.get(word))):
            raise InputError(f"{source} was trained with --{word.replace('_', '-')} {said[word]}, not {given[word]}; leave that out")
    return create_transport(**(dict(said) | given))


def given_words(args: argparse.Namespace) -> dict[str, Any]:
    """TRANSPORT_WORDS of the command line, without those that were not given."""
    return {word: value for word in TRANSPORT_WORDS if (value := getattr(args, word)) is not None}


def transport_words(transport: Transport) -> dict[str, Any]:
    """What a checkpoint stores of a flow: the arguments of `create_transport`."""
    values = (transport.name, transport.prediction, transport.loss_weight, transport.train_eps, transport.sample_eps)
    return dict(zip(TRANSPORT_WORDS, values, strict=True))


def add_equation_args(parser: argparse.ArgumentParser, *, reverse: bool = False) -> None:
    """Add ODE or SDE, their words, and those of the flow; `equation_from` reads them. A stitched trajectory has no --reverse: its first leg is the noisiest."""
    parser.add_argument("mode", choices=["ODE", "SDE"], help="differential equation to walk")
    add_transport_args(parser)
    both = f"ODE: {', '.join(ODE_METHODS)} (default dopri5); SDE: {', '.join(SDE_METHODS)} (default Euler)"
    help_group(parser, SAMPLING).add_argument("--sampling-method", metavar="NAME", help=both)
    ode = help_group(parser, "ODE")
    ode.add_argument("--atol", type=float, help="absolute tolerance of adaptive methods (default: 1e-6)")
    ode.add_argument("--rtol", type=float, help="relative tolerance of adaptive methods (default: 1e-3)")
    if reverse:
        ode.add_argument("--reverse", action="store_const", const=True, help="walk from t = 1 to t = 0")
    sde = help_group(parser, "SDE")
    sde.add_argument("--diffusion-form", choices=DIFFUSION_FORMS, help="diffusion coefficient by time (default: sigma)")
    sde.add_argument("--diffusion-norm", type=float, metavar="NORM", help="factor on it, at least 0 (default: 1)")
    sde.add_argument("--last-step", choices=LAST_STEPS, help="how the last step is taken (default: Mean)")
    sde.add_argument("--last-step-size", type=float, metavar="SIZE", help="its length in time, 0..1 (default: 0.04)")


def equation_from(args: argparse.Namespace, transport: Transport, num_steps: int) -> ODE | SDE:
    """The equation that the command line asks for.

    Raises:
        InputError: if a word belongs to another equation or method, is out of range, or the flow is infinite where the equation needs it.
    """
    words, others = (ODE_WORDS, SDE_WORDS) if args.mode == "ODE" else (SDE_WORDS, ODE_WORDS)
    given = {word: value for word in (*words, *others) if (value := getattr(args, word, None)) is not None}
    if foreign := [f"--{word.replace('_', '-')}" for word in others if word in given]:
        raise InputError(f"{', '.join(foreign)} belong to the {'SDE' if args.mode == 'ODE' else 'ODE'}; leave them out of {args.mode}")
    if args.mode == "SDE":
        if args.last_step == "None" and "last_step_size" in given:
            raise InputError("--last-step None has no size; leave --last-step-size out")
        return SDE(transport, args.sampling_method or "Euler", num_steps=num_steps, **(words | given))
    ode = ODE(transport, args.sampling_method or "dopri5", num_steps, **(words | given))
    if not ode.has_tolerances and (given.keys() & {"atol", "rtol"}):
        raise InputError(f"--atol and --rtol decide nothing in {ode.method}, which has fixed steps; leave them out, or pass an adaptive --sampling-method")
    return ode


def add_dit_arg(parser: argparse.ArgumentParser) -> None:
    """Add which weights are a DiT's; `sit.checkpoints.mark_dits` reads it."""
    help_group(parser, MODELS).add_argument(
        "--dit", nargs="+", choices=["s", "b", "xl"], default=[], help="models whose weights are a DiT's and do not say so; they are carried over to the flow"
    )
