"""The dependency graph of one step in integers, for speed: a step can have more than 100,000 nodes.

Every dependency stays within its microbatch. So the nodes of one microbatch are numbered once: node
`k` of microbatch `i` has the id `i * size + k`. `Problem.inputs_of` decides which edges exist. This
module only numbers the nodes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

from schedules.cost import CostModel
from schedules.ir import Kind, Pass, Schedule
from schedules.problem import Collective, Node, Problem
from schedules.vocab import End

Orders = list[list[int]]  # the ids of the passes of every rank, in order

EMBEDDINGS_AHEAD = 2  # microbatches by which E may run ahead of the F of stage 0
_KEPT_GRAPHS = 64  # of a search


@dataclass(frozen=True, slots=True)
class Network:
    """The nodes of one microbatch: `num_passes` passes, then its collectives.

    All tuples are indexed by the node.
    - `lanes`: the rank that the node occupies; from `num_ranks` on, the communicator.
    - `seconds`: its duration.
    - `inputs`, `followers`: the nodes before and after it, with the seconds its result travels.
    - `byte_change`: the bytes that it keeps for later passes, less those that it frees.

    `leaders` maps every E to the F of stage 0. E runs at most EMBEDDINGS_AHEAD microbatches ahead
    of that F, so that embeddings do not pile up. `leaders_back` maps every G to the backward of
    stage 0. The same rule holds for them when time is reversed.
    """

    num_ranks: int
    num_microbatches: int
    nodes: tuple[Node, ...]
    num_passes: int
    lanes: tuple[int, ...]
    seconds: tuple[float, ...]
    inputs: tuple[tuple[tuple[int, float], ...], ...]
    followers: tuple[tuple[tuple[int, float], ...], ...]
    byte_change: tuple[float, ...]
    leaders: dict[int, int]
    leaders_back: dict[int, int]

    @classmethod
    def of(cls, problem: Problem, cost: CostModel) -> Network:
        """Return the network of `problem`. Raises ValueError where a pass has no cost."""
        graph, hop = _Graph.of(replace(problem, num_microbatches=1)), cost.hop_seconds
        nodes, num_passes = graph.nodes, graph.num_passes
        passes = [node for node in nodes if isinstance(node, Pass)]
        barriers = [node for node in nodes if isinstance(node, Collective)]
        no_bytes = [0.0] * len(nodes)
        return cls(
            num_ranks=problem.layout.num_ranks,
            num_microbatches=problem.num_microbatches,
            nodes=nodes,
            num_passes=num_passes,
            lanes=graph.lanes,
            seconds=(
                *map(cost.seconds, passes),
                *(cost.barrier(node.barrier) for node in barriers),
            ),
            inputs=tuple(
                tuple((k, hop if hops else 0.0) for k, hops in before) for before in graph.inputs
            ),
            followers=tuple(
                tuple((k, hop if hops else 0.0) for k, hops in after) for after in graph.followers
            ),
            byte_change=tuple(
                no_bytes
                if problem.forward_only
                else (*map(cost.byte_change, passes), *no_bytes[num_passes:])
            ),
            leaders=graph.leaders,
            leaders_back=graph.leaders_back,
        )

    @property
    def size(self) -> int:
        """The number of nodes of one microbatch."""
        return len(self.nodes)

    @property
    def num_lanes(self) -> int:
        """The number of ranks and communicators."""
        return self.num_ranks + len(End)

    def reversed(self) -> Network:
        """Return the network with reversed time: inputs become followers, freed bytes are kept."""
        freed = tuple(-change for change in self.byte_change)
        return replace(
            self,
            inputs=self.followers,
            followers=self.inputs,
            byte_change=freed,
            leaders=self.leaders_back,
            leaders_back=self.leaders,
        )

    def node(self, number: int) -> Node:
        """Return the pass or collective with the id `number`."""
        microbatch, k = divmod(number, self.size)
        node = self.nodes[k]
        if isinstance(node, Pass):
            return Pass(node.stage, node.kind, microbatch)
        return Collective(node.barrier, microbatch)

    def numbers(self) -> Callable[[Pass], int]:
        """Return the function from a pass to its id. It raises KeyError for an unknown pass."""
        size = self.size
        keys = {
            (node.stage, node.kind): k
            for k, node in enumerate(self.nodes)
            if isinstance(node, Pass)
        }
        return lambda item: item.microbatch * size + keys[item.stage, item.kind]

    def orders(self, schedule: Schedule) -> Orders:
        """Return the ids of a schedule's passes.

        Raises ValueError for a pass that the problem does not have.
        """
        keys = {
            (node.stage, node.kind): k
            for k, node in enumerate(self.nodes)
            if isinstance(node, Pass)
        }
        size, count = self.size, self.num_microbatches
        orders = []
        for rank, order in enumerate(schedule.ranks):
            numbers = []
            for item in order:
                k = keys.get((item.stage, item.kind))
                if k is None or not 0 <= item.microbatch < count:
                    raise ValueError(
                        f"rank {rank} of schedule {schedule.name!r} runs {item}, "
                        "which is not among its passes"
                    )
                numbers.append(item.microbatch * size + k)
            orders.append(numbers)
        return orders

    def schedule(self, name: str, orders: Orders) -> Schedule:
        """Return the schedule that runs the passes with these ids."""
        kinds = [(node.stage, node.kind) for node in self.nodes if isinstance(node, Pass)]
        size = self.size
        return Schedule(
            name, tuple(tuple(Pass(*kinds[n % size], n // size) for n in order) for order in orders)
        )

    def byte_changes(self, order: list[int]) -> list[float]:
        """Return the bytes that each pass of `order` adds to those its rank keeps."""
        change_of, size = self.byte_change, self.size
        return [change_of[number % size] for number in order]


@dataclass(frozen=True, slots=True)
class _Graph:
    """The part of a network that no cost changes; `inputs` and `followers` say what is a hop."""

    nodes: tuple[Node, ...]
    num_passes: int
    lanes: tuple[int, ...]
    inputs: tuple[tuple[tuple[int, bool], ...], ...]
    followers: tuple[tuple[tuple[int, bool], ...], ...]
    leaders: dict[int, int]
    leaders_back: dict[int, int]

    @staticmethod
    @lru_cache(maxsize=_KEPT_GRAPHS)
    def of(problem: Problem) -> _Graph:
        """Return the graph of one microbatch. A search asks for the same ones again and again."""
        num_ranks, communicators = problem.layout.num_ranks, list(End)
        passes = [item for rank in range(num_ranks) for item in problem.passes_of(rank, 0)]
        barriers = list(problem.collectives(0))
        nodes: tuple[Node, ...] = (*passes, *barriers)
        numbers = {node: k for k, node in enumerate(nodes)}
        inputs = tuple(
            tuple(
                (numbers[earlier], problem.is_hop(earlier, node))
                for earlier in problem.inputs_of(node)
            )
            for node in nodes
        )
        followers: list[list[tuple[int, bool]]] = [[] for _ in nodes]
        for k, before in enumerate(inputs):
            for earlier, hops in before:
                followers[earlier].append((k, hops))
        lanes = [problem.rank_of(item) for item in passes]
        lanes += [
            num_ranks + communicators.index(problem.algorithm.barrier(node.barrier).end)
            for node in barriers
        ]
        first, back = numbers[Pass(0, Kind.F, 0)], numbers.get(Pass(0, problem.backward, 0), -1)
        return _Graph(
            nodes=nodes,
            num_passes=len(passes),
            lanes=tuple(lanes),
            inputs=inputs,
            followers=tuple(map(tuple, followers)),
            leaders={k: first for k, item in enumerate(passes) if item.kind is Kind.E},
            leaders_back={k: back for k, item in enumerate(passes) if item.kind is Kind.G},
        )
