"""The Jacobian L1 penalty of a decoder: sum of |dy/dz|, with the gradient in closed form."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fastvae import reference


def jacobian_l1(
    decoder: nn.Module,
    z: Tensor,
    reduction: str = "mean",
    *,
    output: str = "identity",
    latents: Sequence[int] | Tensor | None = None,
    p: int = 1,
) -> Tensor:
    """Sum over latents i and outputs o of |d y_o / d z_i|^p, y = psi(decoder(z)), for each sample.

    Rhodes and Lee, Local Disentanglement in Variational Auto-Encoders Using Jacobian L1 Regularization,
    NeurIPS 2021, equation (5); exact, where the authors take forward differences.

    Args:
        decoder: a module that :func:`fastvae.lowering.lower` can read, from [B, d] to [B, ...].
            Any other module that PyTorch can differentiate in forward mode works through autograd, after one
            warning; under ``torch.compile(fullgraph=True)`` it raises instead.
        z: codes [B, d], float32 or float64, CPU or CUDA.
        reduction: "mean" or "sum" over the samples, or "none".
        output: psi, "identity" or "sigmoid" (for a decoder that returns logits).
        latents: the i to sum over, distinct integers in [0, d); None for all.
        p: 1 for absolute values, 2 for squares (no root and no factor).

    Returns:
        [] or, with "none", [B]; the gradient reaches z and every parameter of the decoder.
    """
    return reference.jacobian_l1(decoder, z, reduction, output=output, latents=latents, p=p)
