"""Check the formulas of variational inference in fastkl or other libraries against exact values.

    python -m fastkl.conformance                       # every installed library
    python -m fastkl.conformance diffusers pyro
    python -m fastkl.conformance --markdown > conformance.md

A case (cases.py) has inputs and their exact values, computed with 50 digits. A library (libraries.py) answers the
questions for which it has a function. Its values must agree to a relative error of 1e-4, even in 16 bits, because the
exact values are computed from the rounded inputs.
"""

from fastkl.conformance.cases import CASES, Case
from fastkl.conformance.check import Outcome, check
from fastkl.conformance.libraries import LIBRARIES

__all__ = ["CASES", "LIBRARIES", "Case", "Outcome", "check"]
