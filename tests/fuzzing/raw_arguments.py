"""One good value for every argument of every entry, by its name."""

from __future__ import annotations

import functools
import random
from typing import Any

import torch
from torch import Tensor, nn

from fastvae.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from fastvae.lowering import LoweredNetwork, lower

raw: Any = torch.ops.fastvae

B, D, K = 4, 3, 2
"""Samples, latents, steps."""

DECODERS: list[tuple[str, Any]] = [
    ("bernoulli", lambda: (nn.Linear(D, 5), nn.Softplus(), nn.Linear(5, 4))),
    ("gaussian 0.5", lambda: (nn.Linear(D, 4),)),
    (
        "gaussian 1",
        lambda: (
            nn.Linear(D, 6),
            nn.BatchNorm1d(6),
            nn.ELU(0.7),
            nn.Linear(6, 5),
            nn.GELU(),
            nn.Linear(5, 2),
        ),
    ),
    (
        "bernoulli",
        lambda: (
            *(nn.Linear(D, 16), nn.ReLU(), nn.Unflatten(1, (4, 2, 2)), nn.ConvTranspose2d(4, 8, 3, 2, 1, 1)),
            *(nn.BatchNorm2d(8), nn.LeakyReLU(0.2), nn.ConvTranspose2d(8, 2, 4, 2, 1)),
        ),
    ),
    (
        "categorical 4",
        lambda: (
            *(
                nn.Linear(D, 18),
                nn.SiLU(),
                nn.Unflatten(1, (2, 3, 3)),
                nn.ConvTranspose2d(2, 9, 2, dilation=2),
            ),
            *(nn.Tanh(), nn.Conv2d(9, 8, 3, stride=2, padding=(1, 0), groups=1, bias=False)),
        ),
    ),
    (
        "categorical 5",
        lambda: (nn.Linear(D, 12), nn.Unflatten(1, (3, 2, 2)), nn.ConvTranspose2d(3, 10, 3, (2, 1), (1, 0))),
    ),
]
ENCODERS: list[Any] = [
    lambda n: (nn.Linear(n, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2 * D)),
    lambda n: (nn.Linear(n, 2 * D, bias=False),),
    lambda n: (
        *(
            nn.Unflatten(1, (1, 2, n // 2)),
            nn.Conv2d(1, 3, (2, 1), padding=(1, 0)),
            nn.BatchNorm2d(3, affine=False),
        ),
        *(nn.Tanh(), nn.Flatten(), nn.Linear(9 * (n // 2), 2 * D)),
    ),
]


def likelihood_of(text: str) -> Likelihood:
    """The likelihood that the C++ parser reads from a text; ValueError where there is none."""
    kind, *numbers = text.split()
    if kind == "bernoulli":
        return Bernoulli()
    return Gaussian(float(numbers[0])) if kind == "gaussian" else Categorical(int(numbers[0]))


@functools.cache
def decoder_module(which: int, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(which)
    return nn.Sequential(*DECODERS[which][1]()).to(dtype).eval()


def lowered(module: nn.Module, dtype: torch.dtype, inputs: int) -> tuple[LoweredNetwork, int]:
    """A network and the number of its outputs."""
    with torch.no_grad():
        outputs = module(torch.zeros(1, inputs, dtype=dtype)).numel()
    network = lower(module)
    return network._replace(tensors=[tensor.detach() for tensor in network.tensors]), outputs


@functools.cache
def decoder_of(which: int, dtype: torch.dtype) -> tuple[LoweredNetwork, int]:
    return lowered(decoder_module(which, dtype), dtype, D)


@functools.cache
def encoder_module(which: int, inputs: int, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(which)
    return nn.Sequential(*ENCODERS[which](inputs)).to(dtype).eval()


@functools.cache
def encoder_of(which: int, inputs: int, dtype: torch.dtype) -> LoweredNetwork:
    return lowered(encoder_module(which, inputs, dtype), dtype, inputs)[0]


class Arguments:
    """Values that fit together, drawn anew. ``of`` gives that of an argument."""

    def __init__(self) -> None:
        self.dtype = dtype = random.choice((torch.float32, torch.float64))
        which = random.randrange(len(DECODERS))
        self.decoder = decoder_module(which, dtype)
        self.likelihood = DECODERS[which][0]
        self.network, outputs = decoder_of(which, dtype)
        kind, *classes = self.likelihood.split()
        self.elements = outputs // int(classes[0]) if kind == "categorical" else outputs
        which = random.randrange(len(ENCODERS))
        self.encoder_module = encoder_module(which, self.elements, dtype)
        self.encoder = encoder_of(which, self.elements, dtype)
        self.reduction = random.choice(("none", "mean", "sum"))
        self.store = random.random() < 0.5
        self.returns: dict[str, dict[str, Any]] = {}

    def of(self, place: str, entry: str, name: str) -> Any:
        """A good value; KeyError for an argument that nobody has thought of."""
        operator, is_gradient, _ = entry.partition("_backward")
        if is_gradient and name in (known := self.returned_by(operator)):
            return known[name]
        for key in (f"{place}.{name}", f"{entry}.{name}", name):
            if key in _VALUES:
                return _VALUES[key](self)
        raise KeyError(f"raw_arguments.py has no value for argument {name!r} of {entry}")

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=self.dtype)

    def state(self) -> Tensor:
        return self.normal(B, D)

    def parameters(self) -> list[Tensor]:
        return list(self.network.tensors)

    def needs(self, others: int) -> list[int]:
        return random.choices((0, 1), k=others + len(self.network.tensors))

    def returned_by(self, operator: str) -> dict[str, Any]:
        """For the gradient of an operator whose schema names its results: arguments, results, cotangents and needs.

        Empty where the schema does not, or another function has that name.
        """
        if operator not in self.returns:
            schema = getattr(raw, operator).default._schema if hasattr(raw, operator) else None
            self.returns[operator] = {}
            if schema is not None and all(each.name for each in schema.returns):
                given = {each.name: self.of("torch.ops", operator, each.name) for each in schema.arguments}
                tensors = [value for value in given.values() if isinstance(value, Tensor)]
                results = getattr(raw, operator)(*given.values())
                for each, result in zip(schema.returns, results, strict=True):
                    given |= {each.name: result, f"grad_{each.name}": torch.randn_like(result)}
                self.returns[operator] = {**given, "needs": random.choices((0, 1), k=len(tensors))}
        return self.returns[operator]

    @functools.cached_property
    def flow(self) -> dict[str, Any]:
        """A flow's arguments with what its forward pass keeps."""
        names = ("z", "rho", "x", "step_size", "alpha", "parameters", "network", "likelihood")
        given = {name: self.of("torch.ops", "hamiltonian_flow", name) for name in names}
        *_, z_steps, rho_steps, _, stash = raw.hamiltonian_flow(*given.values(), self.store, False)
        return {**given, "z_steps": z_steps, "rho_steps": rho_steps, "stash": stash, "store": self.store}

    @functools.cached_property
    def terms(self) -> dict[str, Any]:
        """The arguments of an objective with what its forward pass keeps."""
        names = ("encoder_parameters", "decoder_parameters", "encoder", "decoder", "likelihood")
        given = {"x": self.of("torch.ops", "", "x"), "noise": self.normal(2, B, D)}
        given |= {name: self.of("_C", "", name) for name in names}
        log_px, kl, mu, logvar, z, *stashes = raw.elbo_terms(*given.values(), True)
        found = {"mu": mu, "logvar": logvar, "z": z, "encoder_stash": stashes[0], "decoder_stash": stashes[1]}
        grads = {"grad_log_px": log_px, "grad_kl": kl, "grad_mu": mu, "grad_logvar": logvar, "grad_z": z}
        return given | found | {name: torch.randn_like(tensor) for name, tensor in grads.items()}


# By argument, or where entries mean different things by one, by entry and argument.
_VALUES: dict[str, Any] = {
    **dict.fromkeys(
        (
            "z",
            "rho",
            "force",
            "rho_half",
            "grad_z_next",
            "grad_rho_half",
            "grad_rho_next",
            "grad_z",
            "grad_rho",
        ),
        Arguments.state,
    ),
    **dict.fromkeys(("mu", "logvar", "mu_q", "logvar_q", "mu_p", "logvar_p"), Arguments.state),
    "x": lambda a: torch.rand(B, a.elements, dtype=a.dtype),
    "step_size": lambda a: torch.rand(random.choice(((), (1,), (D,))), dtype=a.dtype),
    "alpha": lambda a: torch.rand((), dtype=a.dtype),
    **dict.fromkeys(
        ("hamiltonian_flow.step_size", "trajectory.step_size"),
        lambda a: torch.rand(random.choice(((), (D,), (K, 1), (K, D))), dtype=a.dtype),
    ),
    **dict.fromkeys(("hamiltonian_flow.alpha", "trajectory.alpha"), lambda a: torch.rand(K, dtype=a.dtype)),
    "gaussian_kl_backward.grad": lambda a: a.normal(B),
    "matrix_product.a": lambda a: a.normal(*random.choice(((B, D), (K, B, D)))),
    "matrix_product.b": lambda a: a.normal(D, a.elements),
    "grad_log_px": lambda a: a.normal(B),
    "parameters": Arguments.parameters,
    "network": lambda a: a.network.spec,
    "likelihood": lambda a: a.likelihood,
    "store": lambda a: a.store,
    "trajectory": lambda a: random.random() < 0.5,
    **{
        f"{entry}.{name}": lambda a, name=name: a.flow[name]
        for entry in ("hamiltonian_flow_backward", "hamiltonian_flow_factors")
        for name in (
            *("z", "rho", "x", "step_size", "alpha", "parameters", "network", "likelihood"),
            *("z_steps", "rho_steps", "stash", "store"),
        )
    },
    # x has no gradient under a categorical likelihood.
    "hamiltonian_flow_backward.needs": lambda a: [
        need and not (at == 2 and a.likelihood.startswith("categorical"))
        for at, need in enumerate(a.needs(5))
    ],
    **dict.fromkeys(("elbo_terms.noise", "differentiable_elbo_terms.noise"), lambda a: a.normal(2, B, D)),
    **{
        f"elbo_terms_backward.{name}": lambda a, name=name: a.terms[name]
        for name in (
            *(
                "grad_log_px",
                "grad_kl",
                "grad_mu",
                "grad_logvar",
                "grad_z",
                "x",
                "noise",
                "mu",
                "logvar",
                "z",
            ),
            *("encoder_stash", "decoder_stash", "encoder_parameters", "decoder_parameters"),
            *("encoder", "decoder", "likelihood"),
        )
    },
    "elbo_terms_backward.needs": lambda a: a.needs(len(a.encoder.tensors)),
    **{
        f"{entry}.{name}": value
        for entry in ("element_head", "element_head_adjoint")
        for name, value in {
            **dict.fromkeys(("y", "dot", "residual"), lambda a: a.normal(B, 6)),
            "x": lambda a: torch.rand(B, 6, dtype=a.dtype),
            "weight": lambda a: random.choice((None, torch.rand(B, 6, dtype=a.dtype))),
            "cotangent": lambda a: a.normal(B),
            "likelihood": lambda a: random.choice(("student_t 3.5 0.7", "continuous_bernoulli")),
            "wants_residual": lambda a: random.random() < 0.5,
        }.items()
    },
    "log_px_pullback.cotangent": lambda a: a.normal(B),
    "log_px_pullback.needs": lambda a: a.needs(0),
    "again": lambda a: lambda cotangents, x, noise: [],
    "inputs_a": lambda a: [a.normal(B, 3, 5), a.normal(B, 2)],
    "output_grads_a": lambda a: [a.normal(B, 3, 2), a.normal(B, 7)],
    "inputs_b": lambda a: [a.normal(2, 4, 5), a.normal(2, 2)],
    "output_grads_b": lambda a: [a.normal(2, 4, 2), a.normal(2, 7)],
    "bias": lambda a: [1, 0],
    "grad_dot_backward.grad": lambda a: a.normal(B, 2),
    "grad_dot_backward.needs": lambda a: random.choices((0, 1), k=8),
    "log_px.z": lambda a: a.normal(2, B, D),
    "latents": lambda a: random.sample(range(D), k=random.randint(0, D)),
    "p": lambda a: random.choice((1, 2)),
    "reduction": lambda a: a.reduction,
    "cotangent": lambda a: a.normal(B) if a.reduction == "none" else None,
    "jacobian_l1_with_gradient.needs": lambda a: a.needs(1),
    # --- those of fastvae.ops alone
    "ops.encoder": lambda a: a.encoder_module,
    "ops.decoder": lambda a: a.decoder,
    "elbo.noise": lambda a: a.state(),
    "ops.likelihood": lambda a: likelihood_of(a.likelihood),
    # --- those of fastvae._C alone
    "shapes": lambda a: [list(tensor.shape) for tensor in a.network.tensors],
    "encoder_shapes": lambda a: [list(tensor.shape) for tensor in a.encoder.tensors],
    "decoder_shapes": lambda a: [list(tensor.shape) for tensor in a.network.tensors],
    "elements": lambda a: a.elements,
    "latent_dim": lambda a: D,
    "element_size": lambda a: a.network.tensors[0].element_size(),
    "cuda_index": lambda a: -1,
    "noise": lambda a: a.normal(2 * B, D),
    "beta": lambda a: 0.7,
    **dict.fromkeys(("encoder_parameters", "NetworkCopies.parameters"), lambda a: list(a.encoder.tensors)),
    **dict.fromkeys(("encoder", "NetworkCopies.network"), lambda a: a.encoder.spec),
    "decoder_parameters": Arguments.parameters,
    "decoder": lambda a: a.network.spec,
    "lr": lambda a: 0.1,
    "beta1": lambda a: 0.9,
    "beta2": lambda a: 0.99,
    "eps": lambda a: 1e-8,
    "weight_decay": lambda a: random.choice((0.0, 0.1)),
    "steps": lambda a: 2,
    "keys": lambda a: torch.randint(-(2**63), 2**63 - 1, (B,)),
    "first": lambda a: random.choice((0, -1, 2**40)),
    "count": lambda a: random.randint(0, 9),
    "larger": lambda a: a.normal(B, 2, 5, 6),
    "smaller": lambda a: a.normal(B, 9, 3, 3),
    "kernel": lambda a: [3, 2],
    "stride": lambda a: [2, 2],
    "padding": lambda a: [1, 0],
    "samples": lambda a: 2,
}
