"""Beats of ranks name the one that keeps the others waiting."""

from __future__ import annotations

import json
import socket
import time

import pytest
from torch.distributed import TCPStore

from vp_train.supervision.heartbeat import Activity, Beat, Heartbeat, Stall


def beat(count, *, waits=False):
    return Beat(count, "node1", "step 3, training, 1F5", waits)


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (
            [beat(1, waits=True), beat(7)],
            [beat(3, waits=True), beat(7)],
            "rank 1 on node1 no longer beats: it is stopped or dead, last step 3, training, 1F5",
        ),
        (
            [beat(1), beat(7, waits=True), beat(5, waits=True)],
            [beat(1), beat(9, waits=True), beat(5, waits=True)],
            "rank 0 (and 1 more, see the log) on node1 no longer beats: "
            "it is stopped or dead, last step 3, training, 1F5",
        ),
        (
            [beat(1, waits=True), beat(7)],
            [beat(3, waits=True), beat(9)],
            "rank 1 on node1 is busy: step 3, training, 1F5",
        ),
        (
            [beat(1, waits=True), None],
            [beat(3, waits=True), None],
            "rank 1 has never begun: its process hangs before its first beat, or was not started",
        ),
        (
            [beat(1, waits=True), beat(1, waits=True)],
            [beat(3, waits=True), beat(3, waits=True)],
            "all ranks wait for each other, see the log for where",
        ),
    ],
)
def test_the_rank_that_the_others_wait_for_is_named(before, after, words):
    stall = Stall.of(before, after)
    assert stall.words() == words
    assert len(stall.table().splitlines()) == len(after)


def test_a_rank_that_has_begun_in_between_is_not_silent():
    assert Stall.of([None], [beat(0)]).silent == frozenset()


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"{}", b"null", b"\x80\x04N.", b'{"count": "x"}', b"[" * 5000]
)
def test_what_is_no_beat_counts_as_none(text):
    assert Beat.parse(text) is None


@pytest.mark.slow
def test_beats_go_through_the_store_as_json_and_stop():
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    hearts = [Heartbeat(("127.0.0.1", server.port), rank) for rank in range(2)]
    hearts[0].follow(lambda: Activity("step 1, training, wait:C1.0", waits=True))
    hearts[1].follow(lambda: Activity("step 1, training, 1F0"))
    deadline = time.monotonic() + 20
    while not all(server.check([f"vp_train/0/beat/{rank}"]) for rank in range(2)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    while json.loads(server.get("vp_train/0/beat/1"))["doing"] != "step 1, training, 1F0":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    hearts[1].stop()
    time.sleep(0.5)  # a beat that is on its way
    assert hearts[0].look(3).silent == {1, 2}
    hearts[0].stop()


def test_without_a_store_there_is_no_report_and_no_noise(capfd):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    heart = Heartbeat(("127.0.0.1", port), 0)
    began = time.monotonic()
    assert heart.look(1) is None
    assert time.monotonic() - began < 4  # at once on an idle machine; torch would try for 5 s
    heart.stop()
    assert capfd.readouterr().err == ""
    assert Heartbeat.of_job({}, 0) is None


def test_no_terminal_obeys_a_beat_and_its_words_have_an_end():
    said = {"count": 1, "host": "\x1b[2J", "doing": "x" * 1000, "waits": False}
    beat = Beat.parse(json.dumps(said).encode())
    assert beat.host == "\\x1b[2J"
    assert len(beat.doing) == 200
    assert Beat.parse(b'{"count": Infinity, "host": "", "doing": "", "waits": 0}') is None


@pytest.mark.slow
def test_a_store_that_comes_late_gets_beats_and_without_beats_nobody_is_blamed():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    heart = Heartbeat(("127.0.0.1", port), 0)
    time.sleep(0.3)
    server = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    deadline = time.monotonic() + 20
    while not server.check(["vp_train/0/beat/0"]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    heart.stop()
    time.sleep(0.5)  # a beat that is on its way
    server.delete_key("vp_train/0/beat/0")
    time.sleep(0.1)
    assert heart.look(2) is None


@pytest.mark.parametrize("missing", ["MASTER_ADDR", "MASTER_PORT"])
def test_only_a_rank_of_a_job_beats(monkeypatch, missing):
    monkeypatch.setattr(Heartbeat, "_beat", lambda self: None)
    environment = {"MASTER_ADDR": "node1", "MASTER_PORT": "2900"}
    for more, attempt in (({}, "0"), ({"TORCHELASTIC_RESTART_COUNT": "3", "OTHER": ""}, "3")):
        heart = Heartbeat.of_job(environment | more, 7)
        assert heart._address == ("node1", 2900)
        assert heart._key(7) == f"vp_train/{attempt}/beat/7"
    assert Heartbeat.of_job({missing: environment[missing]}, 7) is None


@pytest.mark.parametrize("num_ranks", [1, 2, 5])
def test_the_first_rank_without_a_beat_is_named_with_the_number_of_the_others(num_ranks):
    beats = [beat(3)] * num_ranks
    said = Stall.of(beats, beats).words()
    more = f" (and {num_ranks - 1} more, see the log)" if num_ranks > 1 else ""
    assert said.startswith(f"rank 0{more} on node1 no longer beats: ")
    waits = [beat(4, waits=True), *[beat(4)] * num_ranks]
    said = Stall.of([beat(3, waits=True), *[beat(3)] * num_ranks], waits).words()
    assert said.startswith(f"rank 1{more} on node1 is busy: ")


def test_a_beat_that_somebody_removes_is_silent_and_one_that_is_cut_off_is_none():
    assert Stall.of([beat(1), beat(1)], [None, beat(2)]).silent == {0}
    whole = {"count": 2, "host": "a", "doing": "b", "waits": True}
    assert Beat.parse(json.dumps(whole).encode()) == Beat(2, "a", "b", waits=True)
    assert Beat.parse(json.dumps(whole | {"more": "x" * 5000}).encode()) is None
    assert Beat.parse((json.dumps(whole) + " " * 5000).encode()) == Beat(2, "a", "b", waits=True)
    for name in whole:
        assert (
            Beat.parse(json.dumps({k: v for k, v in whole.items() if k != name}).encode()) is None
        )


class Store:
    """A store of beats, some of which are missing."""

    def __init__(self, values):
        self.values = values

    def check(self, keys):
        return all(key in self.values for key in keys)

    def multi_get(self, keys):
        return [self.values[key] for key in keys]

    def get(self, key):
        return self.values[key]


def test_the_beats_of_all_ranks_are_read_by_rank_whether_all_are_there_or_not(monkeypatch):
    monkeypatch.setattr(Heartbeat, "_beat", lambda self: None)
    heart = Heartbeat(("node1", 2900), 0, "2")
    said = {"host": "a", "doing": "b", "waits": False}
    values = {
        f"vp_train/2/beat/{rank}": json.dumps(said | {"count": rank}).encode() for rank in range(3)
    }
    beats = [Beat(rank, "a", "b", waits=False) for rank in range(3)]
    assert heart._beats(Store(values), 3) == beats
    assert heart._beats(Store(values), 2) == beats[:2]
    assert heart._beats(Store(values), 4) == [*beats, None]
    del values["vp_train/2/beat/1"]
    assert heart._beats(Store(values), 3) == [beats[0], None, beats[2]]
