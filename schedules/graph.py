"""Cycles in a dependency graph: how they are found and described."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import TypeVar

Node = TypeVar("Node", bound=Hashable)


class DeadlockError(ValueError):
    """The error if passes wait for each other in a cycle. The message names them."""


def require_acyclic(
    predecessors: Mapping[Node, Iterable[Node]],
    name: Callable[[Node], str] = str,
    rank_of: Callable[[Node], int | None] = lambda node: None,
) -> None:
    """Raise DeadlockError, naming one cycle, if the graph of `predecessors` has a cycle.

    `rank_of` gives the rank of what runs on one, so that the message can name it.
    """
    waiting = {node: dict.fromkeys(before) for node, before in predecessors.items()}
    after: dict[Node, list[Node]] = {node: [] for node in waiting}
    for node, before in waiting.items():
        for earlier in before:
            after[earlier].append(node)
    ready = [node for node, before in waiting.items() if not before]
    while ready:
        done = ready.pop()
        del waiting[done]
        for node in after[done]:
            waiting[node].pop(done, None)
            if not waiting[node]:
                ready.append(node)
    if waiting:
        raise DeadlockError(describe_cycle(waiting, name, rank_of))


def describe_cycle(
    waiting: Mapping[Node, Iterable[Node]],
    name: Callable[[Node], str] = str,
    rank_of: Callable[[Node], int | None] = lambda node: None,
) -> str:
    """Return one cycle as text: `deadlock: A waits for B waits for A; rank 0 runs A, rank 1 B`.

    `waiting` maps nodes to their predecessors. Every node must wait for another node of `waiting`.
    Nodes of a rank that only lie between two others of it in its order are left out.
    """
    path: dict[Node, None] = {}
    node = next(iter(waiting))
    while node not in path:
        path[node] = None
        node = next(before for before in waiting[node] if before in waiting)
    visited = list(path)
    cycle = visited[visited.index(node) :]
    ranks = {node: rank_of(node) for node in cycle}
    kept = [
        node
        for before, node, after in zip(
            [cycle[-1], *cycle[:-1]], cycle, [*cycle[1:], cycle[0]], strict=True
        )
        if ranks[node] is None or not ranks[before] == ranks[node] == ranks[after]
    ]
    kept = kept or [cycle[0], cycle[-1]]  # a cycle on one rank
    words = "deadlock: " + " waits for ".join(map(name, [*kept, kept[0]]))
    of_ranks: dict[int, list[str]] = {}
    for node in kept:
        if (rank := ranks[node]) is not None:
            of_ranks.setdefault(rank, []).append(name(node))
    placed = [f"{', '.join(names)} on rank {rank}" for rank, names in sorted(of_ranks.items())]
    return "; ".join([words, *placed])
