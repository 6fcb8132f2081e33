"""Tensor-parallel ranks compute what one rank computes, with whole sequences and with parts."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import torch
import torch.distributed as dist

from tests.meshes import alone
from tests.model.test_completion import announced
from tests.model.test_stage import FAMILIES, MODEL, SEGMENTS, stage, with_random_vectors

# Family, recomputation, the pass that completes gradients, whether sequences are split.
CASES = (
    ("gpt", "none", "B", True),
    ("gemma3", "selective", "W", True),
    ("granite", "full", "B", False),
)


def differences(rank, num_ranks):
    """Return where a stage of this rank differs from one of a rank alone, in words."""
    found = []
    with patch.object(torch.cuda, "current_device", lambda: "cpu"):  # megatron's collectives ask
        for family, recompute, how, splits in CASES:
            model = replace(MODEL, **FAMILIES[family])
            common = {"final_norm": True, "first": True, "model": model}
            whole = with_random_vectors(stage(alone(), range(2), **common))
            part = stage(
                dist.group.WORLD, range(2), recompute=recompute, split_sequences=splits, **common
            )
            for name, parameter in part.named_parameters():
                split, value = part.splits.get(name), whole.get_parameter(name).detach()
                parameter.data.copy_(value if split is None else split.part(value))
            generator = torch.Generator().manual_seed(1)
            theirs = list(torch.randn(2, 20, 2, 48, dtype=torch.float64, generator=generator))
            ours = [x.clone() for x in theirs]
            _, expected = announced(whole, theirs, "B")
            seen, grads = announced(part, ours, how)
            found += [
                f"{family}: {name} is announced early"
                for names, then in seen
                for name in names
                if not torch.equal(then[name], grads[name])
            ]
            pairs = {f"dx {i}": (ours[i].grad, theirs[i].grad) for i in range(2)}
            pairs["y"] = part(ours[0], SEGMENTS), whole(theirs[0], SEGMENTS)
            for name, gradient in grads.items():
                if name in part.partial:
                    dist.all_reduce(gradient)
                split, wanted = part.splits.get(name), expected[name]
                pairs[name] = gradient, wanted if split is None else split.part(wanted)
            found += [
                f"{family}: {name} differs"
                for name, (mine, wanted) in pairs.items()
                if not torch.allclose(mine, wanted, rtol=1e-10, atol=1e-11)
            ]
    return found


def test_stages_of_tensor_parallel_ranks_equal_that_of_a_rank_alone(ranks):
    """Their gradients are complete when they are announced, also those that autograd adds."""
    assert ranks(2).run(differences) == [[], []]
