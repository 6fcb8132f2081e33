"""Scores and tokens of every layout are those of transformers for the exported model."""

from __future__ import annotations

import pytest
import torch

from tests.hf.models import AutoModelForCausalLM
from vp_train.hf.convert import export_checkpoint
from vp_train.inference.generation import generate
from vp_train.inference.layout import opening_of
from vp_train.inference.opening import opened
from vp_train.inference.scoring import score

LAYOUTS = {
    1: [[]],
    2: [
        [],  # the run's own: pp=2
        ["parallel.tp=2", "parallel.pp=1", "vocab.algorithm=two_barrier"],
        ["parallel.dp=2", "parallel.pp=1"],
    ],
}
NUM_TOKENS = 6
SAMPLED = {"temperature": 0.8, "seed": 5}


def texts():
    """Texts of several lengths, one of several windows of 64 tokens."""
    made = torch.Generator().manual_seed(0)
    return [torch.randint(0, 300, (n,), generator=made) for n in (5, 1, 150, 65, 64, 2)]


def evaluate(rank, num_ranks, directory):
    """Return scores in both dtypes, greedy tokens, and draws, of every layout of so many ranks."""
    found = []
    for words in LAYOUTS[num_ranks]:
        results = []
        for dtype in ("float64", "float32"):
            settings = [*words, "model.seq_length=64"]
            run = opened(opening_of(directory, settings, num_ranks=num_ranks, dtype=dtype))
            results.append(score(run, texts()))
            if dtype == "float64":
                prompt = texts()[0]
                results += [
                    list(generate(run, prompt, NUM_TOKENS, **chosen))
                    for chosen in ({}, SAMPLED, SAMPLED | {"top_k": 7})
                ]
            if num_ranks > 1:
                run.mesh.destroy()
        found.append(results)
    return found


@pytest.fixture(scope="module")
def theirs(trained, tmp_path_factory):
    """The exported model as transformers loads it, in float64."""
    path = tmp_path_factory.mktemp("exported") / "model"
    export_checkpoint(trained, path)
    model = AutoModelForCausalLM.from_pretrained(
        path, attn_implementation="eager", dtype=torch.float64
    )
    return model.eval()


def expected_scores(model, ids, width=64):
    """Return the log-probabilities of all tokens but the first, window by window."""
    found = [torch.zeros(0, dtype=torch.float64)]
    for start in range(0, len(ids) - 1, width):
        window = ids[start : start + width + 1]
        with torch.no_grad():
            logits = model(window[None, :-1]).logits[0]
        found.append(logits.log_softmax(-1).gather(1, window[1:, None])[:, 0])
    return torch.cat(found)


@pytest.fixture(scope="module")
def one_process(trained):
    """Return what one process finds."""
    (found,) = evaluate(0, 1, trained)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_scores_and_tokens_are_those_of_transformers_on_every_layout(
    trained, theirs, one_process, ranks, num_ranks
):
    of_ranks = [[one_process]] if num_ranks == 1 else ranks(num_ranks).run(evaluate, trained)
    prompt = texts()[0]
    written = theirs.generate(
        prompt[None], max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
    )[0, len(prompt) :].tolist()
    expected = [expected_scores(theirs, ids) for ids in texts()]
    for found in of_ranks:  # all ranks get the same
        for in_double, greedy, drawn, among_k, in_single in found:
            assert greedy == written
            assert (drawn, among_k) == (one_process[2], one_process[3])
            for i, (double, single) in enumerate(zip(in_double, in_single, strict=True)):
                assert (double.dtype, single.dtype) == (torch.float64, torch.float32)
                assert torch.allclose(double, one_process[0][i], atol=1e-12, rtol=0)
                # transformers rotates and normalises in float32 whatever the dtype
                assert torch.allclose(double, expected[i], atol=1e-6, rtol=0)
                assert torch.allclose(single.double(), expected[i], atol=2e-6, rtol=0)
    assert one_process[2] != written
    assert one_process[3] != written
