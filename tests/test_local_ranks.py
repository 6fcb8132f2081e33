"""The agent of one machine: nothing listens beyond it, and all ranks end with the job."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from tests.programs import Program, finished
from vp_train import assembly
from vp_train.commands import agent, launch, local_ranks
from vp_train.commands.agent import Job, _cause, run_job
from vp_train.commands.local_ranks import LocalRanks, forked, new_process, search_options
from vp_train.commands.nodes import NodeLoss, OneNode
from vp_train.commands.place import Place
from vp_train.commands.store_server import StoreServer, loopback
from vp_train.commands.train import main
from vp_train.failures import EXIT_CONFIG, EXIT_INTERNAL, EXIT_OK, EXIT_TIME, Ending, RankEnd
from vp_train.supervision.ending import leave

LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}


def listening(pids):
    """Return the addresses, as /proc/net has them, at which these processes listen."""
    sockets = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            try:
                target = os.readlink(descriptor)
            except OSError:
                continue
            if target.startswith("socket:["):
                sockets.add(target[8:-1])
    found = set()
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in sockets:
                found.add(fields[1].partition(":")[0])
    return found


def goes(pid, seconds=30.0):
    """Return whether process `pid` ends within some seconds."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        status = Path(f"/proc/{pid}/stat")
        try:
            if status.read_text().split()[2] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.02)
    return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs Linux")
def test_a_job_of_one_machine_listens_on_loopback_alone_and_leaves_nothing_behind(tmp_path):
    words = ["model=nano", "data=synthetic", "parallel.pp=2", "run.steps=1000", "run.name=one"]
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    with Program(main, words, directory=tmp_path, variables={"TMPDIR": str(temporary)}) as job:
        lines = iter(job.stdout.readline, "")
        said = next((line for line in lines if line.startswith("step ")), None)
        assert said is not None
        below = psutil.Process(job.pid).children(recursive=True)
        processes = [process.pid for process in below]
        assert sorted(process.name() for process in below) == ["vp rank 0", "vp rank 1", "vp store"]
        addresses = listening([job.pid, *processes])
        assert addresses  # gloo and the store do listen
        assert addresses <= LOOPBACK
        os.kill(job.pid, signal.SIGKILL)
        assert all(map(goes, processes))
        left = {path.name.partition("_")[0] for path in temporary.iterdir()}
        assert left <= {"torchinductor"}  # torch's cache of compiled code, one per user


def rank_that(code):
    """Return a starter of ranks that run this code."""
    begin = "import json, os, signal, sys, time\nrank = int(os.environ['RANK'])\n"
    begin += "attempt = int(os.environ['TORCHELASTIC_RESTART_COUNT'])\n"
    begin += "def say(code, words, follows=False):\n"
    begin += "    line = json.dumps({'code': code, 'words': words, 'follows': follows})\n"
    begin += "    os.write(int(os.environ['VP_TRAIN_ENDING_FD']), line.encode())\n"
    begin += "    os._exit(code)\n"
    return new_process([sys.executable, "-S", "-c", begin + code])


def all_begin(directory, num_ranks):
    """Return code with which every rank waits until all ranks have begun, on a slow machine too."""
    code = f"open({str(directory)!r} + f'/begun{{rank}}', 'w').close()\n"
    code += f"while sum(name[:5] == 'begun' for name in os.listdir({str(directory)!r})) < "
    return code + f"{num_ranks}: time.sleep(.01)\n"


def job_of(starter, num_local, way_on=lambda: "start again", saves=lambda since: False, **settings):
    """Return a job whose ranks do not save."""
    return Job(starter, num_local, way_on=way_on, saves=saves, **settings)


def run_ranks(code, num_ranks, **settings):
    """Run ranks with this code as a job on one node called here."""
    job = job_of(lambda resumes: rank_that(code), num_ranks, **settings)
    return run_job(OneNode(Place(host="here")), job)


KILLED = "rank 2 on here was killed by SIGKILL"
LOST = "rank 0: stopped at step 2, another rank went away"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "expected", "words"),
    [
        ("", EXIT_OK, ""),
        ("sys.exit(3 if rank == 1 else 0)", 3, "rank 1 on here left with code 3 and said nothing"),
        ("os.kill(os.getpid(), 9) if rank == 2 else time.sleep(60)", 137, KILLED),
        ("os.kill(os.getpid(), 9) if rank == 2 else time.sleep(.3); say(5, 'x')", 5, "x"),
        (f"os.kill(os.getpid(), 9) if rank == 2 else say(70, {LOST!r}, True)", 137, KILLED),
        ("say(75, '')", EXIT_TIME, ""),
        ("say(78, f'vp-train: a line')", EXIT_CONFIG, "vp-train: a line"),
        (
            f"os._exit(0) if rank == 1 else time.sleep(.3); say(70, {LOST!r}, True)",
            EXIT_INTERNAL,
            "rank 1 on here left with code 0 while others still ran",
        ),
        (
            "os.kill(os.getpid(), signal.SIGSTOP) if rank else time.sleep(.3); say(124, 'y')",
            124,
            "y",
        ),
        # The first only lost a peer, the second needs time to find who hangs.
        (
            f"rank == 1 and (time.sleep(2), say(124, 'z'))\nrank or say(70, {LOST!r}, True)\n"
            "time.sleep(60)",
            124,
            "z",
        ),
    ],
)
def test_a_job_ends_soon_with_its_root_cause(tmp_path, code, expected, words):
    began = time.monotonic()
    ending = run_ranks(all_begin(tmp_path, 3) + code, 3)
    assert ending.code == expected
    assert ending.words.startswith(words)
    assert bool(ending.words) == bool(words)
    assert time.monotonic() - began < 20  # python starts three times; the rest takes about 1 s


def test_nothing_is_left_of_ranks_and_of_what_they_have_started(tmp_path):
    code = "import subprocess\nchild = subprocess.Popen(['sleep', '60'])\n"
    code += f"open({str(tmp_path)!r} + f'/{{rank}}', 'w').write(f'{{child.pid}} {{os.getpid()}}')\n"
    code += "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    code += f"while rank and not os.path.exists({str(tmp_path / '0')!r}): time.sleep(0.01)\n"
    code += "time.sleep(.5)\nsys.exit(4) if rank else time.sleep(60)"
    assert run_ranks(code, 2).code == 4
    for rank in range(2):
        assert all(map(goes, (tmp_path / str(rank)).read_text().split()))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_to_the_agent_asks_the_ranks_to_end_and_one_line_says_so_at_once(number, capfd):
    code = "def end(*_): say(75, '')\n"
    code += f"rank or os.kill(os.getppid(), {number:d})\ntime.sleep(.5)\n"  # before a rank is ready
    code += f"signal.signal({number:d}, end)\n"
    code += "time.sleep(.5)\nos.write(2, b'a rank listens\\n')\n" * 2  # a line as a whole
    code += f"signal.pthread_sigmask(signal.SIG_UNBLOCK, [{number:d}])\ntime.sleep(60)"
    before = signal.signal(number, signal.SIG_DFL)  # under nohup SIGHUP would stay ignored
    try:
        began = time.monotonic()
        assert run_ranks(code, 2, num_restarts=3, answer="they save").code == EXIT_TIME
        first, *others = capfd.readouterr().err.splitlines()
        assert first == f"vp-train: {signal.Signals(number).name}: they save"
        assert others == ["a rank listens"] * 4
        assert signal.getsignal(number) is signal.SIG_DFL
        assert time.monotonic() - began < 20
    finally:
        signal.signal(number, before)


def test_a_second_signal_ends_the_ranks_at_once(capfd):
    code = "if rank == 0:\n    for number in (15, *[2] * 40):\n"
    code += "        os.kill(os.getppid(), number); time.sleep(1.2)\ntime.sleep(60)"
    ending = run_ranks(code, 2, answer="they save")
    assert ending.code == 128 + signal.SIGINT
    assert ending.words == "stopped by SIGINT; start again"
    assert capfd.readouterr().err == "vp-train: SIGTERM: they save\n"


SAVES = "signal.signal(15, lambda *_: say(75, 'saved'))\n"
SAVES += "signal.pthread_sigmask(signal.SIG_UNBLOCK, [15])\n"
STORE = "the store of the ranks on here was killed by SIGKILL (somebody, or the kernel as memory "
STORE += "ran out); the ranks were "
STOPPED, ASKED = f"{STORE}stopped;", f"{STORE}asked to save and to end;"


@pytest.mark.parametrize(
    ("code", "num_restarts", "expected", "words"),
    [
        (SAVES, 0, EXIT_INTERNAL, ASKED),
        ("", 0, EXIT_INTERNAL, STOPPED),
        (f"attempt and say(0, '')\n{SAVES}", 1, EXIT_OK, ""),
        ("rank and say(78, 'mine')\n", 0, EXIT_CONFIG, "mine"),
        (f"rank and (time.sleep(.5), say(70, 'own'))\n{SAVES}", 0, EXIT_INTERNAL, ASKED),
        ("say(0, '')\n", 0, EXIT_OK, ""),
        (f"rank or os.kill(os.getppid(), 15)\n{SAVES}", 0, EXIT_TIME, "saved"),
    ],
    ids=["saving", "stopped", "started again", "refused", "failing", "done", "asked before"],
)
def test_ranks_whose_store_was_killed_save_and_it_is_the_cause_of_the_end(
    monkeypatch, code, num_restarts, expected, words
):
    stores = []

    def serve(address):
        server = StoreServer(address)
        stores.append(server._process)
        return server

    def starter(resumes):
        start = rank_that(f"{code}time.sleep(60)")

        def start_and_kill(variables, pipe):
            if variables["RANK"] == "1" and not resumes:
                os.kill(stores[0], signal.SIGKILL)
            return start(variables, pipe)

        return start_and_kill

    monkeypatch.setattr(agent, "StoreServer", serve)
    began = time.monotonic()
    job = job_of(starter, 2, num_restarts=num_restarts, saves=lambda since: bool(code))
    ending = run_job(OneNode(Place(host="here")), job)
    assert ending.code == expected
    assert ending.words.startswith(words)
    assert bool(ending.words) == bool(words)
    assert time.monotonic() - began < 20  # about 1 s
    assert len(stores) == 1 + num_restarts
    assert not any(Path(f"/proc/{store}").exists() for store in stores)  # not even as zombies


@pytest.mark.parametrize("code", [EXIT_OK, 74, EXIT_TIME, EXIT_CONFIG])
def test_what_a_new_start_cannot_mend_is_not_started_again(tmp_path, code):
    count = f"open({str(tmp_path)!r} + f'/{{rank}}', 'a').write('x')\nsay({code}, '')"
    assert run_ranks(count, 1, num_restarts=3).code == code
    assert (tmp_path / "0").read_text() == "x"


@pytest.mark.slow
def test_ranks_start_again_after_a_failure_as_often_as_allowed(capfd):
    code = "(rank and attempt < 2) and os.kill(os.getpid(), 9)\nattempt < 2 and time.sleep(60)"
    assert run_ranks(code, 2, num_restarts=3).code == EXIT_OK
    said = capfd.readouterr().err
    assert said.count("rank 1 on here was killed by SIGKILL") == 2
    assert "vp-train: start 2 of 3 after a failure; start again" in said
    assert run_ranks(code, 2, num_restarts=1).code == 128 + 9


def test_ranks_get_what_torchrun_would_set_and_what_the_user_has_set_stays(monkeypatch):
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth7")
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    checks = [
        f"[os.environ[name] for name in {names}] == [str(rank), str(rank), '2', '2', '127.0.0.1']",
        "os.environ['NCCL_SOCKET_IFNAME'] == 'eth7'",
        f"os.environ.get('GLOO_SOCKET_IFNAME') == {loopback().get('GLOO_SOCKET_IFNAME')!r}",
    ]
    assert run_ranks(f"sys.exit(0 if all([{', '.join(checks)}]) else 9)", 2).code == EXIT_OK


def in_forked_ranks():
    """Check from inside what a rank that is a copy of its agent has."""
    assert threading.active_count() == 1
    assert os.getpgid(0) == os.getpid()
    assert signal.SIGUSR1 in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with socket.create_connection(("127.0.0.1", int(os.environ["MASTER_PORT"]))):
        pass
    words = f"rank {os.environ['RANK']}"
    leave(Ending(9, words))


def run_forked_rank():
    """Be the agent of one forked rank."""
    ending = run_job(
        OneNode(Place(host="here")), job_of(lambda resumes: forked(in_forked_ranks), 1)
    )
    print(ending.code, ending.words)


def test_forked_ranks_are_processes_like_new_ones():
    done = finished(run_forked_rank)
    assert done.stdout == "9 rank 0\n", done.stderr


def end(rank, code, words="", follows=False):
    return RankEnd(rank, code, Ending(code, words, follows=follows), f"host{rank}")


LOST_RANK = end(0, EXIT_INTERNAL, LOST, follows=True)
GONE, SILENT, UNHEARD = (NodeLoss(1, "host1", why) for why in ("killed", "silent", "unheard"))
FAILED = NodeLoss(1, "host1", "failed", Ending(74, "no more processes"))


@pytest.mark.parametrize(
    ("ends", "lost", "code", "words"),
    [
        ([LOST_RANK, LOST_RANK], [GONE], 70, "the agent of node 1 (host1) was killed"),
        ([end(0, 124, "waited"), LOST_RANK], [SILENT], 124, "node 1 (host1) does not answer"),
        ([end(0, 0), end(1, 0)], [SILENT], 124, "node 1 (host1) does not answer"),
        ([LOST_RANK, end(1, 78, "why")], [GONE], 78, "why"),
        ([LOST_RANK, RankEnd(1, -9, None, "host1")], [GONE], 137, "rank 1 on host1 was killed"),
        ([end(0, 78, "why")], [UNHEARD], 70, "node 1 (host1) did not say how its ranks ended"),
        ([], [UNHEARD], 70, "node 1 (host1) did not say how its ranks ended"),
        ([end(0, 78, "why")], [GONE, FAILED], 74, "no more processes"),
        ([RankEnd(1, 3, None, "host1")], [], 3, "rank 1 on host1 left with code 3"),
        ([RankEnd(1, -35, None, "host1")], [], 163, "rank 1 on host1 was killed by signal 35;"),
        ([end(0, 0), end(1, 0)], [], 0, ""),
    ],
)
def test_a_lost_node_is_the_cause_unless_a_rank_explains_more(ends, lost, code, words):
    ending = _cause(ends, lost, job_of(lambda resumes: rank_that(""), 2))
    assert ending.code == code
    assert ending.words.startswith(words)
    assert bool(ending.words) == bool(words)


SLEEP = "time.sleep(60)"


def variables(num_ranks):
    """Return the environments of ranks that LocalRanks starts."""
    return {
        rank: {"RANK": str(rank), "TORCHELASTIC_RESTART_COUNT": "0"} for rank in range(num_ranks)
    }


def test_ends_are_in_the_log_before_ranks_are_killed(monkeypatch):
    news, kill = OneNode(Place(host="here")), LocalRanks.kill
    known = []

    def slow_kill(self):
        known.extend(fact["kind"] for fact in news.facts())
        return kill(self)

    monkeypatch.setattr(LocalRanks, "kill", slow_kill)
    job = job_of(lambda resumes: rank_that(f"rank and say(5, 'x')\n{SLEEP}"), 2)
    assert run_job(news, job).code == 5
    assert known[-1] == "ends"


def test_a_rank_that_does_not_go_holds_nobody_up(monkeypatch):
    ranks = LocalRanks(rank_that(SLEEP), variables(1), "here")
    process = ranks._processes[0]
    with monkeypatch.context() as patch:
        patch.setattr(os, "waitpid", lambda number, options: (0, 0))
        patch.setattr(local_ranks, "_REAP_SECONDS", 0.1)
        (words,) = ranks.kill()
    assert words == f"rank 0 on here (process {process}) has not gone 0.1 s after SIGKILL"
    assert ranks.ends() == []
    os.waitpid(process, 0)


def test_ranks_that_have_started_go_if_another_cannot_start():
    started, start = [], rank_that(SLEEP)
    before = set(os.listdir("/proc/self/fd"))

    def start_two(given, pipe):
        if len(started) == 2:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        started.append(start(given, pipe))
        return started[-1]

    with pytest.raises(BlockingIOError):
        LocalRanks(start_two, variables(3), "here")
    assert all(map(goes, started))
    assert set(os.listdir("/proc/self/fd")) == before


def test_new_ranks_look_for_modules_where_their_agent_does(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "triton").mkdir()  # an empty folder would be imported as a package
    (tmp_path / "triton" / "__init__.py").write_text("")
    command = ["-c", "import sys; sys.exit(any(map(sys.path.__contains__, ('', sys.argv[1]))))"]
    for first, options in ((str(tmp_path / "bin"), ["-P"]), (str(tmp_path), []), ("", [])):
        monkeypatch.setattr(sys, "path", [first, *sys.path[1:]])
        assert search_options() == options
        done = subprocess.run(
            [sys.executable, *options, *command, str(tmp_path)], check=False, timeout=30
        )
        assert done.returncode == int(not options)


PREPARATION = """
import os, sys
from vp_train.commands.launch import _in_copy

class Panic(BaseException):
    pass

def fail(error):
    raise error

for body in (
    lambda: fail(Panic("in Rust")),
    lambda: sys.exit(3),
    lambda: fail(ValueError("x" * 200_000)),
    lambda: os._exit(3),
    lambda: os.kill(os.getpid(), 9),
    lambda: None,
):
    try:
        ending = _in_copy(body)
    finally:
        print("here", flush=True)
    print(ending.code, (ending.words.splitlines() or [""])[-1][-60:])
"""


def test_a_preparation_that_fails_anyhow_never_becomes_a_second_agent():
    command = [sys.executable, "-c", PREPARATION]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    lines = done.stdout.splitlines()
    assert lines[::2] == ["here"] * 6, done.stderr
    panic, exit_3, long, silent, killed, fine = lines[1::2]
    assert panic == "70 Panic: in Rust"
    assert exit_3 == "70 SystemExit: 3"
    assert long == f"70 {'x' * 60}"
    assert silent.endswith("preparation of the data left with code 3 and said nothing")
    assert killed.endswith(" by SIGKILL (somebody, or the kernel as memory ran out)")
    assert (silent[:3], killed[:4]) == ("70 ", "137 ")
    assert fine == "0 "


def without_ranks():
    """Be vp-train with a compiler that only says so, and without ranks."""
    assembly.compile_layers = lambda config: print("compile", flush=True)
    launch.run_job = lambda news, job: Ending(EXIT_OK, "")
    main()


def test_what_will_run_is_said_before_anything_is_compiled_and_without_ranks_no_directory_stays(
    tmp_path,
):
    done = finished(without_ranks, "model=nano", "data=synthetic", f"run.root={tmp_path}/a/b")
    words = [line.split()[0] for line in done.stdout.splitlines()]
    assert words == ["data", "model", "mesh", "pipeline", "schedule", "planned", "compile"]
    assert not any(tmp_path.iterdir())
