"""A run is opened with its own settings, apart from what only training or its layout needs."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from vp_train.config import (
    ConfigError,
    CostConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    RunSettings,
    ScheduleConfig,
    VocabConfig,
)
from vp_train.inference import opening, scoring
from vp_train.inference.layout import Opening, _evaluating, check_context, opening_of
from vp_train.planning.degrees import Degrees
from vp_train.settings.files import config_text

TRAINED = RunConfig(
    model=ModelConfig(seq_length=32),
    parallel=ParallelConfig(
        pp=2, placement="redistribute", recompute="full", sequence_parallel=True
    ),
    schedule=ScheduleConfig("zb_h1"),
    vocab=VocabConfig("auto", balance=True),
    optim=OptimConfig(name="zero1", offload=False),
    cost=CostConfig(layer_forward_seconds=1.0),
    run=RunSettings(
        dtype="bfloat16",
        linear_dtype="float8",
        device="cuda",
        comm_backend="gloo",
        compile="on",
        resume=True,
        init_from="elsewhere",
        profile_steps=(3,),
        eval_sequences=7,
    ),
    num_microbatches=8,
    micro_batch_size=4,
)
DEGREES = [Degrees(1, 1, 1), Degrees(3, 1, 1), Degrees(1, 2, 1), Degrees(1, 1, 2)]


@pytest.mark.parametrize("degrees", DEGREES, ids=str)
def test_what_only_training_needs_does_not_count(degrees):
    found = _evaluating(TRAINED, degrees, set(), "cpu", None)
    assert found.model == TRAINED.model
    assert (found.run.device, found.run.compile, found.run.resume) == ("cpu", "off", False)
    assert (found.run.dtype, found.run.linear_dtype) == ("bfloat16", "float8")
    assert (found.run.init_from, found.run.profile_steps) == (None, ())
    assert (found.num_microbatches, found.micro_batch_size) == (1, 1)
    numbers = {"dp": degrees.dp, "pp": degrees.pp, "tp": degrees.tp}
    assert found.parallel == ParallelConfig(**numbers, placement="balanced")
    assert (found.schedule, found.cost) == (ScheduleConfig(), CostConfig())
    assert (found.optim.name, found.optim.offload) == ("adamw", False)


@pytest.mark.parametrize("degrees", DEGREES, ids=str)
@pytest.mark.parametrize("backend", ["nccl", "gloo"])
def test_one_process_needs_no_nccl_and_no_shards(degrees, backend):
    config = replace(TRAINED, run=replace(TRAINED.run, comm_backend=backend))
    found = _evaluating(config, degrees, set(), "cuda", None)
    assert found.run.comm_backend == ("gloo" if degrees.num_ranks == 1 else backend)
    is_split = degrees.pp > 1 or degrees.tp > 1
    expected = VocabConfig(VocabConfig().algorithm if is_split else "none")
    assert found.vocab == expected


def test_what_the_caller_has_chosen_counts():
    own = replace(TRAINED, parallel=replace(TRAINED.parallel, layers_per_stage=(1, 3)))
    own = replace(own, vocab=VocabConfig("two_barrier", shards=(100, 28)))
    given = {"vocab.shards", "parallel.placement", "parallel.layers_per_stage"}
    found = _evaluating(own, Degrees(1, 2, 1), given, "cpu", "float64")
    assert found.vocab == own.vocab
    assert (found.parallel.placement, found.parallel.layers_per_stage) == ("redistribute", (1, 3))
    assert (found.run.dtype, found.run.linear_dtype) == ("float64", "compute")
    for name in given:
        found = _evaluating(own, Degrees(1, 2, 1), {name}, "cpu", None)
        assert (found.vocab.shards is None) == (name != "vocab.shards")
        assert (found.parallel.placement == "redistribute") == (name == "parallel.placement")
        assert (found.parallel.layers_per_stage is None) == (name != "parallel.layers_per_stage")


@pytest.fixture
def run(tmp_path):
    """A run on three pipeline ranks that has its settings only."""
    (tmp_path / "a run").mkdir()
    config = RunConfig(parallel=ParallelConfig(pp=3))
    (tmp_path / "a run" / "config.yaml").write_text(config_text(config))
    return tmp_path / "a run"


@pytest.mark.parametrize(
    ("num_ranks", "words", "degrees", "fills"),
    [
        (None, ["parallel.pp=2", "parallel.tp=2"], (1, 2, 2), True),
        (None, [], (1, 1, 1), False),
        (1, [], (1, 1, 1), True),
        (6, [], (2, 3, 1), True),
        (4, ["parallel.pp=2"], (2, 2, 1), False),
        (2, ["parallel.pp=1", "parallel.tp=2", "parallel.dp=1"], (1, 1, 2), True),
    ],
)
def test_a_job_of_several_ranks_has_the_layout_of_the_run_and_one_process_none(
    run, num_ranks, words, degrees, fills
):
    found = opening_of(run, words, num_ranks=num_ranks, fills=fills)
    assert found.degrees == Degrees(*degrees)
    dp, pp, _ = degrees
    assert found.config.run.eval_microbatches == dp * (pp if fills else 1)
    assert found.config.run.eval_sequences is None
    assert found.run == found.directory == run
    assert not found.chooses_tokenizer


def test_a_checkpoint_is_that_of_its_run_and_settings_that_do_not_count_are_refused(run):
    place = run / "checkpoints" / "step-00000004"
    found = opening_of(place, ["data.tokenizer=a.json"])
    assert (found.run, found.directory, found.chooses_tokenizer) == (run, place, True)
    with pytest.raises(
        ConfigError,
        match=r"^optim\.lr does not count here; only some of parallel, vocab, model, data and",
    ):
        opening_of(run, ["parallel.pp=1", "optim.lr=1"])
    with pytest.raises(
        ConfigError,
        match=r"^data\.path does not count here; of data these do: data\.tokenizer, data\.end",
    ):
        opening_of(run, ["data.path=a"])


@pytest.mark.parametrize("length", [1, 8])
def test_a_context_is_from_one_token_to_a_whole_sequence(length):
    check_context(1, length)
    check_context(length, length)
    for context in (0, -1, length + 1):
        with pytest.raises(ConfigError, match=rf"is not in \[1, {length}\]"):
            check_context(context, length)


def running(seq_length, dp=1, microbatches=2):
    """Return as much of an open run as windows and batches need."""
    config = replace(
        RunConfig(model=ModelConfig(seq_length=seq_length)),
        run=RunSettings(eval_microbatches=dp * microbatches),
    )
    mesh = SimpleNamespace(degrees=Degrees(dp, 1, 1))
    return SimpleNamespace(config=config, mesh=mesh)


@pytest.mark.parametrize("seq_length", [1, 16, 64, 100, 256])
def test_sequences_are_padded_to_the_next_of_few_lengths(seq_length):
    for num_tokens in range(1, seq_length + 1):
        found = scoring.padded_length(running(seq_length), num_tokens)
        longer = [length for length in range(64, 513, 64) if length >= num_tokens]
        assert found == min(longer[0], seq_length) >= num_tokens


@pytest.mark.parametrize("width", [1, 2, 5, 8])
def test_windows_score_every_label_once_and_give_it_its_context(width):
    run = running(width)
    for context in range(1, width + 1):
        for count in range(3 * width + 3):
            tokens, scored = torch.arange(count), []
            for window in scoring._windows(run, 7, tokens, context):
                assert (window.text, window.stop - window.start <= width) == (7, True)
                assert 0 <= window.start <= window.first < window.stop
                assert window.first - window.start + 1 >= min(context, window.first + 1)
                scored += range(window.first, window.stop)
            assert scored == list(range(max(0, count - 1)))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_groups_are_full_apart_from_the_last_one(size):
    for count in range(8):
        groups = list(scoring._grouped(range(count), size))
        assert [each for group in groups for each in group] == list(range(count))
        assert [len(group) for group in groups[:-1]] == [size] * max(0, len(groups) - 1)
        assert all(1 <= len(group) <= size for group in groups)


@pytest.mark.parametrize("dp", [1, 2, 3])
def test_all_replicas_evaluate_as_many_sequences(dp):
    assert scoring.sequences_of(running(8, dp, microbatches=4)) == 4 * dp


@pytest.mark.parametrize("dp", [1, 2, 3])
@pytest.mark.parametrize("reporter", [0, 1])
def test_each_replica_scores_its_own_rows_and_all_ranks_get_all(dp, reporter):
    """Each replica has two ranks, of which one reports; the scores are the tokens themselves."""
    rows, length = 2 * dp, 3
    tokens = torch.arange(rows * length).view(rows, length)
    degrees, said = Degrees(dp, 2, 1), {}

    def logprobs(rank, gather):
        replica = degrees.place(rank)[0]

        def evaluate(own, own_labels):
            assert torch.equal(own_labels, -own)
            return own.double() if reports else None

        reports = degrees.place(rank)[1] == reporter
        model = SimpleNamespace(evaluator=SimpleNamespace(logprobs=evaluate), reports_loss=reports)
        steps = SimpleNamespace(all_gather=gather)
        mesh = SimpleNamespace(degrees=degrees, data_rank=replica, steps=steps)
        config = RunConfig(run=RunSettings(dtype="float64"))
        run = SimpleNamespace(config=config, mesh=mesh, model=model)
        return scoring._logprobs(run, tokens, -tokens)

    for rank in range(degrees.num_ranks):
        logprobs(rank, lambda ours, rank=rank: said.setdefault(rank, ours).expand(2 * dp, -1, -1))
    everything = torch.stack([said[rank] for rank in range(degrees.num_ranks)])
    for rank in range(degrees.num_ranks):
        assert torch.equal(logprobs(rank, lambda _: everything), tokens.double())


class Tokenizer:
    """A tokenizer of single characters, whose ids are those of ASCII."""

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        return SimpleNamespace(ids=[ord(char) for char in text])


def test_a_text_with_a_token_that_the_model_has_not_is_refused():
    config = RunConfig(model=ModelConfig(vocab_size=ord("b") + 1))
    run = SimpleNamespace(config=config, tokenizer=Tokenizer(), checkpoint="step-1")
    assert opening.encode(run, "ab").ids == [97, 98]
    assert opening.encode(run, "").ids == []
    with pytest.raises(ConfigError, match="the text has token 99,"):
        opening.encode(run, "abca")
    run.tokenizer = None
    with pytest.raises(ConfigError, match="step-1: the run has no tokenizer; give one with"):
        opening.encode(run, "ab")


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (None, None),
        ("[]", None),
        ("{", None),
        ('{"eos_token": "<end>"}', "<end>"),
        ('{"eos_token": {"content": "<end>"}}', "<end>"),  # as earlier transformers wrote it
        ('{"eos_token": null}', None),
        ("{}", None),
    ],
)
def test_the_end_of_a_document_is_known_by_the_name_that_the_run_has_kept(tmp_path, content, name):
    if content is not None:
        (tmp_path / "tokenizer_config.json").write_text(content)
    assert opening._end_name(tmp_path) == name


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("given", [None, "given.json"])
@pytest.mark.parametrize("chooses", [False, True])
def test_the_tokenizer_is_the_one_of_the_caller_else_that_of_the_run_else_that_of_its_settings(
    tmp_path, monkeypatch, kept, given, chooses
):
    if chooses and given is None:
        pytest.skip("nothing was chosen")
    loaded = []
    found = SimpleNamespace(encode_special_tokens=False)
    monkeypatch.setattr(
        opening, "load_tokenizer", lambda path, size: loaded.append((path, size)) or found
    )
    own, other = tmp_path / "tokenizer.json", tmp_path / "given.json"
    if kept:
        own.touch()
    if given is not None:
        other.touch()
    data = DataConfig(tokenizer=None if given is None else str(other))
    config = RunConfig(model=ModelConfig(vocab_size=300), data=data)
    expected = other if chooses or (given is not None and not kept) else own if kept else None
    tokenizer = opening._tokenizer_of(Opening(config, tmp_path, Degrees(1, 1, 1), chooses))
    if expected is None:
        assert (tokenizer, loaded) == (None, [])
    else:
        assert loaded == [(expected, 300)]
        assert tokenizer.encode_special_tokens, "as in the corpora of training"
