"""Batches on the device, each copied while the step before it computes."""

from collections.abc import Iterable, Iterator

import torch

from topfive_training.batches import Batch


def on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches in the same order on `device`.

    To a GPU they are copied one ahead, on a stream of their own; out of pinned memory, so that the host waits for nothing.
    """
    if device.type != "cuda":
        yield from (_moved(batch, device) for batch in batches)
        return
    copying = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    ahead: tuple[Batch, torch.cuda.Event] | None = None
    for batch in batches:
        with torch.cuda.stream(copying):
            copied = _moved(batch, device)
            arrived = copying.record_event()
        if ahead is not None:
            yield _received(*ahead)
        ahead = copied, arrived
    if ahead is not None:
        yield _received(*ahead)


def _moved(batch: Batch, device: torch.device) -> Batch:
    return Batch(*(tensor.to(device, non_blocking=True) for tensor in batch))


def _received(batch: Batch, arrived: torch.cuda.Event) -> Batch:
    computing = torch.cuda.current_stream()
    computing.wait_event(arrived)
    for tensor in batch:
        # Made on the other stream: its memory must not be given away before this one is done with it.
        tensor.record_stream(computing)
    return batch
