"""The host never waits for a value of the device between the first and the last pass of a step."""

import threading
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from schedules.generators import GENERATORS
from tests.local import run_locally
from tests.pipeline.equivalence import ALGORITHMS, config_of
from tests.pipeline.truth import random_batch, random_segments
from vp_train.config import LossConfig, VocabConfig
from vp_train.planning.plan import make_plan

# These operations wait on a GPU: they return a number, or a shape that depends on values.
WAITING = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique",
    "unique_",
    "bincount",
    "repeat_interleave",
    "is_nonzero",
)


class Questions(TorchDispatchMode):
    """Collect the operations that make the host wait for the device."""

    def __init__(self):
        super().__init__()
        self.asked, self.seen = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put_", "index_put") and any(
            isinstance(leaf, torch.Tensor) and leaf.dtype is torch.bool
            for leaf in tree_leaves(args[1])
        )
        if by_mask or name.startswith(WAITING):
            self.asked.append(name)
        self.seen += 1
        return func(*args, **(kwargs or {}))


HERE = threading.local()  # has `questions` in a thread that is watched


@pytest.fixture(autouse=True)
def copies_to_the_host_are_seen(monkeypatch):
    """Record these methods, which wait for a GPU but are invisible to dispatch modes."""
    for name in ("tolist", "cpu", "numpy"):
        method = getattr(torch.Tensor, name)

        def asking(tensor, *arguments, name=name, method=method, **options):
            questions = getattr(HERE, "questions", None)
            if questions is not None:
                questions.asked.append(name)
            return method(tensor, *arguments, **options)

        monkeypatch.setattr(torch.Tensor, name, asking)


class FromTheFirstPass:
    """An observer that watches all operations of its thread from the first pass on."""

    def __init__(self):
        self.questions, self.watches = Questions(), False

    @contextmanager
    def observe(self, item, held_bytes):
        if not self.watches:
            self.watches = True
            self.questions.__enter__()
            HERE.questions = self.questions
        yield

    def waits(self, action, item):
        return nullcontext()

    def watch(self, name, channel, pending):
        return pending

    def stop(self):
        HERE.questions = None
        self.questions.__exit__(None, None, None)


def asked(config, num_ranks, segments=None):
    """Return the operations of each rank in a step that make the host wait."""

    def work(rank, model, together):
        observer = FromTheFirstPass()
        model.gradients.zero()
        model.train_step(*random_batch(config, 1), observer, segments=segments)
        observer.stop()
        assert observer.questions.seen > 50
        return observer.questions.asked

    return run_locally(config, make_plan(config, num_ranks), work)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_no_pass_and_no_barrier_asks_the_device(algorithm, dtype):
    loss = LossConfig(label_smoothing=0.1, z_loss=0.01)
    config = config_of(2, 3, 101, vocab=VocabConfig(algorithm), dtype=dtype, loss=loss, tied=True)
    assert asked(config, 2) == [[], []]


@pytest.mark.parametrize("name", ["zb_h1", "v_half"])
@pytest.mark.parametrize("backend", ["chunked", "recompute", "reference"])
def test_a_split_backward_and_other_backends_ask_nothing_either(name, backend):
    config = config_of(
        2,
        3,
        101,
        schedule=name,
        backend=backend,
        softcap=3.0,
        num_stages=GENERATORS[name].layout_of(2).num_stages,
    )
    assert asked(config, 2) == [[], []]


def test_packed_documents_ask_only_for_their_segments_which_are_on_the_host():
    config = config_of(2, 3, 101)
    found = asked(config, 2, random_segments(config, 1))
    assert found == [["nonzero", "tolist"] * 3] * 2


def test_the_watch_sees_what_waits():
    with Questions() as questions:
        values = torch.arange(3.0)
        values.max().item()
        values[values > 1]
        values.nonzero()
        HERE.questions = questions
        values.tolist()
        values.cpu()
        HERE.questions = None
    assert {"_local_scalar_dense", "index", "nonzero", "tolist", "cpu"} <= set(questions.asked)
