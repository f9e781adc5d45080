"""The factors of an HVAE's gradients where its decoder is read and swept in PyTorch: for kernels see sweeps.py.

Walking a trajectory back (fastvae/network/flow.py), every layer is seen with the cotangents of its tangent and of its
result and with its inputs' values and tangents, at each of the K + 1 forces: of a linear layer the pairs
(delta_dot, h) and (delta, hdot).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from fastvae.influence.sweeps import Call, Sweep, flow_parameters, is_stock
from fastvae.influence.uses import Seen, Uses
from fastvae.likelihoods import Likelihood
from fastvae.likelihoods.learned import without_parameters
from fastvae.likelihoods.weighted import weighted
from fastvae.lowering import CoupledSamples, UnsupportedLayer
from fastvae.models import HVAE
from fastvae.network.cache import ReadNetwork, read_network
from fastvae.network.flow import Evaluation, WayBack, walk
from fastvae.network.heads import make_head
from fastvae.network.layers import Layer, Point
from fastvae.network.once import backward_pass
from fastvae.network.sweeps import Inputs
from fastvae.ops.hamiltonian_flow import STORE_LIMIT_BYTES
from fastvae.reference import expand_step_size

__all__ = ["ReadSweep", "uses_of"]


def uses_of(model: nn.Module, z: Tensor, condition: Tensor | None) -> Uses | None:
    """How the decoder of an HVAE uses its parameters, for codes like z [B, d]; None where it is not read."""
    if not isinstance(model, HVAE) or not is_stock(model) or z.dim() != 2:
        return None
    try:
        return _read(model, z, condition)[1]
    except (CoupledSamples, UnsupportedLayer, ValueError):
        return None


def _read(model: Any, z: Tensor, condition: Tensor | None) -> tuple[ReadNetwork, Uses, Likelihood]:
    decoder, like = without_parameters(model.decoder, model.likelihood)
    tensors = [*decoder.parameters(), *decoder.buffers()]
    if any(tensor.is_floating_point() and tensor.dtype != z.dtype for tensor in tensors):
        raise UnsupportedLayer("tensors of several dtypes")
    network = read_network(decoder, z, condition=condition, strip_sigmoid=like.probs)
    found, own = Uses.names_of_sources(network, names := _names_of_decoder(model)), names.values()
    known: Uses | None = network.sweeps.uses
    if known is None or known.name_of != found or known.numels.keys() != set(own):
        numels = {name: model.get_parameter(name).numel() for name in own}
        known = network.sweeps.uses = Uses(network, found, numels, z, condition)
    return network, known, like


def _names_of_decoder(model: nn.Module) -> dict[int, str]:
    """By id, the parameters that nothing else of the model has."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not is_of_decoder(name):
            names.pop(id(parameter), None)
    return names


def is_of_decoder(name: str) -> bool:
    """Whether a parameter of this name is one of what gives log p(x | z)."""
    return name.startswith(("decoder.", "likelihood."))


@dataclass
class ReadSweep(Sweep):
    """One flow of an HVAE and the way back, in sweeps that are watched."""

    seen: dict[int, list[Seen]] = field(default_factory=dict)
    """By layer, at every point."""
    _network: ReadNetwork | None = None
    _uses: Uses | None = None
    _rows: int = 0

    def calls(self, layer: str) -> list[Call]:
        """Of linear layers and convolutions, by the name of their weight."""
        assert self._uses is not None
        return self._uses.calls(layer, self.seen)

    def gradients(self, names: list[str], samples: int) -> dict[str, Tensor]:
        """[B, numel] of the flow's own parameters, and of those of the decoder that go by no factors."""
        assert self._network is not None and self._uses is not None
        of_flow = [name for name in flow_parameters(self.model) if name in names]
        found = super().gradients(of_flow, samples) if of_flow else {}
        others = [name for name in names if name not in of_flow]
        return found | self._uses.gradients(others, self.seen, self._network, self._rows, samples)

    def _flow(
        self,
        z: Tensor,
        rho: Tensor,
        x: Tensor,
        step_size: Tensor,
        alpha: Tensor,
        condition: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        eps = expand_step_size(step_size, alpha.shape[0], z.shape[1], z)
        self._network, self._uses, like = _read(self.model, z.detach(), condition)
        self._rows = len(z)
        like = weighted("TracIn", like, weight, x)
        return _ReadFlow.apply(self._entered(z), rho, x, eps.detach(), alpha.detach(), like, self)

    def _watch(self, layer: Layer, point: Point, dy_dot: Any, dy: Any, dots: list[Any]) -> None:
        if self._uses is not None and self._uses.slots[layer.index]:
            seen = self._uses.see(layer, point, dy_dot, dy, dots, self._rows)
            self.seen.setdefault(layer.index, []).append(seen)


class _ReadFlow(torch.autograd.Function):
    """The Hamiltonian flow, of which the way back is watched."""

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        rho: Tensor,
        x: Tensor,
        eps: Tensor,
        alpha: Tensor,
        likelihood: Likelihood,
        sweep: ReadSweep,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """K + 1 forces."""
        assert sweep._network is not None
        sweeps, tensors = sweep._network
        z, rho = z.detach(), rho.detach()
        inputs = Inputs(sweeps, z, [None if tensor is None else tensor.detach() for tensor in tensors])
        ctx.walked = walked = SimpleNamespace(
            sweeps=sweeps, head=make_head(likelihood, x, z), inputs=inputs, passive=inputs.detached()
        )
        walked.count = len(alpha)
        numbers = (len(alpha) + 1) * len(z) * sweeps.kept_numbers
        keep = numbers * z.element_size() <= STORE_LIMIT_BYTES
        (z_K, rho_K, log_px, z_steps, rho_steps, _), kept = walk(
            sweeps, walked.passive, inputs.wanted, walked.head, (z, rho, eps, alpha), keep, whole=True
        )
        walked.kept = kept if keep else None
        ctx.sweep = sweep
        ctx.save_for_backward(z_steps, rho_steps, eps, alpha)
        return z_K, rho_K, log_px

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The closed-form gradient to z and rho; all others as factors."""
        z_steps, rho_steps, eps, alpha = ctx.saved_tensors
        with backward_pass(eps):
            way = _WatchedWay(ctx.walked, z_steps, rho_steps, eps, alpha, ctx.sweep)
            grad_z, grad_rho, _, step_terms, *_ = way.run(*grads)
        ctx.sweep._terms = (step_terms, torch.stack(way.alpha_terms), grad_rho, rho_steps[0])
        return grad_z, grad_rho, None, None, None, None, None


class _WatchedWay(WayBack):
    """The gradient of a trajectory, with the terms that each sample adds to it."""

    def __init__(
        self, ctx: Any, z_steps: Tensor, rho_steps: Tensor, eps: Tensor, alpha: Tensor, sweep: ReadSweep
    ) -> None:
        # A step size for each sample has a gradient for each.
        steps = eps[:, None].expand(len(alpha), *z_steps.shape[1:])
        super().__init__(ctx, z_steps, rho_steps, steps, alpha)
        self._sweep = sweep
        self.alpha_terms: list[Tensor] = []
        """[B, d] of each step"""

    @staticmethod
    def flat(codes: Tensor) -> Tensor:
        """All samples as one."""
        return codes.reshape(1, -1)

    def evaluation(self, k: int) -> Evaluation:
        """With every value."""
        walked = self.ctx
        if walked.kept is not None:
            found: Evaluation = walked.kept[k]
            return found
        return Evaluation(
            walked.sweeps, walked.passive, walked.inputs.wanted, walked.head, self.z[k], whole=True
        )

    def through_kick(
        self, k: int, grho: Tensor, half: Tensor, force: Tensor, step: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See ``WayBack``."""
        # d rho_{k+1} / d alpha_k = rho_{k+1} / alpha_k; steps come last to first.
        self.alpha_terms.insert(0, grho.view_as(self.z[k]) * self.rho[k + 1] / self.alpha[k])
        return super().through_kick(k, grho, half, force, step)

    def through_force(self, at: Evaluation, u: Tensor, of_log_px: Tensor | None = None) -> Tensor:
        """See ``WayBack``."""
        of_z, _ = at.adjoint(u, of_log_px, self.products, self._sweep._watch)
        return -u if of_z is None else of_z - u
