"""Everything that the op promises: numbers on every target, gradients, torch.compile, autocast, wrong inputs."""

import pytest
from scale_bias_add import scale_bias_add

from gpt2fast.testing import checks_of


@pytest.mark.parametrize("check", checks_of(scale_bias_add), ids=str)
def test_op(check):
    check()
