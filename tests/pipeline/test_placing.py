"""A batch that was placed beside an earlier step gives the same step, and is lent to its stream."""

import threading
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from tests.local import run_locally
from tests.pipeline.equivalence import config_of
from tests.pipeline.truth import random_batch
from vp_train.config import VocabConfig
from vp_train.planning.plan import make_plan
from vp_train.tensors.streams import HostOrder
from vp_train.vocab import input as input_module
from vp_train.vocab import output as output_module
from vp_train.vocab.output import OutputStep


class NamedStreams(HostOrder):
    """Streams that only have names: the passes run on `main`."""

    def __init__(self):
        self.current, self.log = "main", []

    def mark(self):
        return self.current, len(self.log)

    def follow(self, mark):
        self.log.append(f"{self.current} follows {mark[0]}")

    @contextmanager
    def beside(self, name):
        before, self.current = self.current, name
        yield
        self.current = before


def steps(ahead, device="cpu"):
    """Return the losses and gradients of two steps; `ahead` places the batch of the second."""

    def work(rank, model, together):
        first, second = (random_batch(config, step) for step in (1, 2))
        placed = []
        thread = threading.Thread(target=lambda: placed.append(model.trainer.place(*second)))
        if ahead:
            thread.start()
        losses = [model.train_step(*first)]
        model.optimizer.reduce()
        if ahead:
            thread.join()
        losses.append(model.train_step(*second, placed=placed[0] if ahead else None))
        return losses, [parameter.grad.clone() for parameter in model.parameters.values()]

    config = config_of(2, 3, 101, vocab=VocabConfig("one_barrier"))
    config = replace(config, run=replace(config.run, device=device, comm_backend="gloo"))
    return run_locally(config, make_plan(config, 2), work)


def test_a_placed_batch_gives_the_same_step():
    for (losses, gradients), (other_losses, others) in zip(steps(True), steps(False), strict=True):
        assert losses == other_losses
        assert losses[0] != losses[1]
        assert len(gradients) == len(others) > 0
        assert all(map(torch.equal, gradients, others))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_batch_copied_beside_a_step_on_a_gpu_gives_the_step_of_a_cpu():
    for (_, gradients), (_, others) in zip(steps(True, "cuda"), steps(False), strict=True):
        assert len(gradients) == len(others) > 0
        for gradient, other in zip(gradients, others, strict=True):
            assert torch.allclose(gradient.cpu(), other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("algorithm", ["none", "one_barrier"])
def test_the_passes_follow_the_copies_and_borrow_all_of_them(monkeypatch, algorithm):
    config = config_of(1, 2, 101, vocab=VocabConfig(algorithm))

    def work(rank, model, together):
        executor, streams = model.trainer, NamedStreams()
        executor._streams = streams
        made, lent = [], []

        def copied(tensor, device):
            made.append((streams.current, tensor.untyped_storage().data_ptr()))
            return tensor

        def lend(tensor):
            lent.append((streams.current, tensor.untyped_storage().data_ptr()))
            streams.log.append("lend")
            return tensor

        monkeypatch.setattr("vp_train.tensors.streams.to_device", copied)
        for module in (input_module, output_module):
            monkeypatch.setattr(module, "to_device", copied)
            monkeypatch.setattr(module, "lend", lend)
        begin = OutputStep.__init__
        monkeypatch.setattr(
            OutputStep, "__init__", lambda *args: (streams.log.append("begin"), begin(*args))[1]
        )
        batch = random_batch(config, 1)
        placed = executor.place(*batch)
        copies = list(made)
        assert copies
        assert {stream for stream, _ in copies} == {"batch"}
        made.clear()
        model.train_step(*batch, placed=placed)
        assert {stream for stream, _ in made} == {"main"}, "the weights of the loss"
        assert {("main", pointer) for _, pointer in copies} <= set(lent)
        assert streams.log[0] == "main follows batch"
        assert streams.log.index("lend") < streams.log.index("begin")

    run_locally(config, make_plan(config, 1), work)


def test_a_label_outside_the_vocabulary_is_refused_when_it_is_placed():
    config = config_of(1, 2, 101)

    def work(rank, model, together):
        tokens, labels = random_batch(config, 1)
        labels[0, 0, 0] = 101
        with pytest.raises(IndexError, match="label"):
            model.trainer.place(tokens, labels)

    run_locally(config, make_plan(config, 1), work)
