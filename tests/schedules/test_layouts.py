"""Every base schedule refuses the layouts it cannot have, and a layout places every stage once."""

import pytest

from schedules.generators import GENERATORS
from schedules.ir import Kind
from schedules.layout import LAYOUTS, Layout
from schedules.problem import Problem
from schedules.vocab import VOCAB_ALGORITHMS

NONE = VOCAB_ALGORITHMS["none"]
V_SHAPED = ("v_half", "v_min", "zb_v")


def layouts(p):
    return [
        Layout("linear", p),
        Layout("loop", p, 1),
        Layout("loop", p, 2),
        Layout("loop", p, 3),
        Layout("v", p, 2),
    ]


@pytest.mark.parametrize("name", V_SHAPED)
@pytest.mark.parametrize("layout", layouts(3)[:-1], ids=str)
@pytest.mark.parametrize("split_backward", [False, True])
def test_v_schedules_refuse_other_layouts_in_words(name, layout, split_backward):
    case = Problem(layout, 4, NONE, split_backward=split_backward)
    with pytest.raises(
        ValueError, match=rf"needs layout 'v' and a split backward, not layout '{layout.name}'"
    ):
        GENERATORS[name].base_order(case)


@pytest.mark.parametrize("name", V_SHAPED)
def test_v_schedules_refuse_a_whole_backward_in_words(name):
    with pytest.raises(ValueError, match="needs layout 'v' and a split backward"):
        GENERATORS[name].base_order(Problem(Layout("v", 3, 2), 4, NONE))


@pytest.mark.parametrize("name", sorted(GENERATORS))
@pytest.mark.parametrize("p", [1, 2, 3])
@pytest.mark.parametrize("split_backward", [False, True])
def test_a_base_order_has_every_stage_pass_once_or_is_refused_in_words(name, p, split_backward):
    accepted = 0
    for layout in layouts(p):
        case = Problem(layout, 3, NONE, split_backward=split_backward)
        try:
            order = GENERATORS[name].base_order(case)
        except ValueError as error:
            assert any(word in str(error) for word in ("layout", "stage", "split"))  # noqa: PT017 - most are accepted
            continue
        accepted += 1
        for rank, items in enumerate(order):
            # The base order of interlaced contains vocabulary passes too.
            stage_passes = [item for item in items if not item.kind.is_vocabulary]
            assert sorted(stage_passes) == sorted(
                item for item in case.passes_of(rank) if not item.kind.is_vocabulary
            )
    own = GENERATORS[name].split_backward
    assert accepted or own != split_backward


@pytest.mark.parametrize("p", [1, 2, 3, 4])
def test_a_layout_owns_every_stage_once_and_neighbours_are_where_it_says(p):
    for layout in layouts(p):
        owned = [stage for rank in range(p) for stage in layout.stages_of(rank)]
        assert sorted(owned) == list(range(layout.num_stages)) == list(range(p * layout.num_chunks))
        for rank in range(p):
            assert len(layout.stages_of(rank)) == layout.num_chunks
            assert all(layout.rank_of(stage) == rank for stage in layout.stages_of(rank))
        ranks = [layout.rank_of(stage) for stage in range(layout.num_stages)]
        chunk = list(range(p))
        assert ranks == (chunk + chunk[::-1] if layout.name == "v" else chunk * layout.num_chunks)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ring", 2), "layout 'ring' is not known; choose one of linear, loop, v"),
        (("loop", 0), "0 ranks with 1 chunks: both must be at least 1"),
        (("loop", 2, 0), "2 ranks with 0 chunks: both must be at least 1"),
        (("linear", 2, 2), r"layout 'linear' has 1 chunk\(s\) per rank, not 2"),
        (("v", 2), r"layout 'v' has 2 chunk\(s\) per rank, not 1"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(arguments, message):
    assert LAYOUTS == ("linear", "loop", "v")
    with pytest.raises(ValueError, match=message):
        Layout(*arguments)


def test_a_step_needs_a_microbatch():
    with pytest.raises(ValueError, match="0 microbatches; a step needs at least 1"):
        Problem(Layout("linear", 2), 0, NONE)
    assert {item.kind for item in Problem(Layout("linear", 2), 1, NONE).passes_of(0)} == {
        Kind.F,
        Kind.B,
        Kind.E,
        Kind.G,
    }
