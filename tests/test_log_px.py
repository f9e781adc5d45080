"""log_px against the reference in float64: routes, shapes, tiles, and what it refuses."""

from __future__ import annotations

import copy
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from flow_problems import FLOAT64, LIKELIHOODS, Residual, conv, mlp
from jacobian_problems import wide
from torch import Tensor, nn
from torch.autograd import forward_ad

import fastvae
from fastvae import architectures, reference
from fastvae.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from fastvae.lowering import CoupledSamples, lower
from fastvae.ops import log_px

raw = fastvae._C

# Sums of a few hundred terms of a few nats in another order, and elementary functions of a few ulp.
FLOAT32 = 2e-5


def problem(
    decoder: nn.Module,
    likelihood: Likelihood,
    draws: int = 3,
    batch: int = 4,
    dtype: torch.dtype = torch.float64,
) -> tuple[nn.Module, Tensor, Tensor]:
    """A copy of the decoder in eval mode with statistics of its own, z [S, B, d], x [B, elements]."""
    decoder = copy.deepcopy(decoder)
    generator = torch.Generator().manual_seed(0)
    for name, buffer in decoder.named_buffers():
        if buffer.is_floating_point():
            low = 0.5 if name.endswith("var") else -0.3
            buffer.uniform_(low, low + 1, generator=generator)
    decoder = decoder.eval().to(dtype)
    first = next(decoder.parameters())
    dim = first.shape[0] if first.dim() == 4 else first.shape[1]
    z = torch.randn(draws, batch, dim, dtype=dtype, generator=generator)
    outputs = decoder(torch.zeros(1, dim, dtype=dtype)).numel() // likelihood.values_per_element
    return decoder, z, torch.rand(batch, outputs, dtype=dtype, generator=generator)


def handed_over(channels: int, bias: bool = True) -> nn.Module:
    """A last transposed convolution that hands its outputs to the head."""
    return nn.Sequential(
        nn.Linear(3, 12),
        nn.Tanh(),
        nn.Unflatten(1, (3, 2, 2)),
        nn.ConvTranspose2d(
            3, channels, (5, 4), stride=(2, 3), padding=(1, 2), output_padding=(1, 0), bias=bias
        ),
    )


CASES: dict[str, tuple[nn.Module, Likelihood]] = {
    "mlp": (mlp(7), Bernoulli()),
    "linear": (nn.Linear(3, 5), Gaussian(0.7)),
    "categorical": (mlp(7 * 4), Categorical(4)),
    "conv": (conv(1), Gaussian(0.7)),
    "narrow": (wide(outputs=1), Bernoulli()),
    "narrow categorical": (wide(outputs=2), Categorical(2)),
    "library": (wide(outputs=5), Gaussian(1.3)),
    "handed bernoulli": (handed_over(19), Bernoulli()),
    "handed gaussian": (handed_over(8, bias=False), Gaussian(0.7)),
    "handed categorical": (handed_over(2 * 33), Categorical(33)),
    "handed without bias": (handed_over(3 * 4, bias=False), Categorical(4)),
    "dcgan": (architectures.dcgan_decoder(1, width=3, latent_dim=5, values_per_element=16), Categorical(16)),
}


@pytest.mark.parametrize("name", CASES)
def test_against_the_reference(name: str, device: torch.device) -> None:
    decoder, z, x = problem(*CASES[name])
    likelihood = CASES[name][1]
    expected = reference.log_px(decoder, z, x, likelihood)
    each = [likelihood.log_prob(decoder(z[s]), x) for s in range(len(z))]
    torch.testing.assert_close(torch.stack(each), expected, rtol=FLOAT64, atol=FLOAT64)
    decoder, z, x = decoder.to(device), z.to(device), x.to(device)
    actual = log_px(decoder, z, x, likelihood)
    torch.testing.assert_close(actual.cpu(), expected, rtol=FLOAT64, atol=FLOAT64)
    half = log_px(decoder.float(), z.float(), x.float(), likelihood)
    decoder.double()
    torch.testing.assert_close(half.cpu().double(), expected, rtol=FLOAT32, atol=FLOAT32)
    by_name = raw.log_px(z, x, lower(decoder).tensors, lower(decoder).spec, likelihood.spec)
    assert torch.equal(by_name, actual)


@pytest.mark.parametrize(("draws", "batch"), [(1, 1), (700, 1), (3, 601), (97, 7), (0, 4), (4, 0)])
def test_tiles_of_draws_and_of_samples(draws: int, batch: int, device: torch.device) -> None:
    """Widths that make a tile of about 500 codes: several draws, a part of one, and none."""
    decoder = nn.Sequential(nn.Linear(3, 1100), nn.Tanh(), nn.Linear(1100, 5))
    decoder, z, x = problem(decoder, Bernoulli(), draws, batch)
    actual = log_px(decoder.to(device), z.to(device), x.to(device)).cpu()
    assert actual.shape == (draws, batch)
    expected = reference.log_px(decoder.cpu(), z, x)
    torch.testing.assert_close(actual, expected, rtol=FLOAT64, atol=FLOAT64)


@pytest.mark.parametrize("likelihood", LIKELIHOODS.values(), ids=LIKELIHOODS)
def test_data_types(likelihood: Likelihood, device: torch.device) -> None:
    decoder, z, x = problem(mlp(6 * likelihood.values_per_element), likelihood, dtype=torch.float32)
    decoder, z = decoder.to(device), z.to(device)
    levels = likelihood.num_classes if isinstance(likelihood, Categorical) else 256
    octets = torch.randint(levels, x.shape, dtype=torch.uint8).to(device)
    expected = likelihood.log_prob(decoder(z.flatten(0, 1)), octets.repeat(len(z), 1)).reshape(z.shape[:2])
    torch.testing.assert_close(log_px(decoder, z, octets, likelihood), expected, rtol=1e-5, atol=1e-5)
    shaped = octets.reshape(len(octets), 2, 3)
    assert torch.equal(log_px(decoder, z, shaped, likelihood), log_px(decoder, z, octets, likelihood))
    strided = z.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(log_px(decoder, strided, octets, likelihood), log_px(decoder, z, octets, likelihood))
    expanded = log_px(decoder, z[:1].expand(3, -1, -1), octets[:1].expand(4, -1), likelihood)
    assert expanded.shape == (3, 4)


def test_probabilities_and_extreme_logits(device: torch.device) -> None:
    logits = nn.Linear(3, 8)
    decoder = nn.Sequential(logits, nn.Sigmoid()).double().to(device)
    z, x = torch.randn(2, 4, 3).double().to(device), torch.rand(4, 8).double().to(device)
    expected = log_px(logits, z, x)
    assert torch.equal(log_px(decoder, z, x, Bernoulli(probs=True)), expected)
    with pytest.raises(ValueError, match=r"log_px: likelihood: 'bernoulli' expects .* ends in a Sigmoid"):
        log_px(decoder, z, x)
    wild = handed_over(4 * 9).to(device)
    codes, classes = torch.randn(2, 3, 3, device=device), torch.rand(3, 4 * 10, device=device)
    with torch.no_grad():
        wild[-1].weight.mul_(1e4)
        outputs = wild(codes[0]).shape[1:].numel() // 9
        classes = torch.rand(3, outputs, device=device)
        found = log_px(wild, codes, classes, Categorical(9))
        expected = reference.log_px(wild, codes, classes, Categorical(9))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-3)
        wild[-1].weight.fill_(float("nan"))
        assert log_px(wild, codes, classes, Categorical(9)).isnan().all()


def test_threads_change_nothing() -> None:
    decoder, z, x = problem(*CASES["handed categorical"], draws=40, dtype=torch.float32)
    with ThreadPoolExecutor(1) as pool:

        def alone() -> Tensor:
            torch.set_num_threads(1)
            return log_px(decoder, z, x, CASES["handed categorical"][1])

        # A pool of its own: torch's number of threads is of the calling thread.
        assert torch.equal(pool.submit(alone).result(), log_px(decoder, z, x, CASES["handed categorical"][1]))


@pytest.mark.parametrize("name", ["mlp", "handed categorical"])
def test_opcheck_and_compile(name: str, device: torch.device) -> None:
    decoder, z, x = problem(*CASES[name])
    decoder, z, x = decoder.to(device), z.to(device), x.to(device)
    likelihood, network = CASES[name][1], lower(decoder)
    torch.library.opcheck(
        torch.ops.fastvae.log_px.default,
        (z, x, [tensor.detach() for tensor in network.tensors], network.spec, likelihood.spec),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda z: log_px(decoder, z * 1, x, likelihood) + 1, fullgraph=True, backend="aot_eager"
    )
    with torch.no_grad():
        torch.testing.assert_close(compiled(z), log_px(decoder, z, x, likelihood) + 1)
    with torch.inference_mode():
        assert torch.equal(
            log_px(decoder, z, x, likelihood),
            raw.log_px(z, x, network.tensors, network.spec, likelihood.spec),
        )


def test_autocast(device: torch.device) -> None:
    decoder, z, x = problem(*CASES["mlp"], dtype=torch.float32)
    decoder, z, x = decoder.to(device), z.to(device), x.to(device)
    expected = log_px(decoder, z, x)
    with torch.autocast(device.type, torch.bfloat16):
        assert torch.equal(log_px(decoder, z, x), expected)


def test_there_is_no_gradient(device: torch.device) -> None:
    decoder, z, x = problem(*CASES["mlp"])
    decoder, z, x = decoder.to(device), z.to(device), x.to(device)
    value = log_px(decoder, z.requires_grad_(), x)
    with pytest.raises(NotImplementedError, match=r"fastvae::log_px: forward only.*likelihood\.log_prob"):
        value.sum().backward()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        log_px(decoder, forward_ad.make_dual(z.detach(), torch.ones_like(z)), x)
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        torch.func.vmap(lambda z: log_px(decoder, z, x))(z.detach()[None])


def test_a_decoder_that_cannot_be_lowered_warns_once_and_works(device: torch.device) -> None:
    decoder, z, x = problem(mlp(5), Bernoulli())
    decoder = Residual(3, 5).double()
    decoder, z, x = decoder.to(device), z.to(device), x.to(device)
    expected = torch.stack([Bernoulli().log_prob(decoder(codes), x) for codes in z])
    with pytest.warns(UserWarning, match=r"fastvae\.ops\.log_px.*cannot be lowered.*sin"):
        value = log_px(decoder, z, x)
    torch.testing.assert_close(value, expected)
    assert not value.requires_grad
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(log_px(decoder, z, x), value)
    compiled = torch.compile(lambda z: log_px(decoder, z, x), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(z), value)


def test_refusals(device: torch.device) -> None:
    decoder, z, x = problem(*CASES["mlp"])
    decoder, z, x = decoder.to(device), z.to(device), x.to(device)
    network = lower(decoder)
    for call, error, message in (
        (lambda: log_px(decoder, z[0], x), ValueError, r"log_px: z: expected shape \[S, B, d\]"),
        (lambda: log_px(decoder, z, x[:3]), ValueError, "log_px: x: expected 4 samples as z has"),
        (lambda: log_px(decoder, z, x[:, :3]), ValueError, r"fastvae::log_px: x: expected shape \[4, 7\]"),
        (
            lambda: log_px(decoder, z.float(), x),
            TypeError,
            "fastvae::log_px: parameters: expected Float as z",
        ),
        (lambda: log_px(decoder, z.half(), x), TypeError, "fastvae::log_px: z: expected float32 or float64"),
        (lambda: log_px(decoder, z, x, "poisson"), ValueError, "likelihood: expected one of"),
        (
            lambda: raw.log_px(z, x.float(), network.tensors, network.spec, "bernoulli"),
            TypeError,
            "fastvae::log_px: x: expected Double as z",
        ),
        (lambda: log_px(conv(1).double().train(), z, x), CoupledSamples, "BatchNorm"),
    ):
        with pytest.raises(error, match=message):
            call()
