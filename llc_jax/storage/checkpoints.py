"""Checkpoints of a run: when to save, and a folder of steps that survives crashes and bit rot.

Layout, for a folder usually called `checkpoints`:

    <step>/params/       Orbax item: the parameters
    <step>/opt_state/    Orbax item: the optimizer state, unless that has no arrays
    <step>/manifest.json size and SHA-256 of every file, and of the manifest itself
    <step>.llc_jax.tmp/  a save under way, or what a killed one left behind
    <step>.corrupt/      a damaged step, set aside when it was saved again

A save happens under the temporary name and ends with one rename, so a folder with a plain number
is a committed step. Orbax stores no checksums and returns wrong arrays after a bit flip, hence
the manifest: every restore hashes the files it is going to read first.

Steps of another program, in a folder without any manifest, are read as they are and never
changed. Reading changes nothing at all: a damaged step is set aside by who saves it again.
"""

import errno
import itertools
import logging
import os
import pathlib
import re
import shutil
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from llc_jax.inputs import checks
from llc_jax.storage import files, manifests, orbax_steps, pytrees
from llc_jax.storage.pytrees import CheckpointError
from llc_jax.types import Params

ITEMS = ("params", "opt_state")

_log = logging.getLogger(__name__)


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
    """The steps in one folder. Reading changes nothing in it.

    Attributes:
      folder: where the steps are.
      writer: whether this process writes them.
    """

    def __init__(self, folder: str | os.PathLike, *, writer: bool = False):
        """Opens a folder.

        Args:
          folder: need not exist for a reader.
          writer: create the folder and delete what killed saves of ours left behind. One writer at
            a time; on a pod, process 0.

        Raises:
          ValueError: if `folder` is no path of this machine.
          OSError: if it is a file, or cannot be written.
        """
        self.folder = pathlib.Path(os.path.abspath(files.local_path(folder, "folder")))
        self.writer = writer
        with files.explained(f"open the checkpoint folder {self.folder}", self.folder):
            if self.folder.exists() and not self.folder.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, "it is a file")
            if writer:
                self.folder.mkdir(parents=True, exist_ok=True)
                for path in self.folder.glob("*.llc_jax.tmp"):
                    _log.info("removing %s, left behind by an interrupted save", path)
                    shutil.rmtree(path)

    def steps(self) -> list[int]:
        """Returns the committed steps in increasing order, without verifying them."""
        return sorted(self._paths()[0])

    def save(self, step: int, params: Params, opt_state: Any) -> None:
        """Commits a step: all of it or, after any failure or kill, nothing.

        Does nothing on processes other than 0 of a pod.

        Args:
          step: number of completed updates, not committed yet.
          params: arrays that this process holds whole, in nested dicts with string keys and lists.
          opt_state: any pytree of such arrays, for example optax NamedTuples.

        Raises:
          ValueError: if the trees could not be restored as they are; names the leaves.
          FileExistsError: if the step is there already and intact, or not ours.
          OSError: if the disk is full or the folder not writable; older steps are intact.
        """
        final = self._own_path(step)
        step = int(final.name)
        if jax.process_index() != 0:
            return
        saved = {
            "params": pytrees.storable("params", params, plain=True),
            "opt_state": pytrees.storable("opt_state", opt_state, plain=False),
        }
        self._make_way(step, final)
        temporary = self.folder / f"{step}.llc_jax.tmp"
        with files.explained(f"save step {step} in {self.folder}", self.folder):
            shutil.rmtree(temporary, ignore_errors=True)
            try:
                temporary.mkdir()
                for item, tree in saved.items():
                    pytrees.save(temporary / item, tree)
                manifests.write_manifest(temporary, step)
                os.rename(temporary, final)
                manifests.sync(self.folder)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)  # it would keep a full disk full
                raise

    def verify(self, step: int, items: Iterable[str] = ITEMS) -> list[str]:
        """Hashes the files of a step and returns what is wrong, in sentences; [] if nothing is.

        Damage in `items` that are not asked for goes unnoticed. A step of another program has no
        manifest to be verified by, which is then what is wrong.
        """
        return manifests.find_problems(self._own_path(step), tuple(items))

    def latest_good(self) -> int | None:
        """Returns the newest step that verifies, or None if nothing was ever committed.

        Newer steps that fail are left out with a warning that names the file. Steps of another
        program count as good if they can be read.

        Raises:
          CheckpointError: if there are steps and all of them fail.
        """
        paths, alien = self._paths()
        found = sorted(paths, reverse=True)
        for step, older in itertools.zip_longest(found, found[1:]):
            problems = self._unreadable(paths[step]) if alien else self.verify(step)
            if not problems:
                return step
            _log.warning(
                "checkpoint %s is skipped: %s; falling back from step %d to %s",
                paths[step],
                "; ".join(problems)[:300],
                step,
                "nothing: no older step is left" if older is None else f"step {older}",
            )
        if found:
            raise CheckpointError(
                f"all {len(found)} checkpoints in {self.folder} failed verification (the last:"
                f" {problems[0][:200]}) and were left as they are; restore them from a copy or"
                " start again in a new folder."
            )
        return None

    def restore_params(self, step: int) -> Params:
        """Returns the parameters of a step as nested dicts (and lists) of numpy arrays.

        Raises:
          CheckpointError: if the step is missing or damaged. Another step is never put in its
            place.
        """
        path, alien = self._require_good(step, ("params",))
        return self._read_alien(path) if alien else pytrees.restore(path / "params")

    def restore_state(
        self, opt_state_like: Any, step: int | None = None
    ) -> tuple[int, Params, Any]:
        """Returns (step, params, opt_state) with numpy leaves, to continue a run.

        Args:
          opt_state_like: optimizer state of the right structure, shapes and dtypes, for example
            `jax.eval_shape(optimizer.init, params)`.
          step: which one; None takes `latest_good()`.

        Raises:
          CheckpointError: if there is no such step, or it is damaged, or another program's.
          ValueError: if the saved state belongs to another optimizer or model.
        """
        unverified = ITEMS
        if step is None:
            step, unverified = self.latest_good(), ()
            if step is None:
                raise CheckpointError(f"no checkpoint in {self.folder}; save step 0 first.")
        path, alien = self._require_good(step, unverified)
        if alien:
            raise CheckpointError(
                f"{path} has no {manifests.NAME}: written by another program? Its weights can be"
                " read by restore_params, its optimizer state only by that program."
            )
        like = pytrees.shapes(opt_state_like)
        opt_state = pytrees.restore(path / "opt_state", like)
        if differences := checks.mismatches(like, pytrees.shapes(opt_state)):
            raise ValueError(
                f"the optimizer state in {path} does not fit opt_state_like: "
                f"{differences}; pass that of the model which was trained."
            )
        return int(path.name), pytrees.restore(path / "params"), opt_state

    def _own_path(self, step: int) -> pathlib.Path:
        return self.folder / str(checks.step(step, limit=files.LAST_STEP))

    def _paths(self) -> tuple[dict[int, pathlib.Path], bool]:
        """The folders of the steps, and whether they are those of another program."""
        try:
            names = [entry.name for entry in os.scandir(self.folder) if entry.is_dir()]
        except FileNotFoundError:
            return {}, False
        numbers = [name for name in names if re.fullmatch(r"0|[1-9]\d*", name, re.ASCII)]
        own = {int(name): self.folder / name for name in numbers}
        if any((path / manifests.NAME).exists() for path in own.values()):
            return own, False
        alien = orbax_steps.steps(self.folder)
        return alien or own, bool(alien)

    def _require_good(self, step: int, items: tuple[str, ...]) -> tuple[pathlib.Path, bool]:
        step = int(self._own_path(step).name)
        paths, alien = self._paths()
        path = paths.get(step, self.folder / str(step))
        if step not in paths:
            found = sorted(paths)
            listed = found if len(found) < 20 else f"{found[:9]} ... {found[-9:]}"
            whole = orbax_steps.is_orbax(self.folder) and not found
            hint = "; the folder is one checkpoint itself: open the folder it is in" * whole
            raise CheckpointError(f"no checkpoint {path}; committed steps: {listed}{hint}.")
        if not alien and (problems := self.verify(step, items)):
            raise CheckpointError(f"checkpoint {path} is damaged: {'; '.join(problems)[:400]}.")
        return path, alien

    def _read_alien(self, path: pathlib.Path) -> Params:
        _log.warning(
            "%s has no %s: written by another program? It is read as it is, nothing is verified",
            path,
            manifests.NAME,
        )
        return pytrees.restore_foreign(orbax_steps.item(path))

    def _unreadable(self, path: pathlib.Path) -> list[str]:
        try:
            self._read_alien(path)
        except CheckpointError as error:
            return [str(error)]
        return []

    def _make_way(self, step: int, final: pathlib.Path) -> None:
        """Sees to it that nothing is where a step is about to be saved."""
        problems, why = [], ""
        if self._paths()[1] or (final.exists() and not manifests.is_ours(final, ITEMS)):
            why = (
                f"written by another program (no {manifests.NAME}), and never changed; save into a"
                " folder of your own"
            )
        elif final.exists() and not (problems := self.verify(step)):
            why = (
                "this step is committed already and is never overwritten; continue after it or use"
                " another folder"
            )
        elif problems and not self.writer:
            why = "this step is damaged; CheckpointDir(folder, writer=True) may replace it"
        if why:
            raise FileExistsError(errno.EEXIST, why, str(final))
        if not problems:
            return
        target, number = final.with_name(f"{step}.corrupt"), 0
        while target.exists():
            number += 1
            target = final.with_name(f"{step}.corrupt.{number}")
        with files.explained(f"set damaged step {step} in {self.folder} aside", self.folder):
            os.rename(final, target)
        _log.warning(
            "checkpoint %s is damaged and set aside as %s: %s",
            final,
            target.name,
            "; ".join(problems)[:300],
        )
