"""The facts of all ranks of a run -> what is wrong with its nodes, in words.  Pure.

`compare` gathers the facts.  An error is a difference that would make the run wrong, and names the
node and the remedy.  A warning is a difference that is merely odd.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from vp_train.config import printable
from vp_train.units import count_words, plural

CLOCK_SECONDS = 5.0  # clocks that differ by less are equal
SLOW = 3.0  # an all-reduce that takes so many times as long as planned is slow
_MOST_NAMES = 3  # nodes, or settings, that one line names
_UNKNOWN = "none"
_COUNTS = ("cluster.num_nodes", "cluster.gpus_per_node")  # of the launch, not of a GPU


@dataclass(frozen=True, slots=True)
class Gpu:
    """The GPU of a rank.  `count` is the number of GPUs that the rank sees on its node."""

    name: str
    num_bytes: int
    count: int
    uuid: str


@dataclass(frozen=True, slots=True)
class RankFacts:
    """What one rank knows about its node and its run.

    host, boot: the host's name, and the id of its kernel's start; together they are the node.
    local_rank: the rank among those that one launcher started.
    clock: the offset of the node's clock from that of rank 0 in seconds, lowest and highest
        possible value.
    directory: the absolute path of the run's directory.
    unshared: why that is not the directory in which rank 0 has written; "" if it is.
    code, schedule, settings: digests of the package's sources, of the schedule, and of the
        resolved settings.
    texts: the content hash of each corpus.
    versions: the version of each package that takes part in the computation, and of Python.
    gpu: None on a CPU.
    environment: the variables that NCCL and gloo read.
    compiled: what the rank compiles, in words.
    """

    rank: int
    local_rank: int
    host: str
    boot: str
    clock: tuple[float, float]
    directory: str
    unshared: str
    code: str
    schedule: str
    settings: str
    texts: tuple[str, ...]
    versions: Mapping[str, str]
    gpu: Gpu | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    compiled: tuple[str, ...] = ()

    @property
    def node(self) -> tuple[str, str]:
        """Return what ranks of one node have in common."""
        return self.host, self.boot


@dataclass(frozen=True, slots=True)
class Findings:
    """What is wrong (`errors`) and what is odd (`warnings`), one line each."""

    errors: tuple[str, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Difference:
    """Ranks whose value is not that of most ranks.

    `value` is that of the first such rank, `usual` that of most ranks, and `where` a node with it.
    """

    ranks: tuple[RankFacts, ...]
    value: str
    usual: str
    where: str

    @property
    def nodes(self) -> str:
        return nodes_in_words(self.ranks)


def compare(
    ranks: Sequence[RankFacts],
    settings: Sequence[Mapping[str, str]] = (),
    *,
    one_gpu_per_rank: bool = False,
) -> Findings:
    """Return what differs between the nodes of a run.

    `ranks` are the facts in rank order.  `settings` are the settings of all ranks by name, in rank
    order, or empty if their digests are equal.  With `one_gpu_per_rank` no two ranks may have the
    same GPU.
    """
    changed = _settings(ranks, settings)
    errors = [*_directory(ranks), *changed]
    errors += _differ(
        ranks,
        lambda facts: facts.code,
        "the code of vp_train ({value}) is not that of {where} ({usual}); install the same commit "
        "on all nodes",
    )
    errors += _versions(ranks)
    if not changed:  # other settings have another schedule and other text, and compile otherwise
        errors += _differ(  # their copies of a weight would drift apart by roundings
            ranks,
            lambda facts: " and ".join(facts.compiled) or "nothing",
            "can compile {value}, and {where} {usual}; install a C++ compiler, Python's headers "
            "and, for GPUs, triton on all nodes, or set run.compile=off",
        )
        errors += _differ(
            ranks,
            lambda facts: ", ".join(facts.texts),
            "the text of data ({value}) is not that of {where} ({usual}); give all nodes the same "
            "files, best on a shared file system",
        )
        errors += _differ(
            ranks,
            lambda facts: facts.schedule,
            "plans another schedule ({value}) than {where} ({usual}); give all nodes the same "
            "schedule.file, or write one with vp-simulate --out DIR",
        )
    if one_gpu_per_rank:
        errors += _same_gpu(ranks)
    warnings = [*_clocks(ranks), *_python(ranks), *_gpus(ranks), *_launchers(ranks)]
    warnings += _environment(ranks)
    return Findings(tuple(map(printable, errors)), tuple(map(printable, warnings)))


def node_lines(ranks: Sequence[RankFacts]) -> list[str]:
    """Return one line per node: its name, ranks, GPUs, versions and clock."""
    lines = []
    for node in dict.fromkeys(facts.node for facts in ranks):
        own = [facts for facts in ranks if facts.node == node]
        first = own[0]
        parts = [f"{first.host}, {_numbers([facts.rank for facts in own])}"]
        if first.gpu is not None:
            # A rank that is bound to a GPU sees no other.
            bound = {facts.gpu.uuid for facts in own if facts.gpu is not None}
            count = max(first.gpu.count, len(bound))
            parts.append(f"{count} x {first.gpu.name} ({_gib(first.gpu)})")
        parts.append(" ".join(f"{name} {first.versions[name]}" for name in _shown(first.versions)))
        offset = sum(first.clock) / 2
        exact = (first.clock[1] - first.clock[0]) / 2
        parts.append(f"clock {offset:+.3f} s (within {exact:.3f} s)")
        lines.append(printable(": ".join((parts[0], ", ".join(parts[1:])))))
    return lines


def network_words(
    num_bytes: int, seconds: float, num_ranks: int, expected_seconds: float
) -> tuple[str, str]:
    """Return a line about a timed all-reduce, and a warning or "".

    `expected_seconds` is what the plan assumes for this all-reduce.
    """
    rate = 2 * (num_ranks - 1) / num_ranks * num_bytes / seconds
    ranks = count_words(num_ranks, "rank")
    line = (
        f"all-reduce of {num_bytes / 2**20:.0f} MiB over {ranks}: {seconds * 1e3:.1f} ms, "
        f"{rate / 1e9:.2f} GB/s per rank"
    )
    if seconds <= SLOW * expected_seconds:
        return line, ""
    warning = (
        f"the all-reduce takes {seconds * 1e3:.1f} ms, the cluster's settings expect "
        f"{expected_seconds * 1e3:.1f} ms; choose the fast network with NCCL_SOCKET_IFNAME, "
        "NCCL_IB_HCA and GLOO_SOCKET_IFNAME, or correct cluster.network_bytes_per_second"
    )
    return line, warning


def wrong_sums(sums: Sequence[float], ranks: Sequence[RankFacts]) -> str:
    """Return an error if an all-reduce of ones did not give the number of ranks, else ""."""
    wrong = [facts for facts, total in zip(ranks, sums, strict=True) if total != len(ranks)]
    if not wrong:
        return ""
    return printable(
        f"{nodes_in_words(wrong)}: an all-reduce of ones gave {sums[wrong[0].rank]:g} instead of "
        f"{len(ranks)}; check the node's GPUs and network, and leave it out until then"
    )


def clock_range(own: tuple[float, float], of_rank_0: tuple[float, float]) -> tuple[float, float]:
    """Return the lowest and highest possible offset of a clock from that of rank 0, in seconds.

    The arguments are the times at which each rank entered and left one barrier, by its own clock.
    There is a moment at which all ranks were inside.
    """
    return own[0] - of_rank_0[1], own[1] - of_rank_0[0]


def nodes_in_words(ranks: Sequence[RankFacts]) -> str:
    """Return the nodes of `ranks` by name; nodes of one name are told apart by their ranks."""
    nodes = list(dict.fromkeys(facts.node for facts in ranks))
    hosts = [host for host, _ in nodes]
    names = [
        host
        if hosts.count(host) == 1
        else f"{host} ({_numbers([facts.rank for facts in ranks if facts.node == (host, boot)])})"
        for host, boot in nodes
    ]
    return f"{plural(len(names), 'node')} {_some(names)}"


def _differ(
    ranks: Sequence[RankFacts], value_of: Callable[[RankFacts], str], words: str, **names: str
) -> list[str]:
    """Return an error about ranks whose value is not that of most ranks, [] if all are equal.

    `words` are a template of value, usual, where and `names`.
    """
    if (found := _difference(ranks, value_of)) is None:
        return []
    return [
        f"{found.nodes}: "
        + words.format(value=found.value, usual=found.usual, where=f"node {found.where}", **names)
    ]


def _difference(
    ranks: Sequence[RankFacts], value_of: Callable[[RankFacts], str]
) -> _Difference | None:
    """Return the ranks whose value is not the most frequent one; at a draw rank 0 is right."""
    values = [value_of(facts) or _UNKNOWN for facts in ranks]
    counts = Counter(values)
    usual = max(counts, key=lambda value: (counts[value], value == values[0]))
    if len(counts) == 1:
        return None
    others = [facts for facts, value in zip(ranks, values, strict=True) if value != usual]
    value = next(value for value in values if value != usual)
    return _Difference(tuple(others), value, usual, ranks[values.index(usual)].host)


def _directory(ranks: Sequence[RankFacts]) -> list[str]:
    unshared = [facts for facts in ranks if facts.unshared]
    if not unshared:
        return []
    first = unshared[0]
    return [
        f"{nodes_in_words(unshared)}: {first.directory} is not the run's directory of node "
        f"{ranks[0].host}, or not usable: {first.unshared}; set run.root to a directory on a file "
        "system that all nodes share and may write to"
    ]


def _settings(ranks: Sequence[RankFacts], settings: Sequence[Mapping[str, str]]) -> list[str]:
    found = _difference(ranks, lambda facts: facts.settings)
    if found is None or not settings:
        return []
    usual = settings[next(facts.rank for facts in ranks if facts.settings == found.usual)]
    own = settings[found.ranks[0].rank]
    names = [name for name in {**usual, **own} if usual.get(name) != own.get(name)]
    words = [f"{name}={own.get(name)} instead of {usual.get(name)}" for name in names]
    remedy = "give the command of all nodes the same overrides"
    if all(name.startswith("cluster.") and name not in _COUNTS for name in names):
        remedy = (
            "type the same cluster=NAME on all nodes, because each otherwise takes the preset of "
            "its own GPU"
        )
    return [f"{found.nodes}: {_some(words)} on node {found.where}; {remedy}"]


def _versions(ranks: Sequence[RankFacts]) -> list[str]:
    errors = []
    for name in {name: None for facts in ranks for name in facts.versions}:

        def version(facts: RankFacts, name: str = name) -> str:
            value = facts.versions.get(name, "")
            return ".".join(value.split(".")[:2]) if name == "Python" else value

        errors += _differ(
            ranks,
            version,
            "{name} {value} instead of {usual} on {where}; install the same version on all nodes",
            name=name,
        )
    return errors


def _python(ranks: Sequence[RankFacts]) -> list[str]:
    """Return a warning about Pythons that differ in their last number only."""
    if _versions([facts for facts in ranks if "Python" in facts.versions]):
        return []
    return _differ(
        ranks,
        lambda facts: facts.versions.get("Python", ""),
        "Python {value}, but {usual} on {where}",
    )


def _environment(ranks: Sequence[RankFacts]) -> list[str]:
    """Return warnings about variables of NCCL and gloo; nodes may name interfaces differently."""
    warnings = []
    for name in sorted({name for facts in ranks for name in facts.environment}):

        def value(facts: RankFacts, name: str = name) -> str:
            return facts.environment.get(name, "not set") or "empty"

        warnings += _differ(
            ranks,
            value,
            "{name} is {value}, but {usual} on {where}; that is right only if the nodes have other "
            "interfaces, else set it alike",
            name=name,
        )
    return warnings


def _same_gpu(ranks: Sequence[RankFacts]) -> list[str]:
    owners: dict[str, RankFacts] = {}
    for facts in ranks:
        if facts.gpu is None or not facts.gpu.uuid:
            continue
        other = owners.setdefault(facts.gpu.uuid, facts)
        if other is not facts:
            return [
                f"node {facts.host}: ranks {other.rank} and {facts.rank} have the same GPU, and "
                "NCCL needs one GPU per rank; start one launcher per node, with one rank per GPU, "
                "or let ranks share GPUs with run.comm_backend=gloo"
            ]
    return []


def _clocks(ranks: Sequence[RankFacts]) -> list[str]:
    """Return a warning about clocks that differ by more than the round trip explains."""
    wrong = [
        facts
        for facts in ranks
        if facts.clock[0] > CLOCK_SECONDS or facts.clock[1] < -CLOCK_SECONDS
    ]
    if not wrong:
        return []
    offset = sum(wrong[0].clock) / 2
    return [
        f"{nodes_in_words(wrong)}: the clock is {abs(offset):.1f} s "
        f"{'ahead of' if offset > 0 else 'behind'} that of node {ranks[0].host}; synchronise the "
        "clocks (chrony), or times in logs will mislead"
    ]


def _gpus(ranks: Sequence[RankFacts]) -> list[str]:
    return _differ(
        ranks,
        lambda facts: "" if facts.gpu is None else f"{facts.gpu.name} ({_gib(facts.gpu)})",
        "{value} instead of {usual} on {where}; the slowest GPU sets the pace",
    ) or _differ(
        ranks,
        lambda facts: "" if facts.gpu is None else f"{facts.gpu.count}",
        "{value} GPUs instead of {usual} on {where}",
    )


def _launchers(ranks: Sequence[RankFacts]) -> list[str]:
    """Return a warning about nodes on which more than one launcher has started ranks."""
    firsts = [facts for facts in ranks if facts.local_rank == 0]
    counts = Counter(facts.node for facts in firsts)
    crowded = [facts for facts in firsts if counts[facts.node] > 1]
    if not crowded:
        return []
    number = counts[crowded[0].node]
    return [f"{nodes_in_words(crowded)}: {number} launchers run here; one per node is usual"]


def _shown(versions: Mapping[str, str]) -> list[str]:
    return [name for name in ("Python", "torch", "NCCL") if name in versions]


def _gib(gpu: Gpu) -> str:
    return f"{gpu.num_bytes / 2**30:.1f} GiB"


def _some(names: Sequence[str]) -> str:
    """Return the first names in words, and how many more there are."""
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def _numbers(ranks: Sequence[int]) -> str:
    """Return ranks in words: [4, 5, 6, 9] -> "ranks 4-6, 9"."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    words = ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs)
    return f"{plural(len(ranks), 'rank')} {words}"
