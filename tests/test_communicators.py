"""The list of process groups is small, complete and free of deadlock, at 512 ranks too."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from schedules.cost import CostModel
from schedules.generators import GENERATORS, generate
from schedules.layout import Layout
from schedules.lower import Action, lower
from schedules.problem import Problem
from schedules.vocab import VOCAB_ALGORITHMS, End
from tests.meshes import fake_world
from vp_train import mesh as mesh_module
from vp_train.communication.communicators import (
    BOTH,
    CONTROL_PURPOSES,
    END_PURPOSES,
    GLOO,
    NCCL,
    Purpose,
    collectives_of,
    gloo_sockets,
    hop_flows,
    plan_groups,
)
from vp_train.communication.control import row_width
from vp_train.communication.nccl import communicator_options
from vp_train.config import RunSettings
from vp_train.mesh import build_mesh
from vp_train.planning.degrees import Degrees

MOST_SOCKETS = 256
LAYOUTS = [("linear", 1), ("loop", 2), ("loop", 3), ("v", 2)]
DEGREES = [(1, 1, 1), (1, 4, 1), (2, 2, 2), (1, 3, 2), (3, 1, 1), (2, 5, 1), (8, 8, 8), (1, 37, 1)]


def problem_of(num_ranks, layout="linear", chunks=1, algorithm="one_barrier"):
    return Problem(Layout(layout, num_ranks, chunks), 2, VOCAB_ALGORITHMS[algorithm])


def planned(degrees, problem, *, nccl):
    return plan_groups(degrees, problem, nccl=nccl, row_width=row_width(degrees.num_ranks))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("algorithm", ["none", "one_barrier"])
def test_at_512_ranks_no_rank_has_more_than_99_sockets(layout, algorithm):
    degrees = Degrees(8, 8, 8)
    specs = planned(degrees, problem_of(8, *layout, algorithm), nccl=True)
    assert max(gloo_sockets(specs, rank) for rank in range(512)) == 2 * (31 + 15) + 7


@pytest.mark.slow
@pytest.mark.parametrize(
    "degrees", [(8, 8, 8), (16, 8, 4), (1, 64, 8), (64, 1, 8), (512, 1, 1), (4, 16, 64)]
)
def test_sockets_leave_room_for_other_files(degrees):
    """The data-parallel group of dp = 512 alone needs 511 sockets, which are not counted here."""
    degrees = Degrees(*degrees)
    specs = planned(degrees, problem_of(degrees.pp), nccl=True)
    most = max(gloo_sockets(specs, rank) for rank in range(degrees.num_ranks))
    assert most - (degrees.dp - 1) <= MOST_SOCKETS


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("degrees", [(8, 2, 2), (8, 8, 8), (64, 8, 8), (16, 64, 4)])
def test_no_rank_is_in_more_than_twelve_groups_whatever_the_size_of_the_world(layout, degrees):
    degrees = Degrees(*degrees)
    specs = planned(degrees, problem_of(degrees.pp, *layout), nccl=True)
    assert max(Counter(rank for spec in specs for rank in spec.members).values()) <= 12


@pytest.mark.parametrize("nccl", [False, True])
@pytest.mark.parametrize("algorithm", ["none", "one_barrier"])
@pytest.mark.parametrize("layout", [("linear", 1), ("v", 2)])
@pytest.mark.parametrize(
    "degrees", [(1, 1, 1), (1, 2, 2), (2, 1, 2), (2, 3, 1), (3, 2, 2), (4, 9, 1)]
)
def test_a_group_has_the_ranks_that_differ_in_its_axis_alone(degrees, layout, algorithm, nccl):
    """Groups of one rank are left out, apart from those of ranks that need one."""
    degrees, problem = Degrees(*degrees), problem_of(degrees[1], *layout, algorithm)
    device, mixed = (NCCL, BOTH) if nccl else (GLOO, GLOO)
    ends = {end: problem.shard_ranks(end) for end in End}
    first, last = problem.root(End.INPUT), problem.root(End.OUTPUT)
    expected = set()

    def add(purpose, backend, shared, stages=range(degrees.pp)):
        groups = {}
        for rank in range(degrees.num_ranks):
            if degrees.place(rank)[1] in stages:
                groups.setdefault(shared(*degrees.place(rank)), []).append(rank)
        expected.update((purpose, tuple(g), backend) for g in groups.values() if len(g) > 1)

    add(Purpose.TENSOR, device, lambda i, j, k: (i, j))
    add(Purpose.DATA, mixed, lambda i, j, k: (j, k))
    add(Purpose.INPUT, device, lambda i, j, k: i, ends[End.INPUT])
    add(Purpose.OUTPUT, device, lambda i, j, k: i, ends[End.OUTPUT])
    if algorithm == "none":
        add(Purpose.TIED, device, lambda i, j, k: (i, k), {first, last})
    if not nccl:
        add(Purpose.HOPS, GLOO, lambda i, j, k: (i, k))
    if 1 in (degrees.tp, degrees.dp):
        expected |= {(Purpose.ALONE, (rank,), mixed) for rank in range(degrees.num_ranks)}
    found = [
        (spec.purpose, spec.members, spec.backend)
        for spec in planned(degrees, problem, nccl=nccl)
        if spec.purpose not in CONTROL_PURPOSES and (not nccl or spec.purpose is not Purpose.HOPS)
    ]
    assert len(found) == len(set(found))
    assert set(found) == expected


@pytest.mark.parametrize("num_ranks", range(1, 12))
def test_every_rank_is_in_a_row_and_the_first_of_each_row_leads_where_there_are_several(num_ranks):
    for width in range(1, num_ranks + 1):
        specs = plan_groups(Degrees(num_ranks, 1, 1), problem_of(1), nccl=False, row_width=width)
        for purpose, leaders in (
            (Purpose.WORLD, Purpose.WORLD_LEADERS),
            (Purpose.STEPS, Purpose.STEPS_LEADERS),
        ):
            rows = [spec.members for spec in specs if spec.purpose is purpose]
            assert [rank for row in rows for rank in row] == list(range(num_ranks))
            assert all(len(row) == width for row in rows[:-1])
            assert len(rows[-1]) <= width
            led = [spec.members for spec in specs if spec.purpose is leaders]
            assert led == ([tuple(row[0] for row in rows)] if len(rows) > 1 else [])
        assert all(spec.backend == GLOO for spec in specs)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("p", [1, 2, 3, 5])
def test_a_forward_alone_hops_one_way(layout, p):
    both = problem_of(p, *layout)
    there = hop_flows(replace(both, forward_only=True))
    stages = itertools.pairwise(map(both.layout.rank_of, range(both.layout.num_stages)))
    assert there == {(a, b) for a, b in stages if a != b}
    assert hop_flows(both) == there | {flow[::-1] for flow in there}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("p", [2, 3, 4, 5, 8])
def test_pairs_of_hops_in_one_class_have_no_rank_in_common(layout, p):
    """A class has pairs of one distance and direction that begin at even or at odd ranks."""
    specs = planned(Degrees(1, p, 1), problem_of(p, *layout), nccl=True)
    classes = {}
    for spec in specs:
        if spec.purpose is Purpose.HOPS:
            first, last = spec.members
            key = last - first, first % 2, spec.sender != first
            assert list(classes)[-1:] == [key] or key not in classes, "a class lies together"
            classes.setdefault(key, []).extend(spec.members)
    for key, members in classes.items():
        assert len(members) == len(set(members)), key
    assert list(classes) == sorted(classes), "neighbours first"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("degrees", DEGREES)
def test_every_hop_has_a_pair_of_its_own_on_nccl(layout, degrees):
    degrees = Degrees(*degrees)
    problem = problem_of(degrees.pp, *layout)
    hops = [spec for spec in planned(degrees, problem, nccl=True) if spec.purpose is Purpose.HOPS]
    assert all(spec.backend == NCCL and len(spec.members) == 2 for spec in hops)
    found = {
        (spec.sender, receiver)
        for spec in hops
        for receiver in spec.members
        if receiver != spec.sender
    }
    assert len(found) == len(hops)
    wanted = set()
    for stage in range(problem.last_stage):
        a, b = problem.layout.rank_of(stage), problem.layout.rank_of(stage + 1)
        for replica in range(degrees.dp):
            for k in range(degrees.tp):
                if a != b:
                    here, there = degrees.rank(replica, a, k), degrees.rank(replica, b, k)
                    wanted |= {(here, there), (there, here)}
    assert found == wanted


@pytest.mark.parametrize("degrees", DEGREES)
def test_with_gloo_the_hops_of_a_pipeline_share_one_group(degrees):
    degrees = Degrees(*degrees)
    specs = planned(degrees, problem_of(degrees.pp), nccl=False)
    hops = [spec for spec in specs if spec.purpose is Purpose.HOPS]
    assert all(spec.backend == GLOO for spec in hops)
    pipelines = {
        tuple(degrees.rank(i, j, k) for j in range(degrees.pp))
        for i in range(degrees.dp)
        for k in range(degrees.tp)
    }
    assert {spec.members for spec in hops} == (pipelines if degrees.pp > 1 else set())
    assert len({spec.members for spec in hops}) == len(hops)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("p", [2, 3, 4, 5, 8, 37])
def test_pairs_of_hops_are_set_up_at_the_same_time_at_any_length_of_the_pipeline(layout, p):
    """A rank waits for as many pairs as it is in, and in a loop of odd length for two more."""
    degrees = Degrees(2, p, 1)
    specs = planned(degrees, problem_of(p, *layout), nccl=True)
    rounds, pairs = Counter(), Counter()
    for spec in specs:
        if spec.purpose is Purpose.HOPS:
            when = 1 + max(rounds[rank] for rank in spec.members)
            rounds.update({rank: when - rounds[rank] for rank in spec.members})
            pairs.update(spec.members)
    assert max(rounds.values()) <= max(pairs.values()) + 2 * (layout[0] == "loop" and p % 2)


def test_v_layouts_hop_both_ways_and_loops_wrap_around():
    assert hop_flows(problem_of(3, "v", 2)) == {(0, 1), (1, 2), (2, 1), (1, 0)}
    assert hop_flows(problem_of(3, "loop", 2)) == {(0, 1), (1, 2), (2, 0), (1, 0), (2, 1), (0, 2)}
    assert hop_flows(problem_of(1, "loop", 2)) == set()


@pytest.mark.parametrize("name", sorted(GENERATORS))
@pytest.mark.parametrize("p", [2, 3])
def test_both_ranks_of_a_pair_issue_its_messages_in_the_same_order(name, p):
    """NCCL executes the messages of one communicator in order of issue."""
    family = GENERATORS[name]
    problem = Problem(
        family.layout_of(p), 6, VOCAB_ALGORITHMS["one_barrier"], family.split_backward
    )
    seconds = {"F": 1.0, "B": 2.0, "I": 1.1, "W": 0.9, "S": 0.57, "T": 0.31, "E": 0.05, "G": 0.03}
    cost = CostModel.uniform(problem.layout.num_stages, p, hop=0.07, barrier=0.13, **seconds)
    issued = {}
    for rank, ops in enumerate(lower(generate(name, problem, cost), problem, cost).ranks):
        for op in ops:
            if op.action in (Action.SEND, Action.RECV):
                issued.setdefault((rank, op.peer, op.action), []).append(op.item)
    assert len(issued) == 2 * len(hop_flows(problem))
    for (rank, peer, action), messages in issued.items():
        other = Action.RECV if action is Action.SEND else Action.SEND
        assert messages == issued[peer, rank, other]


@pytest.mark.parametrize("nccl", [False, True])
@pytest.mark.parametrize("degrees", DEGREES)
def test_no_ranks_wait_in_a_circle_and_no_group_is_useless(degrees, nccl):
    """Each rank makes its groups in order, and a group is complete when all members have come."""
    degrees = Degrees(*degrees)
    specs = planned(degrees, problem_of(degrees.pp), nccl=nccl)
    rounds = dict.fromkeys(range(degrees.num_ranks), 0)
    for spec in specs:
        assert len(spec.members) > 1 or spec.purpose in (
            Purpose.ALONE,
            Purpose.WORLD,
            Purpose.STEPS,
        )
        assert list(spec.members) == sorted(set(spec.members))
        when = 1 + max(rounds[rank] for rank in spec.members)
        rounds |= dict.fromkeys(spec.members, when)
    in_groups = Counter(rank for spec in specs for rank in spec.members)
    assert max(rounds.values()) <= 2 * max(in_groups.values()), (
        "a chain of waits along the pipeline"
    )


def test_degrees_of_one_make_no_groups_for_their_axis():
    alone = {spec.purpose for spec in planned(Degrees(1, 1, 1), problem_of(1), nccl=True)}
    assert alone == {Purpose.WORLD, Purpose.STEPS, Purpose.ALONE}
    whole = {spec.purpose for spec in planned(Degrees(2, 2, 2), problem_of(2), nccl=True)}
    assert Purpose.ALONE not in whole


class Recorded:
    """A stand-in for `dist.new_group` that records its calls."""

    def __init__(self):
        self.calls = []

    def __call__(self, members, timeout, backend, options, group_desc):
        self.calls.append((group_desc, tuple(members), backend, timeout.total_seconds(), options))
        return SimpleNamespace(desc=group_desc, members=members)


@pytest.fixture
def fake_nccl(monkeypatch):
    """Return a function (rank, degrees) that replaces NCCL by a recorder of its calls."""
    steps = []

    class Options:
        def __init__(self, is_high_priority_stream=False):
            self.is_high_priority_stream = is_high_priority_stream
            self.config = SimpleNamespace(max_ctas=32)

    def start(rank, degrees):
        factory = Recorded()
        monkeypatch.setattr(
            dist, "ProcessGroupNCCL", SimpleNamespace(Options=Options), raising=False
        )
        monkeypatch.setattr(dist, "new_group", factory)
        for name, value in {
            "get_rank": rank,
            "get_world_size": degrees.num_ranks,
            "get_backend": NCCL,
        }.items():
            monkeypatch.setattr(dist, name, lambda value=value: value)
        for name in ("send", "recv"):
            monkeypatch.setattr(
                dist, name, lambda _, peer, group, name=name: steps.append((name, peer, group))
            )
        monkeypatch.setattr(
            mesh_module,
            "_run_once",
            lambda collective, group, root, _: steps.append((collective, root, group)),
        )
        monkeypatch.setattr(
            mesh_module.ControlGroup, "barrier", lambda self: steps.append(("barrier", None, self))
        )
        monkeypatch.setattr(
            mesh_module,
            "_set_pg_timeout",
            lambda timeout, group: steps.append((timeout, None, group)),
        )
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(
            torch.cuda, "synchronize", lambda _: steps.append(("synchronize", None, None))
        )
        monkeypatch.setattr(torch, "zeros", lambda *_, device: device)
        return factory, steps

    return start


@pytest.mark.parametrize("rank", [0, 9, 31])
def test_the_mesh_makes_the_planned_groups_and_connects_them_under_the_start_timeout(
    fake_nccl, rank
):
    degrees, settings = Degrees(2, 8, 2), RunSettings(timeout_seconds=7, world_timeout_seconds=70)
    factory, steps = fake_nccl(rank, degrees)
    problem, watched = problem_of(8, "v", 2), []

    def watching(groups):
        # No rank has sent anything yet.
        assert {name for name, *_ in steps if isinstance(name, str)} <= {"barrier"}
        watched.extend(groups)

    mesh = build_mesh(degrees, problem, settings, watching=watching)
    assert tuple(watched) == mesh.made
    specs = planned(degrees, problem, nccl=True)
    assert [call[:3] for call in factory.calls] == [
        (spec.purpose, spec.members, spec.backend) for spec in specs
    ]
    own = [spec for spec in specs if rank in spec.members]
    assert len(mesh.made) == len(own)
    for purpose, members, backend, seconds, options in factory.calls:
        assert seconds == (7 if purpose == Purpose.STEPS else 70)
        assert (options is not None) == (NCCL in backend and rank in members)
        if options is not None:
            assert options.is_high_priority_stream
            most = {end: RunSettings().collective_ctas for end in END_PURPOSES.values()}
            most[Purpose.HOPS] = RunSettings().hop_channels
            assert options.config.max_ctas == most.get(purpose, 32)
    on_nccl = [
        (spec, group) for spec, group in zip(own, mesh.made, strict=True) if NCCL in spec.backend
    ]
    barrier, *warmed, synchronized, barrier_after = [
        step for step in steps if isinstance(step[0], str)
    ]
    assert (barrier[0], synchronized[0], barrier_after[0]) == ("barrier", "synchronize", "barrier")
    expected = []
    for spec, group in on_nccl:
        hop = "send" if rank == spec.sender else "recv"
        of_group = collectives_of(spec, problem) if spec.sender is None else [hop]
        expected += [(name, group) for name in of_group]
    assert [(name, group) for name, _, group in warmed] == expected
    assert [(when, group) for when, _, group in steps if isinstance(when, timedelta)] == [
        (timedelta(seconds=7), group) for _, group in on_nccl
    ]
    assert steps.index(barrier_after) < min(
        i for i, step in enumerate(steps) if isinstance(step[0], timedelta)
    )
    here = mesh.pipeline_rank
    neighbours = {here - 1, here + 1} & set(range(8))
    senders = {id(group): spec.sender for spec, group in zip(own, mesh.made, strict=True)}
    for sends, groups in ((True, mesh.pipeline.sends), (False, mesh.pipeline.receives)):
        assert groups.keys() == neighbours
        for peer, group in groups.items():
            assert group.desc == Purpose.HOPS
            assert set(group.members) == {rank, mesh.pipeline.ranks[peer]}
            assert senders[id(group)] == (rank if sends else mesh.pipeline.ranks[peer])
    assert {end: group.desc for end, group in mesh.pipeline.ends.items()} == END_PURPOSES


def test_settings_of_zero_leave_nccl_its_choice(fake_nccl):
    fake_nccl(0, Degrees(1, 1, 1))
    options = communicator_options(
        RunSettings(collective_ctas=0, comm_priority=False), timedelta(seconds=3), most_ctas=0
    )
    assert options._timeout == timedelta(seconds=3)
    assert options.config.max_ctas == 32
    assert not options.is_high_priority_stream


def test_a_torch_without_nccl_has_no_options(monkeypatch):
    monkeypatch.delattr(dist, "ProcessGroupNCCL", raising=False)
    assert communicator_options(RunSettings(), timedelta(seconds=3), most_ctas=2) is None


def test_512_ranks_make_their_groups_without_a_store_and_in_seconds(monkeypatch):
    """torch itself makes the groups, over a store without other ranks, so no barrier may wait."""
    monkeypatch.setattr(
        dist.distributed_c10d,
        "_store_based_barrier",
        lambda *_: pytest.fail("a barrier of all ranks"),
    )
    degrees = Degrees(8, 8, 8)
    with fake_world(77, 512):
        mesh = build_mesh(degrees, problem_of(8))
        assert (mesh.data.size(), mesh.tensor.size(), mesh.world.row.size()) == (8, 8, 32)
        assert mesh.world.leaders is None
        assert mesh.pipeline.ends[End.OUTPUT].size() == 64
        mesh.destroy()
