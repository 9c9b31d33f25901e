"""Products by AMX are those of the definition, whatever the rows."""

import pytest
import torch

from workers.engines import tiles
from workers.engines.linear import PlainLinear, make_linear
from workers.engines.tiled import TiledLinear

pytestmark = pytest.mark.skipif(not tiles.usable(), reason="needs AMX")


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("count", [1, 5, 16, 17, 32, 50])
def test_products_are_those_of_the_definition(count: int, biased: bool) -> None:
    torch.manual_seed(count)
    weight, rows = torch.randn(192, 96), torch.randn(count, 96).bfloat16()
    bias = torch.randn(192) if biased else None
    linear = make_linear(weight, bias, torch.bfloat16, torch.device("cpu"))
    assert isinstance(linear, TiledLinear)
    expected = rows.double() @ weight.bfloat16().double().t()
    expected = expected if bias is None else expected + bias.bfloat16().double()
    torch.testing.assert_close(linear(rows).double(), expected, rtol=2**-7, atol=2**-7)
    residual = torch.randn(count, 192)
    torch.testing.assert_close(linear.add_to(residual.clone(), rows).double(), expected + residual, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("shape", "dtype"), [((100, 64), torch.bfloat16), ((64, 40), torch.bfloat16), ((64, 64), torch.float32)])
def test_what_is_not_whole_tiles_is_multiplied_otherwise(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, rows = torch.randn(shape), torch.randn(3, shape[1]).to(dtype)
    linear = make_linear(weight, None, dtype, torch.device("cpu"))
    assert not isinstance(linear, TiledLinear)
    known = PlainLinear(weight.to(dtype), None)
    torch.testing.assert_close(linear(rows), known(rows), rtol=0.02, atol=0.1)
