"""Hooks on parameters."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle


def hook(parameter: Parameter, call: Callable[[Tensor], None]) -> RemovableHandle:
    """Have `call` run whenever a backward has added to the parameter's gradient; frozen parameters may thaw later."""
    is_trained = parameter.requires_grad
    parameter.requires_grad_(True)  # torch hooks no other
    handle: RemovableHandle = parameter.register_post_accumulate_grad_hook(call)
    parameter.requires_grad_(is_trained)
    return handle
