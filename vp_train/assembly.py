"""Builds what one rank owns: its stages, its vocabulary rows, and the executors that run them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from schedules.vocab import End
from vp_train.config import RunConfig
from vp_train.mesh import Mesh
from vp_train.model.stage import Stage, init_rows
from vp_train.pipeline.comms import Comms
from vp_train.pipeline.executor import BLIND, Executor, Observer, Part
from vp_train.plan import RunPlan
from vp_train.vocab.input import InputLayer
from vp_train.vocab.loss import LossOptions
from vp_train.vocab.output import OutputLayer
from vp_train.vocab.shard import Shard


@dataclass(frozen=True, slots=True)
class RankModel:
    """One rank's share of the model.

    `rows[name]` are vocabulary rows, `embedding.weight` and `output.weight` (one entry when tied); all other parameters are
    whole.  Names are global.  Together the ranks hold each value once; the exception is `copied`, a tied matrix that an
    unsharded vocabulary keeps on the last stage too, where it counts for nothing but its update.
    """

    parameters: dict[str, nn.Parameter]
    rows: dict[str, Shard]
    vocab_size: int
    trainer: Executor
    evaluator: Executor
    stages: dict[int, Stage]
    output_layer: OutputLayer | None
    copied: frozenset[str]
    _tied: tuple[nn.Parameter, dist.ProcessGroup] | None

    def train_step(
        self,
        tokens: Tensor,
        labels: Tensor,
        observer: Observer = BLIND,
        *,
        mask: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> Tensor | None:
        """`Executor.step` of the training program; leaves complete gradients."""
        loss = self.trainer.step(tokens, labels, observer, mask=mask, segments=segments)
        if self._tied is not None:
            parameter, group = self._tied
            dist.all_reduce(parameter.grad, group=group)
        return loss

    @property
    def counted(self) -> list[nn.Parameter]:
        """The parameters that this rank answers for: all but copies."""
        return [parameter for name, parameter in self.parameters.items() if name not in self.copied]

    @property
    def held_bytes(self) -> int:
        """Bytes held from S for T and from I for W."""
        output = 0 if self.output_layer is None else self.output_layer.held_bytes
        return output + sum(stage.weight_grads.held_bytes for stage in self.stages.values())

    def zero_grad(self) -> None:
        """Clear all gradients in place: the vocabulary layers accumulate into these very tensors."""
        for parameter in self.parameters.values():
            if parameter.grad is not None:
                parameter.grad.zero_()

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.counted)


def build_rank(config: RunConfig, plan: RunPlan, mesh: Mesh) -> RankModel:
    """The model of rank `mesh.rank` with its initial values."""
    rank, problem = mesh.rank, plan.problem
    dtype = {"float32": torch.float32, "float64": torch.float64}[config.run.dtype]
    device = torch.device(config.run.device)
    stages = _build_stages(config, plan, mesh, dtype, device)
    matrices = _build_matrices(config, plan, rank, dtype, device)
    parameters = dict(_named_parameters(stages)) | dict(matrices.values())
    rows = {name: plan.shards[end][rank] for end, (name, _) in matrices.items()}
    options = LossOptions(config.loss.label_smoothing, config.loss.z_loss, config.model.logit_softcap)

    def output_layer(algorithm: str) -> OutputLayer | None:
        if End.OUTPUT not in matrices:
            return None
        weight = matrices[End.OUTPUT][1]
        return OutputLayer(
            weight,
            _grad(weight),
            plan.shards[End.OUTPUT][rank],
            config.model.vocab_size,
            algorithm,
            config.vocab.backend,
            options.measured if algorithm == "evaluate" else options,
            config.vocab.recompute_fraction,
        )

    input_layer = None
    if End.INPUT in matrices:
        weight = matrices[End.INPUT][1]
        input_layer = InputLayer(weight, _grad(weight), plan.shards[End.INPUT], rank)
    training = Part(
        stages,
        input_layer,
        output_layer(problem.algorithm.name),
        dtype,
        device,
        config.model.hidden_size,
        config.loss.normalisation,
    )
    evaluating = replace(training, output_layer=output_layer("evaluate"), normalisation="token")
    through_host = config.run.device == "cuda" and config.run.comm_backend == "gloo"
    comms = Comms(mesh.pipeline, device, through_host=through_host)
    trainer = Executor(plan.program.ranks[rank], problem, rank, training, comms)
    evaluator = Executor(plan.evaluation_program.ranks[rank], plan.evaluation_problem, rank, evaluating, comms)
    copied, tied = frozenset[str](), None
    if config.model.tied_embeddings and mesh.end_ranks is not None and matrices:
        ((name, weight),) = matrices.values()
        tied = (weight, mesh.end_ranks)
        copied = frozenset() if End.INPUT in matrices else frozenset({name})
    return RankModel(parameters, rows, config.model.vocab_size, trainer, evaluator, stages, training.output_layer, copied, tied)


def _build_stages(config: RunConfig, plan: RunPlan, mesh: Mesh, dtype: torch.dtype, device: torch.device) -> dict[int, Stage]:
    return {
        stage: Stage(
            config.model,
            plan.layers[stage],
            final_norm=stage == plan.problem.last_stage,
            dtype=dtype,
            device=device,
            group=mesh.alone,
            seed=config.run.seed,
            recompute=config.parallel.recompute == "full",
        )
        for stage in plan.problem.layout.stages_of(mesh.rank)
    }


def _build_matrices(
    config: RunConfig, plan: RunPlan, rank: int, dtype: torch.dtype, device: torch.device
) -> dict[End, tuple[str, nn.Parameter]]:
    """This rank's rows at each end where it has some: name and matrix, the same one twice when tied on one rank."""
    matrices: dict[End, tuple[str, nn.Parameter]] = {}
    for end in End:
        if rank not in plan.problem.shard_ranks(end):
            continue
        if config.model.tied_embeddings and End.INPUT in matrices:
            matrices[end] = matrices[End.INPUT]
            continue
        name = "embedding" if end is End.INPUT or config.model.tied_embeddings else "output"
        shard = plan.shards[end][rank]
        weight = nn.Parameter(init_rows(name, shard.start, shard.stop, config.model, config.run.seed, dtype, device))
        weight.grad = torch.zeros_like(weight)
        matrices[end] = (f"{name}.weight", weight)
    return matrices


def _grad(weight: nn.Parameter) -> Tensor:
    """The gradient the vocabulary layers accumulate into, which exists from the start."""
    assert weight.grad is not None
    return weight.grad


def _named_parameters(stages: dict[int, Stage]) -> Iterator[tuple[str, nn.Parameter]]:
    for stage in stages.values():
        yield from stage.named_parameters()
