"""Cross entropy and decode attention in Triton on the PTX machine: ends of tiles, large logits, equal bits."""

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("gpt2fast._ptx", reason="gpt2fast._ptx is not built")

from gpt2fast.kernels import cross_entropy as kernels
from gpt2fast.kernels import decode_attention as decode
from gpt2fast.op import OPS
from gpt2fast.testing import assert_close_to_truth, ptx
from gpt2fast.testing.inputs import build, reference, truth


@pytest.mark.parametrize("V", (1, 4089, 4095, 4096, 4097, 8191, 12288))
@pytest.mark.parametrize("gap", (0, 3))
def test_rows_that_begin_and_end_anywhere(V, gap):
    g = torch.Generator().manual_seed(V)
    logits = torch.randn(33, V + gap, generator=g).bfloat16()[:, :V]
    targets = torch.randint(0, V, (33,), generator=g)
    args = dict(logits=logits, targets=targets, reduction="none")
    with ptx.machine():
        loss, lse = kernels.cross_entropy(**args)
        back = dict(dloss=torch.ones(33), logits=logits, targets=targets, lse=lse, reduction="none")
        dlogits = kernels.cross_entropy_backward(**back)
    op = OPS["cross_entropy"]
    for found, plain, exact in zip((loss, lse), reference(op, args), truth(op, args)):
        assert_close_to_truth(found, plain, exact)
    op = OPS["cross_entropy_backward"]
    assert_close_to_truth(dlogits, reference(op, back)[0], truth(op, back)[0])


def test_large_logits_keep_the_digits_of_their_differences():
    small = torch.randn(40, 300, generator=torch.Generator().manual_seed(0)).round()
    targets = torch.arange(40)
    with ptx.machine():
        far, _ = kernels.cross_entropy(small + 2.0**22, targets, reduction="none")
        near, _ = kernels.cross_entropy(small, targets, reduction="none")
    assert torch.equal(far, near)


def test_a_target_outside_the_vocabulary_is_no_number():
    with ptx.machine():
        loss, _ = kernels.cross_entropy(torch.zeros(3, 5), torch.tensor([4, 5, -1]), reduction="none")
    assert loss.isnan().tolist() == [False, True, True]


def test_a_decoded_row_does_not_depend_on_its_batch():
    case = dict(B=3, T=1, S=300, H=2, D=64, starts=True)
    args = build(OPS["decode_attention"], case, torch.bfloat16)
    with ptx.machine():
        together = decode.decode_attention(**args)
        for b in range(3):
            one = {n: v[b : b + 1] if isinstance(v, torch.Tensor) else v for n, v in args.items()}
            assert torch.equal(decode.decode_attention(**one), together[b : b + 1])
