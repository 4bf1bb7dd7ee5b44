"""Which batch sizes a GPU runs.

A CUDA provider plans memory, picks convolution algorithms and captures a graph for each new input shape, which stalls
the first batch of every size by hundreds of milliseconds. So there are few sizes, all warmed before the server is
ready, and a batch is padded up to the next of them.
"""

from collections.abc import Sequence


def make_buckets(max_batch: int) -> tuple[int, ...]:
    """Powers of two up to `max_batch`, which is always the last: `48` gives (1, 2, 4, 8, 16, 32, 48).

    Powers of two waste less than half of a batch, and capturing each is cheap.
    """
    if max_batch < 1:
        raise ValueError(f"max_batch is {max_batch}; it must be at least 1")
    buckets = [1]
    while buckets[-1] * 2 < max_batch:
        buckets.append(buckets[-1] * 2)
    return (*buckets, max_batch) if max_batch > 1 else (1,)


def bucket_for(batch: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds `batch` images; `batch` itself when there are no buckets.

    Raises:
        ValueError: more images than the largest bucket holds.
    """
    if not buckets:
        return batch
    for bucket in buckets:
        if bucket >= batch:
            return bucket
    raise ValueError(f"a batch of {batch} images is larger than the largest bucket, {buckets[-1]}")
