"""The recipes of a run, one after another: which one is in force, and from which step on each was.

`recipe.yaml` is the one in force. Once a run has gone on under another recipe (`--resume changed`) there is a folder
beside it, `recipes/step-00001000.yaml`, with each recipe under the number of steps done before it.
"""

from __future__ import annotations

from pathlib import Path

from .config import Recipe, difference, to_yaml
from .log import Log
from .run_folder import Resume, RunFolder, read_run_recipe, write_atomically


def recipes_in(run: RunFolder) -> dict[int, Path]:
    """The recipes of a run that has had several, ascending, by the number of steps done before each."""
    found = {path.stem.removeprefix("step-"): path for path in run.recipes.glob("step-*.yaml")}
    return {int(step): path for step, path in sorted(found.items()) if step.isdigit()}


def first_recipe(run: RunFolder, recipe: Recipe) -> Recipe:
    """The one a run began with; `recipe` if there is no run yet."""
    path = recipes_in(run).get(0, run.recipe)
    return read_run_recipe(path) if path.is_file() else recipe


def record(run: RunFolder, recipe: Recipe, step: int, resume: Resume, log: Log) -> None:
    """Write down that a run goes on after `step` by this recipe. Only the holder of the folder's lock may.

    Whenever this is interrupted, each file is whole, and the same command finishes it.

    Raises:
        ValueError: the folder has come to hold a run of another recipe, and that is not wanted.
    """
    run.claim(
        recipe, "changed" if resume == "changed" else "auto"
    )  # another command may have changed it while this one waited
    changes = difference(run.read_recipe(), recipe)
    known = recipes_in(run)
    if step and (changes or known):
        if not known:
            _write(run, 0, run.recipe.read_text())
        in_force = max((first for first in known if first <= step), default=0)
        if changes if not known else difference(read_run_recipe(known[in_force]), recipe):
            _write(run, step, to_yaml(recipe))
    if changes:
        log(f"the recipe changes after step {step}:")
        for line in changes:
            log(f"  {line}")
        write_atomically(run.recipe, to_yaml(recipe))
    for first, path in known.items():
        if first > step or not step:  # of a way not taken
            path.unlink()


def _write(run: RunFolder, step: int, text: str) -> None:
    run.recipes.mkdir(exist_ok=True)
    write_atomically(run.recipes / f"step-{step:08d}.yaml", text)
