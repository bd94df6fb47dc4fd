"""From torch's batch norms to ghost batch norms, in place."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from elastic_batch.errors import InvalidSetting
from elastic_batch.ghost.modules import (
    GhostBatchNorm1d,
    GhostBatchNorm2d,
    GhostBatchNorm3d,
    GhostBatchNormAct2d,
    GhostNorm,
    check_ghost_batch_size,
)

_GHOST_CLASSES: dict[type[nn.Module], type[GhostNorm]] = {
    nn.BatchNorm1d: GhostBatchNorm1d,
    nn.BatchNorm2d: GhostBatchNorm2d,
    nn.BatchNorm3d: GhostBatchNorm3d,
}
# Classes of other packages, by name, so that these need not be installed.
_FOREIGN_GHOST_CLASSES = {"timm.layers.norm_act.BatchNormAct2d": GhostBatchNormAct2d}


def convert_batch_norm(model: nn.Module, ghost_batch_size: int) -> int:
    """Turn every batch norm of a model into a ghost batch norm, in place.

    Modules keep their identity: parameters, buffers, hooks, training mode and sharing stay as they are. Ghost batch
    norms that are there already keep their size. Layer, group and instance norms do not mix samples and stay.

    Args:
        model: May itself be a batch norm.
        ghost_batch_size: Samples that share statistics.

    Returns:
        How many were converted.

    Raises:
        InvalidSetting: A size below 1, or a norm that cannot be converted; then nothing was.
    """
    check_ghost_batch_size(ghost_batch_size)
    found = [
        (module, _ghost_class(name, module))
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and not isinstance(module, GhostNorm)
    ]
    for module, ghost_class in found:
        # The ghost classes add no state but this number, so a change of class is the whole conversion.
        module.__class__ = ghost_class
        module.ghost_batch_size = ghost_batch_size  # type: ignore[assignment]  # what is declared is torch's catch-all
    return len(found)


def _ghost_class(name: str, module: nn.Module) -> type[GhostNorm]:
    kind = type(module)
    path = f"{kind.__module__}.{kind.__qualname__}"
    ghost_class = _GHOST_CLASSES.get(kind) or _FOREIGN_GHOST_CLASSES.get(path)
    if ghost_class is not None:
        return ghost_class
    where = f"{path} ({name})" if name else path
    if isinstance(module, nn.SyncBatchNorm):
        raise InvalidSetting(
            "model",
            where,
            "its statistics span workers, so that training would depend on how many there are",
            "Use torch.nn.BatchNorm*d (no convert_sync_batchnorm); ghost_batch_size says what shares statistics",
        )
    if isinstance(module, LazyModuleMixin):
        raise InvalidSetting(
            "model",
            where,
            "a lazy norm has no parameters yet",
            "Run the model once on a batch before training, or give num_features",
        )
    raise InvalidSetting(
        "model",
        where,
        "this kind of batch norm has a forward pass of its own, which cannot be split into ghost batches",
        "Derive it from elastic_batch.ghost.GhostBatchNorm1d, 2d or 3d, or use torch.nn.BatchNorm*d",
    )
