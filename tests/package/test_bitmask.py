"""BitMask: its packed layout against numpy's, and its methods."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from tensors import DTYPES, awkward

from fastshape import BitMask, rng_state


@pytest.mark.parametrize("n", (0, 1, 10, 63, 64, 65, 99, 999, 131072, 999_999))
def test_layout_is_that_of_numpy_packbits(kernels, n, simd):
    values = np.random.default_rng(n).random(n) < 0.4
    expected = np.packbits(values, bitorder="little")
    mask = BitMask.from_bool(torch.from_numpy(values))
    assert np.array_equal(mask.bits.numpy(), expected)
    assert np.array_equal(mask.to_bool().numpy(), values)
    assert kernels.pack_bools(values.tobytes()) == expected.tobytes()


@pytest.mark.parametrize("dtype", (*DTYPES, torch.uint8), ids=str)
def test_from_tensor_reads_positive(dtype):
    t = awkward(1000, dtype) if dtype.is_floating_point else torch.arange(1000).to(dtype)
    assert torch.equal(BitMask.from_tensor(t).to_bool(), t > 0)


def test_expected_byte_by_hand():
    t = torch.tensor([True, False, False, True, False, False, False, True, True, True])
    assert BitMask.from_bool(t).bits.tolist() == [0b10001001, 0b00000011]


def test_memory_format_numbers_the_elements():
    t = torch.randn(3, 5, 4, 7)
    last = t.contiguous(memory_format=torch.channels_last)
    mask, mask_last = BitMask.from_tensor(t), BitMask.from_tensor(last)
    assert mask_last.memory_format == "channels_last"
    expected = np.packbits((t > 0).permute(0, 2, 3, 1).numpy().reshape(-1), bitorder="little")
    assert np.array_equal(mask_last.bits.numpy(), expected)
    assert not torch.equal(mask.bits, mask_last.bits)
    assert torch.equal(mask_last.to_bool(), t > 0)
    assert mask_last.to_bool().stride() == last.stride()
    assert torch.equal(mask.in_memory_format("channels_last").bits, mask_last.bits)
    assert mask == mask_last
    cube = torch.randn(2, 3, 4, 5, 6)
    cube_last = cube.contiguous(memory_format=torch.channels_last_3d)
    assert torch.equal(BitMask.from_tensor(cube_last).to_bool(), cube > 0)


def test_any_other_strides_are_read_in_contiguous_order():
    t = torch.randn(6, 9)
    for view in (t.t(), t[:, ::2], t[::3], t[:1].expand(5, 9)):
        assert torch.equal(BitMask.from_tensor(view).to_bool(), view > 0)


@pytest.mark.parametrize("shape", ((), (1,), (0, 3), (2, 3, 4)))
def test_small_shapes(shape):
    t = torch.randn(shape)
    mask = BitMask.from_tensor(t)
    assert mask.shape == t.shape and mask.numel() == t.numel()
    assert torch.equal(mask.to_bool(), t > 0)


def test_density():
    assert BitMask.from_bool(torch.tensor([True] * 3 + [False] * 7)).density() == 0.3
    assert BitMask.from_bool(torch.ones(1000, dtype=torch.bool)).density() == 1.0
    assert np.isnan(BitMask.from_bool(torch.ones(0, dtype=torch.bool)).density())


def test_and():
    a, b = torch.randn(2, 3, 5, 5), torch.randn(2, 3, 5, 5)
    b_last = b.contiguous(memory_format=torch.channels_last)
    both = BitMask.from_tensor(a) & BitMask.from_tensor(b_last)
    assert torch.equal(both.to_bool(), (a > 0) & (b > 0))
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(3, 2\)"):
        BitMask.from_tensor(torch.ones(2, 3)) & BitMask.from_tensor(torch.ones(3, 2))


@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last))
def test_first_samples_of_a_batch(memory_format):
    t = torch.randn(5, 3, 3, 3).contiguous(memory_format=memory_format)
    mask = BitMask.from_tensor(t)
    for count in range(6):
        first = mask.first(count)
        assert first == BitMask.from_tensor(t[:count].contiguous(memory_format=memory_format))
    assert first is mask
    with pytest.raises(ValueError, match="count=6.*this mask has 5 samples"):
        mask.first(6)


def test_random_equals_the_mask_of_shape():
    state = rng_state(3)
    mask = BitMask.random((4, 5), 0.5, rng_state=state)
    assert mask == BitMask.random((4, 5), 0.5, rng_state=state)
    assert not mask == BitMask.random((4, 5), 0.5, rng_state=rng_state(4))
    generator = torch.Generator().manual_seed(0)
    mask = BitMask.random((99,), 0.5, generator=generator)
    assert mask == BitMask.random((99,), 0.5, generator=torch.Generator().manual_seed(0))


def test_save_load_copy():
    mask = BitMask.from_tensor(
        torch.randn(2, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    )
    file = io.BytesIO()
    torch.save({"mask": mask}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)["mask"]
    for other in (loaded, copy.deepcopy(mask), pickle.loads(pickle.dumps(mask)), mask.to("cpu")):
        assert other == mask and other.memory_format == mask.memory_format


def test_errors():
    bits = torch.zeros(2, dtype=torch.uint8)
    with pytest.raises(TypeError, match="uint8.*int64"):
        BitMask(bits.long(), (16,))
    with pytest.raises(ValueError, match=r"shape \(17,\) needs shape \(3,\), not \(2,\)"):
        BitMask(bits, (17,))
    with pytest.raises(ValueError, match="memory_format='weird': allowed are contiguous"):
        BitMask(bits, (16,), "weird")
    with pytest.raises(ValueError, match="channels_last.*4 dimensions, not 1"):
        BitMask(bits, (16,), "channels_last")
    with pytest.raises(TypeError, match="complex64"):
        BitMask.from_tensor(torch.zeros(3, dtype=torch.complex64))
    with pytest.raises(TypeError, match="must be bool"):
        BitMask.from_bool(torch.zeros(3))
    with pytest.raises(ValueError, match="not both"):
        BitMask.random((3,), 0.5, rng_state=rng_state(1), generator=torch.Generator())
