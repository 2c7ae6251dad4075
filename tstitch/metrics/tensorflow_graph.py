"""ADM's own feature network: the frozen TensorFlow graph of 2015, for whoever must match its numbers to the last digit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tstitch.checkpoints import file_hash, first_line
from tstitch.errors import InputError
from tstitch.metrics.extractors import Extractor, ImageFeatures
from tstitch.metrics.inception import adm_spatial

GRAPH = "classify_image_graph_def.pb"


class TensorFlowInception(Extractor):
    """The graph of a file, run by TensorFlow on the devices it finds.

    Raises:
        InputError: if the file or TensorFlow is missing, or the file is no such graph.
    """

    name, dim, spatial_dim, distance, score = "inception", 2048, 17 * 17 * 7, "fid", "inception_score"

    def __init__(self, graph: Path | None) -> None:
        if graph is None or not graph.is_file():
            raise InputError(f"--backend tensorflow needs the frozen graph: pass --graph FILE, ADM's {GRAPH}" + (f" (no file {graph})" if graph else ""))
        try:
            import tensorflow.compat.v1 as tf
            from google.protobuf.message import DecodeError
        except ImportError as error:
            raise InputError(f"--backend tensorflow needs tensorflow ({error}): pip install tensorflow, or leave --backend out") from None
        definition = tf.GraphDef()
        with tf.Graph().as_default() as imported:
            self._images = tf.placeholder(tf.float32, [None, None, None, 3])
            try:
                definition.ParseFromString(graph.read_bytes())
                pool, spatial, logits = tf.import_graph_def(
                    definition, {"ExpandDims:0": self._images}, ["pool_3:0", "mixed_6/conv:0", "softmax/logits/MatMul"], name=""
                )
            except (DecodeError, ValueError, KeyError) as error:
                raise InputError(f"{graph} is not ADM's Inception graph ({first_line(error)}); fetch {GRAPH} again") from None
        self._session = tf.Session(graph=imported)
        self._outputs = (pool, spatial)
        self._last_layer = torch.from_numpy(np.array(self._session.run(logits.inputs[1])))  # (2048, 1008); the bias is added after it
        self.weights = file_hash(graph)

    def measure(self, images: Tensor) -> ImageFeatures:
        """Pooled (N, 2048) and spatial (N, 2023) features and class probabilities (N, 1008) of uint8 pictures (N, 3, H, W) of any size."""
        pixels = images.permute(0, 2, 3, 1).float().cpu().numpy()
        pool, spatial = (torch.from_numpy(array) for array in self._session.run(self._outputs, {self._images: pixels}))
        pool = pool.flatten(1)
        return ImageFeatures(pool, adm_spatial(spatial.permute(0, 3, 1, 2)), (pool @ self._last_layer).softmax(dim=1))
