"""A network read as a graph of operations, with four rules for each, and the methods that sweep it.

:class:`Network` is its public face: what was read of a module, by which rules it runs, log p(x | z) and its gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastvae._compiling import is_compiling
from fastvae._second_order import twice_differentiable
from fastvae.decoding import conditioned, natural_parameters
from fastvae.likelihoods import Likelihood, resolve
from fastvae.likelihoods.weighted import weighted
from fastvae.lowering import CoupledSamples, UnsupportedLayer, explain, lower, verify
from fastvae.lowering.checks import check_is_module
from fastvae.network.cache import ReadNetwork, check_samples_apart, read_network, verify_network
from fastvae.network.chain import lowered_chain
from fastvae.network.pristine import BATCH, rows_of
from fastvae.network.table import Line, lines_of, rendered, share_of

__all__ = ["Network"]


_DRAWN = 8
"""Codes at which ``verify`` compares, and as many opposite ones."""


class Network:
    """A module and a likelihood: what the operators make of them.

    The module is read when codes are first seen, those given here or those of a call, for codes of their shape, dtype
    and device; and again when it has changed. It stays the user's: nothing of it is changed or copied, and its current
    parameters are used at every call. Questions that need a reading raise ValueError before there were codes.

    Args:
        module: a decoder, from codes [B, d] to natural parameters, or any module from [B, ...] to [B, ...].
        likelihood: "bernoulli", "gaussian", "categorical" or a :class:`fastvae.likelihoods.Likelihood`; None: only
            what needs no likelihood can be asked.
        z: codes [1 or more, ...], of which shape, dtype and device matter and numbers do not.
        condition: what the module takes after the codes, as ``module(z, condition)``; a row for each.

    Raises:
        TypeError: ``module`` is not an ``nn.Module``; ``likelihood`` neither a name nor a likelihood; z no tensor.
    """

    def __init__(
        self,
        module: nn.Module,
        likelihood: str | Likelihood | None = None,
        *,
        z: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> None:
        check_is_module("fastvae.Network: module", module)
        self.module = module
        self.likelihood = None if likelihood is None else resolve(likelihood)
        self._codes: Tensor | None = None
        self._condition: Tensor | None = None
        if z is not None:
            self._see(z, condition)
            self._reading()

    def __repr__(self) -> str:
        return f"Network({type(self.module).__name__}, {self.likelihood})"

    def log_px(
        self, z: Tensor, x: Tensor, *, condition: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        """log p(x | z) in nats: [B].

        It is the module's own forward and can be differentiated like it. For many codes of each x, without a gradient,
        see :func:`fastvae.ops.log_px`.

        Args:
            z: codes [B, ...].
            x: data, as the likelihood takes it.
            condition: [B, ...], handed to the module after the codes.
            weight: [B, ...] of x's elements; see :func:`fastvae.ops.hamiltonian_flow`.

        Raises:
            ValueError: shapes that do not fit, or a Network without a likelihood.
            CoupledSamples: BatchNorm or Dropout in training mode, or a sample's output depends on its batch in another
                way.
        """
        likelihood = weighted("fastvae.Network.log_px", self._likelihood("log_px"), weight, x)
        self._see(z, condition)
        self._check_apart(z, condition)
        with twice_differentiable():
            return likelihood.log_prob(
                natural_parameters(conditioned(self.module, condition), z, likelihood), x
            )

    def force(
        self, z: Tensor, x: Tensor, *, condition: Tensor | None = None, weight: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """log p(x | z) [B] and grad_z log p(x | z), of the shape of z; see :func:`fastvae.ops.log_px_and_force`.

        Raises:
            ValueError: also for a Network without a likelihood.
        """
        from fastvae.ops import log_px_and_force

        likelihood = self._likelihood("force")
        self._see(z, condition)
        return log_px_and_force(self.module, z, x, likelihood, condition=condition, weight=weight)

    @property
    def lowered(self) -> float:
        """The share of the forward's floating-point operations that run in kernels or by our rules, from 0 to 1.

        Linear layers, convolutions and products count by their sizes, everything else by its elements. The rest goes
        through autograd: single operations (:attr:`opaque`), or everything where the module cannot be read (0).

        Raises:
            ValueError: no codes were seen.
        """
        lines = self._lines()
        if lines is None:
            return 0.0 if self.without_kernels else 1.0
        return share_of(lines)

    @property
    def opaque(self) -> tuple[str, ...]:
        """Names of operations that go through autograd one by one; ("(itself)",) where the module cannot be read.

        Raises:
            ValueError: no codes were seen.
        """
        lines = self._lines()
        return ("(itself)",) if lines is None else tuple(line.name for line in lines if line.opaque)

    @property
    def without_kernels(self) -> str:
        """Why kernels do not take the module, in one text for people; empty where they do.

        Raises:
            ValueError: no codes were seen.
        """
        self._seen()
        if self.likelihood is not None and not self.likelihood.has_kernel:
            return f"{type(self.likelihood).__name__} is a likelihood without a kernel."
        if self._condition is not None:
            return "It takes a condition, which kernels do not."
        refusal = self._unlowered()
        network = self._reading()[0] if refusal else None
        return "" if network is not None and lowered_chain(network, self._seen()) is not None else refusal

    def explain(self) -> str:
        """What becomes of the module, as a table for people.

        For each operation its name, kind, the rule that takes it ("autograd" for what no rule knows; "fused" with the
        one beside it) and the shape of a sample's result; below it, whether kernels or sweeps in PyTorch run it and
        why, and what is opaque, with the lines of the forward. Without codes, or where the module cannot be read, what
        :func:`fastvae.lowering.explain` says.
        """
        if self._codes is None:
            return (
                explain(self.module)
                + "\nNot read as a graph yet: that takes codes, as in Network(module, z=z)."
            )
        network, reason = self._reading()
        if network is None:
            return f"{explain(self.module)}\nNot read as a graph: {reason}"
        lines = lines_of(network, self._codes)
        reason = self.without_kernels
        rest = " and jacobian_l1" if self._unlowered() else ", jacobian_l1 and log_px"
        text = [rendered(lines), ""]
        text.append(
            f"Run by sweeps in PyTorch. {reason}"
            if reason
            else f"Run by kernels in hamiltonian_flow{rest}, by sweeps in PyTorch in log_px_and_force."
        )
        opaque = [line for line in lines if line.opaque]
        if opaque:
            names = ", ".join(line.name for line in opaque)
            text.append(f"Opaque, each through autograd by itself: {names}.")
            text += [f"  {line.name}: {line.line}" for line in opaque if line.line]
        total = sum(line.flops for line in lines)
        text.append(
            f"{share_of(lines):.1%} of a sample's {total:,.0f} floating-point operations are in kernels or sweeps."
        )
        return "\n".join(text)

    def verify(self, z: Tensor | None = None, *, condition: Tensor | None = None) -> None:
        """Compare what was read with what the module does now: output, gradient and a second-order product.

        Operators do so when they first use a reading. What a forward reads besides its module, such as a global of its
        file, is fixed from then on: call this whenever that may have changed. A reading that differs is dropped, and
        the next call reads the module again. Kernels, which have a reading of their own, are compared too.

        Args:
            z: codes [1 or more, ...] near which to compare; None: some standard normal ones, like those last seen.
            condition: of the codes, where z is given.

        Raises:
            UnsupportedLayer: the two differ, or the module cannot be read.
            ValueError: no codes were given or seen.
        """
        if z is not None:
            self._see(z, condition)
        codes, given = (self._drawn(), self._condition) if z is None else (z.detach(), condition)
        failures = []
        for compare in (verify_network, self._verify_kernels):
            try:
                compare(self.module, codes, given)
            except UnsupportedLayer as failure:
                failures.append(failure)
        if failures:
            raise failures[0]

    def _likelihood(self, method: str) -> Likelihood:
        if self.likelihood is None:
            raise ValueError(
                f"fastvae.Network.{method}: likelihood: expected one when the Network was made, got None: "
                "Network(module, 'bernoulli')"
            )
        return self.likelihood

    def _check_apart(self, z: Tensor, condition: Tensor | None) -> None:
        try:
            lower(self.module)
        except CoupledSamples:
            raise
        except ValueError:
            if len(z) and not is_compiling():
                check_samples_apart(self.module, z, condition)

    def _see(self, z: Tensor, condition: Tensor | None) -> None:
        if not isinstance(z, Tensor):
            raise TypeError(f"fastvae.Network: z: expected a tensor, got {type(z).__name__}")
        if z.dim() < 2 or not z.is_floating_point():
            raise ValueError(
                f"fastvae.Network: z: expected floating codes [B, ...], got {z.dtype} {list(z.shape)}"
            )
        with torch.inference_mode(False):
            self._codes = torch.zeros((BATCH, *z.shape[1:]), dtype=z.dtype, device=z.device)
            self._condition = None if condition is None else rows_of(condition, BATCH)

    def _seen(self) -> Tensor:
        if self._codes is None:
            raise ValueError(
                "fastvae.Network: z: expected codes first, to read the module for: Network(module, z=z), or a call"
            )
        return self._codes

    def _drawn(self) -> Tensor:
        codes = self._seen()
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn(
            (_DRAWN, *codes.shape[1:]), generator=generator, dtype=torch.float64, device="cpu"
        ).to(codes)
        # And on the other side of zero: two codes may well both be where an activation's slope is one.
        return torch.stack([drawn, -drawn], 1).flatten(0, 1)

    def _verify_kernels(self, module: nn.Module, codes: Tensor, condition: Tensor | None) -> None:
        if (
            condition is None
            and not self.without_kernels
            and codes.dim() == 2
            and codes.dtype in (torch.float32, torch.float64)
            and not self._unlowered()
        ):
            verify(module, codes)

    def _unlowered(self) -> str:
        """Why the module's own layers are no chain for kernels; what was read of its forward may still be one."""
        try:
            lower(self.module)
        except (UnsupportedLayer, ValueError) as error:
            return str(error)
        return ""

    def _reading(self) -> tuple[ReadNetwork | None, str]:
        """What was read, or why nothing was."""
        codes = self._seen()
        try:
            with torch.inference_mode(False):
                return read_network(self.module, codes, condition=self._condition), ""
        except UnsupportedLayer as error:
            return None, str(error)

    def _lines(self) -> list[Line] | None:
        codes = self._seen()
        network, _ = self._reading()
        return None if network is None else lines_of(network, codes)
