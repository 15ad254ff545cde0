"""Which rows belong to which training step: a function of the step, with nothing to store."""

import dataclasses
import functools

import numpy as np

from llc_jax.inputs import checks


@dataclasses.dataclass(frozen=True, eq=False)
class TokenBatches:
    """Batches of rows in a new random order every epoch, without state.

    The order of an epoch sorts N random 64-bit numbers of Philox with key (seed, epoch), a stream
    that no version of NumPy changes. The batch of step s has the places s B, ..., s B + B - 1 of
    the epochs one after another: each epoch takes every row once, none is left out, and a batch
    may end one epoch and begin the next. Process p of P gets the p-th of P equal slices of it.

    Attributes:
      tokens: rows, integers [N, T]; may be memory-mapped.
      batch_size: B, over all processes; at most N.
      seed: from 0 to 2^64 - 1.
      process_index: p, on a pod `jax.process_index()`.
      process_count: P, a divisor of B.
    """

    tokens: np.ndarray
    batch_size: int
    seed: int
    process_index: int = 0
    process_count: int = 1

    def __post_init__(self) -> None:
        if np.ndim(self.tokens) != 2 or self.tokens.dtype.kind not in "iu":
            raise ValueError(
                f"tokens has shape {np.shape(self.tokens)} and dtype"
                f" {getattr(self.tokens, 'dtype', None)}: give rows of integers, [N, T]."
            )
        checks.at_least("batch_size", self.batch_size, 1)
        checks.at_least("seed", self.seed, 0)
        checks.at_least("process_index", self.process_index, 0)
        checks.at_least("process_count", self.process_count, self.process_index + 1)
        if self.seed >= 2**64:
            raise ValueError(f"seed={self.seed}: give an integer below 2^64.")
        if self.batch_size > len(self.tokens):
            raise ValueError(
                f"batch_size={self.batch_size} is larger than the {len(self.tokens)} rows: give a"
                " smaller batch or more text."
            )
        if self.batch_size % self.process_count:
            raise ValueError(
                f"batch_size={self.batch_size} is not a multiple of process_count="
                f"{self.process_count}: processes must have equal slices."
            )

    def rows(self, step: int) -> np.ndarray:
        """Returns the numbers of this process's rows in the batch of a step, int64 [B / P]."""
        checks.at_least("step", step, 0)
        num_rows, size = len(self.tokens), self.batch_size // self.process_count
        start = int(step) * self.batch_size + self.process_index * size
        stop = start + size
        slices = []
        for epoch in range(start // num_rows, (stop - 1) // num_rows + 1):
            begin = epoch * num_rows
            slices.append(_order(self.seed, epoch, num_rows)[max(start - begin, 0) : stop - begin])
        return np.concatenate(slices)

    def block(self, first: int, stop: int) -> dict[str, np.ndarray]:
        """Returns this process's batches of the steps from `first` to before `stop`.

        Returns:
          {"tokens": [stop - first, B / P, T]} with the dtype of `tokens`, uint16 if prepared here.
        """
        checks.at_least("first", first, 0)
        checks.at_least("stop", stop, first + 1, "a block has at least one step")
        rows_SxB = np.stack([self.rows(step) for step in range(first, stop)])
        return {"tokens": self.tokens[rows_SxB]}


@functools.lru_cache(maxsize=2)  # a batch may need two epochs
def _order(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    numbers = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(num_rows)
    order = np.argsort(numbers, kind="stable")
    order.flags.writeable = False
    return order
