"""The training loop: against a plain one, resumed, looked at, and with several optimizers a step."""

import math
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from uldm_cli.core import rng
from uldm_cli.core.autoencoding import AutoencoderTask, ReconstructionWeights
from uldm_cli.core.data import Batch
from uldm_cli.core.diffusing import DiffusionTask
from uldm_cli.core.engine import Engine
from uldm_cli.core.latent import LatentDiffusion
from uldm_cli.core.noise import PerSampleNoise
from uldm_cli.core.rng import STREAM_FLIP
from uldm_cli.core.training import Optimization, Task, Trainer, to_float
from uldm_cli.core.vqvae import VQVAE
from uldm_cli.formats.native import load_tensors
from uldm_cli.formats.tensors import write_safetensors
from uldm_cli.specs.autoencoders import VQVAE as VQVAESpec
from uldm_cli.specs.models import LatentDiffusionModel
from uldm_cli.specs.samplers import DDIM

VQ = {
    "kind": "vqvae",
    "down_channels": [8, 16],
    "mid_channels": [16, 16],
    "down_sample": [True],
    "attn_down": [False],
    "num_down_layers": 1,
    "num_up_layers": 1,
    "num_heads": 2,
    "norm_channels": 4,
    "codebook_size": 16,
    "quantizer": {"kind": "ema", "decay": 0.9, "revive_below": 0.3},  # so that codes die and are revived meanwhile
}
LDM = {
    "autoencoder": VQ,
    "image_size": 16,
    "backbone": {"kind": "unet", "model_channels": 32, "channel_mult": [1, 1], "num_res_blocks": 1},
    "schedule": {"kind": "scaled_linear", "timesteps": 100},
    "target": "v",
    "scale_factor": 0.7,
}
LDM["backbone"]["attention_resolutions"] = [2]
STEPS = 20
COLOURS = torch.rand(24, 3, 3, 3, generator=torch.Generator().manual_seed(0))
IMAGES = (F.interpolate(COLOURS, size=16, mode="bilinear") * 255).to(torch.uint8)  # smooth, so there is much to learn


pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def batches(start: int = 0, size: int = 4) -> Iterator[Batch]:
    """Of the steps after `start`."""
    for first in count(start * size, size):
        number = torch.arange(first, first + size)
        yield Batch(IMAGES[number % len(IMAGES)], torch.full((size,), -1), number)


def optimization(**changes: object) -> Optimization:
    fields = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1, "warmup_steps": 4, "decay": "cosine"}
    return Optimization(**fields | {"clip_norm": 0.5, "steps": STEPS} | changes)


def vqvae(seed: int = 0) -> VQVAE:
    torch.manual_seed(seed)
    return VQVAESpec.model_validate(VQ).build().to(memory_format=torch.channels_last)


def ldm(seed: int = 0) -> LatentDiffusion:
    torch.manual_seed(seed)
    model = LatentDiffusionModel.model_validate(LDM).build()
    model.denoiser.backbone.to(memory_format=torch.channels_last)
    return model


def autoencoder_task(seed: int = 0) -> tuple[Task, nn.Module]:
    model = vqvae(seed)
    return AutoencoderTask(model, ReconstructionWeights(l1=1, l2=1, lpips=0, codebook=1, commitment=0.25), None), model


def diffusion_task(seed: int = 0) -> tuple[Task, nn.Module]:
    model = ldm(seed)
    return DiffusionTask(model, seed=3), model.denoiser.backbone


def trainer(task_and_averaged: tuple[Task, nn.Module], *, precision: str = "fp32", device: str = "cpu") -> Trainer:
    return Trainer(*task_and_averaged, Engine(device, precision), optimization(), ema_decay=0.99, flip_seed=5)


def everything(trainer: Trainer) -> dict[str, Tensor]:
    """All that a step changes."""
    parts = {"task": trainer.task.state_dict(), "ema": trainer.ema.state, "optimizer": trainer.state_dict()}
    return {f"{part}.{name}": value for part, state in parts.items() for name, value in state.items()}


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert different == []


both_tasks = pytest.mark.parametrize("make", [autoencoder_task, diffusion_task])


@both_tasks
def test_resumed_is_the_same_bit_for_bit(make, tmp_path: Path) -> None:
    """20 steps, and 10, saved, loaded into new modules that began otherwise, and 10 more."""
    whole = trainer(make())
    losses = [record.logs["loss"].item() for record in whole.fit(batches())]

    first = trainer(make())
    list(islice(first.fit(batches()), 10))
    write_safetensors(tmp_path / "state.safetensors", everything(first), {})

    second = trainer(make(seed=1))
    second.task.load_state_dict(load_tensors(tmp_path / "state.safetensors", "task."))
    second.ema.load(load_tensors(tmp_path / "state.safetensors", "ema."), first.ema.updates)
    second.load_state_dict(load_tensors(tmp_path / "state.safetensors", "optimizer."))
    records = list(second.fit(batches(start=10), start=10))

    assert [record.step for record in records] == list(range(11, STEPS + 1))
    assert [record.logs["loss"].item() for record in records] == losses[10:]
    assert_same_bits(everything(second), everything(whole))


@both_tasks
def test_loaded_moments_lie_in_memory_as_their_parameters(make) -> None:
    """The fused optimizer pairs weights and moments by their place in memory, and a file holds them contiguous."""
    first = trainer(make())
    list(islice(first.fit(batches()), 2))
    contiguous = {name: value.contiguous() for name, value in first.state_dict().items()}
    second = trainer(make())
    second.load_state_dict(contiguous)
    layouts = set()
    for optimizer in second.optimizers.values():
        for parameter, state in optimizer.state.items():
            for moment in ("exp_avg", "exp_avg_sq"):
                assert state[moment].stride() == parameter.stride()
            layouts.add(parameter.is_contiguous())
    assert layouts == {True, False}  # some are channels last, else this has shown nothing
    assert_same_bits(second.state_dict(), first.state_dict())


@both_tasks
def test_what_looks_on_between_steps_changes_nothing(make) -> None:
    unseen = trainer(make())
    list(unseen.fit(batches()))
    seen = trainer(make())
    for record in seen.fit(batches()):
        torch.manual_seed(record.step)
        task = seen.task.eval()
        with torch.no_grad(), seen.ema.applied():
            task(task.phases[0], to_float(record.batches[0].image), record.batches[0].number)
    assert_same_bits(everything(seen), everything(unseen))


@both_tasks
def test_training_learns(make) -> None:
    """The same batch again and again: the loss falls to less than half, and the average follows."""
    run = trainer(make())
    batch = next(batches())
    losses = [record.logs["loss"].item() for record in run.fit([batch] * STEPS)]
    assert losses[-1] < 0.5 * losses[0]
    assert any(not torch.equal(value, run.ema._source[name]) for name, value in run.ema.state.items())


def test_steps_are_those_of_a_plain_loop() -> None:
    run = trainer(diffusion_task())
    records = list(run.fit(batches()))

    task, averaged = diffusion_task()
    parameters = task.trained("denoiser")
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=0.1, fused=True)
    average = {name: value.clone() for name, value in averaged.state_dict().items()}
    for step, batch, record in zip(range(1, STEPS + 1), batches(), records, strict=False):
        flipped = rng.coin(5, STREAM_FLIP, batch.number).view(-1, 1, 1, 1)
        image = to_float(batch.image)
        loss, _ = task("denoiser", torch.where(flipped, image.flip(3), image), batch.number)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.param_groups[0]["lr"] = record.lr
        optimizer.step()
        decay = min(0.99, (1 + step) / (10 + step))
        for name, value in averaged.state_dict().items():
            average[name] = decay * average[name] + (1 - decay) * value
        assert record.step == step
        assert record.lr == optimization().lr_at(step)
        torch.testing.assert_close(record.logs["loss"], loss.detach())
        torch.testing.assert_close(record.logs["denoiser_grad_norm"], norm)
    torch.testing.assert_close(dict(run.ema.state), average)


class Toy(Task):
    """Two phases that each see the other's weight; it keeps the images it was given."""

    phases = ("first", "second")

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterDict({"first": torch.tensor(1.0), "second": torch.tensor(2.0)})
        self.register_buffer("statistic", torch.tensor(0.0))
        self.images: list[Tensor] = []

    def trained(self, phase: str) -> list[nn.Parameter]:
        return [self.weights[phase]]

    def forward(self, phase: str, image: Tensor, number: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        self.images.append(image)
        loss = self.weights["first"] * self.weights["second"]
        return loss, {f"{phase}_loss": loss.detach()}

    def after_step(self, step: int) -> None:
        self.statistic.fill_(10 * step + self.weights["second"].item())


def toy_trainer(**changes: object) -> Trainer:
    settings = {"lr": 0.125, "weight_decay": 0.0, "warmup_steps": 0, "decay": "constant", "clip_norm": 100, "steps": 1}
    toy = Toy()
    return Trainer(toy, toy, Engine("cpu", "fp32"), optimization(**settings | changes), ema_decay=0.0, flip_seed=None)


def test_each_phase_steps_on_its_own_loss() -> None:
    """Adam's first step is the learning rate against the gradient's sign; both gradients are of the weights before."""
    run = toy_trainer()
    (record,) = run.fit(batches())
    weights = {name: value.item() for name, value in run.task.weights.items()}
    assert weights == pytest.approx({"first": 0.875, "second": 1.875})
    assert {name: value.item() for name, value in record.logs.items()} == pytest.approx(
        {"first_loss": 2.0, "first_grad_norm": 2.0, "second_loss": 2.0, "second_grad_norm": 1.0}
    )
    # The average (decay 0) is taken of everything at the end, also of what happens after the phases.
    assert run.ema.state["weights.second"].item() == pytest.approx(1.875)
    assert run.ema.state["statistic"].item() == pytest.approx(11.875)


def test_gradients_are_clipped_to_the_norm() -> None:
    """Adam's moment after one step is a tenth of the gradient that it got."""
    run = toy_trainer(clip_norm=0.5)
    list(run.fit(batches()))
    assert run.state_dict()["first.0.exp_avg"].item() == pytest.approx(0.1 * 0.5)


class Scaler(torch.amp.GradScaler):
    """That of fp16, which the CPU has, too; here it first overflows."""

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        super().unscale_(optimizer)
        self.unscaled = getattr(self, "unscaled", 0) + 1


def test_gradients_of_several_phases_are_scaled_and_unscaled_once() -> None:
    """As in fp16: the steps are those without a scaler, and one that overflows lowers the scale and changes nothing."""
    plain, scaled = toy_trainer(steps=3), toy_trainer(steps=3)
    scaled.engine._accelerator.scaler = Scaler("cpu", init_scale=2.0**60)
    list(plain.fit(batches()))
    with torch.no_grad():
        scaled.task.weights["first"].fill_(2.0**70)  # times the scale more than float32 holds
    [first] = islice(scaled.fit(batches()), 1)
    assert first.fault is not None
    assert not first.fault.spoilt
    assert scaled.engine.scaler.get_scale() == 2.0**59
    assert scaled.task.weights["first"].item() == 2.0**70
    with torch.no_grad():
        scaled.task.weights["first"].fill_(1.0)
    assert [record.fault for record in scaled.fit(batches())] == [None] * 3
    assert scaled.engine.scaler.unscaled == 2 * 4
    torch.testing.assert_close(dict(scaled.task.weights), dict(plain.task.weights))
    restored = toy_trainer(steps=3)
    restored.engine._accelerator.scaler = Scaler("cpu")
    restored.load_state_dict(scaled.state_dict())
    assert restored.engine.scaler.get_scale() == 2.0**59


def test_images_are_flipped_by_seed_and_number() -> None:
    run = toy_trainer(steps=3)
    run.flip_seed = 9
    list(run.fit(batches(size=8)))
    number = torch.arange(24)
    flipped = rng.coin(9, STREAM_FLIP, number)
    assert 0 < flipped.sum() < 24
    images = to_float(IMAGES)
    images[flipped] = images[flipped].flip(3)
    assert torch.equal(torch.cat(run.task.images[::2]), images)


def test_no_batch_is_read_that_is_not_trained_on() -> None:
    source = batches()
    records = list(toy_trainer(steps=5).fit(source, start=2))
    assert [record.step for record in records] == [3, 4, 5]
    assert next(source).number.tolist() == [12, 13, 14, 15]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"decay": "constant"}, {1: 0.25, 2: 0.5, 4: 1, 5: 1, 20: 1}),
        ({"decay": "cosine"}, {1: 0.25, 4: 1, 12: 0.5, 20: 0, 8: (1 + math.cos(math.pi / 4)) / 2}),
        ({"decay": "constant", "warmup_steps": 0}, {1: 1, 20: 1}),
        ({"decay": "cosine", "warmup_steps": 0}, {10: 0.5, 20: 0}),
        ({"decay": "cosine", "warmup_steps": 40}, {10: 0.25, 20: 0.5}),
    ],
)
def test_learning_rate(fields: dict[str, object], expected: dict[int, float]) -> None:
    """As a share of the peak, over 20 steps with a warm-up of 4 unless said."""
    o = optimization(**fields)
    assert {step: o.lr_at(step) / o.lr for step in expected} == pytest.approx(expected, abs=1e-12)


def test_to_float() -> None:
    image = to_float(torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 3, 1, 1).expand(2, 3, 4, 5))
    torch.testing.assert_close(image[0, :, 0, 0], torch.tensor([-1.0, 1.0, -0.6]))
    assert image.is_contiguous(memory_format=torch.channels_last)


def test_bfloat16_computes_in_it_and_keeps_float32_weights() -> None:
    run = trainer(diffusion_task(), precision="bf16")
    assert run.engine.precision == "bf16"
    seen = []
    middle = run.task.model.denoiser.backbone.middle_block
    middle.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    low = [record.logs["loss"].item() for record in islice(run.fit(batches()), 3)]
    assert set(seen) == {torch.bfloat16}
    assert all(value.dtype == torch.float32 for value in run.task.state_dict().values() if value.is_floating_point())
    AcceleratorState._reset_state(reset_partial_state=True)
    high = [record.logs["loss"].item() for record in islice(trainer(diffusion_task()).fit(batches()), 3)]
    assert low == pytest.approx(high, rel=0.03)
    assert low != high


@pytest.mark.gpu
@both_tasks
def test_cuda_trains_as_the_cpu_does(make) -> None:
    """Losses and gradient norms of the first steps agree to 5 %: kernels round differently, and Adam enlarges it."""
    logs = {}
    for device in ("cpu", "cuda"):
        AcceleratorState._reset_state(reset_partial_state=True)
        run = trainer(make(), device=device)
        records = list(islice(run.fit(batches()), 2))
        assert next(run.task.parameters()).device.type == device
        logs[device] = [{name: value.item() for name, value in record.logs.items()} for record in records]
    for cuda, cpu in zip(logs["cuda"], logs["cpu"], strict=True):
        assert cuda == pytest.approx(cpu, rel=0.05)


@pytest.mark.gpu
def test_cuda_samples_as_the_cpu_does() -> None:
    """The same noise on both; 1 % of difference after 10 steps."""
    ends = {}
    for device in ("cpu", "cuda"):
        model = ldm().eval().to(device)
        with torch.no_grad():
            for parameter in model.denoiser.backbone.parameters():  # an untrained backbone predicts zero
                parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).to(device)
        noise = PerSampleNoise([1, 2], model.latent_shape, device)
        *_, last = DDIM(steps=10).build()(model.denoiser, noise.initial(), model.schedule, noise)
        assert last.x.device.type == device
        ends[device] = last.x.cpu()
    assert (ends["cuda"] - ends["cpu"]).norm() < 0.01 * ends["cpu"].norm()
