"""Copies of an encoder that was read as a graph: each operation runs for all of them, by kernels where there are some.

What has no parameters runs as one batch of images, and what depends on no parameters runs once.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastvae._extension import raw
from fastvae.arguments import given as besides
from fastvae.lowering import UnsupportedLayer
from fastvae.models.base import BaseVAE
from fastvae.network.cache import ReadNetwork
from fastvae.network.copied import CopiedNetwork, Start, in_full
from fastvae.network.reading import rows_of
from fastvae.network.tape import form_of, tensors_in
from fastvae.network.vjp_tape import RepeatedPass, StraightPass
from fastvae.ood.copies import Adam, Copies, FusedAdam
from fastvae.ood.differentiated import LoopedCopies, same_gradients
from fastvae.ood.encoding import check_stock_encoding, given_to_encoder, read_encoder
from fastvae.private import origin_of

__all__ = ["ReadCopies"]


class ReadCopies(Copies):
    """See above.

    Args:
        model: in eval mode.
        x: [B, ...], on the model's device.
        adam: its settings.
        condition: [B, ...], of an encoder that takes one.

    Raises:
        UnsupportedLayer: the encoder cannot be read, or what was read of it does not give its gradients.
    """

    def __init__(self, model: BaseVAE, x: Tensor, adam: Adam, condition: Tensor | None = None) -> None:
        check_stock_encoding(model)
        self._encoder = model.encoder
        key = x.shape[1:], x.dtype, None if condition is None else condition.shape[1:]
        why_not = _unread.setdefault(origin_of(model.encoder) or model.encoder, {})
        if key in why_not:
            raise UnsupportedLayer(why_not[key])
        try:
            data = given_to_encoder(model, x)
            network = read_encoder(model, data, condition)
            known = _known_of(model, x, network, condition)
        except UnsupportedLayer as error:
            why_not[key] = str(error)
            raise
        self._network, self._names = known.network, known.names
        self._values = self._network.copies_of(network.tensors, len(x))
        start = self._network.start(data, network.tensors)
        self._pass = _Pass(known, start, self._values)
        self._memory = raw.Recycling()
        self._adam = (
            raw.CopiesAdam(self._values, adam.lr, *adam.betas, adam.eps, adam.weight_decay)
            if (x.device.type == "cpu")
            else None
        )
        self._fused = FusedAdam(self._values, adam) if self._adam is None else None
        self._compare(model.encode(x, **besides(condition=condition)))

    @property
    def by_autograd(self) -> list[str]:
        """Operations with parameters that no rule knows."""
        return self._network.by_autograd

    @property
    def can_be_captured(self) -> bool:  # type: ignore[override]
        """See ``Copies``."""
        return self._pass.is_straight_on(self._values[0].device)

    def forward(self) -> Tensor:
        """See ``Copies``."""
        with self._memory:
            return self._pass.forward()

    def update(self, grad: Tensor) -> None:
        """See ``Copies``."""
        with self._memory:
            gradients, inputs = self._pass.gradients(grad)
        if self._adam is not None:
            self._adam.step(gradients, inputs)
        elif self._fused is not None:
            self._fused.step(gradients)

    def parameters(self) -> dict[str, Tensor]:
        """See ``Copies``."""
        found = dict(zip(self._names, self._network.as_parameters(self._values), strict=True))
        samples = len(self._values[0])
        return {
            name: found[name].clone() if name in found else own.detach().expand(samples, *own.shape)
            for name, own in self._encoder.named_parameters()
        }

    def _compare(self, posterior: tuple[Tensor, Tensor]) -> None:
        """What was read gives the encoder's own output."""
        expected = torch.cat(posterior, 1)
        if not _near(self.forward(), expected):
            raise UnsupportedLayer("lower: the network that was read of it gives another output")


_unread: weakref.WeakKeyDictionary[nn.Module, dict[Any, str]] = weakref.WeakKeyDictionary()
"""Of encoders that this is not for, by the form of their data, why."""

_FORMS = 8
"""Batches of which the straight code is remembered."""


class _Known:
    """What all copies of one encoder share.

    Args:
        network: see ``CopiedNetwork``.
        names: of its trained parameters in the encoder.
    """

    def __init__(self, network: CopiedNetwork, names: Sequence[str]) -> None:
        self.network, self.names = network, list(names)
        self._straight: dict[Any, StraightPass] = {}

    def straight(self, form: Any) -> StraightPass:
        """The straight code of runs of this form."""
        found = self._straight.get(form)
        if found is None:
            if len(self._straight) >= _FORMS:
                self._straight.pop(next(iter(self._straight)), None)
            found = self._straight.setdefault(form, StraightPass())
        return found


def _known_of(model: BaseVAE, x: Tensor, network: ReadNetwork, condition: Tensor | None) -> _Known:
    sources: dict[int, list[int]] = {}
    for index, tensor in enumerate(network.tensors, 1):
        if tensor is not None:
            sources.setdefault(id(tensor), []).append(index)
    owned = {name: own for name, own in model.encoder.named_parameters() if id(own) in sources}
    trained = tuple(tuple(sources[id(own)]) for own in owned.values())
    # Kept with what was read, and as long; parameters may have become one since.
    known: _Known | None = network.sweeps.copied
    if known is not None and known.names == list(owned) and known.network.trained == trained:
        return known
    dtypes = {own.dtype for own in owned.values()}
    if len(dtypes) != 1 or not dtypes <= {torch.float32, torch.float64}:
        raise UnsupportedLayer("lower: parameters of several dtypes, or of none that kernels have")
    two, given = rows_of(x, 2), None if condition is None else rows_of(condition, 2)
    program = network.sweeps.program
    tensors = [
        rows_of(tensor, 2) if source.is_condition and tensor is not None else tensor
        for source, tensor in zip(program.sources, network.tensors, strict=True)
    ]
    data = given_to_encoder(model, two)
    try:
        copied = CopiedNetwork(program, trained, data, tensors)
        _verify(copied, list(owned), model, two, given, data, tensors)
    except UnsupportedLayer:
        raise
    except Exception as error:
        raise UnsupportedLayer(f"lower: what was read of it does not run: {error}") from error
    known = network.sweeps.copied = _Known(copied, list(owned))
    return known


def _verify(
    copied: CopiedNetwork,
    names: Sequence[str],
    model: BaseVAE,
    x: Tensor,
    condition: Tensor | None,
    data: Tensor,
    tensors: Sequence[Tensor | None],
) -> None:
    """Output and gradients are those of two encoders, one after the other."""
    looped = LoopedCopies(model, x, Adam(0.0, (0.0, 0.0), 0.0), condition)
    expected = looped.forward()
    seed = torch.empty(expected.shape, dtype=torch.float64, device="cpu")
    seed = seed.normal_(generator=torch.Generator().manual_seed(0)).to(expected)
    wanted = looped.gradients(seed)
    with torch.no_grad():
        point = copied.forward(copied.start(data, tensors), copied.copies_of(tensors, len(x)))
        output = point.values[copied.program.output]
        if not _near(output, expected):
            raise UnsupportedLayer("lower: the network that was read of it gives another output")
        found = copied.as_parameters([in_full(each) for each in copied.reverse(point, seed)])
    by_name = dict(zip(names, found, strict=True))
    pairs = zip(list(_names_in(model)) * len(x), wanted, strict=True)
    count = len(wanted) // len(x)
    for place, (name, theirs) in enumerate(pairs):
        mine = by_name.get(name)
        if not same_gradients(None if mine is None else mine[place // count], theirs):
            raise UnsupportedLayer(f"lower: the network that was read of it has another gradient to '{name}'")


def _names_in(model: BaseVAE) -> Iterator[str]:
    return (name for name, _ in model.encoder.named_parameters())


def _near(found: Tensor, expected: Tensor) -> bool:
    near = 1e-3 if expected.dtype == torch.float32 else 1e-6
    error = float((found.to(expected) - expected).norm())
    return error <= near * float(expected.norm()) or not bool(expected.isfinite().all())


class _Pass(RepeatedPass):
    """The outputs of all copies, and the gradients to their parameters.

    Args:
        known: of the encoder.
        start: see ``CopiedNetwork``.
        copies: of the parameters.
    """

    def __init__(self, known: _Known, start: Start, copies: Sequence[Tensor]) -> None:
        self._network, self._start, self._copies = known.network, start, list(copies)
        fixed = [values[index] for index in known.network.read for values in (start.values, start.alone)]
        # A tensor of shared memory is one input.
        places: dict[Any, Tensor] = {}
        order = []
        for tensor in (*copies, *tensors_in(fixed)):
            place = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
            order.append(list(places).index(place) if place in places else len(places))
            places.setdefault(place, tensor)
        form = form_of([start.samples, *copies, *fixed]), tuple(order)
        super().__init__(list(places.values()), known.straight(form))

    @torch.no_grad()
    def there(self) -> Tensor:
        """The outputs."""
        self._point = self._network.forward(self._start, self._copies)
        output: Tensor = self._point.values[self._network.program.output]
        return output

    @torch.no_grad()
    def back(self, dy: Tensor, retain_graph: bool) -> list[Tensor | None]:
        """The gradients, or their first factors, and then the second factors."""
        found = self._network.reverse(self._point, dy)
        if dy.device.type != "cpu":
            found = [in_full(each) for each in found]
        del self._point
        firsts = [each[0] if isinstance(each, tuple) else each for each in found]
        return [*firsts, *(each[1] if isinstance(each, tuple) else None for each in found)]

    def gradients(self, dy: Tensor) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """By parameter: its gradient or that one's first factor, and the second factor if it has one."""
        found = self.backward(dy)
        return found[: len(self._copies)], found[len(self._copies) :]
