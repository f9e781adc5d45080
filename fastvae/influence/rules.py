"""How each kind of layer makes a sample's gradient from its input and its output's gradient.

A rule sees one call of a layer: its input x and the gradient g of the losses to its output, with the rows of
all samples, those of a sample side by side. It gives factors (h [B, T, in], delta [B, T, out]), whose gradient
is sum_t delta_t (x) h_t, or the gradients themselves, [B, numel] a parameter. What makes up T: positions, rows
of a sample, draws of z.
"""

from __future__ import annotations

import math
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


Convolution = nn.modules.conv._ConvNd


@dataclass(frozen=True)
class _Window:
    """Where a convolution looks; one over a line is one over an image of height 1."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    def patches(self, x: Tensor) -> Tensor:
        """[rows, channels * kernel, *positions] of [rows, channels, *positions]."""
        reaches = [d * (k - 1) + 1 for k, d in zip(self.kernel, self.dilation, strict=True)]
        if x.dim() == 4:
            grid = [
                (size + 2 * p - reach) // s + 1
                for size, p, reach, s in zip(x.shape[2:], self.padding, reaches, self.stride, strict=True)
            ]
            return F.unfold(x, self.kernel, self.dilation, self.padding, self.stride).unflatten(2, grid)
        x = F.pad(x, [p for p in reversed(self.padding) for _ in range(2)])
        for i, (reach, stride) in enumerate(zip(reaches, self.stride, strict=True)):
            x = x.unfold(2 + i, reach, stride)
        for i, dilation in enumerate(self.dilation):
            x = x[(slice(None),) * (2 + len(self.kernel) + i) + (slice(None, None, dilation),)]
        dims = len(self.kernel)
        order = [0, 1, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims)]
        return x.permute(order).flatten(1, 1 + dims)


def _window_of(module: Convolution) -> _Window:
    """Of what is left after padding that is done apart."""
    padding = (0,) * len(module.kernel_size) if _is_padded_apart(module) else module.padding
    window: list[tuple[int, ...]] = [
        module.kernel_size,
        module.stride,
        tuple(map(int, padding)),
        module.dilation,
    ]
    if len(module.kernel_size) == 1:
        window = [(of_height, *of_width) for of_height, of_width in zip((1, 1, 0, 1), window, strict=True)]
    return _Window(*window)


def _is_padded_apart(module: Convolution) -> bool:
    return isinstance(module.padding, str) or module.padding_mode != "zeros"


def _image(x: Tensor) -> Tensor:
    """[rows, channels, 1, positions] of [rows, channels, positions]."""
    return x.unsqueeze(2) if x.dim() == 3 else x


def _as_terms(rows: Tensor, samples: int) -> Tensor:
    """[B, rows * positions, channels] of [rows, channels, *positions]."""
    rows = rows.flatten(2)
    return rows.transpose(1, 2).reshape(samples, -1, rows.shape[1])


class _ConvolutionRule(Rule):
    def weight_gradient(self, module: nn.Module, x: Tensor, g: Tensor, samples: int) -> Tensor:
        assert isinstance(module, Convolution)
        larger, smaller = self._ordered(module, _image(x), _image(g))
        window = _window_of(module)
        if _by_kernel(module, x):
            found: Tensor = raw.convolution_gradients(
                larger, smaller, window.kernel, window.stride, window.padding, samples
            )
            return found.flatten(1)
        patches = self._patches(module, larger, smaller)
        return _grouped_product(smaller.flatten(2), patches.flatten(2), module.groups, samples)

    def as_parameter(self, module: nn.Module, gradient: Tensor) -> Tensor:
        assert isinstance(module, Convolution)
        if not _by_kernel(module, gradient):
            return gradient
        # Our kernel's are channels last.
        of_smaller, of_larger, *kernel = module.weight.shape
        return gradient.unflatten(1, (math.prod(kernel), of_larger, of_smaller)).transpose(1, 3).flatten(1)

    def bias_gradient(self, module: nn.Module, x: Tensor, g: Tensor, samples: int) -> Tensor:
        return _position_sums(g, samples)

    def _ordered(self, module: Convolution, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """What the window moves over, and what it meets at each of its places."""
        raise NotImplementedError

    @staticmethod
    def _patches(module: Convolution, larger: Tensor, smaller: Tensor) -> Tensor:
        """What the window sees at each place: [rows, channels * kernel, *positions]."""
        patches = _window_of(module).patches(larger)
        # An output padding of at least the stride makes room for windows that no position has.
        for i, size in enumerate(smaller.shape[2:]):
            patches = patches.narrow(2 + i, 0, size)
        return patches


def _by_kernel(module: Convolution, like: Tensor) -> bool:
    """Whether our kernel takes it: on a CPU, one group, no dilation, zeros around the image."""
    plain = len(module.kernel_size) < 3 and module.groups == 1 and set(module.dilation) == {1}
    return like.device.type == "cpu" and plain and not _is_padded_apart(module)


class ConvRule(_ConvolutionRule):
    bias_in_terms = True

    def terms(self, module: nn.Module, x: Tensor, g: Tensor, samples: int) -> Terms | None:
        assert isinstance(module, Convolution)
        if module.groups > 1:
            return None
        return Terms(len(g) // samples * g[0, 0].numel(), module.weight[0].numel(), g.shape[1])

    def factors(self, module: nn.Module, x: Tensor, g: Tensor, samples: int) -> tuple[Tensor, Tensor]:
        assert isinstance(module, Convolution)
        patches = self._patches(module, *self._ordered(module, _image(x), _image(g)))
        return _as_terms(patches, samples), _as_terms(g, samples)

    def _ordered(self, module: Convolution, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        if _is_padded_apart(module):
            mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
            sides = module._reversed_padding_repeated_twice
            # PyTorch pads a line as a line in all modes.
            x = _image(F.pad(x.flatten(2) if len(sides) == 2 else x, sides, mode=mode))
        return x, g


class ConvTransposeRule(_ConvolutionRule):
    def terms(self, module: nn.Module, x: Tensor, g: Tensor, samples: int) -> Terms | None:
        assert isinstance(module, Convolution)
        if module.groups > 1:
            return None
        return Terms(len(x) // samples * x[0, 0].numel(), x.shape[1], module.weight[0].numel())

    def factors(self, module: nn.Module, x: Tensor, g: Tensor, samples: int) -> tuple[Tensor, Tensor]:
        assert isinstance(module, Convolution)
        # The roles are exchanged: the gradient is h_t (x) patch of g at t.
        patches = self._patches(module, *self._ordered(module, _image(x), _image(g)))
        return _as_terms(x, samples), _as_terms(patches, samples)

    def _ordered(self, module: Convolution, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        return g, x


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
        assert isinstance(module.weight, Tensor)
        return values.reshape(samples, -1, module.weight.numel()).sum(1)


class RMSNormRule(LayerNormRule):
    def normalised(self, module: nn.Module, x: Tensor) -> Tensor:
        assert isinstance(module, nn.RMSNorm)
        return F.rms_norm(x, module.normalized_shape, eps=module.eps)


class GroupNormRule(NormRule):
    def normalised(self, module: nn.Module, x: Tensor) -> Tensor:
        assert isinstance(module, nn.GroupNorm)
        return F.group_norm(x, module.num_groups, eps=module.eps)


class InstanceNormRule(NormRule):
    def normalised(self, module: nn.Module, x: Tensor) -> Tensor:
        assert isinstance(module, nn.modules.instancenorm._InstanceNorm)
        own = not module.track_running_stats
        return F.instance_norm(x, module.running_mean, module.running_var, None, None, own, eps=module.eps)


class PReLURule(NormRule):
    """What is multiplied by the weight is min(x, 0) instead of xhat."""

    def normalised(self, module: nn.Module, x: Tensor) -> Tensor:
        return x.clamp(max=0)

    def _sum(self, module: nn.Module, values: Tensor, samples: int) -> Tensor:
        assert isinstance(module, nn.PReLU)
        if module.num_parameters == 1:
            return values.reshape(samples, -1).sum(1, keepdim=True)
        return _position_sums(values, samples)


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
    nn.Conv1d: ConvRule(),
    nn.Conv2d: ConvRule(),
    nn.Conv3d: ConvRule(),
    nn.ConvTranspose1d: ConvTransposeRule(),
    nn.ConvTranspose2d: ConvTransposeRule(),
    nn.ConvTranspose3d: ConvTransposeRule(),
    nn.BatchNorm1d: BatchNormRule(),
    nn.BatchNorm2d: BatchNormRule(),
    nn.BatchNorm3d: BatchNormRule(),
    nn.InstanceNorm1d: InstanceNormRule(),
    nn.InstanceNorm2d: InstanceNormRule(),
    nn.InstanceNorm3d: InstanceNormRule(),
    nn.LayerNorm: LayerNormRule(),
    nn.RMSNorm: RMSNormRule(),
    nn.PReLU: PReLURule(),
    nn.GroupNorm: GroupNormRule(),
    nn.Embedding: EmbeddingRule(),
}


def rule_of(module: nn.Module) -> Rule | str:
    """The rule of a module, or why it has none."""
    forward: object = getattr(type(module), "forward", None)
    for kind, rule in RULES.items():
        # A subclass counts if it computes the same; an instance with a forward of its own does not.
        if isinstance(module, kind) and forward is kind.forward and "forward" not in vars(module):
            return rule.refusal(module) or rule
    return f"no rule for {type(module).__name__}"
