"""Steps that do not go as planned: every pass takes a little longer or shorter, or a rank is slow.

A run keeps the planned order of the passes of every rank and of the collectives of every
communicator, whatever they take. So a disturbed step is the longest path through the graph of the
simulated one, with other durations.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from schedules.cost import CostModel
from schedules.ir import Schedule
from schedules.network import Network
from schedules.problem import Problem
from schedules.simulate import Sweep, sweep
from schedules.transfers import HostLinks

_BATCH = 1 << 23  # durations that are held at a time


@dataclass(frozen=True, slots=True)
class Disturbance:
    """What differs from the plan in every sample of a step.

    `jitter`: the duration of every pass and collective is multiplied by a factor of its own, drawn
    from a log-normal distribution with mean 1 and this standard deviation. `straggler`: the
    passes of one rank take longer by this fraction; in sample i that is rank i modulo p. Raises
    ValueError below 0.
    """

    jitter: float = 0.0
    straggler: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("jitter", self.jitter), ("straggler", self.straggler)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}={value} is not a finite number of at least 0")


@dataclass(frozen=True, slots=True)
class Steps:
    """The seconds of a planned step and of its disturbed samples, in the order of the samples."""

    planned: float
    seconds: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean of the samples in seconds."""
        return statistics.mean(self.seconds)  # of equal samples it is exactly one of them

    @property
    def longer(self) -> float:
        """The fraction by which the mean sample is longer than planned; 0 for a step of 0 s."""
        return self.mean / self.planned - 1 if self.planned > 0 else 0.0

    def quantile(self, fraction: float) -> float:
        """Return the seconds that the given fraction of the samples does not exceed."""
        return float(np.quantile(self.seconds, fraction))


def disturbed_steps(
    schedule: Schedule,
    problem: Problem,
    cost: CostModel,
    disturbance: Disturbance,
    samples: int,
    seed: int = 0,
) -> Steps:
    """Return `samples` disturbed steps of `schedule`, drawn from `seed`.

    Without a disturbance each takes exactly the simulated time. Raises ValueError for fewer than
    one sample, and like `simulate`.
    """
    if samples < 1:
        raise ValueError(f"{samples} samples; at least 1 is needed")
    network = Network.of(problem, cost)
    links = HostLinks.of(schedule, problem, cost, network)
    swept = sweep(network, network.orders(schedule), links)
    chains = list(_chains(network, swept))
    random = np.random.default_rng(seed)
    seconds: list[float] = []
    while len(seconds) < samples:
        wanted = min(samples - len(seconds), max(1, _BATCH // len(swept.order)))
        factors = _factors(network, disturbance, wanted, len(seconds), random)
        seconds += _longest_paths(network, chains, factors, links)
    return Steps(swept.makespan, tuple(seconds))


def _chains(network: Network, swept: Sweep) -> Iterator[tuple[int, int]]:
    """Yield every node in the order of the sweep, and the one before it on its lane, else -1."""
    last = [-1] * network.num_lanes
    for number in swept.order:
        lane = network.lanes[number % network.size]
        yield number, last[lane]
        last[lane] = number


def _factors(
    network: Network,
    disturbance: Disturbance,
    samples: int,
    first: int,
    random: np.random.Generator,
) -> np.ndarray:
    """Return the factors on the durations of all nodes, [samples, nodes of a step].

    `first` is the number of the first of these samples.
    """
    size, count = network.size, network.num_microbatches
    variance = math.log1p(disturbance.jitter**2)  # of the logarithm
    factors = np.exp(
        random.standard_normal((samples, count, size)) * math.sqrt(variance) - variance / 2
    )
    if disturbance.straggler:
        lanes = np.array(network.lanes)
        for sample in range(samples):
            slow = lanes == (first + sample) % network.num_ranks
            factors[sample, :, slow] *= 1 + disturbance.straggler
    return factors.reshape(samples, count * size)


def _longest_paths(
    network: Network,
    chains: list[tuple[int, int]],
    factors: np.ndarray,
    links: HostLinks | None = None,
) -> list[float]:
    """Return the makespan of every sample in seconds. Transfers on `links` take their time."""
    size = network.size
    # One row per node, so that a node is computed for all samples at once.
    ends = np.ascontiguousarray(factors.T)
    ends *= np.tile(network.seconds, network.num_microbatches)[:, None]
    start = np.empty(len(factors))
    issues = {} if links is None else links.issues
    free: dict[tuple[int, str], np.ndarray] = {}  # from when on, for every direction of a link
    copied: dict[int, np.ndarray] = {}  # by the node that waits for it
    for number, before in chains:
        k = number % size
        base = number - k
        if before >= 0:
            start[:] = ends[before]
        else:
            start[:] = 0.0
        for earlier, travel in network.inputs[k]:
            arrival = ends[base + earlier]
            np.maximum(start, arrival + travel if travel else arrival, out=start)
        if number in copied:
            np.maximum(start, copied.pop(number), out=start)
        ends[number] += start
        for _, kind, seconds, awaited in issues.get(number, ()):
            link = network.lanes[k], kind
            begin = np.maximum(ends[number], free[link]) if link in free else ends[number]
            free[link] = begin + seconds
            copied[awaited] = np.maximum(free[link], copied.get(awaited, 0.0))
    return [float(value) for value in ends.max(axis=0)]
