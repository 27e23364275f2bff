"""Every reconstruction method by name.

    x_hat = make_method(name, ...)(y, physics)

Symbols: y measurement, physics the operator with its noise, x_hat the estimate. ``METHODS`` says for each name which
class it is, what it needs (a flow, a trained network, a noise) and to which problems it applies; the options are the
arguments of the class, and those of an option object among them.
"""

from flowprox.methods.kinds import METHODS, MethodKind, default_options
from flowprox.methods.making import make_method
from flowprox.methods.options import check_options
from flowprox.methods.running import Adjoint, Outcome, outcome_of, run_method

__all__ = [
    "METHODS",
    "Adjoint",
    "MethodKind",
    "Outcome",
    "check_options",
    "default_options",
    "make_method",
    "outcome_of",
    "run_method",
]
