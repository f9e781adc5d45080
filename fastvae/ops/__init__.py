"""The operators. Each file holds one: public function, fake kernel, autograd formula."""

from fastvae.ops.aggregate_posterior import aggregate_posterior
from fastvae.ops.elbo import elbo
from fastvae.ops.gaussian_kl import gaussian_kl
from fastvae.ops.grad_dot import grad_dot
from fastvae.ops.hamiltonian_flow import hamiltonian_flow
from fastvae.ops.iwae_bound import iwae_bound
from fastvae.ops.jacobian_l1 import jacobian_l1
from fastvae.ops.leapfrog import leapfrog_kick_drift, leapfrog_kick_temper
from fastvae.ops.log_px import log_px
from fastvae.ops.log_px_and_force import log_px_and_force
from fastvae.ops.trajectory import trajectory

__all__ = [
    "aggregate_posterior",
    "elbo",
    "gaussian_kl",
    "grad_dot",
    "hamiltonian_flow",
    "iwae_bound",
    "jacobian_l1",
    "leapfrog_kick_drift",
    "leapfrog_kick_temper",
    "log_px",
    "log_px_and_force",
    "trajectory",
]
