"""A frozen base in 8 or 4 bits: what is not trained is kept small, and is float again only while a layer is used.

`int8`: one scale for each row, which its largest value sets. `nf4`: sixteen quantiles of a normal distribution, one
scale for each 64 values (QLoRA, Dettmers et al., 2023, without its double quantisation). It is plain torch, for
every device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from broker.errors import ConfigError

Form = Literal["", "int8", "nf4"]
BLOCK = 64  # values of nf4 that share a scale
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, columns) as int8, and a scale (rows, 1) for each row."""
    scale = (weight.abs().amax(dim=1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    return (weight / scale).round().to(torch.int8), scale


def from_int8(values: Tensor, scale: Tensor, columns: int) -> Tensor:  # noqa: ARG001 - nf4 needs it
    return values * scale


def to_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, columns) as two values in each byte, (rows, bytes), and scales (rows, blocks)."""
    padded = F.pad(weight, (0, -weight.shape[1] % BLOCK)).reshape(len(weight), -1, BLOCK)
    scale = padded.abs().amax(dim=2).clamp_min(torch.finfo(torch.float32).tiny)
    table = torch.tensor(NF4)
    between = (table[1:] + table[:-1]) / 2
    found = torch.bucketize(padded / scale[:, :, None], between).to(torch.uint8).flatten(1)
    return found[:, ::2] << 4 | found[:, 1::2], scale


def from_nf4(values: Tensor, scale: Tensor, columns: int) -> Tensor:
    table = torch.tensor(NF4, device=values.device)
    found = table[torch.stack((values >> 4, values & 15), dim=2).flatten(1).int()]
    blocks = found.reshape(len(values), -1, BLOCK) * scale[:, :, None]
    return blocks.flatten(1)[:, :columns]


@dataclass(frozen=True, slots=True)
class Way:
    small: Callable[[Tensor], tuple[Tensor, Tensor]]
    whole: Callable[[Tensor, Tensor, int], Tensor]


WAYS = {"int8": Way(to_int8, from_int8), "nf4": Way(to_nf4, from_nf4)}


class Product(torch.autograd.Function):
    """x W^T, of which the gradient keeps the small weight, and not the one that is made of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Small) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.weight.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.weight.to(gradient.dtype), None


class Small(nn.Module):
    """A frozen weight (rows, columns), kept in fewer bits."""

    values: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, form: str) -> None:
        super().__init__()
        self.way, self.columns = WAYS[form], weight.shape[1]
        values, scale = self.way.small(weight.detach())
        self.register_buffer("values", values)
        self.register_buffer("scale", scale)

    @property
    def weight(self) -> Tensor:
        """As float32; made anew each time."""
        return self.way.whole(self.values, self.scale, self.columns)


class SmallLinear(Small):
    bias: Tensor | None

    def __init__(self, layer: nn.Linear, form: str) -> None:
        super().__init__(layer.weight, form)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        x = x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x
        found: Tensor = Product.apply(x, self)  # type: ignore[no-untyped-call]
        return found if self.bias is None else found + self.bias.to(found.dtype)

    def restored(self) -> nn.Linear:
        layer = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        layer.weight = nn.Parameter(self.weight, requires_grad=False)
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias, requires_grad=False)
        return layer


class SmallEmbedding(Small):
    def __init__(self, layer: nn.Embedding, form: str) -> None:
        super().__init__(layer.weight, form)
        self.padding_idx = layer.padding_idx

    def forward(self, ids: Tensor) -> Tensor:
        rows = ids.flatten()
        return self.way.whole(self.values[rows], self.scale[rows], self.columns).reshape(*ids.shape, self.columns)

    def restored(self) -> nn.Embedding:
        layer = nn.Embedding(len(self.values), self.columns, self.padding_idx)
        layer.weight = nn.Parameter(self.weight, requires_grad=False)
        return layer


def quantise(module: nn.Module, form: str) -> None:
    """Replaces the frozen linear layers and embeddings by small ones, but for those whose weight others have, too.
    Raises ConfigError if there are none, or for another form."""
    if form not in WAYS:
        raise ConfigError(f"quantised = {form!r} must be one of {', '.join(get_args(Form)[1:])}, or empty")
    uses = Counter(id(p) for part in module.modules() for p in part.parameters(recurse=False))
    found = [place for place in _places(module) if _is_frozen(place[2], uses)]
    if not found:
        raise ConfigError(
            f"quantised = {form!r}: the model has no frozen linear layer (torch.nn.Linear): set `adapter`, or "
            "leave it out"
        )
    for parent, name, layer in found:
        small = SmallLinear(layer, form) if isinstance(layer, nn.Linear) else SmallEmbedding(layer, form)
        setattr(parent, name, small)


def restore(module: nn.Module) -> None:
    """Replaces the small layers by ordinary ones with the values that training saw."""
    for parent in list(module.modules()):
        for name, part in list(parent.named_children()):
            if isinstance(part, SmallLinear | SmallEmbedding):
                setattr(parent, name, part.restored())


def size_bytes(module: nn.Module) -> int:
    """Of parameters and buffers; each once."""
    return sum(values.nbytes for values in (*module.parameters(), *module.buffers()))


def _places(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear | nn.Embedding]]:
    for parent in list(module.modules()):
        for name, part in list(parent.named_children()):
            if type(part) in (nn.Linear, nn.Embedding):
                yield parent, name, part  # type: ignore[misc]  # of these two types


def _is_frozen(layer: nn.Module, uses: Counter[int]) -> bool:
    own = list(layer.parameters(recurse=False))
    return not any(parameter.requires_grad or uses[id(parameter)] > 1 for parameter in own)
