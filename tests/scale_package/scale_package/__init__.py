"""An op in a package of its own, its CPU kernel in C++."""

from gpt2fast.build import load_extension

from .ops import scale_bias_add

load_extension("scale_package._C")
__all__ = ["scale_bias_add"]
