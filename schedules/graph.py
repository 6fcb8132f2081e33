"""Order and cycles: the one place that walks a dependency graph."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import TypeVar

Node = TypeVar("Node", bound=Hashable)


class DeadlockError(ValueError):
    """Passes wait for each other in a circle; the message names them."""


def require_acyclic(
    predecessors: Mapping[Node, Iterable[Node]], name: Callable[[Node], str] = str
) -> None:
    """Raise DeadlockError with one cycle of `predecessors`, if there is one."""
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
    """One cycle among nodes that all wait for another of them, as `A waits for B waits for A`."""
    path: list[Node] = []
    node = next(iter(waiting))
    while node not in path:
        path.append(node)
        node = next(before for before in waiting[node] if before in waiting)
    circle = [*path[path.index(node) :], node]
    return "deadlock: " + " waits for ".join(map(name, circle))
