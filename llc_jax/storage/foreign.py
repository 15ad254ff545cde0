"""Checkpoints of any program, read when asked for and never changed.

`open_folder` returns a mapping {step: params} for whatever a folder holds. Nothing that is read
here can run code: no pickle.
"""

import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping

import ml_dtypes
import numpy as np

from llc_jax.storage import files, manifests
from llc_jax.storage.checkpoints import CheckpointDir
from llc_jax.storage.pytrees import CheckpointError
from llc_jax.types import Params

_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U64": np.uint64,
    "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
_LONGEST_HEADER = 100 * 2**20  # bytes, as in the format's own library


class Checkpoints(Mapping[int, Params]):
    """Steps that are known, with weights that are read when asked for."""

    def __init__(
        self,
        steps: Iterable[int],
        read: Callable[[int], Params],
        problems: Callable[[int], list[str]] = lambda step: [],
    ):
        """Keeps the functions.

        Args:
          steps: training steps.
          read: weights of a step.
          problems: what is wrong with the files of a step; [] if nothing is.
        """
        self._steps, self._read, self._problems = sorted(steps), read, problems

    def __getitem__(self, step: int) -> Params:
        """Reads the weights of a step."""
        if step not in self._steps:
            raise KeyError(step)
        return self._read(step)

    def __iter__(self) -> Iterator[int]:
        """The steps, in order."""
        return iter(self._steps)

    def __len__(self) -> int:
        """How many steps there are."""
        return len(self._steps)

    def undamaged(self, without: Iterable[int] = ()) -> list[int]:
        """The steps in order, but for those whose files are damaged; some are not looked at."""
        known = set(without)
        return [step for step in self._steps if step in known or not self._problems(step)]


def open_folder(folder: str | os.PathLike, separator: str | None = None) -> Checkpoints:
    """Opens a folder of checkpoints of this package, of Orbax, of safetensors or of .npz files.

    There is one file or folder for each step, named by it, the last number of the name:
    `step_100.npz`, or `checkpoint-100/model.safetensors` as transformers writes it.

    Args:
      folder: which.
      separator: where names in files are split to make nested dicts, such as "/" or "."; None
        leaves a flat dict of arrays.

    Raises:
      ValueError: if there is none of these in it, or a step twice.
    """
    found: dict[int, list[pathlib.Path]] = {}
    root = files.local_path(folder, "folder")
    for path in sorted(root.iterdir()) if root.is_dir() else []:
        inside = sorted(path.iterdir()) if path.is_dir() else [path]
        mine = [p for p in inside if p.suffix in _READERS]
        numbers = re.findall(r"\d+", path.stem if path.is_file() else path.name)
        if not mine or not numbers:
            continue
        step = int(numbers[-1])
        if step in found:
            raise ValueError(
                f"folder={str(folder)!r} has step {step} twice, {found[step][0].name} and"
                f" {mine[0].name}: put each kind into a folder of its own."
            )
        found[step] = mine
    if not found:
        return orbax_folder(root)

    def read(step: int) -> Params:
        arrays = {k: x for path in found[step] for k, x in _READERS[path.suffix](path).items()}
        return arrays if separator is None else nested(arrays, separator)

    return Checkpoints(found, read)


def orbax_folder(folder: str | os.PathLike) -> Checkpoints:
    """Opens a folder of Orbax checkpoints, of this package or of another program.

    Those of this package are verified by their hashes; of another, the item `params` is read, or
    the only one there is.

    Raises:
      ValueError: if there is none in it.
    """
    kept = CheckpointDir(folder)
    steps = kept.steps()
    if not steps:
        raise ValueError(
            f"folder={str(folder)!r} has no checkpoints: give one with a file or folder for each"
            " step, as Orbax, safetensors or numpy.savez write them, the step in its name."
        )
    ours = any((kept.folder / str(step) / manifests.NAME).exists() for step in steps)
    problems = (lambda step: kept.verify(step, ["params"])) if ours else (lambda step: [])
    return Checkpoints(steps, kept.restore_params, problems)


def read_safetensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads one safetensors file as {name: array}; bfloat16 included.

    Raises:
      CheckpointError: if it is not whole.
    """
    content = pathlib.Path(path).read_bytes()
    try:
        size = int.from_bytes(content[:8], "little")
        if not 2 <= size <= min(_LONGEST_HEADER, len(content) - 8):
            raise ValueError(f"its header has {size} bytes, the file {len(content)}")
        header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
        header.pop("__metadata__", None)
        found = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            dtype = np.dtype(_DTYPES[entry["dtype"]])
            if not 0 <= begin <= end <= len(data):
                raise ValueError(f"{name!r:.80} reaches beyond the end of the file")
            flat = np.frombuffer(data[begin:end], dtype.newbyteorder("<"))
            found[name] = flat.astype(dtype).reshape(entry["shape"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} cannot be read as safetensors ({type(error).__name__}: {error!s:.160}): half"
            " copied?"
        ) from error
    return found


def read_npz(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads one .npz file as {name: array}.

    Raises:
      CheckpointError: if it is not whole, or holds other things than numbers.
    """
    try:
        with np.load(path, allow_pickle=False) as found:
            arrays = {name: found[name] for name in found.files}
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be read by numpy without running code ({type(error).__name__}:"
            f" {error!s:.160}): half copied, or are there objects in it?"
        ) from error
    if odd := [name for name, x in arrays.items() if x.dtype.kind not in "biufc"]:
        raise CheckpointError(
            f"{path} has {odd[0]!r:.80} of dtype {arrays[odd[0]].dtype}, no numbers: save float32"
            " (.npz files have no bfloat16), or use safetensors."
        )
    return arrays


_READERS = {".safetensors": read_safetensors, ".npz": read_npz}


def nested(arrays: Mapping[str, np.ndarray], separator: str) -> Params:
    """Nested dicts of arrays whose names are split at the separator.

    Raises:
      ValueError: if one name is the beginning of another.
    """
    tree: dict = {}
    for name, x in arrays.items():
        *parents, last = name.split(separator)
        node = tree
        for part in parents:
            node = node.setdefault(part, {}) if isinstance(node, dict) else None
        if not isinstance(node, dict) or last in node:
            raise ValueError(f"{name!r:.80} is both an array and a dict: use separator=None.")
        node[last] = x
    return tree
