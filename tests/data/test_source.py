"""Batches are a pure function of the step, and an epoch has every training token once.

No document is used both for training and for validation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data.cases import VOCAB_SIZE, run_config, text_config, train_batch, write_letters
from tests.meshes import fake_world
from vp_train.config import ConfigError, DataConfig, RunConfig
from vp_train.data import open_source, prepare
from vp_train.data.indexed import Windows, hold_out, split_documents

SYNTHETIC = run_config(DataConfig(name="synthetic"))


@pytest.fixture
def letters(tmp_path: Path) -> RunConfig:
    write_letters(tmp_path / "text", [90] * 20)
    return run_config(text_config(tmp_path, validation_fraction=0.2))


@pytest.fixture(params=["text", "synthetic"])
def config(request: pytest.FixtureRequest, letters: RunConfig) -> RunConfig:
    return letters if request.param == "text" else SYNTHETIC


@pytest.fixture
def rank_one_of_two() -> Iterator[None]:
    with fake_world(1, 2):
        yield


def test_batches_have_their_shape_and_labels_are_the_next_tokens(config: RunConfig) -> None:
    source = open_source(config)
    for batch, num_microbatches in ((train_batch(source, 1), 4), (source.validation_batch(), 3)):
        assert batch.tokens.shape == batch.labels.shape == (num_microbatches, 2, 8)
        assert batch.tokens.dtype == batch.labels.dtype == torch.int64
        assert torch.equal(batch.tokens[..., 1:], batch.labels[..., :-1])
        assert 0 <= int(batch.tokens.min()) <= int(batch.tokens.max()) < VOCAB_SIZE


def test_batch_depends_on_the_step_alone(config: RunConfig) -> None:
    forward, resumed = open_source(config), open_source(config)
    batches = [train_batch(forward, step) for step in range(1, 5)]
    validation = forward.validation_batch()
    assert torch.equal(resumed.validation_batch().tokens, validation.tokens)
    for step in (4, 2, 3, 1, 2):
        assert torch.equal(train_batch(resumed, step).labels, batches[step - 1].labels)
    assert len({tuple(batch.tokens.flatten().tolist()) for batch in (*batches, validation)}) == 5


def share_memory(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()


@pytest.mark.parametrize("packing", ["none", "documents"])
def test_labels_without_loss_leave_the_tokens_alone_where_a_batch_is_a_single_sequence(
    letters: RunConfig, config: RunConfig, packing: str
) -> None:
    """Tokens and labels never share memory.

    A slice of a single sequence is already contiguous, so `contiguous` would return a view.
    """
    if config is SYNTHETIC and packing == "documents":
        pytest.skip("synthetic text has no documents")
    config = replace(
        config, num_microbatches=1, micro_batch_size=1, data=replace(config.data, packing=packing)
    )
    source = open_source(replace(config, run=replace(config.run, eval_microbatches=1)))
    batches = [train_batch(source, step) for step in range(1, 40)]
    batches += [source.validation_batch(rank, 2) for rank in range(2)]
    assert (batches[-1].labels == -100).all()  # the second replica has only an extra microbatch
    if packing == "documents":
        assert any((batch.labels == -100).any() for batch in batches[:-2])
    for batch in batches:
        assert batch.tokens.is_contiguous()
        assert batch.labels.is_contiguous()
        assert not share_memory(batch.tokens, batch.labels)
        assert int(batch.tokens.min()) >= 0
        counted = batch.labels[..., :-1] != -100
        assert torch.equal(batch.tokens[..., 1:][counted], batch.labels[..., :-1][counted])


def test_validation_has_samples_of_its_own(config: RunConfig) -> None:
    source = open_source(config)
    rows = {
        tuple(row)
        for step in range(1, 5)
        for row in train_batch(source, step).tokens.flatten(0, 1).tolist()
    }
    validation = {tuple(row) for row in source.validation_batch().tokens.flatten(0, 1).tolist()}
    assert len(validation) > 1
    assert not rows & validation


def test_one_pass_holds_every_training_token_once(letters: RunConfig) -> None:
    corpus = prepare(letters.data, VOCAB_SIZE, progress=False)
    training, _ = split_documents(
        corpus.prefix, letters.data.validation_fraction, letters.data.seed
    )
    per_step = 4 * 2 * 8
    steps = (training.num_tokens - 1) // per_step
    source = open_source(run_config(letters.data, steps=steps))
    seen = Counter(
        token
        for step in range(1, steps + 1)
        for token in train_batch(source, step).tokens.flatten().tolist()
    )
    tokens = np.fromfile(f"{corpus.prefix}.bin", dtype=np.uint16)
    documents = np.split(tokens, np.flatnonzero(tokens == corpus.manifest.end_token) + 1)
    there = Counter(np.concatenate([documents[number] for number in training.documents]).tolist())
    assert seen <= there
    assert (there - seen).total() <= per_step


@pytest.mark.parametrize("lengths", [[900], [900, 3], [4] * 3 + [500]])
def test_where_documents_are_too_few_the_end_of_the_text_is_validated(
    tmp_path: Path, lengths: list[int]
) -> None:
    write_letters(tmp_path / "text", lengths)
    data = text_config(tmp_path)
    prefix = prepare(data, VOCAB_SIZE, progress=False).prefix
    tokens = np.fromfile(f"{prefix}.bin", dtype=np.uint16)
    held_out = max(9, int(data.validation_fraction * len(tokens)))
    parts = tokens[:-held_out], tokens[-held_out:]
    for share, part in zip(hold_out(prefix, 0.05, 1, 8), parts, strict=True):
        windows = Windows.of(prefix, share, 8)
        assert len(windows) == (len(part) - 1) // 8
        found = np.concatenate([windows.read(i)[0][:-1] for i in range(len(windows))])
        assert np.array_equal(found, part[: len(found)])
        assert len(part) - 8 <= len(found) + 1
    source = open_source(run_config(data))
    train = len(tokens) - held_out
    words = f"tokens: {train:,} to train on, held out the last {held_out} (there are too few"
    assert words in source.description
    seen = source.validation_batch()
    assert (seen.labels >= 0).any()


def test_documents_that_are_enough_stay_whole(letters: RunConfig, tmp_path: Path) -> None:
    prefix = prepare(letters.data, VOCAB_SIZE, progress=False).prefix
    described = open_source(letters).description
    trained, held_out = hold_out(prefix, letters.data.validation_fraction, letters.data.seed, 8)
    words = f": {trained.num_tokens:,} to train on, held out {held_out.num_tokens:,} of "
    assert words in described
    assert "the last" not in described
    assert "%" not in described, "one corpus is all of the text"
    for fraction, length in ((0.2, 8), (0.0, 8), (0.2, 2000)):
        whole = split_documents(prefix, fraction, 1)
        for share, expected in zip(hold_out(prefix, fraction, 1, length), whole, strict=True):
            assert share.start == 0
            assert np.array_equal(share.documents, expected.documents)


def test_runs_of_one_split_seed_are_validated_on_the_same_text(letters: RunConfig) -> None:
    """Law: it alone decides what is held out, and data.seed decides it where it is not set."""

    def seen(seed: int, split_seed: int | None) -> tuple[list[int], list[int]]:
        data = replace(letters.data, seed=seed, split_seed=split_seed)
        source = open_source(replace(letters, data=data))
        batches = source.validation_batch(), source.train_batch(0, 4)
        return tuple(batch.tokens.flatten().tolist() for batch in batches)  # type: ignore[return-value]

    assert seen(1, 7)[0] == seen(2, 7)[0] == seen(7, None)[0]
    assert seen(1, 7)[1] != seen(2, 7)[1]
    assert seen(1, None) == seen(1, 1)
    assert seen(1, None)[0] != seen(2, None)[0]


def test_every_pass_has_the_same_sequences_in_another_order(letters: RunConfig) -> None:
    source = open_source(replace(letters, micro_batch_size=1))
    length, whole = letters.model.seq_length, source.tokens_of_pass
    assert whole is not None
    first, second = (
        source.train_batch(start, whole // length).tokens[:, 0].tolist() for start in (0, whole)
    )
    assert sorted(first) == sorted(second)
    assert first != second


@pytest.mark.parametrize("purpose", ["train", "validation"])
def test_replicas_share_what_a_single_one_would_get(config: RunConfig, purpose: str) -> None:
    def rows(dp: int) -> list[list[int]]:
        source = open_source(
            replace(
                config, num_microbatches=12 // dp, run=replace(config.run, eval_microbatches=12)
            )
        )
        if purpose == "train":
            start = 2 * 12 * 2 * 8
            batches = [source.train_batch(start, 12 // dp, rank, dp) for rank in range(dp)]
        else:
            batches = [source.validation_batch(rank, dp) for rank in range(dp)]
        return [row for batch in batches for row in batch.tokens.flatten(0, 1).tolist()]

    assert len(rows(1)) == 24
    for dp in (2, 3, 4, 6, 12):
        assert rows(dp) == rows(1)


def test_validation_counts_no_sample_twice_where_replicas_get_unequal_shares(
    config: RunConfig,
) -> None:
    def counted(num_microbatches: int, dp: int) -> list[list[int]]:
        source = open_source(
            replace(config, run=replace(config.run, eval_microbatches=num_microbatches))
        )
        batches = [source.validation_batch(rank, dp) for rank in range(dp)]
        assert {len(batch.tokens) for batch in batches} == {max(1, -(-num_microbatches // dp))}
        labels = [row for batch in batches for row in batch.labels.flatten(0, 1).tolist()]
        return [row for row in labels if set(row) != {-100}]

    for num_microbatches, dp in ((3, 2), (5, 3), (1, 4), (0, 2)):
        assert counted(num_microbatches, dp) == counted(num_microbatches, 1)
        assert len(counted(num_microbatches, 1)) == 2 * max(1, num_microbatches)


def test_a_longer_run_begins_with_the_same_batches(letters: RunConfig) -> None:
    short, long = (
        open_source(run_config(letters.data, steps=4)),
        open_source(run_config(letters.data, steps=400)),
    )
    for step in range(1, 30):  # several epochs, and beyond the end of the short run
        assert torch.equal(train_batch(short, step).tokens, train_batch(long, step).tokens)


def test_later_epochs_have_the_same_samples_in_another_order(letters: RunConfig) -> None:
    source = open_source(letters)
    corpus = prepare(letters.data, VOCAB_SIZE, progress=False)
    training, _ = split_documents(
        corpus.prefix, letters.data.validation_fraction, letters.data.seed
    )
    num_samples = (training.num_tokens - 1) // 8
    num_steps = 3 * num_samples // 8 + 1
    rows = [
        tuple(row)
        for step in range(1, num_steps + 1)
        for row in train_batch(source, step).tokens.view(-1, 8).tolist()
    ]
    epochs = [rows[start : start + num_samples] for start in range(0, 3 * num_samples, num_samples)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_windows_are_slices_of_the_documents_one_after_another(tmp_path: Path) -> None:
    write_letters(tmp_path / "text", [1, 3, 40, 1, 1, 1, 17, 2, 90, 5])
    corpus = prepare(text_config(tmp_path), VOCAB_SIZE, progress=False)
    training, _ = split_documents(corpus.prefix, 0.1, 1)
    tokens = np.fromfile(f"{corpus.prefix}.bin", dtype=np.uint16)
    documents = np.split(tokens, np.flatnonzero(tokens == corpus.manifest.end_token) + 1)
    text = np.concatenate([documents[number] for number in training.documents])
    document_of = np.concatenate(
        [np.full(len(documents[number]), number) for number in training.documents]
    )
    for seq_length in (1, 2, 5, 8, len(text) - 1):
        windows = Windows.of(corpus.prefix, training, seq_length)
        assert len(windows) == (len(text) - 1) // seq_length
        for index in range(len(windows)):
            here = slice(index * seq_length, (index + 1) * seq_length + 1)
            sample, within = windows.read(index)
            assert sample.tolist() == text[here].tolist()
            _, expected = np.unique(document_of[here], return_inverse=True)
            assert within.tolist() == expected.tolist()


def test_packed_documents_have_segments_and_no_label_from_the_next_one(letters: RunConfig) -> None:
    packed = open_source(replace(letters, data=replace(letters.data, packing="documents")))
    plain = open_source(letters)
    end = prepare(letters.data, VOCAB_SIZE, progress=False).manifest.end_token
    ends = 0
    for step in range(1, 10):
        ours, theirs = train_batch(packed, step), train_batch(plain, step)
        assert theirs.segments is None
        assert ours.segments is not None
        assert ours.segments.dtype == torch.int32
        assert torch.equal(ours.tokens, theirs.tokens)
        last = ours.tokens == end
        assert torch.equal(ours.labels, theirs.labels.masked_fill(last, -100))
        assert torch.equal(ours.segments, last.cumsum(-1) - last.int())
        ends += int(last.sum())
    assert ends > 5
    validation = packed.validation_batch()
    assert validation.segments is not None
    assert torch.equal(validation.labels == -100, validation.tokens == end)


@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_no_document_is_on_both_sides(letters: RunConfig, fraction: float) -> None:
    open_source(letters)  # this split has another fraction and must not be reused
    data = text_config(Path(letters.data.cache_dir).parent, validation_fraction=fraction)
    steps = 60
    source = open_source(run_config(data, steps=steps))
    training = {
        token
        for step in range(1, steps + 1)
        for token in train_batch(source, step).tokens.flatten().tolist()
    }
    validation = set(source.validation_batch().tokens.flatten().tolist())
    end = prepare(data, VOCAB_SIZE, progress=False).manifest.end_token
    assert training & validation <= {end}
    assert len(validation) > 1


def test_every_rank_draws_the_same_samples(
    letters: RunConfig, request: pytest.FixtureRequest
) -> None:
    alone = train_batch(open_source(letters), 2)
    request.getfixturevalue("rank_one_of_two")
    assert torch.equal(train_batch(open_source(letters), 2).tokens, alone.tokens)


def test_validation_takes_its_fraction_and_never_the_largest_document(tmp_path: Path) -> None:
    write_letters(tmp_path / "text", [2000, *[30] * 15])
    corpus = prepare(text_config(tmp_path), VOCAB_SIZE, progress=False)
    for seed in range(20):
        training, validation = split_documents(corpus.prefix, 0.1, seed)
        assert sorted([*training.documents, *validation.documents]) == list(range(16))
        assert training.num_tokens + validation.num_tokens == corpus.manifest.num_tokens
        assert 0 in training.documents
        assert 0.05 < validation.num_tokens / corpus.manifest.num_tokens <= 0.1
    assert len(split_documents(corpus.prefix, 0.0, 1)[1].documents) == 0
    assert len(split_documents(corpus.prefix, 0.001, 1)[1].documents) == 1


@pytest.mark.parametrize("num_tokens", [1, 30, 91])
def test_a_corpus_of_seq_length_tokens_is_refused_and_one_more_is_a_sample(
    tmp_path: Path, num_tokens: int
) -> None:
    write_letters(tmp_path / "text", [num_tokens])
    data = text_config(tmp_path, validation_fraction=0.0)
    there = prepare(data, VOCAB_SIZE, progress=False).manifest.num_tokens
    with pytest.raises(
        ConfigError, match=rf"{there:,} tokens, too short for one sample of {there + 1:,}"
    ):
        open_source(run_config(data, seq_length=there, eval_every=0))
    batch = train_batch(
        open_source(run_config(data, seq_length=there - 1, eval_every=0)), 1, there - 1
    )
    assert batch.tokens.shape == (4, 2, there - 1)
    # The only sample is repeated.
    assert torch.equal(batch.tokens, batch.tokens[:1, :1].expand_as(batch.tokens))


def test_data_too_short_for_one_sample_is_an_error(letters: RunConfig) -> None:
    num_tokens = prepare(letters.data, VOCAB_SIZE, progress=False).manifest.num_tokens
    with pytest.raises(
        ConfigError,
        match=rf"^data\.path={letters.data.path}: training gets \d+ of 20 documents .* too "
        rf"short for one sample of {num_tokens:,}; give more text, lower model.seq_length",
    ):
        open_source(run_config(letters.data, seq_length=num_tokens - 1))
    with pytest.raises(ConfigError, match=r"too short for .* lower data\.sample_length"):
        open_source(run_config(replace(letters.data, sample_length=num_tokens)))
    with pytest.raises(
        ConfigError,
        match=r"validation gets 4 of 20 documents .* change data.validation_fraction=0.2",
    ):
        open_source(run_config(letters.data, seq_length=num_tokens * 2 // 3))


def test_single_document_can_be_trained_on_without_validation(tmp_path: Path) -> None:
    write_letters(tmp_path / "text", [1000])
    num_tokens = prepare(text_config(tmp_path), VOCAB_SIZE, progress=False).manifest.num_tokens
    with pytest.raises(
        ConfigError,
        match=r"validation gets 0 of 1 document .*0 with run.eval_every=0 trains on everything",
    ):
        open_source(run_config(text_config(tmp_path), seq_length=num_tokens // 2))
    with pytest.raises(
        ConfigError,
        match=r"validation_fraction=0 leaves no document .*0\.1, or run\.eval_every=0, ",
    ):
        open_source(run_config(text_config(tmp_path, validation_fraction=0.0)))
    source = open_source(run_config(text_config(tmp_path, validation_fraction=0.0), eval_every=0))
    assert train_batch(source, 1).tokens.shape == (4, 2, 8)


def test_only_the_synthetic_source_knows_its_entropy(letters: RunConfig) -> None:
    assert open_source(letters).entropy is None
    source = open_source(SYNTHETIC)
    assert source.entropy is not None
    assert f"{source.entropy:.4f} nats" in source.description


@pytest.mark.parametrize("length", [4, 8, 12, 16])
@pytest.mark.parametrize("packing", ["none", "documents"])
def test_sequences_of_another_length_have_the_same_tokens_in_the_same_order(
    letters: RunConfig, length: int, packing: str
) -> None:
    data = replace(letters.data, packing=packing, sample_length=8)
    ours, theirs = (
        open_source(run_config(data, seq_length=given)).train_batch(96, 24 // given * 4)
        for given in (length, 8)
    )
    assert ours.tokens.shape == (24 // length * 4, 2, length)
    num = min(ours.tokens.numel(), theirs.tokens.numel())
    assert num >= 64
    assert torch.equal(ours.tokens.flatten()[:num], theirs.tokens.flatten()[:num])
    assert torch.equal(ours.labels.flatten()[:num], theirs.labels.flatten()[:num])
    if packing == "none" or length < 8:
        return
    # A sequence that is longer than a sample sees from one sample into no other.
    assert ours.segments is not None
    for number, sequence in enumerate(ours.segments.flatten(0, 1)):
        runs = torch.unique_consecutive(sequence)
        assert len(runs) == len(set(runs.tolist()))
        for start in range(1, length):
            if (number * length + start) % 8 == 0:  # 96 tokens before are whole samples
                assert sequence[start - 1] != sequence[start]
