"""A layer is announced when its gradients are complete, while the layers below still run."""

import dataclasses
import itertools

import pytest
import torch

from tests.model.test_stage import FAMILIES, MODEL, group, stage  # noqa: F401 - a fixture
from vp_train.config import ModelConfig

CASES = [
    *((name, "none") for name in ("plain", *sorted(set(FAMILIES) - {"plain"}))),
    ("plain", "selective"),
    ("plain", "full"),
]


def announced(module, microbatches, how):
    """Return the last backward's announcements with their gradients, and the final gradients.

    `how` is the pass that completes the gradients: B, or W of a split backward.
    """
    forwards = []
    for x in microbatches:  # as in a pipeline, all forwards come before the backwards
        x.requires_grad_()
        forwards.append((x, module(x)))
    seen = []
    for microbatch, (_, y) in enumerate(forwards):
        last = microbatch == len(forwards) - 1

        def note(names):
            grads = {
                name: None if p.grad is None else p.grad.clone()
                for name, p in module.named_parameters()
            }
            seen.append((tuple(names), grads))

        if how == "B" and last:
            with module.completing(note):
                y.sum().backward()
        elif how == "B":
            y.sum().backward()
        else:
            with module.weight_grads.deferring(microbatch):
                y.sum().backward()
    if how == "W":
        for microbatch in range(len(forwards) - 1):
            module.weight_grads.drain(microbatch)
        with module.completing(note):
            module.weight_grads.drain(len(forwards) - 1)
    return seen, {name: p.grad for name, p in module.named_parameters()}


@pytest.mark.parametrize("how", ["B", "W"])
@pytest.mark.parametrize(("family", "recompute"), CASES)
def test_a_layer_is_announced_once_complete_and_before_those_below_it(
    group,  # noqa: F811
    family,
    recompute,
    how,
):
    model = ModelConfig(
        **{
            **{name: getattr(MODEL, name) for name in MODEL.__dataclass_fields__},
            **FAMILIES[family],
        }
    )
    module = stage(group, range(3), final_norm=True, model=model, recompute=recompute, first=True)
    generator = torch.Generator().manual_seed(1)
    microbatches = [
        torch.randn(20, 2, 48, dtype=torch.float64, generator=generator) for _ in range(2)
    ]
    seen, final = announced(module, microbatches, how)
    assert [names for names, _ in seen] == list(module.units)
    assert sorted(name for names, _ in seen for name in names) == sorted(final)
    for index, (names, then) in enumerate(seen):
        assert all(torch.equal(then[name], final[name]) for name in names), "complete"
        below = [
            name
            for unit in module.units[index + 1 :]
            for name in unit
            if "linear_fc1.weight" in name or "linear_qkv.weight" in name
        ]
        assert not any(
            then[name] is not None and torch.equal(then[name], final[name]) for name in below
        ), "early"


def test_the_callback_is_that_of_the_backward_and_not_of_the_forward(group):  # noqa: F811
    module = stage(group, range(2))
    x = torch.randn(20, 2, 48, dtype=torch.float64).requires_grad_()
    seen = []
    with module.completing(lambda names: seen.append("forward")):
        y = module(x)
    seen.clear()
    y.sum().backward()
    assert seen == []
    with torch.no_grad():
        module(x)


def test_a_backward_that_fails_announces_nothing_more(group):  # noqa: F811
    module, seen = stage(group, range(2)), []
    with pytest.raises(RuntimeError, match="on purpose"), module.completing(seen.append):
        raise RuntimeError("on purpose")
    assert seen == []


@pytest.mark.parametrize("final_norm", [False, True])
def test_a_stage_without_layers_announces_its_final_norm(group, final_norm):  # noqa: F811
    module, seen = stage(group, range(0), final_norm=final_norm), []
    x = torch.randn(20, 2, 48, dtype=torch.float64).requires_grad_()
    with module.completing(seen.append):
        module(x).sum().backward()
    assert seen == ([("final_norm.weight",)] if final_norm else [])


def test_a_forward_waits_for_each_layer_before_it_reads_it(group):  # noqa: F811
    module = stage(group, range(3), final_norm=True, first=True)
    values = {name: p.detach().clone() for name, p in module.named_parameters()}
    x = torch.randn(20, 2, 48, dtype=torch.float64)
    expected, waited = module(x), []
    for parameter in module.parameters():
        parameter.data.fill_(torch.nan)
    for layer in module.layers.values():
        layer.register_forward_pre_hook(lambda *_: waited.append("layer"))
        layer.layer.mlp.linear_fc1.register_forward_pre_hook(lambda *_: waited.append("mlp"))

    def need(names):
        waited.append(names)
        for name in names:
            module.get_parameter(name).data.copy_(values[name])

    with module.reading(need):
        found = module(x)
    assert torch.equal(found, expected)
    units = list(reversed(module.units))
    halves = zip(units, ["layer", "mlp"] * 3, strict=True)
    assert waited == [units[0], *itertools.chain(*halves), *units]
    waited.clear()
    module(x)
    assert waited == ["layer", "mlp"] * 3


@pytest.mark.parametrize("family", ["plain", "gpt", "olmo2", "gemma2"])
@pytest.mark.parametrize("layers", [range(2, 5), range(1), range(0)])
def test_a_unit_has_the_parameters_that_a_backward_completes_together(group, layers, family):  # noqa: F811
    """The last layer comes first, with the final norm; the positions come last, with the first."""
    model = dataclasses.replace(MODEL, **FAMILIES[family] | {"positions": "learned"})
    module = stage(group, layers, first=True, final_norm=True, model=model)
    units = [set(unit) for unit in module.units]
    names = {name for name, _ in module.named_parameters()}
    ends = {name for name in names if name.startswith("final_norm.")}
    assert ends >= {"final_norm.weight"}
    if not layers:
        assert units == [{*ends, "positions"}]
        return
    units[0] -= ends
    units[-1] -= {"positions"}
    mlp = ("pre_mlp_layernorm.", "mlp.", "mlp_bda.")
    expected = []
    for layer in reversed(layers):
        own = {name for name in names if name.startswith(f"layers.{layer}.")}
        of_mlp = {
            name
            for name in own
            if name.startswith(tuple(f"layers.{layer}.layer.{part}" for part in mlp))
        }
        expected += [of_mlp, own - of_mlp]
    assert units == expected
    assert module.units[0][-1] in ends
    assert module.units[-1][-1] == "positions"
