"""Linear layers arranged for the device: the same products, fewer and faster.

Layers that read the same input become one product (query, key and value; gate and up). On the CPU the
weights are then packed once, in the form that is multiplied from: that of our kernels or MKL's for
float32, oneDNN's for bfloat16. A packed form is used only if it gives, when it is made, what `linear` gives.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from typing import Any, Protocol

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from services.worker.engine.cpu.kernels import Kernels
from services.worker.engine.cpu.stack import KernelProduct

TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of layers that transformers calls one after the other with the same input."""

SPARE_BYTES = 256 << 20
"""Joined on a GPU before the memory of the layers that were joined is given back. The allocator keeps it,
and it is in pieces too small for the next product: all of them together are more than half a model."""
ROWS_HINT = 64
"""Rows that a packed form is made for; it is right for any number."""
ROWS_CHECKED = (1, 2, 7, 16, 33, 64, 130)


class Product(Protocol):
    """x [..., inputs] to [..., outputs]; with `onto` that much is added to it, in place."""

    def __call__(self, x: Tensor, onto: Tensor | None = None, /) -> Tensor: ...


Pack = Callable[[Tensor, Tensor | None], Product]


class Packed(nn.Module):
    """A linear layer whose weight exists only in packed form."""

    def __init__(self, product: Product) -> None:
        super().__init__()
        self._product = product

    def forward(self, x: Tensor) -> Tensor:
        return self._product(x)


class _Together:
    """One product for several layers: the first called computes it, the others take their part."""

    def __init__(self, layer: nn.Module, sizes: list[int]) -> None:
        self._layer = layer
        self._sizes = sizes
        self._input: Tensor | None = None
        self._parts: tuple[Tensor, ...] = ()

    def part(self, number: int, x: Tensor) -> Tensor:
        if x is not self._input:
            self._parts = self._layer(x).split(self._sizes, -1)
            self._input = x
        part = self._parts[number]
        if number == len(self._sizes) - 1:
            self._input, self._parts = None, ()
        return part


class Part(nn.Module):
    """Stands where one of the layers was."""

    def __init__(self, together: _Together, number: int) -> None:
        super().__init__()
        self._together = together
        self._number = number

    def forward(self, x: Tensor) -> Tensor:
        return self._together.part(self._number, x)


class Products:
    """Makes the products of a model's linear layers, all in the form that suits its device."""

    def __init__(
        self, model: nn.Module, dtype: torch.dtype, kernels: Kernels | None = None, *,
        on_triton: bool = False, packed: Callable[[int], None] | None = None,
    ) -> None:  # fmt: skip
        """`dtype` is that of the activations; weights in bfloat16 may be multiplied in float32.

        `packed` hears of so many bytes of weights that nobody reads any more.
        """
        self.kernels = kernels
        self.on_triton = on_triton
        self._dtype = dtype
        self._packed = packed
        self._joined_bytes = 0
        first = next((module for module in model.modules() if isinstance(module, nn.Linear)), None)
        self._pack = None if first is None else _pack_for(first.weight.device, dtype, kernels)

    @property
    def packs(self) -> bool:
        """Whether a single layer gains anything."""
        return self._pack is not None

    def of(self, layer: nn.Linear) -> Product:
        """The product of one layer."""
        return self._make(layer.weight, layer.bias)

    def joined(self, layers: Seq[nn.Module]) -> Product | None:
        """One product for layers with the same input; None when they are not alike."""
        linear = [layer for layer in layers if type(layer) is nn.Linear]
        if len(linear) < len(layers) or len({layer.bias is None for layer in linear}) > 1:
            return None
        self._spare(linear[0].weight.device)
        bias = None if linear[0].bias is None else torch.cat([layer.bias for layer in linear])
        self._joined_bytes += sum(layer.weight.nbytes for layer in linear)
        return self._make(torch.cat([layer.weight for layer in linear]), bias)

    def _spare(self, device: torch.device) -> None:
        if device.type == "cuda" and self._joined_bytes >= SPARE_BYTES:
            torch.cuda.empty_cache()
            self._joined_bytes = 0

    def _make(self, weight: Tensor, bias: Tensor | None) -> Product:
        given = None if bias is None else bias.detach().to(self._dtype)
        plain = _plain if weight.device.type == "cpu" else _on_device
        product = (self._pack or plain)(weight.detach(), given)
        if self._pack is not None and self._packed is not None:
            self._packed(weight.nbytes)
        return product


def arrange(model: nn.Module, products: Products) -> None:
    """Replaces the linear layers that are left in a model, in place."""
    for parent in list(model.modules()):
        for names in TOGETHER:
            _join(parent, names, products)
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear and products.packs:
                setattr(parent, name, Packed(products.of(layer)))


def _join(parent: nn.Module, names: tuple[str, ...], products: Products) -> None:
    layers: list[Any] = [getattr(parent, name, None) for name in names]
    product = products.joined(layers)
    if product is None:
        return
    together = _Together(Packed(product), [layer.out_features for layer in layers])
    for number, name in enumerate(names):
        setattr(parent, name, Part(together, number))


def _on_device(weight: Tensor, bias: Tensor | None) -> Product:
    """What is added to goes into the product itself, which spares a pass over it."""
    columns = weight.t()

    def product(x: Tensor, onto: Tensor | None = None, /) -> Tensor:
        if onto is not None and bias is None:
            return onto.addmm_(x, columns)
        out = functional.linear(x, weight, bias)
        return out if onto is None else onto.add_(out)

    return product


def _plain(weight: Tensor, bias: Tensor | None) -> Product:
    return _added(lambda x: functional.linear(x, weight, bias))


def _added(multiply: Callable[[Tensor], Tensor]) -> Product:
    def product(x: Tensor, onto: Tensor | None = None, /) -> Tensor:
        out = multiply(x)
        return out if onto is None else onto.add_(out)

    return product


def _pack_for(device: torch.device, dtype: torch.dtype, kernels: Kernels | None) -> Pack | None:
    """The first form that gives the right products here; None: leave the layers alone."""
    if device.type != "cpu":
        return None
    return next(pack for pack in _candidates(dtype, kernels) if _is_right(pack, dtype))


def _candidates(dtype: torch.dtype, kernels: Kernels | None) -> Iterator[Pack]:
    if dtype is torch.float32:
        if kernels is not None:
            yield functools.partial(_ours, kernels)
        yield _mkl
    elif dtype is torch.bfloat16:
        yield _onednn
    yield _input_major


def _is_right(pack: Pack, dtype: torch.dtype) -> bool:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(112, 80, generator=generator).to(dtype)
    bias = torch.randn(112, generator=generator).to(dtype)
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    try:
        products = [(pack(weight, given), given) for given in (None, bias)]
        for rows in ROWS_CHECKED:
            x = torch.randn(1, rows, 80, generator=generator).to(dtype)
            for product, given in products:
                wanted = functional.linear(x, weight, given)
                error = (product(x) - wanted).float().norm() / wanted.float().norm()
                if not error < tolerance:
                    return False
    except (RuntimeError, AttributeError):
        return False
    return True


def _ours(kernels: Kernels, weight: Tensor, bias: Tensor | None) -> Product:
    return KernelProduct(kernels, kernels.pack(weight), None if bias is None else bias.contiguous())


def _mkl(weight: Tensor, bias: Tensor | None) -> Product:
    packed = torch.ops.mkl._mkl_reorder_linear_weight(weight.contiguous(), ROWS_HINT)
    # The operator reads only this tensor's shape as long as it is told the number of rows that comes.
    shape = weight.new_zeros(1).expand(weight.shape)
    inputs = weight.shape[1]
    linear = torch.ops.mkl._mkl_linear

    def product(x: Tensor) -> Tensor:
        out: Tensor = linear(x, packed, shape, bias, x.numel() // inputs)
        return out

    return _added(product)


def _onednn(weight: Tensor, bias: Tensor | None) -> Product:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS_HINT)
    linear = torch.ops.mkldnn._linear_pointwise

    def product(x: Tensor) -> Tensor:
        out: Tensor = linear(x, packed, bias, "none", [], "")
        return out

    return _added(product)


def _input_major(weight: Tensor, bias: Tensor | None) -> Product:
    """The order in which a product of a few rows reads its weight."""
    return _plain(weight.t().contiguous().t(), bias)
