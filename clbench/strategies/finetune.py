"""Fine-tuning: train on one task after another and do nothing about forgetting.

Paper      none; the lower bound of nearly every one, also "naive", "SGD", "None" or "VAN".
Departs    nothing.
Stores     nothing.
"""

from __future__ import annotations

from clbench.strategies.base import Strategy


class Finetune(Strategy):
    """The base's own training, without any hook."""
