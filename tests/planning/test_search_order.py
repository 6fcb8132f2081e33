"""The choices of a search, their order and its length, in worlds whose answer is known.

A world stands in for `Scales`, and for the simulation and the planning of steps.  It knows of every
choice what each of them would say, and notes what is asked.
"""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace

import pytest

from schedules.generators import Shortened
from schedules.ir import Kind
from schedules.layout import Layout
from schedules.problem import Problem
from schedules.vocab import VOCAB_ALGORITHMS
from vp_train.commands import search_words
from vp_train.config import ConfigError
from vp_train.planning import explore as explore_module
from vp_train.planning import no_choice
from vp_train.planning import search as search_module
from vp_train.planning import shared as shared_module
from vp_train.planning import short as short_module
from vp_train.planning import trials as trials_module
from vp_train.planning.choice import Choice
from vp_train.planning.cluster import with_margin
from vp_train.planning.degrees import Degrees
from vp_train.planning.found import SAME, Estimate, Found, Limits, counted, memory_of, order_of
from vp_train.planning.kept import ALL, Kept
from vp_train.planning.learned import Learned, alike
from vp_train.planning.queue import Prospect
from vp_train.planning.report import PlanReport
from vp_train.planning.search import _Search, fits_on, search
from vp_train.planning.space import Space
from vp_train.planning.weigh import LEANEST, SIMULATED, Candidate, SameChoiceError, TooLargeError
from vp_train.planning.weigh import Weight as Weighed
from vp_train.settings import load_config

GIB = 2**30
CONFIG = load_config(["model=nano", "cluster.memory_gib=1"])
ADAMW = CONFIG.optim
ZERO1 = replace(ADAMW, name="zero1")
OFFLOAD = replace(ZERO1, offload=True)
ROOMY = 0.5 * GIB


@dataclass(slots=True)
class Facts:
    """All that a search finds out about a choice, from its weight to its whole step.

    bound, least: its seconds and bytes when it is weighed.
    drafted, passes: the seconds of its step and of its passes at least, once it is drafted.
    short, short_bytes: the seconds of the passes of a short step, and the bytes of a rank, of which
        some are `unexpected`.
    seconds, memory: those of the whole step.
    placed, whole: the effort of a short step and of a whole one.
    fails: the errors of weighing and of drafting it.
    more, fewer: the number of the same choice of which more, or fewer, stages recompute, if there
        is one.
    vocabulary: the seconds of S, and those of T.
    less, most: the numbers of the choices of which one stage recomputes less, or more; `most` of
        any rank, and `on_rank` of the one that needs most.
    rank: the rank that needs most.
    orders: the seconds of the step and the bytes of rank 1 in the orders that schedule=auto finds,
        one after the other, and the effort of one.
    """

    bound: float
    seconds: float
    least: float = ROOMY
    drafted: float | None = None
    passes: float | None = None
    short: float | None = None
    short_bytes: dict[str, float] = field(default_factory=dict)
    unexpected: float = 0.0
    memory: float = ROOMY
    placed: int = 100
    whole: int = 1000
    stages: int = 2
    seems_to_fit: bool = True
    optimizers: tuple = (ADAMW,)
    after: dict[str, float] = field(default_factory=dict)
    host: float = 0.0
    planned_host: float = 0.0
    leanest: float = 0.0
    fails: dict[str, Exception] = field(default_factory=dict)
    more: int | None = None
    fewer: int | None = None
    vocabulary: float = 1.0
    less: tuple[int, ...] = ()
    same: tuple[int, ...] = ()
    most: tuple[int, ...] = ()
    on_rank: tuple[int, ...] | None = None
    rank: int = 1
    orders: tuple[tuple[float, float], ...] = ()
    order_effort: float = 500.0

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
    """Facts of every choice, and a log of (what was asked, number of the choice).

    `near` has the numbers of the neighbours of a choice, if it has any.
    """

    def __init__(self, facts, choices=None, limit=GIB):
        self.choices = choices or [choice_of(number) for number in range(len(facts))]
        self.facts, self.limit, self.log = dict(zip(self.choices, facts, strict=True)), limit, []
        self.near, self.caps = {}, defaultdict(list)

    def note(self, what, choice):
        self.log.append((what, self.choices.index(choice)))
        return self.facts[choice]

    def asked(self, *what):
        """Return the numbers of the choices of which this was asked, in order."""
        return [number for name, number in self.log if name in what]

    def check(self, choices):
        self.log.append(("check", len(choices)))

    def bound(self, choice):
        return self.facts[choice].bound

    def weigh(self, choice):
        if choice.recompute_where_needed and choice not in self.facts:
            self.log.append(("unknown", None))
            raise ConfigError("all of its stages recompute, or none, in this world")
        facts = self.note("weigh", choice)
        if "weigh" in facts.fails:
            raise facts.fails["weigh"]
        return Weighed(facts.bound, facts.least, seems_to_fit=facts.least <= self.limit)

    def neighbours(self, choice, others):
        return [self.choices[number] for number in self.near.get(self.choices.index(choice), ())]

    def draft(self, choice):
        if choice.balance and choice not in self.facts:
            raise ConfigError("its rows are not balanced in this world")
        facts = self.note("draft", choice)
        if "draft" in facts.fails:
            raise facts.fails["draft"]
        problem = SimpleNamespace(layout=SimpleNamespace(num_stages=facts.stages), facts=facts)
        cost = SimpleNamespace(pass_seconds=dict.fromkeys((Kind.S, Kind.T), (facts.vocabulary,)))
        draft = SimpleNamespace(
            choice=choice, problem=problem, cost=cost, with_named=lambda name: choice
        )
        names, sizes = [name_of(optim) for optim in facts.optimizers], facts.short_bytes
        after = facts.drafted - facts.passes
        return Candidate(
            *(choice, draft, facts.passes, facts.drafted, facts.optimizers),
            expected=tuple(sizes.get(name, ROOMY) - facts.unexpected for name in names),
            after=tuple(after + facts.after.get(name, 0.0) for name in names),
            seems_to_fit=facts.seems_to_fit,
        )

    def needs(self, step, optimizers):
        sizes = self.facts[step.choice].short_bytes
        rank = self.facts[step.choice].rank
        return [(sizes.get(name_of(optim), ROOMY), rank) for optim in optimizers]

    def after(self, step, optim):
        return self.facts[step.choice].after.get(name_of(optim), 0.0)

    def with_more_recompute(self, candidate, step):
        more = self.facts[step.choice].more
        return None if more is None else self.draft(self.choices[more])

    def with_fewer_recompute(self, candidate, step, optim):
        fewer = self.facts[step.choice].fewer
        return None if fewer is None else self.draft(self.choices[fewer])

    def leanest(self, choice):
        return self.facts[choice].leanest

    def leanest_optimizer(self, choice):
        return OFFLOAD

    def cost_of(self, choice):
        return ("cost", choice)

    def short_step(self, draft, name):
        facts = self.note("short", draft.choice)
        offload_bytes = (1.0,) if draft.choice.offload else ()
        step = SimpleNamespace(
            choice=draft.choice, cost=SimpleNamespace(offload_bytes=offload_bytes)
        )
        return step, facts.short, facts.placed

    def ordered(self, choice, watch):
        named = replace(choice, cap_gib=None, optimizer=None)
        self.note("order", named)
        self.caps[named].append(choice.cap_gib)
        return choice

    def report_of(self, choice, cluster, optim, *, cost):
        if choice.cap_gib is None:
            facts = self.note("plan", choice)
            seconds, memory = facts.seconds, facts.memory
        else:
            named = replace(choice, cap_gib=None, optimizer=None)
            facts = self.facts[named]
            seconds, memory = facts.orders[self.caps[named].index(choice.cap_gib)]
        assert replace(cost[1], cap_gib=None) == replace(choice, cap_gib=None, optimizer=None)
        ranks = [
            SimpleNamespace(total=total, activations=0.3 * total, vocabulary=0.1 * total)
            for total in (0.0, memory)
        ]
        report = SimpleNamespace(
            step_seconds=seconds,
            ranks=tuple(SimpleNamespace(memory=memory) for memory in ranks),
            worst=1,
            host=SimpleNamespace(total=facts.planned_host),
        )
        report.room = partial(PlanReport.room, report)
        return report

    def host_bytes(self, step, optim, per_node):
        assert per_node == 4
        return SimpleNamespace(total=self.facts[step.choice].host)

    def spent(self):
        """Return the effort that all that was asked takes."""
        return sum(self.effort_of(what, number) for what, number in self.log)

    def effort_of(self, what, number):
        """Return the effort of weighing, drafting, estimating or planning a choice."""
        if what in ("check", "unknown"):
            return {"check": 0, "unknown": 4}[what]
        one = self.facts[self.choices[number]]
        drafting = 0 if "draft" in one.fails else 12 * one.stages
        return {"weigh": 4, "draft": drafting, "short": one.placed, "plan": one.whole}[what]


@pytest.fixture
def enter(monkeypatch):
    """Return the function that lets searches take place in a world."""

    def entered(world):
        made = []

        def scales(config, limit, optimizers=None, margin=0.0):
            if optimizers is not None:
                made.append((limit, optimizers))
            known = with_margin(config.cluster, margin).host_memory_gib
            world.limit, world.host_limit = limit, float("inf") if known is None else known * GIB
            return world

        def with_optimizers(optimizers):
            made.append((world.limit, optimizers))
            return world

        def with_other_stage(choice, *, fewer, rank=None):
            facts = world.facts[choice]
            found = facts.less if fewer else facts.most
            if rank is not None:
                assert rank == facts.rank
                found = facts.most if facts.on_rank is None else facts.on_rank
            return [world.choices[number] for number in found]

        world.with_optimizers = with_optimizers
        monkeypatch.setattr(search_module, "Scales", scales)
        monkeypatch.setattr(shared_module, "short_step", world.short_step)
        monkeypatch.setattr(search_module, "neighbours", world.neighbours)
        monkeypatch.setattr(search_module, "with_larger_microbatches", lambda choice: [])

        def in_the_same_stages(choice):
            return [world.choices[number] for number in world.facts[choice].same]

        monkeypatch.setattr(search_module, "in_the_same_stages", in_the_same_stages)

        def order_nodes(item):
            facts = world.facts[item.choice]
            return facts.order_effort if facts.orders else float("inf")

        monkeypatch.setattr(search_module, "order_nodes", order_nodes)
        monkeypatch.setattr(trials_module, "order_nodes", order_nodes)
        monkeypatch.setattr(Choice, "with_other_stage", with_other_stage)
        monkeypatch.setattr(trials_module, "report_of", world.report_of)
        monkeypatch.setattr(trials_module, "with_messages", lambda step, report: report)
        monkeypatch.setattr(trials_module, "most_host_bytes", world.host_bytes)
        monkeypatch.setattr(explore_module, "placed_by_short", lambda problem: problem.facts.placed)
        monkeypatch.setattr(short_module, "placed_by", lambda problem: problem.facts.whole)
        return made

    return entered


def run(
    world,
    *,
    top=1,
    effort=10**9,
    margin=0.0,
    config=CONFIG,
    in_time=lambda: True,
    said=None,
    first=None,
    kept=ALL,
):
    """Search all choices of a world that were there when it was made, or the `first` of them."""
    said = [] if said is None else said
    space = Space(tuple(world.choices[:first]), Counter(), (ADAMW,), kept)
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
        assert searching._effort.spent == world.spent()
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


def test_effort_ends_a_search_at_half_of_it_and_plans_take_the_rest(enter):
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
                part = 0.5 if num_fit else 1.0
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
            assert spent >= 0.5 * effort or spent + next_plan > effort
    assert min(ended.values()) >= 3
    assert len(ended) == 2


def test_while_nothing_fits_the_leanest_is_tried_and_then_the_lowest_bound(enter):
    """A choice whose bound rises when it is drafted waits for its turn again."""
    world = World(
        [
            Facts(5.0, 5.0, least=1.0, short_bytes={"adamw": GIB + 1}),
            Facts(4.0, 4.4, least=2.0),
            Facts(1.0, 3.5, drafted=3.0),
            Facts(2.0, 2.2, drafted=2.1),
            Facts(2.15, 2.6, drafted=2.5),
            Facts(2.2, 2.2),
        ]
    )
    enter(world)
    found = run(world)
    order = [event for event in world.log if event[0] not in ("check", "weigh")]
    assert order == [
        *(("draft", 0), ("short", 0), ("draft", 1), ("short", 1)),
        *(("draft", 2), ("draft", 3), ("short", 3), ("draft", 4), ("plan", 3)),
    ]
    assert numbers(world, found.best) == [3]
    assert world.log[0] == ("check", 6)
    assert sorted(world.asked("weigh")) == list(range(6))
    assert (found.num_estimated, found.num_planned, found.num_open) == (3, 1, 0)


def test_after_32_drafts_and_twice_as_many_again_the_most_promising_is_estimated(enter):
    """Bounds are loose, so all are drafted before it is known which bound is the lowest."""
    facts = [Facts(9.0, 9.0, least=0.0)]
    facts += [Facts(1.0 + n / 1e3, 8.0 - n / 1e2, drafted=8.0 - n / 1e2) for n in range(1, 200)]
    facts[32].seems_to_fit = False
    world = World(facts)
    enter(world)
    in_time = lambda: world.asked("draft")[-1:] < [70]  # noqa: E731
    found = run(world, in_time=in_time)
    assert world.asked("draft") == list(range(71))
    order = [(what, number) for what, number in world.log if what != "weigh"]
    assert order.index(("short", 31)) == order.index(("draft", 32)) + 1
    assert order.index(("short", 64)) == order.index(("draft", 64)) + 1
    assert world.asked("short") == [0, 31, 64]
    assert numbers(world, found.best) == [64]
    assert (found.ended, found.num_unseen) == ("time", {True: 197})


def test_what_is_alike_is_expected_to_exceed_its_bounds_by_nearly_the_least_factor(enter):
    """97 % of the least that was seen of its kind, and never less than 1."""
    facts = [
        Facts(2.0, 3.0, passes=1.5, short=3.0, least=0.0),
        Facts(1.0, 1.6, passes=1.0, short=1.5),
        Facts(1.0, 1.0, passes=1.0, short=1.0),
        Facts(1.0, 0.5, passes=1.0, short=0.5),
        Facts(9.0, 9.0),
        Facts(9.0, 9.0),
        Facts(9.0, 9.0),
    ]
    alike = (0, 0, 1, 2, 0, 1, 2)
    world = World(facts, [choice_of(number, alike=kind) for number, kind in enumerate(alike)])
    enter(world)
    space = Space(tuple(world.choices), Counter())
    searching = _Search(CONFIG, Limits(4, 0.0, 10**9), lambda: True, len, space)
    found = searching.run()
    assert sorted(world.asked("short")) == [0, 1, 2, 3]
    assert [plan.report.step_seconds for plan in found.best] == [0.5, 1.0, 1.6, 3.0]
    factors = (0.97 * 1.5, 1.0, 1.0)
    prospects = [searching._explorer.prospects[world.choices[number]] for number in (4, 5, 6)]
    assert [searching._explorer.key(prospect) for prospect in prospects] == [
        9.0 * one for one in factors
    ]
    of_short = [estimate.seconds for estimate in searching._book.estimates]
    assert sorted(of_short) == [1.0, 1.0, 1.5, 3.0], "passes take at least their bound"


def test_a_kind_that_differs_in_any_way_is_not_alike():
    one = choice_of(0)
    others = [
        replace(one, schedule="gpipe"),
        replace(one, num_chunks=2),
        replace(one, vocab="none"),
        replace(one, degrees=Degrees(1, 4, 1)),
        replace(one, degrees=Degrees(1, 2, 5)),
        replace(one, num_microbatches=5),
    ]
    kinds = {alike(choice) for choice in (one, *others)}
    assert len(kinds) == 7
    same = replace(one, micro_batch_size=9, recompute="full", degrees=Degrees(3, 2, 1))
    assert alike(same) == alike(one)


def test_with_a_split_backward_what_recomputes_otherwise_is_not_alike():
    """More microbatches are in flight then, so slow links between stages take less of the step."""
    one = replace(choice_of(0), schedule="zb_h1")
    others = [
        replace(one, recompute="full"),
        replace(one, recompute="full", recompute_where_needed=True),
        replace(one, recompute="selective"),
    ]
    assert len({alike(choice) for choice in (one, *others)}) == 4
    assert alike(replace(one, micro_batch_size=9)) == alike(one)


@pytest.mark.parametrize("early", [0, 1])
def test_what_seems_not_to_fit_or_takes_a_tenth_of_the_effort_comes_last(enter, early):
    """Exactly a tenth is not dear yet.  Both are looked at in the end, all the same."""
    effort = 10_000
    dear = Facts(1.0, 1.0, placed=effort // 10 + 1)
    doubtful = Facts(1.1, 1.1, seems_to_fit=False)
    sure, tenth = Facts(2.0, 2.0), Facts(1.2, 1.2, placed=effort // 10)
    facts = [dear, doubtful, sure, tenth]
    (sure if early else dear).least = 0.0
    world = World(facts)
    enter(world)
    found = run(world, top=4, effort=effort)
    assert world.asked("short") == [2, 3, 0, 1]
    assert numbers(world, found.best) == [0, 1, 3, 2]
    assert len(world.asked("draft")) == 4, "each once"


def test_where_nothing_fits_the_leanest_is_named_with_all_that_it_needs_at_least(enter):
    """A search refuses for one reason; a choice may need more for another."""
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
    assert found.leanest.choice == replace(world.choices[1], optimizer=OFFLOAD)
    assert found.leanest.needs == 1.5 * GIB
    limit = "the 1 GiB that a plan may use"
    assert found.leanest.reason == f"needs at least 1.50 GiB, 512.0 MiB more than {limit}"
    bounds = [(refusal.bound, refusal.needs) for refusal in found.refused]
    assert bounds[-2:] == [(0.5, 1.9 * GIB), (5.0, 1.7 * GIB)]
    assert {bound for bound, _ in bounds[:-2]} == {0.0}
    assert found.refused[-1].reason == f"needs 1.70 GiB on rank 1, 716.8 MiB more than {limit}"
    assert found.excluded == {
        f"memory, for {LEANEST}": 4,
        f"memory, for {SIMULATED}": 2,
        "it cannot be": 1,
    }
    (cannot,) = (one for one in found.refused if one.needs is None)
    assert (cannot.reason, found.num_open) == ("it cannot be", 0)
    assert said[-1] == "2 simulated; none fits yet"


def test_of_many_refusals_the_first_hundred_are_kept(enter):
    facts = [Facts(float(130 - number), 1.0, least=float(number)) for number in range(130)]
    for one in facts:
        one.fails["draft"] = TooLargeError(2 * GIB, GIB, LEANEST)
    world = World(facts)
    enter(world)
    found = run(world)
    assert [refusal.bound for refusal in found.refused] == [float(n) for n in range(1, 101)]
    assert world.asked("draft") == list(range(130)), "the leanest first"
    assert found.num_estimated == 0


@pytest.mark.parametrize(("least_other", "tried"), [(0, 20), (1, 20), (5, 5)])
def test_of_the_kind_that_was_not_found_a_few_are_tried_whatever_effort_is_left(
    enter, least_other, tried
):
    """The lowest bounds come first, until one seems to fit and does; twenty at most."""
    facts, choices = [Facts(9.0, 9.0, least=0.0, placed=0)], [choice_of(0)]
    for number in range(1, 30):
        one = Facts(float(number), float(number), seems_to_fit=False)
        if number == 2:
            one.fails["draft"] = ConfigError("it cannot be")
        if number == least_other and number == 5:
            one.seems_to_fit = True
        if number == least_other and number == 1:
            one.seems_to_fit, one.short_bytes = True, {"adamw": 2 * GIB}
        facts.append(one)
        choices.append(choice_of(number, splits=False))
    world = World(facts, choices)
    enter(world)
    found = run(world, effort=1)
    assert world.asked("draft") == [0, *range(1, tried + 1)]
    assert world.asked("short") == [0, *[n for n in (1, 5) if n == least_other]]
    assert world.asked("plan") == [5 if least_other == 5 else 0]
    assert number_of(world, found.without_vocabulary) == (5 if least_other == 5 else None)
    refused = {world.choices.index(one.choice): one.bound for one in found.refused}
    assert refused == {2: 2.0} | ({1: 1.0} if least_other == 1 else {})
    assert found.ended == "effort"
    many = World(facts, choices)
    enter(many)
    found = run(many, effort=1, top=40)
    assert found.num_open + found.num_planned + len(found.refused) == 30
    late = World(facts, choices)
    enter(late)
    found = run(late, effort=1, in_time=lambda: False)
    assert late.asked("draft") == [0], "not without time"
    assert found.ended == "time"


def test_what_was_drafted_before_is_not_drafted_again_for_the_other_kind(enter):
    """The bound rose, and other choices had lower ones until the effort was spent."""
    facts = [
        Facts(9.0, 9.0, least=0.0),
        Facts(1.0, 9.5, drafted=8.0),
        *(Facts(2.0 + number, 9.0, placed=10) for number in range(4)),
    ]
    choices = [choice_of(0), choice_of(1, splits=False), *map(choice_of, range(2, 6))]
    for effort in (300, 320):
        world = World(facts, choices)
        enter(world)
        found = run(world, effort=effort)
        assert world.asked("draft").count(1) == 1
        assert world.asked("short")[-1] == 1
        assert number_of(world, found.without_vocabulary) == 1


def test_what_is_next_to_the_best_is_tried_though_the_effort_for_others_is_spent(enter):
    """Bounds far too low come first.  What is better has neighbours of its own."""
    decoys = [Facts(1.0, 30.0) for _ in range(40)]
    facts = [Facts(9.0, 9.0, least=0.0), *decoys, Facts(8.0, 8.5), Facts(7.5, 8.2), Facts(8.1, 9.0)]
    for near, found in (({}, 0), ({0: [41]}, 41), ({0: [41], 41: [42, 43, 0], 42: [43]}, 42)):
        world = World(facts)
        world.near = near
        enter(world)
        result = run(world, effort=6_000)
        assert numbers(world, result.best) == [found]
        assert result.num_unseen[True] > 10


def test_the_best_that_offloads_nothing_has_its_neighbours_looked_at(enter):
    """It is slower than the best of all, which offloads, and it has no place among the top."""
    decoys = [Facts(1.0, 30.0) for _ in range(40)]
    facts = [Facts(9.0, 9.0, least=0.0), *decoys, Facts(8.0, 8.5), Facts(0.5, 4.0)]
    choices = [choice_of(number, offload=0.0 if number < 42 else 1.0) for number in range(43)]
    world = World(facts, choices)
    world.near = {0: [41]}
    enter(world)
    result = run(world, effort=6_000)
    assert numbers(world, result.best) == [42]
    assert number_of(world, result.without_offloading) == 41


def test_of_equally_fast_estimates_what_keeps_nothing_on_hosts_comes_first():
    """Equal are three digits of the seconds."""
    candidate = World([Facts(10.0, 10.0)]).draft(choice_of(0))
    rows = [
        Estimate(candidate, ADAMW, seconds, memory, host)
        for seconds, memory, host in ((10.04, 3.0, 0.0), (10.01, 1.0, 8.0), (10.0, 2.0, 9.0))
    ]
    rows += [Estimate(candidate, ADAMW, 10.03, 4.0), Estimate(candidate, ADAMW, 9.9, 9.0, 9.0)]
    assert [rows.index(row) for row in sorted(rows, key=lambda row: row.key)] == [4, 0, 3, 1, 2]


def test_what_a_related_step_exceeds_its_bound_by_postpones_a_choice():
    """Other vocabulary passes and recomputation leave ranks about as idle, another schedule not."""
    known, candidate = Learned(), World([Facts(10.0, 10.0)]).draft(choice_of(0))
    known.note(candidate, 15.0, 0.0)
    related = replace(candidate.choice, vocab="two_barrier", recompute="full")
    assert known.factor(candidate.choice) == pytest.approx(0.97 * 1.5)
    assert known.factor(related) == pytest.approx(0.9 * 1.5)
    assert known.factor(replace(related, schedule="zb_h1")) == 1.0
    known.note(replace(candidate, choice=related), 10.5, 0.0)
    assert known.factor(related) == pytest.approx(0.97 * 1.05)


def test_neighbours_take_three_twentieths_of_the_effort_and_each_kind_half_of_that(enter):
    """Dear choices are estimated as long as bounds are low; both kinds have their turn."""
    facts = [Facts(9.0, 9.0, least=0.0), Facts(9.0, 9.0, placed=10**6)]
    facts += [Facts(1.0, 30.0, placed=100, stages=0) for _ in range(40)]
    choices = [choice_of(number, splits=number < 20) for number in range(len(facts))]
    world = World(facts, choices)
    world.near = {0: range(2, 42)}
    enter(world)
    searching = _Search(
        CONFIG, Limits(1, 0.0, 4_000), lambda: True, len, Space((), Counter(), (ADAMW,))
    )
    searching._book.add(searching._trials.estimate(world.draft(choices[0])))
    world.log.clear()
    searching._explorer.prospects = {
        choice: Prospect(number, choice, 1.0 if number >= 2 else None)
        for number, choice in enumerate(choices)
    }
    searching._look_around()
    tried = world.asked("short")
    assert [sum(number < 20 for number in tried), sum(number >= 20 for number in tried)] == [3, 3]


@pytest.mark.parametrize(("least", "leaner"), [(0.9, 3), (0.91, None)])
def test_beside_the_best_there_are_a_much_leaner_one_and_one_that_offloads_nothing(
    enter, least, leaner
):
    """The leaner one is as fast and needs less by a tenth of the limit; all are planned."""
    seconds, sizes = (10.0, 10.09, 10.2, 10.09), (1.0, 0.95, 0.1, least)
    facts = [Facts(1.0, s, memory=size * GIB) for s, size in zip(seconds, sizes, strict=True)]
    choices = [choice_of(number, offload=part) for number, part in enumerate((1.0, 0.0, 0.0, 1.0))]
    world = World(facts, choices)
    enter(world)
    found = run(world, top=4)
    assert numbers(world, found.best) == [0, 1, 3, 2]
    assert number_of(world, found.without_offloading) == 1
    assert number_of(world, found.leaner) == leaner


@pytest.mark.parametrize(
    ("seconds", "gib", "offload", "is_named"),
    [
        (10.03, 52.7, 0.0, True),  # much less memory for next to no time
        (10.09, 63.4, 0.0, True),
        (10.09, 63.6, 0.0, False),  # 7.4 GiB are not a tenth of 75
        (10.11, 52.7, 0.0, False),
        (10.03, 52.7, 1.0, True),
        (10.06, 52.7, 1.0, False),  # it counts as 0.5 % longer
    ],
)
def test_what_is_as_fast_with_a_tenth_of_the_memory_less_is_named_and_rows_stay_by_time(
    enter, seconds, gib, offload, is_named
):
    facts = [Facts(1.0, 10.0, memory=71.0 * GIB), Facts(1.0, seconds, memory=gib * GIB)]
    world = World(facts, [choice_of(0), choice_of(1, offload=offload)])
    enter(world)
    config = replace(CONFIG, cluster=replace(CONFIG.cluster, memory_gib=75.0))
    found = run(world, top=2, config=config)
    assert number_of(world, found.leaner) == (1 if is_named else None)
    assert numbers(world, found.best) == [0, 1]


@pytest.mark.parametrize("names", [(), ("schedule.name",), ("schedule.num_chunks",)])
def test_what_may_become_the_best_of_its_kind_is_ordered_anew(enter, names):
    """The lowest bound first; each while it may still be the first, in the memory that it leaves.

    The last cannot be faster than the first then is, nor is it worth the search where it would be
    less than half a percent faster.  What has activations on hosts keeps its order.  No order is
    searched for where the schedule is kept, or the chunks that these choices do not have.
    """
    facts = [
        Facts(9.0, 10.0, orders=((9.5, ROOMY),)),
        Facts(8.0, 11.0, orders=((9.2, 1.1 * GIB), (9.4, 0.8 * GIB))),
        Facts(9.36, 10.1, orders=((9.36, ROOMY),)),
        Facts(7.0, 10.2, orders=((7.1, ROOMY),)),
        Facts(9.0, 12.0, orders=((11.95, ROOMY),)),
    ]
    choices = [choice_of(n, splits=n < 4, offload=float(n == 3)) for n in range(5)]
    world = World(facts, choices)
    enter(world)
    found = run(world, top=5, kept=Kept(dict.fromkeys(names, "1f1b")))
    if names:
        assert not world.asked("order")
        return
    assert world.asked("order") == [1, 1, 0, 4]
    caps = world.caps[choices[1]]
    assert caps == [pytest.approx(part * (GIB - 0.6 * ROOMY) / GIB, rel=1e-3) for part in (1, 0.97)]
    first = found.best[0]
    assert first.seconds == 9.4
    assert first.choice == replace(choices[1], cap_gib=caps[1], optimizer=ADAMW)
    assert found.with_vocabulary.seconds == 9.4
    assert found.without_vocabulary.seconds == 12.0
    assert [plan.seconds for plan in found.best] == [9.4, 9.5, 10.0, 10.1, 10.2]


@pytest.mark.parametrize(
    ("settings", "is_tried"),
    [
        ({"balance": True}, True),
        ({"recompute": "full", "recompute_per_stage": ("full", "none")}, True),
        ({"recompute": "full"}, False),
        ({"splits": False, "balance": True}, False),
    ],
)
def test_the_best_has_other_passes_in_the_stages_that_were_found_for_its_own(
    enter, settings, is_tried
):
    """The neighbours of what has no such stages are all that there is."""
    facts = [Facts(8.0, 10.0, same=(1, 2, 3)), Facts(7.0, 9.5), Facts(8.0, 9.0), Facts(9.9, 9.9)]
    world = World(facts, [choice_of(number, **settings) for number in range(4)])
    enter(world)
    found = run(world, first=1)
    assert found.best[0].seconds == (9.0 if is_tried else 10.0)
    assert world.asked("short") == ([0, 1, 2] if is_tried else [0]), "3 cannot be faster"


@pytest.mark.parametrize("found_one", [True, False])
@pytest.mark.parametrize("is_in_time", [True, False])
def test_the_search_of_an_order_ends_in_time_and_then_its_order_is_dropped(
    enter, is_in_time, found_one
):
    world = World([Facts(8.0, 10.0, orders=((9.0, ROOMY),))])
    watched = []

    def ordered(choice, watch):
        watched.append(watch(None))
        world.log.append(("late", 0))
        watched.append(watch(None))
        if not (is_in_time or found_one):
            raise KeyboardInterrupt
        return World.ordered(world, choice, watch)

    world.ordered = ordered
    enter(world)
    found = run(world, in_time=lambda: is_in_time or not world.asked("late"))
    assert watched == [True, is_in_time]
    assert found.best[0].seconds == (9.0 if is_in_time else 10.0)
    assert (found.unordered is None) is is_in_time


@pytest.mark.parametrize(("order_effort", "orders"), [(500, [0, 1]), (700, [0]), (4_000, [])])
def test_one_order_is_searched_for_after_the_effort_unless_it_takes_much_of_it(
    enter, order_effort, orders
):
    facts = [
        Facts(n + 8.0, 20.0, orders=((n + 19.0, ROOMY),), order_effort=order_effort)
        for n in range(2)
    ]
    world = World(facts)
    enter(world)
    effort = 3_300  # of which weights, drafts, short steps and plans take 2,256
    found = run(world, top=2, effort=effort)
    assert world.asked("order") == orders
    if orders:
        assert found.unordered is None
    else:
        cap = pytest.approx((GIB - 0.6 * ROOMY) / GIB, rel=1e-3)
        assert found.unordered == replace(world.choices[0], cap_gib=found.unordered.cap_gib)
        assert found.unordered.cap_gib == cap


def test_each_kind_has_a_third_of_the_effort_of_estimates(enter):
    """Also the one whose bounds are always higher.  Later the order is that of the bounds."""
    lower = [Facts(1.0 + number / 100, 9.0, placed=10) for number in range(60)]
    higher = [Facts(5.0 + number / 100, 9.5, placed=10) for number in range(60)]
    choices = [*map(choice_of, range(60)), *(choice_of(n, splits=False) for n in range(60, 120))]
    world = World([*lower, *higher], choices)
    enter(world)
    run(world, effort=5_000)
    looked_at = [number < 60 for number in world.asked("draft")]
    assert 40 < len(looked_at) < 110
    assert 0.3 < looked_at.count(False) / len(looked_at) < 0.45


def test_of_plans_that_are_as_lean_the_fastest_is_named(enter):
    """A fiftieth of the memory is no reason for a slower plan."""
    times, sizes = (10.0, 10.09, 10.02, 10.01), (1.0, 0.5, 0.505, 0.52)
    facts = [Facts(1.0, s, memory=size * GIB) for s, size in zip(times, sizes, strict=True)]
    world = World(facts)
    enter(world)
    found = run(world, top=4)
    assert number_of(world, found.leaner) == 2


def test_estimates_are_planned_while_they_may_be_among_the_best(enter):
    """A plan may take a hundredth less than its estimate, and no more."""
    facts = [
        Facts(1.0, 9.9, short=9.9, least=0.0),
        Facts(1.0, 9.95, short=9.995),
        Facts(1.0, 9.9, short=10.0),
        Facts(1.0, 20.0, short=20.0),
    ]
    choices = [*map(choice_of, range(3)), choice_of(3, splits=False)]
    world = World(facts, choices)
    enter(world)
    found = run(world)
    assert sorted(world.asked("short")) == [0, 1, 2, 3]
    assert world.asked("plan") == [0, 3, 1], "the first of both kinds, whatever they take"
    assert numbers(world, found.best) == [0]
    assert found.num_planned == 3
    assert [number_of(world, one) for one in found.estimated] == []
    assert found.num_open == 0
    assert number_of(world, found.without_vocabulary) == 3
    assert found.without_vocabulary.is_planned
    two = World(facts, choices)
    enter(two)
    found = run(two, top=2)
    assert numbers(two, found.best) == [0, 2]


def test_of_equally_fast_ones_less_memory_is_first_by_three_digits_and_four_when_planned(enter):
    facts = [
        Facts(1.0, 1.0004, short=1.001, memory=3.0, short_bytes={"adamw": 3.0}),
        Facts(1.0, 1.0003, short=1.002, memory=2.0, short_bytes={"adamw": 2.0}),
        Facts(1.0, 1.0002, short=1.003, memory=5.0, short_bytes={"adamw": 1.0}),
        Facts(1.0, 1.002, short=1.0049, memory=1.0, short_bytes={"adamw": 4.0}),
    ]
    world = World(facts)
    enter(world)
    found = run(world, top=4)
    assert world.asked("plan") == [2, 1, 0, 3]
    assert numbers(world, found.best) == [1, 0, 2, 3]
    assert number_of(world, found.with_vocabulary) == 1, "three take 1.000 s"
    searching = _Search(
        CONFIG,
        Limits(4, 0.0, 10**9),
        lambda: True,
        len,
        Space(tuple(world.choices), Counter()),
        plans=False,
    )
    unplanned = searching.run()
    assert [number_of(world, one) for one in unplanned.estimated] == [0, 1, 2, 3]
    assert [one.memory for one in unplanned.estimated] == [3.0, 2.0, 1.0, 4.0]
    assert not any(one.is_planned for one in unplanned.estimated)
    assert unplanned.num_planned == 0


def test_the_first_row_that_is_planned_is_the_first_of_the_best(enter):
    """Times are close together, as are bytes, and most rows offload."""
    seen = Counter()
    for seed in range(1000):
        draw = random.Random(seed)
        facts, choices = [], []
        for number in range(6):
            part = draw.choice((0.0, 0.5, 1.0, 1.0))
            seconds = 27.14 * draw.choice((1.0, draw.uniform(0.999, 1.001)))
            seconds /= draw.choice((1.0, counted(choice_of(0, offload=part), 1.0)))
            one = Facts(1.0, seconds, memory=draw.choice((0.6, 0.605, 0.7)) * GIB)
            one.short_bytes["adamw"] = one.memory
            one.short = seconds * draw.choice((1.0, draw.uniform(0.98, 1.0)))
            one.host = one.planned_host = draw.choice((1.0, 1.01)) * GIB
            one.whole = draw.choice((1000, 10**10))
            facts.append(one)
            choices.append(choice_of(0, alike=number, offload=part))
        world = World(facts, choices)
        enter(world)
        effort = draw.choice((10**9, 1_200))
        found = run(world, top=draw.choice((1, 2, 3)), effort=effort)
        rows = search_words._rows(found)
        planned = [place for place, row in enumerate(rows) if row.found in found.best]
        shown = [place for place, row in enumerate(rows) if is_planned(row.found)]
        assert rows[planned[0]].found is found.best[0]
        assert planned[0] == shown[0]
        stays = any(not choice.offload for choice in choices) and effort > 1_200
        assert found.without_offloading or not stays, "what offloads takes no place of it"
        keys = [order_of(row.choice, row.found.seconds) for row in rows]
        assert keys == sorted(keys)
        seen["an estimate is faster"] += planned[0] > 0
        seen["a plan is added"] += len(shown) > len(planned)
        seen["they are as fast"] += len(set(keys)) < len(keys)
    assert min(seen.values()) >= 10, seen


def is_planned(found):
    return isinstance(found, Found) or found.is_planned


def test_what_is_planned_is_the_first_of_its_kind_before_an_estimate_that_is_about_as_fast(enter):
    facts = [
        Facts(1.0, 1.0009, memory=0.9 * GIB, short_bytes={"adamw": 0.3 * GIB}),
        Facts(1.0, 1.004, short_bytes={"adamw": 0.5 * GIB}, whole=10**10),
    ]
    world = World(facts)
    enter(world)
    found = run(world)
    assert world.asked("plan") == [0]
    assert number_of(world, found.with_vocabulary) == 0


def test_what_may_be_the_fastest_is_planned_behind_what_seems_as_fast_and_is_too_slow(enter):
    """Estimates are sorted by three digits: 1.0149 s with less memory comes before 1.0051 s."""
    facts = [
        Facts(0.5, 1.0),
        Facts(0.5, 1.0149, short_bytes={"adamw": 1.0}),
        Facts(0.5, 0.9975, short=1.0051, short_bytes={"adamw": 2.0}),
    ]
    world = World(facts)
    enter(world)
    found = run(world)
    assert world.asked("plan") == [0, 2]
    assert numbers(world, found.best) == [2]
    assert found.num_open == 0


def test_a_plan_is_made_if_it_takes_exactly_the_effort_that_is_left(enter):
    facts = [Facts(1.0, 1.0 + number / 10, whole=1000, least=0.0) for number in range(3)]
    needed = 3 * 4 + 3 * 24 + 3 * 100
    for effort, planned in (
        (10 * needed, [0, 1, 2]),
        (needed + 3000, [0, 1, 2]),
        (needed + 2999, [0, 1]),
        (needed + 2000, [0, 1]),
        (needed + 1999, [0]),
    ):
        world = World(facts)
        enter(world)
        found = run(world, top=3, effort=effort)
        assert world.asked("plan") == planned, effort
        assert numbers(world, found.best) == planned
        rest = [number_of(world, one) for one in found.estimated]
        assert rest == [number for number in range(3) if number not in planned]
        assert found.num_open == len(rest)
        assert found.ended == ("effort" if rest else "")


@pytest.mark.parametrize(
    ("fits", "effort", "simulated"),
    [(True, 1_000, 4), (True, 1_001, 5), (False, 1_000, 9), (False, 1_001, 10)],
)
def test_estimates_end_when_exactly_their_part_of_the_effort_is_spent(
    enter, fits, effort, simulated
):
    """Half where something fits, and all of it otherwise: 100 for weighing and for each."""
    short_bytes = {} if fits else {"adamw": 2.0 * GIB}
    facts = [Facts(1.0, 9.0, placed=100, stages=0, short_bytes=short_bytes) for _ in range(25)]
    world = World(facts)
    enter(world)
    searching = _Search(
        CONFIG,
        Limits(30, 0.0, effort),
        lambda: True,
        len,
        Space(tuple(world.choices), Counter()),
        plans=False,
    )
    assert searching.run().num_estimated == simulated
    assert searching._effort.spent == 100 * (1 + simulated)


def test_what_may_be_faster_than_the_last_of_the_best_is_open(enter):
    """Choices that were not looked at are open, and not those that equal it."""
    for bounds, num_open in (((3.0, 4.9), 2), ((3.0, 5.0), 1), ((5.0, 6.0), 0), ((0.5, 7.0), 1)):
        first, second = Facts(0.1, 1.0, least=0.0, whole=10), Facts(0.2, 5.0, whole=10)
        world = World([first, second, *(Facts(bound, 9.0) for bound in bounds)])
        enter(world)
        effort = 430  # of which two thirds are spent with the second estimate
        found = run(world, top=2, effort=effort)
        assert world.asked("short") == [0, 1]
        assert numbers(world, found.best) == [0, 1]
        assert (found.num_open, found.ended) == (num_open, "effort" if num_open else "")
        less = World([first, second, *(Facts(bound, 9.0) for bound in bounds)])
        enter(less)
        assert run(less, top=3, effort=effort).num_open == 2, "all, while best is not full"


@pytest.mark.parametrize(("last", "num_open"), [(6.05, 2), (6.07, 1)])
def test_an_estimate_that_may_be_faster_than_what_was_planned_is_open(enter, last, num_open):
    """Three plans are made after the effort, since they should be faster than the first."""
    facts = [
        Facts(0.7, 6.0, short=1.0, whole=9_000),
        *(Facts(0.5, 7.0, short=2.0 + place, whole=9_000) for place in range(3)),
        Facts(0.5, 5.5, whole=9_000),
        Facts(0.6, last, least=0.0, whole=9_000),
    ]
    world = World(facts)
    enter(world)
    found = run(world, effort=10_000)
    assert sorted(world.asked("short")) == [0, 1, 2, 3, 4, 5]
    assert world.asked("plan") == [0, 1, 2, 3]
    assert numbers(world, found.best) == [0], "a plan comes before an estimate"
    assert (found.num_open, found.ended) == (num_open, "effort")
    enter(world)
    found = run(world, effort=10_000, top=2)
    assert numbers(world, found.best) == [0]
    assert [number_of(world, one) for one in found.estimated] == [4], "it belongs among them"


def twins(*needs):
    """Return a world of equally fast choices of one split, whose plans need these bytes."""
    choices = [choice_of(0, alike=place, offload=1.0) for place in range(len(needs))]
    facts = [
        Facts(1.0, 2.0, memory=gpu, host=host, planned_host=host, short_bytes={"adamw": gpu})
        for gpu, host in needs
    ]
    return World(facts, choices)


def test_what_is_as_fast_as_another_of_its_split_and_needs_no_less_is_left_out(enter):
    for needs, expected in (
        (((10.0, 0.0), (10.0, 0.0), (10.1, 0.0)), [0]),
        (((10.0, 9.0), (10.1, 5.0), (10.0, 9.5)), [1]),
        (((10.0, 9.0), (10.3, 5.0), (10.3, 6.0)), [0, 1]),
    ):
        world = twins(*needs)
        enter(world)
        found = run(world, top=3)
        assert numbers(world, found.best) == expected, needs
        assert not found.estimated
        assert found.num_open == 0
    for other in (
        replace(world.choices[1], micro_batch_size=2),
        replace(world.choices[1], vocab="none"),
    ):
        world = twins((10.0, 0.0), (10.0, 0.0))
        world.facts[other] = world.facts.pop(world.choices[1])
        world.choices[1] = other
        enter(world)
        assert len(run(world, top=3).best) == 2


def world_of_one_split(seed):
    """Return a world of one split, whose choices are often as fast and as large as another."""
    draw = random.Random(seed)
    facts, choices = [], []
    for number in range(draw.randint(2, 8)):
        short = draw.choice([10.0, 10.004, 10.1, 10.2, 10.3])
        memory = draw.choice([0.5, 0.505, 0.52, 0.6, 1.1]) * GIB
        whole = short * draw.choice([1.0, 1.0, 0.995, 1.01, 1.03])
        larger = memory * draw.choice([1.0, 1.0, 1.01, 1.03])
        facts.append(Facts(1.0, whole, short=short, memory=larger, short_bytes={"adamw": memory}))
        choices.append(choice_of(0, alike=number, splits=draw.random() < 0.6))
    return World(facts, choices)


def test_in_random_worlds_of_one_split_the_first_is_about_the_fastest_of_all_that_fit(enter):
    """Estimates are at most 0.5 % too slow and 3 % too large; what looks like a plan is left out.

    So what is faster than the last row by more, and not shown, needs no less memory than a row that
    is about as fast.  Where the effort ends, something is planned.
    """
    for seed in range(200):
        world, top = world_of_one_split(seed), seed % 3 + 1
        enter(world)
        found = run(world, top=top, effort=10**9 if seed % 4 else 2_000)
        fitting = {choice: one for choice, one in world.facts.items() if fits(one)}
        assert bool(found.best) == bool(fitting), seed
        if found.ended:
            assert found.num_open, seed
            continue
        rows = [
            (plan.report.step_seconds, memory_of(plan), plan.choice.vocab) for plan in found.best
        ]
        last = rows[-1][0] if len(rows) == top else float("inf")
        for choice, one in fitting.items():
            about, least = one.seconds * (1 + SAME) / 0.995, one.memory * 1.03 * 1.0201
            assert rows[0][0] <= about, (seed, choice)
            assert about >= last or any(
                seconds <= about and memory <= least and vocab == choice.vocab
                for seconds, memory, vocab in rows
            ), (seed, choice)


def test_only_the_first_is_planned_without_time(enter):
    facts = [Facts(1.0, 1.0 + number / 10) for number in range(4)]
    for left in range(12):
        clock = iter([True] * left + [False] * 99)
        world = World(facts)
        enter(world)
        found = run(world, top=4, in_time=clock.__next__)
        assert len(world.asked("weigh")) == 4
        assert world.asked("plan"), left
        assert found.num_planned + found.num_open == 4
        assert found.ended == ("" if found.num_planned == 4 else "time")
        assert len(found.best) + len(found.estimated) == len(world.asked("short"))


@pytest.mark.parametrize(("answers", "weighed"), [(0, 128), (1, 256), (2, 300)])
def test_out_of_time_a_random_part_of_the_choices_is_weighed(enter, answers, weighed):
    world = World([Facts(1.0 + number, 9.0 + number) for number in range(300)])
    enter(world)
    said = []
    found = run(world, in_time=iter([True] * answers + [False] * 99).__next__, said=said)
    assert len(set(world.asked("weigh"))) == len(world.asked("weigh")) == weighed
    assert sum(number < 150 for number in world.asked("weigh")) < 0.65 * weighed
    assert (found.num_estimated, found.num_planned, found.ended) == (1, 1, "time")
    (plan,) = numbers(world, found.best)
    faster = sum(1.0 + n < 9.0 + plan for n in world.asked("weigh") if n != plan)
    assert found.num_open == 300 - weighed + faster
    counts = [f"{place} of 300 choices weighed" for place in (0, 128, 256) if place <= weighed]
    assert said[: len(counts)] == counts
    assert said[len(counts)] == f"1 simulated; the best takes about {9.0 + plan:.2f} s"
    assert said[-1] == f"1 simulated, 1 planned; the best takes about {9.0 + plan:.2f} s"


def test_no_choice_is_weighed_in_vain_and_time_ends_nothing_before_one_was_not_refused(enter):
    """Weighing without time goes on until something is left to estimate."""
    facts = [Facts(1.0, 1.0) for _ in range(300)]
    for one in facts[:299]:
        one.fails["weigh"] = ConfigError("it cannot be")
    world = World(facts)
    enter(world)
    found = run(world, in_time=lambda: False)
    assert numbers(world, found.best) == [299]
    assert found.excluded == {"it cannot be": found.num_choices - 1 - found.num_open}


def test_a_margin_counts_for_estimates_and_for_plans_to_the_byte(enter):
    least = 0.75 * GIB
    facts = [
        Facts(1.0, 3.0, memory=least, short_bytes={"adamw": least}),
        Facts(1.0, 2.0, memory=least + 1),
        Facts(1.0, 1.0, short_bytes={"adamw": least + 1}),
    ]
    world = World(facts)
    made = enter(world)
    found = run(world, top=3, margin=0.25)
    assert made == [(least, (ADAMW,))]
    assert numbers(world, found.best) == [0]
    refused = {world.choices.index(one.choice): one for one in found.refused}
    assert sorted(refused) == [1, 2]
    assert [refused[n].needs for n in (1, 2)] == [least + 1, least + 1]
    assert [refused[n].bound for n in (1, 2)] == [2.0, 1.0]
    assert "on rank 1" in refused[1].reason
    assert found.excluded == {f"memory, for {SIMULATED}": 2}


def test_the_fastest_optimizer_that_fits_is_taken(enter):
    """A refusal says the memory of a rank if that is too little, else that of the hosts."""
    config = replace(CONFIG, cluster=replace(CONFIG.cluster, host_memory_gib=2.0))
    large = {"adamw": 3.0 * GIB, "zero1": 2.0 * GIB}
    every = (ADAMW, ZERO1, OFFLOAD)
    after = {"adamw": 3.0, "zero1": 1.0, "offload": 2.0}
    cases = [
        (every, {}, 0.0, "zero1"),
        (every, {"zero1": 1.1 * GIB}, 0.0, "offload"),
        (every, large, 2.0 * GIB, "offload"),
        (every, large, 2.0 * GIB + 1, "needs 2.00 GiB on rank 1, 1.00 GiB more than"),
        (every[::-1], large, 2.0 * GIB + 1, "needs 3.00 GiB on rank 1, 2.00 GiB more than"),
        (
            (OFFLOAD,),
            {},
            2.0 * GIB + 1,
            "host memory, of which a node may use 2 GiB (cluster.host_memory_gib)",
        ),
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
            assert (refusal.needs is None) == expected.startswith("host")


def test_hosts_are_asked_only_where_something_is_kept_there_and_their_memory_is_known(enter):
    moved = choice_of(1, offload=0.5)
    for gib, choice, optim, fits in (
        (2.0, moved, ADAMW, False),
        (2.0, choice_of(1), OFFLOAD, False),
        (2.0, choice_of(1), ADAMW, True),
        (None, moved, OFFLOAD, True),
    ):
        config = replace(CONFIG, cluster=replace(CONFIG.cluster, host_memory_gib=gib))
        world = World([Facts(1.0, 1.0, host=3.0 * GIB, optimizers=(optim,))], [choice])
        enter(world)
        found = run(world, config=config)
        assert bool(found.best) is fits, (gib, choice, optim)
    for excess, fits in ((0.0, True), (1.0, False)):
        world = World([Facts(1.0, 4.0, planned_host=3.0 * GIB + excess), Facts(5.0, 5.0)])
        enter(world)
        cluster = replace(config.cluster, host_memory_gib=4)
        found = run(world, config=replace(config, cluster=cluster), margin=0.25)
        assert numbers(world, found.best) == [0 if fits else 1]
        if not fits:
            (refusal,) = found.refused
            words = "host memory, of which a node may use 3 GiB (cluster.host_memory_gib)"
            assert (refusal.reason, refusal.bound, refusal.needs) == (words, 4.0, None)
            assert refusal.host_needs == 3.0 * GIB + 1
            assert found.excluded == {words: 1}
            assert not found.estimated


def offloading_world(base, others, *, best=10.0):
    """Return a world of base choices and of what offloads in their place.

    others: facts by (number of the base choice, recompute, part).
    """
    choices, facts = [], []
    for number, recompute, fact in base:
        choices.append(choice_of(number, recompute=recompute))
        facts.append(fact)
    for (number, recompute, part), fact in others.items():
        choices.append(choice_of(number, recompute=recompute, offload=part))
        facts.append(fact)
    return World(facts, choices)


GPU = replace(CONFIG, run=replace(CONFIG.run, device="cuda"))


def run_offloading(world, num_base, *, top=1, effort=10**9, config=GPU, kept=None, in_time=None):
    kept = {} if kept is None else {"kept": kept}
    space = Space(tuple(world.choices[:num_base]), Counter(), None, **kept)
    in_time = in_time or (lambda: True)
    return search(config, Limits(top, 0.0, effort), in_time, lambda words: None, space)


def test_what_recomputes_is_tried_with_offloaded_activations_in_its_place(enter):
    """Offloading delays nothing, so what takes long without it is not simulated again."""
    large = {"adamw": GIB + 1.0}
    base = [(0, "selective", Facts(10.0, 10.0)), (1, "none", Facts(1.0, 9.5, short_bytes=large))]
    others = {
        (0, "none", 0.5): Facts(1.0, 6.0, drafted=5.0),
        (0, "none", 1.0): Facts(2.0, 6.0, least=GIB + 1.0),
        (0, "selective", 0.5): Facts(3.0, 10.0, drafted=10.0),
        (0, "selective", 1.0): Facts(10.0, 10.0),
        (1, "none", 0.5): Facts(4.0, 9.5, least=float(GIB)),
        (1, "none", 1.0): Facts(0.5, 9.5, short_bytes={"adamw": GIB + 5.0}),
    }
    world = offloading_world(base, others)
    enter(world)
    found = run_offloading(world, 2)
    begin = world.log.index(("weigh", 2))
    assert sorted(world.asked("weigh")) == list(range(8))
    rest = [event for event in world.log[begin:] if event[0] not in ("weigh", "unknown")]
    assert rest == [
        *(("draft", 2), ("draft", 4), ("draft", 7), ("short", 2), ("plan", 2), ("plan", 0)),
    ]
    assert numbers(world, found.best) == [2]
    assert number_of(world, found.with_vocabulary) == 2
    assert found.best[0].choice.offload == 0.5
    assert found.num_choices == 2 + 4
    assert found.num_open == 0
    refused = {world.choices.index(one.choice): (one.bound, one.needs) for one in found.refused}
    assert refused == {1: (1.0, GIB + 1.0)}


@pytest.mark.parametrize("number", [0, 2, 4, 6])
def test_of_what_needs_too_much_more_stages_recompute_while_it_may_be_the_fastest(enter, number):
    """At most four times beside offloading.  What more would give is never simulated."""
    large = {"adamw": GIB + 1.0}
    facts = [Facts(10.0, 10.0)]
    facts += [Facts(1.0 + n, 9.0, short_bytes=large, more=n + 1) for n in range(1, 8)]
    facts[number + 1] = Facts(3.0, 5.0) if number else Facts(10.0, 10.0)
    world = World(facts, [choice_of(n, offload=float(n > 0)) for n in range(len(facts))])
    enter(world)
    found = run(world, first=2)
    is_found = number in (2, 4)
    assert numbers(world, found.best) == [number + 1 if is_found else 0]
    tried = {0: [], 2: [1, 2, 3], 4: [1, 2, 3, 4, 5], 6: [1, 2, 3, 4, 5]}
    assert [n for n in world.asked("short") if n] == tried[number]


@pytest.mark.parametrize(
    ("last", "best", "tried"),
    [
        (Facts(4.0, 7.0), 4, [1, 2, 3, 4]),
        (Facts(4.0, 8.5), 3, [1, 2, 3, 4]),
        (Facts(4.0, 7.0, short_bytes={"adamw": GIB + 1.0}), 3, [1, 2, 3, 4]),
        (Facts(10.5, 10.5), 3, [1, 2, 3]),
    ],
)
def test_of_what_fits_fewer_stages_recompute_while_that_is_faster(enter, last, best, tried):
    """What cannot be the fastest of its kind is not simulated."""
    facts = [Facts(10.0, 10.0), Facts(1.0, 9.0, short_bytes={"adamw": GIB + 1.0}, more=2)]
    facts += [Facts(2.0, 9.0, fewer=3), Facts(3.0, 8.0, fewer=4), last]
    world = World(facts)
    enter(world)
    found = run(world, first=2)
    assert numbers(world, found.best) == [best]
    assert [n for n in world.asked("short") if n] == tried


def test_single_stages_recompute_more_in_what_almost_fits_and_less_in_the_best(enter):
    """The lowest bound comes first, and what is no faster than the best is not simulated."""
    missing, far_too_large = ({"adamw": part * GIB} for part in (1.05, 1.2))
    facts = [
        *(Facts(10.0, 10.0, less=(4,)), Facts(5.0, 5.0, short_bytes=missing, most=(5, 6, 7, 3))),
        Facts(1.0, 1.0, short_bytes=far_too_large, most=(9,)),
        *(Facts(5.0, 9.0, short_bytes=missing), Facts(9.0, 9.5)),
        *(Facts(8.0, 9.0), Facts(6.0, 8.0, less=(8,)), Facts(7.0, 7.5)),
        *(Facts(5.5, 7.0, less=(9,)), Facts(7.0, 1.0)),
    ]
    world = World(facts)
    enter(world)
    found = run(world, first=3)
    assert numbers(world, found.best) == [8]
    assert world.asked("short") == [0, 2, 1, 4, 3, 6, 8]


@pytest.mark.parametrize(("needs", "tried"), [(1.04, [0, 1, 2, 4]), (1.05, [0, 1, 2, 3, 4])])
def test_stages_recompute_more_one_by_one_where_that_helps_the_rank_that_needs_most(
    enter, needs, tried
):
    """Else the next dearer stage comes first."""
    missing = [{"short_bytes": {"adamw": part * GIB}} for part in (1.05, needs)]
    facts = [Facts(10.0, 10.0), Facts(5.0, 5.0, **missing[0], most=(2, 3))]
    facts += [Facts(6.0, 6.0, **missing[1], most=(4,)), Facts(7.0, 7.0), Facts(6.5, 6.5)]
    world = World(facts)
    enter(world)
    found = run(world, first=2)
    assert world.asked("short") == tried
    assert numbers(world, found.best) == [4]


def test_stages_of_the_rank_that_needs_most_recompute_first_and_one_rank_after_the_other(enter):
    """As many bytes on fewer ranks are a step forward: the search counts the last of these."""
    missing = {"short_bytes": {"adamw": 1.05 * GIB}}
    facts = [Facts(10.0, 10.0), Facts(5.0, 5.0, **missing, rank=3, most=(2, 3), on_rank=(3,))]
    facts += [Facts(5.5, 8.5), Facts(6.0, 6.0, **missing, rank=2, most=(4, 5), on_rank=(5,))]
    facts += [Facts(6.5, 9.0), Facts(7.0, 8.0)]
    world = World(facts)
    enter(world)
    found = run(world, first=2)
    assert world.asked("short") == [0, 1, 3, 5, 2, 4]
    assert numbers(world, found.best) == [5]


def test_a_stage_more_recomputes_where_only_a_slower_optimizer_fits(enter):
    optimizers, after = (ADAMW, OFFLOAD), {"offload": 4.0}
    facts = [Facts(10.0, 10.0)]
    for number, (bound, part) in enumerate(((5.0, 1.05), (5.5, 1.04), (6.0, 0.9)), start=1):
        sizes = {"adamw": part * GIB, "offload": 0.5 * GIB}
        one = Facts(bound, bound, short_bytes=sizes, optimizers=optimizers, after=after)
        one.most = (number + 1,) if number < 3 else ()
        facts.append(one)
    world = World(facts)
    enter(world)
    found = run(world, first=2)
    assert world.asked("short") == [0, 1, 2, 3]
    assert numbers(world, found.best) == [3]


def test_single_stages_recompute_more_in_what_only_a_whole_step_shows_to_need_too_much(enter):
    facts = [Facts(10.0, 10.0), Facts(5.0, 5.0, memory=1.05 * GIB, most=(2,)), Facts(6.0, 6.5)]
    world = World(facts)
    enter(world)
    found = run(world, first=2)
    assert numbers(world, found.best) == [2]


def test_single_stages_take_three_twentieths_of_the_effort_of_a_whole_search(enter):
    """Their drafts are dear, and four choices almost fit."""
    missing = {"short_bytes": {"adamw": 1.05 * GIB}, "stages": 100}
    facts = [Facts(20.0, 20.0)]
    facts += [Facts(9.0 + n / 100, 9.0, **missing, most=tuple(range(5, 45))) for n in range(4)]
    facts += [Facts(30.0, 30.0, **missing) for _ in range(40)]
    world = World(facts)
    world.choices, others = world.choices[:5], world.choices[5:]
    enter(world)
    world.choices += others
    space = Space(tuple(world.choices[:5]), Counter(), (ADAMW,))
    search(CONFIG, Limits(1, 0.0, 200_000), lambda: True, lambda words: None, space)
    drafted = sum(number >= 5 for number in world.asked("draft"))
    assert 10_000 < drafted * 12 * 100 <= 30_000 + 4 * 12 * 100


def test_a_stage_does_not_recompute_otherwise_where_that_is_kept(enter):
    facts = [Facts(10.0, 10.0, less=(1, 2)), Facts(5.0, 5.0), Facts(6.0, 6.0)]
    choices = [choice_of(0, recompute="full"), choice_of(1), choice_of(2, recompute="full")]
    world = World(facts, choices)
    world.choices, others = world.choices[:1], world.choices[1:]
    enter(world)
    world.choices += others
    kept = Kept({"parallel.recompute": "full"})
    space = Space(tuple(world.choices[:1]), Counter(), (ADAMW,), kept)
    found = search(CONFIG, Limits(1, 0.0, 10**9), lambda: True, lambda words: None, space)
    assert numbers(world, found.best) == [2]
    assert 1 not in world.asked("draft")


def test_what_becomes_likelier_to_fit_has_its_turn_again(enter):
    """The first that is simulated needs far more than expected, and another alike hardly more."""
    both = {"optimizers": (ADAMW, OFFLOAD), "after": {"offload": 8.0}}
    one = replace(choice_of(0), offload=1.0)
    choices = [*(replace(one, num_microbatches=number) for number in (1, 2, 3)), choice_of(3)]
    much, hardly = {"adamw": 1.6 * GIB, "offload": GIB}, {"adamw": 0.95 * GIB, "offload": 0.2 * GIB}
    facts = [
        Facts(1.0, 1.0, short_bytes=much, unexpected=0.7 * GIB, **both),  # takes 9 seconds
        Facts(8.5, 9.5, short_bytes=hardly, unexpected=0.05 * GIB),
        Facts(2.0, 2.0, short_bytes=hardly, unexpected=0.05 * GIB, **both),  # seems to take 10
        Facts(9.8, 9.8),
    ]
    world = World(facts, choices)
    enter(world)
    assert numbers(world, run(world).best) == [2]
    # Nothing without offloading is known before the last one.
    assert world.asked("short") == [0, 3, 1, 2]


def test_what_is_alike_is_expected_to_need_as_much_more(enter):
    """It is then slower with an optimizer that fits, and where none does others come first."""
    large = {"adamw": 1.5 * GIB, "offload": 0.8 * GIB}
    both = {"optimizers": (ADAMW, OFFLOAD), "after": {"offload": 8.0}, "unexpected": 0.6 * GIB}
    one = replace(choice_of(0), offload=1.0)
    choices = [
        *(replace(one, num_microbatches=number) for number in (1, 2, 3)),
        *(choice_of(3), replace(one, num_microbatches=4, recompute="full"), choice_of(5)),
    ]
    facts = [
        Facts(1.0, 1.0, short_bytes=large, **both),
        Facts(1.5, 1.5, short_bytes=large, **both),
        Facts(2.0, 2.0, short_bytes={"adamw": 1.9 * GIB}, unexpected=0.6 * GIB),
        *(Facts(2.5, 2.6), Facts(2.4, 3.0, short_bytes=large, **both), Facts(3.5, 3.5)),
    ]
    world = World(facts, choices)
    enter(world)
    found = run(world)
    assert numbers(world, found.best) == [3]
    assert world.asked("short") == [0, 4, 3, 2]


@pytest.mark.parametrize(
    ("schedule", "order"),
    [
        ("zb_h1", [("short", 0), ("plan", 0), ("short", 1), ("short", 2), ("plan", 1)]),
        ("1f1b", [("short", 0), ("short", 2), ("plan", 0), ("short", 1), ("plan", 1)]),
    ],
)
def test_the_best_with_a_split_backward_is_planned_before_it_rules_out_others(
    enter, schedule, order
):
    """What is next to the best, and beyond the space, has its turn only then."""
    choices = [replace(choice_of(0), schedule=schedule), choice_of(1), choice_of(2)]
    world = World([Facts(1.0, 4.0, short=2.0), Facts(2.5, 3.0), Facts(1.5, 5.0)], choices)
    world.near = {0: (2,), 1: (2,)}
    enter(world)
    space = Space(tuple(choices[:2]), Counter(), (ADAMW,))
    found = search(CONFIG, Limits(1, 0.0, 10**9), lambda: True, lambda words: None, space)
    assert numbers(world, found.best) == [1]
    assert [one for one in world.log if one[0] in ("short", "plan")] == order


@pytest.mark.parametrize("stage", ["weigh", "short", "doubtful"])
def test_what_memory_alone_rules_out_is_offloaded_though_the_best_recomputes_nothing(enter, stage):
    """A leaner schedule may be the best only because of memory.  Each kind has its own best."""
    large = TooLargeError(2.0 * GIB, GIB, LEANEST)
    fails = {"fails": {"weigh": large}} if stage == "weigh" else {}
    fails = {"short_bytes": {"adamw": GIB + 1.0}} if stage != "weigh" else fails
    fails["seems_to_fit"] = stage != "doubtful"  # so it is not simulated before
    dear = {"stages": 1000 if stage == "doubtful" else 1, "placed": 10_000, "whole": 10}
    choices = [
        *(choice_of(0), choice_of(1, splits=False), choice_of(2), choice_of(3, splits=False)),
        *(choice_of(2, offload=0.5), choice_of(2, offload=1.0)),
        *(choice_of(3, splits=False, offload=0.5), choice_of(3, splits=False, offload=1.0)),
    ]
    facts = [
        *(Facts(10.0, 10.0, **dear), Facts(8.0, 8.0, **dear)),
        *(Facts(5.0, 5.0, **fails), Facts(4.0, 4.0, **fails)),
        *(Facts(10.0, 1.0), Facts(9.0, 9.5, whole=10)),
        *(Facts(6.0, 7.0, whole=10), Facts(8.0, 1.0)),
    ]
    world = World(facts, choices)
    enter(world)
    found = run_offloading(world, 4, effort=100_000)
    assert numbers(world, found.best) == [6]
    assert number_of(world, found.with_vocabulary) == 5
    assert set(world.asked("draft")) <= {0, 1, 2, 3, 5, 6}, "others cannot be the best of a kind"


def test_what_fits_with_an_optimizer_on_hosts_only_is_tried_with_offloaded_activations(enter):
    """Its bound has the time of that optimizer, so it would not be looked at otherwise."""
    base = [(0, "none", Facts(10.0, 10.0)), (1, "none", Facts(20.0, 20.0))]
    others = {
        (n, "none", part): Facts(6.0 - part, 7.0 - part) for n in (0, 1) for part in (0.5, 1.0)
    }
    for optimizer, found in ((ADAMW, 0), (OFFLOAD, 5)):
        world = offloading_world(base, others)
        weigh = world.weigh

        def weighed(choice, weigh=weigh, world=world, optimizer=optimizer):
            weight = weigh(choice)
            own = optimizer if world.choices.index(choice) == 1 else ADAMW
            return replace(weight, optimizer=own)

        world.weigh = weighed
        enter(world)
        assert numbers(world, run_offloading(world, 2).best) == [found]


@pytest.mark.parametrize("reason", ["device", "best", "kept", "time"])
def test_nothing_offloads_where_memory_does_not_bind_or_it_must_not(enter, reason):
    recompute = "none" if reason == "best" else "full"
    base = [(0, recompute, Facts(10.0, 10.0)), (1, "none", Facts(9.0, 9.0, memory=2.0 * GIB))]
    kinds = ("none", "selective", "full")
    others = {(0, kind, part): Facts(1.0, 1.0) for kind in kinds for part in (0.5, 1.0)}
    others |= {(1, "none", part): Facts(1.0, 1.0) for part in (0.5, 1.0)}
    world = offloading_world(base, others)
    enter(world)
    found = run_offloading(
        world,
        2,
        config=CONFIG if reason == "device" else GPU,
        kept=Kept({"parallel.offload_activations": 0.0}) if reason == "kept" else None,
        in_time=(lambda: False) if reason == "time" else None,
    )
    assert numbers(world, found.best) == [0]
    assert sorted(world.asked("weigh")) == [0, 1]
    assert found.num_choices == 2


def test_all_that_memory_refused_is_tried_with_offloading(enter):
    """Also what recomputes everything, and where other plans fit."""
    large = TooLargeError(2.0 * GIB, GIB, LEANEST)
    for fits in (True, False):
        base = [
            (0, "full", Facts(1.0, 1.0, fails={"weigh": large})),
            (1, "none", Facts(1.0, 1.0, fails={"weigh": ConfigError("it cannot be")})),
        ]
        if fits:
            base.append((2, "full", Facts(30.0, 30.0)))
        others = {}
        for number, *_ in base:
            for kind in ("none", "selective", "full"):
                for part in (0.5, 1.0):
                    one = Facts(2.0 + number, 5.0 + number)
                    if (number, kind, part) != (0, "full", 1.0):
                        one.fails["weigh"] = ConfigError("no")
                    others[number, kind, part] = one
        world = offloading_world(base, others)
        enter(world)
        found = run_offloading(world, len(base))
        names = [(plan.choice.recompute, plan.choice.offload) for plan in found.best]
        assert names == [("full", 1.0)]
        tried = {world.choices[n].micro_batch_size - 1 for n in world.asked("weigh")[len(base) :]}
        assert tried == ({0, 2} if fits else {0})
        assert found.num_choices == len(base) + 1


@pytest.mark.parametrize("effort", [10**6, 5_000, 3_000])
def test_offloading_takes_three_tenths_of_the_effort_or_what_is_left_for_estimates(
    enter, effort, monkeypatch
):
    """A schedule whose activations are offloaded takes three times the effort of others."""
    monkeypatch.setattr(_Search, "_look_around", lambda self: None)
    large = TooLargeError(2.0 * GIB, GIB, LEANEST)
    base = [(0, "full", Facts(10.0, 10.0, whole=10))]
    base += [(n, "none", Facts(1.0, 1.0, fails={"weigh": large})) for n in range(1, 8)]
    keys = [(n, "none", part) for n in range(8) for part in (0.5, 1.0)]
    others = {key: Facts(7.0 + key[0] / 100, 8.0 - key[0] / 100, whole=10) for key in keys}
    others |= {(0, k, part): Facts(99.0, 9.0) for k in ("selective", "full") for part in (0.5, 1.0)}
    world = offloading_world(base, others)
    enter(world)
    run_offloading(world, 8, effort=effort)
    spent, events, begins = 0, [], 0
    for what, number in world.log[: world.log.index(("plan", world.asked("plan")[0]))]:
        spent += world.effort_of(what, number) * (3 if what == "short" and number >= 8 else 1)
        events.append((spent, number))
        if what == "weigh":
            begins = spent
    tried = {number for number in world.asked("short") if number >= 8}
    enough = max(0.5 * effort, begins + 0.3 * effort)
    assert events[-2][0] < enough
    assert spent >= enough or len(tried) == 8, "the other part takes as long"
    assert (len(tried) == 8) == (effort > 5_000)


@pytest.mark.parametrize(("short", "is_planned"), [(9.9, True), (10.05, True), (10.2, False)])
def test_what_offloads_is_planned_if_it_may_be_faster_than_the_last_of_the_best(
    enter, short, is_planned
):
    """A plan may take a hundredth less than its estimate."""
    kinds = ("none", "selective", "full")
    others = {(0, kind, part): Facts(10.0, 1.0) for kind in kinds for part in (0.5, 1.0)} | {
        (0, "none", 0.5): Facts(5.0, 9.0, drafted=6.0, short=short)
    }
    world = offloading_world([(0, "full", Facts(10.0, 10.0))], others)
    enter(world)
    found = run_offloading(world, 1)
    assert world.asked("short") == [0, 1]
    assert world.asked("plan") == ([1, 0] if short < 10 else [0, 1] if is_planned else [0])
    assert numbers(world, found.best) == [1 if is_planned else 0]
    assert number_of(world, found.with_vocabulary) == (1 if is_planned else 0)


@pytest.mark.parametrize(("seconds", "is_first"), [(9.951, False), (9.949, True)])
def test_what_offloads_is_preferred_if_it_is_half_a_percent_faster(enter, seconds, is_first):
    kinds = ("none", "selective", "full")
    others = {(0, kind, part): Facts(10.0, 1.0) for kind in kinds for part in (0.5, 1.0)} | {
        (0, "none", 0.5): Facts(5.0, seconds, memory=1.0)
    }
    world = offloading_world([(0, "full", Facts(10.0, 10.0))], others)
    enter(world)
    found = run_offloading(world, 1, top=2)
    assert numbers(world, found.best) == ([1, 0] if is_first else [0, 1])
    assert found.num_open == 0


def balanced_world(*pairs):
    """Return a world of facts of choices without vocab.balance and, where it has them, with it."""
    choices = [choice_of(number) for number in range(len(pairs))]
    with_it = {n: replace(choices[n], balance=True) for n, (_, two) in enumerate(pairs) if two}
    facts = [*(one for one, _ in pairs), *(pairs[n][1] for n in with_it)]
    return World(facts, [*choices, *with_it.values()])


def test_rows_are_balanced_in_the_place_of_equal_ones_where_that_is_faster(enter):
    """Two bounds say what it may save, at least a fifth of a percent, and a short step whether."""
    world = balanced_world(
        (Facts(10.0, 10.0, least=0.0), Facts(9.0, 9.5)),
        (Facts(9.7, 9.8), Facts(9.6, 9.79)),
        (Facts(9.65, 9.9), Facts(9.633, 9.0)),
        (Facts(9.75, 9.85), None),
    )
    enter(world)
    found = run_offloading(world, 4, top=4, config=CONFIG)
    assert sorted(world.asked("draft")) == [0, 1, 2, 3, 4, 5, 6]
    assert world.asked("short")[4:] == [4, 5], "what may save most comes first"
    assert numbers(world, found.best) == [4, 1, 3, 2]
    assert found.best[0].choice.overrides(CONFIG).split()[-1] == "vocab.balance=true"
    assert number_of(world, found.with_vocabulary) == 4
    kept = Kept({"vocab.balance": False})
    found = run_offloading(world, 4, top=4, config=CONFIG, kept=kept)
    assert not any(plan.choice.balance for plan in found.best)


@pytest.mark.parametrize(
    ("num_layers", "even", "best"),
    [
        (8, Facts(7.0, 12.0, drafted=12.0), 1),
        (7, Facts(7.0, 12.0, drafted=12.0), 2),
        (7, Facts(7.0, 12.0, fails={"draft": TooLargeError(2.0 * GIB, GIB, LEANEST)}), 2),
        (7, Facts(7.0, 10.5, drafted=9.1), 1),
        (7, Facts(7.0, 12.0, drafted=12.0, vocabulary=0.1), 1),
    ],
)
def test_where_ranks_have_other_numbers_of_layers_rows_are_balanced_at_once(
    enter, num_layers, even, best
):
    """They must save two percent, or let a choice fit; else they have to seem best."""
    world = balanced_world(
        (even, Facts(7.0, 9.0, drafted=9.0)), (Facts(8.0, 10.0, least=0.0), None)
    )
    enter(world)
    config = replace(CONFIG, model=replace(CONFIG.model, num_layers=num_layers))
    choices = world.choices[:2]
    space = Space(tuple(choices), Counter(), (ADAMW,))
    found = search(config, Limits(1, 0.0, 10**9), lambda: True, lambda words: None, space)
    assert numbers(world, found.best) == [best]


def test_what_is_balanced_and_does_not_fit_when_it_is_planned_gives_its_place_back(enter):
    world = balanced_world((Facts(10.0, 10.0), Facts(9.0, 9.5, memory=2.0 * GIB)))
    enter(world)
    found = run_offloading(world, 1, config=CONFIG)
    assert world.asked("plan") == [1, 0]
    assert numbers(world, found.best) == [0]
    assert number_of(world, found.with_vocabulary) == 0


def test_balanced_rows_take_a_tenth_of_the_effort(enter):
    pairs = [(Facts(10.0, 10.0, placed=10, whole=10), Facts(9.0, 9.9)) for _ in range(9)]
    world = balanced_world(*pairs)
    enter(world)
    run_offloading(world, 9, top=9, effort=3_000, config=CONFIG)
    assert world.asked("short")[9:] == [9, 10, 11], "three of 100 each are a tenth"
    assert run_offloading(world, 9, top=9, config=CONFIG).best[-1].choice.balance


def test_offloading_ends_with_the_time(enter):
    large = TooLargeError(2.0 * GIB, GIB, LEANEST)
    base = [(0, "full", Facts(10.0, 10.0))]
    base += [(n, "full", Facts(1.0, 1.0, fails={"weigh": large})) for n in (1, 2)]
    others = {(n, "full", part): Facts(10.0, 10.0) for n in range(3) for part in (0.5, 1.0)}
    for index, (n, kind) in enumerate((n, k) for n in range(3) for k in ("none", "selective")):
        facts = Facts(7.0 + index / 100, 8.0 - index / 100)
        others |= {(n, kind, part): facts for part in (0.5, 1.0)}
    counts = []
    for left in range(30):
        world = offloading_world(base, others)
        enter(world)
        clock = iter([True] * left + [False] * 99)
        found = run_offloading(world, 3, in_time=clock.__next__)
        assert len(found.best) == 1
        short = [number for number in world.asked("short") if number >= 3]
        planned = [number for number in world.asked("plan") if number >= 3]
        counts.append((len(short), len(planned)))
    assert counts == sorted(counts)
    assert [count for count, _ in counts].count(6) > 1
    assert {planned for _, planned in counts} == {0, 1}


def test_a_choice_that_fits_is_one_whose_stages_all_recompute_most(enter, monkeypatch):
    """The choice need not be the first one, and the recomputation counts that is kept."""
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
    world.facts[choices[3]].fails["draft"] = ConfigError("needs more than it weighs")
    made = enter(world)
    space = Space(tuple(choices), Counter(), (ZERO1,))
    monkeypatch.setattr(search_module, "space_of", lambda config, kept: space)
    assert fits_on(CONFIG, 0.5) == choices[4]
    assert made == [(0.5 * GIB, (ZERO1,))]
    assert (world.asked("weigh"), world.asked("draft")) == ([2, 3, 4], [3, 4])
    assert fits_on(CONFIG, 0.5, Kept({"parallel.recompute": "selective"})) == choices[1]
    for facts in world.facts.values():
        facts.fails["weigh"] = ConfigError("no")
    assert fits_on(CONFIG, 0.5) is None


def problem_of(layout, count, vocab="one_barrier", *, split=False):
    return Problem(layout, count, VOCAB_ALGORITHMS[vocab], split)


def test_a_short_step_fills_the_pipeline_and_another_is_longer_by_turns_of_the_ranks():
    """A step that is no longer is taken itself, and what is left after full turns stays left.

    Where the backward is split, a third one is worth it for a step twice as long.
    """
    for ranks, vocab, split, fill, more in (
        *((ranks, "one_barrier", False, fill, ranks) for ranks, fill in ((1, 8), (2, 8), (3, 9))),
        *((ranks, "one_barrier", False, fill, ranks) for ranks, fill in ((15, 30), (16, 16))),
        (16, "two_barrier", False, 32, 16),
        (2, "none", True, 8, 16),
        (8, "none", True, 16, 16),
        (16, "none", True, 32, 32),
    ):
        layout = Layout("linear", ranks)
        for rest in {0, ranks // 2}:
            short, third = (fill + rest, fill + rest + more), fill + rest + 3 * more
            enough = rest - (rest - 2 * third) // ranks * ranks
            for count, expected in (
                (short[1], short[1:]),
                (short[1] - ranks, (short[1] - ranks,)),
                (short[1] + ranks, short),
                (rest + 200 * ranks, short),
                (enough - ranks, short),
                (enough, short),
            ):
                problem = problem_of(layout, count, vocab, split=split)
                assert short_module.short_counts(problem) == expected, problem
                expected_third = third if split and count >= enough else None
                assert short_module._third_count(problem, expected) == expected_third
                assert short_module.placed_by_short(problem) == sum(
                    short_module.placed_by(
                        replace(problem, num_microbatches=one),
                        int(one * min(120_000 / count, 36_000 / expected[-1])),
                    )
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
        for effort in (3 * n - 1, 3 * n, 3 * n + 3, n - 1, n, 2 * n, 5 * n, 6 * n, 80 * n):
            found = short_module.placed_by(problem, effort)
            if split:
                tries = 2 if n < effort // 3 else 1
                assert found == 2 * n + tries * (n + max(2 * n, min(effort // 2, 32 * n)))
            else:
                assert found == n * (2 + min(5, max(1, effort // n)))
        whole = short_module.placed_by(problem, 120_000)
        assert short_module.placed_by(problem) == whole


@dataclass(frozen=True)
class _Step:
    schedule: tuple
    timeline: object


def draft_of(problem):
    return SimpleNamespace(problem=problem, cost="cost", with_timeline=_Step)


@pytest.mark.parametrize("busiest", [0.5, 2.0])
@pytest.mark.parametrize("count", [12, 100])
def test_the_time_of_a_long_step_follows_from_two_short_ones(monkeypatch, count, busiest):
    """Every microbatch more takes what it took in the second, or the work of the busiest rank."""
    draft = draft_of(problem_of(Layout("linear", 4), count))
    lasts, num_orders = {8: 20.0, 12: 25.0}, 5 if count == 100 else 3

    def shortened(name, problem, cost, counts, efforts):
        each = min(120_000 / count, 3_000)
        assert efforts == [int(each * one) for one in counts]
        schedules = tuple((name, problem.num_microbatches, cost, one) for one in counts)
        return Shortened(schedules, tuple(lasts[one] for one in counts), False, num_orders)

    def simulate(schedule, few, cost):
        assert few.num_microbatches == 12
        return SimpleNamespace(makespan=25.0)

    monkeypatch.setattr(short_module, "shortened", shortened)
    monkeypatch.setattr(
        short_module, "place_transfers", lambda schedule, few, cost: ("moved", *schedule)
    )
    monkeypatch.setattr(short_module, "simulate_order", simulate)
    monkeypatch.setattr(short_module, "busiest_seconds", lambda problem, cost: busiest)
    step, seconds, placed = short_module.short_step(draft, "1f1b")
    assert step.schedule == ("moved", "1f1b", count, "cost", 12)
    assert step.timeline.makespan == 25.0
    counts = (12,) if count == 12 else (8, 12)
    assert placed == sum((4 * 4 + 4 * 2) * one * (2 + num_orders) for one in counts)
    assert seconds == (25.0 if count == 12 else 25.0 + 88 * max(1.25, busiest))


@pytest.mark.parametrize("waits", [False, True])
def test_a_third_short_step_counts_where_ranks_wait(monkeypatch, waits):
    """Its microbatches and those of the second tell what one more takes."""
    draft = draft_of(problem_of(Layout("v", 2, 2), 200, split=True))
    asked = []

    def shortened(name, problem, cost, counts, efforts):
        asked.extend(zip(counts, efforts, strict=True))
        times = {8: 10.0, 24: 26.0, 56: 90.0}
        return Shortened(tuple(counts), tuple(times[one] for one in counts), waits, 1)

    timeline = SimpleNamespace(makespan=0.0)
    monkeypatch.setattr(short_module, "shortened", shortened)
    monkeypatch.setattr(short_module, "place_transfers", lambda schedule, few, cost: schedule)
    monkeypatch.setattr(short_module, "simulate_order", lambda schedule, few, cost: timeline)
    monkeypatch.setattr(short_module, "busiest_seconds", lambda problem, cost: 0.0)
    step, seconds, placed = short_module.short_step(draft, "v_min")
    assert [count for count, _ in asked] == ([8, 24, 56] if waits else [8, 24])
    assert step.schedule == asked[-1][0]
    assert seconds == (90.0 + 144 * 2.0 if waits else 26.0 + 176 * 1.0)
    assert placed == sum(
        short_module.placed_by(replace(draft.problem, num_microbatches=count), effort)
        for count, effort in asked
    )


def test_what_is_known_exactly_is_not_scaled_as_bounds_are(enter):
    """A step is as long with offloading, which fits where the same one without does not."""
    choices = [choice_of(0), choice_of(0, offload=1.0)]
    world = World([Facts(1.0, 2.0, short_bytes={"adamw": 2.0 * GIB}), Facts(1.0, 2.0)], choices)
    enter(world)
    world.limit, world.host_limit = GIB, float("inf")
    space = Space(tuple(choices), Counter(), (ADAMW,))
    for shared in (None, shared_module.Shared(world)):
        found = search_module.simulated(CONFIG, space, 10**6, below=3.0, shared=shared)
        assert [number_of(world, one) for one in found.estimated] == [1]


def test_what_cannot_be_fast_enough_is_not_simulated_and_takes_no_more_than_the_effort(enter):
    for effort, drafts in ((10**6, 300), (6_000, range(70, 100))):
        facts = [Facts(1.0 + number / 1000, 6.0, drafted=5.0) for number in range(300)]
        world = World(facts)
        enter(world)
        space = Space(tuple(world.choices), Counter(), (ADAMW,))
        search_module.simulated(CONFIG, space, effort, below=3.0)
        assert world.asked("short") == []
        asked = len(world.asked("draft"))
        assert asked == drafts if effort == 10**6 else asked in drafts


def test_a_search_without_vocabulary_parallelism_simulates_short_steps_and_plans_none(
    enter, monkeypatch
):
    world = World([Facts(2.0, 2.5), Facts(1.0, 1.5), Facts(1.6, 1.7)])
    for choice in list(world.facts):
        world.facts[replace(choice, vocab="none")] = world.facts.pop(choice)
    world.choices = list(world.facts)
    made, asked = enter(world), []

    def space_of(config, degrees):
        asked.append(degrees)
        return Space(tuple(world.choices), Counter(), (ADAMW,))

    monkeypatch.setattr(search_module, "without_vocabulary_of", space_of)
    config = replace(CONFIG, schedule=replace(CONFIG.schedule, name="zb_h1"))  # none is its own
    found = search_module.without_vocabulary(config, Degrees(1, 2, 1))
    assert asked == [Degrees(1, 2, 1)]
    assert made == [(GIB, (ADAMW,))], "all memory may be used"
    assert number_of(world, found.without_vocabulary) == 1
    assert [number_of(world, one) for one in found.estimated] == [1]
    assert not world.asked("plan")
    few = World([replace(one, placed=10**5) for one in world.facts.values()], world.choices)
    enter(few)
    search_module.without_vocabulary(config, Degrees(1, 2, 1))
    assert few.asked("short") == [0, 1], "three fifths of 300,000 are two short steps"


def test_where_a_time_is_known_only_what_may_be_faster_is_simulated_and_once(enter):
    """The last one offloads what the first keeps, which cannot make its passes shorter."""
    facts = [Facts(1.0, 2.5), Facts(2.0, 2.2), Facts(3.5, 3.6), Facts(1.0, 1.2)]
    world = World(facts, [*map(choice_of, range(3)), choice_of(0, offload=1.0)])
    enter(world)
    space, shared = Space(tuple(world.choices), Counter(), (ADAMW,)), shared_module.Shared(world)
    for _ in range(2):
        found = search_module.simulated(CONFIG, space, 10**6, below=3.0, shared=shared)
        assert [number_of(world, one) for one in found.estimated] == [1]
        assert world.asked("short") == [0, 1]
    search_module.simulated(CONFIG, space, 10**6, below=1.0)
    assert world.asked("short") == [0, 1], "nothing can be that fast"


def test_where_a_time_is_known_a_few_of_what_seems_not_to_fit_are_tried_last(enter):
    facts = [Facts(1.0 + number, 9.0, seems_to_fit=number == 5) for number in range(6)]
    world = World(facts)
    enter(world)
    space = Space(tuple(world.choices), Counter(), (ADAMW,))
    search_module.simulated(CONFIG, space, 10**6, below=10.0)
    assert world.asked("short") == [5, 0, 1, 2]


def test_what_is_looked_for_by_default():
    assert Limits() == Limits(top=5, margin=0.05, effort=10_000_000)
    assert search_module.limit_of(CONFIG.cluster, 0.25) == 0.75 * GIB


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
    assert no_choice.no_choice_words(config) == words
