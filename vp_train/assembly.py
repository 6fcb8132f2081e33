"""Build the part of one rank: its stages, its vocabulary rows, and the executors that run them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from schedules.ir import Kind, Pass
from schedules.vocab import End, VocabAlgorithm
from vp_train.config import ConfigError, OptimConfig, RunConfig, RunSettings
from vp_train.config.bounds import BUCKETS_PER_STAGE
from vp_train.mesh import Mesh, starting
from vp_train.model.elementwise import Fuse, choose_fuse, plain
from vp_train.model.float8 import Float8Products
from vp_train.model.graphs import GraphedStage
from vp_train.model.linear import PLAIN, LinearProducts
from vp_train.model.shape import compiles_layers
from vp_train.model.stage import Stage, init_rows
from vp_train.optim.buckets import Runs, bucket_elements, lay_out
from vp_train.optim.gradients import Gradients
from vp_train.optim.loss_scale import LossScale
from vp_train.optim.optimizer import Optimizer, ReplicatedAdamW
from vp_train.optim.replicas import Replicas, TiedWeight
from vp_train.optim.zero import ZeroAdamW
from vp_train.pipeline.comms import Comms, ProcessGroups, Transport
from vp_train.pipeline.executor import (
    BLIND,
    NO_UPDATES,
    Executor,
    Observer,
    PlacedBatch,
    RankModules,
    StageModule,
    WeightUpdates,
)
from vp_train.planning.placement import offloaded_layers
from vp_train.planning.plan import RunPlan
from vp_train.tensors.compiling import (
    compile_one_first,
    compiles_alone,
    compiles_on,
    give_up,
    has_cpp_compiler,
    is_failure,
    is_turned_off,
    prepare_inductor,
    reason_of,
    remedy_for,
    tell,
    tell_failure,
)
from vp_train.tensors.precision import DTYPES, statistics_dtype
from vp_train.tensors.slices import TensorSlice
from vp_train.tensors.streams import with_index
from vp_train.vocab.input import InputLayer
from vp_train.vocab.loss import LossOptions
from vp_train.vocab.output import OutputLayer
from vp_train.vocab.products import VocabProducts
from vp_train.vocab.rows import runs_triton
from vp_train.vocab.shard import Shard


@dataclass(frozen=True, slots=True)
class RankModel:
    """One rank's share of the model.

    parameters: by their global names.
    splits: the slices of the parameters of which this rank holds only a part.
    trainer, evaluator: the executors of the training and the evaluation program.
    copied: the parameters that another rank of the replica also holds.  These are parameters that
        the first tensor-parallel rank has too, and a tied matrix that an unsharded vocabulary also
        keeps on the last stage.  Copies are updated, but count neither as parameters nor for the
        norm.
    reports_loss: whether this rank reports the loss of its replica.
    """

    parameters: dict[str, nn.Parameter]
    splits: dict[str, TensorSlice]
    trainer: Executor
    evaluator: Executor
    stages: Mapping[int, Stage | GraphedStage]
    output_layer: OutputLayer | None
    copied: frozenset[str]
    gradients: Gradients
    optimizer: Optimizer
    loss_scale: LossScale
    reports_loss: bool
    _completions: _Completions

    def train_step(
        self,
        tokens: Tensor,
        labels: Tensor,
        observer: Observer = BLIND,
        *,
        mask: Tensor | None = None,
        segments: Tensor | None = None,
        placed: PlacedBatch | None = None,
    ) -> Tensor | None:
        """Run `Executor.step` of the training program; see there for arguments and result.

        The gradients are multiplied by `loss_scale`, and complete after `optimizer.reduce`.  If a
        step raises, sums and messages are left behind, and the model can no longer be used.
        """
        self._completions.begin()
        return self.trainer.step(
            tokens,
            labels,
            observer,
            mask=mask,
            segments=segments,
            loss_scale=self.loss_scale.value,
            placed=placed,
        )

    @property
    def num_parameters(self) -> int:
        """Return the number of parameters, without copies."""
        return sum(
            parameter.numel()
            for name, parameter in self.parameters.items()
            if name not in self.copied
        )


@dataclass(frozen=True, slots=True)
class EvaluationModel:
    """One rank's share of a model that is only evaluated: parameters, and no memory to train them.

    The attributes are those of RankModel.
    """

    parameters: dict[str, nn.Parameter]
    splits: dict[str, TensorSlice]
    evaluator: Executor
    stages: Mapping[int, Stage]
    output_layer: OutputLayer | None
    reports_loss: bool


def _has_kernels(settings: RunSettings) -> bool:
    """Return whether the vocabulary passes have kernels in C++."""
    return settings.device == "cpu" and DTYPES[settings.dtype].itemsize == 2


def compiled_parts(config: RunConfig) -> tuple[str, ...]:
    """Return in words what a run can compile on this node: layers, kernels, both or nothing.

    Those of a GPU are attention, roundings to float8, and the vocabulary passes.
    """
    settings = config.run
    device, may = torch.device(settings.device), settings.compile != "off"
    builds = may and _has_kernels(settings) and has_cpp_compiler()
    on_gpu = may and device.type == "cuda" and compiles_on(device)
    try:
        fuses = fuse_of_layers(config) is not plain
    except ConfigError:  # `build_rank` raises it, once the nodes are compared
        fuses = False
    compiles = {"layers": fuses, "kernels in C++": builds, "kernels of a GPU": on_gpu}
    return tuple(part for part, is_compiled in compiles.items() if is_compiled)


def _missing(config: RunConfig) -> str:
    """Return in words what to do so that a run compiles all that pays, "" if it does.

    Where run.compile is on, `fuse_of_layers` has refused what layers miss.
    """
    settings, device = config.run, torch.device(config.run.device)
    if settings.compile == "off" or is_turned_off():
        return ""
    if device.type == "cuda" or _compiles_layers(config):
        return remedy_for(device)
    return "" if has_cpp_compiler() or not _has_kernels(settings) else "install a C++ compiler"


def _warm_up(
    config: RunConfig, stages: Iterable[Stage], training: RankModules, evaluating: RankModules
) -> None:
    """Run `stages` and output layers, so that no step compiles, for which other ranks would wait.

    Gradients and weights stay as they are.  Where torch cannot compile, run.compile=auto goes on
    without.  Collective over the tensor-parallel ranks.  Raises ConfigError where it cannot, if
    run.compile is on or there are tensor-parallel ranks.
    """
    num_tokens = config.micro_batch_size * config.model.seq_length
    for stage in stages:
        _try_to_compile(config, partial(stage.warm_up, config.micro_batch_size))
    for modules in (training, evaluating):
        if modules.output_layer is not None:
            _try_to_compile(config, partial(modules.output_layer.warm_up, num_tokens))


def _try_to_compile(config: RunConfig, work: Callable[[], object]) -> None:
    """Run work that compiles what it needs, as `_warm_up` says."""
    try:
        work()
    except Exception as error:
        if not is_failure(error):
            raise
        reason = reason_of(str(error))
        setting, is_split = config.run.compile, config.parallel.tp > 1
        # Tensor-parallel ranks must not differ: copies of a norm would drift apart.
        if setting == "on" or is_split:
            where = " on tensor-parallel ranks" if is_split else ""
            raise ConfigError(
                f"run.compile={setting}, but torch cannot compile{where}: {reason}; "
                "set run.compile=off"
            ) from error
        tell_failure(reason)
        give_up()


def compile_layers(config: RunConfig) -> None:
    """Compile what layers run on a CPU, for ranks that are copies of this process.

    It does so once, in one process, for all stages, and starts no thread.  Nothing happens where
    that is impossible: with tensor-parallel ranks, whose groups do not exist yet, or with several
    threads of OpenMP or of torch's compiler.  A rank compiles again what failed here, and says why.
    """
    fuse, model = fuse_of_layers(config), config.model
    # Deterministic algorithms, which only ranks turn on, would be compiled for again.
    if fuse is plain or config.run.deterministic:
        return
    prepare_inductor()
    if config.parallel.tp > 1 or torch.get_num_threads() > 1 or not compiles_alone():
        return
    with suppress(Exception), compile_one_first():
        torch.hub.tqdm.monitor_interval = 0  # type: ignore[attr-defined]  # else it starts a thread
        Stage(
            model,
            sorted({model.is_local(index): index for index in range(model.num_layers)}.values()),
            final_norm=True,
            dtype=DTYPES[config.run.dtype],
            device=torch.device("cpu"),
            group=dist.ProcessGroup(0, 1),  # type: ignore[call-arg]  # layers read its size
            seed=config.run.seed,
            products=linear_products(config),
            fuse=fuse,
        ).warm_up(config.micro_batch_size)


def rank_device(config: RunConfig) -> torch.device:
    """Return the device of this rank, on CUDA with the index of the current device."""
    return with_index(torch.device(config.run.device))


def build_rank(
    config: RunConfig,
    plan: RunPlan,
    mesh: Mesh,
    transport: Transport | None = None,
    *,
    compiling: AbstractContextManager[None] | None = None,
) -> RankModel:
    """Build the model of this rank with its initial values.

    `transport` connects it with the other ranks of its pipeline.  By default that is over the
    process groups of `mesh`.  What is to be compiled is compiled within `compiling`.
    """
    rank, device = mesh.pipeline_rank, rank_device(config)
    weights = _build_weights(config, plan, mesh, device)
    gradients = _build_gradients(config, weights, mesh)
    replicas = Replicas(mesh.data, _through_host(config))
    comms = Comms(transport or _process_groups(config, mesh, device))
    tied = None if weights.tied is None else TiedWeight(weights.tied, comms.sum_over_ends)
    # The optimizer may move the parameters, so the modules that hold views of them come after it.
    optimizer = _build_optimizer(config.optim, weights.parameters, gradients, replicas, tied)
    completions = _completions_of(weights, gradients, optimizer, mesh)
    stages: Mapping[int, Stage | GraphedStage] = weights.stages
    if config.run.cuda_graphs:
        split = plan.problem.split_backward
        stages = {
            number: GraphedStage(stage, split=split) if plan.layers[number] else stage
            for number, stage in weights.stages.items()
        }
    training, evaluating = _build_modules(
        config, plan, mesh, weights, stages, gradients.by_name, completions
    )
    if missing := _missing(config):
        tell(f"to be faster, {missing}")
    # Triton's kernels of the vocabulary are there also where nothing else is compiled.
    compiles = bool(compiled_parts(config))
    if compiles or runs_triton(device):
        # Tensor-parallel ranks wait for each other while they compile.
        alone = mesh.degrees.tp == 1
        turn = compile_one_first() if alone else nullcontext()
        with compiling or nullcontext(), starting(mesh.tensor, config.run), turn:
            warmed = weights.stages.values() if compiles else ()
            _warm_up(config, warmed, training, evaluating)
    return RankModel(
        parameters=weights.parameters,
        splits=weights.splits,
        trainer=Executor(plan.program, rank, training, comms),
        evaluator=Executor(plan.evaluation_program, rank, evaluating, comms),
        stages=stages,
        output_layer=training.output_layer,
        copied=weights.copied,
        gradients=gradients,
        optimizer=optimizer,
        loss_scale=LossScale.of(config.run.dtype),
        reports_loss=_reports_loss(plan, mesh),
        _completions=completions,
    )


def build_for_evaluation(config: RunConfig, plan: RunPlan, mesh: Mesh) -> EvaluationModel:
    """Build the model of this rank with its initial values, without gradients and an optimizer."""
    device = rank_device(config)
    weights = _build_weights(config, plan, mesh, device)
    no_memory = {
        name: torch.empty_like(parameter, device="meta")
        for name, parameter in weights.parameters.items()
    }
    _, evaluating = _build_modules(
        config, plan, mesh, weights, weights.stages, no_memory, NO_UPDATES
    )
    comms = Comms(_process_groups(config, mesh, device))
    return EvaluationModel(
        parameters=weights.parameters,
        splits=weights.splits,
        evaluator=Executor(plan.evaluation_program, mesh.pipeline_rank, evaluating, comms),
        stages=weights.stages,
        output_layer=evaluating.output_layer,
        reports_loss=_reports_loss(plan, mesh),
    )


def _reports_loss(plan: RunPlan, mesh: Mesh) -> bool:
    return plan.problem.root(End.OUTPUT) == mesh.pipeline_rank and mesh.tensor_rank == 0


@dataclass(frozen=True, slots=True)
class _Weights:
    """The weights of a rank: its stages, and its rows at each end of the vocabulary, if any.

    matrices: name and matrix of an end.  With tied embeddings both ends may have the same.
    splits, copied: as in RankModel.
    tied: the name of a tied matrix that an unsharded vocabulary keeps on two ranks, else None.
    """

    stages: dict[int, Stage]
    shards: dict[End, _Shards]
    matrices: dict[End, tuple[str, nn.Parameter]]
    parameters: dict[str, nn.Parameter]
    splits: dict[str, TensorSlice]
    copied: frozenset[str]
    tied: str | None

    @property
    def matrix_names(self) -> dict[End, str]:
        return {end: name for end, (name, _) in self.matrices.items()}


def _build_weights(config: RunConfig, plan: RunPlan, mesh: Mesh, device: torch.device) -> _Weights:
    rank, problem, dtype = mesh.pipeline_rank, plan.problem, DTYPES[config.run.dtype]
    stages = _build_stages(config, plan, mesh, dtype, device)
    shards = {end: _Shards.of(plan, mesh, end) for end in End if rank in problem.shard_ranks(end)}
    matrices = _build_matrices(config, shards, dtype, device)
    parameters = dict(_named_parameters(stages)) | dict(matrices.values())
    splits = {name: split for stage in stages.values() for name, split in stage.splits.items()}
    for end, (name, _) in matrices.items():
        own = shards[end].own
        splits[name] = TensorSlice(0, config.model.vocab_size, ((own.start, own.stop),))
    copied = parameters.keys() - splits.keys() if mesh.tensor_rank else set[str]()
    tied = None
    two_ends = not problem.algorithm.sharded and len({problem.root(end) for end in End}) > 1
    if config.model.tied_embeddings and two_ends and matrices:
        ((tied, _),) = matrices.values()
        copied |= set() if End.INPUT in matrices else {tied}
    return _Weights(
        stages,
        shards,
        matrices=matrices,
        parameters=parameters,
        splits=splits,
        copied=frozenset(copied),
        tied=tied,
    )


def _build_gradients(config: RunConfig, weights: _Weights, mesh: Mesh) -> Gradients:
    precise = statistics_dtype(DTYPES[config.run.dtype])
    layout = lay_out(
        weights.parameters,
        _runs(weights),
        max_elements=bucket_elements(config.optim, precise.itemsize),
        num_parts=mesh.degrees.dp,
        min_buckets=BUCKETS_PER_STAGE,
        copied=weights.copied,
    )
    return Gradients(weights.parameters, layout)


def _completions_of(
    weights: _Weights, gradients: Gradients, optimizer: Optimizer, mesh: Mesh
) -> _Completions:
    return _Completions(
        _names_of_passes(weights.stages, weights.matrix_names, mesh.pipeline_rank),
        partial=frozenset(name for stage in weights.stages.values() for name in stage.partial),
        gradients=gradients,
        optimizer=optimizer,
        tensor=mesh.tensor,
    )


def _build_modules(
    config: RunConfig,
    plan: RunPlan,
    mesh: Mesh,
    weights: _Weights,
    stages: Mapping[int, StageModule],
    gradients: Mapping[str, Tensor],
    updates: WeightUpdates,
) -> tuple[RankModules, RankModules]:
    """Return the modules that the executors of training and of evaluation call."""
    input_layer, loss = None, config.loss
    if End.INPUT in weights.matrices:
        name, weight = weights.matrices[End.INPUT]
        shards = weights.shards[End.INPUT]
        input_layer = InputLayer(weight, gradients[name], shards.all, shards.index)
    options = LossOptions(loss.label_smoothing, loss.z_loss, config.model.logit_softcap)
    products = VocabProducts()  # a step and an evaluation never run at the same time
    training = RankModules(
        stages,
        input_layer,
        _output_layer(config, weights, gradients, plan.problem.algorithm, options, products),
        dtype=DTYPES[config.run.dtype],
        device=rank_device(config),
        hidden_size=config.model.hidden_size,
        normalisation=loss.normalisation,
        leads=mesh.tensor_rank == 0,
        over_replicas=partial(_over_replicas, mesh) if mesh.degrees.dp > 1 else None,
        updates=updates,
        sequence_parts=mesh.degrees.tp if config.parallel.sequence_parallel else 1,
    )
    measured = plan.evaluation_problem.algorithm
    output_layer = _output_layer(config, weights, gradients, measured, options.measured, products)
    evaluating = replace(training, output_layer=output_layer, normalisation="token")
    return training, replace(evaluating, stages=weights.stages)


def _output_layer(
    config: RunConfig,
    weights: _Weights,
    gradients: Mapping[str, Tensor],
    algorithm: VocabAlgorithm,
    options: LossOptions,
    products: VocabProducts,
) -> OutputLayer | None:
    """Return the output layer of this rank, None if it has no rows there."""
    if End.OUTPUT not in weights.matrices:
        return None
    name, weight = weights.matrices[End.OUTPUT]
    return OutputLayer(
        weight,
        gradients[name],
        weights.shards[End.OUTPUT].own,
        vocab_size=config.model.vocab_size,
        input_gradient=algorithm.input_gradient,
        backend=config.vocab.backend,
        options=options,
        recompute_fraction=config.vocab.recompute_fraction,
        sum_dtype=DTYPES[config.run.dtype] if config.vocab.sum_dtype == "compute" else None,
        products=products,
    )


def _through_host(config: RunConfig) -> bool:
    """Return whether tensors on a GPU travel through host memory."""
    return config.run.device == "cuda" and config.run.comm_backend == "gloo"


def _process_groups(config: RunConfig, mesh: Mesh, device: torch.device) -> ProcessGroups:
    return ProcessGroups(
        mesh.pipeline,
        device,
        through_host=_through_host(config),
        whole_hops=config.parallel.sequence_parallel,
    )


def _over_replicas(mesh: Mesh, total: Tensor) -> Tensor:
    """Return the sum of `total`, fp64 [] on the host, over all replicas of this rank, in order.

    It uses the control group.  In the data-parallel group it would wait for the all-gather of
    parameters.
    """
    _, here, k = mesh.degrees.place(mesh.rank)
    of_ranks = mesh.steps.all_gather(total)
    replicas = [mesh.degrees.rank(replica, here, k) for replica in range(mesh.degrees.dp)]
    return of_ranks[replicas].sum()


def _sum_in_place(tensors: list[Tensor], group: dist.ProcessGroup) -> None:
    """All-reduce small tensors over `group` in one message."""
    if not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat, group=group)
    for tensor, total in zip(
        tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True
    ):
        tensor.copy_(total.view_as(tensor))


class _Completions:
    """Connects passes with the optimizer: waits for parameters, and announces complete gradients.

    The gradient of a parameter is announced once per step.

    names_of: the parameters that the passes of a kind and stage read, or whose gradients they add
    to.
    partial: parameters of whose gradient every tensor-parallel rank has a term; the terms are
        summed over `tensor` before the announcement.
    """

    def __init__(
        self,
        names_of: Mapping[tuple[Kind, int], tuple[str, ...]],
        *,
        partial: frozenset[str],
        gradients: Gradients,
        optimizer: Optimizer,
        tensor: dist.ProcessGroup,
    ) -> None:
        self._names_of, self._partial, self._gradients = names_of, partial, gradients
        self._optimizer, self._tensor = optimizer, tensor
        self._done: set[str] = set()

    def begin(self) -> None:
        """Begin a step."""
        self._done = set()

    def need(self, item: Pass) -> None:
        self.need_of(self._names_of.get((item.kind, item.stage), ()))

    def need_of(self, names: Sequence[str]) -> None:
        self._optimizer.need(names)

    def announce(self, names: Sequence[str]) -> None:
        new = [name for name in names if name not in self._done]
        self._done.update(new)
        _sum_in_place(
            [self._gradients[name] for name in new if name in self._partial], self._tensor
        )
        self._optimizer.ready(new)

    def complete(self, item: Pass) -> None:
        self.announce(self._names_of.get((item.kind, item.stage), ()))


def _runs(weights: _Weights) -> Runs:
    """Return the runs for `lay_out`, in the order in which passes need the parameters."""
    stages, names = weights.stages, weights.matrix_names
    runs: list[Sequence[Sequence[str]]] = [stages[number].units for number in sorted(stages)]
    if End.INPUT in names:
        runs.insert(0, [[names[End.INPUT]]])
    if End.OUTPUT in names and names[End.OUTPUT] != names.get(End.INPUT):
        runs.append([[names[End.OUTPUT]]])
    return runs


def _build_optimizer(
    optim: OptimConfig,
    parameters: dict[str, nn.Parameter],
    gradients: Gradients,
    replicas: Replicas,
    tied: TiedWeight | None,
) -> Optimizer:
    if optim.name == "adamw":
        return ReplicatedAdamW(parameters, gradients, optim, replicas, tied)
    if not optim.offload:
        return ZeroAdamW(parameters, gradients, optim, replicas, tied)
    from vp_train.optim.offload import OffloadedAdamW  # the import takes seconds

    return OffloadedAdamW(parameters, gradients, optim, replicas, tied)


@dataclass(frozen=True, slots=True)
class _Shards:
    """The shards of one end in the order of their ranks, and the `index` of this rank's shard.

    The order is by pipeline rank, then by tensor-parallel rank.
    """

    all: tuple[Shard, ...]
    index: int

    @classmethod
    def of(cls, plan: RunPlan, mesh: Mesh, end: End) -> _Shards:
        """Return the shards of `end`: each pipeline rank's rows, split over its tensor ranks."""
        members, tp = plan.problem.shard_ranks(end), mesh.degrees.tp
        shards = tuple(part for member in members for part in plan.shards[end][member].split(tp))
        return cls(shards, members.index(mesh.pipeline_rank) * tp + mesh.tensor_rank)

    @property
    def own(self) -> Shard:
        return self.all[self.index]


def _build_stages(
    config: RunConfig, plan: RunPlan, mesh: Mesh, dtype: torch.dtype, device: torch.device
) -> dict[int, Stage]:
    fuse = fuse_of_layers(config)
    return {
        stage: Stage(
            config.model,
            plan.layers[stage],
            final_norm=stage == plan.problem.last_stage,
            first=stage == 0,
            dtype=dtype,
            device=device,
            group=mesh.tensor,
            seed=config.run.seed,
            products=linear_products(config),
            fuse=fuse,
            recompute=plan.recompute[stage],
            split_sequences=config.parallel.sequence_parallel,
            num_offloaded=offloaded_layers(
                len(plan.layers[stage]), config.parallel.offload_activations
            ),
        )
        for stage in plan.problem.layout.stages_of(mesh.pipeline_rank)
    }


def fuse_of_layers(config: RunConfig) -> Fuse:
    """Return how the elementwise work of layers runs.  Raises ConfigError like `choose_fuse`."""
    device = torch.device(config.run.device)
    return choose_fuse(config.run.compile, device, compiles=_compiles_layers(config))


def _compiles_layers(config: RunConfig) -> bool:
    """Return whether elementwise work of layers is compiled, if there is a compiler."""
    settings, model = config.run, config.model
    values = config.micro_batch_size * model.seq_length * model.ffn_hidden_size
    return compiles_layers(
        settings.compile,
        model,
        values // config.parallel.tp,
        DTYPES[settings.dtype].itemsize,
        on_cuda=settings.device == "cuda",
    )


def linear_products(config: RunConfig) -> LinearProducts:
    """Return what forms the products of the linear layers of one stage."""
    if config.run.linear_dtype == "float8":
        return Float8Products(by_row=config.run.float8_scales == "row")
    return PLAIN


def _build_matrices(
    config: RunConfig, shards: dict[End, _Shards], dtype: torch.dtype, device: torch.device
) -> dict[End, tuple[str, nn.Parameter]]:
    """Return name and matrix of this rank's rows at each end where it has rows.

    With tied embeddings and both ends on this rank, both have the same matrix.
    """
    matrices: dict[End, tuple[str, nn.Parameter]] = {}
    for end, here in shards.items():
        if config.model.tied_embeddings and End.INPUT in matrices:
            matrices[end] = matrices[End.INPUT]
            continue
        name = "embedding" if end is End.INPUT or config.model.tied_embeddings else "output"
        rows = init_rows(
            name, here.own.start, here.own.stop, config.model, config.run.seed, dtype, device
        )
        matrices[end] = (f"{name}.weight", nn.Parameter(rows))
    return matrices


def _names_of_passes(
    stages: dict[int, Stage], matrices: dict[End, str], rank: int
) -> dict[tuple[Kind, int], tuple[str, ...]]:
    """Return the parameters that passes of a kind and stage read or whose gradients they add to."""
    of_stages = {
        (kind, number): tuple(name for name, _ in stage.named_parameters())
        for number, stage in stages.items()
        for kind in (Kind.F, Kind.B, Kind.I, Kind.W)
    }
    kinds = {End.INPUT: (Kind.E, Kind.G), End.OUTPUT: (Kind.S, Kind.T)}
    return of_stages | {
        (kind, rank): (name,) for end, name in matrices.items() for kind in kinds[end]
    }


def _named_parameters(stages: dict[int, Stage]) -> Iterator[tuple[str, nn.Parameter]]:
    for stage in stages.values():
        yield from stage.named_parameters()
