"""Trunks, heads, and nets made of both. Needs torch alone and is usable without the rest of clbench."""

from clbench.nets.build import CHAINS as CHAINS
from clbench.nets.build import TRUNKS as TRUNKS
from clbench.nets.build import build_head as build_head
from clbench.nets.build import build_trunk as build_trunk
from clbench.nets.convnet import LeNet as LeNet
from clbench.nets.convnet import ZenkeNet as ZenkeNet
from clbench.nets.heads import ABSENT_LOGIT as ABSENT_LOGIT
from clbench.nets.heads import GrowingHead as GrowingHead
from clbench.nets.heads import GrowingLinear as GrowingLinear
from clbench.nets.heads import Head as Head
from clbench.nets.heads import HeadedNet as HeadedNet
from clbench.nets.heads import MultiHead as MultiHead
from clbench.nets.heads import SingleHead as SingleHead
from clbench.nets.mlp import MLP as MLP
from clbench.nets.mlp import NormedMLP as NormedMLP
from clbench.nets.resnet import ResNet18 as ResNet18
from clbench.nets.resnet import ResNet32 as ResNet32
from clbench.nets.trunk import ChainTrunk as ChainTrunk
from clbench.nets.trunk import Trunk as Trunk
