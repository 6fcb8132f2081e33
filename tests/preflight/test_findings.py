"""A difference that makes a run wrong is an error with node and remedy; an odd one is a warning."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vp_train.preflight.findings import (
    Findings,
    Gpu,
    RankFacts,
    clock_range,
    compare,
    network_words,
    node_lines,
    wrong_sums,
)

H100 = Gpu("NVIDIA H100", 80 * 2**30, 4, "")


def facts(rank, **changed):
    """Return the facts of one of 8 ranks on the nodes a and b."""
    node = "ab"[rank // 4]
    usual = RankFacts(
        rank=rank,
        local_rank=rank % 4,
        host=node,
        boot=f"boot-{node}",
        clock=(-0.001, 0.001),
        directory="/shared/runs/one",
        unshared="",
        code="c0de",
        schedule="5ched",
        settings="5e77",
        texts=("7e87",),
        versions={"Python": "3.11.2", "torch": "2.13.0", "NCCL": "2.28.3"},
        gpu=replace(H100, uuid=f"GPU-{rank}"),
    )
    return replace(usual, **changed)


def ranks(**changed):
    """Return the facts of all ranks, changed on node b."""
    return [facts(rank, **(changed if rank >= 4 else {})) for rank in range(8)]


def test_equal_nodes_have_no_findings():
    assert compare(ranks(), one_gpu_per_rank=True) == Findings((), ())


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"NCCL_IB_HCA": "mlx5_1"}, "NCCL_IB_HCA is mlx5_1, but mlx5_0 on node a; "),
        ({}, "NCCL_IB_HCA is not set, but mlx5_0 on node a; "),
        ({"NCCL_IB_HCA": ""}, "NCCL_IB_HCA is empty, but mlx5_0 on node a; "),
    ],
)
def test_a_variable_of_nccl_that_differs_is_a_warning_with_both_values(value, words):
    usual = {"NCCL_IB_HCA": "mlx5_0"}
    found = compare([replace(one, environment=usual if one.rank < 4 else value) for one in ranks()])
    assert found.errors == ()
    (warning,) = found.warnings
    assert warning.startswith(f"node b: {words}")


def test_a_name_of_any_characters_is_shown_as_it_is():
    name = "NCCL_{X}{0}{value}{"
    found = compare([replace(one, environment={name: "1"} if one.rank else {}) for one in ranks()])
    assert found.errors == ()
    assert found.warnings[0].startswith(f"node a: {name} is not set, but 1 on node a; ")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (
            {"compiled": ("layers", "kernels")},
            ["node b: can compile layers and kernels, and node a nothing;", "run.compile=off"],
        ),
        ({"unshared": "No such file"}, ["node b:", "/shared/runs/one", "node a", "run.root"]),
        ({"code": "f00d"}, ["node b:", "f00d", "node a (c0de)", "install the same commit"]),
        ({"texts": ("beef",)}, ["node b:", "text", "beef", "node a (7e87)", "same files"]),
        ({"texts": ()}, ["node b:", "text", "none"]),
        ({"schedule": "beef"}, ["node b:", "another schedule", "schedule.file"]),
        ({"versions": {"Python": "3.12.2", "torch": "2.13.0", "NCCL": "2.28.3"}}, ["Python 3.12"]),
        (
            {"versions": {"Python": "3.11.2", "torch": "2.12.0", "NCCL": "2.28.3"}},
            ["node b:", "torch 2.12.0 instead of 2.13.0", "install the same version"],
        ),
        ({"versions": {"Python": "3.11.2", "torch": "2.13.0"}}, ["NCCL none instead of 2.28.3"]),
        (
            {"gpu": replace(H100, uuid="GPU-7")},
            ["node b: ranks 4 and 5 have the same GPU", "comm_backend=gloo"],
        ),
    ],
)
def test_what_makes_a_run_wrong_is_one_error_with_node_and_remedy(changed, words):
    found = compare(ranks(**changed), one_gpu_per_rank=True)
    (error,) = found.errors
    assert [word for word in words if word not in error] == []
    assert not found.warnings


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"clock": (59.0, 61.0)}, ["node b:", "60.0 s ahead of that of node a", "chrony"]),
        ({"clock": (-61.0, -59.0)}, ["60.0 s behind"]),
        ({"gpu": replace(H100, name="NVIDIA A100")}, ["node b:", "A100", "H100", "slowest"]),
        ({"gpu": replace(H100, num_bytes=40 * 2**30)}, ["40.0 GiB", "80.0 GiB"]),
        ({"gpu": replace(H100, count=2)}, ["2 GPUs instead of 4"]),
        ({"gpu": None}, ["none instead of"]),
        (
            {"versions": {"Python": "3.11.9", "torch": "2.13.0", "NCCL": "2.28.3"}},
            ["Python 3.11.9, but 3.11.2 on node a"],
        ),
        ({"host": "a", "boot": "boot-a"}, ["node a: 2 launchers"]),
    ],
)
def test_what_is_odd_is_one_warning(changed, words):
    found = compare(ranks(**changed))
    (warning,) = found.warnings
    assert [word for word in words if word not in warning] == []
    assert not found.errors


def test_settings_are_named_and_what_follows_from_them_is_not():
    changed = ranks(settings="beef", schedule="beef", texts=("beef",))
    usual = {"model.num_layers": "2", "run.seed": "1", "run.name": "one"}
    own = {**usual, "model.num_layers": "4", "run.seed": "2"}
    (error,) = compare(changed, [usual] * 4 + [own] * 4).errors
    assert error == (
        "node b: model.num_layers=4 instead of 2, run.seed=2 instead of 1 on node a; give the "
        "command of all nodes the same overrides"
    )


def test_nodes_with_other_gpus_are_told_to_type_one_cluster():
    presets = [{"cluster.memory_gib": "75.0"}] * 4 + [{"cluster.memory_gib": "135.0"}] * 4
    (error,) = compare(ranks(settings="beef"), presets).errors
    assert error == (
        "node b: cluster.memory_gib=135.0 instead of 75.0 on node a; type the same cluster=NAME on "
        "all nodes, because each otherwise takes the preset of its own GPU"
    )
    for name in ("cluster.num_nodes", "cluster.gpus_per_node"):
        counts = [{name: "2"}] * 4 + [{name: "3"}] * 4
        (error,) = compare(ranks(settings="beef"), counts).errors
        assert error.endswith("; give the command of all nodes the same overrides")


def test_the_minority_is_named_and_at_a_draw_rank_0_is_right():
    first_differs = [facts(0, code="f00d"), *map(facts, range(1, 8))]
    assert compare(first_differs).errors[0].startswith("node a: the code of vp_train (f00d)")
    assert compare(ranks(code="f00d")).errors[0].startswith("node b: ")


def test_a_clock_within_the_round_trip_is_no_finding():
    assert compare(ranks(clock=(-1.0, 20.0))) == Findings((), ())


def test_the_range_of_a_clock_holds_its_offset():
    # The barrier takes from 10 to 14 by the clock of rank 0, and the other is 100 s ahead.
    assert clock_range((111.0, 113.5), (10.0, 14.0)) == (97.0, 103.5)


def test_many_nodes_are_counted_and_nodes_of_one_name_are_told_apart():
    many = [
        replace(facts(0), rank=rank, host=f"n{rank}", boot="", code="x" if rank > 4 else "y")
        for rank in range(10)
    ]
    assert compare(many).errors[0].startswith("nodes n5, n6, n7 and 2 more: ")
    twins = ranks(host="a", unshared="gone")
    assert compare(twins).errors[0].startswith("node a: ")
    assert len(node_lines(twins)) == 2
    both = [replace(one, unshared="gone") for one in twins]
    assert compare(both).errors[0].startswith("nodes a (ranks 0-3), a (ranks 4-7): ")


def test_a_node_has_all_gpus_that_its_ranks_are_bound_to():
    bound = [replace(one, gpu=replace(one.gpu, count=1)) for one in ranks()]
    assert all(" 4 x NVIDIA H100" in line for line in node_lines(bound))
    assert compare(bound, one_gpu_per_rank=True) == Findings((), ())


def test_each_node_has_one_line():
    assert node_lines(ranks(clock=(0.5, 0.7))) == [
        "a, ranks 0-3: 4 x NVIDIA H100 (80.0 GiB), Python 3.11.2 torch 2.13.0 NCCL 2.28.3, "
        "clock +0.000 s (within 0.001 s)",
        "b, ranks 4-7: 4 x NVIDIA H100 (80.0 GiB), Python 3.11.2 torch 2.13.0 NCCL 2.28.3, "
        "clock +0.600 s (within 0.100 s)",
    ]
    scattered = [facts(rank, host="ab"[rank % 2], boot="") for rank in range(4)]
    assert [line.partition(":")[0] for line in node_lines(scattered)] == [
        "a, ranks 0, 2",
        "b, ranks 1, 3",
    ]


def test_names_from_other_nodes_cannot_steer_a_terminal():
    found = compare(ranks(host="b\x1b[2J", code="\n"))
    lines = node_lines(ranks(host="\x07"))
    assert all(line.isprintable() for line in (*found.errors, *lines))
    assert lines[1].startswith(
        r"\x07, ranks"
    )  # escaped as everywhere else, so that names stay apart


def test_a_slow_network_is_a_warning_and_a_wrong_sum_an_error():
    line, warning = network_words(2**24, 0.1, 4, 0.05)
    assert line == "all-reduce of 16 MiB over 4 ranks: 100.0 ms, 0.25 GB/s per rank"
    assert warning == ""
    assert "NCCL_SOCKET_IFNAME" in network_words(2**24, 0.1, 4, 0.01)[1]
    assert wrong_sums([8.0] * 8, ranks()) == ""
    assert "node b: an all-reduce of ones gave 7 instead of 8" in wrong_sums(
        [8.0] * 7 + [7.0], ranks()
    )
