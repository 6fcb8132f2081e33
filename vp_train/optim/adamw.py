"""AdamW over one rank's parameters, its learning-rate schedule, and gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vp_train.communication.control import ControlGroup
from vp_train.config import OptimConfig
from vp_train.config.data import exact

MOMENTS = ("exp_avg", "exp_avg_sq")


def learning_rate(optim: OptimConfig, step: int, num_steps: int) -> float:
    """Return the learning rate of `step`, counted from 1, in a run of `num_steps`.

    It rises linearly from 0 to lr over warmup_steps and then decays to final_lr at the last step.
    `cosine` decays from the end of the warm-up.  `wsd` decays linearly over the last decay_fraction
    of the run.  A decay that would begin within the warm-up begins at its end.  A run that is not
    longer than its warm-up has no decay.
    """
    if step <= optim.warmup_steps:
        return optim.lr * step / optim.warmup_steps
    begin = optim.warmup_steps  # the last step at lr
    if optim.schedule == "wsd":
        decay_steps = round(exact(optim.decay_fraction) * num_steps)
        decay_steps = max(decay_steps, optim.decay_fraction > 0)
        begin = max(begin, num_steps - decay_steps)
    if step <= begin:
        return optim.lr
    done = min(1.0, (step - begin) / max(1, num_steps - begin))
    left = 0.5 * (1 + math.cos(math.pi * done)) if optim.schedule == "cosine" else 1 - done
    return optim.final_lr + (optim.lr - optim.final_lr) * left


def build_adamw(parameters: Iterable[nn.Parameter], optim: OptimConfig) -> torch.optim.AdamW:
    """Return torch's AdamW with weight decay on matrices only; `FusedAdamW` does the same.

    Both parameter groups exist on every rank, even if they are empty.  The moments exist from the
    start, so a checkpoint before the first update has the same contents as any other.
    """
    matrices, vectors = by_decay(parameters)
    groups = [
        {"params": matrices, "weight_decay": optim.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(
        groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.epsilon, fused=True
    )
    for parameter in (*matrices, *vectors):
        adamw.state[parameter] = fresh_state(
            {moment: torch.zeros_like(parameter) for moment in MOMENTS}
        )
    return adamw


def by_decay(
    parameters: Iterable[nn.Parameter],
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return matrices, which decay, and vectors, which do not."""
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for parameter in parameters:
        (matrices if parameter.dim() > 1 else vectors).append(parameter)
    return matrices, vectors


class FusedAdamW:
    """torch's fused kernel of AdamW, for parameters of one dtype and device.

    torch.optim calls the same kernel, but imports torch's compiler before its first step: a second
    of CPU time and 70 to 130 MiB in every rank.

    state: as torch's, by parameter; see `fresh_state`.
    """

    def __init__(
        self,
        decaying: list[nn.Parameter],
        others: list[nn.Parameter],
        state: dict[Tensor, dict[str, Tensor]],
        optim: OptimConfig,
    ) -> None:
        self.state = state
        self._groups = ((decaying, optim.weight_decay), (others, 0.0))
        self._optim = optim

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Update every parameter that has a gradient."""
        for group, weight_decay in self._groups:
            parameters = [parameter for parameter in group if parameter.grad is not None]
            if not parameters:
                continue
            states = [self.state[parameter] for parameter in parameters]
            steps = [state["step"] for state in states]
            first, second = ([state[moment] for state in states] for moment in MOMENTS)
            torch._foreach_add_(steps, 1)
            torch._fused_adamw_(
                list[Tensor](parameters),
                [parameter.grad for parameter in parameters if parameter.grad is not None],
                first,
                second,
                [],
                steps,
                lr=rate,
                beta1=self._optim.beta1,
                beta2=self._optim.beta2,
                weight_decay=weight_decay,
                eps=self._optim.epsilon,
                amsgrad=False,
                maximize=False,
            )


def fresh_state(moments: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return torch's state of one parameter before its first update, with `moments` of zeros."""
    device = next(iter(moments.values())).device
    return {"step": torch.zeros((), dtype=torch.float32, device=device), **moments}


@dataclass(frozen=True, slots=True)
class StepHealth:
    """The outcome of a backward, equal on all ranks.

    grad_norm: the norm over all ranks.
    culprits: which ranks have a non-finite value, and in what.
    request: the largest request of all ranks (`supervision.requests`), and the first rank with it.
    saved: whether all ranks have written their part of the checkpoint that is being saved.
    figures: other figures of every rank, by rank.
    """

    loss: float
    grad_norm: float
    culprits: tuple[tuple[int, str], ...]  # (rank, "loss" or "gradient")
    peak_bytes: float  # memory of the worst rank
    request: int = 0
    requesting_rank: int = 0
    saved: bool = False
    figures: tuple[tuple[float, ...], ...] = ()


def gather_health(
    loss: Tensor | None,
    squared_norm: Tensor | None,
    group: ControlGroup,
    peak_bytes: float = 0.0,
    *,
    poison: Tensor | None = None,
    request: int = 0,
    saved: bool = False,
    figures: Callable[[], Sequence[float]] = tuple,
) -> StepHealth:
    """Exchange loss, squared gradient norm, memory and request in one small all-gather.

    It is over all ranks.

    The terms are summed in rank order, so all ranks get the same bits.  `loss` and `squared_norm`
    are this rank's terms, [], or None.  `poison`, [], is not finite if a gradient of this rank was
    not, before it was summed over replicas; without it the norm decides, which is the same on all
    replicas.  If terms are on a device, one copy brings all to the host; nowhere else does a step
    wait for the device.  `figures` returns further figures of this rank, as many on all ranks.  It
    is called after that copy, when the device is done.
    """
    terms = [term for term in (loss, squared_norm, poison) if term is not None]
    device = max(
        (term.device for term in terms),
        key=lambda device: device.type != "cpu",
        default=torch.device("cpu"),
    )
    nothing = torch.zeros((), dtype=torch.float64, device=device)
    own = [
        nothing if term is None else term.to(device, torch.float64)
        for term in (loss, squared_norm, squared_norm if poison is None else poison)
    ]
    terms_here = torch.stack(own).cpu()
    others = torch.tensor([peak_bytes, request, float(saved), *figures()], dtype=torch.float64)
    of_ranks = group.all_gather(torch.cat([terms_here, others]))
    culprits, rows = [], of_ranks.tolist()
    for rank, (rank_loss, _, rank_poison, *_) in enumerate(rows):
        if not math.isfinite(rank_loss):
            culprits.append((rank, "loss"))
        elif not math.isfinite(rank_poison):
            culprits.append((rank, "gradient"))
    total_loss, squared, *_ = of_ranks.sum(0).tolist()
    if not culprits and not math.isfinite(squared):  # finite terms whose sum overflowed
        culprits.append((int(of_ranks[:, 1].argmax()), "gradient"))
    requests = of_ranks[:, 4].tolist()
    return StepHealth(
        total_loss,
        math.sqrt(squared),
        tuple(culprits),
        of_ranks[:, 3].max().item(),
        int(max(requests)),
        requests.index(max(requests)),
        bool(of_ranks[:, 5].all()),
        tuple(tuple(row[6:]) for row in rows),
    )


def clip_scale(grad_norm: float, limit: float) -> float:
    """Return the factor that limits the gradient norm to `limit`; 0 turns clipping off."""
    return limit / grad_norm if 0 < limit < grad_norm else 1.0
