"""Continual-learning methods, one file each; `METHODS` is the registry."""

from treelora.methods.base import Method, StepMetrics, TaskContext
from treelora.methods.frozen import Frozen
from treelora.methods.joint import Joint
from treelora.methods.sequential import Sequential
from treelora.methods.treelora import Memory, TreeLoRA, TreeLoRAOptions

METHODS: dict[str, type[Method]] = {method.name: method for method in (Frozen, Joint, Sequential, TreeLoRA)}

__all__ = ["METHODS", "Memory", "Method", "StepMetrics", "TaskContext", "TreeLoRA", "TreeLoRAOptions"]
