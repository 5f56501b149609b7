"""AdaBN: the baseline's training, tested with BatchNorm statistics of target images."""

import pytest
import torch
from domainshift.errors import ConfigError
from domainshift.methods.adabn import AdaBN
from small_networks import SOURCE, TARGET, config_of, method_with


def test_it_shares_the_training_of_the_baseline():
    assert AdaBN.trains_as == "baseline"
    results = []
    for mode in ("baseline", "adabn"):
        method = method_with(mode=mode)
        method.update(SOURCE, torch.arange(6))
        results.append(method.model.state_dict())
    for name, tensor in results[0].items():
        assert torch.equal(tensor, results[1][name]), name


def test_the_target_is_tested_with_statistics_of_its_images():
    method = method_with(mode="adabn")
    method.update(SOURCE, torch.arange(6))
    conv, norm = method.model[0], method.model[1]
    source = [buffer.clone() for m in method.norms() for buffer in m.buffers()]
    before = method.predict(TARGET).logits
    with method.recalibrated([TARGET[:3], TARGET[3:]]):
        maps = [conv(part).detach() for part in (TARGET[:3], TARGET[3:])]
        mean = (maps[0].mean((0, 2, 3)) + maps[1].mean((0, 2, 3))) / 2
        variance = (maps[0].var((0, 2, 3)) + maps[1].var((0, 2, 3))) / 2
        torch.testing.assert_close(norm.running_mean, mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(norm.running_var, variance, rtol=1e-5, atol=1e-6)
        assert not torch.equal(method.predict(TARGET).logits, before)
    after = [buffer for m in method.norms() for buffer in m.buffers()]
    assert all(torch.equal(a, b) for a, b in zip(source, after, strict=True))
    assert torch.equal(method.predict(TARGET).logits, before)


@pytest.mark.parametrize("bn", ["trained", "source"])
def test_it_is_nothing_without_statistics_of_the_target(bn):
    def refuse(name, why):
        raise ConfigError(f"{name}: {why}")

    assert AdaBN.check(config_of("adabn", bn_at_test="target"), refuse) == []
    with pytest.raises(ConfigError, match="bn_at_test: is not for mode adabn, .*allowed: target"):
        AdaBN.check(config_of("adabn", bn_at_test=bn), refuse)
