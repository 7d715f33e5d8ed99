"""Symmetric matrices of which half is held, and their factor, against full matrices in float64."""

from __future__ import annotations

import pytest
import torch

from lightrm.kernels import products
from lightrm.kernels.products import add_large_product, large_product
from lightrm.loading import symmetric
from lightrm.loading.symmetric import Symmetric
from tests.test_schemes import normal

SIZES = (1, 6, 7, 8, 20, 63, 65)
CLOSE = {"atol": 1e-4, "rtol": 1e-5}


@pytest.fixture(params=[7, 32, symmetric.SIDE])
def side(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(symmetric, "SIDE", request.param)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.usefixtures("side")
def test_sums_are_those_of_full_matrices(size: int) -> None:
    x, y, a, b = normal(50, size), normal(9, size, seed=1), normal(size, seed=2), normal(size, seed=3)
    held, full = Symmetric.zeros(size).add_rows_(x.T.contiguous()), x.T @ x
    torch.testing.assert_close(held.full(), full, **CLOSE)
    full = (full + full.T) / 2
    assert torch.equal(Symmetric.of(full).full(), full)
    torch.testing.assert_close(held.times(y), y @ full, **CLOSE)
    assert held.part(0.5) == pytest.approx(0.5 * float(full.diagonal().mean()))
    more = held.clone().add_pair_(a, b).add_(held).damp_(7)
    expected = 2 * full + torch.outer(a, b) + torch.outer(b, a) + 7 * torch.eye(size)
    torch.testing.assert_close(more.full(), expected, **CLOSE)
    torch.testing.assert_close(held.full(), full, **CLOSE)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.usefixtures("side")
def test_the_factor_is_that_of_the_reversed_matrix(size: int) -> None:
    """In its blocks, in any run of columns, and as it solves; far from and close to singular."""
    for rows in (3, 200):
        x = normal(rows, size) * torch.linspace(1, 30, size)
        damped = (x.T @ x).double()
        damped += 0.01 * damped.diagonal().mean() * torch.eye(size)
        truth = torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)
        moment = Symmetric.of(x.T @ x)
        factor = moment.damp_(moment.part(0.01)).factor_()
        whole = factor.columns(0, size)
        assert not whole.tril(-1).any()
        assert (whole - truth).norm() < 1e-4 * truth.norm()
        for start, end in ((0, 1), (size // 2, size), (size // 3, size // 2 + 1)):
            assert torch.equal(factor.columns(start, end), whole[:end, start:end])
        y = normal(5, size, seed=4)
        exact = y.double() @ torch.linalg.inv(damped)
        for given in (y.clone(), y.T.contiguous().T):
            assert factor.solved_(given) is given
            assert (given - exact).norm() < 1e-3 * exact.norm()


def test_a_matrix_that_is_not_positive_has_no_factor() -> None:
    with pytest.raises(torch.linalg.LinAlgError):
        Symmetric.of(-torch.eye(5)).factor_()


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 63, 5), (65, 130, 1000), (7, 0, 3), (0, 4, 3), (128, 31, 1)])
def test_large_products_are_float32_s(shape: tuple[int, int, int]) -> None:
    """Of slices and transposed matrices too, and no further from float64 than twice PyTorch's own product."""
    rows, depth, columns = shape
    a, b = normal(rows + 2, depth + 3)[1:-1, :depth], normal(depth, columns, seed=1).T
    exact = a.double() @ b.double().T
    found, plain = large_product(a, b), a @ b.T
    assert found.shape == exact.shape
    assert found.dtype == torch.float32
    assert float((found - exact).norm()) <= 2 * float((plain - exact).norm()) + 1e-6 * float(exact.norm())


def test_large_products_are_added_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, total = normal(37, 20), normal(5, 20, seed=1), normal(37, 5, seed=2)
    expected = total + a @ b.T
    monkeypatch.setattr(products, "PRODUCT_AT_ONCE", 16)
    add_large_product(total, a, b)
    torch.testing.assert_close(total, expected)


def test_large_products_check_what_they_get() -> None:
    for a, b in ((normal(3, 4), normal(3, 5)), (normal(3, 4), normal(3, 4).half()), (normal(4), normal(3, 4))):
        with pytest.raises(ValueError, match="large_product"):
            large_product(a, b)
