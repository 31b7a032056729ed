"""Native loops for CPU tensors: C that the machine's own compiler turns into vector code when an op is first used.

One source per family; a file of Python with the same stem packs an op's arguments. Every function here takes the
arguments of the registered op it is for and returns NotImplemented for what it leaves to the closed form: float64 mixed
with other dtypes, and a machine without a C compiler. What comes in 16 bits is computed in float32 and rounded once.
"""
