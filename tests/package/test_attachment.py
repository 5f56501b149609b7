"""What an attachment promises: the model stays as it is, settings are checked and obeyed, masks go in and out."""

import copy
import io
import pickle
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastshape
from fastshape import BitMask, attach

METHODS = ("hooks", "auto")


def net(training=True):
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8),
    ]
    return nn.Sequential(*layers).train(training)


x = torch.randn(4, 3, 10, 10, generator=torch.Generator().manual_seed(1))
t = torch.randn(4, 3, 10, 10, generator=torch.Generator().manual_seed(2))


# ---- the model stays as it is ----


class Counting(nn.Module):
    """Its code changes a buffer, an attribute and a list, and draws random numbers."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.last = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.register_buffer("steps", torch.zeros(()))
        self.calls, self.seen = 0, []

    def forward(self, x):
        self.steps += 1
        self.calls += 1
        self.seen.append(x.shape)
        if self.training and torch.rand(()) + random.random() + np.random.rand() < 0:
            return x
        return self.last(self.bn(self.conv(x)))


@pytest.mark.parametrize("method", ("hooks", "replace", "auto"))
def test_attach_and_record_run_the_model_as_often_as_they_say(method):
    model = Counting()
    before = [torch.get_rng_state(), random.getstate(), repr(np.random.get_state())]
    attach(model, 1, p_zero=0.5, method=method).remove()
    assert (model.steps, model.calls, model.seen) == (0, 0, [])
    after = [torch.get_rng_state(), random.getstate(), repr(np.random.get_state())]
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
    with attach(model, 1, mode="target", method=method) as attachment:
        for passes in (1, 2, 3):
            attachment.record(t)
            assert (model.steps, model.calls, len(model.seen)) == (passes, passes, passes)
    assert model.bn.num_batches_tracked == 0


def test_hooks_and_replacement_draw_the_same_masks_of_a_model_that_draws():
    outputs = []
    for method in METHODS:
        torch.manual_seed(0)
        model = Counting()
        with attach(model, 1, p_zero=0.5, method=method):
            torch.manual_seed(3)
            outputs.append(model(x))
    assert torch.allclose(*outputs, rtol=1e-5, atol=1e-6)


class Branching(nn.Module):
    """The number of calls depends on the state."""

    def __init__(self):
        super().__init__()
        self.conv, self.times, self.started = nn.Conv2d(3, 3, 1), 1, 0

    def forward(self, x):
        self.started += 1
        for _ in range(self.times):
            x = self.conv(x)
        return x


def test_a_recording_takes_every_call_of_this_very_forward():
    model = Branching()
    with attach(model, 1, mode="target") as attachment:
        for times in (1, 3, 2):
            model.times = times
            attachment.record(t)
            masks = attachment.masks["conv"]
            assert (1 if times == 1 else len(masks)) == times
            model(x)


def test_a_recording_ends_early_where_the_code_shows_its_calls():
    model, reached = net(), []
    model[3].register_forward_hook(lambda *a: reached.append(1))
    with attach(model, 1, mode="target") as attachment:
        attachment.record(t)
        assert not reached
        attachment.record_mode = "train"
        attachment.record(t)
        assert reached == [1] and model[4].num_batches_tracked == 1


def test_tracing_a_model_that_changes_at_every_call_is_given_up():
    model = Branching()
    with attach(model, 1, mode="target") as attachment:
        for _ in range(40):
            attachment.record(t)
    assert attachment._call_counts.traces == 32 == len(attachment._call_counts.counts)


@pytest.mark.parametrize("method", METHODS)
def test_parametrized_modules_survive(method):
    model = net()
    with attach(model, 1, p_zero=0.5, method=method):
        torch.nn.utils.parametrizations.weight_norm(model[0])
        torch.nn.utils.parametrize.register_parametrization(model[1], "weight", nn.Identity())
        model(x).sum().backward()
        names = [type(m).__name__ for m in model]
        torch.nn.utils.parametrize.remove_parametrizations(model[1], "weight")
    assert names[1] == "ParametrizedBatchNorm2d" and type(model[1]) is nn.BatchNorm2d


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupt_leaves_nothing_behind(method):
    model = net()

    def interrupt(*_):
        raise KeyboardInterrupt

    with attach(model, [1, 2], mode="target", method=method) as attachment:
        attachment.record(t)
        expected = model[:2](x)
        handle = model[2].register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(x)
        handle.remove()
        assert torch.equal(model[:2](x), expected)
        model(x)


@pytest.mark.parametrize("method", METHODS)
def test_direct_calls_of_forward_start_a_forward(method):
    model = net()
    with attach(model, [1, 2], mode="target", method=method) as attachment:
        attachment.record(t)
        first = model.forward(x)
        assert torch.allclose(first, model.forward(x)) and torch.allclose(first, model(x))


def test_more_calls_than_recorded_are_an_error():
    model = Branching()
    with attach(model, 1, mode="target") as attachment:
        attachment.record(t)
        model.times = 2
        with pytest.raises(
            RuntimeError, match="'conv' was called 2 times in one forward but 1 time"
        ):
            model(x)


def test_calls_with_keywords_are_fused():
    class Keywords(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = net()

        def forward(self, x, **kw):
            return self.body(x)

    model = Keywords()
    with attach(model, [1, 2], p_zero=0.5, method="replace") as attachment:
        model(x, more=1)
    assert attachment.fused == attachment.fired == {"body.0": 1, "body.3": 1}


# ---- settings ----


@pytest.mark.parametrize("method", METHODS)
def test_settings_are_obeyed_from_the_next_forward_on(method):
    model = net()
    with attach(model, [1, 2], p_zero=0.5, method=method) as attachment:
        model(x)
        attachment.p_zero = 0
        model(x)
        assert attachment.density() == {"0": 1.0, "3": 1.0} and attachment.p_zero == {
            "0": 0,
            "3": 0,
        }
        attachment.p_zero = [0.25, 0.75]
        model(x)
        density = attachment.density()
        assert abs(density["0"] - 0.75) < 0.05 and abs(density["3"] - 0.25) < 0.05
        attachment.p_zero = {2: 0.25, "0": np.float64(0.75)}
        assert attachment.p_zero == {"0": 0.75, "3": 0.25}
        attachment.gradient = "zero"
        model.zero_grad()
        model(x).sum().backward()
        assert model[0].weight.grad is None
        model.eval()
        plain = model(x)
        attachment.at_eval = "on"
        assert not torch.equal(model(x), plain)
        attachment.at_eval = "off"
        assert torch.equal(model(x), plain)


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    (
        ("p_zero", 1.0, ValueError, "p_zero=1.0: must be in"),
        ("p_zero", 1e-9, ValueError, "p_zero=1e-09: would be rounded to 0"),
        ("p_zero", None, ValueError, "mode 'random' needs a probability"),
        ("p_zero", [0.1], ValueError, "1 values for 2 layers"),
        ("p_zero", {1: 0.1}, ValueError, "p_zero: no value for 3"),
        ("p_zero", {1: 0.1, "0": 0.2, 2: 0.1}, ValueError, "'0' is named twice"),
        ("gradient", "none", ValueError, "gradient='none': allowed are"),
        ("at_eval", "always", ValueError, "at_eval='always': allowed are off, binarize, on"),
        ("record_mode", "test", ValueError, "record_mode='test': allowed are"),
        ("binarize", 1, TypeError, "binarize=1: must be True or False"),
        ("once", None, TypeError, "once=None: must be True or False"),
        ("generator", 3, TypeError, "generator: must be a torch.Generator or None, not int"),
        ("to_mask", above := fastshape.above(1), ValueError, "only mode 'target' makes masks"),
        ("first_sample", -1, ValueError, "first_sample=-1: must be an int of at least 0"),
        ("stream", torch.zeros(2, dtype=torch.int64), ValueError, "attach it with seed="),
        ("mode", "target", AttributeError, "mode is fixed: remove"),
        ("names", (), AttributeError, "names is fixed"),
        ("fired", {}, AttributeError, "fired is read-only"),
        ("pzero", 0.1, AttributeError, "no setting 'pzero'; did you mean p_zero?"),
    ),
)
def test_settings_are_checked_as_at_the_making(name, value, error, message):
    with attach(net(), [1, 2], p_zero=0.5) as attachment:
        with pytest.raises(error, match=message):
            setattr(attachment, name, value)
        assert (
            attachment.p_zero == {"0": 0.5, "3": 0.5} and attachment.gradient == "straight_through"
        )
        net()(x)


@pytest.mark.parametrize("arguments", ({"binarize": False, "p_zero": 0.5}, {"mode": "product"}))
def test_evaluation_never_shows_maps_that_training_did_not(arguments):
    with pytest.raises(ValueError, match="at_eval='binarize' and .*: evaluation would show"):
        attach(net(), 1, at_eval="binarize", **arguments)
    with attach(net(), 1, **arguments) as attachment:
        with pytest.raises(ValueError, match="which training never does"):
            attachment.at_eval = "binarize"
    with attach(net(), 1, p_zero=0.5, at_eval="binarize") as attachment:
        with pytest.raises(ValueError, match="binarize=False"):
            attachment.binarize = False


@pytest.mark.parametrize("method", METHODS)
def test_the_flag_of_the_layer_decides(method):
    feature_extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model = nn.Sequential()
    for name, module in zip(("conv", "bn", "relu", "conv2", "bn2"), net(), strict=True):
        model.add_module(name, module)
    with attach(model, [1, 2], p_zero=0.5, method=method) as attachment:
        features = feature_extraction.create_feature_extractor(model, {"bn2": "f"})
        assert not torch.equal(features.train()(x)["f"], features(x)["f"])
        assert attachment.fired == {"conv": 2, "conv2": 2}
        assert torch.equal(features.eval()(x)["f"], features(x)["f"])
        model.train()
        model.bn.eval()  # frozen
        model(x)
        assert attachment.fired == {"conv": 3, "conv2": 3}
        model.conv.eval()
        model(x)
        assert attachment.fired == {"conv": 3, "conv2": 4}


def test_layers_with_their_rates():
    with attach(net(), {2: 0.75, "0": 0.25}) as attachment:
        assert attachment.p_zero == {"3": 0.75, "0": 0.25} and attachment.names == ("3", "0")
    with pytest.raises(ValueError, match="layers is a dictionary that gives it"):
        attach(net(), {1: 0.5}, p_zero=0.5)
    with pytest.raises(ValueError, match="only mode 'random' draws masks"):
        attach(net(), {1: 0.5}, mode="binarize")


# ---- streams ----


@pytest.mark.parametrize("method", METHODS)
def test_a_seed_leaves_every_other_random_number_alone(method):
    orders = []
    for on in (False, True):
        model = net()
        if on:
            attach(model, [1, 2], p_zero=0.5, seed=7, method=method)
        torch.manual_seed(0)
        model(x)
        orders.append(torch.randperm(50))
    assert torch.equal(*orders)


@pytest.mark.parametrize("method", METHODS)
def test_a_stream_is_saved_and_set_back(method):
    model = net(training=False)  # so that the statistics stay
    with attach(model, [1, 2], p_zero=0.5, seed=7, at_eval="on", method=method) as attachment:
        model(x)
        file = io.BytesIO()
        torch.save(attachment.stream, file)
        expected = [model(x) for _ in range(3)]
        assert not torch.equal(expected[0], expected[1])
    with attach(model, [1, 2], p_zero=0.5, seed=7, at_eval="on", method=method) as attachment:
        file.seek(0)
        attachment.stream = torch.load(file, weights_only=True)
        assert all(torch.equal(model(x), y) for y in expected)
        copied = copy.deepcopy(model)
        assert torch.equal(copied(x), model(x))


def test_masks_of_one_stream_never_overlap():
    with attach(net(), [1, 2], p_zero=0.5, seed=7) as attachment:
        start = attachment.stream
        attachment.model(x)
        assert attachment.stream.tolist() == [7, start[1].item() + 2 * 2**36]


def test_a_generator_of_ones_own():
    outputs = []
    for _ in range(2):
        model, generator = net(), torch.Generator().manual_seed(5)
        before = torch.get_rng_state()
        with attach(model, 1, p_zero=0.5, generator=generator):
            outputs.append(model(x))
        assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(*outputs)
    with pytest.raises(ValueError, match="seed and generator: give one of them"):
        attach(net(), 1, p_zero=0.5, seed=1, generator=torch.Generator())
    with pytest.raises(ValueError, match="only mode 'random' draws"):
        attach(net(), 1, mode="target", seed=1)
    with pytest.raises(TypeError, match="seed='a'"):
        attach(net(), 1, p_zero=0.5, seed="a")


@pytest.mark.parametrize("method", METHODS)
def test_ranks_of_one_seed_draw_the_parts_of_one_mask(method):
    """Each has a copy of the model, and the batch is split in order."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3)).eval()
    with attach(model, 1, p_zero=0.5, seed=3, at_eval="on", method=method) as attachment:
        start = attachment.stream
        whole = [model(x) for _ in range(2)]
        for rank in (0, 1):
            attachment.stream, attachment.first_sample = start, 2 * rank
            for y in whole:
                assert torch.equal(model(x[2 * rank : 2 * rank + 2]), y[2 * rank : 2 * rank + 2])


@pytest.mark.parametrize("own", ("seed", "generator"))
@pytest.mark.parametrize("use_reentrant", (True, False))
@pytest.mark.parametrize("part", ("within", "around"))
def test_checkpoints_repeat_the_masks_of_ones_own_stream(own, use_reentrant, part):
    def forward(model, inputs):
        if part == "around":
            return checkpoint(model, inputs, use_reentrant=use_reentrant)
        return checkpoint(model[1], model[0](inputs), use_reentrant=use_reentrant)

    grads = []
    for again in (False, True):
        model = nn.Sequential(net()[0], net()[1:]).double()
        drawing = {own: 3 if own == "seed" else torch.Generator().manual_seed(3)}
        with attach(model, [1, 2], p_zero=0.5, **drawing):
            inputs = x.double().requires_grad_()
            loss = (forward(model, inputs) if again else model(inputs)).square().sum()
            if again and use_reentrant and part == "around":
                with pytest.raises(RuntimeError, match="cannot be repeated: .*use_reentrant=False"):
                    loss.backward()
                return
            loss.backward()
            grads.append(inputs.grad)
            if again:
                first = forward(model, inputs)
                forward(model, inputs)
                with pytest.raises(RuntimeError, match="cannot be repeated"):
                    first.sum().backward()
    assert torch.allclose(*grads, rtol=1e-12)


def test_masks_of_one_state_nest():
    state, masks = fastshape.rng_state(3), []
    for p_zero in (0.1, 0.5, 0.9):
        masks.append(BitMask.random((1000,), p_zero, rng_state=state))
    assert masks[2] & masks[1] == masks[2] and masks[1] & masks[0] == masks[1]


# ---- masks ----


@pytest.mark.parametrize("method", METHODS)
def test_masks_that_were_drawn_are_read(method):
    model = net()
    with attach(model, [1, 2], p_zero=0.5, method=method) as attachment:
        assert len(attachment.masks) == 0
        with pytest.raises(KeyError, match="'0' has no mask yet"):
            attachment.masks[1]
        y = model(x)
        masks = dict(attachment.masks)
        assert list(masks) == ["0", "3"] and attachment.masks[1] == masks["0"]
        twin = copy.deepcopy(model)
        fastshape.detach(twin)
        assert fastshape.attachments(twin) == []
        with attach(twin, [1, 2], mode="target", method=method) as other:
            other.masks.update(masks)
            twin[1].reset_running_stats()
            assert torch.allclose(twin(x), y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_an_assigned_mask_stays_until_it_is_replaced(method):
    model = nn.Sequential(nn.Conv2d(3, 8, 3))
    plain = model[0](x)
    channels = (torch.arange(8) % 2 == 0).view(1, 8, 1, 1)
    with attach(model, 1, mode="target", method=method) as attachment:
        attachment.masks[1] = channels
        for _ in range(2):
            assert torch.equal(model(x), ((plain > 0) & channels).float())
        attachment.record(t)
        assert torch.equal(model(x), ((plain > 0) & channels).float())
        del attachment.masks[1]
        assert torch.equal(model(x), ((plain > 0) & (model_map(model, attachment) > 0)).float())
        attachment.masks["0"] = fixed = BitMask.from_tensor(plain - 0.3)
        assert torch.equal(model(x[:2]), ((plain > 0.3) & (plain > 0)).float()[:2])
        assert attachment.masks["0"] is fixed
        assert attachment.density() == {"0": fixed.density()}


def model_map(model, attachment):
    attachment.at_eval = "off"
    model.eval()
    y = model(t)
    model.train()
    return y


@pytest.mark.parametrize(
    ("value", "error", "message"),
    (
        (
            torch.ones(4, 8, 8, 8),
            TypeError,
            "a mask must be a BitMask or a bool tensor, not torch.float32",
        ),
        (None, TypeError, "not NoneType"),
        ([], TypeError, "not NoneType"),
    ),
)
def test_what_is_no_mask_is_refused(value, error, message):
    with attach(net(), 1, mode="target") as attachment:
        with pytest.raises(error, match=message):
            attachment.masks[1] = value
        with pytest.raises(KeyError, match="'3' is not shaped"):
            attachment.masks[2] = torch.ones(1, dtype=torch.bool)


def test_a_mask_that_does_not_fit_names_the_layer():
    model = net()
    with attach(model, 1, p_zero=0.5) as attachment:
        attachment.masks[1] = torch.ones(3, 1, dtype=torch.bool)
        with pytest.raises(
            ValueError, match=r"'0': the assigned mask has shape \(3, 1\), which does not broadcast"
        ):
            model(x)
        attachment.masks[1] = BitMask.from_bool(torch.ones(2, 8, 8, 8).bool())
        with pytest.raises(
            ValueError, match="'0': the assigned mask has 2 samples, and a source batch of 4"
        ):
            model(x)


@pytest.mark.parametrize("method", METHODS)
def test_a_product_of_several_domains(method):
    """Three lines: record each, combine, assign."""
    model = net().eval()
    domains = [torch.randn(4, 3, 10, 10) for _ in range(3)]
    maps = [model[0](d) > 0 for d in domains]
    for combine, expected in (
        (lambda a, b, c: a & b & c, maps[0] & maps[1] & maps[2]),
        (lambda a, b, c: a | b | c, maps[0] | maps[1] | maps[2]),
        (lambda *masks: fastshape.majority(masks), sum(m.int() for m in maps) >= 2),
    ):
        with attach(model, 1, mode="target", method=method) as attachment:
            recorded = []
            for domain in domains:
                attachment.record(domain)
                recorded.append(attachment.masks[1])
            attachment.masks[1] = combine(*recorded)
            assert torch.equal(attachment.masks[1].to_bool(), expected)
            assert torch.equal(model[0].train()(x), ((model[0].eval()(x) > 0) & expected).float())


def test_recorded_maps_become_masks_as_asked():
    model = nn.Sequential(nn.Conv2d(3, 8, 3))
    with attach(model, 1, mode="target", to_mask=fastshape.above(0.5)) as attachment:
        attachment.record(t)
        plain = model_map(model, attachment)
        assert torch.equal(attachment.masks[1].to_bool(), plain > 0.5)
        attachment.to_mask = fastshape.top_k(0.25)
        attachment.record(t)
        assert attachment.masks[1] == fastshape.top_k(0.25)(plain)
        attachment.to_mask = lambda m: m.mean(1, keepdim=True) > 0
        with pytest.raises(ValueError, match=r"to_mask: for '0' it returned shape \(4, 1, 8, 8\)"):
            attachment.record(t)
        attachment.to_mask = lambda m: m
        with pytest.raises(TypeError, match="to_mask: for '0' a mask must be a BitMask or a bool"):
            attachment.record(t)


def test_a_record_may_serve_one_forward_alone():
    model = net()
    with attach(model, [1, 2], mode="target", once=True) as attachment:
        for _ in range(2):
            attachment.record(t)
            model(x)
        with pytest.raises(
            RuntimeError, match="once=True: the maps of '0' served a forward before"
        ):
            model(x)
        attachment.once = False
        model(x)


# ---- what is told ----


def test_two_attachments_on_one_layer_are_told():
    model = net()
    with attach(model, [1, 2], p_zero=0.5):
        with pytest.warns(
            UserWarning, match=r"^0 is shaped by Attachment\(mode='random'.*now twice"
        ) as w:
            attach(model, 1, p_zero=0.5).remove()
        assert len(w) == 1 and w[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with attach(model, 1, p_zero=0.5, stack=True) as second:
                model(x)
                assert second.fired == {"0": 1}


class Skipping(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.a(x)


@pytest.mark.parametrize("layers", ("all", "b"))
def test_a_layer_that_a_forward_never_runs_is_told_once(layers):
    model = Skipping()
    with attach(model, layers, p_zero=0.5):
        with pytest.warns(UserWarning, match="this forward never ran b: nothing is shaped there"):
            model(x)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(x)


@pytest.mark.parametrize("method", METHODS)
def test_an_attachment_is_the_same_however_it_came_to_be(method):
    model = net(training=False)
    arguments = {"p_zero": 0.5, "seed": 3, "at_eval": "on", "method": method}
    with attach(model, [1, 2], **arguments):
        copies = [
            copy.deepcopy(model),
            pickle.loads(pickle.dumps(model)),
            torch.compile(copy.deepcopy(model), backend="eager"),
        ]
        expected = [model(x) for _ in range(2)]
    for other in copies:
        assert all(torch.allclose(other(x), y, rtol=1e-4, atol=1e-5) for y in expected)


def test_fullgraph_is_refused_and_the_module_serves_it():
    torch._dynamo.reset()
    model = net()
    with attach(model, 1, p_zero=0.5), pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(model, fullgraph=True, backend="eager")(x)
    model.insert(1, fastshape.ActivationShaping(p_zero=0.5))
    torch.compile(model, fullgraph=True, backend="eager")(x)


@pytest.mark.parametrize("method", METHODS)
def test_annealing_does_not_compile_again(method):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    model = net()
    with attach(model, 1, p_zero=0.5, method=method) as attachment:
        compiled = torch.compile(model, backend=counter)
        compiled(x)
        frames = counter.frame_count
        for p_zero in (0.4, 0.3, 0.2):
            attachment.p_zero = p_zero
            compiled(x)
    assert counter.frame_count == frames > 0


@pytest.mark.parametrize("compiler", (lambda model: torch.jit.trace(model, x), torch.jit.script))
@pytest.mark.parametrize("method", METHODS)
def test_torchscript_is_refused_by_name(method, compiler):
    words = r"torch.jit cannot keep an attachment: use torch.export, or call fastshape.detach\(model\) first"
    with attach(net(), 1, p_zero=0.5, method=method) as attachment:
        with pytest.raises((RuntimeError, AttributeError), match=words):
            compiler(attachment.model)
    assert torch.equal(torch.jit.script(attachment.model.eval())(x), attachment.model(x))


@pytest.mark.parametrize("method", METHODS)
def test_an_exported_model_is_shaped_and_draws(method):
    model = net()
    with attach(model, 1, p_zero=0.5, binarize=False, method=method):
        exported = torch.export.export(model, (x,)).module()
        first, second = exported(x), exported(x)
        assert not torch.equal(first, second)
        torch.manual_seed(0)
        expected = model(x)
        torch.manual_seed(0)
        torch.testing.assert_close(exported(x), expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_autocast_keeps_the_dtype_of_the_map(method, dtype):
    model, seen = net(), []
    model[2].register_forward_pre_hook(lambda m, args: seen.append(args[0].dtype))
    with attach(model, 1, p_zero=0.5, method=method), torch.autocast("cpu", dtype=dtype):
        model(x)
    assert seen == [dtype]


@pytest.mark.parametrize("method", METHODS)
def test_a_negative_view_is_shaped(method):
    class Negative(nn.Module):
        def forward(self, x):
            return torch._neg_view(x)

    model = nn.Sequential(Negative(), nn.BatchNorm2d(3))
    with attach(model, "0", p_zero=0.5, seed=1, method=method):
        y = model[0](x)
    expected = fastshape.shape(-x, p_zero=0.5, rng_state=fastshape.rng_state(1))
    assert torch.equal(y, expected)
    assert torch.equal(fastshape.shape(torch._neg_view(x.clone()), inplace=True), (x < 0).float())


# ---- channels and blocks ----


@pytest.mark.parametrize("own", (False, True))
@pytest.mark.parametrize("unit", ("channel", 3))
@pytest.mark.parametrize("method", METHODS)
def test_a_random_mask_of_channels_or_blocks(method, unit, own):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).double().eval()
    inputs, plain = x.double(), model[0](x.double())
    seed = {"seed": 5} if own else {}
    with attach(model, 1, p_zero=0.5, unit=unit, at_eval="on", method=method, **seed) as attachment:
        start = attachment.stream
        torch.manual_seed(3)
        y = model(inputs)
        state = fastshape.rng_state(5)
        if not own:
            torch.manual_seed(3)
            state = fastshape.rng_state()
        side = None if unit == "channel" else unit
        mask = fastshape.random_blocks(plain.shape, 0.5, side, rng_state=state)
        assert attachment.masks[1] == mask
        assert torch.allclose(y, model[1](fastshape.shape(plain, mask=mask)))
        attachment.first_sample = 1
        torch.manual_seed(3)
        if own:
            attachment.stream = start
        assert torch.allclose(model(inputs[1:]), y[1:])
        attachment.unit = "element"
        attachment.first_sample = 0
        model(inputs)
        with pytest.raises(
            ValueError, match="unit='row': allowed are element, channel, and the side"
        ):
            attachment.unit = "row"
    with pytest.raises(ValueError, match="unit='channel': only mode 'random'"):
        attach(model, 1, mode="target", unit="channel")


def test_fx_traces_an_attached_model_and_the_op():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = net()

        def forward(self, x):
            return self.body(fastshape.shape(x, binarize=False))

    model = Model().eval()
    for method in METHODS:
        with attach(model, [1, 2], p_zero=0.5, seed=1, at_eval="on", method=method) as attachment:
            traced, start = torch.fx.symbolic_trace(model), attachment.stream
            y = model(x)
            attachment.stream = start
            assert torch.allclose(traced(x), y, rtol=1e-4, atol=1e-5)
            assert attachment.fired == {"body.0": 2, "body.3": 2}


# ---- copies, repeated calls, and code that changes what is around it ----


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.again = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.again(self.again(self.first(x)))


@pytest.mark.parametrize("method", METHODS)
def test_direct_calls_of_a_model_that_calls_a_layer_twice(method):
    model = Twice()
    with attach(model, "all", mode="target", method=method, once=True) as attachment:
        for forward in (model, model.forward, model.forward, model):
            attachment.record(t)
            y = forward(x)
        attachment.once = False
        assert torch.equal(model.forward(x), y) and torch.equal(model.forward(x), y)


@pytest.mark.parametrize("method", METHODS)
def test_a_forward_that_shapes_nothing_leaves_the_density(method):
    model = net()
    with attach(model, 1, p_zero=0.5, method=method) as attachment:
        assert attachment.density() == {}
        model(x)
        density = attachment.density()
        model.eval()(x)
        assert attachment.density() == density and abs(density["0"] - 0.5) < 0.1


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


class Wrapper(nn.Module):
    """Holds a part of a model before the whole."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.part, self.whole = model[0], model


@pytest.mark.parametrize("copied_by", (copy.deepcopy, pickled))
@pytest.mark.parametrize("method", METHODS)
def test_a_copy_may_hold_a_part_before_the_whole(method, copied_by):
    model = net(training=False)
    with attach(model, 1, p_zero=0.5, seed=1, at_eval="on", method=method) as attachment:
        copied = copied_by(Wrapper(model)).whole
        (other,) = fastshape.attachments(copied)
        assert other is not attachment and torch.equal(copied(x), model(x))
        assert other.fired == attachment.fired == {"0": 1}
        part = copied_by(model[0])
        assert fastshape.attachments(part) == []
        assert torch.equal(part(x), nn.functional.conv2d(x, part.weight, part.bias))
        with attach(nn.Sequential(part), 1, p_zero=0.5):
            assert len(part._forward_hooks) == 1
        fastshape.detach(part)
        assert not part._forward_hooks
        assert torch.equal(torch.jit.script(part)(x), part(x))


def test_an_attachment_alone_cannot_be_copied():
    model = net()
    with attach(model, 1, p_zero=0.5) as attachment:
        with pytest.raises(TypeError, match="copy the model, with copy.deepcopy"):
            copy.copy(attachment)
        attachment.binarize, attachment.p_zero = False, 0.0
        assert torch.equal(model[0](x), nn.functional.conv2d(x, model[0].weight, model[0].bias))


def test_tracing_puts_back_what_code_sets_on_its_class():
    class Counted(Twice):
        count = 0

        def forward(self, x):
            Counted.count += 1
            return super().forward(x)

    model = Counted()
    with attach(model, 1, mode="target") as attachment:
        for passes in (1, 2):
            attachment.record(t)
            assert Counted.count == passes


def test_rates_are_taken_from_arrays_and_cannot_be_set_past_the_check():
    with attach(net(), 1, p_zero=np.array(0.25)) as attachment:
        assert attachment.p_zero == {"0": 0.25}
        attachment.p_zero = torch.tensor(0.125)
        assert attachment.p_zero == {"0": 0.125}
        with pytest.raises(TypeError, match="does not support item assignment"):
            attachment.p_zero["0"] = 2
