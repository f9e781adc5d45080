"""VAE and HVAE: penalties, saving, devices and training."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from model_problems import MODELS, data, make, seeded
from torch import Tensor, nn

from fastvae.likelihoods import Bernoulli
from fastvae.models import HVAE, BaseVAE, Penalty, TrainingStep

# --- penalties ---------------------------------------------------------------------------------


class CodeSize(Penalty):
    """A penalty with state, that also looks at another view of the data."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, step: TrainingStep) -> Tensor:
        other = step.model.objective(1 - step.x, generator=step.generator)
        return self.count * (step.z.square().sum(1) + (other.mu - step.mu).square().sum(1))

    def step(self) -> None:
        self.count += 1


class Wrong(nn.Module):
    def forward(self, step: TrainingStep) -> Tensor:
        return step.loss.mean()


@pytest.mark.parametrize("kind", MODELS)
def test_penalties(kind: type[BaseVAE]) -> None:
    penalty = CodeSize()
    model = make(kind, penalties=[penalty])
    x = data()
    base = make(kind)(x, generator=seeded())
    torch.testing.assert_close(model(x, generator=seeded()), base)
    penalty.step()
    step = model.objective(x, generator=seeded())
    other = model.encode(1 - x)[0]
    expected = base + step.z.square().sum(1) + (other - step.mu).square().sum(1)
    torch.testing.assert_close(model(x, generator=seeded()), expected)
    torch.testing.assert_close(model.elbo(x, generator=seeded()), -base)
    assert model.state_dict()["penalties.0.count"] == 1
    with pytest.raises(ValueError, match=r"Wrong: expected one value a sample, \[5\], got \[\]"):
        make(kind, penalties=[Wrong()])(x)


# --- saving, moving, training ------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_saving_pickling_copying(kind: type[BaseVAE]) -> None:
    options: dict[str, Any] = {"step_size": [0.1, 0.3]} if kind is HVAE else {}
    model = make(kind, **options)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    x = data()
    expected = model(x, generator=seeded())
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = make(kind, **options)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    for other in (fresh, pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(other(x, generator=seeded()), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", MODELS)
def test_training_on_cuda(kind: type[BaseVAE]) -> None:
    model = make(kind)
    x = data()
    expected = model(x, generator=seeded())
    moved = model.cuda()
    # The CPU generator gives the same noise; float32 sums differ in order.
    torch.testing.assert_close(moved(x.cuda(), generator=seeded()).cpu(), expected, rtol=1e-4, atol=1e-4)
    assert moved.sample(3, generator=torch.Generator("cuda").manual_seed(0)).is_cuda
    assert moved.log_likelihood(x.cuda(), 10).is_cuda


@pytest.mark.parametrize("kind", MODELS)
def test_autocast_keeps_the_loss_in_float32(kind: type[BaseVAE]) -> None:
    model = make(kind)
    x = data()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(x, generator=seeded())
    assert loss.dtype == torch.float32
    # bfloat16 has 8 bits of precision.
    torch.testing.assert_close(loss, model(x, generator=seeded()), rtol=0.03, atol=0.03)


@pytest.mark.parametrize("kind", MODELS)
def test_compiles_whole(kind: type[BaseVAE]) -> None:
    options: dict[str, Any] = {"on_divergence": "ignore"} if kind is HVAE else {}
    model = make(kind, **options)
    x = data()
    noise = model.draw_noise(model.encode(x)[0], seeded())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, noise=noise), model(x, noise=noise))


@pytest.mark.parametrize("kind", MODELS)
def test_training_on_digits(kind: type[BaseVAE]) -> None:
    """Training takes the model well below the entropy of the mean image."""
    datasets = pytest.importorskip("sklearn.datasets")
    images = torch.tensor(datasets.load_digits().images / 16, dtype=torch.float32).flatten(1)
    torch.manual_seed(0)
    model = kind(
        nn.Sequential(nn.Linear(64, 64), nn.Softplus(), nn.Linear(64, 16)),
        nn.Sequential(nn.Linear(8, 64), nn.Softplus(), nn.Linear(64, 64)),
    )
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    g = seeded()
    mean = images.mean(0).clamp(1e-3, 1 - 1e-3)
    baseline = -Bernoulli().log_prob(torch.logit(mean).expand_as(images), images).mean().item()
    for _ in range(250):
        batch = images[torch.randint(0, len(images), (128,), generator=g)]
        optimizer.zero_grad()
        model.loss(batch, generator=g).backward()
        optimizer.step()
    elbo = model.elbo(images, generator=g).mean().item()
    likelihood = model.log_likelihood(images[:100], 100, generator=g).mean().item()
    assert -elbo < baseline - 1, (elbo, baseline)
    assert likelihood > model.elbo(images[:100], generator=g).mean().item()
