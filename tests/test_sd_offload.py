"""Where the weights of stitched U-Nets lie: one at a time on the accelerator, in one number type and memory format, with the same results."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from sd_tiny import draw, small_sd, tiny_sd
from torch import Tensor, nn

from sd.offload import Switch
from sd.tstitch_sd_utils import stitch, unstitch
from tstitch.errors import InputError


class Accelerator:
    """A pretended device: what is uploaded is a copy, known by its address, and every moment's bytes are kept."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.unets: list[nn.Module] = []
        self.addresses: set[int] = set()
        self.events: list[tuple[str, int, list[int]]] = []  # (what happened, to which U-Net, bytes of each U-Net on the device)
        monkeypatch.setattr(Switch, "moves", property(lambda _: True))
        monkeypatch.setattr(Switch, "upload", self.upload)

    def watch(self, pipe: DiffusionPipeline) -> None:
        self.unets = list(pipe.unet.unets)
        for k, unet in enumerate(self.unets):
            unet.register_forward_pre_hook(lambda *_, k=k: self.events.append(("call", k, self.resident())))

    def upload(self, host: Tensor) -> Tensor:
        copied = host.clone()
        self.addresses.add(copied.data_ptr())
        owner = next(k for k, unet in enumerate(self.unets) for tensor in self.tensors(unet) if tensor.data_ptr() == host.data_ptr())
        self.events.append(("upload", owner, [n + host.nbytes * (k == owner) for k, n in enumerate(self.resident())]))
        return copied

    def tensors(self, unet: nn.Module) -> Iterator[Tensor]:
        return chain(unet.parameters(), unet.buffers())

    def sizes(self) -> list[int]:
        return [sum(tensor.nbytes for tensor in self.tensors(unet)) for unet in self.unets]

    def resident(self) -> list[int]:
        return [sum(tensor.nbytes for tensor in self.tensors(unet) if tensor.data_ptr() in self.addresses) for unet in self.unets]


@pytest.mark.parametrize("ratio", [0, 0.5, 1])
def test_offload_switch_holds_one_u_net_and_never_more_than_the_larger_one_would_take(monkeypatch, ratio):
    plain = draw(stitch(tiny_sd(), small_sd()), unet_s_ratio=ratio)
    accelerator = Accelerator(monkeypatch)
    pipe = stitch(tiny_sd(), small_sd(), offload="switch")
    accelerator.watch(pipe)
    small, large = accelerator.sizes()
    assert torch.equal(draw(pipe, unet_s_ratio=ratio), plain)
    assert max(sum(resident) for _, _, resident in accelerator.events) <= large
    for what, k, resident in accelerator.events:
        assert what != "call" or resident[k] == accelerator.sizes()[k], "the running one is whole"
    assert accelerator.resident() == [0, 0], "after the last step the decoder has all the room"
    uploaded = {k for what, k, _ in accelerator.events if what == "upload"}
    assert uploaded == {0: {1}, 1: {0}}.get(ratio, {0, 1}), "what no step needs stays where it is"
    if 0 < ratio < 1:
        first_call = next(resident for what, _, resident in accelerator.events if what == "call")
        assert first_call[0] == small
        assert 0.5 * (large - small) < first_call[1] <= large - small, "the large one is on its way while the small one works"
        order = [(what, k) for what, k, _ in accelerator.events]
        assert order.index(("upload", 1)) < order.index(("call", 0))
    assert torch.equal(draw(pipe, unet_s_ratio=ratio), plain)


def test_offload_switch_leaves_nothing_on_the_device_when_a_call_breaks_off(monkeypatch):
    accelerator = Accelerator(monkeypatch)
    pipe = stitch(tiny_sd(), small_sd(), offload="switch")
    accelerator.watch(pipe)

    def fail(_: DiffusionPipeline, step: int, *__: object) -> dict:
        assert sum(accelerator.resident()) > 0
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(pipe, unet_s_ratio=0.5, callback_on_step_end=fail)
    assert accelerator.resident() == [0, 0]


def test_offload_switch_follows_pipe_to_only_when_it_samples():
    pipe = stitch(tiny_sd(), small_sd(), offload="switch")
    pipe.unet.to("meta")
    assert pipe.unet.device == torch.device("meta")
    assert {parameter.device.type for parameter in pipe.unet.parameters()} == {"cpu"}
    pipe.to("cpu")
    assert draw(pipe, unet_s_ratio=0.5).device.type == "cpu"
    assert unstitch(pipe).unet.device.type == "cpu"


@pytest.mark.gpu
def test_on_a_gpu_switching_gives_the_same_latents_and_leaves_no_u_net_there():
    plain = draw(stitch(tiny_sd(), small_sd()).to("cuda"), unet_s_ratio=0.5)
    pipe = stitch(tiny_sd(), small_sd(), offload="switch").to("cuda")
    for _ in range(2):
        torch.testing.assert_close(draw(pipe, unet_s_ratio=0.5), plain)
        assert {parameter.device.type for parameter in pipe.unet.parameters()} == {"cpu"}


@pytest.mark.parametrize("offload", ["none", "switch"])
@pytest.mark.parametrize("order", ["hooks first", "stitched first"])
def test_results_do_not_depend_on_the_offload_mode(offload, order):
    plain = draw(stitch(tiny_sd(), small_sd()), unet_s_ratio=0.5)
    pipe = tiny_sd()
    if order == "hooks first":
        pipe.enable_model_cpu_offload(device="cpu")
    stitch(pipe, small_sd(), offload=offload)
    if order == "stitched first":
        pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        assert torch.equal(draw(pipe, unet_s_ratio=0.5), plain)
    assert "_hf_hook" in vars(pipe.unet)
    unstitch(pipe)
    assert "_hf_hook" in vars(pipe.unet), "what was enabled stays enabled"
    assert torch.equal(draw(pipe), draw(tiny_sd()))


def test_a_pipeline_whose_weights_were_sent_away_is_refused():
    pipe = tiny_sd()
    with torch.device("meta"):
        pipe.unet = UNet2DConditionModel.from_config(pipe.unet.config)  # as enable_sequential_cpu_offload leaves it
    with pytest.raises(InputError, match="stitch first, then offload"):
        stitch(pipe, small_sd())


@pytest.mark.parametrize("offload", ["none", "switch"])
def test_the_memory_format_reaches_each_u_net(offload):
    pipe = stitch(tiny_sd(), small_sd(), offload=offload)
    pipe.unet.to(memory_format=torch.channels_last)
    assert all(unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last) for unet in pipe.unet.unets)


def test_an_unknown_offload_is_refused_before_anything_changes():
    pipe = tiny_sd()
    with pytest.raises(InputError, match="unknown offload 'swap'; choose from none, switch"):
        stitch(pipe, small_sd(), offload="swap")
    assert type(pipe) is StableDiffusionPipeline


@pytest.mark.parametrize("offload", ["none", "switch"])
def test_the_small_u_net_takes_the_number_type_of_the_large_one_and_both_follow_the_pipeline(offload):
    pipe = stitch(tiny_sd().to(torch.bfloat16), small_sd(), offload=offload)
    assert {parameter.dtype for parameter in pipe.unet.parameters()} == {torch.bfloat16}
    assert draw(pipe, unet_s_ratio=0.5).dtype == torch.bfloat16
    pipe.to(torch.float64)
    assert {parameter.dtype for parameter in pipe.unet.parameters()} == {torch.float64}
    assert draw(pipe, unet_s_ratio=0.5).dtype == torch.float64
