"""The sample order gives every sample once per epoch, and keeps to the weights at every prefix."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from math import ceil, floor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vp_train.config import BlendEntry, ConfigError, DataConfig
from vp_train.config.data import whole_weights
from vp_train.data.order import Permutation, SampleOrder, Turns, own_starts, pieces_of


@pytest.mark.parametrize("size", [*range(1, 40), 99, 100, 101, 2**12, 10_007])
def test_permutation_is_a_bijection(size: int) -> None:
    for key in (b"one", b"two"):
        permutation = Permutation(size, key)
        assert sorted(map(permutation, range(size))) == list(range(size))


@pytest.mark.parametrize("size", [2, 3, 7, 10])
def test_permutations_of_many_keys_are_uniform(size: int) -> None:
    """An index or a pair of indices goes to every place equally often, over many keys.

    The chi-square statistic must stay below its 99.99 % point, approximately.
    """
    num_keys = 3000
    permutations = [Permutation(size, f"key {number}".encode()) for number in range(num_keys)]
    for indices in ([0], [size - 1], [0, 1], [size // 2, 0]):
        counts = Counter(
            tuple(permutation(index) for index in indices) for permutation in permutations
        )
        cells = size if len(indices) == 1 else size * (size - 1)
        expected = num_keys / cells
        chi_square = sum(count**2 for count in counts.values()) / expected - num_keys
        freedom = cells - 1
        assert chi_square < freedom + 4 * (2 * freedom) ** 0.5 + 8, indices


def test_permutation_of_a_large_range_needs_no_memory_and_scatters() -> None:
    permutation = Permutation(10**12, b"large")
    images = list(map(permutation, range(1000)))
    assert len(set(images)) == 1000
    for quarter in range(4):
        assert 180 < sum(image * 4 // 10**12 == quarter for image in images) < 320


def test_a_run_goes_on_in_the_order_that_it_began_with() -> None:
    """The order is part of a checkpoint's meaning: no version may change it."""
    order = SampleOrder((5, 9), Turns.of([1, 2]), 3, "training")
    begun = [(1, 2), (0, 1), (1, 6), (1, 5), (0, 2), (1, 3), (1, 7), (0, 0), (1, 8), (1, 4)]
    assert [order[position] for position in range(30, 40)] == begun
    square = [12, 5, 14, 13, 11, 0, 1, 2, 15, 4, 8, 10, 9, 3, 6, 7]
    assert list(map(Permutation(16, b"key"), range(16))) == square


weights_lists = st.lists(st.integers(1, 60), min_size=1, max_size=6)


@given(weights_lists)
@settings(max_examples=100, deadline=None)
def test_each_prefix_has_each_share_rounded_down_or_up(weights: list[int]) -> None:
    turns, counts = Turns.of(weights), [0] * len(weights)
    for position in range(2 * sum(weights) + 3):
        corpus, before = turns[position]
        assert before == counts[corpus]
        counts[corpus] += 1
        for weight, count in zip(weights, counts, strict=True):
            exact = Fraction(weight * (position + 1), sum(weights))
            assert floor(exact) <= count <= ceil(exact)


def test_weights_are_taken_as_the_decimals_they_are() -> None:
    assert whole_weights([1.0]) == (1,)
    assert whole_weights([0.7, 0.2, 0.1]) == (7, 2, 1)
    assert whole_weights([30, 1.5]) == (20, 1)
    assert whole_weights([1e-3, 1]) == (1, 1000)
    with pytest.raises(
        ConfigError, match=r"repeat only after 8,888,888 samples.*for example to 0\.139, 0\.861"
    ):
        whole_weights([1234567, 7654321])
    with pytest.raises(ConfigError, match=r"for example to 1\.0, 0\.001"):
        whole_weights([1, 1e-7])


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_weights_that_are_not_positive_are_refused(weight: float) -> None:
    with pytest.raises(
        ConfigError,
        match=r"data\.blend: weight=.* of somewhere; weights must be above 0 and finite",
    ):
        BlendEntry(path="somewhere", weight=weight)


def test_settings_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data=blend needs its corpora; write 'data\.blend="):
        DataConfig(name="blend")
    with pytest.raises(
        ConfigError, match=r"data\.blend counts only with data=blend, not data\.name=pystdlib"
    ):
        DataConfig(blend=(BlendEntry(path="somewhere"),))
    with pytest.raises(ConfigError, match=r"every corpus needs a path, or name: pystdlib"):
        BlendEntry()
    with pytest.raises(ConfigError, match=r"data\.blend: name='synthetic' is not known"):
        BlendEntry(name="synthetic")
    with pytest.raises(ConfigError, match=r"data\.packing=documents needs documents"):
        DataConfig(name="synthetic", packing="documents")


# A run is stopped and restarted with other numbers of replicas.  For each piece between two stops:
# (dp, number of steps, number of last steps that no checkpoint holds).
pieces = st.tuples(st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(1, 6), st.integers(0, 3))


@given(
    seed=st.integers(0, 2**32),
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=4),
    weights=st.lists(st.integers(1, 9), min_size=4, max_size=4),
    history=st.lists(pieces, min_size=1, max_size=12),
)
@settings(max_examples=200, deadline=None)
def test_every_sample_comes_once_per_epoch_under_any_history(
    seed: int, sizes: list[int], weights: list[int], history: list[tuple[int, int, int]]
) -> None:
    global_batch = 12
    turns = Turns.of(whole_weights(weights[: len(sizes)]))
    taken: list[list[tuple[int, int]]] = []  # the samples of every step that was not lost
    for dp, num_steps, num_lost in history:
        # A new process: it knows nothing of the past but the number of the step.
        order = SampleOrder(tuple(sizes), turns, seed, "training")
        for step in range(len(taken) + 1, len(taken) + num_steps + 1):
            start, own_count = (step - 1) * global_batch, global_batch // dp
            own = [own_starts(start, own_count, 1, rank, dp) for rank in range(dp)]
            taken.append([order[position] for positions in own for position in positions])
        del taken[len(taken) - min(num_lost, num_steps) :]
    uninterrupted = SampleOrder(tuple(sizes), turns, seed, "training")
    flat = [place for batch in taken for place in batch]
    assert flat == [uninterrupted[position] for position in range(len(flat))]
    for corpus, size in enumerate(sizes):
        samples = [sample for number, sample in flat if number == corpus]
        for start in range(0, len(samples), size):
            epoch = samples[start : start + size]
            assert len(set(epoch)) == len(epoch)
            assert len(epoch) < size or sorted(epoch) == list(range(size))


# Stretches of a run: (dp, microbatches of each replica, length of a sequence, steps).
stretches = st.tuples(
    st.sampled_from([1, 2, 3]), st.integers(1, 3), st.integers(1, 20), st.integers(1, 4)
)


@given(sample_length=st.integers(1, 12), history=st.lists(stretches, min_size=1, max_size=8))
@settings(max_examples=200, deadline=None)
def test_every_token_comes_once_whatever_the_steps_and_sequences(
    sample_length: int, history: list[tuple[int, int, int, int]]
) -> None:
    taken: list[tuple[int, int]] = []  # position of a sample, and token in it
    for dp, num_own, length, num_steps in history:
        for _ in range(num_steps):
            start = len(taken)
            for rank in range(dp):
                for first in own_starts(start, num_own, length, rank, dp):
                    pieces = pieces_of(first, length, sample_length)
                    assert all(tokens for _, tokens in pieces)
                    taken += [(position, token) for position, part in pieces for token in part]
    assert taken == [divmod(token, sample_length) for token in range(len(taken))]


def test_epochs_corpora_seeds_and_purposes_have_orders_of_their_own() -> None:
    def drawn(seed: int, purpose: str, corpus: int, epoch: int) -> list[int]:
        order = SampleOrder((100, 100), Turns.of([1, 1]), seed, purpose)
        places = [order[position] for position in range(200 * epoch, 200 * (epoch + 1))]
        return [sample for number, sample in places if number == corpus]

    orders = [
        drawn(*key)
        for key in ((1, "a", 0, 0), (1, "a", 0, 1), (1, "a", 1, 0), (2, "a", 0, 0), (1, "b", 0, 0))
    ]
    assert len({tuple(order) for order in orders}) == len(orders)
