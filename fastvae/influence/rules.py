"""How each kind of layer makes a sample's gradient from its input and its output's gradient.

A rule sees one call of a layer: its input x and the gradient g of the losses to its output, with the rows of
all samples, those of a sample side by side. It gives factors (h [B, T, in], delta [B, T, out]), whose gradient
is sum_t delta_t (x) h_t, or the gradients themselves, [B, numel] a parameter. What makes up T: positions, rows
of a sample, draws of z.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastvae._extension import raw

__all__ = ["RULES", "Rule", "Terms", "rule_of"]


@dataclass(frozen=True)
class Terms:
    """What the cost of an affine layer is counted from: a sample's weight gradient is T outer products."""

    count: int
    """T"""
    inputs: int
    outputs: int

    @property
    def numel(self) -> int:
        """Numbers in a weight gradient."""
        return self.inputs * self.outputs


class Rule:
    """A kind of layer whose parameters are "weight" and "bias"."""

    def refusal(self, module: nn.Module) -> str | None:
        """Why this module is not covered, or None."""
        return None

    def terms(self, module: nn.Module, x: Tensor, g: Tensor, samples: int) -> Terms | None:
        """The counts of the Gram route, or None where the layer has only gradients to offer."""
        return None

    def factors(self, module: nn.Module, x: Tensor, g: Tensor, samples: int) -> tuple[Tensor, Tensor]:
        """h [B, T, in] and delta [B, T, out]; the bias gradient is sum_t delta_t if ``bias_in_terms``."""
        raise NotImplementedError

    bias_in_terms = False

    def weight_gradient(self, module: nn.Module, x: Tensor, g: Tensor, samples: int) -> Tensor:
        """[B, numel], in any order of the numbers that is the same at every call."""
        raise NotImplementedError

    def as_parameter(self, module: nn.Module, gradient: Tensor) -> Tensor:
        """A weight gradient in the parameter's own order."""
        return gradient

    def bias_gradient(self, module: nn.Module, x: Tensor, g: Tensor, samples: int) -> Tensor:
        """[B, numel]"""
        raise NotImplementedError

    def magnitude(self, kind: str, module: nn.Module, x: Tensor, g: Tensor, samples: int) -> Tensor:
        """The gradient of ``kind`` ("weight", "bias") with every term's absolute value: what round-off is part of."""
        gradient = self.weight_gradient if kind == "weight" else self.bias_gradient
        return gradient(module, x.abs(), g.abs(), samples)


def _outer(h: Tensor, delta: Tensor) -> Tensor:
    """sum_t delta_t (x) h_t of every sample: [B, out * in]."""
    return torch.bmm(delta.transpose(1, 2), h).flatten(1)


class LinearRule(Rule):
    bias_in_terms = True

    def terms(self, module: nn.Module, x: Tensor, g: Tensor, samples: int) -> Terms:
        return Terms(x.numel() // x.shape[-1] // samples, x.shape[-1], g.shape[-1])

    def factors(self, module: nn.Module, x: Tensor, g: Tensor, samples: int) -> tuple[Tensor, Tensor]:
        return x.reshape(samples, -1, x.shape[-1]), g.reshape(samples, -1, g.shape[-1])

    def weight_gradient(self, module: nn.Module, x: Tensor, g: Tensor, samples: int) -> Tensor:
        return _outer(*self.factors(module, x, g, samples))

    def bias_gradient(self, module: nn.Module, x: Tensor, g: Tensor, samples: int) -> Tensor:
        return g.reshape(samples, -1, g.shape[-1]).sum(1)


def _position_sums(g: Tensor, samples: int) -> Tensor:
    """[B, C] of images [rows, C, ...]."""
    return g.reshape(len(g), g.shape[1], -1).sum(2).reshape(samples, -1, g.shape[1]).sum(1)


def _grouped_product(small: Tensor, patches: Tensor, groups: int, samples: int) -> Tensor:
    """sum over positions of small [rows, c, L] (x) patches [rows, p, L], group by group: [B, c * p / groups]."""
    rows = len(small) // samples
    small = small.reshape(samples, rows, groups, -1, small.shape[-1])
    patches = patches.reshape(samples, rows, groups, -1, patches.shape[-1]).transpose(3, 4)
    total = small[:, 0] @ patches[:, 0]
    for row in range(1, rows):
        total += small[:, row] @ patches[:, row]
    return total.reshape(samples, -1)


Convolution = nn.Conv2d | nn.ConvTranspose2d


def _by_kernel(module: Convolution, like: Tensor) -> bool:
    """Whether our kernel takes it: on a CPU, one group, no dilation, zeros around the image."""
    plain = not isinstance(module.padding, str) and module.padding_mode == "zeros"
    return like.device.type == "cpu" and module.groups == 1 and module.dilation == (1, 1) and plain


def _convolution_gradients(module: Convolution, larger: Tensor, smaller: Tensor, samples: int) -> Tensor:
    """[B, numel], channels last: the window moves over the larger image."""
    return raw.convolution_gradients(
        larger, smaller, module.kernel_size, module.stride, module.padding, samples
    ).flatten(1)


def _channels_first(module: Convolution, gradient: Tensor) -> Tensor:
    of_smaller, of_larger, height, width = module.weight.shape
    return gradient.unflatten(1, (height * width, of_larger, of_smaller)).transpose(1, 3).flatten(1)


class Conv2dRule(Rule):
    bias_in_terms = True

    def terms(self, module: nn.Module, x: Tensor, g: Tensor, samples: int) -> Terms | None:
        assert isinstance(module, nn.Conv2d)
        if module.groups > 1:
            return None
        return Terms(len(g) // samples * g[0, 0].numel(), module.weight[0].numel(), g.shape[1])

    def factors(self, module: nn.Module, x: Tensor, g: Tensor, samples: int) -> tuple[Tensor, Tensor]:
        def as_terms(rows: Tensor) -> Tensor:
            return rows.transpose(1, 2).reshape(samples, -1, rows.shape[1])

        return as_terms(self._patches(module, x)), as_terms(g.flatten(2))

    def weight_gradient(self, module: nn.Module, x: Tensor, g: Tensor, samples: int) -> Tensor:
        assert isinstance(module, nn.Conv2d)
        if _by_kernel(module, x):
            return _convolution_gradients(module, x, g, samples)
        return _grouped_product(g.flatten(2), self._patches(module, x), module.groups, samples)

    def as_parameter(self, module: nn.Module, gradient: Tensor) -> Tensor:
        assert isinstance(module, nn.Conv2d)
        return _channels_first(module, gradient) if _by_kernel(module, gradient) else gradient

    def bias_gradient(self, module: nn.Module, x: Tensor, g: Tensor, samples: int) -> Tensor:
        return _position_sums(g, samples)

    @staticmethod
    def _patches(module: nn.Module, x: Tensor) -> Tensor:
        """[rows, in * kh * kw, positions]"""
        assert isinstance(module, nn.Conv2d)
        padding = module.padding
        if isinstance(padding, str) or module.padding_mode != "zeros":
            mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
            x, padding = F.pad(x, module._reversed_padding_repeated_twice, mode=mode), (0, 0)
        return F.unfold(x, module.kernel_size, module.dilation, padding, module.stride)


class ConvTranspose2dRule(Rule):
    def terms(self, module: nn.Module, x: Tensor, g: Tensor, samples: int) -> Terms | None:
        assert isinstance(module, nn.ConvTranspose2d)
        if module.groups > 1:
            return None
        return Terms(len(x) // samples * x[0, 0].numel(), x.shape[1], module.weight[0].numel())

    def factors(self, module: nn.Module, x: Tensor, g: Tensor, samples: int) -> tuple[Tensor, Tensor]:
        def as_terms(rows: Tensor) -> Tensor:
            return rows.transpose(1, 2).reshape(samples, -1, rows.shape[1])

        # The roles are exchanged: the gradient is h_t (x) patch of g at t.
        return as_terms(x.flatten(2)), as_terms(self._patches(module, x, g))

    def weight_gradient(self, module: nn.Module, x: Tensor, g: Tensor, samples: int) -> Tensor:
        assert isinstance(module, nn.ConvTranspose2d)
        if _by_kernel(module, x):
            return _convolution_gradients(module, g, x, samples)
        return _grouped_product(x.flatten(2), self._patches(module, x, g), module.groups, samples)

    def as_parameter(self, module: nn.Module, gradient: Tensor) -> Tensor:
        assert isinstance(module, nn.ConvTranspose2d)
        return _channels_first(module, gradient) if _by_kernel(module, gradient) else gradient

    def bias_gradient(self, module: nn.Module, x: Tensor, g: Tensor, samples: int) -> Tensor:
        return _position_sums(g, samples)

    @staticmethod
    def _patches(module: nn.Module, x: Tensor, g: Tensor) -> Tensor:
        """The patch of the output that each position of the input meets: [rows, out * kh * kw, positions]."""
        assert isinstance(module, nn.ConvTranspose2d)
        height, width = x.shape[2:]
        padding, dilation, stride = module.padding, module.dilation, module.stride
        patches = F.unfold(g, module.kernel_size, dilation, padding, stride)  # type: ignore[arg-type]
        # An output padding of at least the stride makes room for windows that no input position has.
        across = (g.shape[3] + 2 * int(padding[1]) - dilation[1] * (module.kernel_size[1] - 1) - 1) // stride[
            1
        ] + 1
        grid = patches.unflatten(2, (-1, across))
        return grid[:, :, :height, :width].flatten(2)


class NormRule(Rule):
    """Layers that end in gamma * xhat + beta: dgamma = sum g xhat, dbeta = sum g."""

    def normalised(self, module: nn.Module, x: Tensor) -> Tensor:
        """xhat"""
        raise NotImplementedError

    def _sum(self, module: nn.Module, values: Tensor, samples: int) -> Tensor:
        """Over everything of a sample that shares a parameter."""
        return _position_sums(values, samples)

    def weight_gradient(self, module: nn.Module, x: Tensor, g: Tensor, samples: int) -> Tensor:
        return self._sum(module, g * self.normalised(module, x), samples)

    def bias_gradient(self, module: nn.Module, x: Tensor, g: Tensor, samples: int) -> Tensor:
        return self._sum(module, g, samples)

    def magnitude(self, kind: str, module: nn.Module, x: Tensor, g: Tensor, samples: int) -> Tensor:
        terms = g * self.normalised(module, x) if kind == "weight" else g
        return self._sum(module, terms.abs(), samples)


class BatchNormRule(NormRule):
    def refusal(self, module: nn.Module) -> str | None:
        assert isinstance(module, nn.modules.batchnorm._BatchNorm)
        return (
            None
            if module.track_running_stats
            else "without running statistics it couples the samples of a batch"
        )

    def normalised(self, module: nn.Module, x: Tensor) -> Tensor:
        assert isinstance(module, nn.modules.batchnorm._BatchNorm)
        return F.batch_norm(x, module.running_mean, module.running_var, eps=module.eps)


class LayerNormRule(NormRule):
    def normalised(self, module: nn.Module, x: Tensor) -> Tensor:
        assert isinstance(module, nn.LayerNorm)
        return F.layer_norm(x, module.normalized_shape, eps=module.eps)

    def _sum(self, module: nn.Module, values: Tensor, samples: int) -> Tensor:
        assert isinstance(module, nn.LayerNorm) and isinstance(module.weight, Tensor)
        return values.reshape(samples, -1, module.weight.numel()).sum(1)


class GroupNormRule(NormRule):
    def normalised(self, module: nn.Module, x: Tensor) -> Tensor:
        assert isinstance(module, nn.GroupNorm)
        return F.group_norm(x, module.num_groups, eps=module.eps)


class EmbeddingRule(Rule):
    def refusal(self, module: nn.Module) -> str | None:
        assert isinstance(module, nn.Embedding)
        if module.max_norm is not None:
            return "max_norm changes the weights while they are read"
        return "scale_grad_by_freq couples the samples of a batch" if module.scale_grad_by_freq else None

    def weight_gradient(self, module: nn.Module, x: Tensor, g: Tensor, samples: int) -> Tensor:
        assert isinstance(module, nn.Embedding)
        rows, size = module.num_embeddings, module.embedding_dim
        indices, values = x.reshape(samples, -1), g.reshape(samples, -1, size)
        if module.padding_idx is not None:
            values = values.masked_fill((indices == module.padding_idx)[..., None], 0)
        total = values.new_zeros(samples, rows, size)
        return total.scatter_add_(1, indices[..., None].expand_as(values), values).flatten(1)


RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: LinearRule(),
    nn.Conv2d: Conv2dRule(),
    nn.ConvTranspose2d: ConvTranspose2dRule(),
    nn.BatchNorm1d: BatchNormRule(),
    nn.BatchNorm2d: BatchNormRule(),
    nn.BatchNorm3d: BatchNormRule(),
    nn.LayerNorm: LayerNormRule(),
    nn.GroupNorm: GroupNormRule(),
    nn.Embedding: EmbeddingRule(),
}


def rule_of(module: nn.Module) -> Rule | str:
    """The rule of a module, or why it has none."""
    forward: Callable[..., object] = type(module).forward
    for kind, rule in RULES.items():
        # A subclass counts if it computes the same; an instance with a forward of its own does not.
        if isinstance(module, kind) and forward is kind.forward and "forward" not in vars(module):
            return rule.refusal(module) or rule
    return f"no rule for {type(module).__name__}"
