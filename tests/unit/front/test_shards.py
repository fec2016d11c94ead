"""The hash that chooses a worker distributes inode numbers evenly."""

from __future__ import annotations

import math
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from llloop.front.inodes import mix
from llloop.front.router import Router
from llloop.shared.slots import Slots

NUMBERS = st.integers(0, 2**64 - 1)
PER_WORKER = 32

# A statistical test can fail by chance. So the examples are the same in each run.
fixed = settings(derandomize=True, deadline=None, max_examples=30)


def shares(numbers: list[int], workers: int) -> list[int]:
    router = Router(Slots(1, 4096, 1), [-1] * workers)
    counts = [0] * workers
    for number in numbers:
        counts[router.shard_of(number)] += 1
    return counts


def check_spread(numbers: list[int], workers: int) -> None:
    counts = shares(numbers, workers)
    assert sum(counts) == len(numbers)
    expected = len(numbers) / workers
    chi_square = sum((count - expected) ** 2 for count in counts) / expected
    # Its mean is workers - 1 and its variance twice that if each number falls anywhere alike.
    assert chi_square <= (workers - 1) + 7 * math.sqrt(2 * workers) + 12, counts
    assert min(counts) > 0, counts


@fixed
@given(start=NUMBERS, workers=st.integers(1, 128))
def test_consecutive_numbers(start: int, workers: int) -> None:
    check_spread([(start + index) % 2**64 for index in range(PER_WORKER * workers)], workers)


@fixed
@given(start=NUMBERS, stride=st.integers(1, 2**40), workers=st.integers(1, 128))
def test_numbers_with_a_stride(start: int, stride: int, workers: int) -> None:
    check_spread([(start + index * stride) % 2**64 for index in range(PER_WORKER * workers)], workers)


@fixed
@given(power=st.integers(0, 50), workers=st.integers(1, 128))
def test_strides_of_powers_of_two(power: int, workers: int) -> None:
    """As in XFS: the allocation group is in the upper bits, the inode in the lower ones."""
    check_spread([index << power for index in range(PER_WORKER * workers)], workers)


@fixed
@given(seed=st.integers(0, 2**32), workers=st.integers(1, 128))
def test_random_numbers(seed: int, workers: int) -> None:
    numbers = random.Random(seed)
    check_spread([numbers.getrandbits(64) for _ in range(PER_WORKER * workers)], workers)


@given(number=NUMBERS, workers=st.integers(1, 128))
def test_shard_of_a_number_is_constant(number: int, workers: int) -> None:
    slots = Slots(1, 4096, 1)
    shard = Router(slots, [-1] * workers).shard_of(number)
    assert 0 <= shard < workers
    assert Router(slots, [-1] * workers).shard_of(number) == shard


@given(st.sets(NUMBERS, min_size=2, max_size=200))
def test_mix_is_injective(numbers: set[int]) -> None:
    assert len({mix(number) for number in numbers}) == len(numbers)
    assert all(0 <= mix(number) < 2**64 for number in numbers)
