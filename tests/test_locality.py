"""A rank runs on the CPUs near its GPU, as far as it may use them and they are enough."""

import os
from types import SimpleNamespace

import pytest
import torch

from vp_train.communication.locality import stay_near_gpu

ALLOWED = frozenset(range(96))


@pytest.fixture
def bound(monkeypatch, tmp_path):
    """Return a function that returns the CPUs of a process that may use `allowed` ones."""

    def bound_to(text, allowed=ALLOWED):
        gpu = SimpleNamespace(pci_domain_id=1, pci_bus_id=0xDC, pci_device_id=0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", {3: gpu}.__getitem__)
        used = [set(allowed)]
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: used[-1])
        monkeypatch.setattr(os, "sched_setaffinity", lambda _, cpus: used.append(cpus))
        if text is not None:
            directory = tmp_path / "bus/pci/devices/0001:dc:00.0"
            directory.mkdir(parents=True)
            (directory / "local_cpulist").write_text(text)
        stay_near_gpu(3, tmp_path)
        return used[-1]

    return bound_to


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("48-95\n", set(range(48, 96))),
        ("0-11,24,36-37\n", {*range(12), 24, 36, 37}),
        ("0-95\n", set(ALLOWED)),
    ],
)
def test_the_near_cpus_are_those_that_the_system_lists(bound, text, expected):
    assert bound(text) == expected


def test_a_process_that_was_given_some_of_the_near_cpus_keeps_what_it_was_given(bound):
    given = set(range(40, 60))
    assert bound("0-47", given) == given


@pytest.mark.parametrize("text", [None, "", "\n", "node 1", "200-300", "45-47"])
def test_nothing_changes_where_there_is_no_list_or_too_little_is_left(bound, text):
    assert bound(text) == ALLOWED


def test_a_system_that_lets_nobody_bind_is_left_as_it_is(bound, monkeypatch, tmp_path):
    def refuse(*_):
        raise PermissionError

    bound("0-47")
    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    stay_near_gpu(3, tmp_path)
