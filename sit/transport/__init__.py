"""Transport between noise and data: interpolants, what a model predicts along them, and the ODEs and SDEs that walk them."""

from sit.transport.ode import ODE, ODE_METHODS
from sit.transport.path import DIFFUSION_FORMS, PATHS, Path
from sit.transport.sampler import Sampler
from sit.transport.sde import LAST_STEPS, SDE, SDE_METHODS
from sit.transport.transport import LOSS_WEIGHTS, PREDICTIONS, Transport, create_transport

__all__ = [
    "DIFFUSION_FORMS", "LAST_STEPS", "LOSS_WEIGHTS", "ODE", "ODE_METHODS", "PATHS", "PREDICTIONS", "Path", "SDE", "SDE_METHODS", "Sampler", "Transport",
    "create_transport",
]  # fmt: skip
