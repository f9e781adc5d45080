"""Memory of large results used again: never while somebody holds it, and gone with its owner. Tensors compared."""

from __future__ import annotations

import copy
import pickle
import threading

import torch
from torch import Tensor

from fastvae._extension import raw


def gradients(value: float) -> Tensor:
    """[3, 16, 2, 2], multiples of ``value``."""
    images, positions = torch.full((3, 2, 4, 4), value), torch.ones(3, 2, 2, 2)
    return raw.convolution_gradients(images, positions, (4, 4), (2, 2), (1, 1), 3)


def test_only_the_memory_of_dead_results_is_used_again() -> None:
    expected = gradients(1.0)
    with raw.Recycling():
        first = gradients(1.0)
        place, kept = first.data_ptr(), first[1:]
        del first
        second = gradients(2.0)  # a view still holds the first one's memory
        assert second.data_ptr() != place and torch.equal(kept, expected[1:])
        del kept
        third = gradients(3.0)
        assert third.data_ptr() == place
    assert torch.equal(third, 3 * expected) and torch.equal(second, 2 * expected)


def test_results_outlive_their_pool_and_threads_have_their_own() -> None:
    memory = raw.Recycling()
    with memory:
        kept = gradients(1.0)
        elsewhere: list[Tensor] = []
        thread = threading.Thread(target=lambda: elsewhere.append(gradients(2.0)))
        thread.start()
        thread.join()
        with raw.Recycling():
            inner = gradients(4.0)
        assert torch.equal(inner, 4 * gradients(1.0))
    del memory
    assert torch.equal(2 * kept, elsewhere[0]) and torch.equal(kept, gradients(1.0))


def test_copies_begin_without_memory() -> None:
    memory = raw.Recycling()
    with memory:
        place = gradients(1.0).data_ptr()
        with pickle.loads(pickle.dumps(memory)), copy.deepcopy(memory):
            kept = gradients(2.0)
        assert kept.data_ptr() != place
    memory.__exit__()  # once too often
    assert torch.equal(kept, gradients(2.0))
