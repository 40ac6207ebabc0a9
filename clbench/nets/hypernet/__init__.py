"""Nets whose weights are made by another net, from an embedding of the task.

    import torch
    from clbench.nets import HeadedNet, MLP, MultiHead
    from clbench.nets.hypernet import Chunked, HyperNet, Target, fit_sizes

    trunk = MLP((1, 28, 28), [100, 100])
    target = Target(trunk)                                     # which tensors are generated, and where each is
    fit = fit_sizes("chunked", target, ratio=0.5, tasks=5)     # sizes for half the parameters of one net
    generator = Chunked(target, **fit.settings)
    net = HyperNet(HeadedNet(trunk, MultiHead(100, 0)), seed=0, generator=generator)
    net.observe(0, [0, 1])                                     # an embedding and a head for task 0
    net(torch.rand(8, 1, 28, 28), 0).sum().backward()          # reaches the generator and the embedding

- `target.py`: what is generated, and the trunk run with it; why assigning `nn.Parameter` does not do.
- `generators.py`, `structured.py`: full, chunked, by layer, low-rank. `init.py`, `scaling.py`: how they begin.
- `net.py`: the net, with weights kept in evaluation. `compression.py`: sizes for a wanted compression.
- `regulariser.py`: what keeps earlier tasks' weights. `synthesised.py`: single convolutions made from a vector.
"""

from clbench.nets.hypernet.compression import GENERATORS as GENERATORS
from clbench.nets.hypernet.compression import Fit as Fit
from clbench.nets.hypernet.compression import fit_sizes as fit_sizes
from clbench.nets.hypernet.generators import ACTIVATIONS as ACTIVATIONS
from clbench.nets.hypernet.generators import Chunked as Chunked
from clbench.nets.hypernet.generators import Full as Full
from clbench.nets.hypernet.generators import Generator as Generator
from clbench.nets.hypernet.net import HyperNet as HyperNet
from clbench.nets.hypernet.structured import LowRank as LowRank
from clbench.nets.hypernet.structured import Structured as Structured
from clbench.nets.hypernet.target import Target as Target
