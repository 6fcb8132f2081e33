"""Orders of passes by the ids of a network: what several generators need to know of them."""

from __future__ import annotations

from schedules.network import Network, Orders


def topological(network: Network) -> list[int]:
    """Return the nodes of a microbatch in an order of their dependencies.

    Nodes that can start earlier come first.
    """
    missing = [len(before) for before in network.inputs]
    heads = [0.0] * network.size
    ready = [k for k, count in enumerate(missing) if not count]
    order: list[int] = []
    while ready:
        k = ready.pop()
        order.append(k)
        for later, travel in network.followers[k]:
            heads[later] = max(heads[later], heads[k] + network.seconds[k] + travel)
            missing[later] -= 1
            if not missing[later]:
                ready.append(later)
    # The sort is stable, so that of nodes without a duration the later stays behind.
    return sorted(order, key=heads.__getitem__)


def in_turn(network: Network, orders: Orders) -> Orders:
    """Return `orders` with the microbatches of every kind of pass in their turn.

    All microbatches are equal, so that a schedule stays valid and takes the same time.
    """
    size = network.size
    renamed: Orders = []
    for order in orders:
        upcoming = list(range(size))
        own = []
        for number in order:
            k = number % size
            own.append(upcoming[k])
            upcoming[k] += size
        renamed.append(own)
    return renamed
