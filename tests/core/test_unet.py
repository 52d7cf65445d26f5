"""The U-Net's shapes and switches. That its numbers are the reference's is shown in test_golden."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from uldm_cli.core.transformer import SpatialTransformer
from uldm_cli.core.unet import AttentionBlock, Downsample, ResBlock, UNet, UNetConfig, Upsample, timestep_embedding
from uldm_cli.errors import UsageError

BASE = UNetConfig(
    in_channels=3,
    out_channels=5,
    model_channels=32,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(2,),
    num_heads=None,
    num_head_channels=16,
    dropout=0.0,
    use_scale_shift_norm=False,
    resblock_updown=False,
)
VARIANTS = {
    "plain": BASE,
    "heads": replace(BASE, num_heads=4, num_head_channels=None),
    "scale-shift": replace(BASE, use_scale_shift_norm=True),
    "updown": replace(BASE, resblock_updown=True),
    "deep": replace(BASE, channel_mult=(1, 1, 2), num_res_blocks=2, attention_resolutions=(1, 4)),
    "one-level": replace(BASE, channel_mult=(2,), attention_resolutions=()),
    "pooled": replace(BASE, conv_resample=False),
    "new-order": replace(BASE, use_new_attention_order=True),
    "context": replace(BASE, use_spatial_transformer=True, context_dim=24, transformer_depth=2),
    "classes": replace(BASE, num_classes=1000),
}
every_variant = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)


def unet(config: UNetConfig) -> UNet:
    """With no weight zero: an untrained U-Net's last layers are."""
    torch.manual_seed(0)
    module = UNet(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return module


def inputs(count: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, 8, 12, generator=generator), torch.randint(0, 1000, (count,), generator=generator)


def call(module: UNet, x: Tensor, t: Tensor) -> Tensor:
    """With a context or labels for those that need them, which are samples' own: made of their timesteps."""
    c = module.config
    t = t.expand(len(x))
    context = (
        torch.sin(t[:, None, None] * torch.arange(1, 3 * c.context_dim + 1).view(3, -1)) if c.context_dim else None
    )
    return module(x, t, None if context is None else context.to(x.dtype), t if c.num_classes else None)


@every_variant
def test_output_has_the_size_of_the_input(config: UNetConfig) -> None:
    x, t = inputs()
    out = call(unet(config), x, t)
    assert out.shape == (2, 5, 8, 12)
    assert out.isfinite().all()


def test_untrained_it_predicts_zero() -> None:
    assert not UNet(BASE)(*inputs()).any()


@every_variant
def test_every_parameter_learns(config: UNetConfig) -> None:
    module = unet(config)
    call(module, *inputs()).square().sum().backward()
    without = [name for name, p in module.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


@every_variant
def test_one_timestep_for_all_is_the_same_as_one_each(config: UNetConfig) -> None:
    module, (x, _) = unet(config), inputs()
    told = {"context": torch.ones(2, 3, 24)} if config.context_dim else {}
    told |= {"y": torch.tensor([1, 2])} if config.num_classes else {}
    torch.testing.assert_close(module(x, torch.tensor([7]), **told), module(x, torch.tensor([7, 7]), **told))


@every_variant
def test_samples_are_independent_and_see_their_own_timestep(config: UNetConfig) -> None:
    module, (x, t) = unet(config), inputs(3)
    together = call(module, x, t)
    for i in range(3):
        torch.testing.assert_close(call(module, x[i : i + 1], t[i : i + 1]), together[i : i + 1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(call(module, x, t.flip(0)), together, rtol=1e-2, atol=1e-3)


@every_variant
def test_channels_last_gives_the_same(config: UNetConfig) -> None:
    module, (x, t) = unet(config), inputs()
    contiguous = call(module, x, t)
    module.to(memory_format=torch.channels_last)
    last = call(module, x.contiguous(memory_format=torch.channels_last), t)
    torch.testing.assert_close(last, contiguous, rtol=1e-4, atol=1e-5)


@every_variant
def test_bfloat16_is_near_float32(config: UNetConfig) -> None:
    module, (x, t) = unet(config), inputs()
    exact = call(module, x, t)
    low = call(module.to(torch.bfloat16), x.bfloat16(), t)
    assert low.dtype == torch.bfloat16
    assert 0 < (low.float() - exact).norm() < 0.02 * exact.norm()


def kinds(module: nn.Module) -> list[str]:
    """What an input or output block is made of."""
    return [type(layer).__name__ for layer in module]


def test_attention_is_at_the_factors_that_are_named() -> None:
    """Block by block: three levels of two residual blocks, factors 1, 2 and 4."""
    module = UNet(replace(BASE, channel_mult=(1, 1, 2), num_res_blocks=2, attention_resolutions=(1, 4)))
    plain, attended = ["ResBlock"], ["ResBlock", "AttentionBlock"]
    assert [kinds(block) for block in module.input_blocks] == [
        ["Conv2d"],
        *(attended, attended, ["Downsample"]),
        *(plain, plain, ["Downsample"]),
        *(attended, attended),
    ]
    assert kinds(module.middle_block) == ["ResBlock", "AttentionBlock", "ResBlock"]
    assert [kinds(block) for block in module.output_blocks] == [
        *(attended, attended, [*attended, "Upsample"]),
        *(plain, plain, [*plain, "Upsample"]),
        *(attended, attended, attended),
    ]


def test_residual_blocks_change_the_size_where_asked() -> None:
    def resampling(module: UNet) -> list[int]:
        return [layer.resample for layer in module.modules() if isinstance(layer, ResBlock) and layer.resample]

    assert resampling(UNet(VARIANTS["plain"])) == []
    assert resampling(UNet(VARIANTS["updown"])) == [-1, 1]
    assert not any(isinstance(layer, Downsample | Upsample) for layer in UNet(VARIANTS["updown"]).modules())


@pytest.mark.parametrize(
    ("fields", "heads"),
    [({"num_heads": 4, "num_head_channels": None}, 4), ({"num_heads": None, "num_head_channels": 16}, 4)],
)
def test_number_of_heads(fields: dict[str, int | None], heads: int) -> None:
    assert AttentionBlock(64, replace(BASE, **fields)).heads == heads


def test_heads_matter() -> None:
    one, four = (unet(replace(BASE, num_heads=heads, num_head_channels=None)) for heads in (1, 4))
    four.load_state_dict(one.state_dict())
    assert not torch.allclose(one(*inputs()), four(*inputs()), rtol=1e-2, atol=1e-3)


def test_attention_mixes_all_positions() -> None:
    block = AttentionBlock(32, replace(BASE, num_heads=2, num_head_channels=None))
    nn.init.normal_(block.proj_out.weight, std=0.1)
    x = torch.randn(1, 32, 4, 4, requires_grad=True)
    block(x)[0, :, 0, 0].sum().backward()
    assert (x.grad.abs().sum(1) > 0).all()


@pytest.mark.parametrize("new_order", [False, True])
def test_order_of_q_k_and_v_in_the_weights(new_order: bool) -> None:
    """Attention of two heads written out, from the rows of the weights that each order means."""
    block = AttentionBlock(32, replace(BASE, num_heads=2, num_head_channels=None, use_new_attention_order=new_order))
    torch.manual_seed(0)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(1, 32, 2, 3)
    rows = block.qkv(block.norm(x)).flatten(2)[0]  # (96, 6)
    heads = []
    for head in range(2):
        starts = [16 * head, 32 + 16 * head, 64 + 16 * head] if new_order else [48 * head + 16 * i for i in range(3)]
        q, k, v = (rows[start : start + 16] for start in starts)
        heads.append(v @ torch.softmax(q.T @ k / 4, dim=1).T)
    mixed = torch.cat(heads).view(1, 32, 2, 3)
    torch.testing.assert_close(block(x), x + block.proj_out(mixed), rtol=1e-4, atol=1e-5)


def test_size_changes_without_convolutions() -> None:
    module = UNet(VARIANTS["pooled"])
    down, up = module.input_blocks[2][0], module.output_blocks[1][-1]
    assert not [*down.parameters(), *up.parameters()]
    x = torch.rand(1, 32, 4, 6)
    torch.testing.assert_close(down(x), x.view(1, 32, 2, 2, 3, 2).mean((3, 5)))
    torch.testing.assert_close(up(x), x.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_transformers_read_the_context() -> None:
    """Where there is attention, and in the middle."""
    module = unet(VARIANTS["context"])
    assert sum(isinstance(layer, SpatialTransformer) for layer in module.modules()) == 4
    assert not any(isinstance(layer, AttentionBlock) for layer in module.modules())
    context = torch.ones(2, 3, 24, requires_grad=True)
    module(*inputs(), context).square().sum().backward()
    assert context.grad.abs().sum(2).all()


def test_labels_change_the_prediction() -> None:
    module, (x, t) = unet(VARIANTS["classes"]), inputs()
    one, other = (module(x, t, y=torch.tensor([0, label])) for label in (1, 2))
    assert torch.equal(one[0], other[0])
    assert not torch.allclose(one[1], other[1], rtol=1e-2, atol=1e-3)


WIDE = replace(BASE, out_channels=3, num_res_blocks=2, channel_mult=(1, 2, 3, 4), attention_resolutions=(2, 4, 8))
HEADS_8 = {"num_heads": 8, "num_head_channels": None}
PUBLISHED = {
    "celebahq256": (replace(WIDE, model_channels=224, num_head_channels=32), 274.06),
    "inpainting_big": (replace(WIDE, in_channels=7, model_channels=256, resblock_updown=True, **HEADS_8), 387.25),
    "cin256-v2": (
        replace(
            WIDE,
            model_channels=192,
            channel_mult=(1, 2, 3, 5),
            num_heads=1,
            num_head_channels=None,
            use_spatial_transformer=True,
            context_dim=512,
        ),
        400.92,
    ),
    "txt2img-large": (
        replace(
            WIDE,
            in_channels=4,
            out_channels=4,
            model_channels=320,
            channel_mult=(1, 2, 4, 4),
            attention_resolutions=(1, 2, 4),
            use_spatial_transformer=True,
            context_dim=1280,
            **HEADS_8,
        ),
        872.30,
    ),
}


@pytest.mark.parametrize(("config", "millions"), PUBLISHED.values(), ids=PUBLISHED)
def test_published_models_have_as_many_parameters_as_their_code_counts(config: UNetConfig, millions: float) -> None:
    with torch.device("meta"):
        module = UNet(config)
    assert round(sum(p.numel() for p in module.parameters()) / 1e6, 2) == millions


CONTEXT = torch.zeros(2, 3, 24)


@pytest.mark.parametrize(
    ("variant", "told", "message"),
    [
        ("context", {}, "this U-Net needs a context. Give it a tensor of the shape [N, L, 24]"),
        ("context", {"context": CONTEXT[:, :, 1:]}, "the context has the shape [2, 3, 23]. Expected [2, L, 24]"),
        ("context", {"context": CONTEXT[:1]}, "the context has the shape [1, 3, 24]. Expected [2, L, 24]"),
        ("context", {"context": CONTEXT[:, 0]}, "the context has the shape [2, 24]. Expected [2, L, 24]"),
        ("context", {"context": CONTEXT, "y": torch.tensor([0, 1])}, "class labels cannot be given to this U-Net"),
        ("plain", {"context": CONTEXT}, "a context cannot be given to this U-Net. It was made without"),
        ("classes", {}, "this U-Net needs class labels. Give it a tensor of the shape [N]"),
        ("classes", {"y": torch.tensor([1])}, "the class labels have the shape [1]. Expected [2], one a sample"),
    ],
)
def test_conditions_that_do_not_fit(variant: str, told: dict[str, Tensor], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        unet(VARIANTS[variant])(*inputs(), **told)
    assert str(caught.value).startswith(message)


def test_an_input_without_its_concatenated_condition() -> None:
    with pytest.raises(UsageError) as caught:
        UNet(replace(BASE, in_channels=7))(*inputs())
    says = "the U-Net's input has 3 channels. It takes 7, of which a condition may be a part"
    assert str(caught.value) == says


def test_dropout_only_in_training() -> None:
    module = unet(replace(BASE, dropout=0.5))
    module.eval()
    assert torch.equal(module(*inputs()), module(*inputs()))
    module.train()
    assert not torch.equal(module(*inputs()), module(*inputs()))


def test_normalisations() -> None:
    """So small a difference as that of 1e-5 to the autoencoders' 1e-6 would not show in the outputs."""
    norms = [layer for layer in UNet(BASE).modules() if isinstance(layer, nn.GroupNorm)]
    assert {(norm.num_groups, norm.eps) for norm in norms} == {(32, 1e-5)}


@pytest.mark.parametrize("dim", [32, 33])
def test_timestep_embedding_is_that_of_diffusers(dim: int) -> None:
    from diffusers.models.embeddings import get_timestep_embedding

    t = torch.tensor([0, 1, 17, 999])
    theirs = get_timestep_embedding(t, dim, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(timestep_embedding(t, dim), theirs, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_channels": 48}, "model_channels is 48. It must be a multiple of 32"),
        ({"num_head_channels": None}, "needs num_heads or num_head_channels. Set one of the two"),
        ({"num_heads": 4}, "needs num_heads or num_head_channels. Set one of the two"),
        ({"num_head_channels": 48}, "num_head_channels is 48. It must divide the 64 channels"),
        ({"num_head_channels": 128}, "num_head_channels is 128. It must divide the 64 channels"),
        ({"num_head_channels": None, "num_heads": 3}, "num_heads is 3. It must divide the 64 channels"),
        ({"use_spatial_transformer": True}, "use_spatial_transformer goes together with context_dim"),
        ({"context_dim": 8}, "use_spatial_transformer goes together with context_dim"),
    ],
)
def test_impossible_configs(fields: dict[str, int | None], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        UNet(replace(BASE, **fields))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
