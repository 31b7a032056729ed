"""Formulas of variational inference, held against numbers that are known: of fastkl, or of any library named.

    python -m fastkl.conformance                       # everything that is installed
    python -m fastkl.conformance diffusers pyro
    python -m fastkl.conformance --markdown > conformance.md

A case (cases.py) has inputs and the exact values for them, computed with 50 digits; a library (libraries.py) is what it
answers to each question that it has a function for. Values are to agree to 1e-4 of themselves in float32, and in 16 bits
to what rounding the inputs leaves.
"""

from fastkl.conformance.cases import CASES, Case
from fastkl.conformance.check import Outcome, check
from fastkl.conformance.libraries import LIBRARIES

__all__ = ["CASES", "LIBRARIES", "Case", "Outcome", "check"]
