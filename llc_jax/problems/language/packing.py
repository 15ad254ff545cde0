"""Documents to rows: joined by the end of text, cut, and written as they come.

Packing of arXiv 2402.02364: pieces of T - 1 tokens, each behind an end of text that begins the
sequence. Letters: N sequences ("rows"), T context length.
"""

import hashlib
from typing import Any, BinaryIO

import numpy as np

from llc_jax.inputs import checks

DTYPE = np.dtype("<u2")  # uint16, the same bytes on every machine


def pack(stream: np.ndarray, context: int, bos_id: int) -> np.ndarray:
    """Cuts a stream into pieces of T - 1 tokens and puts `bos_id` before each; drops the rest.

    Args:
      stream: ids below 65,536, [length].
      context: T, at least 2.
      bos_id: id that begins every row, here the end of text.

    Returns:
      uint16 [N, T] with N = length // (T - 1).

    Raises:
      ValueError: if the stream does not fill one row.
    """
    checks.at_least("context", context, 2, "a first token and one to predict")
    num_rows = len(stream) // (context - 1)
    if not num_rows:
        raise ValueError(
            f"the text has {len(stream)} tokens, and one row of context={context} needs"
            f" {context - 1}: give more text or a shorter context."
        )
    rows_NxT = np.empty((num_rows, context), DTYPE)
    rows_NxT[:, 0] = bos_id
    rows_NxT[:, 1:] = stream[: num_rows * (context - 1)].reshape(num_rows, context - 1)
    return rows_NxT


class RowFile:
    """A .npy file of packed rows that grows document by document, in bounded memory.

    Args:
      file: an empty file, open for writing bytes.
      context: T.
      eos_id: id between documents and at the start of every row.
    """

    def __init__(self, file: BinaryIO, context: int, eos_id: int) -> None:
        self._file, self._context, self._eos_id = file, context, eos_id
        self._documents = self._tokens = self._rows = 0
        self._rest = np.empty(0, DTYPE)
        self._sha256 = hashlib.sha256()
        self._header_size = self._write_header()

    def add(self, ids: np.ndarray) -> None:
        """Appends a document, uint16 [length]."""
        separator = np.full(int(self._documents > 0), self._eos_id, DTYPE)
        self._rest = np.concatenate([self._rest, separator, ids])
        self._documents += 1
        self._tokens += len(separator) + len(ids)
        if len(self._rest) >= self._context - 1:
            rows_NxT = pack(self._rest, self._context, self._eos_id)
            self._rest = self._rest[len(rows_NxT) * (self._context - 1) :]
            self._rows += len(rows_NxT)
            self._sha256.update(rows_NxT)
            self._file.write(rows_NxT.tobytes())

    def finish(self) -> dict[str, Any]:
        """Completes the file and returns numbers of documents, tokens, rows, and their SHA-256.

        The tokens are those of the stream; what did not fill a last row is counted too.
        """
        if not self._rows:
            pack(self._rest, self._context, self._eos_id)  # says what is missing
        assert self._write_header() == self._header_size
        return {
            "documents": self._documents,
            "tokens": self._tokens,
            "rows": self._rows,
            "sha256": self._sha256.hexdigest(),
        }

    def _write_header(self) -> int:
        # NumPy pads the header so that the first axis can grow without moving the data.
        self._file.seek(0)
        shape = (self._rows, self._context)
        header = {"descr": DTYPE.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, header)
        return self._file.tell()
