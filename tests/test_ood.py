"""Outlier scores: what they are of, what they do not depend on, and what they refuse."""

from __future__ import annotations

import io
import math
import zlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fastvae import HVAE, VAE, Bernoulli, Categorical, Gaussian
from fastvae.architectures import dcgan_decoder, dcgan_encoder
from fastvae.metrics import ood_metrics
from fastvae.noise import SampleNoise, keys_of
from fastvae.ood import (
    Detector,
    InputComplexity,
    LikelihoodRatio,
    MutatedImages,
    NegativeLogLikelihood,
    mutate,
)
from fastvae.ood.input_complexity import compressed_bits


def model_of(likelihood: Any = "bernoulli", kind: type = VAE, side: int = 4, **options: Any) -> VAE:
    torch.manual_seed(0)
    values = likelihood.num_classes if isinstance(likelihood, Categorical) else 1
    encoder = nn.Sequential(
        nn.Flatten(), nn.Linear(side * side, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 6)
    )
    decoder = nn.Sequential(
        nn.Linear(3, 9), nn.BatchNorm1d(9), nn.Tanh(), nn.Linear(9, values * side * side),
        nn.Unflatten(1, (values, side, side)),
    )  # fmt: skip
    return kind(encoder, decoder, likelihood, **options)


def binary(count: int = 6, side: int = 4) -> Tensor:
    return torch.rand(count, 1, side, side, generator=torch.Generator().manual_seed(1)).round()


def detectors(model: VAE) -> list[Detector]:
    background = model_of(model.likelihood, type(model)).train()
    return [
        NegativeLogLikelihood(model, num_samples=20),
        InputComplexity(model, num_samples=20),
        InputComplexity(model, "jpeg2000", num_samples=20),
        LikelihoodRatio(model, background, num_samples=20),
    ]


@pytest.mark.parametrize("likelihood", [Bernoulli(), Categorical(7)], ids=["bernoulli", "categorical"])
@pytest.mark.parametrize("kind", [VAE, HVAE])
def test_interface(kind: type, likelihood: Any, device: torch.device) -> None:
    model = model_of(likelihood, kind).to(device)
    x = binary()
    for detector in detectors(model):
        assert isinstance(detector, Detector) and not detector.requires_fit
        assert detector.fit(None) is detector and detector.to(device) is detector
        scores = detector.predict(x)
        assert scores.shape == (6,) and not scores.requires_grad and scores.device.type == device.type
        assert bool(scores.isfinite().all()) and torch.equal(detector(x), scores)
        # Keyed by the image: neither batch, nor order, nor the global generator count. BatchNorm is in eval mode.
        apart = torch.cat([detector(x[5:]), detector(x[:2])])
        torch.testing.assert_close(apart, scores[[5, 0, 1]], rtol=1e-5, atol=1e-4)
        assert all(module.training for module in model.modules())
        assert detector(x[:0]).shape == (0,)


def test_negative_log_likelihood_is_the_models_own() -> None:
    model = model_of().eval()
    x = binary()
    noise = SampleNoise(keys_of(x), 3)
    expected = -model.log_likelihood(x, 50, noise=noise)
    assert torch.equal(NegativeLogLikelihood(model, num_samples=50, seed=3)(x), expected)
    assert not torch.allclose(NegativeLogLikelihood(model, num_samples=50, seed=4)(x), expected)


def png_bits(image: Tensor) -> int:
    """The file's length by a second writer: zlib over rows without a filter, the least of its sizes."""
    rows = b"".join(b"\0" + bytes(row.tolist()) for row in image)
    return 8 * len(zlib.compress(rows, 9))


def test_lengths_are_of_the_content(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(256, (2, 1, 32, 32), dtype=torch.uint8, generator=generator)
    flat = torch.full((1, 1, 32, 32), 77, dtype=torch.uint8)
    stripes = torch.arange(32, dtype=torch.uint8).expand(1, 1, 32, 32) * 8
    images = torch.cat([noise, flat, stripes]).to(device)
    for compressor in ("png", "jpeg2000"):
        bits = compressed_bits(images, compressor)
        assert bits.dtype == torch.float64 and bits.shape == (4,)
        # Uniform noise cannot be compressed: 8 bits a pixel; a lossless format may need a little more.
        assert (bits[:2] > 0.95 * 8 * 1024).all() and (bits[:2] < 1.25 * 8 * 1024).all()
        assert bits[2] < 0.05 * bits[0] and bits[3] < 0.25 * bits[0]
        assert torch.equal(compressed_bits(images[:, 0], compressor), bits)
        assert (compressed_bits(images.expand(-1, 3, -1, -1), compressor)[:2] > bits[:2]).all()
    assert abs(png_bits(noise[0, 0]) - float(compressed_bits(noise[:1])[0])) < 0.02 * 8 * 1024
    bits = compressed_bits(noise % 2, binary=True)
    assert (bits > 0.9 * 1024).all() and (bits < 1.4 * 1024).all(), "one bit a pixel"


def test_png_and_jpeg2000_lose_nothing() -> None:
    from PIL import Image

    from fastvae.ood.input_complexity import _FORMATS

    image = torch.randint(256, (9, 13, 3), dtype=torch.uint8).numpy()
    for form, options in _FORMATS.values():
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format=form, **options)
        assert (
            torch.tensor(list(Image.open(buffer).tobytes())) == torch.tensor(image.flatten().tolist())
        ).all()


def test_input_complexity_is_in_nats() -> None:
    model = model_of(Categorical(256))
    x = torch.randint(256, (3, 1, 4, 4), dtype=torch.uint8)
    bits = compressed_bits(x)
    expected = NegativeLogLikelihood(model, num_samples=20)(x) - math.log(2) * bits.float()
    torch.testing.assert_close(InputComplexity(model, num_samples=20)(x), expected)
    # The same classes as floats: noise is keyed by the bytes, the length is of the classes.
    floats = x / 255
    expected = NegativeLogLikelihood(model, num_samples=20)(floats) - math.log(2) * bits.float()
    torch.testing.assert_close(InputComplexity(model, num_samples=20)(floats), expected)


def test_input_complexity_refusals() -> None:
    with pytest.raises(
        ValueError, match=r"InputComplexity: model: expected a likelihood of discrete values.*Gauss"
    ):
        InputComplexity(model_of(Gaussian(0.1)))
    with pytest.raises(ValueError, match=r"compressor: expected one of \['jpeg2000', 'png'\], got 'gif'"):
        InputComplexity(model_of(), "gif")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected zeros and ones under a Bernoulli likelihood"):
        InputComplexity(model_of())(torch.full((1, 1, 4, 4), 0.5))
    with pytest.raises(ValueError, match=r"expected images \[B, H, W\] or \[B, C, H, W\]"):
        InputComplexity(model_of())(torch.zeros(2, 16))


def test_mutate() -> None:
    generator = torch.Generator().manual_seed(0)
    for x, levels in ((torch.full((400, 500), 9, dtype=torch.uint8), 16), (torch.zeros(400, 500), 256)):
        changed = mutate(x, 0.2, levels=levels, generator=generator)
        assert changed.dtype == x.dtype and changed.shape == x.shape
        # One in `levels` draws is the old value; 200,000 pixels: six standard errors are 0.006.
        share = float((changed != x).float().mean())
        assert abs(share - 0.2 * (1 - 1 / levels)) < 0.006
        scale = 1 if x.dtype == torch.uint8 else 255
        values = (changed * scale).round().unique()
        assert len(values) == levels and torch.allclose(changed * scale, (changed * scale).round(), atol=1e-4)
    assert torch.equal(mutate(x, 0.0), x)
    for arguments, message in (
        ({"x": torch.zeros(2, dtype=torch.long)}, "mutate: x: expected uint8 or a floating"),
        ({"x": x, "probability": 1.5}, r"mutate: probability: expected a number in \[0, 1\]"),
        ({"x": x, "levels": 1}, "mutate: levels: expected 2 to 256"),
    ):
        with pytest.raises(ValueError, match=message):
            mutate(**arguments)


def test_mutated_images_are_new_in_each_epoch_and_resume() -> None:
    loader = DataLoader(TensorDataset(binary(8)), 4, shuffle=True, generator=torch.Generator())
    mutated = MutatedImages(loader, 0.5)
    assert len(mutated) == 2 and mutated.sampler is loader.sampler and mutated.generator is loader.generator
    first, second = (torch.cat(list(mutated)) for _ in range(2))
    assert first.shape == (8, 1, 4, 4) and not torch.equal(first.sort(0).values, second.sort(0).values)


def test_likelihood_ratio_trains_its_background(tmp_path: Any) -> None:
    model = model_of(Categorical(4)).eval()
    x = binary(40)
    loader = DataLoader(TensorDataset(x), 10)
    detector = LikelihoodRatio(model, epochs=2, num_samples=10)
    assert detector.requires_fit
    with pytest.raises(RuntimeError, match=r"LikelihoodRatio: predict: expected fit\(loader\) before"):
        detector(x)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    assert detector.fit(loader, run_dir=tmp_path) is detector
    assert torch.equal(torch.get_rng_state(), state) and (tmp_path / "epoch-0002.pt").exists()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert detector.background is not None and not detector.background.training
    again = LikelihoodRatio(model, epochs=2, num_samples=10).fit(loader)
    assert torch.equal(again(x), detector(x))
    log_px = [-NegativeLogLikelihood(of, num_samples=10)(x) for of in (detector.background, model)]
    torch.testing.assert_close(detector(x), log_px[0] - log_px[1])
    for first, second in zip(model.parameters(), detector.background.parameters(), strict=True):
        assert first is not second


def test_likelihood_ratio_refusals() -> None:
    class Scaled(nn.Linear):
        pass

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(6))

        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :6] + self.shift

    for call, error, message in (
        (
            lambda: LikelihoodRatio(nn.Linear(2, 2)),
            TypeError,
            "LikelihoodRatio: model: expected a fastvae model",
        ),
        (
            lambda: LikelihoodRatio(model_of(), nn.Linear(2, 2)),
            TypeError,
            "background: expected a fastvae model",
        ),
        (lambda: LikelihoodRatio(model_of(), mutation=2.0), ValueError, "mutation: expected"),
        (lambda: LikelihoodRatio(model_of(), epochs=0), ValueError, "epochs: expected at least 1"),
        (
            lambda: NegativeLogLikelihood(model_of(), num_samples=0),
            ValueError,
            "num_samples: expected at least 1",
        ),
        (
            lambda: LikelihoodRatio(VAE(Own(), Scaled(3, 16))).fit([binary(2)]),
            TypeError,
            r"encoder \(Own\) has no reset_parameters; pass a background model",
        ),
    ):
        with pytest.raises(error, match=message):
            call()


def test_scores_of_the_papers_networks() -> None:
    model = VAE(dcgan_encoder(1, 2, 5), dcgan_decoder(1, 2, 5), "categorical")
    x = torch.randint(256, (2, 1, 32, 32), dtype=torch.uint8)
    for detector in (NegativeLogLikelihood(model, num_samples=3), InputComplexity(model, num_samples=3)):
        scores = detector(x)
        # An untrained model gives every class about 1 / 256.
        near = 1024 * math.log(256) - (
            0 if isinstance(detector, NegativeLogLikelihood) else 1024 * math.log(256)
        )
        assert (scores - near).abs().max() < 1024


def test_metrics_by_hand() -> None:
    inside, outside = torch.tensor([0.0, 1.0, 2.0, 3.0]), torch.tensor([2.0, 2.5, 4.0])
    found = ood_metrics(inside, outside)
    pairs = (outside[:, None] > inside).float() + 0.5 * (outside[:, None] == inside)
    assert found.auroc == pytest.approx(float(pairs.mean()))
    # All foreign scores are reached at 2, where two of four others lie.
    assert found.fpr95 == pytest.approx(0.5)
    assert found.aupr == pytest.approx((1 / 3) * (1 / 1) + (1 / 3) * (2 / 3) + (1 / 3) * (3 / 5))
    assert found.auroc_interval[0] < found.auroc < found.auroc_interval[1]
    perfect = ood_metrics(inside, inside + 10)
    assert perfect.auroc == perfect.aupr == 1 and perfect.fpr95 == 0 and perfect.auroc_interval == (1, 1)
    assert ood_metrics(inside + 10, inside).auroc == 0


def test_the_interval_covers() -> None:
    """Normal scores a unit apart: AUROC = Phi(1 / sqrt 2) = 0.760; 200 sets, three standard errors of 0.95."""
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(200):
        inside, outside = torch.randn(2, 60, generator=generator)
        low, high = ood_metrics(inside, outside + 1, resamples=200).auroc_interval
        covered += low <= 0.7602 <= high
    assert 0.9 <= covered / 200 <= 0.995
    first = ood_metrics(inside, outside, seed=1)
    assert first == ood_metrics(inside, outside, seed=1) != ood_metrics(inside, outside, seed=2)


def test_metrics_refusals() -> None:
    good = torch.rand(4)
    for arguments, message in (
        ((good[:0], good), r"scores_in: expected shape \[N\] with N >= 1, got \[0\]"),
        ((good, good.reshape(2, 2)), r"scores_out: expected shape \[N\]"),
        ((good, torch.tensor([1.0, math.nan])), "scores_out: expected finite scores, got 1 NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            ood_metrics(*arguments)
    with pytest.raises(ValueError, match="confidence: expected"):
        ood_metrics(good, good, confidence=1.0)
    with pytest.raises(ValueError, match="resamples: expected at least 1"):
        ood_metrics(good, good, resamples=0)
