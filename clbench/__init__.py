"""clbench: a continual-learning benchmark suite on PyTorch and Avalanche.

Letters used for shapes everywhere: T tasks, C classes, B batch, P parameters, N samples.
"""

__version__ = "0.1.0"
