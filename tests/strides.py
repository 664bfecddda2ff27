"""Strides, in elements, of boxes without gaps."""


def packed(shape):
    """Strides of a contiguous box."""
    return (shape[1] * shape[2], shape[2], 1)


def permuted(shape, order):
    """Strides of a box that lies with its dimensions in another order."""
    strides, stride = [0, 0, 0], 1
    for dim in reversed(order):
        strides[dim] = stride
        stride *= shape[dim]
    return tuple(strides)
