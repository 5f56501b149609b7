"""BitMask: its packed layout against numpy's, and its methods."""

import copy
import io
import operator
import pickle

import numpy as np
import pytest
import torch
from tensors import DTYPES, awkward

from fastshape import BitMask, rng_state, shape


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


# Sample sizes that are whole bytes and that are not, in each memory format.
FORMATS = {
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
    "channels_last_3d": torch.channels_last_3d,
}
BATCHES = (
    ((6,), "contiguous"),
    ((5, 16), "contiguous"),
    ((5, 3, 3), "contiguous"),
    ((4, 3, 5, 7), "contiguous"),
    ((4, 3, 5, 7), "channels_last"),
    ((9, 2, 4, 3), "channels_last"),
    ((3, 3, 2, 3, 1), "channels_last_3d"),
    ((3, 2, 2, 2, 5), "channels_last_3d"),
    ((4, 0, 2, 2), "channels_last"),
    ((0, 3, 2, 2), "contiguous"),
)
batches = pytest.mark.parametrize(("shape", "memory_format"), BATCHES, ids=str)


def batch(shape, memory_format, seed=0):
    """A mask, and the same as an array of numpy."""
    t = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.6
    return BitMask.from_bool(t.contiguous(memory_format=FORMATS[memory_format])), t.numpy()


def assert_equal(mask, values, memory_format):
    """The mask has these values and no others: its spare bits are 0."""
    assert mask.memory_format == memory_format and mask.shape == values.shape
    assert np.array_equal(mask.to_bool().numpy(), values)
    order = values if memory_format == "contiguous" else np.moveaxis(values, 1, -1)
    packed = np.packbits(np.ascontiguousarray(order).reshape(-1), bitorder="little")
    assert np.array_equal(mask.bits.numpy(), packed)


@batches
@pytest.mark.parametrize("operation", (operator.and_, operator.or_, operator.xor))
def test_operations_of_two(shape, memory_format, operation):
    a, a_values = batch(shape, memory_format, 1)
    b, b_values = batch(shape, memory_format, 2)
    assert_equal(operation(a, b), operation(a_values, b_values), a.memory_format)
    in_order = BitMask.from_bool(torch.from_numpy(b_values))
    assert_equal(operation(a, in_order), operation(a_values, b_values), a.memory_format)


@batches
def test_not(shape, memory_format):
    mask, values = batch(shape, memory_format)
    assert_equal(~mask, ~values, mask.memory_format)
    assert ~~mask == mask
    if mask.numel():
        assert (~mask).density() == pytest.approx(1 - mask.density())


def test_not_of_a_single_value():
    assert (~BitMask.from_bool(torch.tensor(True))).bits.tolist() == [0]
    assert (~BitMask.from_bool(torch.tensor(False))).bits.tolist() == [1]


@pytest.mark.parametrize("operation", (operator.and_, operator.or_, operator.xor))
def test_operations_of_masks_that_do_not_fit(operation):
    mask = BitMask.from_tensor(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(3, 2\): must be equal"):
        operation(mask, BitMask.from_tensor(torch.ones(3, 2)))
    with pytest.raises(ValueError, match="masks on cpu and meta: must be on one device"):
        operation(mask, BitMask(torch.zeros(1, dtype=torch.uint8, device="meta"), (2, 3)))
    for other in (True, torch.ones(2, 3, dtype=torch.bool), None):
        with pytest.raises(TypeError, match="unsupported operand"):
            operation(mask, other)


def test_a_mask_has_no_truth_value():
    for mask in (BitMask.from_tensor(torch.ones(0)), BitMask.from_tensor(torch.ones(3))):
        with pytest.raises(TypeError, match="a BitMask has no truth value: compare it with None"):
            bool(mask)


@batches
def test_one_sample(shape, memory_format):
    mask, values = batch(shape, memory_format)
    assert len(mask) == len(values)
    for i in (*range(len(values)), *range(-len(values), 0)):
        for index in (i, np.int32(i), torch.tensor(i), np.array(i)):
            assert_equal(mask[index], values[i], "contiguous")
    samples = list(mask)
    assert len(samples) == len(values)
    for sample, expected in zip(samples, values, strict=True):
        assert_equal(sample, expected, "contiguous")
    for i in (len(values), -len(values) - 1):
        with pytest.raises(IndexError, match=f"index={i}: this mask has {len(values)} samples"):
            mask[i]


@batches
def test_slices(shape, memory_format):
    mask, values = batch(shape, memory_format)
    limits = (None, 0, 1, 2, 3, -1, -2, 100, -100)
    for start in limits:
        for stop in limits:
            for step in (None, 1, 2, 3):
                part = slice(start, stop, step)
                assert_equal(mask[part], values[part], mask.memory_format)
    with pytest.raises(ValueError, match="the step must be positive"):
        mask[::-1]


@batches
def test_chosen_samples(shape, memory_format):
    mask, values = batch(shape, memory_format)
    count = len(values)
    generator = np.random.default_rng(count)
    bools = generator.random(count) < 0.5
    choices = [[], np.zeros(count, bool), np.ones(count, bool), bools, bools[::-1]]
    if count:
        numbers = generator.integers(-count, count, 2 * count)
        choices += [numbers, numbers.astype(np.int8), numbers[::-1], [-1, 0, 0], range(count)]
    for index in choices:
        expected = values[np.asarray(index, dtype=None if len(index) else int)]
        if len(index) == count and np.asarray(index).dtype == bool:
            expected = values[np.asarray(index)]
        forms = [index, list(index)]
        if isinstance(index, np.ndarray):
            forms += [index.tolist(), torch.from_numpy(index.copy())]
        for form in forms:
            if count or len(form) or not isinstance(form, list):
                assert_equal(mask[form], expected, mask.memory_format)


def test_indices_that_choose_no_samples():
    mask = BitMask.from_tensor(torch.ones(3, 4))
    for index in (
        (0, 1),
        None,
        ...,
        True,
        1.0,
        "0",
        [[0]],
        torch.zeros(2, 2).long(),
        np.bool_(True),
    ):
        with pytest.raises(TypeError, match="index=.*must be an int, a slice, or ints or bools"):
            mask[index]
    for index in ([0.5], torch.ones(3), torch.ones(3, dtype=torch.uint8), np.ones(3)):
        with pytest.raises(TypeError, match="index: must be of an int dtype other than uint8, or"):
            mask[index]
    for index in ([True], torch.ones(4, dtype=torch.bool)):
        with pytest.raises(IndexError, match=r"index: \d bools for the 3 samples of this mask"):
            mask[index]
    for index, wrong in (([0, 3], 3), (torch.tensor([-4, 0]), -4)):
        with pytest.raises(IndexError, match=f"index={wrong}: this mask has 3 samples"):
            mask[index]
    single = BitMask.from_tensor(torch.tensor(1.0))
    with pytest.raises(IndexError, match="a mask without dimensions has no samples"):
        single[0]
    with pytest.raises(TypeError, match="without dimensions"):
        len(single)


def test_whole_bytes_are_shared_and_saved_alone():
    mask = BitMask.from_tensor(torch.randn(4, 16))
    part = mask[1:3]
    assert part.bits.data_ptr() == mask.bits.data_ptr() + 2
    file = io.BytesIO()
    torch.save(BitMask.from_tensor(torch.randn(100_000, 16))[:2], file)
    assert len(file.getvalue()) < 5000
    for other in (copy.deepcopy(part), pickle.loads(pickle.dumps(part))):
        assert other == part and other.bits.untyped_storage().nbytes() == 4


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


@pytest.mark.parametrize("size", ((64, 3, 8, 8), (64, 3, 5, 7)))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masks_of_some_samples_shape_them(size, dtype):
    mask, values = batch(size, "contiguous")
    x = awkward(values.size, dtype).view(size)
    for part in (slice(1, 5), slice(3, 64), slice(7, 20), [5, 1, 1]):
        kept = torch.from_numpy(values[part])
        assert torch.equal(shape(x[part], mask=mask[part]) == 1, (x[part] > 0) & kept)


def test_as_an_array_of_numpy():
    mask, values = batch((4, 3, 5, 7), "channels_last")
    assert np.asarray(mask).dtype == bool and np.array_equal(mask, values)
    assert np.array(mask, dtype=np.float32).sum() == values.sum()


def test_p_zero_may_be_a_number_of_numpy():
    state = rng_state(3)
    expected = BitMask.random((99,), 0.25, rng_state=state)
    for p_zero in (np.float32(0.25), np.float64(0.25), np.float16(0.25)):
        assert BitMask.random((99,), p_zero, rng_state=state) == expected
    assert BitMask.random((99,), np.int64(0), rng_state=state).density() == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_from_tensor_with_a_threshold(dtype):
    t = awkward(4 * 3 * 5 * 7, dtype).view(4, 3, 5, 7)
    for memory_format, order in (
        ("contiguous", t),
        ("channels_last", t.contiguous(memory_format=torch.channels_last)),
    ):
        for threshold in (0, 0.5, -1.0, float("inf"), np.float32(0.5)):
            mask = BitMask.from_tensor(order, threshold)
            assert_equal(mask, (t > threshold).numpy(), memory_format)
    assert torch.equal(
        BitMask.from_tensor(t.transpose(0, 3), 0.5).to_bool(), t.transpose(0, 3) > 0.5
    )
    with pytest.raises(ValueError, match="threshold=nan"):
        BitMask.from_tensor(t, float("nan"))
    for threshold in ("0.5", True, t):
        with pytest.raises(TypeError, match="threshold=.*must be a number"):
            BitMask.from_tensor(t, threshold)


def test_devices():
    mask = BitMask.from_tensor(torch.ones(2, 3))
    assert mask.to("cpu") is mask and mask.cpu() is mask
    assert mask.to(torch.device("cpu"), non_blocking=True) is mask
    meta = mask.to("meta")
    assert meta.device.type == "meta" and meta.shape == mask.shape
    with pytest.raises(TypeError, match="device=torch.float32: a BitMask has no dtype; to_bool"):
        mask.to(torch.float32)
    if not torch.cuda.is_available():
        with pytest.raises((RuntimeError, AssertionError), match="CUDA|NVIDIA"):
            mask.cuda()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu():
    mask, values = batch((5, 3, 5, 7), "channels_last")
    on_gpu = mask.cuda()
    assert on_gpu.device.type == "cuda" and on_gpu.cuda() is on_gpu and on_gpu.to(0) is on_gpu
    assert mask.to("cuda", non_blocking=True) == on_gpu and on_gpu.cpu() == mask
    for index in (2, slice(1, 3), [0, -1], [True, False, True, False, True], torch.tensor([4, 4])):
        assert on_gpu[index].cpu() == mask[index]
    assert (~on_gpu | on_gpu).density() == 1 and (~on_gpu & on_gpu).density() == 0


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
