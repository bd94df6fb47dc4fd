"""Finds the module during whose forward pass something happened that should not have."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from elastic_batch.ghost import is_recomputing


@contextmanager
def watching(
    modules: Mapping[str, nn.Module], is_fine: Callable[[], bool], blame: Callable[[str], None]
) -> Iterator[None]:
    """Ask `is_fine` before and after every module's forward, and name the innermost one under way when it was not.

    It costs a call or two for each module, so it is for single passes, not for all.

    Args:
        modules: Of one model, by name.
        is_fine: Asked very often.
        blame: Called with a name for each time it was not fine, so the first call counts.
    """
    under_way: list[str] = []

    def before(name: str) -> None:
        if not is_fine():
            blame(under_way[-1] if under_way else "code around the model")
        under_way.append(name)

    def after(name: str) -> None:
        under_way.pop()
        if not is_fine():
            blame(name)

    with ExitStack() as stack:
        for path, module in modules.items():
            name = f"{path} ({type(module).__name__})" if path else f"the model ({type(module).__name__})"
            stack.callback(module.register_forward_pre_hook(_hook(before, name)).remove)
            stack.callback(module.register_forward_hook(_hook(after, name)).remove)
        yield


def _hook(note: Callable[[str], None], name: str) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        if not torch.compiler.is_compiling() and not is_recomputing():
            note(name)

    return hook
