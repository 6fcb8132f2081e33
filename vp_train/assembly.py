"""Builds what one rank owns: its stages, its vocabulary rows, and the executors that run them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

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
    output_layer: OutputLayer | None
    copied: frozenset[str]
    _tied: tuple[nn.Parameter, dist.ProcessGroup] | None

    def train_step(self, tokens: Tensor, labels: Tensor, observer: Observer = BLIND) -> Tensor | None:
        """`Executor.step` of the training program; leaves complete gradients."""
        loss = self.trainer.step(tokens, labels, observer)
        if self._tied is not None:
            parameter, group = self._tied
            dist.all_reduce(parameter.grad, group=group)
        return loss

    @property
    def counted(self) -> list[nn.Parameter]:
        """The parameters that this rank answers for: all but copies."""
        return [parameter for name, parameter in self.parameters.items() if name not in self.copied]

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
    rank, problem, model = mesh.rank, plan.problem, config.model
    dtype = {"float32": torch.float32, "float64": torch.float64}[config.run.dtype]
    device = torch.device(config.run.device)
    stages = {
        stage: Stage(
            model,
            plan.layers[stage],
            final_norm=stage == problem.last_stage,
            dtype=dtype,
            device=device,
            group=mesh.alone,
            seed=config.run.seed,
        )
        for stage in problem.layout.stages_of(rank)
    }
    parameters = dict(_named_parameters(stages))
    rows: dict[str, Shard] = {}
    matrices: dict[End, nn.Parameter] = {}
    for end in End:
        if rank not in problem.shard_ranks(end):
            continue
        name = "embedding" if end is End.INPUT or model.tied_embeddings else "output"
        shard = plan.shards[end][rank]
        if f"{name}.weight" not in rows:
            weight = nn.Parameter(init_rows(name, shard.start, shard.stop, model, config.run.seed, dtype, device))
            weight.grad = torch.zeros_like(weight)
            parameters[f"{name}.weight"] = weight
            rows[f"{name}.weight"] = shard
        matrices[end] = parameters[f"{name}.weight"]

    def output_layer(algorithm: str) -> OutputLayer | None:
        if End.OUTPUT not in matrices:
            return None
        weight = matrices[End.OUTPUT]
        assert weight.grad is not None
        return OutputLayer(weight, weight.grad, plan.shards[End.OUTPUT][rank], algorithm, config.vocab.backend)

    embedding = matrices.get(End.INPUT)
    input_layer = None
    if embedding is not None:
        assert embedding.grad is not None
        input_layer = InputLayer(embedding, embedding.grad, plan.shards[End.INPUT][rank])
    comms = Comms(mesh.pipeline)
    training_output = output_layer(problem.algorithm.name)
    part = Part(stages, input_layer, training_output, dtype, device, model.hidden_size)
    evaluation_part = Part(stages, input_layer, output_layer("evaluate"), dtype, device, model.hidden_size)
    trainer = Executor(plan.program.ranks[rank], problem, rank, part, comms)
    evaluator = Executor(plan.evaluation_program.ranks[rank], plan.evaluation_problem, rank, evaluation_part, comms)
    copied, tied = frozenset[str](), None
    if model.tied_embeddings and mesh.end_ranks is not None and matrices:
        tied = (parameters["embedding.weight"], mesh.end_ranks)
        copied = frozenset() if End.INPUT in matrices else frozenset({"embedding.weight"})
    return RankModel(parameters, rows, model.vocab_size, trainer, evaluator, training_output, copied, tied)


def _named_parameters(stages: dict[int, Stage]) -> Iterator[tuple[str, nn.Parameter]]:
    for stage in stages.values():
        yield from stage.named_parameters()
