"""vp-profile: ranks measured alone are those of the job, and their costs predict it."""

import json
import math
from contextlib import contextmanager
from functools import partial

import pytest
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import mappings

from schedules.ir import Kind
from tests.meshes import fake_world
from vp_train.commands.profile import main
from vp_train.failures import EXIT_CONFIG, EXIT_IO, EXIT_OK
from vp_train.planning.cluster import on_cpu
from vp_train.planning.estimate import estimate_cost
from vp_train.planning.plan import plan_step
from vp_train.profile.costs import RankProfile, measured_cost, pass_seconds, with_cost
from vp_train.profile.measure import receive_noise
from vp_train.settings import load_config
from vp_train.tensors.collectives import all_gather_single, reduce_scatter_single

COMMUNICATIONS = {
    *("irecv", "broadcast", "all_to_all_single", "all_reduce", "reduce"),
    *("all_gather_single", "all_gather_into_tensor"),
    *("reduce_scatter_single", "reduce_scatter_tensor"),
}
NANO = [
    "model=nano",
    "model.num_layers=8",
    "num_microbatches=4",
    "cost.collective_seconds=0",
    "cost.hop_seconds=0",
]


@pytest.fixture
def vp_profile(run_here):
    return partial(run_here, main, "vp-profile")


@pytest.mark.parametrize(
    "overrides",
    [
        ["parallel.pp=4"],
        ["parallel.pp=4", "schedule=v_half"],
        ["parallel.pp=2", "parallel.tp=2", "schedule=zb_h1", "parallel.recompute=selective"],
        [
            "parallel.pp=4",
            "parallel.recompute_per_stage=[full,none,selective,full]",
            "parallel.layers_per_stage=[1,2,3,2]",
        ],
        ["parallel.pp=4", "vocab=none"],
        ["parallel.pp=4", "vocab.shards=[4096,0,0,0]"],
    ],
)
def test_costs_of_what_passes_are_told_to_take_are_these(overrides):
    """Measure a job of known cost without error; the result is that cost."""
    known = {
        "measured_layer_flops": 0.0,
        "layer_forward_seconds": 0.5,
        "layer_backward_seconds": 1.25,
        "layer_input_grad_seconds": 0.75,
        "layer_weight_grad_seconds": 0.5,
        "output_fixed_seconds": 0.0,
        "output_row_seconds": 0.01,
        "lookup_seconds": 0.125,
        "lookup_grad_seconds": 0.25,
    }
    config = load_config([*NANO, *overrides])
    known["measured_layer_flops"] = measured_cost(plan_step(config, 4), {})["measured_layer_flops"]
    config = with_cost(config, known)
    step = plan_step(config, 4)
    cost = estimate_cost(
        step.work,
        on_cpu(config.cost),
        step.problem,
        layers=step.layers,
        recompute=step.recompute,
        shards=step.shards,
    )
    passes = {(item.kind, item.stage): cost.seconds(item) for _, item in step.schedule.passes()}
    found = measured_cost(step, passes)
    kinds = {kind for kind, _ in passes}
    split = Kind.W in kinds
    if split:
        known["layer_backward_seconds"] = 1.25
    else:
        known["layer_input_grad_seconds"] = known["layer_weight_grad_seconds"] = 1.25 / 2
    lookups = kinds >= {Kind.E, Kind.G}
    for name, value in known.items():
        if lookups or not name.startswith("lookup"):
            assert found[name] == pytest.approx(value, rel=1e-9), name


def test_rows_of_several_counts_tell_what_does_not_depend_on_them():
    config = load_config([*NANO, "parallel.pp=4", "vocab.shards=[1024,512,0,2560]"])
    step = plan_step(config, 4)
    passes = {}
    for rank, rows in enumerate((1024, 512, 0, 2560)):
        if rows:
            passes |= {(Kind.S, rank): 0.5 + 0.002 * rows, (Kind.T, rank): 0.5 + 0.001 * rows}
    found = measured_cost(step, passes)
    assert found["output_fixed_seconds"] == pytest.approx(1.0)
    assert found["output_row_seconds"] == pytest.approx(0.003)


def test_where_passes_shared_their_processor_only_their_own_time_counts():
    forward, backward = (Kind.F, 0), (Kind.B, 0)
    busy = {forward: [(6.0, 1.0), (1.0, 1.5), (3.0, 2.0)], backward: [(9.0, 2.0)]}
    assert pass_seconds(busy) == ({forward: 1.0, backward: 2.0}, pytest.approx(6 / 19))
    idle = {forward: [(1.0, 0.9), (2.0, 1.9)], backward: [(4.0, 4.0)]}
    assert pass_seconds(idle) == ({forward: 1.5, backward: 4.0}, pytest.approx(6.8 / 7))


@pytest.mark.parametrize(("part", "warns"), [(0.55, True), (0.9, False)])
def test_costs_of_a_busy_machine_say_so(vp_profile, tmp_path, monkeypatch, part, warns):
    passes = {(kind, 0): 1.0 for kind in (Kind.F, Kind.B, Kind.S, Kind.T)}
    profile = RankProfile(0, passes, 16.0, 1.0, 1, 1, {}, on_processor=part)
    monkeypatch.setattr("vp_train.profile.measure.measure_ranks", lambda *_: [profile])
    costs = tmp_path / "c.yaml"
    code, out, err = vp_profile(*NANO, "parallel.pp=2", "--ranks", "0", "--cost", costs)
    assert code == EXIT_OK, err
    words = "passes had a processor for 55% of their time"
    assert [words in text for text in (out, costs.read_text())] == [warns, warns]
    assert ("repeat on an idle machine" in out) == warns
    assert out.endswith(
        f"costs written to {costs}; vp-plan and vp-simulate take them as cost={costs}\n"
    )
    out = vp_profile(*NANO, "parallel.pp=2", "--ranks", "0", "--cost", costs)[1]
    assert f"costs written to {costs}, in place of those that were there; vp-plan" in out


def test_ranks_are_measured_and_what_they_cost_can_be_used(vp_profile, tmp_path):
    common = [*NANO, "parallel.pp=2", "parallel.dp=2", "schedule=zb_h1"]
    code, out, err = vp_profile(
        *common,
        "--ranks",
        "1",
        "--steps",
        "1",
        "--cost",
        tmp_path / "c.yaml",
        "--device",
        tmp_path / "d.yaml",
        "--json",
        tmp_path / "p.json",
    )
    assert code == EXIT_OK, err
    assert "predicted for 4 ranks: a step of" in out
    assert "FLOP/s per rank; mean bubble" in out
    assert "MFU" not in out, "nothing knows the peak of this machine"
    record = json.loads((tmp_path / "p.json").read_text())
    (rank,) = record["ranks"]
    assert rank["deviations"].keys() == {"x1", "y1", "dy1"}
    assert all(0 < deviation < math.inf for deviation in rank["deviations"].values())
    assert {"F1", "I1", "W1", "S1", "T1", "E1", "G1"} == set(rank["passes"])
    assert all(0 < seconds < rank["program_seconds"] for seconds in rank["passes"].values())
    assert rank["predicted_peak_bytes"] == pytest.approx(rank["peak_bytes"], rel=0.1)
    cost = load_config([*common, f"cost={tmp_path / 'c.yaml'}"]).cost
    assert cost.layer_weight_grad_seconds == pytest.approx(
        record["cost"]["layer_weight_grad_seconds"], rel=1e-4
    )
    rates = [f"cost={tmp_path / 'd.yaml'}", *common]
    measured = plan_step(load_config([*common, f"cost={tmp_path / 'c.yaml'}"]), 4)
    like = plan_step(load_config(rates), 4)
    both = [
        sum(step.cost.pass_seconds[kind][1] for kind in (Kind.F, Kind.I, Kind.W))
        for step in (measured, like)
    ]
    assert both[0] == pytest.approx(both[1], rel=1e-3)
    larger = plan_step(load_config([*rates, "micro_batch_size=2", "model.hidden_size=128"]), 4)
    assert larger.timeline.makespan > 1.5 * like.timeline.makespan
    for other, reason in (
        (["micro_batch_size=2"], "cost.measured_layer_flops="),
        (["run.dtype=bfloat16"], "cost.measured_dtype=float32, but run.dtype=bfloat16"),
        (
            ["run.dtype=bfloat16", "cost.measured_dtype=null", "run.linear_dtype=float8"],
            "cost.measured_linear_dtype=compute, but run.linear_dtype=float8",
        ),
        (
            ["cluster=a100_80g_node", "run.dtype=float32"],
            "cost.measured_device=cpu, but run.device=cuda",
        ),
    ):
        with pytest.raises(
            ValueError, match=f"{reason}.*these pass times are not for it; use a cost that is"
        ):
            plan_step(load_config([*common, f"cost={tmp_path / 'c.yaml'}", *other]), 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "0,4"], "--ranks=0,4: name some of ranks 0 to 3"),
        (["--ranks", "all"], "--ranks=all is not a list of ranks; write for example --ranks 0,3"),
        (["--steps", "0"], "--steps 0 is not a whole number in [1, 1,000,000]; write"),
        (["--steps", "-1"], "--steps -1 is not a whole number in [1, 1,000,000]; write"),
        (["--cost"], "--cost needs a value: --cost FILE"),
        (["parallel.pp=3"], "the cluster has 4 CPU ranks (cluster=laptop): parallel.pp=3"),
        (["run.device=cuda"], "run.device=cuda, but torch finds no GPU here"),
        (
            ["cost=missing.yaml"],
            "cost=missing.yaml is not there; vp-profile --cost FILE.yaml writes one, or",
        ),
        (["cost=missing.yaml"], "choose one of a100, a100_4b, cpu"),
        (
            ["--device", "rates.yaml", "run.dtype=bfloat16", "run.linear_dtype=float8"],
            "--device measures products in run.dtype",
        ),
        (
            ["--cost", "one.yaml", "--device", "./one.yaml"],
            "--cost, --device and --json name one file twice; give each its own",
        ),
    ],
)
def test_refusals_name_the_value_and_the_way_out(vp_profile, arguments, message, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, _, err = vp_profile(*NANO, *arguments)
    assert code == EXIT_CONFIG
    assert message in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("option", ["--cost", "--json"])
@pytest.mark.parametrize(
    ("place", "why"), [("/dev/null/a", "File exists"), ("/", "Is a directory")]
)
def test_a_file_that_cannot_be_written_is_known_before_the_work(vp_profile, option, place, why):
    code, out, err = vp_profile(*NANO, option, place)
    assert (code, out) == (EXIT_IO, "")
    assert err.startswith(f"vp-profile: {option} {place} cannot be written ({why}); give a file in")


def receive(rank, seed):
    """Receive messages of every kind, with seeded noise, into memory full of NaN."""
    received = [torch.full((64, 64), math.nan) for _ in range(6)]
    with noise(torch.Generator().manual_seed(seed)):
        dist.irecv(received[0], 1 - rank)
        dist.broadcast(received[1], 0, async_op=True)
        dist.all_to_all_single(
            received[2], torch.empty(0, 64), [32, 32], [0, 0], group=dist.group.WORLD, async_op=True
        )
        numbers = torch.arange(32.0 * 64).view(32, 64)
        all_gather_single(received[3], numbers, dist.group.WORLD, async_op=True)
        reduce_scatter_single(received[4][:16], numbers, dist.group.WORLD, async_op=True)
        received[5].copy_(numbers.repeat(2, 1))
        received[5][32:] += 1
        all_gather_single(received[5], received[5][32 * rank :][:32], dist.group.WORLD)
    return received


@contextmanager
def noise(generator):
    """Within this context let communications deliver noise."""
    with pytest.MonkeyPatch.context() as restored:
        for name in COMMUNICATIONS & set(dir(dist)):
            restored.setattr(dist, name, getattr(dist, name))
        for name in ("dist_all_gather_func", "dist_reduce_scatter_func"):
            restored.setattr(mappings, name, getattr(mappings, name))
        receive_noise(generator)
        yield


@pytest.mark.parametrize("rank", [0, 1])
def test_what_nobody_sends_is_seeded_noise_of_unit_scale(rank):
    with fake_world(rank, 2):
        hop, broadcast, exchanged, gathered, scattered, in_place = receive(rank, seed=3)
        again = receive(rank, seed=3)
    for tensor in [hop, exchanged, *([broadcast] if rank else [])]:
        assert tensor.isfinite().all()
        assert abs(tensor.mean()) < 0.1
        assert 0.9 < tensor.std() < 1.1
    assert broadcast.isnan().all() == (rank == 0)  # what the root sends stays what it is
    numbers = torch.arange(32.0 * 64).view(32, 64)
    assert torch.equal(gathered, numbers.repeat(2, 1))
    assert torch.equal(scattered[:16], numbers[:16])
    assert torch.equal(in_place, torch.cat([numbers, numbers + 1]))
    assert not torch.equal(hop, exchanged)
    assert torch.equal(again[0], hop)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_what_waits_for_a_sum_reads_what_was_formed():
    with fake_world(0, 2), noise(torch.Generator("cuda").manual_seed(0)):
        summed = torch.zeros(1000, device="cuda")
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(100_000_000)  # some 50 ms
            summed.fill_(1)
            work = dist.all_reduce(summed, async_op=True)
        work.wait()
        assert summed.min() == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_a_rank_of_eight_allocates_what_is_predicted(vp_profile, tmp_path):
    common = [
        "model=small",
        "parallel.pp=8",
        "num_microbatches=16",
        "run.device=cuda",
        "run.dtype=bfloat16",
    ]
    code, _, err = vp_profile(
        *common, "cluster.gpus_per_node=8", "--ranks", "0,7", "--json", tmp_path / "p.json"
    )
    assert code == EXIT_OK, err
    for rank in json.loads((tmp_path / "p.json").read_text())["ranks"]:
        assert rank["predicted_peak_bytes"] == pytest.approx(rank["peak_bytes"], rel=0.05)


def test_on_a_cpu_what_goes_to_the_host_is_in_the_same_memory(vp_profile, tmp_path):
    words = ["model=small", "parallel.pp=2", "cluster.gpus_per_node=2", "num_microbatches=4"]
    words += ["schedule=interleaved", "parallel.offload_activations=1"]
    code, _, err = vp_profile(*words, "--ranks", "0", "--json", tmp_path / "p.json")
    assert code == EXIT_OK, err
    (rank,) = json.loads((tmp_path / "p.json").read_text())["ranks"]
    assert rank["predicted_peak_bytes"] == pytest.approx(rank["peak_bytes"], rel=0.03)
