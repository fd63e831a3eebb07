"""``lustral.vision.models.frozen_norms``: the same function, first and second derivatives, and nothing left behind."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

from lustral.vision.models import PreActResNet
from lustral.vision.models.frozen_norms import norms_as_products


def norm(kind: type[nn.Module], *, affine: bool) -> nn.Module:
    module = kind(4, affine=affine)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_floating_point():
            tensor.data.uniform_(0.5, 1.5) if name != "bias" else tensor.data.normal_()
    return module.double().eval()


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (nn.BatchNorm1d, (5, 4)),
        (nn.BatchNorm1d, (5, 4, 3)),
        (nn.BatchNorm2d, (5, 4, 3, 3)),
        (nn.BatchNorm3d, (5, 4, 2, 2, 2)),
    ],
)
def test_the_same_function(kind: type[nn.Module], shape: tuple[int, ...], affine: bool) -> None:
    torch.manual_seed(0)
    module, x = norm(kind, affine=affine), torch.randn(shape, dtype=torch.float64)
    expected = module(x)
    with norms_as_products(module):
        assert "forward" in vars(module)
        torch.testing.assert_close(module(x), expected)
    assert "forward" not in vars(module)
    torch.testing.assert_close(module(x), expected, rtol=0, atol=0)


def curvature(model: nn.Module, x: Tensor) -> list[Tensor]:
    """A derivative of a derivative by the weights, as an implicit hypergradient has it."""
    x = x.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(model(x).logsumexp(1).square().sum(), x, create_graph=True)
    return list(torch.autograd.grad((slope * x.detach()).sum(), [x, *model.parameters()], allow_unused=True))


def test_the_same_derivatives() -> None:
    torch.manual_seed(0)
    model = PreActResNet(18, 10, width=4).double().eval()
    x = torch.rand(3, 3, 16, 16, dtype=torch.float64)
    expected = curvature(model, x)
    with norms_as_products(model):
        found = curvature(model, x)
    assert all((a is None) == (b is None) for a, b in zip(found, expected, strict=True))
    pairs = [(a, b) for a, b in zip(found, expected, strict=True) if b is not None]
    assert len(pairs) > 40
    for a, b in pairs:
        torch.testing.assert_close(a, b)


def test_bfloat16_stays_bfloat16() -> None:
    module = norm(nn.BatchNorm2d, affine=True).float()
    x = torch.randn(2, 4, 3, 3).bfloat16()
    with norms_as_products(module):
        assert module(x).dtype == torch.bfloat16


def test_only_frozen_statistics() -> None:
    training, without = nn.BatchNorm2d(4), nn.BatchNorm2d(4, track_running_stats=False).eval()
    with norms_as_products(nn.ModuleList([training, without])):
        assert "forward" not in vars(training)
        assert "forward" not in vars(without)


def test_kinds_that_do_more_stay_as_they_are() -> None:
    class Activated(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).relu()

    torch.manual_seed(0)
    module, x = Activated(4).eval(), torch.randn(2, 4, 3, 3)
    expected = module(x)
    with norms_as_products(module):
        assert torch.equal(module(x), expected)
    patched = nn.BatchNorm2d(4).eval()
    patched.forward = lambda input: input + 1  # type: ignore[method-assign]
    with norms_as_products(patched):
        assert torch.equal(patched(x), x + 1)
    assert "forward" in vars(patched)


def test_timm_networks_compute_the_same() -> None:
    torch.manual_seed(0)
    model = timm.create_model("efficientnet_lite0", num_classes=4).eval()
    x = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
        with norms_as_products(model):
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def test_an_error_inside_leaves_nothing_behind() -> None:
    module = norm(nn.BatchNorm2d, affine=True)
    with pytest.raises(ZeroDivisionError), norms_as_products(module):
        raise ZeroDivisionError
    assert "forward" not in vars(module)
