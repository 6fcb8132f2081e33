"""Continue a text with the model of a run, for a look at it.

There is no cache of keys and values: every token computes its whole prefix again.  The model may
lie on any ranks, and no rank sees the logits of the whole vocabulary (`vocab.choice`).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vp_train.config import ConfigError
from vp_train.inference.opening import OpenRun, encode
from vp_train.inference.scoring import padded_length, require_numbers
from vp_train.vocab.choice import Sampling, choose, nothing, offers
from vp_train.vocab.shard import require_within


def generate(
    run: OpenRun,
    prompt: str | Tensor,
    num_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
) -> Iterator[int]:
    """Yield at most `num_tokens` tokens after `prompt`, a string or int64 ids [n].

    It ends with the token that ends a document.  A string begins a document: in front of it comes
    the token with which documents of training began, if there was one.  A prompt without tokens is
    continued from that token, else from the one that ends a document.  A token is chosen from at
    most seq_length tokens before it.  With `temperature` 0 it is the most probable one; else one is
    drawn, among the `top_k` most probable ones if that is given.  Draws depend on `seed`, not on
    the layout.  Collective over the ranks of `run`.  Raises ConfigError for a prompt that the run
    cannot read and for logits that are NaN, and IndexError for ids that the vocabulary does not
    have.
    """
    sampling = Sampling(temperature, top_k, seed)
    ids = prompt.tolist() if isinstance(prompt, Tensor) else encode(run, prompt).ids
    begin, end = run.begin_ids, run.end_token
    if not isinstance(prompt, Tensor) or not ids:
        ids = [*begin, *ids]
    if not ids and end is None:
        raise ConfigError(
            f"{run.checkpoint}: the prompt has no tokens, and no token that ends a document is "
            "known to begin from; give a prompt, or data.end_token"
        )
    ids = ids or [end]
    require_within(torch.tensor(ids), run.config.model.vocab_size, "token")
    for _ in range(num_tokens):
        chosen = _next(run, ids, sampling)
        ids.append(chosen)
        yield chosen
        if chosen == end:
            return


def _next(run: OpenRun, ids: list[int], sampling: Sampling) -> int:
    """Return the token that follows `ids`, the same on all ranks."""
    mesh, model = run.mesh, run.model
    prefix = torch.tensor(ids[-run.config.model.seq_length :])
    tokens = torch.zeros(padded_length(run, len(prefix)), dtype=torch.int64)
    tokens[: len(prefix)] = prefix
    copies = run.config.eval_microbatches_of(mesh.degrees.dp)
    last = torch.full((copies, 1), len(prefix) - 1)
    x = model.evaluator.hidden(tokens.repeat(copies, 1, 1), last)
    offered, layer = nothing(sampling), model.output_layer
    if x is not None:
        assert layer is not None
        softcap = layer.options.softcap
        offered = offers(x[0, 0], layer.weight, layer.shard, softcap, sampling, len(ids))
    # All ranks decide by what the first replica offers.
    of_ranks = mesh.steps.all_gather(offered)
    require_numbers(run, of_ranks)
    return choose(of_ranks[: mesh.degrees.pp * mesh.degrees.tp], sampling, len(ids))
