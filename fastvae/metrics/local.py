"""Disentanglement in small neighbourhoods of the factors.

Rhodes and Lee, "Local Disentanglement in Variational Auto-Encoders Using Jacobian L1 Regularization", NeurIPS
2021, section 4: the scores of points around a centre, averaged over random centres.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from fastvae.arguments import expect, expect_at_least, expect_numbers
from fastvae.data import FactorSpace
from fastvae.metrics.disentanglement import mig, modularity
from fastvae.models import BaseVAE
from fastvae.private import private_copy
from fastvae.wrappers import unwrap

__all__ = ["codes_of", "local_codes", "local_mig", "local_modularity"]

Encoder = BaseVAE | Callable[[Tensor], Tensor]

# Images in an encoder at once.
_BATCH = 500


def local_mig(
    model: Encoder,
    space: FactorSpace,
    rho: float = 0.1,
    *,
    num_points: int = 10_000,
    num_clusters: int = 20,
    bins: int = 5,
    seed: int = 0,
    continuity_cutoff: int = 0,
) -> float:
    """Mean over random centres of the :func:`mig` of points around them.

    Args, errors, and how points are drawn: see :func:`local_codes`. ``bins``: see :func:`mig`. For several
    scores of one model, loop over ``local_codes`` yourself: encoding is what takes time.
    """
    clusters = local_codes(
        model,
        space,
        rho,
        num_points=num_points,
        num_clusters=num_clusters,
        seed=seed,
        continuity_cutoff=continuity_cutoff,
    )
    return sum(mig(codes, factors, bins=bins) for codes, factors in clusters) / num_clusters


def local_modularity(
    model: Encoder,
    space: FactorSpace,
    rho: float = 0.1,
    *,
    num_points: int = 10_000,
    num_clusters: int = 20,
    bins: int = 5,
    seed: int = 0,
    continuity_cutoff: int = 0,
    count_constant_factors: bool = False,
) -> float:
    """Mean over random centres of the :func:`modularity` of points around them; as :func:`local_mig`.

    The authors' figures are those with ``continuity_cutoff=10, count_constant_factors=True``.
    """
    clusters = local_codes(
        model,
        space,
        rho,
        num_points=num_points,
        num_clusters=num_clusters,
        seed=seed,
        continuity_cutoff=continuity_cutoff,
    )
    scores = [
        modularity(codes, factors, bins=bins, count_constant_factors=count_constant_factors)
        for codes, factors in clusters
    ]
    return sum(scores) / num_clusters


def local_codes(
    model: Encoder,
    space: FactorSpace,
    rho: float = 0.1,
    *,
    num_points: int = 10_000,
    num_clusters: int = 20,
    seed: int = 0,
    continuity_cutoff: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Codes and factors of points around random centres, one cluster after the other.

    A centre is a uniform point of the space. Factor j of the points around it is uniform over the values
    within floor(sizes[j] rho) of the centre's. At a border the neighbourhood is cut off, as in the authors'
    code; it does not go round, not even for a rotation. A factor with floor(sizes[j] rho) = 0 keeps the
    centre's value, and at rho = 1 all factors take all their values.

    Args:
        model: see :func:`codes_of`.
        space: of the images, such as ``fastvae.data.three_dots().space``.
        rho: in (0, 1], part of a factor's range.
        num_points: in a cluster.
        num_clusters: how many pairs come.
        seed: of centres and points; models that are compared should meet the same ones.
        continuity_cutoff: factors of fewer values than this keep the centre's, at rho = 1 too, as in the authors'
            code with its 10. 0: none does.

    Yields:
        codes [num_points, d] and factors int64 [num_points, F], on the CPU.

    Raises:
        ValueError: numbers out of range, a rho or a cutoff that lets no factor vary, or codes that do not fit.
    """
    expect_numbers("local_codes", rho=rho, seed=seed)
    expect_at_least("local_codes", 1, num_points=num_points, num_clusters=num_clusters)
    expect_at_least("local_codes", 0, continuity_cutoff=continuity_cutoff)
    sizes = torch.tensor(space.sizes, device="cpu")
    reach = (sizes.double() * rho).floor().long()
    expect(
        0 < rho <= 1 and bool(((reach > 0) & (sizes > 1)).any()),
        "local_codes: rho: expected a number in (0, 1] that lets one of the factors vary, of "
        f"{', '.join(map(str, space.sizes))} values",
        rho,
    )
    reach = torch.where(sizes >= continuity_cutoff, reach, 0)
    expect(
        bool(reach.any()),
        "local_codes: continuity_cutoff: expected one of the factors that vary, of "
        f"{', '.join(map(str, space.sizes))} values, to have as many",
        continuity_cutoff,
    )
    return _clusters(model, space, reach, num_points, num_clusters, seed)


def _clusters(
    model: Encoder, space: FactorSpace, reach: Tensor, num_points: int, num_clusters: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(int(seed))
    last = torch.tensor(space.sizes, device="cpu") - 1
    for _ in range(num_clusters):
        centre = space.sample(1, generator)[0]
        low, high = (centre - reach).clamp_min(0), torch.minimum(centre + reach, last)
        uniform = torch.rand(num_points, len(last), generator=generator, dtype=torch.float64, device="cpu")
        factors = low + (uniform * (high - low + 1)).long()
        yield codes_of(model, space, factors), factors


@torch.no_grad()
def codes_of(model: Encoder, space: FactorSpace, factors: Tensor) -> Tensor:
    """The codes of the images that ``factors`` make.

    Args:
        model: a VAE, whose codes are the means of q(z | x), computed by a copy of it in eval mode; or a function of
            images, float32 [n, C, H, W] in [0, 1] on the CPU, to codes [n, d].
        space: of the images.
        factors: int64 [N, F].

    Returns:
        [N, d] on the CPU, detached.

    Raises:
        ValueError: factors outside the space, or codes of another shape.
    """
    if isinstance(model, nn.Module) and isinstance(inner := unwrap(model), BaseVAE):
        private = private_copy(inner)
        device = next(private.parameters()).device
        return codes_of(lambda x: private.encode(x.to(device))[0].cpu(), space, factors)
    parts = []
    for part in factors.split(_BATCH):
        codes = model(space.render(part).to(torch.float32).div_(255))
        if codes.dim() != 2 or len(codes) != len(part):
            raise ValueError(f"codes_of: model: expected codes [{len(part)}, d], got {list(codes.shape)}")
        parts.append(codes)
    return torch.cat(parts)
