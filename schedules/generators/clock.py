"""Time that runs forward over all ranks while their orders are being made."""

from __future__ import annotations

from schedules.network import Network


class Clock:
    """When ranks and communicators are free, and when the inputs of each node are there; nodes by their ids.

    `arrived_at[n]` is the latest input of node n so far, `missing[n]` how many are not known yet.  Collectives run by
    themselves, as soon as their inputs are there.
    """

    def __init__(self, network: Network) -> None:
        self._size, self._num_passes, self._lanes = network.size, network.num_passes, network.lanes
        self._seconds, self._followers = network.seconds, network.followers
        self.free_at = [0.0] * network.num_lanes
        self.arrived_at = [0.0] * (network.num_microbatches * network.size)
        self.missing = [len(before) for before in network.inputs] * network.num_microbatches

    def run(self, number: int, now: float) -> list[int]:
        """Start pass `number`; returns the passes whose last input it was."""
        k = number % self._size
        end = self.free_at[self._lanes[k]] = now + self._seconds[k]
        ready: list[int] = []
        self._finish(number - k, k, end, ready)
        return ready

    def _finish(self, base: int, k: int, end: float, ready: list[int]) -> None:
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
