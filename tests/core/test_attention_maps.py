"""Attention as the layers compute it: what it is, which layers there are, and that looking changes nothing."""

import math
import weakref
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from uldm_cli.core.attention_maps import (
    AttentionLayer,
    View,
    captured,
    chosen,
    layer_maps,
    layers,
    mean_map,
    probabilities,
)
from uldm_cli.core.blocks import SelfAttention
from uldm_cli.core.denoiser import Denoiser
from uldm_cli.core.noise import PerSampleNoise
from uldm_cli.core.schedules import VariancePreserving, scaled_linear_betas
from uldm_cli.core.transformer import CrossAttention
from uldm_cli.core.unet import AttentionBlock, UNet, UNetConfig
from uldm_cli.errors import UldmError, UsageError
from uldm_cli.specs.samplers import DDIM

SIZE = (8, 12)
BASE = UNetConfig(
    in_channels=3,
    out_channels=3,
    model_channels=32,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(1, 2),
    num_heads=None,
    num_head_channels=16,
    dropout=0.0,
    use_scale_shift_norm=False,
    resblock_updown=False,
)
VARIANTS = {
    "plain": BASE,
    "new-order": replace(BASE, use_new_attention_order=True),
    "updown": replace(BASE, resblock_updown=True),
    "context": replace(BASE, use_spatial_transformer=True, context_dim=24, transformer_depth=2),
}
every_variant = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)

Captured = dict[str, Tensor]
"""Attention `[N, heads, Q, K]` by the layer's name."""


def unet(config: UNetConfig) -> UNet:
    """With no weight zero: an untrained U-Net's last layers are."""
    torch.manual_seed(0)
    module = UNet(config)
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return module.requires_grad_(False).eval()


def inputs(count: int = 2) -> Tensor:
    return torch.randn(count, 3, *SIZE, generator=torch.Generator().manual_seed(1))


def call(module: UNet, x: Tensor) -> Tensor:
    """With a context of five tokens where the U-Net reads one."""
    context = torch.randn(len(x), 5, 24, generator=torch.Generator().manual_seed(2)).to(x.dtype)
    return module(x, torch.tensor([400]), context if module.config.context_dim else None)


def all_of(module: UNet, x: Tensor) -> Captured:
    """Everything that its layers show."""
    seen: dict[str, list[Tensor]] = {}
    with captured(module, layers(module), lambda layer, _, p: seen.setdefault(layer.name, []).append(p)):
        call(module, x)
    return {name: torch.stack(rows) for name, rows in seen.items()}


class Looking(nn.Module):
    """Attention layers one after the other, given their weights: each a map from all positions to all."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(SelfAttention(32, 2, 32) for _ in range(count)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def test_layers_are_listed_as_they_compute() -> None:
    there = layers(unet(BASE))
    assert there == [
        AttentionLayer("input_blocks.1.1", 1, 2, "self"),
        AttentionLayer("input_blocks.3.1", 2, 4, "self"),
        AttentionLayer("middle_block.1", 2, 4, "self"),
        AttentionLayer("output_blocks.0.1", 2, 4, "self"),
        AttentionLayer("output_blocks.1.1", 2, 4, "self"),
        AttentionLayer("output_blocks.2.1", 1, 2, "self"),
        AttentionLayer("output_blocks.3.1", 1, 2, "self"),
    ]
    assert layers(unet(VARIANTS["updown"])) == there
    assert layers(unet(replace(BASE, conv_resample=False))) == there


def test_transformers_have_attention_of_both_kinds() -> None:
    there = layers(unet(VARIANTS["context"]))
    inside = [(layer.name, layer.kind) for layer in there if layer.name.startswith("middle_block")]
    blocks = "middle_block.1.transformer_blocks"
    assert inside == [
        (f"{blocks}.{depth}.attn{number}", kind) for depth in (0, 1) for number, kind in ((1, "self"), (2, "cross"))
    ]


@every_variant
def test_factors_are_those_of_the_maps(config: UNetConfig) -> None:
    module = unet(config)
    shown = all_of(module, inputs(1))
    assert [shown[layer.name].shape[1:3] for layer in layers(module)] == [
        (layer.heads, 96 // layer.factor**2) for layer in layers(module)
    ]


@every_variant
def test_rows_sum_to_one(config: UNetConfig) -> None:
    for shown in all_of(unet(config), inputs()).values():
        assert shown.min() >= 0
        torch.testing.assert_close(shown.sum(-1), torch.ones(shown.shape[:-1]))


def queries_and_keys(layer: nn.Module, x: Tensor, context: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Of each head, `[Q, d]` and `[K, d]`, by hand from the weights and the layer's input: a map, or tokens."""
    if isinstance(layer, CrossAttention):
        q, k = (layer.to_q.weight @ x[0].T).T, (layer.to_k.weight @ context[0].T).T
        return list(q.chunk(layer.heads, dim=1)), list(k.chunk(layer.heads, dim=1))
    assert isinstance(layer, AttentionBlock)
    flat = layer.norm(x)[0].flatten(1).T
    qkv = flat @ layer.qkv.weight[..., 0].T + layer.qkv.bias
    if layer.new_order:
        q, k, _ = qkv.chunk(3, dim=1)
        return list(q.chunk(layer.heads, dim=1)), list(k.chunk(layer.heads, dim=1))
    of_heads = [part.chunk(3, dim=1) for part in qkv.chunk(layer.heads, dim=1)]
    return [q for q, _, _ in of_heads], [k for _, k, _ in of_heads]


@every_variant
def test_captured_attention_is_the_softmax_of_queries_and_keys(config: UNetConfig) -> None:
    module = unet(config)
    arguments: dict[str, tuple[Tensor, ...]] = {}
    hooks = [
        module.get_submodule(layer.name).register_forward_pre_hook(
            lambda _, given, name=layer.name: arguments.update({name: given})
        )
        for layer in layers(module)
    ]
    shown = all_of(module, inputs(1))
    for hook in hooks:
        hook.remove()
    for layer in layers(module):
        x, *context = arguments[layer.name]
        pairs = zip(*queries_and_keys(module.get_submodule(layer.name), x, *context or (x,)), strict=True)
        for head, (q, k) in enumerate(pairs):
            scores = (q @ k.T / math.sqrt(q.shape[1])).exp()
            torch.testing.assert_close(shown[layer.name][0, head], scores / scores.sum(1, keepdim=True))


def test_an_autoencoder_shows_its_attention() -> None:
    layer = SelfAttention(32, 4, 32)
    shown = {}
    there = layers(nn.Sequential(layer))
    with captured(nn.Sequential(layer), there, lambda *given: shown.update({given[1]: given[2]})):
        layer(torch.randn(2, 32, 3, 5))
    assert [p.shape for p in shown.values()] == [(4, 15, 15)] * 2


@every_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_looking_changes_nothing(config: UNetConfig, dtype: torch.dtype) -> None:
    module, x = unet(config).to(dtype), inputs().to(dtype)
    before, during = call(module, x), []
    layer_maps(module, lambda: during.append(call(module, x)), SIZE, View())
    assert torch.equal(during[0], before)
    assert torch.equal(call(module, x), before)


def test_images_are_the_same_whether_one_looks_or_not() -> None:
    denoiser = Denoiser(unet(BASE), VariancePreserving(scaled_linear_betas(50, 0.0015, 0.0195)), "eps")

    def sampled(look: bool) -> list[Tensor]:
        noise, states = PerSampleNoise([3, 4], (3, *SIZE)), []
        for step in DDIM(steps=4, eta=1.0).build()(denoiser, noise.initial(), denoiser.schedule, noise):
            states.append(step.x)
            if look:
                layer_maps(denoiser.backbone, lambda: denoiser(step.x_in, step.t), SIZE, View(rollout=True))  # noqa: B023
        return states

    assert all(map(torch.equal, sampled(True), sampled(False)))


def test_one_sample_of_one_layer_is_held() -> None:
    module, before, shown = unet(BASE), [], []

    def see(layer: AttentionLayer, sample: int, attention: Tensor) -> None:
        assert all(reference() is None for reference in before)
        before.append(weakref.ref(attention))
        shown.append((layer.name, sample))

    with captured(module, layers(module), see):
        call(module, inputs())
    assert shown == [(layer.name, sample) for layer in layers(module) for sample in (0, 1)]


def test_a_failure_ends_the_watch() -> None:
    module = unet(BASE)
    with pytest.raises(RuntimeError), captured(module, layers(module), lambda *_: None):
        raise RuntimeError
    assert all(module.get_submodule(layer.name).watch is None for layer in layers(module))


@every_variant
def test_received_attention_is_the_mean_over_heads_and_queries(config: UNetConfig) -> None:
    module = unet(config)
    shown, found = all_of(module, inputs()), layer_maps(module, lambda: call(module, inputs()), SIZE, View())
    wanted = [layer for layer in layers(module) if layer.kind == "self"]
    assert list(found) == [layer.name for layer in wanted]
    for layer in wanted:
        expected = shown[layer.name].mean((1, 2)).view(2, 8 // layer.factor, 12 // layer.factor)
        torch.testing.assert_close(found[layer.name], expected)


def test_one_layer_one_head_one_resolution() -> None:
    module = unet(BASE)
    shown = all_of(module, inputs())

    def maps(view: View) -> dict[str, Tensor]:
        return layer_maps(module, lambda: call(module, inputs()), SIZE, view)

    assert list(maps(View(layer="middle_block.1"))) == ["middle_block.1"]
    assert list(maps(View(factor=1))) == ["input_blocks.1.1", "output_blocks.2.1", "output_blocks.3.1"]
    second = maps(View(layer="output_blocks.2.1", head=1))["output_blocks.2.1"]
    torch.testing.assert_close(second, shown["output_blocks.2.1"][:, 1].mean(1).view(2, 8, 12))


def test_a_point_of_the_image_is_the_position_below_it() -> None:
    """In an image four times as large as the input."""
    module = unet(BASE)
    shown = all_of(module, inputs())
    view = View(query=(45, 30), image=(32, 48))
    found = layer_maps(module, lambda: call(module, inputs()), SIZE, view)
    fine, coarse = shown["input_blocks.1.1"].mean(1), shown["middle_block.1"].mean(1)
    torch.testing.assert_close(found["input_blocks.1.1"], fine[:, 7 * 12 + 11].view(2, 8, 12))
    torch.testing.assert_close(found["middle_block.1"], coarse[:, 3 * 6 + 5].view(2, 4, 6))


def test_a_token_of_the_context() -> None:
    module = unet(VARIANTS["context"])
    shown = all_of(module, inputs())
    found = layer_maps(module, lambda: call(module, inputs()), SIZE, View(token=3))
    assert list(found) == [layer.name for layer in layers(module) if layer.kind == "cross"]
    name = "middle_block.1.transformer_blocks.1.attn2"
    torch.testing.assert_close(found[name], shown[name].mean(1)[:, :, 3].view(2, 4, 6))


def test_what_all_look_at_is_lit_on_the_right_position() -> None:
    module = Looking(1)
    layer = module.layers[0]
    for part in (layer.q, layer.k):  # whoever has a large first channel is looked at
        part.weight.data.zero_()
        part.bias.data.zero_()
    layer.q.bias.data += 3
    layer.k.weight.data[:, 0] = 5
    x = torch.zeros(1, 32, 4, 6)
    x[:, 0, 1, 5] = 1
    found = layer_maps(module, lambda: module(x), (4, 6), View())["layers.0"]
    assert found[0, 1, 5] > 0.99
    torch.testing.assert_close(found.sum(), torch.tensor(1.0))


@pytest.mark.parametrize("point", [None, (5, 2)])
def test_rollout_of_two_layers_is_the_formula(point: tuple[int, int] | None) -> None:
    """(I + A2)/2 (I + A1)/2, rows normalised: the later layer looks at what the earlier one has mixed."""
    torch.manual_seed(0)
    module, x = Looking(2), 3 * torch.randn(2, 32, 4, 6)
    for parameter in module.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape)
    seen: dict[str, list[Tensor]] = {"layers.0": [], "layers.1": []}
    with captured(module, layers(module), lambda layer, _, p: seen[layer.name].append(p.mean(0))):
        module(x)
    one, two = (torch.stack(rows) + torch.eye(24) for rows in seen.values())
    flow = (two / two.sum(-1, keepdim=True)) @ (one / one.sum(-1, keepdim=True))
    expected = flow.mean(1) if point is None else flow[:, point[1] * 6 + point[0]]
    found = layer_maps(module, lambda: module(x), (4, 6), View(rollout=True, query=point, image=(4, 6)))
    assert list(found) == ["rollout/1"]
    torch.testing.assert_close(found["rollout/1"], expected.view(2, 4, 6))
    assert not torch.allclose(flow, flow.mT)


def test_a_rollout_is_made_for_each_resolution() -> None:
    module = unet(BASE)
    shown = {name: p.mean(1) for name, p in all_of(module, inputs()).items()}
    found = layer_maps(module, lambda: call(module, inputs()), SIZE, View(rollout=True))
    assert {name: values.shape for name, values in found.items()} == {"rollout/1": (2, 8, 12), "rollout/2": (2, 4, 6)}
    flow = torch.eye(96)
    for layer in layers(module):
        if layer.factor == 1:
            flow = (torch.eye(96) + shown[layer.name]) / 2 @ flow
    torch.testing.assert_close(found["rollout/1"], flow.mean(1).view(2, 8, 12))


def test_the_mean_map_keeps_shares() -> None:
    module = unet(BASE)
    maps = layer_maps(module, lambda: call(module, inputs()), SIZE, View())
    mean = mean_map(maps)
    assert mean.shape == (2, *SIZE)
    torch.testing.assert_close(mean.sum((1, 2)), torch.ones(2))
    torch.testing.assert_close(mean_map({"fine": maps["input_blocks.1.1"]}), maps["input_blocks.1.1"])


def test_all_resolutions_count_alike_in_the_mean() -> None:
    even = {"fine": torch.full((1, 4, 4), 1 / 16), "coarse": torch.full((1, 2, 2), 1 / 4)}
    torch.testing.assert_close(mean_map(even), even["fine"])
    tokens = {"fine": torch.full((1, 4, 4), 0.2), "coarse": torch.full((1, 2, 2), 0.6)}
    torch.testing.assert_close(mean_map(tokens, shares=False), torch.full((1, 4, 4), 0.4))


def test_probabilities_of_rounded_numbers_are_computed_in_float32() -> None:
    q, k = (torch.randn(2, size, 8).bfloat16() for size in (3, 5))
    found = probabilities(q, k)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.softmax(q.float() @ k.float().mT / 8**0.5, dim=-1))


@pytest.mark.parametrize(
    ("view", "message"),
    [
        (View(layer="middle_block.2"), "Did you mean middle_block.1.* There is: input_blocks.1.1, input_blocks.3.1"),
        (View(factor=4), "no self-attention at factor 4. There is at: 1, 2"),
        (View(layer="middle_block.1", factor=1), "at factor 1. There is at: 2"),
        (View(head=3), "a head 3. Layer input_blocks.1.1 has 2, from 0 to 1"),
        (View(head=-1), "a head -1"),
        (View(factor=2, head=4), "Layer input_blocks.3.1 has 4"),
        (View(query=(48, 3), image=(32, 48)), "no point 48,3. x is from 0 to 47, y from 0 to 31"),
        (View(query=(3, -1), image=(32, 48)), "no point 3,-1"),
        (View(query=(3, 1)), "size of the image"),
        (View(token=0), "this model has no cross-attention"),
        (View(token=0, rollout=True), "Leave one out"),
    ],
)
def test_what_is_not_there(view: View, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        chosen(layers(unet(BASE)), view)


def test_a_model_without_attention() -> None:
    assert layers(nn.Conv2d(3, 3, 3)) == []
    with pytest.raises(UsageError, match="this model has no self-attention"):
        chosen([], View())


def test_a_token_that_the_context_lacks() -> None:
    module = unet(VARIANTS["context"])
    with pytest.raises(UsageError, match=r"no token 5\. The context has 5, counted from 0"):
        layer_maps(module, lambda: call(module, inputs()), SIZE, View(token=5))


def test_maps_of_another_size_than_said() -> None:
    module = unet(BASE)
    with pytest.raises(UldmError, match=r"input_blocks.1.1 is not on a map of 16 x 16. It has 96 positions"):
        layer_maps(module, lambda: call(module, inputs()), (16, 16), View())


def test_a_network_that_does_not_run() -> None:
    with pytest.raises(UldmError, match=r"did not show the attention of its layer input_blocks.1.1"):
        layer_maps(unet(BASE), lambda: None, SIZE, View())
