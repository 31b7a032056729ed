"""total_correlation: no kernel yet; its closed form sweeps over blocks of bounded size on any device."""

from __future__ import annotations


def fwd(*_):
    return NotImplemented


def bwd(*_):
    return NotImplemented
