"""The activity network of one step, in numbers: what generators and simulator walk when a step has 100,000 nodes and more.

Every dependency stays within its microbatch, so the nodes of one microbatch are numbered once and repeated: node `k` of
microbatch `i` has the id `i * size + k`.  `Problem.inputs_of` decides what the arcs are; this module only numbers them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from schedules.cost import CostModel
from schedules.ir import Pass, Schedule
from schedules.problem import Collective, Node, Problem
from schedules.vocab import End

Orders = list[list[int]]  # the ids of the passes of every rank, in order


@dataclass(frozen=True, slots=True)
class Network:
    """One microbatch's nodes: passes first, then collectives.  All tuples are indexed by the node.

    `lanes`: what a node occupies, a rank or (from `num_ranks` on) a communicator.  `inputs` and `followers` are pairs of a
    node and the seconds its result travels.  `byte_change`: bytes kept for later passes, less those used up.
    """

    num_ranks: int
    num_microbatches: int
    nodes: tuple[Node, ...]
    lanes: tuple[int, ...]
    seconds: tuple[float, ...]
    inputs: tuple[tuple[tuple[int, float], ...], ...]
    followers: tuple[tuple[tuple[int, float], ...], ...]
    byte_change: tuple[float, ...]
    num_passes: int  # the nodes from here on are collectives

    @classmethod
    def of(cls, problem: Problem, cost: CostModel) -> Network:
        """The network of `problem`.  Raises ValueError where a pass has no cost."""
        ranks = range(problem.layout.num_ranks)
        nodes = (*(item for rank in ranks for item in problem.passes_of(rank, 0)), *problem.collectives(0))
        numbers = {node: number for number, node in enumerate(nodes)}
        followers: list[list[tuple[int, float]]] = [[] for _ in nodes]
        inputs = []
        for number, node in enumerate(nodes):
            before = []
            for earlier in problem.inputs_of(node):
                travel = cost.hop_seconds if problem.is_hop(earlier, node) else 0.0
                before.append((numbers[earlier], travel))
                followers[numbers[earlier]].append((number, travel))
            inputs.append(tuple(before))
        ends = list(End)
        return cls(
            len(ranks),
            problem.num_microbatches,
            nodes,
            tuple(
                problem.rank_of(node)
                if isinstance(node, Pass)
                else len(ranks) + ends.index(problem.algorithm.barrier(node.barrier).end)
                for node in nodes
            ),
            tuple(cost.seconds(node) if isinstance(node, Pass) else cost.barrier(node.barrier) for node in nodes),
            tuple(inputs),
            tuple(map(tuple, followers)),
            tuple(
                cost.byte_change(node) if isinstance(node, Pass) and not problem.forward_only else 0.0 for node in nodes
            ),
            sum(isinstance(node, Pass) for node in nodes),
        )

    @property
    def size(self) -> int:
        """Nodes of one microbatch."""
        return len(self.nodes)

    @property
    def num_lanes(self) -> int:
        return self.num_ranks + len(End)

    def reversed(self) -> Network:
        """The same network with time running backwards: what is freed is now kept."""
        freed = tuple(-change for change in self.byte_change)
        return replace(self, inputs=self.followers, followers=self.inputs, byte_change=freed)

    def node(self, number: int) -> Node:
        """The pass or collective with this id."""
        microbatch, k = divmod(number, self.size)
        node = self.nodes[k]
        if isinstance(node, Pass):
            return Pass(node.stage, node.kind, microbatch)
        return Collective(node.barrier, microbatch)

    def orders(self, schedule: Schedule) -> Orders:
        """The ids of a schedule.  Raises ValueError for a pass that the problem does not have."""
        keys = {(node.stage, node.kind): k for k, node in enumerate(self.nodes) if isinstance(node, Pass)}
        size, count = self.size, self.num_microbatches
        orders = []
        for rank, order in enumerate(schedule.ranks):
            numbers = []
            for item in order:
                k = keys.get((item.stage, item.kind))
                if k is None or not 0 <= item.microbatch < count:
                    raise ValueError(f"rank {rank} of schedule {schedule.name!r} runs {item}, which is not among its passes")
                numbers.append(item.microbatch * size + k)
            orders.append(numbers)
        return orders

    def schedule(self, name: str, orders: Orders) -> Schedule:
        """The schedule of these ids."""
        kinds = [(node.stage, node.kind) for node in self.nodes if isinstance(node, Pass)]
        size = self.size
        return Schedule(
            name,
            tuple(tuple(Pass(*kinds[number % size], number // size) for number in order) for order in orders),
        )

    def byte_changes(self, order: list[int]) -> list[float]:
        """What each pass of `order` adds to the bytes kept on its rank."""
        return [self.byte_change[number % self.size] for number in order]
