"""What is said of a loss, a gradient or a likelihood that is not finite."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from model_problems import DIM, PIXELS, data, make, mlp
from torch import Tensor, nn

from fastvae import HVAE, IWAE, VAE, DivergenceError, fit, ood
from fastvae.influence import TracIn
from fastvae.models.base import Penalty, TrainingStep
from fastvae.models.terms import recorded_terms
from fastvae.training import load_checkpoint


class Gain(nn.Module):
    """A network whose outputs are multiplied, number by number, from the step on that is asked for."""

    def __init__(self, inner: nn.Module, factor: Tensor, after: int = 0) -> None:
        super().__init__()
        self.inner, self.factor, self.after, self.calls = inner, factor, after, 0

    def forward(self, h: Tensor) -> Tensor:
        self.calls += 1
        out: Tensor = self.inner(h)
        return out * self.factor if self.calls > self.after else out


class Infinite(Penalty):
    def forward(self, step: TrainingStep) -> Tensor:
        return step.z.sum(1) * math.inf


def broken(kind: Any, part: str, after: int = 0, value: float = math.nan, **options: Any) -> Any:
    torch.manual_seed(0)
    of_encoder, of_decoder = torch.ones(2 * DIM), torch.ones(PIXELS)
    {"mean": of_encoder[:DIM], "variance": of_encoder[DIM:], "decoder": of_decoder, "nothing": torch.ones(1)}[
        part
    ].fill_(value)
    encoder = Gain(mlp(PIXELS, 2 * DIM), of_encoder, after)
    return kind(encoder, Gain(mlp(DIM, PIXELS), of_decoder, after), **options)


def message(model: Any, x: Tensor | None = None, **options: Any) -> str:
    loader = [data() if x is None else x] * 4
    with pytest.raises(FloatingPointError) as caught:
        fit(model, loader, epochs=2, progress=False, **options)
    return str(caught.value)


def test_epoch_step_and_term() -> None:
    found = message(broken(VAE, "decoder", after=2))
    assert "epoch 1, step 3 (step 3 of the run): loss nan" in found
    assert "not finite: the reconstruction term -log p(x | z) (in 5 of 5 samples)" in found
    assert "KL" not in found and "mean" not in found
    found = message(broken(VAE, "mean"))
    assert "not finite: the mean of q(z | x) (in 5 of 5 samples), the reconstruction term" in found
    assert "the KL term (in 5 of 5 samples)" in found and "log variance" not in found
    # exp(1e4 v) is infinite, and so is z.
    found = message(broken(VAE, "variance", value=-1e5))
    assert "the KL term" in found and "the mean of q" not in found and "the log variance" not in found


def test_one_term_alone() -> None:
    class Late(VAE):
        def objective(self, *args: Any, **kwargs: Any) -> TrainingStep:
            step = super().objective(*args, **kwargs)
            kl = step.kl * torch.tensor([1, 1, 1, math.inf, 1])  # type: ignore[operator]
            step.kl, step.loss = kl, kl - step.log_px
            return step

    found = message(make(Late))
    assert "not finite: the KL term (in 1 of 5 samples);" in found and "reconstruction" not in found
    found = message(make(VAE, penalties=[Infinite()]))
    assert "not finite: the penalty Infinite (in 5 of 5 samples);" in found


@pytest.mark.parametrize("kind", [IWAE, HVAE])
def test_other_models(kind: Any) -> None:
    options: dict[str, Any] = (
        {"num_steps": 2, "on_divergence": "ignore"} if kind is HVAE else {"num_samples": 3}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found = message(broken(kind, "decoder", **options))
    assert "not finite: the reconstruction term -log p(x | z) (in 5 of 5 samples)" in found


def test_a_gradient_alone_is_named_by_its_parameters() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(PIXELS))

        def forward(self, h: Tensor) -> Tensor:
            return h + torch.sqrt(self.shift)

    model = VAE(mlp(PIXELS, 2 * DIM), nn.Sequential(mlp(DIM, PIXELS), Root()))
    found = message(model)
    assert "gradient norm" in found and "not finite: the gradients of decoder.1.shift;" in found


def test_validation_names_the_term_too() -> None:
    class OnlyInEval(nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            return h if self.training else h * math.inf

    model = VAE(mlp(PIXELS, 2 * DIM), nn.Sequential(mlp(DIM, PIXELS), OnlyInEval()))
    found = message(model, val_loader=[data()])
    assert "epoch 1, validation: loss" in found and "not finite: the reconstruction term" in found


def test_a_model_of_ones_own_has_no_terms() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(PIXELS))

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.weight).sum(1) * math.nan

    assert "loss nan, gradient norm nan; last good" in message(Own())


def test_terms_are_those_of_the_model_that_was_called() -> None:
    model = make(VAE, penalties=[Infinite()])
    with recorded_terms() as terms:
        loss = model(data())
    assert not any(term.requires_grad for term in terms.values())
    total = terms["the KL term"] - terms["the reconstruction term -log p(x | z)"]
    torch.testing.assert_close(total, terms["the loss without penalties"])
    assert torch.isinf(loss).all()
    with recorded_terms() as terms:
        torch.compile(make(VAE), backend="eager")(data())
    assert not terms
    assert "terms" not in vars(model)


def test_skipping_is_not_advised_to_those_who_skip() -> None:
    for options in ({}, {"val_loader": [data()]}):
        found = message(broken(VAE, "decoder"), on_nonfinite="skip", **options)
        assert "all 4 steps of epoch 1 were skipped" in found
        assert "A lower learning rate or clip_grad_norm may help" in found and "on_nonfinite" not in found
    assert 'A lower learning rate, clip_grad_norm or on_nonfinite="skip" may help' in message(
        broken(VAE, "decoder")
    )


def test_dropping_is_not_advised_to_those_who_drop() -> None:
    class Leaving(HVAE):
        """Its energies are finite, and its weights are not."""

        def _stay(self, *args: Any) -> Any:
            path = super()._stay(*args)
            path.log_ratio = path.log_ratio * math.nan
            return path

    for on_divergence in ("raise", "drop"):
        model = make(Leaving, on_divergence=on_divergence)
        with torch.no_grad():
            model.leapfrog_step.logit.fill_(math.nan)
        with pytest.raises(
            DivergenceError, match="left the finite range, the first at leapfrog step 1"
        ) as caught:
            model(data())
        assert ("on_divergence='drop'" in str(caught.value)) == (on_divergence == "raise")
        assert ("without the flow their ELBO is not finite either" in str(caught.value)) == (
            on_divergence == "drop"
        )


def test_a_likelihood_that_is_nan_warns() -> None:
    with pytest.warns(
        RuntimeWarning, match="VAE: log_likelihood: NaN for 5 of 5 samples: x, the encoder's or the"
    ):
        found = broken(VAE, "decoder").log_likelihood(data(), 3)
    assert torch.isnan(found).all()
    with pytest.warns(RuntimeWarning, match="NaN for 5 of 5 samples"):
        ood.NegativeLogLikelihood(broken(VAE, "mean"), num_samples=3).predict(data())
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        make(VAE).log_likelihood(data(), 3)


@pytest.mark.parametrize("content", ["state_dict", "module", "text"])
def test_a_foreign_checkpoint_names_the_way_to_read_it(tmp_path: Path, content: str) -> None:
    path, model = tmp_path / "mine.pt", make(VAE)
    if content == "text":
        path.write_text("no checkpoint")
    else:
        torch.save(model.state_dict() if content == "state_dict" else model, path)
    for call in (
        lambda: load_checkpoint(model, path),
        lambda: TracIn(model, data(), [path]).influence((data(),)),
    ):
        with pytest.raises(
            ValueError, match=r"(?s)mine\.pt.*for files that fastvae\.fit did not write.*_load_func"
        ):
            call()
