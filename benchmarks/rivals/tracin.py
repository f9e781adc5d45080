"""TracIn by other means: every contestant gives the scores [M, N] of the same losses with the same noise."""

from __future__ import annotations

import copy
import logging
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from fastvae.noise import Stream, draws_of, key_of_weights, keys_of


def noise_of(model: nn.Module, x: Tensor, latent_dim: int) -> Tensor:
    """The noise that ours draws for the model with one draw and seed 0: [B, d]."""
    return Stream(draws_of(keys_of(x) ^ key_of_weights(model), 0, 1)).normal((1, latent_dim))[:, 0].to(x)


class Losses(nn.Module):
    """The loss of each sample of a beta-VAE, given its noise, as one would write it."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module, beta: float) -> None:
        super().__init__()
        self.encoder, self.decoder, self.beta = encoder, decoder, beta

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        mu, logvar = self.encoder(x).chunk(2, 1)
        logits = self.decoder(mu + torch.exp(logvar / 2) * noise)
        kl = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(1)
        bce = F.binary_cross_entropy_with_logits(logits.flatten(1), x.flatten(1), reduction="none")
        return self.beta * kl + bce.sum(1)


def loop(losses: Losses, train: Tensor, queries: Tensor, noise: Sequence[Tensor]) -> Tensor:
    """The authors' way: one backward pass a sample, one dot product a pair and parameter."""
    parameters = list(losses.parameters())

    def gradient(x: Tensor, eps: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(losses(x[None], eps[None]).sum(), parameters)

    of_queries = [gradient(x, eps) for x, eps in zip(queries, noise[1], strict=True)]
    columns = []
    for x, eps in zip(train, noise[0], strict=True):
        mine = gradient(x, eps)
        columns.append(
            [sum((a * b).sum().item() for a, b in zip(mine, other, strict=True)) for other in of_queries]
        )
    return torch.tensor(columns).T


def vmap_grad(
    losses: Losses, train: Tensor, queries: Tensor, noise: Sequence[Tensor], chunk: int = 64
) -> Tensor:
    """Per-sample gradients by torch.func, then one product."""
    parameters = {name: parameter.detach() for name, parameter in losses.named_parameters()}

    def loss(values: dict[str, Tensor], x: Tensor, eps: Tensor) -> Tensor:
        return functional_call(losses, values, (x[None], eps[None])).sum()

    each = vmap(grad(loss), in_dims=(None, 0, 0), chunk_size=chunk)

    def gradients(x: Tensor, eps: Tensor) -> Tensor:
        return torch.cat([g.flatten(1) for g in each(parameters, x, eps).values()], 1)

    return gradients(queries, noise[1]) @ gradients(train, noise[0]).T


class _Captured:
    """Inputs and output gradients of every layer with parameters, by hooks."""

    def __init__(self, losses: Losses, x: Tensor, noise: Tensor) -> None:
        seen: list[tuple[Any, Tensor, Tensor]] = []
        kinds = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
        layers = [module for module in losses.modules() if isinstance(module, kinds)]
        handles = [
            layer.register_forward_hook(lambda layer, args, out: seen.append((layer, args[0].detach(), out)))
            for layer in layers
        ]
        total = losses(x, noise).sum()
        for handle in handles:
            handle.remove()
        grads = torch.autograd.grad(total, [out for _, _, out in seen])
        self.layers = [(layer, h, delta) for (layer, h, _), delta in zip(seen, grads, strict=True)]


def gram(losses: Losses, train: Tensor, queries: Tensor, noise: Sequence[Tensor]) -> Tensor:
    """Gram matrices of the factors, in plain PyTorch; Linear layers only."""
    a, b = _Captured(losses, queries, noise[1]), _Captured(losses, train, noise[0])
    total: Tensor | float = 0.0
    for (_, h_a, d_a), (_, h_b, d_b) in zip(a.layers, b.layers, strict=True):
        total = total + (h_a @ h_b.T + 1) * (d_a @ d_b.T)
    assert isinstance(total, Tensor)
    return total


def dense(losses: Losses, train: Tensor, queries: Tensor, noise: Sequence[Tensor]) -> Tensor:
    """Per-sample gradients from the factors, layer by layer, then one product over all parameters."""

    def gradients(x: Tensor, eps: Tensor) -> Tensor:
        parts = []
        for layer, h, delta in _Captured(losses, x, eps).layers:
            if isinstance(layer, nn.Linear):
                parts += [torch.einsum("no,ni->noi", delta, h).flatten(1), delta]
                continue
            image, filters = (h, delta) if isinstance(layer, nn.Conv2d) else (delta, h)
            patches = F.unfold(image, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
            parts.append(torch.einsum("nol,npl->nop", filters.flatten(2), patches).flatten(1))
            parts.append(delta.sum((2, 3)))
        return torch.cat(parts, 1)

    return gradients(queries, noise[1]) @ gradients(train, noise[0]).T


class _Sum(nn.Module):
    """The model gives the losses; captum wants a loss function of output and target."""

    reduction = "sum"

    def forward(self, losses: Tensor, target: Tensor) -> Tensor:
        return losses.sum()


def captum(losses: Losses, train: Tensor, queries: Tensor, noise: Sequence[Tensor]) -> Callable[[], object]:
    """captum's TracInCP over all layers, which it takes if they are Linear or Conv2d.

    Raises:
        ImportError: captum is not installed.
    """
    from captum.influence import TracInCP

    layers = [name for name, module in losses.named_modules() if isinstance(module, nn.Linear)]
    tracin = TracInCP(
        losses,
        torch.utils.data.TensorDataset(train, noise[0], train),
        ["none"],
        lambda model, checkpoint: 1.0,
        layers,
        _Sum(),
        64,
        sample_wise_grads_per_batch=True,
    )
    return lambda: tracin.influence((queries, noise[1], queries))


def kronfluence(
    losses: Losses, train: Tensor, queries: Tensor, noise: Sequence[Tensor]
) -> Callable[[], object]:
    """kronfluence without preconditioning; it takes Linear and Conv2d layers and keeps its results in files.

    Raises:
        ImportError: kronfluence is not installed.
    """
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments
    from kronfluence.task import Task

    class Loss(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            return model(*batch).sum()

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return model(*batch).sum()

    task = Loss()
    folder = tempfile.TemporaryDirectory()
    analyzer = Analyzer(
        "tracin",
        prepare_model(copy.deepcopy(losses), task),
        task,
        cpu=train.device.type == "cpu",
        log_level=logging.ERROR,
        disable_tqdm=True,
        output_dir=folder.name,
    )
    data = [torch.utils.data.TensorDataset(x, eps) for x, eps in zip((train, queries), noise, strict=True)]
    analyzer.fit_all_factors(
        "identity",
        data[0],
        per_device_batch_size=len(train),
        factor_args=FactorArguments(strategy="identity"),
    )

    def scores() -> Tensor:
        assert folder.name  # kept as long as this function
        analyzer.compute_pairwise_scores(
            "scores",
            "identity",
            data[1],
            data[0],
            per_device_query_batch_size=len(queries),
            per_device_train_batch_size=len(train),
            overwrite_output_dir=True,
        )
        return analyzer.load_pairwise_scores("scores")["all_modules"]

    return scores
