"""Networks that grow: tensors with room behind them, parameters that keep their optimiser's state."""

from clbench.nets.growable.coupling import grow as grow
from clbench.nets.growable.coupling import remove as remove
from clbench.nets.growable.coupling import split as split
from clbench.nets.growable.errors import GrowthError as GrowthError
from clbench.nets.growable.layers import GrowBatchNorm1d as GrowBatchNorm1d
from clbench.nets.growable.layers import GrowBatchNorm2d as GrowBatchNorm2d
from clbench.nets.growable.layers import GrowConv2d as GrowConv2d
from clbench.nets.growable.layers import GrowLinear as GrowLinear
from clbench.nets.growable.optim import Change as Change
from clbench.nets.growable.optim import append_to_parameter_ as append_to_parameter_
from clbench.nets.growable.optim import apply as apply
from clbench.nets.growable.optim import check as check
from clbench.nets.growable.optim import keep_in_parameter_ as keep_in_parameter_
from clbench.nets.growable.optim import register_state_rule as register_state_rule
from clbench.nets.growable.storage import append as append
from clbench.nets.growable.storage import capacity as capacity
from clbench.nets.growable.storage import in_place_growth_available as in_place_growth_available
from clbench.nets.growable.storage import is_shared as is_shared
from clbench.nets.growable.storage import keep as keep
from clbench.nets.growable.storage import reserved_empty as reserved_empty
from clbench.nets.growable.wiring import Coupling as Coupling
from clbench.nets.growable.wiring import couplings_of as couplings_of
