"""All optimizers equal AdamW on the sum of all replicas' gradients, for any buckets."""

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from tests.optim.setup import NAMES, SHAPES, WITH_OFFLOAD, accumulate, build, values
from vp_train.communication.control import ControlGroup
from vp_train.config import OptimConfig
from vp_train.optim.adamw import MOMENTS, build_adamw, gather_health
from vp_train.optim.buckets import lay_out
from vp_train.optim.gradients import Gradients
from vp_train.optim.optimizer import squared_norm
from vp_train.optim.replicas import Replicas

GROUPINGS = (
    [["none"], ["c.weight"], ["b.weight", "b.bias"], ["a.weight"], ["norm"]],
    [["norm", "b.bias"], ["none", "a.weight", "b.weight", "c.weight"]],
    [["b.weight"]],  # the others are left to `reduce`
    [],
)


def updated(name, dtype, steps, scale=0.25, grouping=(), max_elements=3000, skipped=()):
    """Return the parameters and the first replica's state after `steps`, without the `skipped`."""
    parameters, gradients, optimizer = build(name, dtype=dtype, max_elements=max_elements)
    for step in range(steps):
        accumulate(gradients, 1 + step, dist.get_rank())
        for names in grouping:
            optimizer.ready(names)
        optimizer.reduce()
        if step not in skipped:
            optimizer.step(0.01 * (step + 1), scale)
    state = optimizer.state()
    return {key: parameter.detach().clone() for key, parameter in parameters.items()}, state


def expected(num_ranks, dtype, steps, scale=0.25, skipped=()):
    """Return the same from torch's AdamW in the precision of the state, in one process."""
    precise = torch.float64 if dtype is torch.float64 else torch.float32
    masters = {
        key: torch.nn.Parameter(value.to(precise)) for key, value in values(0, dtype).items()
    }
    adamw = build_adamw(masters.values(), OptimConfig())
    for step in range(steps):
        if step in skipped:
            continue
        for key, master in masters.items():
            master.grad = scale * sum(
                values(1 + step + 100 * rank, precise)[key] for rank in range(num_ranks)
            )
        for group in adamw.param_groups:
            group["lr"] = 0.01 * (step + 1)
        adamw.step()
    moments = {
        kind: {key: adamw.state[master][kind] for key, master in masters.items()}
        for kind in MOMENTS
    }
    return {"parameter": {key: master.detach() for key, master in masters.items()}} | moments


def differences(rank, num_ranks, name, dtype, **options):
    """Return the largest difference of the parameters and, on the first replica, of the state."""
    parameters, state = updated(name, dtype, **options)
    truth = expected(num_ranks, dtype, options["steps"], skipped=options.get("skipped", ()))
    found = [
        (parameters[key].double() - truth["parameter"][key].to(dtype).double()).abs().max().item()
        for key in SHAPES
        if key != "none"
    ]
    if rank == 0:
        assert {kind: by_name.keys() for kind, by_name in state.items()} == {
            kind: SHAPES.keys() for kind in truth
        }
        found += [
            (state[kind][key].double() - truth[kind][key].double()).abs().max().item()
            for kind in truth
            for key in SHAPES
            if key != "none"
        ]
    assert all(map(torch.isfinite, map(torch.tensor, found)))
    return max(found)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", WITH_OFFLOAD)
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_scaled_steps_are_those_of_one_adamw_on_the_sum(ranks, num_ranks, name, dtype):
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.02}[dtype]
    for found in ranks(num_ranks).run(on_few, num_ranks, differences, name, dtype, {"steps": 3}):
        assert found < tolerance


def on_few(rank, num_ranks, wanted, function, name, dtype, options):
    assert num_ranks == wanted
    return function(rank, num_ranks, name, dtype, **options)


@pytest.mark.parametrize("name", WITH_OFFLOAD)
def test_a_skipped_step_leaves_nothing_behind(ranks, name):
    options = {"steps": 3, "skipped": (0, 1), "grouping": GROUPINGS[0]}
    for found in ranks(2).run(on_few, 2, differences, name, torch.float64, options):
        assert found < 1e-12


def groupings(rank, num_ranks, name):
    """Return the parameters for every grouping and several sizes of buckets."""
    return [
        updated(name, torch.bfloat16, 2, grouping=grouping, max_elements=size)[0]
        for grouping in GROUPINGS
        for size in (1, 3000, 10**6)
    ]


@pytest.mark.parametrize("name", NAMES)
def test_grouping_of_names_and_size_of_buckets_change_no_bit(ranks, name):
    first, *others = [found for results in ranks(2).run(groupings, name) for found in results]
    for other in others:
        assert all(torch.equal(first[key], other[key]) for key in SHAPES)


def reduced(rank, num_ranks, name):
    """Return the error of this replica's part after `reduce`, the squared norm, and its truth."""
    _, gradients, optimizer = build(name)
    accumulate(gradients, 1, rank)
    optimizer.ready(["c.weight"])
    optimizer.reduce()
    total = torch.zeros_like(gradients.flat)
    for key in SHAPES:
        start, stop = gradients.layout.bounds[key]
        total[start:stop] = sum(values(1 + 100 * r)[key].flatten() for r in range(num_ranks))
    worst = 0.0
    for bucket in gradients.layout.buckets:
        start, stop = (
            (bucket.start, bucket.stop) if name == "adamw" else bucket.part(rank, num_ranks)
        )
        if start < stop:
            worst = max(worst, (gradients.flat[start:stop] - total[start:stop]).abs().max().item())
    norm = optimizer.squared_norm()
    dist.all_reduce(norm)
    return worst, norm.item(), total.square().sum().item()


@pytest.mark.parametrize("name", NAMES)
def test_reduce_sums_what_was_announced_and_what_was_not(ranks, name):
    for worst, norm, truth in ranks(2).run(reduced, name):
        assert worst < 1e-12
        assert norm == pytest.approx(truth, rel=1e-12), (
            "every gradient counts once, padding adds nothing"
        )


def norm_with_copies(rank, num_ranks, name):
    _, gradients, optimizer = build(name, copied=frozenset({"b.bias", "c.weight"}))
    accumulate(gradients, 1, 0)
    gradients.flat.div_(num_ranks)
    optimizer.reduce()
    norm = optimizer.squared_norm()
    dist.all_reduce(norm)
    return norm.item()


@pytest.mark.parametrize("name", WITH_OFFLOAD)
def test_copies_do_not_count_for_the_norm(ranks, name):
    truth = sum(
        value.square().sum().item()
        for key, value in values(1).items()
        if key not in ("b.bias", "c.weight")
    )
    assert ranks(2).run(norm_with_copies, name) == pytest.approx([truth] * 2, rel=1e-12)


def zeroed(rank, num_ranks, name):
    """Return whether `zero` sets all gradients to 0 in place and makes them `grad` again."""
    parameters, gradients, optimizer = build(name)
    before = {key: gradients[key].data_ptr() for key in SHAPES}
    accumulate(gradients, 1, rank)
    optimizer.reduce()
    optimizer.step(0.1, 1.0)
    optimizer.settle()
    parameters["norm"].grad = None
    gradients.zero()
    grads = [parameter.grad for parameter in parameters.values()]
    return (
        not gradients.flat.any()
        and all(grad is not None and not grad.any() for grad in grads)
        and {key: parameter.grad.data_ptr() for key, parameter in parameters.items()} == before
    )


@pytest.mark.parametrize("name", NAMES)
def test_zero_clears_gradients_in_place(ranks, name):
    assert ranks(2).run(zeroed, name) == [True] * 2


def gone_on(rank, num_ranks, before, after):
    """Continue optimizer `before`, and an optimizer `after` that restores its state, and compare.

    Returns whether parameters are equal at once and after two more steps, and the counts of
    updates.
    """
    first, gradients, optimizer = build(before, dtype=torch.bfloat16)
    accumulate(gradients, 1, rank)
    optimizer.reduce()
    optimizer.step(0.1, 0.5)
    state = [
        {
            kind: {key: value.clone() for key, value in named.items()}
            for kind, named in optimizer.state().items()
        }
    ]
    dist.broadcast_object_list(state, 0)
    second, others, other = build(after, dtype=torch.bfloat16, max_elements=10**6)
    other.restore(lambda kind, key: state[0][kind][key].clone())
    at_once = all(torch.equal(first[key], second[key]) for key in SHAPES)
    other.updates = optimizer.updates
    for step in (2, 3):
        for adamw, main_grads in ((optimizer, gradients), (other, others)):
            accumulate(main_grads, step, rank)
            adamw.reduce()
            adamw.step(0.1, 0.5)
            adamw.settle()
    same = all(torch.equal(first[key], second[key]) for key in SHAPES)
    return at_once, same, (optimizer.updates, other.updates)


@pytest.mark.parametrize("after", WITH_OFFLOAD)
@pytest.mark.parametrize("before", WITH_OFFLOAD)
def test_a_restored_optimizer_goes_on_as_the_one_that_was_saved(ranks, before, after):
    assert ranks(2).run(gone_on, before, after) == [(True, True, (3, 3))] * 2


def gathering(rank):
    """Return an optimizer whose gathers run, and the list of the buckets that are waited for."""
    _, gradients, optimizer = build("zero1")
    accumulate(gradients, 1, rank)
    optimizer.reduce()
    optimizer.step(0.1, 1.0)
    waited = []
    for index, pending in optimizer._gathers.items():
        pending.wait()
        optimizer._gathers[index] = Waited(waited, optimizer._shards[index].bucket.names)
    return optimizer, waited


def late(rank, num_ranks):
    """Return the buckets waited for: by `need` of nothing, of one bucket, and by `settle`."""
    optimizer, waited = gathering(rank)
    begun = sorted(index for index in optimizer._gathers)
    optimizer.need([])
    optimizer.need(["none"])
    nothing = list(waited)
    optimizer.need(["b.bias", "b.weight"])
    optimizer.need(["b.bias"])
    needed = list(waited)
    optimizer.settle()
    optimizer.settle()
    return len(begun), nothing, needed, sorted(name for names in waited for name in names)


class Waited:
    def __init__(self, waited, names):
        self._waited, self._names = waited, names

    def wait(self):
        self._waited.append(self._names)


def test_new_parameters_are_waited_for_bucket_by_bucket_and_once(ranks):
    for begun, nothing, needed, everything in ranks(2).run(late):
        assert begun == 3
        assert nothing == []
        assert needed == [("b.weight", "b.bias")]
        assert everything == sorted(set(SHAPES) - {"none"})


def sums_waited_for(rank, num_ranks, name):
    """Return the numbers of sums that `reduce` starts and waits for."""
    _, gradients, optimizer = build(name)
    accumulate(gradients, 1, rank)
    optimizer.ready(list(SHAPES))
    waited, begun = [], list(optimizer._sums)
    for pending in begun:
        pending.wait()
    optimizer._sums[:] = [Waited(waited, index) for index in range(len(begun))]
    optimizer.reduce()
    return len(begun), waited, len(optimizer._sums)


@pytest.mark.parametrize("name", NAMES)
def test_reduce_waits_for_every_sum_once(ranks, name):
    assert ranks(2).run(sums_waited_for, name) == [(3, [0, 1, 2], 0)] * 2


def gathers_waited_for(rank, num_ranks, deed):
    """Return the parameters whose gathers `deed` waits for, when all run."""
    optimizer, waited = gathering(rank)
    if deed == "step":
        optimizer.step(0.1, 1.0)
    elif deed == "state":
        optimizer.state()
    else:
        optimizer.restore(lambda kind, name: torch.zeros(SHAPES[name], dtype=torch.float64))
    return sorted(name for names in waited for name in names)


@pytest.mark.parametrize("deed", ["step", "state", "restore"])
def test_nothing_is_updated_read_or_loaded_while_it_is_still_gathered(ranks, deed):
    assert ranks(2).run(gathers_waited_for, deed) == [sorted(set(SHAPES) - {"none"})] * 2


class NoSynchronisation(TorchDispatchMode):
    """Refuse operations that wait for a device because they return a value to Python."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "local_scalar_dense" not in str(func), func
        assert "nonzero" not in str(func), func
        return func(*args, **(kwargs or {}))


def without_synchronisation(rank, num_ranks, name):
    _, gradients, optimizer = build(name, dtype=torch.float32)
    for step in (1, 2):
        with NoSynchronisation():
            accumulate(gradients, step, rank)
            optimizer.ready(["c.weight"])
            optimizer.reduce()
            norm = optimizer.squared_norm()
            optimizer.step(0.1, 0.5)
            optimizer.need(["c.weight"])
            assert optimizer.updates == step
    return norm.shape == () and norm.dtype is torch.float64


@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_a_step_asks_the_device_for_a_value(ranks, name):
    assert ranks(2).run(without_synchronisation, name) == [True] * 2


def copies_to_the_host(rank, num_ranks):
    """Return the shapes that `gather_health` copies to the host, seen by its calls of `cpu`."""
    copies, inner = [], torch.Tensor.cpu
    torch.Tensor.cpu = lambda tensor: (copies.append(tensor.shape), inner(tensor))[1]
    try:
        health = gather_health(
            torch.tensor(2.0),
            squared_norm([torch.full((4,), 3.0)]),
            ControlGroup.flat(dist.group.WORLD),
        )
    finally:
        torch.Tensor.cpu = inner
    return copies, health.loss, health.grad_norm


def test_loss_and_norm_come_to_the_host_in_one_copy(ranks):
    for copies, loss, norm in ranks(2).run(copies_to_the_host):
        assert copies == [(3,)]
        assert loss == 4.0
        assert norm == pytest.approx(72**0.5)


def step_of_nothing(rank, num_ranks, name):
    """Make a step of a rank without parameters; return its norm, updates and state."""
    gradients = Gradients({}, lay_out({}, [], max_elements=10, num_parts=num_ranks))
    optim = OptimConfig("adamw" if name == "adamw" else "zero1", offload=name == "offload")
    optimizer = WITH_OFFLOAD[name]({}, gradients, optim, Replicas(dist.group.WORLD))
    optimizer.ready([])
    optimizer.reduce()
    norm = optimizer.squared_norm()
    optimizer.step(0.1, 0.5)
    optimizer.need([])
    optimizer.settle()
    optimizer.restore(lambda kind, name: torch.empty(0))
    return norm.item(), norm.dtype, optimizer.updates, optimizer.state()


@pytest.mark.parametrize("name", WITH_OFFLOAD)
def test_a_rank_without_parameters_takes_part_in_every_step(ranks, name):
    nothing = {kind: {} for kind in ("parameter", *MOMENTS)}
    assert ranks(2).run(step_of_nothing, name) == [(0.0, torch.float64, 1, nothing)] * 2


def test_the_norm_of_nothing_is_zero():
    assert squared_norm([]).item() == 0
    assert squared_norm([]).dtype is torch.float64
