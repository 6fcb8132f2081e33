"""Activations in host memory: nothing stays on the device, and no bit of a result changes."""

from __future__ import annotations

import random
from collections import deque
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from schedules.check import check_program
from schedules.generators import GENERATORS
from schedules.ir import Kind, Pass
from schedules.lower import HOST_TRANSFERS, Action, Op
from tests.local import run_locally
from tests.pipeline.compare import assert_all_close
from tests.pipeline.equivalence import ALGORITHMS, compare_locally, config_of
from tests.pipeline.test_local import gradients_of
from tests.pipeline.truth import random_batch
from vp_train.config import VocabConfig
from vp_train.pipeline.offload import HostLink, HostMemory, OffloadOrderError
from vp_train.pipeline.recorder import Recorder
from vp_train.pipeline.timers import timer_of
from vp_train.planning.plan import make_plan
from vp_train.tensors.alignment import HOST_BLOCK_BYTES
from vp_train.tensors.streams import HostOrder

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("unrefined")


def with_offloads(plan, seed=0, skip=()):
    """Return `plan` with every forward pass offloaded, at places drawn with `seed`.

    Without a seed the copies take the least memory.  The passes `skip` are left out.
    """
    rng, ranks = random.Random(seed), []
    backward = Kind.I if plan.problem.split_backward else Kind.B
    for ops in plan.program.ranks:
        ops = list(ops)
        for item in [op.item for op in ops if op.action is Action.RUN and op.item.kind is Kind.F]:
            if item in skip:
                continue
            places = {str(op): place for place, op in enumerate(ops)}
            reader = Pass(item.stage, backward, item.microbatch)
            first = places[str(item)] + 1
            last = min(places.get(str(reader), len(ops)), places.get(f"{reader}!", len(ops)))
            apart = (Action.OFFLOAD, Action.RESTORED)  # nothing comes between these and a pass
            allowed = [
                place
                for place in range(first, last + 1)
                if not any(op.action in apart for op in (*ops[place - 1 : place], *ops[place:][:1]))
            ] or [first]
            inside = [first, last] if seed is None else sorted(rng.choices(allowed, k=2))
            actions = (Action.OFFLOAD, Action.OFFLOADED, Action.RELOAD, Action.RESTORED)
            for action, place in reversed(list(zip(actions, (first, *inside, last), strict=True))):
                ops.insert(place, Op(action, item))
        ranks.append(tuple(ops))
    program = replace(plan.program, ranks=tuple(ranks))
    check_program(program, plan.problem)
    return replace(plan, program=program)


def offloading(config, part=1.0, **parallel):
    parallel = {"offload_activations": part, **parallel}
    return replace(config, parallel=replace(config.parallel, **parallel))


def plan_of(config, p, seed=0, skip=()):
    """Return a plan for `config` in which everything is offloaded."""
    return with_offloads(make_plan(offloading(config, 0.0), p), seed, skip)


def assert_offloaded_equals_one_process(config, p, seed=0, **options):
    comparisons = compare_locally(config, plan_of(config, p, seed), **options)
    assert_all_close(comparisons, 1e-9, config.vocab, config.schedule, config.parallel)


@pytest.mark.parametrize("name", sorted(GENERATORS))
def test_every_schedule_with_every_algorithm_equals_one_process(name):
    """Three ranks have two microbatches, fewer than ranks."""
    stages = GENERATORS[name].layout_of(3).num_stages
    for seed, algorithm in enumerate(ALGORITHMS):
        config = config_of(
            3, 2, 101, schedule=name, vocab=VocabConfig(algorithm), num_stages=stages
        )
        recompute = ("none", "selective", "full")[(seed + len(name)) % 3]
        assert_offloaded_equals_one_process(offloading(config, recompute=recompute), 3, seed)


@pytest.mark.parametrize("name", sorted(GENERATORS))
def test_every_schedule_as_it_is_planned_equals_one_process(name):
    stages = GENERATORS[name].layout_of(3).num_stages
    config = offloading(config_of(3, 6, 101, schedule=name, num_stages=stages))
    comparisons = compare_locally(config, make_plan(config, 3))
    assert_all_close(comparisons, 1e-9, config.schedule)


@pytest.mark.parametrize("m", [1, 5])
def test_other_layouts_and_data_equal_one_process(m):
    """Part of the layers, stages of other sizes, tied matrices, packed documents and a mask."""
    cases = [
        ({"schedule": "1f1b", "layers": (3, 0, 2), "tied": True}, 0.5),
        ({"schedule": "v_half", "num_stages": 6}, 1.0),
    ]
    for case, part in cases:
        config = offloading(config_of(3, m, 101, **case), part, recompute="selective")
        options = {"masked": True, "packed": True, "delay_seconds": 4e-4}
        assert_offloaded_equals_one_process(config, 3, m, **options)


@pytest.mark.parametrize("linear_dtype", ["compute", "float8"])
@pytest.mark.parametrize("name", ["1f1b", "zb_v"])
def test_no_bit_changes_in_bfloat16(name, linear_dtype):
    """The law holds too if some passes keep what they have on the device."""
    config = config_of(2, 3, 101, schedule=name, dtype="bfloat16", num_stages=4)
    model = replace(config.model, hidden_size=32, ffn_hidden_size=48)
    config = replace(config, model=model, run=replace(config.run, linear_dtype=linear_dtype))
    batch = random_batch(config, 1)
    expected = gradients_of(config, make_plan(config, 2), batch)
    offloaded = offloading(config)
    for seed, skip in enumerate(((), (Pass(1, Kind.F, 0),))):
        plan = plan_of(config, 2, seed, skip)
        found = gradients_of(offloaded, plan, batch, delay_seconds=4e-4, seed=seed)
        assert found.keys() == expected.keys()
        assert [name for name in found if not torch.equal(found[name], expected[name])] == []


# Memory


class Seen(TorchDispatchMode):
    """Collect the storages of all tensors that operations read or write, without holding them."""

    def __init__(self):
        super().__init__()
        self.storages = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                self.storages.setdefault(
                    storage._cdata, (StorageWeakRef(storage), storage.nbytes())
                )
        return result


class LeftOnDevice:
    """An observer that finds what is left of each forward pass when its reload begins.

    `left` has the bytes of the storages that the pass has read or written and that are still there,
    without those of parameters and buffers, and without the output, which belongs to the next pass.
    """

    def __init__(self, model):
        self.left, self._seen = {}, {}
        self._fixed, self._outputs = set(), set()
        for stage in model.stages.values():
            tensors = (*stage.parameters(), *stage.buffers())
            self._fixed |= {tensor.untyped_storage()._cdata for tensor in tensors}
            stage.register_forward_hook(self._note_output)

    def _note_output(self, stage, inputs, output):
        self._outputs.add(output.untyped_storage()._cdata)

    @contextmanager
    def observe(self, item, held_bytes):
        if item.kind is Kind.F:
            with Seen() as seen:
                yield
            self._seen[item] = seen.storages
        else:
            yield

    @contextmanager
    def waits(self, action, item):
        if action is Action.RELOAD:
            others = self._fixed | self._outputs
            seen = self._seen.pop(item).items()
            self.left[item] = [
                size
                for key, (ref, size) in seen
                if size and key not in others and not ref.expired()
            ]
        yield

    def watch(self, name, channel, pending):
        return pending


FAMILIES = [
    {},
    {"qk_norm": True, "post_norms": True, "attention_softcap": 3.0, "embedding_scale": True},
    {"normalisation": "layernorm", "activation": "gelu", "linear_bias": True, "qkv_bias": True}
    | {"positions": "learned"},
    {"pre_norms": False, "post_norms": True, "qk_norm": True, "qk_norm_whole": True},
]


def left_on_device(config, plan):
    """Return what is left of all forward passes of two ranks, by pass."""

    def work(rank, model, together):
        observer = LeftOnDevice(model)
        model.train_step(*random_batch(config, 1), observer)
        return observer.left

    first, second = run_locally(config, plan, work)
    return first | second


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_of_offloaded_layers_stays_on_the_device(family, recompute):
    """The last stage keeps the input of its final norm, which is no layer: [s, b, h] in fp64."""
    config = config_of(2, 2, 101, layers=(2, 2))
    config = replace(config, model=replace(config.model, **family))
    config = offloading(config, recompute=recompute)
    left = left_on_device(config, plan_of(config, 2))
    assert left[Pass(0, Kind.F, 0)] == left[Pass(0, Kind.F, 1)] == []
    for microbatch in range(2):
        normed, *statistics = sorted(left[Pass(1, Kind.F, microbatch)], reverse=True)
        assert normed == 6 * 2 * 16 * 8
        assert sum(statistics) <= 2 * 6 * 2 * 8


def test_layers_that_are_not_offloaded_keep_what_they_keep_otherwise():
    config = config_of(2, 2, 101, layers=(2, 2))
    halves = left_on_device(offloading(config, 0.5), plan_of(config, 2))
    without = left_on_device(config, plan_of(config, 2))
    for item, sizes in without.items():
        assert 0.45 < sum(halves[item]) / sum(sizes) < 0.65


def recorded(config, plan):
    """Return the recorders of a step of each rank."""

    def work(rank, model, together):
        recorder = Recorder(rank, timer_of(CPU), list(model.parameters.values()))
        model.train_step(*random_batch(config, 1), recorder)
        return recorder

    return run_locally(config, plan, work)


def test_the_recorder_counts_what_is_on_the_device_and_shows_the_copies():
    """The first of two ranks holds three microbatches at its peak; one if the others are away."""
    config = config_of(2, 4, 101)
    without, _ = recorded(config, make_plan(config, 2))
    recorder, _ = recorded(offloading(config), plan_of(config, 2, seed=None))
    assert 0.25 < recorder.peak_bytes / without.peak_bytes < 0.5
    copies = [span for span in recorder.communications if ":" in span.name]
    names = [f"{action}:0F{i}" for action in HOST_TRANSFERS for i in range(4)]
    assert sorted(span.name for span in copies) == sorted(names)
    assert {span.kind for span in copies} == {str(action) for action in HOST_TRANSFERS}


@pytest.mark.parametrize(
    ("name", "part", "recompute"),
    [("1f1b", 1.0, "none"), ("interleaved", 0.5, "selective"), ("v_half", 1.0, "none")],
)
def test_bytes_are_as_planned(name, part, recompute):
    """The bytes moved in a step are exact, the highest peak of each rank holds to 2 %."""
    config = offloading(config_of(3, 6, 101, schedule=name, num_stages=12), part)
    config = replace(config, parallel=replace(config.parallel, recompute=recompute))
    plan = make_plan(config, 3)

    def work(rank, model, together):
        recorder = Recorder(rank, timer_of(CPU), list(model.parameters.values()))
        model.train_step(*random_batch(config, 1), recorder)
        return recorder.peak_bytes, model.trainer.moved_bytes

    found = run_locally(config, plan, work)
    assert any(moved for _, moved in found)
    for rank, (peak, moved) in enumerate(found):
        assert moved == 2 * plan.timeline.moved_bytes(rank)
        assert peak == pytest.approx(plan.timeline.peak_bytes[rank], rel=0.02)


def test_host_memory_is_used_again_in_every_step():
    config = offloading(config_of(2, 3, 101, layers=(2, 1)))
    plan = plan_of(config, 2)

    def work(rank, model, together):
        memory, found = model.trainer._link.memory, []
        for step in range(3):
            model.gradients.zero()
            model.train_step(*random_batch(config, step))
            model.optimizer.reduce()
            found.append((memory.num_bytes, memory.used_bytes))
        return found

    for first, *others in run_locally(config, plan, work):
        assert first[0] > 0
        assert first[1] == 0
        assert others == [first] * 2


@pytest.mark.parametrize("schedule", ["1f1b", "zb_h1"])
def test_host_memory_is_as_large_as_planned(schedule):
    config = offloading(config_of(2, 5, 101, layers=(2, 1), schedule=schedule))
    plan = make_plan(config, 2)

    def work(rank, model, together):
        model.train_step(*random_batch(config, 0))
        return model.trainer.host_bytes

    for rank, count in enumerate(run_locally(config, plan, work)):
        assert count == plan.timeline.host_bytes(rank, HOST_BLOCK_BYTES) > 0


def test_a_step_that_is_skipped_leaves_nothing_behind():
    """A step whose gradients overflow, as in float16, changes nothing, and the run goes on."""
    config = offloading(config_of(2, 4, 101, schedule="interleaved", num_stages=4))
    plan, batch = make_plan(config, 2), random_batch(config, 1)
    assert plan.schedule.offloads

    def work(rank, model, together):
        values, used = next(iter(model.parameters.values())).detach(), []
        kept = values.clone()
        for value in (torch.full_like(kept, torch.nan), kept):
            values.copy_(value)
            model.gradients.zero()
            model.train_step(*batch)
            model.optimizer.reduce()
            used.append((bool(model.optimizer.squared_norm().isfinite()), host_of(model)))
        found = {name: parameter.grad.clone() for name, parameter in model.parameters.items()}
        return used, found

    without = replace(config, parallel=replace(config.parallel, offload_activations=0.0))
    expected = gradients_of(without, make_plan(without, 2), batch)
    for rank, (used, found) in enumerate(run_locally(config, plan, work)):
        (_, first), (_, second) = used
        assert [finite for finite, _ in used] == [False, True]
        assert first == second  # nothing in use, and no more than before
        assert all(torch.equal(grad, expected[f"{rank} {name}"]) for name, grad in found.items())


def host_of(model):
    """Return the bytes of host memory that are there and in use."""
    memory = model.trainer._link.memory
    assert memory.used_bytes == 0
    return memory.num_bytes


class FailsAt:
    """An observer that fails at an operation on a forward pass."""

    def __init__(self, action, item):
        self._at = action, item

    def observe(self, item, held_bytes):
        return nullcontext()

    def waits(self, action, item):
        if (action, item) == self._at:
            raise RuntimeError(f"lost at {action}:{item}")
        return nullcontext()

    def watch(self, name, channel, pending):
        return pending


@pytest.mark.parametrize("action", HOST_TRANSFERS)
def test_a_rank_that_fails_at_a_copy_ends_all_with_its_error(action):
    """And the next run in this process begins anew."""
    config = offloading(config_of(2, 4, 101))
    plan, batch = make_plan(config, 2), random_batch(config, 1)
    item = plan.schedule.offloads[-1].item

    def work(rank, model, together):
        model.train_step(*batch, FailsAt(action, item))

    with pytest.raises(RuntimeError, match=f"lost at {action}:{item}"):
        run_locally(config, plan, work)
    assert gradients_of(config, plan, batch)


def fails_with(words):
    def fail(*sizes, **options):
        raise RuntimeError(words)

    return fail


@pytest.mark.parametrize("cause", ["CUDA error: out of memory", "can't allocate memory"])
def test_a_host_without_memory_says_how_much_it_had_and_what_to_lower(monkeypatch, cause):
    memory = HostMemory(pinned=False, block_bytes=1 << 28)
    memory.take()
    monkeypatch.setattr(torch, "empty", fails_with(cause))
    words = r"no memory for more than 0\.2 GiB of .*; lower parallel\.offload_activations"
    with pytest.raises(MemoryError, match=words):
        memory.take()


def test_another_error_is_not_taken_for_a_lack_of_host_memory(monkeypatch):
    cause = "CUDA error: an illegal memory access was encountered"
    monkeypatch.setattr(torch, "empty", fails_with(cause))
    with pytest.raises(RuntimeError, match=cause):
        HostMemory(pinned=False).take()


# Order


class Stretch(torch.autograd.Function):
    """x * w, which saves both, a view of x, and a tensor of integers."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w, x[1:, ::2], torch.arange(3), x.new_empty(0))
        return x * w

    @staticmethod
    def backward(ctx, dy):
        x, w, part, numbers, nothing = ctx.saved_tensors
        assert torch.equal(part, x[1:, ::2])
        assert numbers.tolist() == [0, 1, 2]
        assert not len(nothing)
        return dy * w, (dy * x).sum(0)


def kept_of(link, x, w, name="0F0"):
    """Return what a product keeps, and its gradient edge; nothing else holds what it saves."""
    kept = link.keep(name, {w.untyped_storage().data_ptr()})
    with kept.hooks():
        y = Stretch.apply(x, w)
    return kept, torch.autograd.graph.get_gradient_edge(y)


def link(streams=None, block_bytes=512):
    return HostLink(streams or HostOrder(), CPU, block_bytes)


MOVES = ("offload", "offloaded", "reload", "restored")


def test_the_device_of_a_link_is_that_of_the_tensors_on_it(monkeypatch):
    """A tensor on a GPU has a device with an index; it would seem to be elsewhere."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert HostLink(HostOrder(), torch.device("cuda")).device == torch.device("cuda", 1)


@pytest.mark.parametrize("missing", MOVES)
def test_a_program_that_lacks_an_operation_ends_with_its_name(missing):
    w = torch.ones(6, dtype=torch.float64, requires_grad=True)
    kept, y = kept_of(link(), torch.ones(5, 6, dtype=torch.float64), w)

    def run():
        for move in MOVES:
            if move != missing:
                getattr(kept, move)()
        torch.autograd.backward(y, torch.ones(5, 6, dtype=torch.float64))

    with pytest.raises(OffloadOrderError, match=r"(:0F0 comes while its|lacks restored:0F0)"):
        run()


def test_an_operation_that_comes_twice_ends_with_its_name():
    w = torch.ones(6, dtype=torch.float64, requires_grad=True)
    for number, move in enumerate(MOVES):
        kept, _ = kept_of(link(), torch.ones(5, 6, dtype=torch.float64), w)
        for earlier in MOVES[: number + 1]:
            getattr(kept, earlier)()
        with pytest.raises(OffloadOrderError, match=f"{move}:0F0 comes while its activations are"):
            getattr(kept, move)()


@pytest.mark.parametrize("action", [Action.OFFLOADED, Action.RELOAD, Action.RESTORED])
def test_the_executor_refuses_a_program_without_one_of_them(action):
    config = offloading(config_of(2, 2, 101))
    plan = plan_of(config, 2)
    ranks = [
        tuple(op for op in ops if (op.action, op.item) != (action, Pass(1, Kind.F, 1)))
        for ops in plan.program.ranks
    ]
    plan = replace(plan, program=replace(plan.program, ranks=tuple(ranks)))
    with pytest.raises(OffloadOrderError, match="1F1"):
        gradients_of(config, plan, random_batch(config, 1))


# Storages


def test_a_storage_is_copied_once_and_only_where_something_was_saved():
    """Two views overlap in the second kilobyte of a storage of four."""
    whole = torch.arange(512, dtype=torch.float64)
    first, second = whole[130:190].view(6, 10), whole[140:250:2]
    leaf = torch.ones((), dtype=torch.float64, requires_grad=True)
    own = link()
    kept = own.keep("0F0", ())
    with kept.hooks():
        y = (first.T * leaf).sum() + (second * leaf).sum() + (first[:1].expand(7, 10) * leaf).sum()
    assert kept.num_bytes == 249 * 8 - 1024
    expected = first.sum() + second.sum() + 7 * first[0].sum()
    for move in MOVES:
        getattr(kept, move)()
        if move == "offloaded":
            whole.zero_()  # what comes back is a copy
            assert own.memory.used_bytes == 1024
    y.backward()
    assert torch.equal(leaf.grad, expected)
    assert own.memory.used_bytes == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("size", [1, 255, 2049])
def test_values_of_every_dtype_come_back_across_blocks(dtype, size):
    values = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)
    leaf = torch.ones((), requires_grad=True)

    class Save(torch.autograd.Function):
        @staticmethod
        def forward(ctx, leaf):
            ctx.save_for_backward(values[size // 3 :], values)
            return leaf.clone()

        @staticmethod
        def backward(ctx, dy):
            for found, expected in zip(
                ctx.saved_tensors, (values[size // 3 :], values), strict=True
            ):
                assert found.data_ptr() != expected.data_ptr()
                assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
            return dy

    kept = link().keep("0F0", ())
    with kept.hooks():
        y = Save.apply(leaf)
    for move in MOVES:
        getattr(kept, move)()
    y.backward()
    assert leaf.grad == 1


class Ending(HostOrder):
    """Streams on which the end of a copy is a mark that is reached when the test says so."""

    def __init__(self):
        self.reached, self.followed = False, []

    def mark(self):
        return SimpleNamespace(query=lambda: self.reached)

    def follow(self, mark):
        self.followed.append(mark)


@pytest.mark.parametrize("on_device", [False, True])
def test_bytes_are_on_the_device_but_while_they_are_on_the_host_and_a_copy_ends_once(on_device):
    streams = Ending() if on_device else HostOrder()
    own = link(streams)
    w = torch.ones(6, dtype=torch.float64, requires_grad=True)
    kept, _ = kept_of(own, torch.ones(5, 6, dtype=torch.float64), w)
    size = kept.num_bytes
    assert size == 5 * 6 * 8
    assert (kept.device_bytes, kept.copying, own.moved_bytes) == (size, None, 0)
    for number, (move, on_it, moved) in enumerate(
        (("offload", size, size), ("offloaded", 0, size), ("reload", size, 2 * size))
    ):
        getattr(kept, move)()
        assert (kept.device_bytes, own.moved_bytes) == (on_it, moved), move
        in_flight = on_device and number != 1
        assert (kept.copying is not None) is in_flight
        if in_flight:
            copy = kept.copying
            streams.reached = False
            assert not copy.is_completed()
            streams.reached = True
            assert copy.is_completed()
            copied = copy.wait()
            assert copied.numel() == size
            assert streams.followed[-1] is copy.mark
    kept.restored()
    assert (kept.device_bytes, kept.copying) == (size, None)
    nothing = own.copy("a side", [])
    assert nothing.wait().numel() == 0
    assert nothing.is_completed()


def test_parameters_integers_and_empty_tensors_stay_where_they_are():
    own = link()
    owned, plain = torch.ones(4), torch.ones(4)
    kept = own.keep("0F0", {owned.untyped_storage().data_ptr()})
    for tensor in (owned, owned[1:], torch.arange(3), torch.ones(0), torch.ones(2, device="meta")):
        packed = kept._pack(tensor)
        assert isinstance(packed, torch.Tensor)
        assert packed.shape == tensor.shape
    assert not isinstance(kept._pack(plain), torch.Tensor)
    assert len(kept._storages) == 1


def test_blocks_are_cut_at_their_ends_and_aligned_within():
    """Blocks have 1,024 bytes; a part begins at a multiple of 512."""
    own = link(block_bytes=1_024)
    kept = own.keep("0F0", ())
    for size, parts in ((100, [100]), (600, [512, 88]), (512, [512]), (2_000, [1_024, 976])):
        found = [len(part) for part in kept._room(size)]
        assert found == parts, size
    assert own.memory.num_bytes == own.memory.used_bytes == 4 * 1_024
    own.memory.give(kept._blocks[:2])
    assert (own.memory.num_bytes, own.memory.used_bytes) == (4 * 1_024, 2 * 1_024)
    again = own.memory.take()
    assert (len(again), own.memory.num_bytes) == (1_024, 4 * 1_024)


# Compiled code


def test_what_compiled_code_saves_is_moved_too():
    """FlexAttention on CUDA is compiled as a whole, with its own saved tensors."""
    x, w = (torch.randn(40, dtype=torch.float64, requires_grad=True) for _ in range(2))
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    @torch.compile(backend=count)
    def function(x, w):
        return ((x * w).sin() * w).cos()

    found = []
    for moves in ((), MOVES):
        kept = link().keep("0F0", {w.untyped_storage().data_ptr()})
        with kept.hooks() if moves else nullcontext():
            y = function(x, w)
        for move in moves:
            getattr(kept, move)()
        assert (kept.num_bytes > 0) == bool(moves)
        found.append(torch.autograd.grad(y, (x, w), torch.ones_like(y)))
    assert len(graphs) == 1
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


# Streams


class Late(TorchDispatchMode):
    """Streams whose side work runs as late as the marks allow.

    A copy on a side stream is noted, and runs when the passes wait for a mark behind it.  Then what
    it reads and writes must still be there.  The passes run at once.
    """

    def __init__(self):
        super().__init__()
        self._sides, self._side, self.num_late = {}, None, 0

    def mark(self):
        if self._side is None:
            return None
        return partial(self._run, self._side, len(self._side))

    def follow(self, mark):
        if mark is not None:
            mark() if self._side is None else self._side.append(mark)

    @contextmanager
    def beside(self, name):
        self._side = self._sides.setdefault(name, [])
        with self:
            yield
        self._side = None

    def _run(self, side, number):
        for place in range(number):
            work, side[place] = side[place], None
            if work is not None:
                work()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is not torch.ops.aten.copy_.default:
            return func(*args, **(kwargs or {}))
        target, source = map(_without_holding, args[:2])
        self._side.append(lambda: target().copy_(source()))
        self.num_late += 1
        return args[0]


def _without_holding(tensor):
    """Return a function that returns `tensor`, and fails if its storage is no longer there."""
    reference = StorageWeakRef(tensor.untyped_storage())
    place = tensor.storage_offset(), tensor.shape, tensor.stride()

    def again():
        storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
        assert storage is not None, "freed before the copy has run"
        return torch.empty(0, dtype=torch.uint8).set_(storage, *place)

    return again


@pytest.fixture
def poisoned():
    """Fill what torch.empty returns with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("seed", range(10))
def test_copies_that_run_as_late_as_they_may_change_nothing(poisoned, seed):
    """Sixteen passes in random order, up to four of them between forward and backward."""
    rng, streams = random.Random(seed), Late()
    own, w = link(streams), torch.full((6,), 0.5, dtype=torch.float64, requires_grad=True)
    underway, expected = deque(), torch.zeros(6, dtype=torch.float64)
    for microbatch in range(16):
        x = torch.full((30, 6), microbatch + 1.0, dtype=torch.float64)
        expected += 30 * (microbatch + 1.0)
        kept, y = kept_of(own, x, w, f"0F{microbatch}")
        x = None
        kept.offload()
        underway.append([kept, y, iter(MOVES[1:])])
        while len(underway) > 4 or (underway and rng.random() < 0.7):
            entry = rng.choice(underway)
            move = next(entry[2], None)
            if move is not None:
                getattr(entry[0], move)()
            else:
                torch.autograd.backward(entry[1], torch.ones(30, 6, dtype=torch.float64))
                underway.remove(entry)
        torch.full((64, 64), torch.nan, dtype=torch.float64)  # uses freed memory again
    for kept, y, moves in underway:
        for move in moves:
            getattr(kept, move)()
        torch.autograd.backward(y, torch.ones(30, 6, dtype=torch.float64))
    assert streams.num_late == 16 * 2 * 3
    assert torch.equal(w.grad, expected)
    assert own.memory.used_bytes == 0
