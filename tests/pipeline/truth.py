"""The unsharded, unpipelined model: one process, autograd from the tokens to the mean loss."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor, nn

from tests.meshes import alone
from vp_train.assembly import linear_products
from vp_train.config import RunConfig
from vp_train.model.stage import Stage, init_rows
from vp_train.optim.adamw import build_adamw, clip_scale, learning_rate


class Whole(nn.Module):
    """Embedding, all layers and output layer, with the parameter names of the sharded model."""

    def __init__(self, config: RunConfig, dtype: torch.dtype) -> None:
        super().__init__()
        model, cpu = config.model, torch.device("cpu")
        self.stage = Stage(
            model,
            range(model.num_layers),
            first=True,
            final_norm=True,
            dtype=dtype,
            device=cpu,
            group=alone(),
            seed=config.run.seed,
            products=linear_products(config),
        )
        self.matrices = nn.ParameterDict()
        for name in ("embedding",) if model.tied_embeddings else ("embedding", "output"):
            self.matrices[name] = nn.Parameter(
                init_rows(name, 0, model.vocab_size, model, config.run.seed, dtype, cpu)
            )
        self.config = config

    def logits(self, tokens: Tensor, segments: Tensor | None = None) -> Tensor:
        """Return logits [sequences, s, V] for tokens [sequences, s].

        Every document of `segments` [sequences, s] runs alone, from position 0.
        """
        if segments is not None:
            return torch.stack([self._apart(*row) for row in zip(tokens, segments, strict=True)])
        x = self.stage(self.matrices["embedding"][tokens].transpose(0, 1)).transpose(0, 1)
        logits = x @ self.matrices["output" if "output" in self.matrices else "embedding"].T
        softcap = self.config.model.logit_softcap
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    def _apart(self, tokens: Tensor, segments: Tensor) -> Tensor:
        """Return the logits [s, V] of one sequence, whose documents run alone."""
        documents = tokens.split(segments.unique_consecutive(return_counts=True)[1].tolist())
        return torch.cat([self.logits(document[None])[0] for document in documents])

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor,
        mask: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> Tensor:
        """Return the loss over all microbatches; tokens, labels, mask, segments are [m, b, s]."""
        tokens, labels = tokens.flatten(0, 1), labels.flatten(0, 1)
        options, logits = (
            self.config.loss,
            self.logits(tokens, None if segments is None else segments.flatten(0, 1)),
        )
        counted = (labels != -100).to(logits.dtype)
        losses = nn.functional.cross_entropy(
            logits.transpose(1, 2),
            labels,
            reduction="none",
            label_smoothing=options.label_smoothing,
        )
        losses = losses + options.z_loss * logits.logsumexp(-1) ** 2 * counted
        if mask is not None:
            counted = counted * mask.flatten(0, 1)
        if options.normalisation == "token":
            return (losses * counted).sum() / (counted.sum() if counted.any() else 1)
        means = [
            (row * weight).sum() / weight.sum()
            for row, weight in zip(losses, counted, strict=True)
            if weight.any()
        ]
        return torch.stack(means).mean() if means else 0 * losses.sum()

    def named(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.stage.named_parameters()
        for name, parameter in self.matrices.items():
            yield f"{name}.weight", parameter


def random_mask(config: RunConfig, step: int) -> Tensor:
    """Return a mask [m, b, s] in [0, 1), with some sequences of zeros."""
    generator = torch.Generator().manual_seed(2000 + step)
    shape = (config.num_microbatches, config.micro_batch_size, config.model.seq_length)
    mask = torch.rand(shape, generator=generator, dtype=torch.float64)
    return mask * (torch.rand(shape[:2], generator=generator) < 0.8)[..., None]


def random_segments(config: RunConfig, step: int) -> Tensor:
    """Return segments [m, b, s], int32, with documents of one token and more.

    A few sequences are a single document.
    """
    generator = torch.Generator().manual_seed(3000 + step)
    shape = (config.num_microbatches, config.micro_batch_size, config.model.seq_length)
    ends = (
        torch.rand(shape, generator=generator)
        < torch.rand(shape[:2], generator=generator)[..., None] - 0.2
    )
    return ends.cumsum(-1).int()


def random_batch(config: RunConfig, step: int) -> tuple[Tensor, Tensor]:
    """Return tokens and labels [m, b, s], with a few labels ignored."""
    generator = torch.Generator().manual_seed(1000 + step)
    shape = (config.num_microbatches, config.micro_batch_size, config.model.seq_length)
    tokens = torch.randint(0, config.model.vocab_size, shape, generator=generator)
    labels = torch.randint(0, config.model.vocab_size, shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < 0.1] = -100
    return tokens, labels


@cache  # many layouts and schedules have the same result
def train_whole(
    config: RunConfig,
    num_steps: int,
    dtype: torch.dtype,
    *,
    masked: bool = False,
    packed: bool = False,
) -> list[tuple[float, dict[str, Tensor], dict[str, Tensor]]]:
    """Return for each step the loss, all gradients, and all parameters after the update."""
    whole = Whole(config, dtype)
    parameters = dict(whole.named())
    optimizer = build_adamw(parameters.values(), config.optim)
    results = []
    for step in range(1, num_steps + 1):
        mask = random_mask(config, step) if masked else None
        loss = whole(
            *random_batch(config, step), mask, random_segments(config, step) if packed else None
        )
        optimizer.zero_grad()
        loss.backward()
        gradients = {
            name: parameter.grad.clone()
            for name, parameter in parameters.items()
            if parameter.grad is not None
        }
        norm = (
            torch.stack([gradient.double().norm() for gradient in gradients.values()]).norm().item()
        )
        for parameter in parameters.values():
            if parameter.grad is not None:
                parameter.grad.mul_(clip_scale(norm, config.optim.clip_grad_norm))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.optim, step, num_steps)
        optimizer.step()
        results.append(
            (loss.item(), gradients, {name: p.detach().clone() for name, p in parameters.items()})
        )
    return results
