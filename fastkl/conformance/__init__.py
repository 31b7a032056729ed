"""Formulas of variational inference, held against numbers that are known: of fastkl, or of any library named.

    python -m fastkl.conformance                       # everything that is installed
    python -m fastkl.conformance diffusers pyro
    python -m fastkl.conformance --markdown > conformance.md

A case (cases.py) has inputs and the exact values for them, computed with 50 digits. A library (libraries.py) answers
the questions that it has a function for. Its values must agree to 1e-4 of themselves, in 16 bits too: the exact values
are those of the rounded inputs.
"""

from fastkl.conformance.cases import CASES, Case
from fastkl.conformance.check import Outcome, check
from fastkl.conformance.libraries import LIBRARIES

__all__ = ["CASES", "LIBRARIES", "Case", "Outcome", "check"]
