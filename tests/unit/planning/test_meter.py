"""The meter's counts, against what they are by hand."""

import pytest
import torch
from torch.profiler import record_function

from megatron_vico.planning.meter import Meter


def everything(tensor: torch.Tensor) -> bool:
    return tensor.is_meta


def test_bytes_live_as_long_as_their_storage() -> None:
    meter = Meter(counts=everything, noted_bytes=2**12)
    with meter:
        weights = torch.zeros(1024, 4, device="meta")  # 16 KiB
        meter.tag([weights], "policy")
        view = weights.view(-1)[:8]
        big = torch.zeros(2048, device="meta")
        small = torch.zeros(1, device="meta")  # takes a block of 512 bytes
        assert meter.total == 2**14 + 2**13 + 512
        del big, weights
        assert meter.now["activations"] == 512
        assert meter.now["policy"] == 2**14  # the view holds it
        del view, small
        assert meter.total == 0
    assert meter.counted.peak == {"between": 2**14 + 2**13 + 512}
    assert meter.counted.parts["between"] == {"policy": 2**14, "activations": 2**13 + 512}


def test_phases_flops_and_waits() -> None:
    meter = Meter()
    with meter:
        a = torch.zeros(3, 4, device="meta", requires_grad=True)
        with record_function("policy forward pack 3 chunk 0"):
            product = a @ torch.zeros(4, 5, device="meta", requires_grad=True)
        with record_function("policy loss pack 3 chunk 0"):
            loss = product.sum()
            torch.zeros(3, 3, device="meta").addmm_(product, product.T)
        loss.backward()
        assert loss.item() == 0.0
    forward = 2 * 3 * 4 * 5
    assert meter.counted.flops == {
        "policy forward": forward,
        "head": 2 * 3 * 5 * 3,
        "policy backward": 2 * forward,
    }
    assert sum(meter.counted.waits.values()) == 1


def test_a_copy_from_the_host_that_is_waited_for() -> None:
    host, meter = torch.zeros(3), Meter()
    with meter:
        place = host.to("meta", non_blocking=True)
        place.copy_(host, non_blocking=True)
        assert not meter.counted.waits
        host.to("meta")
        place.copy_(host)
    assert sum(meter.counted.waits.values()) == 2


def test_a_product_added_to_float32_asks_no_torch_for_its_shape() -> None:
    """Of torch 2.11, on "meta", it is an error."""
    total = torch.zeros(6, 4, device="meta")
    a, b = (torch.zeros(size, device="meta", dtype=torch.bfloat16) for size in ((6, 5), (5, 4)))
    meter = Meter()
    meter._call = lambda func, *_: pytest.fail(f"{func} is called")
    with meter:
        out = torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    assert out is total
    assert meter.counted.flops.total() == 2 * 5 * 6 * 4
