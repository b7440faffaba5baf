"""Continual-learning methods, one file each; `METHODS` is the registry."""

from treelora.methods.agem import AGEM
from treelora.methods.base import Method, StepMetrics, TaskContext
from treelora.methods.dualprompt import DualPrompt
from treelora.methods.ewc import EWC
from treelora.methods.frozen import Frozen
from treelora.methods.gem import GEM
from treelora.methods.hidelora import HiDeLoRA
from treelora.methods.hideprompt import HiDePrompt
from treelora.methods.inflora import InfLoRA
from treelora.methods.joint import Joint
from treelora.methods.l2p import L2P
from treelora.methods.lwf import LwF
from treelora.methods.ncm import NearestClassMean
from treelora.methods.ogd import OGD
from treelora.methods.olora import OLoRA
from treelora.methods.remembering import Memory, Remembering
from treelora.methods.replay import Replay
from treelora.methods.sdlora import SDLoRA
from treelora.methods.sequential import Sequential
from treelora.methods.slao import SLAO
from treelora.methods.tasl import TaSL
from treelora.methods.treelora import TreeLoRA, TreeLoRAOptions

_ALL: tuple[type[Method], ...] = (
    TreeLoRA, Sequential, Frozen, NearestClassMean, Joint, OLoRA, InfLoRA, SDLoRA, SLAO, EWC, AGEM, GEM, OGD, Replay,
    LwF, TaSL, HiDeLoRA, HiDePrompt, L2P, DualPrompt,
)  # fmt: skip
METHODS: dict[str, type[Method]] = {method.name: method for method in _ALL}

__all__ = ["METHODS", "Memory", "Method", "Remembering", "StepMetrics", "TaskContext", "TreeLoRA", "TreeLoRAOptions"]
