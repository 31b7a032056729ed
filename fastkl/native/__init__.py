"""Native loops for CPU tensors: C that the machine's own compiler vectorises when an op is first used.

One C source per family; the Python file of the same name packs the arguments. Every function takes the arguments of its
registered op, and returns NotImplemented to fall back on the closed form: for float64 mixed with other dtypes, or
without a C compiler. 16-bit tensors are computed in float32 and rounded once.
"""
