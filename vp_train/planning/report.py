"""The prediction of a run on a cluster: bytes of every rank, seconds of a step, and what limits it.

Pure: nothing starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from schedules.bound import step_bound
from schedules.generators.auto import Watch
from schedules.ir import Kind
from schedules.network import Network
from schedules.simulate import timed
from schedules.vocab import VOCAB_ALGORITHMS, End
from vp_train.config import ClusterConfig, ConfigError, CostConfig, OptimConfig, RunConfig
from vp_train.config.parallel import shortened
from vp_train.planning.cluster import (
    host_bytes_per_second,
    known_peak_flops,
    links_of,
    on_cluster,
    peak_flops,
    tied_seconds,
)
from vp_train.planning.degrees import Degrees, split_ranks
from vp_train.planning.estimate import (
    exposed_tensor_seconds,
    issue_seconds,
    layer_pass_seconds,
)
from vp_train.planning.memory import (
    HostUsage,
    RankMemory,
    StateBytes,
    fullest_node,
    host_bytes,
    host_state,
    rank_memory,
    state_of,
)
from vp_train.planning.overlap import ReplicaExchange, exchange
from vp_train.planning.plan import StepPlan, plan_step, row_advice
from vp_train.planning.workload import Workload
from vp_train.units import amount, count_words, human_bytes

_GIB = 2**30
_ROUNDING = 1e-9  # of sums of seconds, as a part
VISIBLE = 0.005  # part of a step that exposed communication takes where a line says so
_VOCABULARY = {kind.value for kind in Kind if kind.is_vocabulary}
_OTHER_CLUSTER = "are there; set cluster.num_nodes or cluster.gpus_per_node, or change a degree"


@dataclass(frozen=True, slots=True)
class RankReport:
    """The work and the memory of one pipeline rank.

    Its tensor-parallel ranks and its copies in other replicas do the same.  Times are seconds of a
    step, all microbatches together.  `layers` includes `tensor`, the collectives over the
    tensor-parallel ranks.  `vocabulary` is S, T, E and G.  `host` is in host memory at most.
    """

    num_layers: int
    num_rows: int
    memory: RankMemory
    layers: float
    tensor: float
    vocabulary: float
    host: HostUsage = field(default_factory=HostUsage)

    @property
    def busy(self) -> float:
        return self.layers + self.vocabulary


@dataclass(frozen=True, slots=True)
class Offloading:
    """Activations that wait in host memory in a step.

    moved: the bytes that go to the host on the rank that moves most; as many come back.
    num_moved, num_kept: the pairs of stage and microbatch that go there, and that stay although
        their stage offloads layers.
    busy: the parts of a step in which the busiest link copies to the host, and back.
    exposed: the seconds by which transfers delay the passes.
    saved: the bytes of activations that the worst rank would keep on top without them.
    """

    moved: float
    num_moved: int
    num_kept: int
    busy: tuple[float, float]
    exposed: float
    saved: float


@dataclass(frozen=True, slots=True)
class PlanReport:
    """The predicted time and memory of one run on a cluster.

    `recompute` says in words what the backward recomputes.  `flops` are `Workload.step_flops` of
    all replicas.  `passes` are the seconds of the simulated schedule.  The seconds `gradients`, of
    sums and gathers that no pass hides, and `optimizer` come after it; `exchange` says how much is
    hidden.  `messages` are the seconds of `passes` in which ranks wait for hops and collectives of
    the pipeline; None if that was not simulated.  `offloading` is None if no activations
    are to be offloaded.  `host` is what the ranks of a node keep in its memory at most.
    `gap_in_its_memory` is that of `StepPlan`, and `advice` that of `row_advice`; None also if it
    was not looked for.
    `layer_seconds` are those of the passes of one layer on one microbatch, without recomputation,
    and `layer_launch_seconds` those of the CPU to issue them, 0 where passes were measured.
    """

    work: Workload
    cluster: ClusterConfig
    schedule: str
    vocab: str
    recompute: str
    ranks: tuple[RankReport, ...]
    flops: float
    passes: float
    gradients: float
    optimizer: float
    bubble: float
    bound: float
    bound_reason: str
    exchange: ReplicaExchange
    messages: float | None = None
    offloading: Offloading | None = None
    host: HostUsage = field(default_factory=HostUsage)
    gap_in_its_memory: float | None = None
    layer_seconds: float = 0.0
    layer_launch_seconds: float = 0.0
    advice: str | None = None

    @property
    def degrees(self) -> Degrees:
        return self.work.degrees

    @property
    def splits_vocabulary(self) -> bool:
        """Whether several pipeline ranks own rows of the vocabulary."""
        return self.degrees.pp > 1 and VOCAB_ALGORITHMS[self.vocab].sharded

    @property
    def limit(self) -> float:
        """The bytes that a rank may allocate."""
        return self.cluster.memory_gib * _GIB

    @property
    def worst(self) -> int:
        """The rank that needs most memory."""
        return max(range(len(self.ranks)), key=lambda rank: self.ranks[rank].memory.total)

    @property
    def most_kept(self) -> float:
        """The most bytes of activations and held shards on a rank, which a cap limits."""
        return max(rank.memory.activations + rank.memory.vocabulary for rank in self.ranks)

    def room(self, limit: float) -> float:
        """Return what a rank may keep of these, so that each needs at most `limit` bytes.

        Every rank has the same cap, so the one with most state says what it is.
        """
        return limit - max(
            rank.memory.total - rank.memory.activations - rank.memory.vocabulary
            for rank in self.ranks
        )

    @property
    def busiest(self) -> int:
        return max(range(len(self.ranks)), key=lambda rank: self.ranks[rank].busy)

    @property
    def excess(self) -> float:
        """The bytes above the limit on the worst rank; below 0 if it fits."""
        return self.ranks[self.worst].memory.total - self.limit

    @property
    def host_excess(self) -> float:
        """The bytes above the host memory of a node; at most 0 if it fits, or is not known."""
        return self.host.total - self.cluster.host_limit

    @property
    def fits(self) -> bool:
        return self.excess <= 0 and self.host_excess <= 0

    @property
    def step_seconds(self) -> float:
        return self.passes + self.gradients + self.optimizer

    @property
    def num_tokens(self) -> int:
        """The tokens of a step in all replicas."""
        return self.work.num_microbatches * self.work.num_tokens * self.degrees.dp

    @property
    def mfu(self) -> float:
        """The model FLOPs over what all GPUs could compute at their peak in the time of a step."""
        peak = peak_flops(self.cluster, self.work.dtype)
        return self.flops / (self.step_seconds * self.degrees.num_ranks * peak)

    @property
    def knows_peak(self) -> bool:
        """Whether the cluster has the peak of its device, of which `mfu` is a part."""
        return known_peak_flops(self.cluster, self.work.dtype) is not None

    @property
    def rate_words(self) -> str:
        """The MFU in words, or the FLOP/s of a rank where the cluster has no peak of its device."""
        if self.knows_peak:
            return f"MFU {self.mfu:.1%}"
        rate = self.flops / (self.step_seconds * self.degrees.num_ranks)
        return f"{amount(rate)}FLOP/s per rank"

    @property
    def exposed(self) -> dict[str, float]:
        """The seconds of communication that nothing hides, by kind, on the busiest rank."""
        return {
            "tensor-parallel": self.ranks[self.busiest].tensor,
            "hops and barriers": self.messages or 0.0,
            "transfers to the host": 0.0 if self.offloading is None else self.offloading.exposed,
            "gradients": self.gradients - self.exchange.exposed_gathers,
            "parameters": self.exchange.exposed_gathers,
        }

    @property
    def exposed_words(self) -> str:
        """The part of a step that is exposed communication, in words."""
        step, found = self.step_seconds, self.exposed
        whole = {"gradients": self.exchange.sums, "parameters": self.exchange.gathers}
        parts = [
            f"{name} {seconds / step:.1%}"
            + (f" of {whole[name] / step:.1%}" if whole.get(name, 0.0) > seconds else "")
            for name, seconds in found.items()
            if seconds > 0 or whole.get(name, 0.0) > 0
        ]
        listed = f": {', '.join(parts)}" if parts else ""
        return f"{sum(found.values()) / step:.1%} of the step{listed}"

    @property
    def gap(self) -> float:
        """The time of the passes above their lower bound, as a fraction of that bound."""
        gap = self.passes / self.bound - 1 if self.bound else 0.0
        return 0.0 if abs(gap) < _ROUNDING else gap

    @property
    def parts(self) -> dict[str, float]:
        """The seconds of a step by what they are spent on, on the busiest rank."""
        rank = self.ranks[self.busiest]
        return {
            "layers": rank.layers - rank.tensor,
            "tensor-parallel sums": rank.tensor,
            "vocabulary": rank.vocabulary,
            "waiting": self.passes - rank.busy,
            "gradient sum": self.gradients,
            "optimizer": self.optimizer,
        }

    @property
    def binds(self) -> str:
        """The words for what limits the run."""
        rank, step = self.ranks[self.busiest], self.step_seconds
        if self.excess > 0:
            return f"memory: {self.memory_words}"
        if self.host_excess > 0:
            return f"host memory: {self.host.excess_words(self.cluster.host_limit)}"
        mean = sum(other.busy for other in self.ranks) / len(self.ranks)
        parts, messages = self.parts, min(self.parts["waiting"], self.messages or 0.0)
        after = ("tensor-parallel sums", "gradient sum", "waiting", "optimizer")
        rest = max(rank.busy - mean, *(parts[name] for name in after))
        sent = messages > max(0.2 * step, rank.busy - mean)  # links bind, not a slow rank
        if rank.busy > 1.1 * mean and parts["optimizer"] < rest and not sent:
            share = sum(other.vocabulary for other in self.ranks) / len(self.ranks)
            what = (
                "its part of the vocabulary"
                if rank.vocabulary - share > (rank.busy - mean) / 2
                else "its layers"
            )
            factor = f"{rank.busy / mean:.2f} times"
            return f"{what}: rank {self.busiest} computes {factor} as long as the average rank"
        # What takes a fifth: the optimizer if it takes most, else communication before waiting.
        for name in sorted(after, key=lambda name: name != "optimizer" or parts[name] < rest):
            if parts[name] > 0.2 * step:
                seconds = parts[name]
                if name == "waiting" and messages > seconds / 2:
                    name, seconds = "hops and barriers", messages
                elif name == "waiting" and self.is_capped:
                    return (
                        f"the cap of schedule=auto: rank {self.busiest} waits for "
                        f"{seconds / step:.0%} of the step; set a higher schedule.cap_gib or "
                        "schedule.cap_microbatches"
                    )
                words = {
                    "waiting": "filling and draining the pipeline",
                    "optimizer": f"the optimizer{' on the host' * (self.host.optimizer > 0)}",
                }.get(name, f"communication, {name}")
                return f"{words}: {seconds / step:.0%} of the step; {self._advice(name)}"
        again = ", recomputation included" * (self.recompute != "none")
        words = f"compute: rank {self.busiest} computes for {(rank.busy - rank.tensor) / step:.0%}"
        sums = f"; it waits for tensor-parallel sums for {rank.tensor / step:.1%}"
        return f"{words} of the step{again}{sums * (rank.tensor >= VISIBLE * step)}"

    @property
    def is_capped(self) -> bool:
        """Whether the memory of a rank bounds the step, which it does under a cap only."""
        return self.bound_reason.startswith("the memory of rank")

    @property
    def launch_words(self) -> str:
        """Return in words how the CPU slows the step if the GPU waits for it, "" if it does not."""
        layer, issued = self.layer_seconds, self.layer_launch_seconds
        if layer >= issued:
            return ""
        return (
            f"the CPU takes about {1e3 * issued:.1f} ms to issue the kernels of a layer, the GPU "
            f"{1e3 * layer:.1f} to compute them; the step counts at least {1e3 * issued:.1f}; "
            f"a larger micro-batch{' or a smaller tp' * (self.degrees.tp > 1)} helps"
        )

    @property
    def memory_words(self) -> str:
        """The need of the worst rank and its distance from the limit, in words."""
        memory, cap = self.ranks[self.worst].memory, self.cluster.memory_gib
        how = "less" if self.excess <= 0 else "more"
        return (
            f"needs {human_bytes(memory.total)} on rank {self.worst}, "
            f"{human_bytes(abs(self.excess))} {how} than {cap:,g} GiB"
        )

    def memory_with(self, optim: OptimConfig) -> float:
        """Return what the rank that needs most would need with the state of another optimizer."""
        memories = [rank.memory for rank in self.ranks]
        return max(
            one.total - one.state + state_of(self.work, optim, one.parameters).state
            for one in memories
        )

    def host_with(self, optim: OptimConfig) -> HostUsage:
        """Return what `host` would be with another optimizer."""
        of_rank = [
            replace(rank.host, optimizer=host_state(self.work, optim, rank.memory.parameters))
            for rank in self.ranks
        ]
        return fullest_node(of_rank, self.degrees, self.cluster.gpus_per_node)

    def _advice(self, part: str) -> str:
        links = links_of(self.cluster, self.degrees)
        match part:
            case "waiting":
                count = self.work.num_microbatches
                many = count_words(count, "microbatch")
                return f"more than {many}, or a smaller pp"
            case "optimizer":
                without = ", or optim.offload=false where that fits"
                return f"a larger batch{without * (self.host.optimizer > 0)}"
            case "hops and barriers":
                return f"{links.pipeline.where}; fewer stages"
            case "gradient sum":
                shards = self.exchange.gathers > 0  # it has zero1 already
                return (
                    f"{links.data.where}; more microbatches{', or optim.name=zero1' * (not shards)}"
                )
            case _:
                return f"{links.tensor.where}; a smaller tp"

    def record(self) -> dict[str, Any]:
        """Return the report for JSON, in bytes, seconds and fractions."""
        return {
            "dp": self.degrees.dp,
            "pp": self.degrees.pp,
            "tp": self.degrees.tp,
            "micro_batch_size": self.work.micro_batch_size,
            "num_microbatches": self.work.num_microbatches,
            "schedule": self.schedule,
            "vocab": self.vocab,
            "recompute": self.recompute,
            "step_seconds": self.step_seconds,
            "tokens_per_second": self.num_tokens / self.step_seconds,
            "flops": self.flops,
            "mfu": self.mfu if self.knows_peak else None,
            "bubble": self.bubble,
            "bound_seconds": self.bound,
            "gap": self.gap,
            "gap_in_its_memory": self.gap_in_its_memory,
            "parts_seconds": self.parts,
            "exposed_seconds": self.exposed,
            "exchange_seconds": asdict(self.exchange),
            "offloading": None if self.offloading is None else asdict(self.offloading),
            "host_bytes": asdict(self.host),
            "binds": self.binds,
            "advice": self.advice,
            "layer_seconds": self.layer_seconds,
            "layer_launch_seconds": self.layer_launch_seconds,
            "fits": self.fits,
            "limit_bytes": self.limit,
            "spare_bytes": -self.excess,
            "ranks": [
                asdict(rank) | {"total_bytes": rank.memory.total, "busy_seconds": rank.busy}
                for rank in self.ranks
            ],
        }


def make_report(config: RunConfig, watch: Watch | None = None) -> PlanReport:
    """Plan `config` on all GPUs of its cluster.

    `watch` sees the search of schedule=auto go on, and may end it.  Raises ConfigError, which names
    the value and the way out.
    """
    step, config, report = _planned(config, watch)
    return replace(
        with_messages(step, report),
        gap_in_its_memory=step.gap_in_its_memory(),
        advice=row_advice(config, step),
    )


def with_messages(step: StepPlan, report: PlanReport) -> PlanReport:
    """Return the report of a step with its `messages`, which another simulation says."""
    transfers = 0.0 if report.offloading is None else report.offloading.exposed
    return replace(report, messages=_waiting_seconds(step) - transfers)


def brief_report(config: RunConfig) -> PlanReport:
    """Return `make_report` without `messages`, `gap_in_its_memory` and `advice`, in less time."""
    return _planned(config)[2]


def gpus_words(config: RunConfig) -> str:
    """Return the number of GPUs in words, or of the CPU ranks in their place."""
    count, name = config.cluster.num_gpus, {"cuda": "GPU", "cpu": "CPU rank"}[config.run.device]
    return count_words(count, name)


def _planned(
    config: RunConfig, watch: Watch | None = None
) -> tuple[StepPlan, RunConfig, PlanReport]:
    """Return the step of `config`, `config` with the costs of its cluster, and the report."""
    config = with_costs(config)
    step = plan_step(config, config.cluster.num_gpus, watch)
    return step, config, report_of(step, config.cluster, config.optim, cost=config.cost)


def with_costs(config: RunConfig) -> RunConfig:
    """Return `config` with the costs of its cluster.

    Raises ConfigError for degrees that do not fill the cluster.
    """
    try:
        degrees = split_ranks(config.parallel, config.cluster.num_gpus, otherwise=_OTHER_CLUSTER)
    except ConfigError as error:
        preset = " (cluster=laptop)" if config.cluster == ClusterConfig() else ""
        raise ConfigError(f"the cluster has {gpus_words(config)}{preset}: {error}") from None
    cost = on_cluster(Workload.of(config, degrees), config.cluster, config.cost)
    return replace(config, cost=cost)


def _waiting_seconds(step: StepPlan) -> float:
    """Return the seconds that communication adds to the passes, in the same order.

    That is by hops, collectives and transfers to the host.
    """
    cost = step.cost
    free = replace(cost, hop_seconds=0.0, barrier_seconds=dict.fromkeys(cost.barrier_seconds, 0.0))
    network = Network.of(step.problem, free)
    return step.timeline.makespan - timed(network, network.orders(step.schedule)).makespan


def report_of(
    step: StepPlan,
    cluster: ClusterConfig,
    optim: OptimConfig,
    state: StateBytes | None = None,
    *,
    cost: CostConfig | None = None,
) -> PlanReport:
    """Return the report of a step that was planned with the costs of this cluster.

    `state` gives the bytes per parameter if they are not those of this trainer.  `cost` has the
    measured times, if there are any.
    """
    work, timeline = step.work, step.timeline
    cost = on_cluster(work, cluster, CostConfig()) if cost is None else cost
    memories = [rank_memory(step, optim, rank, state) for rank in range(step.num_ranks)]
    ranks = tuple(_rank_report(step, cost, optim, *of_rank) for of_rank in enumerate(memories))
    bound = step_bound(step.problem, step.cost, step.caps)
    updates = [optimizer_seconds(step.degrees, cluster, optim, held) for held in memories]
    parameters = [memory.parameters for memory in memories]
    exchanged = exchange(step, cluster, optim, parameters, updates)
    return PlanReport(
        work=work,
        cluster=cluster,
        schedule=step.schedule.name,
        vocab=step.problem.algorithm.name,
        recompute=step.recompute[0]
        if len(set(step.recompute)) == 1
        else ", ".join(shortened(step.recompute)),
        ranks=ranks,
        flops=work.step_flops * step.degrees.dp,
        passes=timeline.makespan,
        gradients=exchanged.exposed + tied_seconds(work, cluster, optim, step.problem),
        optimizer=max(updates),
        bubble=timeline.mean_bubble,
        bound=bound.seconds,
        bound_reason=bound.reason,
        exchange=exchanged,
        offloading=_offloading_of(step, optim, state, memories),
        host=fullest_node([one.host for one in ranks], step.degrees, cluster.gpus_per_node),
        layer_seconds=layer_pass_seconds(work, replace(cost, layer_launch_seconds=0.0), "none"),
        layer_launch_seconds=issue_seconds(work, cost),
    )


def _offloading_of(
    step: StepPlan, optim: OptimConfig, state: StateBytes | None, memories: Sequence[RankMemory]
) -> Offloading | None:
    """Return what goes to host memory in a step; None if parallel.offload_activations is 0.

    `memories` are those of its ranks.
    """
    timeline, ranks = step.timeline, range(step.num_ranks)
    if not step.cost.offload_bytes:
        return None
    kept = replace(step, schedule=replace(step.schedule, offloads=()))
    network = Network.of(step.problem, step.cost)
    alone = timed(network, network.orders(kept.schedule)).makespan
    num_moved = len(step.schedule.offloads)
    num_stages = sum(num_bytes > 0 for num_bytes in step.cost.offload_bytes)
    links = [timeline.link_busy(rank) for rank in ranks]
    return Offloading(
        moved=max(map(timeline.moved_bytes, ranks)),
        num_moved=num_moved,
        num_kept=num_stages * step.problem.num_microbatches - num_moved,
        busy=max(links, key=sum),
        exposed=max(0.0, timeline.makespan - alone),
        saved=max(rank_memory(kept, optim, rank, state).total for rank in ranks)
        - max(memory.total for memory in memories),
    )


def _rank_report(
    step: StepPlan, cost: CostConfig, optim: OptimConfig, rank: int, memory: RankMemory
) -> RankReport:
    work, spans, split = step.work, step.timeline.compute[rank], step.problem.split_backward
    vocabulary = sum(span.seconds for span in spans if span.kind in _VOCABULARY)
    exposed = {
        kind: exposed_tensor_seconds(work, cost, kind, split_backward=split)
        for kind in set(step.recompute)
    }
    stages = step.problem.layout.stages_of(rank)
    sums = sum(len(step.layers[stage]) * exposed[step.recompute[stage]] for stage in stages)
    return RankReport(
        num_layers=sum(len(step.layers[stage]) for stage in stages),
        num_rows=step.shards[End.OUTPUT][rank].num_rows,
        memory=memory,
        layers=step.timeline.busy(rank) - vocabulary,
        tensor=sums * work.num_microbatches,
        vocabulary=vocabulary,
        host=host_bytes(step, optim, rank),
    )


def optimizer_seconds(
    degrees: Degrees, cluster: ClusterConfig, optim: OptimConfig, memory: RankMemory
) -> float:
    """Return the seconds of the optimizer step, which memory bandwidth limits.

    AdamW reads the gradients, reads and writes its state, and writes the weights.  With ZeRO-1 it
    does so for the part of the replica, and then all replicas' weights are gathered.  With
    optim.offload the host does this for a part of the parameters in each replica.  Their gradients
    go down before and the weights come up after.  A copy of the weights and two moments are in host
    memory.
    """
    if not optim.offload:
        parts = degrees.dp if optim.name == "zero1" else 1
        moved = (memory.gradients + memory.weights) / parts + 2 * memory.optimizer
        return moved / cluster.memory_bytes_per_second
    gradients, weights = memory.gradients / degrees.dp, memory.weights / degrees.dp
    moved = (gradients + weights) / host_bytes_per_second(cluster)
    return moved + (gradients + 2 * 3 * gradients + weights) / cluster.host_memory_bytes_per_second
