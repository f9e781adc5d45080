"""log p(x | params) by one kernel: as the likelihoods' own, whatever is done with it."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import pytest
import torch
from model_problems import seeded
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from weight_problems import LIKELIHOODS, PIXELS, data, weights

from fastvae import VAE, Gaussian
from fastvae.likelihoods import Categorical, Likelihood, NegativeBinomial
from fastvae.likelihoods.fused import fused_log_prob

ALL: dict[str, Callable[[], Likelihood]] = {
    **{name: lambda likelihood=likelihood: likelihood for name, likelihood in LIKELIHOODS.items()},
    "learned scale": lambda: Gaussian("learned", shape=(PIXELS,), initial=0.7),
    "learned dispersion": lambda: NegativeBinomial("learned", initial=2.0),
}
each = pytest.mark.parametrize("name", list(ALL))


def parameters(likelihood: Likelihood, dtype: torch.dtype = torch.float64) -> Tensor:
    drawn = torch.randn(4, PIXELS * likelihood.values_per_element, generator=seeded(5), dtype=dtype)
    return drawn.requires_grad_()


@each
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_value_and_gradients(name: str, weighted: bool) -> None:
    likelihood = ALL[name]()
    if isinstance(likelihood, nn.Module):
        likelihood.double()
    params, x = parameters(likelihood), data(likelihood, 4)
    weight = weights(4) if weighted else None
    found = fused_log_prob(likelihood, params, x, weight)
    if isinstance(likelihood, Categorical):
        assert found is None
        return
    assert found is not None
    leaves = [params, *(likelihood.parameters() if isinstance(likelihood, nn.Module) else ())]
    expected = likelihood.log_prob(params, x, weight)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    cotangent = torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64)
    for create_graph in (False, True):
        mine, theirs = (
            torch.autograd.grad(each, leaves, cotangent, create_graph=create_graph, retain_graph=True)
            for each in (found, expected)
        )
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    # The gradient of a gradient is PyTorch's.
    mine, theirs = (
        torch.autograd.grad(sum(g.square().sum() for g in gs), leaves, allow_unused=True)
        for gs in (mine, theirs)
    )
    for a, b in zip(mine, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@each
def test_float32_is_as_exact_as_pytorch(name: str) -> None:
    likelihood = ALL[name]()
    params, x = parameters(likelihood, torch.float32), data(likelihood, 4).float()
    found = fused_log_prob(likelihood, params, x)
    if found is None:
        return
    wide = likelihood.log_prob(params.double(), x.double())
    own = likelihood.log_prob(params, x)
    error, allowed = (found - wide).abs().max(), (own - wide).abs().max()
    assert error <= 2 * allowed + 1e-6 * wide.abs().max()


def test_images_keep_their_layout_and_shapes_that_do_not_fit_are_refused() -> None:
    params = torch.randn(3, 4, 5, 6, generator=seeded(), dtype=torch.float64)
    x = torch.rand(3, 2, 5, 6, generator=seeded(1), dtype=torch.float64)
    likelihood = LIKELIHOODS["Gaussian head"]
    for layout in (torch.contiguous_format, torch.channels_last):
        leaf = params.to(memory_format=layout).requires_grad_()
        found = fused_log_prob(likelihood, leaf, x)
        assert found is not None
        expected = likelihood.log_prob(leaf, x)
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)
        mine, theirs = (torch.autograd.grad(each.sum(), leaf)[0] for each in (found, expected))
        torch.testing.assert_close(mine, theirs, rtol=1e-13, atol=1e-13)
    with pytest.raises(ValueError, match="GaussianHead: x: 30 elements a sample need 60 decoder outputs"):
        fused_log_prob(likelihood, params, x[:, :1])
    assert fused_log_prob(likelihood, params[:0], x[:0]).shape == (0,)  # type: ignore[union-attr]


def test_a_model_trains_by_it_and_hooks_are_called() -> None:
    torch.manual_seed(0)
    encoder, decoder = nn.Linear(PIXELS, 4), nn.Sequential(nn.Linear(2, 8), nn.GLU(), nn.Linear(4, PIXELS))
    likelihood = Gaussian("learned", initial=0.5)
    model = VAE(encoder, decoder, likelihood, latent_dim=2).double()
    z, x = torch.randn(4, 2, dtype=torch.float64), torch.rand(4, PIXELS, dtype=torch.float64)
    found = model.log_px(z, x)
    expected = likelihood.log_prob(decoder(z), x)
    for a, b in zip(
        torch.autograd.grad(found.sum(), [*decoder.parameters(), *likelihood.parameters()]),
        torch.autograd.grad(expected.sum(), [*decoder.parameters(), *likelihood.parameters()]),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    calls = []
    for register in (
        likelihood.register_forward_hook,
        lambda hook: likelihood.register_full_backward_pre_hook(lambda *_: hook()),
        lambda hook: register_module_forward_hook(lambda of, *_: hook() if of is likelihood else None),
    ):
        handle = register(lambda *_: calls.append(1))
        found = model.log_px(z, x)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        found.sum().backward()
        handle.remove()
    assert calls == [1, 1, 1]
    assert pickle.loads(pickle.dumps(model)).log_px(z, x).shape == (4,)


def test_transforms_and_forward_mode_see_pytorch() -> None:
    decoder = nn.Linear(2, PIXELS).double()
    model = VAE(nn.Linear(PIXELS, 4).double(), decoder, LIKELIHOODS["Student t"], latent_dim=2)
    z, x = torch.randn(4, 2, dtype=torch.float64), torch.rand(4, PIXELS, dtype=torch.float64)
    expected = model.likelihood.log_prob(decoder(z), x)
    found, tangent = torch.func.jvp(lambda z: model.log_px(z, x), (z,), (torch.ones_like(z),))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(model.log_px(z.requires_grad_(), x).sum(), z)
    torch.testing.assert_close(tangent, gradient.sum(1), rtol=1e-12, atol=1e-12)
    each = torch.vmap(lambda z, x: model.log_px(z[None], x[None])[0])(z.detach(), x)
    torch.testing.assert_close(each, expected, rtol=1e-12, atol=1e-12)
    compiled = torch.compile(model.log_px, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(z.detach(), x), expected, rtol=1e-12, atol=1e-12)
