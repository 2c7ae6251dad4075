"""The Inception network of 2015 that FID means, as torch-fidelity ports it: TensorFlow's weights, image scaling and pooling.

ADM's definitions: FID on the pooled 2048 features; sFID on the first 7 channels of the 17x17 maps that TensorFlow calls mixed_6/conv; the Inception score
on softmax(features @ W), without the bias.
"""

from __future__ import annotations

import http.client
import io
import socket
from pathlib import Path

import torch
from torch import Tensor, nn

from tstitch.checkpoints import file_hash, first_line, read_weights
from tstitch.errors import InputError
from tstitch.metrics.extractors import Extractor, ImageFeatures
from tstitch.presets import ROOT
from tstitch.torchvision_compat import prepare_torchvision

WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"


def adm_spatial(maps: Tensor) -> Tensor:
    """ADM's spatial features (N, 17 * 17 * 7) of maps (N, C, 17, 17): 7 channels, channels last, as published statistics have them."""
    return maps[:, :7].permute(0, 2, 3, 1).flatten(1)


class InceptionExtractor(Extractor):
    """torch-fidelity's `inception-v3-compat`, on images of any size, which it scales to 299x299.

    Raises:
        InputError: if torch-fidelity or the weights are missing, or the weights do not fit.
    """

    name, dim, spatial_dim, distance, score = "inception", 2048, 17 * 17 * 7, "fid", "inception_score"

    def __init__(self, device: torch.device | str = "cpu", folder: Path | None = None) -> None:
        prepare_torchvision()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
        except ImportError as error:
            raise InputError(f"--extractor inception needs torch-fidelity ({error}): pip install -r requirements.txt; --extractor emoji needs none") from None
        path = _find_weights(folder or ROOT / "pretrained_models", URL_INCEPTION_V3)
        # torch-fidelity unpickles whatever it is given, so it is given what was read safely.
        buffer = io.BytesIO()
        torch.save(read_weights(path)[0], buffer)
        buffer.seek(0)
        try:
            network: nn.Module = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=buffer)
        except RuntimeError as error:
            raise InputError(f"{path} does not fit the Inception network ({first_line(error)}); fetch it again") from None
        self.device = torch.device(device)
        self.network = network.to(self.device)
        self.weights = file_hash(path)
        self._spatial: Tensor | None = None
        # TensorFlow counts mixed ... mixed_2 (35x35), mixed_3 (reduction), mixed_4 ... mixed_7 (17x17): torch's 6b ... 6e. "conv" is the 1x1 branch.
        self.network.get_submodule("Mixed_6d.branch1x1").register_forward_hook(self._keep_spatial)

    def _keep_spatial(self, module: nn.Module, inputs: tuple, maps: Tensor) -> None:
        self._spatial = adm_spatial(maps)

    @torch.no_grad()
    def measure(self, images: Tensor) -> ImageFeatures:
        """Pooled (N, 2048) and spatial (N, 2023) features and class probabilities (N, 1008) of uint8 pictures (N, 3, H, W) of any size."""
        # Convolutions in TF32, torch's default, would move the features by more than batches and devices do.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            pool, logits = self.network(images.to(self.device))
        return ImageFeatures(pool, self._spatial, logits.softmax(dim=1))


def _find_weights(folder: Path, url: str) -> Path:
    """The weights in `folder` or in torch's download cache; fetched from `url` into the latter where there is a network."""
    cached = Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS
    for path in (folder / WEIGHTS, cached):
        if path.is_file():
            return path
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)  # torch.hub sets none: a network that answers nothing must not hang the program
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(cached))
    except (OSError, http.client.HTTPException) as error:
        raise InputError(
            f"no Inception weights: put {WEIGHTS} into {folder} (readme.txt in pretrained_models says where it is published), or use --extractor emoji, "
            f"which needs none; fetching it failed ({first_line(error)})"
        ) from None
    finally:
        socket.setdefaulttimeout(timeout)
    return cached
