"""The clock of a list scheduler: it simulates the passes while their orders are constructed."""

from __future__ import annotations

from schedules.network import Network


class Clock:
    """The times at which ranks and communicators become free and inputs arrive, in seconds.

    `free_at[l]` is when rank or communicator l becomes free. `missing[n]` counts the inputs of node
    n that have not been placed yet. `arrived_at[n]` is when the last of the others arrives. Nodes
    are identified by their ids. Collectives run without being placed, as soon as their inputs
    arrive.
    """

    def __init__(self, network: Network) -> None:
        self._size, self._num_passes, self._lanes = network.size, network.num_passes, network.lanes
        self._seconds, self._followers = network.seconds, network.followers
        self.free_at = [0.0] * network.num_lanes
        self.arrived_at = [0.0] * (network.num_microbatches * network.size)
        self.missing = [len(before) for before in network.inputs] * network.num_microbatches

    def run(self, number: int, now: float) -> list[int]:
        """Start the pass `number` at `now`, and return the passes whose last input it provides."""
        k = number % self._size
        end = self.free_at[self._lanes[k]] = now + self._seconds[k]
        ready: list[int] = []
        self._finish(number - k, k, end, ready)
        return ready

    def _finish(self, base: int, k: int, end: float, ready: list[int]) -> None:
        """Deliver the result of a node that ends at `end`, and run the collectives it completes."""
        arrived_at, missing = self.arrived_at, self.missing
        for step, travel in self._followers[k]:
            later, arrival = base + step, end + travel
            if arrival > arrived_at[later]:
                arrived_at[later] = arrival
            missing[later] -= 1
            if missing[later]:
                continue
            if step < self._num_passes:
                ready.append(later)
                continue
            lane = self._lanes[step]
            done = self.free_at[lane] = (
                max(arrived_at[later], self.free_at[lane]) + self._seconds[step]
            )
            self._finish(base, step, done, ready)
