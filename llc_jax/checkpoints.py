"""Checkpoints of a run: when to save, and a folder of steps that survives crashes and bit rot.

Layout, for a folder usually called `checkpoints`:

    <step>/params/       Orbax item: the parameters
    <step>/opt_state/    Orbax item: the optimizer state
    <step>/manifest.json size and SHA-256 of every file, and of the manifest itself
    <step>.tmp/          a save under way, or what a killed one left behind
    <step>.corrupt/      a step that failed verification, set aside for a person to look at

A save happens under the temporary name and ends with one rename, so a folder with a plain number
is a committed step. Orbax stores no checksums and returns wrong arrays after a bit flip, hence
the manifest: every restore hashes the files it is going to read first.
"""

import contextlib
import errno
import logging
import os
import pathlib
import re
import shutil
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np

from llc_jax import checks, manifests
from llc_jax.types import Params

ITEMS = ("params", "opt_state")

_log = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A step that is missing, damaged or not readable; the message says which file and why."""


def checkpoint_steps(num_steps: int, num_log: int, num_linear: int) -> list[int]:
    """Steps at which to save: dense early, evenly spread later.

    {0} and the integer parts of `num_log` points spaced evenly in the logarithm from 1 to
    num_steps, of `num_linear` points spaced evenly from 0 to num_steps, and {num_steps}.

    With (500000, 100, 100) these are the 190 steps of the published runs (arXiv 2402.02364;
    the last is 499,999) and 500,000. Those runs saved *after the update numbered s* (from 0), so
    their checkpoint s has s + 1 updates while ours has s; at learning rates near 1e-8 per early
    step the difference is far below every published digit.

    Args:
      num_steps: T, updates in the whole run.
      num_log: points of the logarithmic grid, before repeats are dropped.
      num_linear: points of the linear grid, before repeats are dropped.

    Returns:
      Strictly increasing steps from 0 to num_steps.
    """
    checks.at_least("num_steps", num_steps, 1)
    checks.at_least("num_log", num_log, 0, "0 leaves that grid out")
    checks.at_least("num_linear", num_linear, 0, "0 leaves that grid out")
    grid = [*np.logspace(0, np.log10(num_steps), num_log), *np.linspace(0, num_steps, num_linear)]
    return sorted({0, num_steps, *(min(int(point), num_steps) for point in grid)})


class CheckpointDir:
    """The steps in one folder. Readers change nothing but the name of a damaged step.

    Attributes:
      folder: where the steps are.
    """

    def __init__(self, folder: str | os.PathLike, *, writer: bool = False):
        """Opens a folder.

        Args:
          folder: need not exist for a reader.
          writer: create the folder and delete what killed saves left behind. One writer at a
            time; on a pod, process 0.
        """
        self.folder = pathlib.Path(os.path.abspath(folder))
        if writer:
            with _explained(f"open the checkpoint folder {self.folder}", self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                for path in self.folder.iterdir():
                    if re.fullmatch(r"\d+\.tmp", path.name):
                        _log.info("removing %s, left behind by an interrupted save", path)
                        shutil.rmtree(path)

    def steps(self) -> list[int]:
        """Returns the committed steps in increasing order, without verifying them."""
        try:
            names = [entry.name for entry in os.scandir(self.folder) if entry.is_dir()]
        except FileNotFoundError:
            return []
        return sorted(int(name) for name in names if re.fullmatch(r"0|[1-9]\d*", name, re.ASCII))

    def save(self, step: int, params: Params, opt_state: Any) -> None:
        """Commits a step: all of it or, after any failure or kill, nothing.

        Does nothing on processes other than 0 of a pod.

        Args:
          step: number of completed updates, not committed yet.
          params: nested dict of arrays that this process holds whole.
          opt_state: pytree of such arrays, for example optax NamedTuples.

        Raises:
          FileExistsError: if the step is there already and intact.
          OSError: if the disk is full or the folder not writable; older steps are intact.
        """
        if jax.process_index() != 0:
            return
        final = self._path(step)
        if final.exists():
            if not (problems := self.verify(step)):
                raise FileExistsError(
                    errno.EEXIST,
                    "this step is committed already and is never overwritten; "
                    "continue after it or use another folder",
                    str(final),
                )
            self._quarantine(step, problems)
        # Host copies: Orbax would want every process of a pod to take part in saving a device's.
        trees = jax.device_get((params, opt_state))
        temporary = self.folder / f"{step}.tmp"
        with _explained(f"save step {step} in {self.folder}", self.folder):
            shutil.rmtree(temporary, ignore_errors=True)
            try:
                temporary.mkdir()
                for item, tree in zip(ITEMS, trees, strict=True):
                    _orbax_save(temporary / item, tree)
                manifests.write_manifest(temporary, step)
                os.rename(temporary, final)
                manifests.sync(self.folder)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)  # it would keep a full disk full
                raise

    def verify(self, step: int, items: Iterable[str] = ITEMS) -> list[str]:
        """Hashes the files of a step and returns what is wrong, in sentences; [] if nothing is.

        Changes nothing. Damage in `items` that are not asked for goes unnoticed.
        """
        return manifests.find_problems(self._path(step), tuple(items))

    def latest_good(self) -> int | None:
        """Returns the newest step that verifies, or None if nothing was ever committed.

        Newer steps that fail are set aside with a warning that names the file.

        Raises:
          CheckpointError: if there are steps and all of them fail.
        """
        steps = self.steps()
        for step in reversed(steps):
            if not (problems := self.verify(step)):
                return step
            self._quarantine(step, problems)
            older = [s for s in steps if s < step]
            _log.warning(
                "falling back from step %d to %s",
                step,
                f"step {older[-1]}" if older else "nothing: no older step is left",
            )
        if steps:
            raise CheckpointError(
                f"all {len(steps)} checkpoints in {self.folder} failed verification and were "
                "renamed *.corrupt; restore them from a copy or start again in a new folder."
            )
        return None

    def restore_params(self, step: int) -> Params:
        """Returns the parameters of a step as a plain nested dict of numpy arrays.

        Raises:
          CheckpointError: if the step is missing or, after setting it aside, damaged. Another
            step is never put in its place.
        """
        self._require_good(step, ("params",))
        return _orbax_restore(self._path(step) / "params", None)

    def restore_state(
        self, opt_state_like: Any, step: int | None = None
    ) -> tuple[int, Params, Any]:
        """Returns (step, params, opt_state) with numpy leaves, to continue a run.

        Args:
          opt_state_like: optimizer state of the right structure, shapes and dtypes, for example
            `jax.eval_shape(optimizer.init, params)`.
          step: which one; None takes `latest_good()`.

        Raises:
          CheckpointError: if there is no such step, or it is damaged.
          ValueError: if the saved state belongs to another optimizer or model.
        """
        if step is None:
            step = self.latest_good()  # verifies
            if step is None:
                raise CheckpointError(f"no checkpoint in {self.folder}; save step 0 first.")
        else:
            self._require_good(step, ITEMS)
        path = self._path(step)
        opt_state = _orbax_restore(path / "opt_state", opt_state_like)
        if differences := checks.mismatches(opt_state_like, opt_state):
            raise ValueError(
                f"the optimizer state in {path} does not fit opt_state_like: "
                f"{differences}; pass that of the model which was trained."
            )
        return step, _orbax_restore(path / "params", None), opt_state

    def _path(self, step: int) -> pathlib.Path:
        checks.at_least("step", step, 0)
        return self.folder / str(step)

    def _require_good(self, step: int, items: tuple[str, ...]) -> None:
        path = self._path(step)
        if not path.is_dir():
            raise CheckpointError(f"no checkpoint {path}; committed steps: {self.steps()}.")
        if problems := self.verify(step, items):
            self._quarantine(step, problems)
            raise CheckpointError(f"checkpoint {path} is damaged: {'; '.join(problems)}.")

    def _quarantine(self, step: int, problems: list[str]) -> None:
        path = self._path(step)
        target, number = path.with_name(f"{step}.corrupt"), 0
        while target.exists():
            number += 1
            target = path.with_name(f"{step}.corrupt.{number}")
        try:
            os.rename(path, target)
            fate = f"set aside as {target.name}"
        except OSError as error:  # a read-only folder, or another process was first
            fate = f"left where it is ({error.strerror})"
        _log.warning("checkpoint %s is damaged and %s: %s", path, fate, "; ".join(problems))


def _checkpointer():
    """A synchronous Orbax checkpointer that waits for no other process."""
    import orbax.checkpoint as ocp  # half a second, and not needed to list or verify steps

    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(), active_processes={jax.process_index()}
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _orbax_save(path: pathlib.Path, tree: Any) -> None:
    import orbax.checkpoint as ocp

    with _checkpointer() as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(tree))


def _orbax_restore(path: pathlib.Path, like: Any) -> Any:
    import orbax.checkpoint as ocp

    try:
        with _checkpointer() as checkpointer:
            return checkpointer.restore(path, args=ocp.args.PyTreeRestore(item=like))
    except Exception as error:
        reason = str(error).strip().splitlines()[:1]
        if like is not None and "structures do not match" in str(error):
            raise ValueError(
                f"the optimizer state in {path} has another structure than opt_state_like; pass "
                "that of the optimizer and model which were trained."
            ) from error
        raise CheckpointError(
            f"the files of {path} are intact but Orbax {ocp.__version__} cannot read them "
            f"({type(error).__name__}: {''.join(reason)}); {manifests.NAME} names the version that "
            "wrote them."
        ) from error


@contextlib.contextmanager
def _explained(action: str, folder: pathlib.Path) -> Iterator[None]:
    """Turns what the file system or Orbax raises into one OSError with path and remedy."""
    try:
        yield
    except Exception as error:
        text = str(error)
        if not isinstance(error, OSError) and not re.search(r"\b[A-Z_]{5,}: ", text):
            raise  # not a status code of the storage layer: the arguments are wrong
        number = getattr(error, "errno", None) or errno.EIO
        if number == errno.ENOSPC or "RESOURCE_EXHAUSTED" in text:
            existing = next(path for path in (folder, *folder.parents) if path.exists())
            raise OSError(
                errno.ENOSPC,
                f"no space left to {action} "
                f"({shutil.disk_usage(existing).free:,} bytes are free); older steps are intact, "
                "free some space and run again",
            ) from error
        reason = getattr(error, "strerror", None) or "".join(text.strip().splitlines()[:1])
        raise OSError(number, f"cannot {action}: {reason}") from error
