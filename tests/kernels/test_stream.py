"""The random stream, Philox4x32-10 numbered by element, against independent implementations and published answers."""

import pytest
import torch

import fastshape
from fastshape import reference

SEEDS = (0, 1, 0x0123456789ABCDEF, 2**63 + 5, 2**64 - 1)
OFFSETS = (0, 1, 2**32 - 1, 2**32, 2**63, 2**64 - 1)


def signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def state_of(seed: int, offset: int) -> torch.Tensor:
    return torch.tensor([signed(seed), signed(offset)])


def python_philox(seed: int, offset: int, high: int = 0) -> tuple[int, ...]:
    """Philox4x32-10 in Python integers, written from the paper. `high` is the upper half of the counter; fastshape has 0."""
    word = 2**32 - 1
    key = [seed & word, seed >> 32]
    counter = [offset & word, offset >> 32, high & word, high >> 32]
    for _ in range(10):
        first, second = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            second >> 32 ^ counter[1] ^ key[0],
            second & word,
            first >> 32 ^ counter[3] ^ key[1],
            first & word,
        ]
        key = [(key[0] + 0x9E3779B9) & word, (key[1] + 0xBB67AE85) & word]
    return tuple(counter)


def test_known_answers_of_the_random123_distribution(kernels):
    answers = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert python_philox(0, 0) == answers
    assert kernels.philox_words(0, 0) == answers
    # Key and counter with all bits set, and with the digits of pi. These answers verify the oracle of the other tests.
    ones = 2**64 - 1
    assert python_philox(ones, ones, ones) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    pi = python_philox(0x299F31D0A4093822, 0x85A308D3243F6A88, 0x0370734413198A2E)
    assert pi == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("offset", OFFSETS)
def test_reference_and_header_agree_with_the_paper(kernels, seed, offset):
    expected = python_philox(seed, offset)
    assert kernels.philox_words(seed, offset) == expected
    words = reference.philox_words(torch.tensor(signed(seed)), torch.tensor([signed(offset)]))
    assert tuple(words[0].tolist()) == expected


@pytest.mark.skipif(
    not hasattr(torch.ops.aten, "_philox_randint_"), reason="this torch has no stateless Philox"
)
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("offset", (0, 1, 2**32 - 9, 2**32, 2**63 - 9, 2**64 - 9))
def test_reference_agrees_with_torch(seed, offset):
    words_of_torch = torch.empty(64, dtype=torch.int32)
    torch.ops.aten._philox_randint_(
        words_of_torch, torch.tensor([seed, offset], dtype=torch.uint64)
    )
    state = state_of(seed, offset)
    # The offsets of 16 calls carry into the high word or wrap at 2^64.
    words = reference.philox_words(state[0], state[1] + torch.arange(16)).reshape(-1)
    assert torch.equal(words, words_of_torch.long() & 0xFFFFFFFF)


def test_element_takes_its_half_word_low_half_first():
    seed, offset, threshold = 77, 5, 0x5555
    state, n = state_of(seed, offset), 40
    mask = fastshape.BitMask.random((n,), threshold / 65536, rng_state=state).to_bool()
    for i in range(n):
        word = python_philox(seed, offset + i // 8)[(i % 8) // 2]
        half = word >> 16 if i % 2 else word & 0xFFFF
        assert bool(mask[i]) == (half >= threshold)


@pytest.mark.parametrize("p_zero", (0.0, 1e-6, 0.3, 0.5, 0.999, 1 - 1e-6, 1 - 1e-12))
def test_packed_mask_equals_reference_for_every_chunking(kernels, p_zero, simd):
    for seed, offset in ((3, 0), (2**64 - 1, 2**64 - 4), (9, 2**32 - 3)):
        for n in (0, 1, 8, 63, 64, 65, 513, 4099):
            expected = bytes(reference.pack_random(state_of(seed, offset), n, p_zero).tolist())
            for chunk in (1, 3, 8, 9, 64, 10_000):
                assert kernels.random_bits(seed, offset, n, p_zero, chunk) == expected


@pytest.mark.parametrize("p_zero", (0.1, 0.5, 0.9))
def test_share_of_zeros_is_p_zero(p_zero):
    n = 2**20
    density = fastshape.BitMask.random((n,), p_zero, rng_state=fastshape.rng_state(11)).density()
    # The bound is five standard deviations of a binomial share.
    assert abs((1 - density) - p_zero) < 5 * (p_zero * (1 - p_zero) / n) ** 0.5


def test_threshold_rounds_half_to_even(kernels):
    # 0.5 / 65536 and 1.5 / 65536 are ties. They round to 0 (keep all) and to 2.
    state, n = fastshape.rng_state(1), 2**20
    halves = reference.philox_words(state[0], state[1] + torch.arange(n // 8))
    halves = torch.stack([halves & 0xFFFF, halves >> 16], -1).reshape(-1)
    for p_zero, threshold in ((0.5 / 65536, 0), (1.5 / 65536, 2)):
        assert reference.drop_threshold(p_zero) == threshold
        bits = torch.ops.fastshape.pack_random(state, n, p_zero)
        assert torch.equal(fastshape.BitMask(bits, (n,)).to_bool(), halves >= threshold)
    assert (halves < 2).any(), (
        "no draw that the second threshold drops: the test would prove nothing"
    )


def test_seed_makes_state_and_generator_moves():
    assert fastshape.rng_state(7).tolist() == [7, 0]
    assert fastshape.rng_state(2**64 - 1).tolist() == [-1, 0]
    generator = torch.Generator().manual_seed(4)
    first, second = (
        fastshape.rng_state(generator=generator),
        fastshape.rng_state(generator=generator),
    )
    assert not torch.equal(first, second)
    assert torch.equal(first, fastshape.rng_state(generator=torch.Generator().manual_seed(4)))
    torch.manual_seed(4)
    assert torch.equal(first, fastshape.rng_state())
