"""What a search looks at, in which order and for how long, in worlds whose answer is known.

A world stands in for `Scales`, and for the simulation and the planning of steps.  It knows of every
choice what each of them would say, and notes what is asked.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest

from schedules.layout import Layout
from schedules.problem import Problem
from schedules.vocab import VOCAB_ALGORITHMS
from vp_train.config import ConfigError
from vp_train.planning import search as search_module
from vp_train.planning.choice import Choice, Kept, Space, offloading
from vp_train.planning.degrees import Degrees
from vp_train.planning.search import Limits, _Search, fits_on, search
from vp_train.planning.weigh import LEANEST, SIMULATED, Candidate, SameChoiceError, TooLargeError
from vp_train.planning.weigh import Weight as Weighed
from vp_train.settings import load_config

GIB = 2**30
CONFIG = load_config(["model=nano", "cluster.memory_gib=1"])
GPU = replace(CONFIG, run=replace(CONFIG.run, device="cuda"))
ADAMW = CONFIG.optim
ZERO1 = replace(ADAMW, name="zero1")
OFFLOAD = replace(ZERO1, offload=True)
ROOMY = 0.5 * GIB


@dataclass(slots=True)
class Facts:
    """What a search finds out about a choice, from its weight to its whole step.

    bound, least: its seconds and bytes when it is weighed.
    drafted, passes: the seconds of its step and of its passes at least, once it is drafted.
    short, short_bytes: the seconds of the passes of a short step, and the bytes of a rank.
    seconds, memory: those of the whole step.
    placed, whole: the effort of a short step and of a whole one.
    fails: the errors of weighing and of drafting it.
    """

    bound: float
    seconds: float
    least: float = ROOMY
    drafted: float | None = None
    passes: float | None = None
    short: float | None = None
    short_bytes: dict[str, float] = field(default_factory=dict)
    memory: float = ROOMY
    placed: int = 100
    whole: int = 1000
    stages: int = 2
    seems_to_fit: bool = True
    optimizers: tuple = (ADAMW,)
    after: dict[str, float] = field(default_factory=dict)
    host: float = 0.0
    host_excess: float = 0.0
    leanest: float = 0.0
    fails: dict[str, Exception] = field(default_factory=dict)

    def __post_init__(self):
        self.drafted = self.bound if self.drafted is None else self.drafted
        self.passes = self.drafted if self.passes is None else self.passes
        self.short = self.seconds if self.short is None else self.short

    @property
    def estimate(self):
        """The seconds of the fastest optimizer that fits, infinite if none does."""
        return min(
            (
                max(self.short, self.passes) + self.after.get(name_of(optim), 0.0)
                for optim in self.optimizers
                if self.short_bytes.get(name_of(optim), ROOMY) <= GIB
            ),
            default=float("inf"),
        )


def name_of(optim):
    return "offload" if optim.offload else optim.name


def choice_of(number, *, splits=True, alike=None, recompute="none", **settings):
    """Return a choice that differs from all others by its micro-batch size."""
    count = number + 1 if alike is None else 100_000 + alike
    vocab = "one_barrier" if splits else "none"
    return Choice(Degrees(1, 2, 1), number + 1, count, "1f1b", vocab, recompute, **settings)


class World:
    """Facts of every choice, and a log of (what was asked, number of the choice)."""

    def __init__(self, facts, choices=None, limit=GIB):
        self.choices = choices or [choice_of(number) for number in range(len(facts))]
        self.facts, self.limit, self.log = dict(zip(self.choices, facts, strict=True)), limit, []
        self.numbers = {choice: number for number, choice in enumerate(self.choices)}

    def note(self, what, choice):
        self.log.append((what, self.numbers[choice]))
        return self.facts[choice]

    def asked(self, *what):
        """Return the numbers of the choices of which this was asked, in order."""
        return [number for name, number in self.log if name in what]

    def check(self, choices):
        self.log.append(("check", len(choices)))

    def weigh(self, choice):
        facts = self.note("weigh", choice)
        if "weigh" in facts.fails:
            raise facts.fails["weigh"]
        return Weighed(facts.bound, facts.least)

    def draft(self, choice):
        facts = self.note("draft", choice)
        if "draft" in facts.fails:
            raise facts.fails["draft"]
        problem = SimpleNamespace(layout=SimpleNamespace(num_stages=facts.stages), facts=facts)
        draft = SimpleNamespace(choice=choice, problem=problem, with_named=lambda name: choice)
        return Candidate(
            choice, draft, facts.passes, facts.drafted, facts.optimizers, facts.seems_to_fit
        )

    def needs(self, step, optim):
        return self.facts[step.choice].short_bytes.get(name_of(optim), ROOMY), 1

    def after(self, step, optim):
        return self.facts[step.choice].after.get(name_of(optim), 0.0)

    def leanest(self, choice):
        return self.facts[choice].leanest

    def cost_of(self, choice):
        return ("cost", choice)

    def short_step(self, draft, name):
        facts = self.note("short", draft.choice)
        offload_bytes = (1.0,) if draft.choice.offload else ()
        step = SimpleNamespace(
            choice=draft.choice, cost=SimpleNamespace(offload_bytes=offload_bytes)
        )
        return step, facts.short, facts.placed

    def report_of(self, choice, cluster, optim, *, cost):
        facts = self.note("plan", choice)
        assert cost == ("cost", choice)
        rank = SimpleNamespace(memory=SimpleNamespace(total=facts.memory))
        return SimpleNamespace(
            step_seconds=facts.seconds,
            ranks=(SimpleNamespace(memory=SimpleNamespace(total=0.0)), rank),
            worst=1,
            excess=facts.memory - cluster.memory_gib * GIB,
            host_excess=facts.host_excess,
        )

    def host_bytes(self, step, optim, per_node):
        assert per_node == 4
        return SimpleNamespace(total=self.facts[step.choice].host)

    def spent(self):
        """Return the effort that all that was asked takes."""
        return sum(self.effort_of(what, number) for what, number in self.log)

    def effort_of(self, what, number):
        """Return the effort of weighing, drafting, estimating or planning a choice."""
        if what == "check":
            return 0
        one = self.facts[self.choices[number]]
        drafting = 0 if "draft" in one.fails else 12 * one.stages
        return {"weigh": 4, "draft": drafting, "short": one.placed, "plan": one.whole}[what]


@pytest.fixture
def enter(monkeypatch):
    """Return the function that lets searches take place in a world."""

    def entered(world):
        made = []

        def scales(config, limit, optimizers):
            made.append((limit, optimizers))
            world.limit = limit
            return world

        monkeypatch.setattr(search_module, "Scales", scales)
        monkeypatch.setattr(search_module, "short_step", world.short_step)
        monkeypatch.setattr(search_module, "report_of", world.report_of)
        monkeypatch.setattr(search_module, "most_host_bytes", world.host_bytes)
        monkeypatch.setattr(search_module, "placed_by_short", lambda problem: problem.facts.placed)
        monkeypatch.setattr(search_module, "placed_by", lambda problem: problem.facts.whole)
        return made

    return entered


def run(world, *, top=1, effort=10**9, margin=0.0, config=CONFIG, in_time=lambda: True, said=None):
    """Search all choices of a world that were there when it was made."""
    said = [] if said is None else said
    space = Space(tuple(world.choices), Counter(), (ADAMW,))
    return search(config, Limits(top, margin, effort), in_time, said.append, space)


def numbers(world, found):
    return [world.choices.index(replace(plan.choice, optimizer=None)) for plan in found]


def number_of(world, estimate):
    return None if estimate is None else world.choices.index(estimate.candidate.choice)


def random_world(seed, size=40, *, kinds=(True, False)):
    """Return a world in which bounds are bounds, and what is alike exceeds them alike.

    A few choices are refused at every stage, the last ones when they are planned.
    """
    draw = random.Random(seed)
    above = [draw.uniform(1.0, 1.6) for _ in range(4)]
    facts, choices = [], []
    for number in range(size):
        alike = draw.randrange(4)
        bound = draw.uniform(1.0, 4.0)
        drafted = bound * draw.uniform(1.0, 1.1)
        short = drafted * above[alike] * draw.uniform(1.005, 1.03)
        one = Facts(bound, short * draw.uniform(0.991, 1.1), drafted=drafted, short=short)
        one.least = draw.uniform(0.1, 0.9) * GIB
        one.placed, one.whole = draw.randint(50, 150), draw.randint(500, 1500)
        one.stages = draw.randint(1, 4)
        one.seems_to_fit = draw.random() < 0.8
        match draw.randrange(10):
            case 0:
                one.fails["weigh"] = TooLargeError(2.0 * GIB + number, GIB, LEANEST)
            case 1:
                one.fails["draft"] = TooLargeError(1.5 * GIB + number, GIB, LEANEST, 0)
            case 2:
                one.short_bytes["adamw"] = GIB + draw.randint(1, 99)
            case 3:
                one.memory = GIB + draw.randint(1, 99)
            case 4:
                one.fails["draft" if number % 2 else "weigh"] = SameChoiceError("the same")
            case 5:
                one.memory = one.short_bytes["adamw"] = float(GIB)  # to the byte
        facts.append(one)
        splits = draw.choice(kinds)
        choices.append(choice_of(number, splits=splits, alike=alike + 4 * splits))
    return World(facts, choices)


def fits(facts):
    return not facts.fails and facts.estimate < float("inf") and facts.memory <= GIB


@pytest.mark.parametrize("top", [1, 3])
def test_a_search_without_end_finds_the_fastest_plans_and_leaves_nothing_open(enter, top):
    for seed in range(25):
        world, said = random_world(seed), []
        enter(world)
        searching = _Search(
            CONFIG,
            Limits(top, 0.0, 10**9),
            lambda: True,
            said.append,
            Space(tuple(world.choices), Counter({"a split": 7, "none": 0})),
        )
        found = searching.run()
        every = list(world.facts.values())
        fitting = sorted(one.seconds for one in every if fits(one))
        assert [plan.report.step_seconds for plan in found.best] == fitting[:top]
        assert found.num_open == 0
        assert found.ended == ""
        same = sum(
            isinstance(error, SameChoiceError)
            and (name == "weigh" or number in world.asked("draft"))
            for number, one in enumerate(every)
            for name, error in one.fails.items()
        )
        assert found.num_choices == len(world.choices) + 7 - same
        assert found.num_estimated == len(world.asked("short"))
        assert len(set(world.asked("short"))) == found.num_estimated, "each once"
        planned = world.asked("plan")
        assert len(set(planned)) == len(planned)
        assert found.num_planned == sum(every[number].memory <= GIB for number in planned)
        assert len(world.asked("draft")) == len(set(world.asked("draft")))
        assert searching._spent == world.spent()
        assert found.num_estimated < len(every)
        refused = {
            **{n: "weigh" for n in world.asked("weigh") if "weigh" in every[n].fails},
            **{n: "draft" for n in world.asked("draft") if "draft" in every[n].fails},
            **{n: "short" for n in world.asked("short") if every[n].estimate == float("inf")},
            **{n: "plan" for n in planned if every[n].memory > GIB},
        }
        counts = Counter({"a split": 7})
        expected = []
        for number, stage in refused.items():
            error = every[number].fails.get(stage)
            if isinstance(error, SameChoiceError):
                continue
            what = SIMULATED if error is None else LEANEST
            counts[f"memory, for {what}"] += 1
            bounds = {"weigh": 0.0, "draft": every[number].bound, "short": every[number].drafted}
            expected.append((bounds.get(stage, every[number].estimate), number))
        assert found.excluded == counts
        assert "none" not in found.excluded
        got = [(one.bound, world.choices.index(one.choice)) for one in found.refused]
        assert sorted(got) == sorted(expected)
        assert [bound for bound, _ in got] == sorted(bound for bound, _ in expected)
        shown = [*found.estimated, found.with_vocabulary, found.without_vocabulary]
        assert not {number_of(world, one) for one in shown} & set(refused), "shown nowhere"
        counts = [
            tuple(map(int, re.findall(r"(\d+) (?:simulated|planned)", words))) for words in said
        ]
        assert counts[0] == ()
        simulated = [count for count, *_ in counts[1:]]
        assert set(simulated) - {0} == set(range(1, found.num_estimated + 1)), "told at once"
        plans = [count for _, count in (pair for pair in counts if len(pair) > 1)]
        assert set(plans) == set(range(1, found.num_planned + 1))
        assert counts == sorted(counts)
        for splits, first in ((True, found.with_vocabulary), (False, found.without_vocabulary)):
            best = min(
                one.seconds if number in planned else one.estimate
                for number, one in enumerate(every)
                if fits(one) and world.choices[number].splits_vocabulary is splits
            )
            assert float(f"{first.seconds:.3g}") == float(f"{best:.3g}")
            assert first.is_planned == (number_of(world, first) in planned)
            assert first.memory == (
                every[number_of(world, first)].memory if first.is_planned else ROOMY
            ) or (first.memory == GIB)


def test_effort_ends_a_search_at_three_fifths_of_it_and_plans_take_the_rest(enter):
    """Law of every event: what is begun was still allowed, and what ends was no longer."""
    ended = Counter()
    for seed in range(30):
        world = random_world(seed, kinds=(True,))
        enter(world)
        effort = random.Random(seed).randint(300, 12_000)
        found = run(world, top=2, effort=effort)
        every = list(world.facts.values())
        spent, estimated, num_fit, num_planned = 0, 0, 0, 0
        drafted = set()
        for what, number in world.log:
            one = every[number] if what != "check" else None
            if what == "draft" or (what == "short" and number not in drafted):
                part = 0.6 if num_fit else 1.0
                assert not estimated or spent < part * effort, (seed, what)
            if what == "draft":
                drafted.add(number)
            if what == "short":
                estimated += 1
                num_fit += one.estimate < float("inf")
            if what == "plan":
                assert not num_planned or spent + one.whole <= effort
                fits_whole = one.memory <= GIB
                num_planned += fits_whole
                num_fit -= not fits_whole
            spent += world.effort_of(what, number)
        assert bool(found.num_open) == (found.ended == "effort")
        ended[found.ended] += 1
        if found.ended:
            next_plan = max(one.whole for one in every)
            assert spent >= 0.6 * effort or spent + next_plan > effort
    assert min(ended.values()) >= 3
    assert len(ended) == 2


def any_world(seed):
    """Return a random world with all that a search may meet, its search, and the base choices.

    Choices offload in place of others.  Optimizers and hosts differ, and the clock may run out.
    """
    draw = random.Random(f"any {seed}")
    world = random_world(
        seed, draw.choice([6, 40, 40, 160]), kinds=draw.choice([(True,), (True, False)])
    )
    base = [
        replace(choice, recompute=draw.choice(["none", "selective", "full"]))
        for choice in world.choices
    ]
    facts, choices = list(world.facts.values()), list(base)
    for choice in base:
        for other in offloading(choice, 4):
            bound = draw.uniform(1.0, 4.0)
            short = bound * draw.uniform(1.0, 1.3)
            facts.append(Facts(bound, short * draw.uniform(0.98, 1.1), short=short))
            facts[-1].least = draw.choice([ROOMY, 0.75 * GIB, 1.0 * GIB, GIB + 1.0])
            choices.append(other)
            if draw.random() < 0.3:
                facts[-1].fails["weigh"] = TooLargeError(1.2 * GIB, GIB, LEANEST)
    for one in facts:
        one.optimizers = tuple(draw.sample([ADAMW, ZERO1, OFFLOAD], draw.randint(1, 3)))
        one.after = {name: draw.choice([0.0, 0.25, 0.5]) for name in ("adamw", "zero1", "offload")}
        one.host, one.host_excess = draw.choice([(0.0, 0.0)] * 5 + [(3.0 * GIB, 0.0), (0.0, 1.0)])
        one.leanest = draw.uniform(0.0, 3.0) * GIB
        one.short_bytes["zero1"] = draw.uniform(0.5, 1.1) * GIB
        one.memory = draw.choice([one.memory, 0.7 * GIB, 0.75 * GIB])
        one.placed = draw.choice([one.placed, 1_000])
        if draw.random() < 0.3:  # many take about as long
            one.seconds = one.short = 4.0 + draw.choice([0.0, 0.0004, 0.002])
    if draw.random() < 0.3:
        for choice, one in zip(base, facts, strict=False):
            one.seems_to_fit = one.seems_to_fit and choice.splits_vocabulary
    if (known := draw.choice([None, 2.0])) is None:
        for one in facts:
            one.host_excess = 0.0
    hosts = replace(CONFIG.cluster, host_memory_gib=known)
    config = replace(draw.choice([CONFIG, GPU]), cluster=hosts)
    limits = Limits(
        draw.choice([1, 2, 3, 8]),
        draw.choice([0.0, 0.25]),
        draw.choice([10**9, draw.randint(300, 40_000)]),
    )
    left = draw.choice([10**6, draw.randint(0, 150)])
    clock = iter([True] * left + [False] * 10**4)
    return World(facts, choices), config, limits, clock.__next__, base


def test_every_machine_finds_the_same_plans_in_the_same_order(enter):
    """Look at what a change of the search gives for whole clusters, then write the digest here."""
    texts = []
    for seed in range(60):
        world, config, limits, in_time, base = any_world(seed)
        enter(world)
        said, space = [], Space(tuple(base), Counter(seven=7), None)
        searching = _Search(config, limits, in_time, said.append, space)
        found = searching.run(plans=seed % 10 != 0)
        shown = [found.with_vocabulary, found.without_vocabulary, *found.estimated]
        texts += [
            *map(str, world.log),
            *(f"{one.choice} {one.report.step_seconds}" for one in found.best),
            *(one and f"{one.choice} {one.seconds} {one.memory} {one.is_planned}" for one in shown),
            *(f"{one.choice} {one.reason} {one.bound} {one.needs}" for one in found.refused),
            f"{found.leanest} {sorted(found.excluded.items())} {found.num_choices} {found.ended}",
            f"{found.num_estimated} {found.num_planned} {found.num_open}",
            f"{sorted(found.num_unseen.items())}",
            *said,
        ]
    assert hashlib.sha256("\n".join(map(str, texts)).encode()).hexdigest()[:8] == "a0cabf6e"


def test_offloading_takes_the_place_of_recomputation_and_makes_no_plan_slower(enter):
    """A dozen choices are tried at most, on GPUs only, and none that is kept out."""
    faster = 0
    for seed in range(24):
        plans, counts = {}, set()
        for name, device in (("cpu", CONFIG), ("kept", GPU), ("cuda", GPU)):
            world, config, _, _, base = any_world(seed)
            enter(world)
            config = replace(device, cluster=config.cluster)
            kept = Kept({"parallel.offload_activations": 0.0} if name == "kept" else {})
            space = Space(tuple(base), Counter(), None, kept)
            found = search(config, Limits(2, 0.0, 10**9), lambda: True, len, space)
            offload = [number for number in world.asked("draft") if number >= len(base)]
            assert len(offload) <= 12
            plans[name] = [(one.report.step_seconds, one.choice) for one in found.best]
            counts.add(found.num_choices - len(offload))
        assert plans["cpu"] == plans["kept"]
        assert len(counts) == 1, "what is tried counts as a choice"
        seconds, without = ([second for second, _ in plans[name]] for name in ("cuda", "cpu"))
        assert len(seconds) >= len(without)
        assert all(a <= b for a, b in zip(seconds, without, strict=False))
        if plans["cpu"] and plans["cpu"][0][1].recompute == "none":
            assert plans["cuda"] == plans["cpu"], "memory does not bind"
        faster += bool(without) and seconds < without
        for second, choice in plans["cuda"]:
            facts = world.facts[replace(choice, optimizer=None)]
            assert (facts.seconds, facts.host_excess) == (second, 0.0)
            assert facts.memory <= GIB
            assert facts.short_bytes.get(name_of(choice.optimizer), ROOMY) <= GIB
    assert faster >= 3


def test_a_kind_that_differs_in_any_way_is_not_alike():
    one = choice_of(0)
    others = [
        replace(one, schedule="gpipe"),
        replace(one, num_chunks=2),
        replace(one, vocab="none"),
        replace(one, degrees=Degrees(1, 4, 1)),
        replace(one, num_microbatches=5),
    ]
    kinds = {search_module._alike(choice) for choice in (one, *others)}
    assert len(kinds) == 6
    same = replace(one, micro_batch_size=9, recompute="full", degrees=Degrees(3, 2, 5))
    assert search_module._alike(same) == search_module._alike(one)


def test_where_nothing_fits_the_leanest_is_named_with_all_that_it_needs_at_least(enter):
    """As a search refuses for one reason, a choice may need more for another."""
    facts = [
        Facts(3.0, 1.0, leanest=9.0 * GIB),
        Facts(2.0, 1.0, leanest=1.5 * GIB),
        Facts(1.0, 1.0, leanest=2.0 * GIB),
        Facts(1.5, 1.0, leanest=0.0),
        Facts(4.0, 1.0),
        Facts(5.0, 1.0, least=0.3 * GIB, short_bytes={"adamw": 1.7 * GIB}),
        Facts(0.5, 1.0, least=0.4 * GIB, short_bytes={"adamw": 1.9 * GIB}),
    ]
    for number, needs in enumerate((1.1, 1.2, 1.3, 1.6)):
        facts[number].fails["weigh"] = TooLargeError(needs * GIB, GIB, LEANEST)
    facts[4].fails["weigh"] = ConfigError("it cannot be")
    world = World(facts)
    enter(world)
    said = []
    found = run(world, said=said)
    assert world.asked("short") == [5, 6]
    assert not found.best
    assert not found.estimated
    assert (found.with_vocabulary, found.without_vocabulary) == (None, None)
    assert world.choices.index(found.leanest.choice) == 1
    assert found.leanest.needs == 1.5 * GIB
    assert found.leanest.reason == "needs at least 1.50 GiB, 512.0 MiB more than 1 GiB"
    bounds = [(refusal.bound, refusal.needs) for refusal in found.refused]
    assert bounds[-2:] == [(0.5, 1.9 * GIB), (5.0, 1.7 * GIB)]
    assert {bound for bound, _ in bounds[:-2]} == {0.0}
    assert found.refused[-1].reason == "needs 1.70 GiB on rank 1, 716.8 MiB more than 1 GiB"
    assert found.excluded == {
        f"memory, for {LEANEST}": 4,
        f"memory, for {SIMULATED}": 2,
        "it cannot be": 1,
    }
    (cannot,) = (one for one in found.refused if one.needs is None)
    assert (cannot.reason, found.num_open) == ("it cannot be", 0)
    assert said[-1] == "2 simulated; none fits yet"


def test_the_fastest_optimizer_that_fits_is_taken(enter):
    """What is refused says the memory of a rank if that is too little, else that of the hosts."""
    config = replace(CONFIG, cluster=replace(CONFIG.cluster, host_memory_gib=2.0))
    large = {"adamw": 3.0 * GIB, "zero1": 2.0 * GIB}
    every = (ADAMW, ZERO1, OFFLOAD)
    after = {"adamw": 3.0, "zero1": 1.0, "offload": 2.0}
    cases = [
        (every, {}, 0.0, "zero1"),
        (every, {"zero1": 1.1 * GIB}, 0.0, "offload"),
        (every, large, 2.0 * GIB, "offload"),
        (every, large, 2.0 * GIB + 1, "needs 2.00 GiB on rank 1, 1.00 GiB more than 1 GiB"),
        (every[::-1], large, 2.0 * GIB + 1, "needs 3.00 GiB on rank 1, 2.00 GiB more than 1 GiB"),
        ((OFFLOAD,), {}, 2.0 * GIB + 1, "cluster.host_memory_gib=2, which too much is offloaded"),
        ((ADAMW,), {}, 9.0 * GIB, "adamw"),
    ]
    for optimizers, needs, host, expected in cases:
        one = Facts(1.0, 5.0, optimizers=optimizers, after=after, short_bytes=needs, host=host)
        one.placed = 7
        world = World([one])
        enter(world)
        found = run(world, config=config)
        assert found.num_estimated == 1
        if found.best:
            (plan,) = found.best
            assert name_of(plan.choice.optimizer) == expected
            assert found.with_vocabulary.seconds == 5.0
            assert found.with_vocabulary.choice == plan.choice
        else:
            (refusal,) = found.refused
            assert refusal.reason.startswith(expected)
            assert (refusal.needs is None) == expected.startswith("cluster")


def test_a_choice_that_fits_is_one_whose_stages_all_recompute_most(enter, monkeypatch):
    """It need not be the first one, and of what is kept the recomputation counts."""
    full = {"recompute": "full"}
    choices = [
        choice_of(0, **full, recompute_where_needed=True),
        choice_of(1, recompute="selective"),
        choice_of(2, **full),
        choice_of(3, **full),
        choice_of(4, **full),
    ]
    world = World([Facts(1.0, 1.0) for _ in choices], choices)
    world.facts[choices[2]].fails["weigh"] = ConfigError("no")
    made = enter(world)
    space = Space(tuple(choices), Counter(), (ZERO1,))
    monkeypatch.setattr(search_module, "space_of", lambda config, kept: space)
    assert fits_on(CONFIG, 0.5) == choices[3]
    assert made == [(0.5 * GIB, (ZERO1,))]
    assert world.asked("weigh") == [2, 3]
    assert fits_on(CONFIG, 0.5, Kept({"parallel.recompute": "selective"})) == choices[1]
    for facts in world.facts.values():
        facts.fails["weigh"] = ConfigError("no")
    assert fits_on(CONFIG, 0.5) is None


def problem_of(layout, count, vocab="one_barrier", *, split=False):
    return Problem(layout, count, VOCAB_ALGORITHMS[vocab], split)


@pytest.mark.parametrize(
    ("ranks", "fill"), [(1, 8), (2, 8), (3, 9), (4, 8), (8, 16), (15, 30), (16, 16), (64, 64)]
)
def test_a_short_step_fills_the_pipeline_and_another_has_as_many_microbatches_as_ranks_more(
    ranks, fill
):
    """It is the step itself where that is no longer."""
    layout = Layout("linear", ranks)
    for count, expected in (
        (fill + ranks - 1, (fill + ranks - 1,)),
        (fill + ranks, (fill + ranks,)),
        (fill + ranks + 1, (fill, fill + ranks)),
        (10_000, (fill, fill + ranks)),
    ):
        problem = problem_of(layout, count)
        assert search_module.short_counts(problem) == expected
        assert search_module.placed_by_short(problem) == sum(
            search_module.placed_by(replace(problem, num_microbatches=one), 12_000)
            for one in expected
        )


@pytest.mark.parametrize(
    ("layout", "vocab", "split", "nodes"),
    [
        (Layout("linear", 4), "none", False, 4 + 4 * 2),
        (Layout("linear", 4), "one_barrier", False, 4 * 4 + 4 * 2),
        (Layout("v", 4, 2), "none", True, 4 + 8 * 3),
        (Layout("loop", 2, 3), "one_barrier", True, 2 * 4 + 6 * 3),
    ],
)
def test_the_effort_of_a_plan_is_that_of_its_passes_and_of_its_tries(layout, vocab, split, nodes):
    """A split backward is tried twice where there is room, and moved for at least half of it."""
    for count in (3, 50):
        problem, n = problem_of(layout, count, vocab, split=split), nodes * count
        for effort in (3 * n - 1, 3 * n, 3 * n + 3, n - 1, n, 2 * n, 5 * n, 6 * n, 40 * n):
            found = search_module.placed_by(problem, effort)
            if split:
                tries = 2 if n < effort // 3 else 1
                assert found == 2 * n + tries * (n + max(2 * n, effort // 2))
            else:
                assert found == n * (2 + min(5, max(1, effort // n)))
        whole = search_module.placed_by(problem, 120_000)
        assert search_module.placed_by(problem) == whole


@dataclass(frozen=True)
class _Step:
    schedule: tuple
    timeline: object = None


@pytest.mark.parametrize("busiest", [0.5, 2.0])
@pytest.mark.parametrize("count", [12, 100])
def test_the_time_of_a_long_step_follows_from_two_short_ones(monkeypatch, count, busiest):
    """Every microbatch more takes what it took in the second, or the work of the busiest rank."""
    draft = SimpleNamespace(problem=problem_of(Layout("linear", 4), count), cost="cost")
    lasts = {8: 20.0, 12: 25.0}
    monkeypatch.setattr(
        search_module,
        "generate",
        lambda name, few, cost, effort: (name, few.num_microbatches, cost, effort),
    )
    monkeypatch.setattr(
        search_module, "place_transfers", lambda schedule, few, cost: ("moved", *schedule)
    )
    simulated = []

    def simulate(schedule, few, cost):
        simulated.append(schedule)
        return SimpleNamespace(makespan=lasts[few.num_microbatches])

    monkeypatch.setattr(search_module, "simulate", simulate)
    monkeypatch.setattr(search_module, "unsimulated", lambda draft, schedule, cost: _Step(schedule))
    monkeypatch.setattr(search_module, "busiest_seconds", lambda problem, cost: busiest)
    step, seconds, placed = search_module.short_step(draft, "1f1b")
    last = ("moved", "1f1b", 12, "cost", 12_000)
    assert step.schedule == last
    assert step.timeline.makespan == 25.0
    assert placed == search_module.placed_by_short(draft.problem)
    if count == 12:
        assert simulated == [last]
        assert seconds == 25.0
    else:
        assert simulated == [("1f1b", 8, "cost", 12_000), last]
        assert seconds == 25.0 + 88 * max(1.25, busiest)


def test_a_search_without_vocabulary_parallelism_simulates_short_steps_and_plans_none(
    enter, monkeypatch
):
    choices = [choice_of(number, splits=False) for number in range(3)]
    world = World([Facts(2.0, 2.5), Facts(1.0, 1.5), Facts(1.6, 1.7)], choices)
    made, asked = enter(world), []

    def space_of(config, degrees):
        asked.append(degrees)
        return Space(tuple(world.choices), Counter(), (ADAMW,))

    monkeypatch.setattr(search_module, "without_vocabulary_of", space_of)
    found = search_module.without_vocabulary(CONFIG, Degrees(1, 2, 1))
    assert asked == [Degrees(1, 2, 1)]
    assert made == [(GIB, (ADAMW,))], "all memory may be used"
    assert number_of(world, found.without_vocabulary) == 1
    assert [number_of(world, one) for one in found.estimated] == [1]
    assert not world.asked("plan")
    few = World([replace(one, placed=10**5) for one in world.facts.values()], world.choices)
    enter(few)
    search_module.without_vocabulary(CONFIG, Degrees(1, 2, 1))
    assert few.asked("short") == [0, 1], "three fifths of 300,000 are two short steps"


def test_what_is_looked_for_by_default():
    assert Limits() == Limits(top=5, margin=0.05, effort=3_000_000)
    assert search_module.limit_of(CONFIG, 0.25) == 0.75 * GIB


def test_why_nothing_is_kept_names_the_degrees_or_what_rules_out_most():
    cluster = replace(CONFIG.cluster, num_nodes=300, gpus_per_node=4)
    config = replace(CONFIG, cluster=cluster, num_microbatches=1_200)
    values = {"parallel.tp": 3, "schedule.name": "1f1b", "parallel.dp": 2}
    space = Space((), Counter({"few": 1, "many": 2}), None, Kept(values))
    with pytest.raises(ConfigError) as raised:
        search(config, Limits(), lambda: True, len, space)
    assert str(raised.value) == (
        "--keep parallel.tp,schedule.name,parallel.dp: no split of 1,200 GPUs into dp x pp x tp, "
        "with tp within a node, has parallel.dp=2, parallel.tp=3; keep fewer degrees, or change "
        "them"
    )
    space = replace(space, kept=Kept({"parallel.tp": 2, "schedule.name": "1f1b"}))
    with pytest.raises(ConfigError) as raised:
        search(CONFIG, Limits(), lambda: True, len, space)
    words = "--keep parallel.tp,schedule.name leaves no choice; ruled out most: many"
    assert str(raised.value) == words
    with pytest.raises(ConfigError, match="does not split over"):
        search(CONFIG, Limits(), lambda: True, len, replace(space, kept=Kept()))
    with pytest.raises(ConfigError, match="does not split over"):
        search(replace(config, num_microbatches=7), Limits(), lambda: True, len, space)


@pytest.mark.parametrize(
    ("batch", "gpus", "words"),
    [
        (
            1_001,
            (2, 512),
            "a batch of 1,001 sequences does not split over 1,024 GPUs: dp must divide it, and "
            "with pp of at most 2 layers and tp within a node dp is one of 256, 512, 1,024; use a "
            "batch of 768 or 1,024 sequences",
        ),
        (
            3,
            (8, 2),
            "a batch of 3 sequences does not split over 16 GPUs: dp must divide it, and with pp "
            "of at most 4 layers and tp within a node dp is one of 2, 4, 8, ... 16; use a batch "
            "of 2 or 4 sequences, or cluster.num_nodes=6 (12 GPUs)",
        ),
    ],
)
def test_a_batch_that_no_split_divides_comes_with_all_ways_out(batch, gpus, words):
    nodes, per_node = gpus
    config = replace(
        CONFIG,
        num_microbatches=batch,
        model=replace(CONFIG.model, num_layers=2 if batch > 3 else 4),
        cluster=replace(CONFIG.cluster, num_nodes=nodes, gpus_per_node=per_node),
    )
    assert search_module.no_choice_words(config) == words
