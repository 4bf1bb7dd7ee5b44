"""Exchanges between ranks that gradients flow back through, with every byte counted.

The backward of a gather is the sum of what each rank owes the others, scattered back to its owner, and the other way
round. Shapes are free: `dim` is the dimension along which the ranks' parts lie side by side.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Final, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

Kind: TypeAlias = Literal["all-reduce", "all-gather", "reduce-scatter"]

# PyTorch 2.13 renamed them, and warns about the old names.
_gather_into: Final[Callable[..., Any]] = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_into: Final[Callable[..., Any]] = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


@dataclasses.dataclass(kw_only=True)
class Traffic:
    """Bytes exchanged, by kind of exchange; reset it to count anew."""

    ranks: int
    payload: dict[Kind, int] = dataclasses.field(default_factory=dict)
    """Bytes of the tensor that is reduced, gathered or scattered, as a whole: what the literature calls the size of the
    exchange."""

    def count(self, kind: Kind, whole_bytes: int) -> None:
        """Note one exchange."""
        self.payload[kind] = self.payload.get(kind, 0) + whole_bytes

    def reset(self) -> None:
        """Forget everything."""
        self.payload.clear()

    @property
    def sent_by_each(self) -> int:
        """Bytes that each rank sends (and receives) with the ring algorithm, which needs the fewest.

        (R - 1) / R of the tensor to gather or to scatter, twice that to reduce on all (Patarasuk and Yuan 2009).
        """
        rounds = sum(size * (2 if kind == "all-reduce" else 1) for kind, size in self.payload.items())
        return round(rounds * (self.ranks - 1) / self.ranks)


class Links:
    """The exchanges of one rank with all the others."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self.traffic = Traffic(ranks=size)

    def gather(self, part: Tensor, dim: int) -> Tensor:
        """All ranks' parts, side by side along `dim`; differentiable."""
        whole: Tensor = _Gather.apply(part, dim, self)  # type: ignore[no-untyped-call]
        return whole

    def sum_scatter(self, whole: Tensor, dim: int) -> Tensor:
        """This rank's part, along `dim`, of the sum over the ranks; differentiable."""
        part: Tensor = _SumScatter.apply(whole, dim, self)  # type: ignore[no-untyped-call]
        return part

    def sum_shared(self, addend: Tensor) -> Tensor:
        """The sum over the ranks, on all of them, of which all compute the *same* loss; differentiable."""
        total: Tensor = _SumShared.apply(addend, self)  # type: ignore[no-untyped-call]
        return total

    def raw_gather(self, part: Tensor, dim: int) -> Tensor:
        """`gather` without a gradient."""
        part = part.contiguous()
        rows = part.new_empty((self.size * part.shape[0], *part.shape[1:]))
        self.traffic.count("all-gather", rows.nbytes)
        _gather_into(rows, part)
        if dim == 0:
            return rows
        parts = rows.reshape(self.size, *part.shape)
        return parts.movedim(0, dim).flatten(dim, dim + 1)

    def raw_sum_scatter(self, whole: Tensor, dim: int) -> Tensor:
        """`sum_scatter` without a gradient."""
        if dim != 0:
            whole = torch.stack(whole.chunk(self.size, dim)).flatten(0, 1)
        whole = whole.contiguous()
        part = whole.new_empty((whole.shape[0] // self.size, *whole.shape[1:]))
        self.traffic.count("reduce-scatter", whole.nbytes)
        _reduce_into(part, whole)
        return part

    def raw_sum(self, addend: Tensor) -> Tensor:
        """`sum_shared` without a gradient."""
        total = addend.clone(memory_format=torch.contiguous_format)
        self.traffic.count("all-reduce", total.nbytes)
        dist.all_reduce(total)
        return total

    def sum_bucket(
        self,
        _: object,
        bucket: dist.GradBucket,  # type: ignore[name-defined]  # torch checks this very annotation
    ) -> torch.futures.Future[Tensor]:
        """A communication hook for `DistributedDataParallel`: gradients are summed (not averaged) and counted."""
        buffer = bucket.buffer()
        self.traffic.count("all-reduce", buffer.nbytes)
        work = dist.all_reduce(buffer, async_op=True)
        assert work is not None
        future: torch.futures.Future[Tensor] = work.get_future().then(lambda done: done.value()[0])
        return future


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, dim: int, links: Links) -> Tensor:
        ctx.dim, ctx.links = dim, links
        return links.raw_gather(part, dim)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.links.raw_sum_scatter(gradients[0], ctx.dim), None, None


class _SumScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, dim: int, links: Links) -> Tensor:
        ctx.dim, ctx.links = dim, links
        return links.raw_sum_scatter(whole, dim)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.links.raw_gather(gradients[0], ctx.dim), None, None


class _SumShared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, addend: Tensor, links: Links) -> Tensor:  # noqa: ARG004
        return links.raw_sum(addend)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        # Every rank holds the gradient of the one loss already; to sum it again would multiply it.
        return gradients[0], None
