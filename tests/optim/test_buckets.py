"""Buckets hold every parameter once, and their sum starts when their last parameter is ready."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from vp_train.optim.buckets import Countdown, lay_out

SIZES = st.lists(st.lists(st.lists(st.integers(0, 300), max_size=3), max_size=4), max_size=3)


def model_of(sizes):
    """Return parameters of the given numbers of elements, and their names by run and unit.

    Every other parameter is a matrix.
    """
    parameters, runs = {}, []
    for run in sizes:
        runs.append([])
        for unit in run:
            runs[-1].append([])
            for size in unit:
                name = f"p{len(parameters)}"
                parameters[name] = nn.Parameter(
                    torch.ones((size, 1) if len(parameters) % 2 else size)
                )
                runs[-1][-1].append(name)
    return parameters, runs


@given(
    SIZES,
    st.integers(1, 700),
    st.integers(1, 5),
    st.integers(1, 4),
    st.sets(st.integers(0, 30)),
)
def test_every_parameter_has_its_place_in_one_bucket_of_equal_parts(
    sizes, max_elements, num_parts, min_buckets, copied
):
    parameters, runs = model_of(sizes)
    copied = frozenset(f"p{index}" for index in copied)
    layout = lay_out(
        parameters,
        runs,
        max_elements=max_elements,
        num_parts=num_parts,
        min_buckets=min_buckets,
        copied=copied,
    )
    owners = torch.zeros(layout.num_elements, dtype=torch.int64)
    end = 0
    for bucket in layout.buckets:
        assert bucket.start == end
        end = bucket.stop
        assert (bucket.stop - bucket.start) % num_parts == 0
        assert [bucket.part(index, num_parts)[0] for index in range(num_parts)][1:] == [
            bucket.part(index, num_parts)[1] for index in range(num_parts - 1)
        ]
        assert bucket.part(num_parts - 1, num_parts)[1] == bucket.stop
        units = [unit for run in runs for unit in run if set(unit) & set(bucket.names)]
        assert sorted(bucket.names) == sorted(name for unit in units for name in unit), (
            "units stay together"
        )
        assert (
            len({index for index, run in enumerate(runs) for unit in run if unit in units}) == 1
        ), "of one run"
        (run,) = (run for run in runs if units[0] in run)
        of_run = sum(parameters[name].numel() for unit in run for name in unit)
        assert len(units) == 1 or sum(parameters[name].numel() for name in bucket.names) <= min(
            max_elements, -(-of_run // min_buckets)
        )
        for name in bucket.names:
            start, stop = layout.bounds[name]
            assert bucket.start <= start <= stop <= bucket.stop
            assert stop - start == parameters[name].numel()
            owners[start:stop] += 1
            for span in bucket.spans:
                if start < stop and span.within(start, stop) is not None:
                    assert span.start <= start < stop <= span.stop
                    assert (span.decays, span.counts) == (
                        parameters[name].dim() > 1,
                        name not in copied,
                    )
        covered = sum(span.stop - span.start for span in bucket.spans)
        assert covered >= sum(parameters[name].numel() for name in bucket.names)
    assert end == layout.num_elements
    assert (owners <= 1).all()
    assert owners.sum() == sum(parameter.numel() for parameter in parameters.values())
    assert layout.bounds.keys() == parameters.keys()
    read = [layout.buckets[index].names for index in layout.reading_order]
    completed = [bucket.names for bucket in layout.buckets]
    assert sorted(read) == sorted(completed)
    units = [set(unit) for run in runs for unit in reversed(run) if unit]
    assert read == sorted(
        read, key=lambda names: min(units.index(u) for u in units if u & set(names))
    ), "the first layers of a stage are read first"


def countdown_of(sizes, max_elements):
    parameters, runs = model_of(sizes)
    layout = lay_out(parameters, runs, max_elements=max_elements)
    started = []
    return layout, started, Countdown(layout, lambda bucket: started.append(bucket.names))


def test_a_bucket_starts_with_its_last_name_and_never_twice():
    layout, started, countdown = countdown_of([[[10], [20], [30]]], 30)
    assert [bucket.names for bucket in layout.buckets] == [("p0", "p1"), ("p2",)]
    for _ in range(2):
        countdown.ready(["p1"])
        assert started == []
        countdown.ready(["p2", "p0"])
        assert started == [("p2",), ("p0", "p1")]
        countdown.finish()
        assert len(started) == 2
        started.clear()


def test_buckets_that_were_never_ready_start_at_the_end():
    _, started, countdown = countdown_of([[[10], [20]], [[30]]], 30)
    countdown.ready(["p1"])
    countdown.finish()
    assert started == [("p0", "p1"), ("p2",)]


def test_a_name_is_ready_once_a_step():
    _, _, countdown = countdown_of([[[10, 20]]], 30)
    countdown.ready(["p0"])
    with pytest.raises(KeyError, match="p0"):
        countdown.ready(["p0"])
