"""Gradients of a batch by threads that each take the next part of it: a step does not wait for a core that is busy."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

THREADS = 2
_POOL = ThreadPoolExecutor(THREADS, initializer=partial(torch.set_num_threads, 1))


def backward(loss: Callable, parts: Sequence, parameters: list[torch.nn.Parameter]) -> list:
    """Sets each parameter's gradient to that of the sum of `loss(part)`, and returns what else `loss` gave.

    Args:
        loss: a part of the batch to its loss, already weighted with its share, and anything to report.
    """

    def one(part):
        value, report = loss(part)
        return torch.autograd.grad(value, parameters, allow_unused=True), report

    for parameter in parameters:
        parameter.grad = None
    reports = []
    for gradients, report in _POOL.map(one, parts):
        reports.append(report)
        for parameter, gradient in zip(parameters, gradients):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
    return reports
