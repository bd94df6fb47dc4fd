"""The optimizer, as the schedule steers it: learning rate, momentum, and a guard against other drivers."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import LBFGS, Adam, AdamW, Optimizer, SparseAdam

from elastic_batch.errors import InvalidSetting, MisusedTrainer
from elastic_batch.schedule import PhaseValues


class SteeredOptimizer:
    """An optimizer whose learning rate, and momentum where the schedule changes it, come from the schedule alone.

    Args:
        optimizer: A torch optimizer without a closure. Parameter groups keep the ratio of their learning rates.
        momentum: What the noise scale takes for its momentum; None: its own, 0 where it has none.
        is_adaptive: Whether its steps are divided by a running second moment; None: in the Adam family they are.
        momentum_correction: Scale SGD's velocity by (1 - m_old) / (1 - m_new) when the momentum changes, which keeps
            the averaged gradient (1 - m) v and lets the step follow lr / (1 - m) at once.

    Attributes:
        parameters: Every trained parameter once, in the optimizer's order: those that require gradients now. They may
            be frozen and thaw later; others may not begin to.
        base_learning_rate: Of the first parameter group.
        ratios: Each group's learning rate by the first one's.
        momentum: What the noise scale takes for momentum at the start.
        is_adaptive: Whether steps are divided by a running second moment.

    Raises:
        InvalidSetting: The optimizer cannot be steered, or has another momentum.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        momentum: float | None = None,
        is_adaptive: bool | None = None,
        momentum_correction: bool = True,
    ) -> None:
        _refuse_unsuitable(optimizer)
        self.optimizer = optimizer
        self.momentum = _momentum(optimizer, momentum)
        self.is_adaptive = _is_of_adam_family(optimizer) if is_adaptive is None else is_adaptive
        self._momentum_correction = momentum_correction
        self._momentum_is_scheduled = False
        self._stepping = False
        given = dict.fromkeys(parameter for group in optimizer.param_groups for parameter in group["params"])
        self.parameters: list[Parameter] = [parameter for parameter in given if parameter.requires_grad]
        self._untrained = [parameter for parameter in given if not parameter.requires_grad]
        base = [_number(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
        self.base_learning_rate = base[0]
        self.ratios = [rate / base[0] if base[0] else 1.0 for rate in base]
        self._expected = [_number(group["lr"]) for group in optimizer.param_groups]
        # Of two trainers the later one steers. The earlier one is mostly left over, from a constructor that failed or a
        # loop that was interrupted and not closed; nobody can tell, but if it does go on, `check` says so.
        if (earlier := _guardian(optimizer)) is not None:
            earlier.close()
        self._is_open = True
        self._guard = optimizer.register_step_pre_hook(self._refuse_foreign_step)
        # A worker alone would not notice before its first update of two passes.
        setattr(optimizer, "zero_grad", self._refuse_zero_grad)  # noqa: B010 # a method, to a type checker

    def require_momenta(self, momenta: Collection[float]) -> None:
        """See that the optimizer can be given every momentum of a schedule; one that never changes is left alone.

        Raises:
            InvalidSetting: It has none that could be set, or several.
        """
        others = {momentum for momentum in momenta if momentum != self.momentum}
        if self.is_adaptive or not others:
            return
        field, value = "schedule", f"momentum {max(others)}"
        if "momentum" not in self.optimizer.param_groups[0]:
            raise InvalidSetting(field, value, f"{type(self.optimizer).__name__} has no momentum to be set")
        own = {group["momentum"] for group in self.optimizer.param_groups if "momentum" in group}
        if len(own) > 1:
            rule = f"is for one momentum, and the optimizer's parameter groups have {', '.join(map(str, sorted(own)))}"
            raise InvalidSetting(field, value, rule, "Give all groups the same, or leave it out of the schedule")
        self._momentum_is_scheduled = True

    def check(self) -> None:
        """See that nobody else has changed a learning rate, or what is trained, or steers now.

        Raises:
            MisusedTrainer: Somebody has, or does.
        """
        if not self._is_open:
            raise MisusedTrainer(
                "this trainer does not steer its optimizer any more: it was closed, or another trainer was made with "
                "it since; go on with that one, or make a new one"
            )
        if len(self.optimizer.param_groups) != len(self._expected):
            raise MisusedTrainer(
                f"the optimizer has {len(self.optimizer.param_groups)} parameter groups, and had {len(self._expected)} "
                "when the trainer was made; add all groups before"
            )
        if any(parameter.requires_grad for parameter in self._untrained):
            # Nobody adds its gradients up, or clears them.
            raise MisusedTrainer(
                "a parameter of the optimizer requires gradients, and did not when the trainer was made; have all that "
                "will be trained require gradients then, and freeze those that are to wait afterwards"
            )
        for group, expected in zip(self.optimizer.param_groups, self._expected, strict=True):
            if _number(group["lr"]) != expected:
                raise MisusedTrainer(
                    f"the learning rate was changed from {expected} to {_number(group['lr'])} outside the schedule; "
                    "remove scheduler.step() and other code that sets it: the trainer's schedule does"
                )

    def step(self, values: PhaseValues) -> None:
        """Set learning rate and momentum, then step on the parameters' gradients."""
        if self._momentum_is_scheduled:
            self._set_momentum(values.momentum)
        for index, group in enumerate(self.optimizer.param_groups):
            _assign(group, "lr", values.learning_rate * self.ratios[index])
            self._expected[index] = _number(group["lr"])
        self._stepping = True
        try:
            self.optimizer.step()
        finally:
            self._stepping = False

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)
        self._expected = [_number(group["lr"]) for group in self.optimizer.param_groups]

    def close(self) -> None:
        """Let go of the optimizer: it may be stepped by others again."""
        self._is_open = False
        self._guard.remove()
        if _guardian(self.optimizer) is self:
            del vars(self.optimizer)["zero_grad"]

    def _set_momentum(self, momentum: float) -> None:
        for group in self.optimizer.param_groups:
            old = group.get("momentum")
            if old is None or old == momentum:
                continue
            group["momentum"] = momentum
            if not self._momentum_correction:
                continue
            for parameter in group["params"]:
                velocity = self.optimizer.state.get(parameter, {}).get("momentum_buffer")
                if velocity is not None:
                    velocity.mul_((1 - old) / (1 - momentum))

    def _refuse_foreign_step(self, *_: object) -> None:
        if not self._stepping:
            raise MisusedTrainer(
                "optimizer.step() was called directly; call update.step(), which steps on every worker"
            )

    def _refuse_zero_grad(self, set_to_none: bool = True) -> None:
        raise MisusedTrainer("optimizer.zero_grad() was called; remove it: the trainer clears gradients")


def _guardian(optimizer: Optimizer) -> SteeredOptimizer | None:
    """Who keeps others from an optimizer."""
    owner = getattr(optimizer.zero_grad, "__self__", None)
    return owner if isinstance(owner, SteeredOptimizer) else None


def _momentum(optimizer: Optimizer, given: float | None) -> float:
    own = optimizer.param_groups[0].get("momentum")
    if given is None:
        return float(own or 0.0)
    if own is not None and own != given:
        remedy = f"Say {own} in both places: the schedule sets the optimizer's momentum"
        raise InvalidSetting("optimizer.momentum", given, f"must be the optimizer's own, {own}", remedy)
    return given


def _is_of_adam_family(optimizer: Optimizer) -> bool:
    return isinstance(optimizer, Adam | AdamW) or "betas" in optimizer.param_groups[0]


def _refuse_unsuitable(optimizer: Any) -> None:
    if isinstance(optimizer, list | tuple | dict):
        raise InvalidSetting(
            "optimizer", f"{len(optimizer)} optimizers", "must be one optimizer", "Put all parameters in groups of one"
        )
    if not isinstance(optimizer, Optimizer):
        raise InvalidSetting("optimizer", type(optimizer).__name__, "must be a torch.optim.Optimizer")
    kind = type(optimizer).__name__
    if isinstance(optimizer, LBFGS) or _needs_closure(optimizer):
        remedy = "Use SGD, Adam, AdamW or another first-order optimizer"
        raise InvalidSetting("optimizer", kind, "must step without a closure", remedy)
    if isinstance(optimizer, SparseAdam):
        rule, remedy = "must take dense gradients: those of an update are summed as such", "Use Adam, or Adagrad"
        raise InvalidSetting("optimizer", kind, rule, remedy)
    for group in optimizer.param_groups:
        if any(parameter.is_complex() and parameter.requires_grad for parameter in group["params"]):
            raise InvalidSetting(
                "optimizer",
                "complex parameters",
                "must train real numbers",
                "Keep the real view as the parameter: torch.view_as_real(tensor), and torch.view_as_complex in forward",
            )
        if group.get("dampening"):
            raise InvalidSetting(
                "optimizer.dampening", group["dampening"], "must be 0, because the noise scale lr / (1 - m) assumes it"
            )


def _needs_closure(optimizer: Optimizer) -> bool:
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def _number(value: float | Tensor) -> float:
    return float(value)


def _assign(group: dict[str, Any], name: str, value: float) -> None:
    """Set a group's option, in place where it is a tensor (capturable and compiled optimizers hold on to it)."""
    if isinstance(group[name], torch.Tensor):
        group[name].fill_(value)
    else:
        group[name] = value
