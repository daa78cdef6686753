"""AdamW for training, on our ops. It can also clip the gradients.

One call of an op updates all tensors of a parameter group and dtype. The host does not wait for the GPU. The moments
are float32 for every dtype of the parameters. The state has the names of torch.optim.AdamW's.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from . import ops
from .dtypes import dtype_name

MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019).

    Args:
        params, lr, betas, eps, weight_decay: as for torch.optim.AdamW.
        max_norm: every step clips the norm of all gradients together to it, as clip_grad_norm_ does, and stores the
            norm as ``norm``. None: no clipping.
        stochastic_rounding: rounds parameters in bfloat16 up or down at random, so that small updates are not lost.
        seed: the seed of the rounding, by default from torch's generator.

    Errors: ValueError for a number out of range; TypeError for parameters that are neither float32, bfloat16 nor
    float16, or are float16 with stochastic_rounding; RuntimeError in ``step`` for a sparse gradient.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        max_norm: float | None = None,
        stochastic_rounding: bool = False,
        seed: int | None = None,
    ):
        if max_norm is not None:
            ops.gradient_norm.check_values(max_norm=max_norm)
        if seed is None:
            seed = int(torch.randint(-(2**63), 2**63 - 1, (1,)))
        self.max_norm, self.stochastic_rounding, self.seed = max_norm, stochastic_rounding, seed
        self.norm: Tensor | None = None
        self._seeds: dict[tuple[int, torch.device], Tensor] = {}
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        ops.adamw_.check_values(**_numbers(group))
        covered = {torch.float32, torch.bfloat16} | ({torch.float16} if not self.stochastic_rounding else set())
        for parameter in group["params"]:
            if parameter.dtype not in covered:
                expected = ", ".join(sorted(dtype_name(dtype) for dtype in covered))
                found = dtype_name(parameter.dtype)
                raise TypeError(f"gpt2fast.AdamW: params must have a dtype of {expected}, got {found}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates all parameters that have a gradient. Returns the result of ``closure``, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        factors = self._clip()
        for index, group in enumerate(self.param_groups):
            for parameters in self._alike(group["params"]):
                first, moments = parameters[0], [[self.state[p][name] for p in parameters] for name in MOMENTS]
                step = self.state[first]["step"]
                step += 1
                seed = self._seed(index, first.device) if self.stochastic_rounding else None
                gradients = [p.grad for p in parameters]
                factor = factors.get(first.device)
                ops.adamw_(parameters, gradients, *moments, step, factor, seed, **_numbers(group))
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The state as torch's AdamW has it, where each parameter has its own ``step`` tensor."""
        found = super().state_dict()
        found["state"] = {number: state | dict(step=state["step"].clone()) for number, state in found["state"].items()}
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state of this class or of torch's AdamW. The moments stay float32, unlike in torch's.

        Errors: ValueError for a state with amsgrad or maximize.
        """
        for name in ("amsgrad", "maximize"):
            if any(group.get(name) for group in state_dict["param_groups"]):
                raise ValueError(f"gpt2fast.AdamW: {name} must be False in the state, got True")
        super().load_state_dict(state_dict)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        steps: dict[tuple, Tensor] = {}
        for number, p in zip(numbers, parameters):
            if saved := state_dict["state"].get(number):
                self.state[p] |= {name: saved[name].to(p.device, torch.float32, copy=True) for name in MOMENTS}
                step = torch.tensor(float(saved["step"]), device=p.device)
                self.state[p]["step"] = steps.setdefault((p.device, p.dtype, float(saved["step"])), step)

    def _clip(self) -> dict[torch.device, Tensor]:
        """Computes ``norm`` and returns the factor on the gradients for each device."""
        if self.max_norm is None:
            return {}
        alike: dict[tuple, list[Tensor]] = {}
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            alike.setdefault((p.device, p.dtype), []).append(p.grad)
        if not alike:
            return {}
        found = [ops.gradient_norm(gradients, self.max_norm) for gradients in alike.values()]
        self.norm, factor = found[0]
        if len(found) > 1:
            norms = torch.stack([norm.to(self.norm.device) for norm, _ in found])
            self.norm, factor = ops.gradient_norm([norms], self.max_norm)
        return {device: factor.to(device) for device, _ in alike}

    def _alike(self, parameters: list[Tensor]) -> list[list[Tensor]]:
        """Groups the parameters that have a gradient by device, dtype and ``step``, a tensor that a group shares."""
        found: dict[tuple, list[Tensor]] = {}
        fresh: dict[tuple, Tensor] = {}
        for p in parameters:
            if p.grad is None:
                continue
            if p.grad.is_sparse:
                raise RuntimeError(
                    f"gpt2fast.AdamW: gradients must be dense, got a sparse one of shape {tuple(p.shape)}"
                )
            state, kind = self.state[p], (p.device, p.dtype)
            if not state:
                state["step"] = fresh.setdefault(kind, torch.zeros((), device=p.device))
                state |= {name: torch.zeros(p.shape, dtype=torch.float32, device=p.device) for name in MOMENTS}
            found.setdefault((*kind, id(state["step"])), []).append(p)
        return list(found.values())

    def _seed(self, group: int, device: torch.device) -> Tensor:
        """The seed (1,) of a group. It differs from group to group, so that no two draw the same numbers."""
        if (group, device) not in self._seeds:
            wrapped = (self.seed + group + 2**63) % 2**64 - 2**63
            self._seeds[group, device] = torch.tensor([wrapped], device=device)
        return self._seeds[group, device]


def _numbers(group: dict[str, Any]) -> dict[str, float]:
    beta1, beta2 = group["betas"]
    return dict(lr=group["lr"], beta1=beta1, beta2=beta2, eps=group["eps"], weight_decay=group["weight_decay"])
