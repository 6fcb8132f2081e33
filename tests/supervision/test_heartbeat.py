"""Beats of ranks name the one that keeps the others waiting."""

from __future__ import annotations

import json
import socket
import time

import pytest
from torch.distributed import TCPStore

from vp_train.supervision.heartbeat import Beat, Heartbeat, Place, Stall


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


def test_beats_go_through_the_store_as_json_and_stop():
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    hearts = [Heartbeat(("127.0.0.1", server.port), rank) for rank in range(2)]
    hearts[0].follow(lambda: Place("step 1, training, wait:C1.0", waits=True))
    hearts[1].follow(lambda: Place("step 1, training, 1F0"))
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


def test_without_a_store_there_is_no_report():
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    heart = Heartbeat(("127.0.0.1", server.port), 0)
    heart.stop()
    assert Heartbeat.of_job({}, 0) is None


def test_no_terminal_obeys_a_beat_and_its_words_have_an_end():
    said = {"count": 1, "host": "\x1b[2J", "doing": "x" * 1000, "waits": False}
    beat = Beat.parse(json.dumps(said).encode())
    assert beat.host == "\\x1b[2J"
    assert len(beat.doing) == 200
    assert Beat.parse(b'{"count": Infinity, "host": "", "doing": "", "waits": 0}') is None


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
