"""The loops of layer_norm, which numba compiles at the first call."""

import math

import numba
import numpy as np


@numba.njit
def normalise(x, weight, bias, y, mean, rstd, eps):
    """x (R, C) to y (R, C), mean and rstd (R,), all float32; sums in float64."""
    R, C = x.shape
    for r in range(R):
        total = 0.0
        for c in range(C):
            total += x[r, c]
        average = total / C
        squares = 0.0
        for c in range(C):
            squares += (x[r, c] - average) ** 2
        scale = 1 / math.sqrt(squares / C + eps)
        for c in range(C):
            y[r, c] = (x[r, c] - average) * scale * weight[c] + bias[c]
        mean[r], rstd[r] = np.float32(average), np.float32(scale)
