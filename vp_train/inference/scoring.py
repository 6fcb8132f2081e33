"""Score text with the model of a run: three lines from a directory to numbers.

    run = vp_train.open_run("runs/default")
    (logprobs,) = vp_train.score(run, ["def add(a, b):"])
    print(logprobs.mean())

Many ranks do it together, each replica a part of the windows; all of them get all the results.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from vp_train.config import ConfigError
from vp_train.inference.layout import check_context
from vp_train.inference.opening import OpenRun, encode
from vp_train.tensors.precision import DTYPES, statistics_dtype
from vp_train.vocab.loss import IGNORE_INDEX
from vp_train.vocab.shard import require_within

LENGTH_STEP = 64  # tokens; sequences are padded to a multiple, so that few shapes occur


@dataclass(frozen=True, slots=True)
class _Window:
    """Tokens `start` to `stop` of text number `text`; labels before `first` are not scored.

    Token i + 1 is the label of token i.
    """

    text: int
    start: int
    first: int
    stop: int


def score(
    run: OpenRun, texts: Sequence[str] | Sequence[Tensor], *, context: int = 1
) -> list[Tensor]:
    """Return the log-probability of every token but the first of each text [n - 1].

    The dtype is fp32, or fp64 for fp64 compute.  A text is a string, or the int64 ids [n] of its
    tokens.  In front of a string comes the token with which documents of training began, if there
    was one: then all n - 1 tokens of the string are scored.  A token is predicted from at most
    seq_length tokens before it: a longer text is scored in windows.  Every token is scored once,
    from at least `context` tokens where there are as many; with 1 a window begins with the last
    token of the one before.  Collective over the ranks of `run`.  Raises ConfigError for strings
    where the run has no tokenizer, for a context outside [1, seq_length] and for logits that are
    NaN, and IndexError for ids that the vocabulary does not have.
    """
    if isinstance(texts, str | Tensor):
        raise TypeError("texts is a list: give [text] for a single text")
    ids = [_ids_of(run, text) for text in texts]
    windows = [
        window
        for number, tokens in enumerate(ids)
        for window in _windows(run, number, tokens, context)
    ]
    dtype = statistics_dtype(DTYPES[run.config.run.dtype])
    scores = [torch.zeros(max(0, len(tokens) - 1), dtype=dtype) for tokens in ids]
    for group in _grouped(windows, sequences_of(run)):
        length = padded_length(run, max(window.stop - window.start for window in group))
        tokens, labels = (
            torch.full((sequences_of(run), length), fill) for fill in (0, IGNORE_INDEX)
        )
        for row, window in enumerate(group):
            text, size = ids[window.text], window.stop - window.start
            tokens[row, :size] = text[window.start : window.stop]
            skipped = window.first - window.start
            labels[row, skipped:size] = text[window.first + 1 : window.stop + 1]
        found = _logprobs(run, tokens, labels)
        for row, window in enumerate(group):
            skipped, size = window.first - window.start, window.stop - window.start
            scores[window.text][window.first : window.stop] = found[row, skipped:size]
            require_numbers(run, found[row, skipped:size])
    return scores


def require_numbers(run: OpenRun, values: Tensor) -> None:
    """Raise ConfigError if any of the values, which come from logits, is NaN."""
    if values.isnan().any():
        raise ConfigError(f"{run.checkpoint}: its logits are not numbers; take another checkpoint")


def sequences_of(run: OpenRun) -> int:
    """Return how many sequences all ranks of `run` evaluate together."""
    dp = run.mesh.degrees.dp
    return dp * run.config.eval_microbatches_of(dp)


def padded_length(run: OpenRun, num_tokens: int) -> int:
    """Return the length of sequences that hold `num_tokens` tokens, at most seq_length."""
    return min(-(-num_tokens // LENGTH_STEP) * LENGTH_STEP, run.config.model.seq_length)


def _windows(run: OpenRun, number: int, tokens: Tensor, context: int) -> Iterator[_Window]:
    """Yield the windows of a text of n tokens, in which its n - 1 labels occur once."""
    width, num_labels = run.config.model.seq_length, len(tokens) - 1
    check_context(context, width)
    first = 0
    while first < num_labels:
        # Label i is predicted from tokens start to i, which are i - start + 1.
        start = max(0, first + 1 - context)
        stop = min(start + width, num_labels)
        yield _Window(number, start, first, stop)
        first = stop


def _grouped(windows: Iterable[_Window], size: int) -> Iterator[list[_Window]]:
    rest = iter(windows)
    while group := list(islice(rest, size)):
        yield group


def _logprobs(run: OpenRun, tokens: Tensor, labels: Tensor) -> Tensor:
    """Return the log-probability of every label [n, s] on all ranks, for n = `sequences_of`."""
    mesh, dtype = run.mesh, statistics_dtype(DTYPES[run.config.run.dtype])
    own = tokens.view(mesh.degrees.dp, -1, 1, tokens.shape[-1])[mesh.data_rank]
    own_labels = labels.view(mesh.degrees.dp, -1, 1, labels.shape[-1])[mesh.data_rank]
    found = run.model.evaluator.logprobs(own, own_labels)
    if mesh.degrees.num_ranks == 1:
        assert found is not None
        return found[:, 0].cpu()
    ours = torch.zeros((len(own), tokens.shape[-1]), dtype=dtype)
    if run.model.reports_loss:
        assert found is not None
        ours = found[:, 0].to("cpu", dtype)
    # Only one rank of a replica reports, so the sum has its bits.
    return mesh.steps.all_gather(ours).view(mesh.degrees.dp, -1, *ours.shape).sum(1).flatten(0, 1)


def _ids_of(run: OpenRun, text: str | Tensor) -> Tensor:
    if isinstance(text, Tensor) and text.dim() == 1 and text.dtype is torch.int64:
        require_within(text, run.config.model.vocab_size, "token")
        return text
    if not isinstance(text, str):
        raise TypeError(f"a text is a string or an int64 tensor [n] of token ids, not {text!r:.80}")
    return torch.tensor([*run.begin_ids, *encode(run, text).ids], dtype=torch.int64)
