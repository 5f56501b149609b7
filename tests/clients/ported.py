"""The networks of `by_hand` with fastshape: each function is the whole port."""

from by_hand import P_ZERO, small_resnet

import fastshape


def hooks_with_globals(method="hooks"):
    net = small_resnet()
    shaping = fastshape.attach(net, [1, 2], p_zero=P_ZERO, gradient="zero", method=method)
    return net, lambda x, target: net(x), shaping


def module_in_forward(method="hooks"):
    net = small_resnet()
    shaping = fastshape.attach(net, 1, p_zero=P_ZERO, unit="channel", method=method)
    return net, lambda x, target: net(x), shaping


def two_passes(method="hooks"):
    net = small_resnet()
    shaping = fastshape.attach(net, [1, 2], mode="target", method=method)

    def step(x, target):
        shaping.record(target)
        return net(x)

    return net, step, shaping


CLIENTS = {
    "hooks with globals": hooks_with_globals,
    "a module in forward": module_in_forward,
    "two passes": two_passes,
}
