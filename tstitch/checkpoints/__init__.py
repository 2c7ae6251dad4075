"""Weights in and out: no unsafe pickle, the EMA where there is one, and a clear word when a file does not fit its model.

Ours are safetensors with the model's constructor arguments in the header ("config"), so a file says by itself what it is. Checkpoints of DiT, fast-DiT,
GTA, REPA and diffusers are read too: `layouts` knows their names and shapes, `convert` turns them into ours. `python -m tstitch.checkpoints --help`.
"""

from tstitch.checkpoints.weights import (
    Checkpoint,
    check_shapes,
    file_hash,
    first_line,
    load_strict,
    read_checkpoint,
    read_training_state,
    read_weights,
    save_weights,
)

__all__ = ["Checkpoint", "check_shapes", "file_hash", "first_line", "load_strict", "read_checkpoint", "read_training_state", "read_weights", "save_weights"]
