"""How well codes separate the factors of their images, from the mutual information of each with each."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvae.arguments import expect, expect_numbers

__all__ = ["factor_information", "mig", "modularity"]

# Entropies of constants come out at 1e-15 by rounding; a single different point among a million gives 1e-5.
_NOTHING = 1e-9


def mig(codes: Tensor, factors: Tensor, *, bins: int = 20) -> float:
    """Mutual information gap: mean over factors of (I_1 - I_2) / H.

    I_1 and I_2 are the largest and the second largest mutual information of a code with the factor, H is the
    factor's entropy (Chen, Li, Grosse, Duvenaud, "Isolating Sources of Disentanglement in Variational
    Autoencoders", NeurIPS 2018, equation 6). Factors that do not vary have H = 0 and are left out of the
    mean; for a single code I_2 is 0.

    Args:
        codes: [N, d] floating: the codes of N images, such as means of q(z | x).
        factors: [N, F] integers of at least 0.
        bins: of equal width, from the smallest to the largest value of each code.

    Returns:
        0 to 1. It is 1 if each factor is a function of one bin, about which no other code says anything.

    Raises:
        ValueError: shapes or dtypes that do not fit, codes that are not finite, or no factor that varies.
    """
    information, entropy = factor_information(codes, factors, bins=bins)
    varies = _varying("mig", entropy)
    padded = torch.cat([information, torch.zeros_like(information[:1])])
    first, second = padded[:, varies].topk(2, dim=0).values
    return float(((first - second) / entropy[varies]).mean())


def modularity(
    codes: Tensor, factors: Tensor, *, bins: int = 20, count_constant_factors: bool = False
) -> float:
    """Modularity: mean over codes of 1 - (sum_j I_j^2 - max_j I_j^2) / (max_j I_j^2 (F - 1)).

    I_j is the mutual information of the code with factor j (Ridgeway, Mozer, "Learning Deep Disentangled
    Embeddings with the F-Statistic Loss", NeurIPS 2018, section 3). A code that says nothing about any factor
    scores 0; with F = 1 all others score 1.

    Args, errors: those of :func:`mig`, and
        count_constant_factors: whether F counts factors that do not vary. No code says anything about those, so that
            each raises the score of all others: disentanglement_lib's code and Rhodes and Lee's, which is made from
            it, count them. False: F counts the factors that vary.

    Returns:
        0 to 1. It is 1 if each code says something about exactly one factor.
    """
    information, entropy = factor_information(codes, factors, bins=bins)
    varies = _varying("modularity", entropy)
    squares = information[:, varies].square()
    largest = squares.amax(1)
    counted = len(varies) if count_constant_factors else squares.shape[1]
    others = (squares.sum(1) - largest) / (largest * max(1, counted - 1))
    return float(torch.where(largest > _NOTHING**2, 1 - others, 0.0).mean())


def factor_information(codes: Tensor, factors: Tensor, *, bins: int) -> tuple[Tensor, Tensor]:
    """Mutual information of every code with every factor, and the entropy of every factor, in nats.

    They are those of the histograms, biased upwards: a code that has nothing to do with a factor of V values
    comes out at about (bins - 1) (V - 1) / (2 N).

    Args, errors: those of :func:`mig`.

    Returns:
        [d, F] and [F], float64.
    """
    _check(codes, factors, bins)
    pairs = factors[:, None, :].long() * bins + _in_bins(codes.detach(), bins)[:, :, None]
    num_pairs, cells = pairs[0].numel(), (int(factors.max()) + 1) * bins
    # All histograms as one, the cells of each (code, factor) in a range of their own.
    offsets = torch.arange(0, num_pairs * cells, cells, device=pairs.device)
    counts = torch.bincount((pairs.flatten(1) + offsets).flatten(), minlength=num_pairs * cells)
    p = counts.double().reshape(*pairs.shape[1:], -1, bins) / len(codes)
    factor_entropy = _entropy(p.sum(3))
    information = factor_entropy + _entropy(p.sum(2)) - _entropy(p.flatten(2))
    return information.clamp_min(0), factor_entropy[0]


def _in_bins(codes: Tensor, bins: int) -> Tensor:
    """The bin 0 .. bins - 1 of each value among its column: int64 [N, d]."""
    low, high = codes.double().aminmax(dim=0)
    width = torch.where(high > low, (high - low) / bins, 1.0)
    return ((codes - low) / width).long().clamp_max(bins - 1)


def _entropy(p: Tensor) -> Tensor:
    """In nats, along the last dimension."""
    return torch.special.entr(p).sum(-1)


def _varying(name: str, entropy: Tensor) -> Tensor:
    varies = entropy > _NOTHING
    if not bool(varies.any()):
        raise ValueError(f"{name}: factors: expected one that varies, got {len(entropy)} constant ones")
    return varies


def _check(codes: Tensor, factors: Tensor, bins: int) -> None:
    expect_numbers("disentanglement", bins=bins)
    expect(bins >= 1, "bins: expected at least 1", bins)
    expect(
        codes.dim() == 2 and codes.is_floating_point() and 0 not in codes.shape,
        "codes: expected floating [N, d], not empty",
        f"{codes.dtype} {list(codes.shape)}",
    )
    expect(
        factors.dim() == 2
        and not factors.is_floating_point()
        and len(factors) == len(codes)
        and 0 not in factors.shape,
        f"factors: expected integers [{len(codes)}, F]",
        f"{factors.dtype} {list(factors.shape)}",
    )
    if not bool(torch.isfinite(codes).all()):
        raise ValueError(f"codes: expected finite values, got {int((~torch.isfinite(codes)).sum())} others")
    expect(int(factors.min()) >= 0, "factors: expected integers of at least 0", int(factors.min()))
