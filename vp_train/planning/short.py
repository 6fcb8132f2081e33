"""Short steps, whose times say what a long step takes, and what a step costs to plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from schedules.generators import promised, shortened
from schedules.generators.auto import searched_microbatches
from schedules.offload import place_transfers
from schedules.problem import Problem
from schedules.simulate import simulate_order
from vp_train.planning.choice import Choice
from vp_train.planning.plan import Draft, StepPlan, busiest_seconds
from vp_train.planning.weigh import Candidate

# Nodes that the generator of a short step may place in search of a better order, and how often
# about it places each of them until nothing helps.
_SHORT_EFFORT, _REFINED = 36_000, 32
_DRAFT_NODES = 12  # nodes that can be placed while a choice is drafted, per stage
_MANY_RANKS = 16  # which are full after one microbatch of each
# A schedule whose activations are offloaded, and a draft that chooses the stages which recompute,
# take so many times the effort of others.
_OFFLOADED, _MIXED = 3, 3
_WORTH_A_THIRD = 2  # times the length of a third short step: a step that is long enough for it
# Of schedule=auto: it places so many nodes, and so many times those of the step that it searches.
_TO_ORDER, _TO_ORDER_TIMES = 600_000, 300
WHOLE_EFFORT = 120_000  # of `generate` for a plan


def short_step(draft: Draft, name: str) -> tuple[StepPlan, float, int]:
    """Return a step with few microbatches, the seconds of all passes, and the nodes placed.

    In its steady state a pipeline takes equally long for every p microbatches.  So the time of two
    short steps gives that of a long one.  The step that is returned keeps what a long one keeps,
    except with gpipe, where ranks keep every microbatch: it keeps only its own.

    Where the backward is split and ranks wait in the steady state, one gap is filled after the
    other, and what a microbatch takes changes slowly.  A third, longer step tells more.  Of 860
    random steps, with a third where it is a third as long, estimates are 0.2 % off in the mean.
    Those of v_min are up to 2.4 % too low, or 7.4 % too high where a short step is refined less
    than the whole one.  Those of v_half are up to 1.9 % too low or 4.5 % too high, of others 0.4
    and 1.3 %.  Which rank is ahead may change after hundreds of microbatches, and no short step
    shows that.
    """
    problem, counts = draft.problem, short_counts(draft.problem)
    efforts = _short_efforts(problem, counts)
    steps = shortened(name, problem, draft.cost, counts, efforts)
    placed = _placed(problem, counts, efforts, steps.num_orders)
    schedule, times, third = steps.schedules[-1], steps.seconds, _third_count(problem, counts)
    if third is not None and steps.waits:
        effort = efforts[-1] * third // counts[-1]
        last = shortened(name, problem, draft.cost, (third,), (effort,))
        placed += _placed(problem, (third,), (effort,))
        schedule, times, counts = last.schedules[0], times[1:] + last.seconds, (counts[1], third)
    few = replace(problem, num_microbatches=counts[-1])
    schedule = place_transfers(schedule, few, draft.cost)  # it delays nothing
    timeline = simulate_order(schedule, few, draft.cost)
    step = draft.with_timeline(schedule, timeline)
    seconds = promised(problem.num_microbatches, counts, times)
    more = (problem.num_microbatches - counts[-1]) * busiest_seconds(problem, draft.cost)
    return step, max(seconds, timeline.makespan + more), placed


def _third_count(problem: Problem, counts: Sequence[int]) -> int | None:
    """Return the microbatches of a third short step, None where it is not worth its time."""
    if not problem.split_backward or len(counts) == 1:
        return None
    count = counts[1] + 2 * (counts[1] - counts[0])
    return count if _WORTH_A_THIRD * count <= problem.num_microbatches else None


def draft_nodes(item: Candidate) -> int:
    """Return the effort of a draft in nodes."""
    nodes = _DRAFT_NODES * item.draft.problem.layout.num_stages
    return nodes if item.choice.recompute_per_stage is None else _MIXED * nodes


def plan_nodes(item: Candidate) -> int:
    """Return the effort of a whole plan in nodes."""
    return effort_of(item.choice, placed_by(item.draft.problem))


def effort_of(choice: Choice, placed: int) -> int:
    """Return the effort, in nodes, of a schedule with so many nodes."""
    return placed * (_OFFLOADED if choice.offload else 1)


def short_counts(problem: Problem) -> tuple[int, ...]:
    """Return the microbatches of the short steps to simulate: two, or one if the step is short.

    They leave as many microbatches as the step after full turns of the ranks, since schedules with
    chunks run these apart.  Where the backward is split, filled gaps make times uneven, so the two
    are further apart.
    """
    period = problem.layout.num_ranks
    rest = problem.num_microbatches % period
    is_plain = not problem.split_backward and problem.algorithm.extra_in_flight < 2
    turns = 1 if is_plain and period >= _MANY_RANKS else max(2, -(-8 // period))
    fill = turns * period + rest
    longer = fill + period * (max(2, -(-16 // period)) if problem.split_backward else 1)
    return (fill, longer) if problem.num_microbatches > longer else (problem.num_microbatches,)


def _short_efforts(problem: Problem, counts: Sequence[int]) -> list[int]:
    """Return the efforts of short steps: as much for a microbatch as in a plan, unless too much."""
    each = min(WHOLE_EFFORT / problem.num_microbatches, _SHORT_EFFORT / counts[-1])
    return [int(each * count) for count in counts]


def placed_by_short(problem: Problem) -> int:
    """Return about how many nodes `short_step` places where no rank waits."""
    counts = short_counts(problem)
    return _placed(problem, counts, _short_efforts(problem, counts))


def _placed(
    problem: Problem,
    counts: Sequence[int],
    efforts: Sequence[int],
    num_orders: int | None = None,
) -> int:
    """Return about how many nodes steps with `counts` microbatches place, see `placed_by`."""
    return sum(
        placed_by(replace(problem, num_microbatches=count), effort, num_orders)
        for count, effort in zip(counts, efforts, strict=True)
    )


def order_nodes(item: Candidate) -> int:
    """Return the effort of schedule=auto for a choice, in nodes."""
    problem = item.draft.problem
    few = replace(problem, num_microbatches=searched_microbatches(problem))
    return _TO_ORDER + _TO_ORDER_TIMES * _nodes(few)


def _nodes(problem: Problem) -> int:
    """Return about the number of passes and collectives of a step."""
    nodes = problem.layout.num_ranks * (4 if problem.algorithm.sharded else 1)
    nodes += problem.layout.num_stages * len(problem.stage_kinds)
    return nodes * problem.num_microbatches


def placed_by(problem: Problem, effort: int | None = None, num_orders: int | None = None) -> int:
    """Return about how many nodes `generate` places.

    effort: see there; None: of a whole plan.
    num_orders: how many orders are woven; None: as many as the effort allows.
    """
    nodes = _nodes(problem)
    effort = WHOLE_EFFORT if effort is None else effort
    if problem.split_backward:
        starts = 2 if nodes < effort // 3 else 1
        refined = max(2 * nodes, min(effort // 2, _REFINED * nodes))
        return 2 * nodes + starts * (nodes + refined)
    if num_orders is None:
        num_orders = min(5, max(1, effort // nodes))
    return nodes * (2 + num_orders)
