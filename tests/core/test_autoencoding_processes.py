"""An autoencoder against a discriminator in two processes: statistics, gradients and weights are those of one.

Everything is float64. One process has all of a batch; of two, each has half.
"""

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from uldm_cli.core import collectives
from uldm_cli.core.autoencoding import AutoencoderTask, ReconstructionWeights
from uldm_cli.core.discriminator import BatchNorm2d, PatchGAN
from uldm_cli.core.losses import Adversarial
from uldm_cli.specs.autoencoders import KL

Values = dict[str, Tensor]
BATCH, STEPS = 4, 3


def mine(x: Tensor) -> Tensor:
    """This process's part of a batch."""
    return x.chunk(collectives.world())[collectives.rank()]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def normalised() -> Values:
    """A layer in training: its results, all gradients, and its running statistics. The mean is far from 0."""
    torch.manual_seed(0)
    norm = BatchNorm2d(5).double()
    nn.init.normal_(norm.weight)
    x = mine(100 + drawn(BATCH, 5, 3, 4)).requires_grad_()
    out = norm(x)
    # A mean over this process's part, whose gradients are then averaged, as in training.
    (out.sin() * mine(drawn(BATCH, 5, 3, 4, seed=1))).mean().backward()
    assert x.grad is not None
    values = {f"{name}.grad": collectives.mean(p.grad) for name, p in norm.named_parameters() if p.grad is not None}
    # Its share of the mean's gradient: of the mean over everything it would be one part in as many.
    parts = {"out": out.detach(), "x.grad": x.grad / collectives.world()}
    return values | {f"part.{name}": value for name, value in parts.items()} | dict(norm.named_buffers())


class Phase(nn.Module):
    """One phase of a task, so that DistributedDataParallel averages the gradients of its parameters only."""

    def __init__(self, task: AutoencoderTask, phase: str) -> None:
        super().__init__()
        self.task, self.phase = task, phase
        self.parameters_of_phase = task.trained(phase)
        chosen = {id(p) for p in self.parameters_of_phase}
        self._ddp_params_and_buffers_to_ignore = [n for n, p in self.named_parameters() if id(p) not in chosen]

    def forward(self, image: Tensor, number: Tensor) -> tuple[Tensor, Values]:
        return self.task(self.phase, image, number)


def trained() -> Values:
    """Some steps of a KL autoencoder against a discriminator: weights, statistics, and what was logged."""
    torch.manual_seed(0)
    model = KL(in_channels=3, ch=32, ch_mult=(1, 1), num_res_blocks=1, resolution=16, z_channels=2).build()
    weights = ReconstructionWeights(l1=1.0, l2=0.5, lpips=0.0, kl=0.01)
    adversarial = Adversarial(PatchGAN(3, (8, 8), (4,) * 3, (2, 2, 1), (1,) * 3), 0.5, 1, 2, "hinge", adaptive=True)
    task = AutoencoderTask(model, weights, None, seed=3, logvar=0.1, adversarial=adversarial).double().train()
    runs = {phase: Phase(task, phase) for phase in task.phases}
    several = collectives.world() > 1
    wrapped = {k: DistributedDataParallel(run, broadcast_buffers=False) if several else run for k, run in runs.items()}
    values: Values = {}
    for step in range(1, STEPS + 1):
        image, number = mine(drawn(BATCH, 3, 16, 16, seed=step).tanh()), mine(torch.arange(BATCH) + BATCH * step)
        for phase in task.begin(step):
            loss, logs = wrapped[phase](image, number)
            runs[phase].zero_grad()
            loss.backward()
            with torch.no_grad():
                for p in runs[phase].parameters_of_phase:
                    assert p.grad is not None
                    p -= 0.05 * p.grad
            values |= {f"{step}.{name}": collectives.mean(value) for name, value in logs.items()}
        task.after_step(step)
    return values | {f"task.{name}": value for name, value in task.state_dict().items()}


def compute() -> Values:
    return {**normalised(), **trained()}


def test_two_processes_compute_what_one_does(computed) -> None:
    """Batch statistics with their gradients, gradients' norms in the adaptive weight, and so weights after steps."""
    alone, parts = computed.alone, computed.parts
    assert all(part.keys() == alone.keys() for part in parts)
    assert len(alone) > 50
    assert alone["3.d_weight"] > 0
    for name, expected in alone.items():
        if name.startswith("part."):
            torch.testing.assert_close(torch.cat([part[name] for part in parts]), expected, rtol=1e-10, atol=1e-10)
        else:
            for part in parts:
                torch.testing.assert_close(part[name], expected, rtol=1e-10, atol=1e-10, msg=f"{name} differs")


def test_one_process_normalises_as_torch_does(computed) -> None:
    """Its mean is far from 0, so a variance taken as a difference of squares would show."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(5).double()
    nn.init.normal_(norm.weight)
    out = norm(100 + drawn(4, 5, 3, 4))
    alone = computed.alone
    torch.testing.assert_close(alone["part.out"], out.detach())
    torch.testing.assert_close(alone["running_var"], norm.running_var)
    torch.testing.assert_close(alone["running_mean"], norm.running_mean)
    assert alone["num_batches_tracked"] == norm.num_batches_tracked == 1
