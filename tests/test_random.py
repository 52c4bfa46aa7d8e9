"""Random numbers are functions of what they are for, never of the rank or of how many were drawn before."""

import threading
from itertools import pairwise

import numpy as np
import pytest

from distprop import functional as F
from distprop import manual_seed, nn, random
from distprop.random import Stream, generator, initialiser, row_bits


def test_a_generator_is_named_by_its_arguments():
    streams = Stream.__members__.values()  # two that had one number would be one to `for stream in Stream`
    names = [
        (seed, stream, first, second) for seed in (0, 1) for stream in streams for first in (0, 1) for second in (0, 1)
    ]
    draws = [generator(*name).integers(0, 2**63) for name in names]
    assert draws == [generator(*name).integers(0, 2**63) for name in names]
    assert len(set(draws)) == len(names)


def test_two_generators_never_share_a_number_within_reach():
    """Named by the upper words of the counter, so each has 2^128 blocks of its own."""
    long = generator(0, Stream.SHUFFLE, 0).integers(0, 2**63, 100_000)
    for other in (generator(0, Stream.SHUFFLE, 1), generator(0, Stream.SHUFFLE, 0, 1), generator(0, Stream.AUGMENT)):
        assert not np.isin(other.integers(0, 2**63, 1000), long).any()


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_negative_seed_and_one_of_more_than_64_bits_are_refused(seed):
    for call in (manual_seed, lambda seed: generator(seed, Stream.SHUFFLE)):
        with pytest.raises(ValueError, match=rf"the seed must be 0 or more and less than 2\^64, got {seed}"):
            call(seed)


def test_large_seeds_are_as_different_as_small_ones():
    seeds = (0, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 1)
    assert len({generator(seed, Stream.SHUFFLE).integers(0, 2**63) for seed in seeds}) == len(seeds)
    bits = []
    for seed in seeds:
        random.at(seed, step=0, first_row=0)
        bits.append(row_bits(1, 4).tobytes())
    assert len(set(bits)) == len(seeds)


def test_manual_seed_starts_initialisation_again():
    first = nn.Linear(4, 3), nn.Linear(4, 3)
    manual_seed(0)
    second = nn.Linear(4, 3), nn.Linear(4, 3)
    manual_seed(1)
    third = nn.Linear(4, 3)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.weight.data, b.weight.data)
        np.testing.assert_array_equal(a.bias.data, b.bias.data)
    assert not np.array_equal(first[0].weight.data, first[1].weight.data)
    assert not np.array_equal(first[0].weight.data, third.weight.data)


def test_without_a_seed_it_is_zero():
    """A thread has a context of its own, in which nobody has called manual_seed."""
    found = []

    def draw():
        found.append((initialiser().uniform(), row_bits(2, 3).tolist()))

    for _ in range(2):
        thread = threading.Thread(target=draw)
        thread.start()
        thread.join()
    manual_seed(0)
    assert found == [(initialiser().uniform(), row_bits(2, 3).tolist())] * 2


def test_manual_seed_starts_dropout_again():
    x = np.ones((4, 6))
    masks = [F.dropout(x).data for _ in range(3)]
    manual_seed(0)
    for mask in masks:
        np.testing.assert_array_equal(F.dropout(x).data, mask)
    manual_seed(1)
    assert not np.array_equal(F.dropout(x).data, masks[0])


@pytest.mark.parametrize("width", [1, 7, 8, 9, 100])
@pytest.mark.parametrize("cuts", [[4], [1, 2, 3, 9], [0, 0, 5, 10], range(11)])
def test_the_bits_of_a_row_do_not_depend_on_how_the_batch_is_split(width, cuts):
    def draw(first, last):
        random.at(seed=3, step=5, first_row=first)
        return [row_bits(last - first, width), row_bits(last - first, 2)]  # two layers

    whole = draw(0, 10)
    edges = [0, *cuts, 10]
    pieces = [draw(a, b) for a, b in pairwise(edges)]
    for layer in range(2):
        np.testing.assert_array_equal(np.concatenate([piece[layer] for piece in pieces]), whole[layer])


def test_masks_of_different_seeds_steps_rows_and_layers_differ():
    rows = {}
    for seed in (0, 1):
        for step in (0, 1):
            for first_row in (0, 100):
                random.at(seed, step, first_row)
                for layer in (0, 1):
                    for i, row in enumerate(row_bits(3, 16)):
                        rows[seed, step, first_row + i, layer] = row.tobytes()
    assert len(rows) == 48
    assert len(set(rows.values())) == 48


def test_bits_are_uniform():
    bits = row_bits(1000, 101)
    assert bits.dtype == np.uint32
    assert bits.shape == (1000, 101)
    counts = np.bincount((bits >> 28).ravel(), minlength=16)
    expected = bits.size / 16
    assert ((counts - expected) ** 2 / expected).sum() < 50  # chi-squared with 15 degrees: 50 has probability 1e-5
    assert abs(np.corrcoef(bits[:, 0], bits[:, 1])[0, 1]) < 0.15
    assert abs(np.corrcoef(bits[:-1, 0], bits[1:, 0])[0, 1]) < 0.15


@pytest.mark.parametrize("shape", [(6, 5), (6, 3, 2), (6,)])
def test_dropout_of_a_split_batch_is_the_dropout_of_the_whole(shape):
    model = nn.Sequential(nn.Dropout(0.3), nn.Dropout(0.5))
    x = np.ones(shape, np.float32)
    random.at(seed=1, step=2, first_row=40)
    whole = model(x).data
    halves = []
    for first in (0, 2):
        random.at(seed=1, step=2, first_row=40 + first)
        halves.append(model(x[first : [2, 6][first > 0]]).data)
    np.testing.assert_array_equal(np.concatenate(halves), whole)
    random.at(seed=1, step=3, first_row=40)
    assert not np.array_equal(model(x).data, whole)


def test_a_rank_without_rows_takes_part_in_dropout():
    random.at(0, 0, 4)
    assert F.dropout(np.ones((0, 5))).shape == (0, 5)
    F.dropout(np.ones((0, 5)))
    assert random.place().draws == 2
