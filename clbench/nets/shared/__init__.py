"""Sharing weights: between layers, between modules, between tasks; and finding out what is shared.

    from torch import nn
    from clbench.nets.shared.aliases import aliases
    from clbench.nets.shared.clone import clone_module
    from clbench.nets.shared.linked import LinkedLinear, links
    from clbench.nets.shared.maps import Compose, LowRank, Scale
    from clbench.nets.shared.reuse import Repeat

    first = nn.Linear(64, 64)
    net = nn.Sequential(
        first,
        LinkedLinear(first, Compose(Scale(64), LowRank((64, 64), 4))),  # a scaled, corrected copy of the first's weight
        Repeat(nn.Linear(64, 64), times=3),                             # one layer, applied three times
    )
    links(net)                                      # {"1": "0"}: which layer looks at which
    twin = clone_module(net, share=["0.weight"])    # a copy, but for this parameter: it is the same one
    aliases(nn.ModuleList([net, twin]))             # what shares memory with what, by the bytes

- `linked`: layers whose weight and bias are functions of another layer's, `maps` the functions: `Same`, `Square`,
  `Scale`, `Rotate`, `QuarterTurns`, `LowRank`, `Resize`, `Compose`, any callable. A link has no parameters but its
  functions' own, and is computed anew in every forward pass.
- `reuse`: one layer applied again (`Repeat`), or the same parameters in several places (`tie`).
- `clone`: copies that keep chosen parameters shared, ties and links among them whole.
- `features`: the weights of an early layer as feature maps of a later one.
- `masks`: which weights a task uses, kept as bits; `tasknet` and its kin: nets with weights, masks or factors by task.
- `aliases`: which tensors share memory, told apart from those that do not. What tasks share, in numbers, is counted
  after every run by `clbench.sharing` and stands in the record as `sharing`.
"""
