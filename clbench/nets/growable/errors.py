"""What may not grow, told in one line."""

from __future__ import annotations


class GrowthError(ValueError):
    """A growth or removal that cannot be done: one line, naming the tensor. Nothing has been changed."""
