"""What a CUDA graph refuses, looked for without a GPU: copies between host and device, and looks at numbers.

python scripts/cuda_graph_check.py [NAME...]        (default: all models and decoders; needs a CUDA build of torch)

A training step of every model of the tests, and the sweeps of the zoo's decoders, run on fake tensors that say they are
on a GPU. Backward passes of PyTorch's own engine are not looked at: it wants a driver.
"""

from __future__ import annotations

import argparse
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
# An installed fastvae first: the tree's may be of another torch.
sys.path.append(str(ROOT))

from test_models_on_gpu import MAKERS, made  # noqa: E402
from zoo import ZOO, Entry, is_installed, problem  # noqa: E402

from fastvae.data import ColorJitter, Compose, RandomFlip  # noqa: E402
from fastvae.lowering import CoupledSamples, UnsupportedLayer  # noqa: E402
from fastvae.network.cache import read_network  # noqa: E402
from fastvae.network.flow import Evaluation  # noqa: E402
from fastvae.network.heads import make_head  # noqa: E402
from fastvae.network.jacobian import Plan  # noqa: E402
from fastvae.network.layers import Products  # noqa: E402
from fastvae.network.sweeps import Inputs, Sweeps  # noqa: E402
from fastvae.penalties import ConsistencyVAE  # noqa: E402


class Refused(Exception):  # noqa: N818
    """A call that no CUDA graph holds."""


class Captured(TorchDispatchMode):
    """Refuses as the capture of a CUDA graph does."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, found)) if isinstance(t, Tensor)]
        # Scalars of the host are arguments of a kernel.
        devices = {t.device.type for t in tensors if t.dim() or "copy" in str(func)}
        if len(devices) > 1 or "_local_scalar_dense" in str(func) or "nonzero" in str(func):
            raise Refused(str(func))
        return found


MODE = FakeTensorMode()


def fake(tensor: Tensor) -> Tensor:
    """A tensor without numbers that says it is on a GPU."""
    with MODE:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")


def moved(model: nn.Module) -> nn.Module:
    """Its tensors made fake."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            module._parameters[name] = None if parameter is None else nn.Parameter(fake(parameter))
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else fake(buffer)
    return model


def colours() -> tuple[nn.Module, Tensor]:
    """A model of colour images that are changed at random."""
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(192, 8))
    decoder = nn.Sequential(nn.Linear(4, 192), nn.Unflatten(1, (3, 8, 8)))
    augment = Compose(ColorJitter(), RandomFlip())
    return ConsistencyVAE(encoder, decoder, augment=augment), torch.rand(5, 3, 8, 8)


def check_model(make: Callable[[], tuple[nn.Module, Tensor]]) -> str:
    """Its loss, looked at."""
    model, x = make()
    moved(model.train())
    with MODE, Captured():
        model(fake(x)).mean()
    return ""


def check_decoder(entry: Entry) -> str:
    """Its sweeps for a force, the gradient through it and the Jacobian; what was left out."""
    p = problem(entry, 3, torch.float32, 1)
    condition = p.condition[0] if p.condition else None
    try:
        read = read_network(p.decoder, p.z, condition=condition, strip_sigmoid=p.likelihood.probs)
    except (CoupledSamples, UnsupportedLayer) as error:
        return f"not read: {error}"
    sweeps = Sweeps(read.sweeps.program, "cuda")
    sweeps.widest, sweeps.kept_numbers = read.sweeps.widest, read.sweeps.kept_numbers
    tensors = [None if t is None else fake(t).requires_grad_(t.is_floating_point()) for t in read.tensors]
    z, x = fake(p.z), fake(p.x)
    with MODE, torch.no_grad(), Captured():
        inputs = Inputs(sweeps, z, tensors)
        passive = inputs.detached()
        at = Evaluation(sweeps, passive, inputs.wanted, make_head(p.likelihood, x, z), z)
        products = Products(passive, inputs.wanted, {})
        at.adjoint(at.force.view_as(z), at.log_px, products)
        products.finish()
        Plan(sweeps, tensors, z, list(range(z[0].numel())), 1).value_and_gradients(z, 1.0)
    return ""


def main() -> None:
    """Print what is refused, and where."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", nargs="*", help="only these")
    options = parser.parse_args()
    # Nothing of this process is computed, so that no number may be looked at: as in a graph that is captured.
    torch.cuda.is_current_stream_capturing = lambda: True
    warnings.simplefilter("ignore")
    checks: dict[str, Callable[[], str]] = {
        f"model {name}": lambda name=name: check_model(lambda: made(name))  # type: ignore[misc]
        for name in MAKERS
        if name != "hvae-read-as-a-graph"  # is to be read first, of numbers
    }
    checks["model colours"] = lambda: check_model(colours)
    checks |= {
        f"decoder {entry.name}": lambda entry=entry: check_decoder(entry)  # type: ignore[misc]
        for entry in ZOO.values()
        if is_installed(entry) and not entry.heavy
    }
    wanted = {
        name: check for name, check in checks.items() if not options.name or name.split()[1] in options.name
    }
    left_out: list[str] = []
    refused = 0
    for name, check in wanted.items():
        try:
            left_out += [f"{name}: {note}"] if (note := check()) else []
        except RuntimeError as error:
            if "hasPrimaryContext" not in str(error):
                raise
            left_out.append(f"{name}: PyTorch's engine has the reverse of a part")
        except Refused as error:
            refused += 1
            where = [
                frame
                for frame in traceback.extract_tb(error.__traceback__)
                if "fastvae" in Path(frame.filename).parts
            ]
            print(f"{name}: {error}, in {where[-1].filename}, line {where[-1].lineno}: {where[-1].line}")
    for note in left_out:
        print(note.splitlines()[0][:150])
    print(
        f"cuda_graph_check: {len(wanted) - refused - len(left_out)} of {len(wanted)} run as a CUDA graph would have it"
    )
    sys.exit(refused > 0)


if __name__ == "__main__":
    main()
