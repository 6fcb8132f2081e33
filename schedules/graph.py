"""Cycles in a dependency graph: how they are found and described."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import TypeVar

Node = TypeVar("Node", bound=Hashable)


class DeadlockError(ValueError):
    """The error if passes wait for each other in a cycle. The message names them."""


def require_acyclic(
    predecessors: Mapping[Node, Iterable[Node]], name: Callable[[Node], str] = str
) -> None:
    """Raise DeadlockError, naming one cycle, if the graph of `predecessors` has a cycle."""
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
        raise DeadlockError(describe_cycle(waiting, name))


def describe_cycle(
    waiting: Mapping[Node, Iterable[Node]], name: Callable[[Node], str] = str
) -> str:
    """Return one cycle as text: `deadlock: A waits for B waits for A`.

    `waiting` maps nodes to their predecessors. Every node must wait for another node of `waiting`.
    """
    path: list[Node] = []
    node = next(iter(waiting))
    while node not in path:
        path.append(node)
        node = next(before for before in waiting[node] if before in waiting)
    cycle = [*path[path.index(node) :], node]
    return "deadlock: " + " waits for ".join(map(name, cycle))
