"""The recipes of a run, by the step at which each began.

`recipe.yaml` is the current one. After a run has been resumed with another recipe (`--resume changed`), the folder
`recipes` has all of them: `recipes/step-00001000.yaml` is the recipe that began after 1000 steps.
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
    """The recipe a run began with; `recipe` if there is no run yet."""
    path = recipes_in(run).get(0, run.recipe)
    return read_run_recipe(path) if path.is_file() else recipe


def record(run: RunFolder, recipe: Recipe, step: int, resume: Resume, log: Log) -> None:
    """Record that a run resumes after `step` with this recipe. Only the holder of the folder's lock may call it.

    If this is interrupted, each file is whole, and the same command finishes it.

    Raises:
        ValueError: the folder meanwhile holds a run of another recipe, and `resume` is not "changed".
    """
    # Another command may have changed the recipe while this one waited.
    run.claim(recipe, "changed" if resume == "changed" else "auto")
    changes = difference(run.read_recipe(), recipe)
    known = recipes_in(run)
    if step and (changes or known):
        if not known:
            _write(run, 0, run.recipe.read_text())
            known = recipes_in(run)
        in_force = max(first for first in known if first <= step)
        if difference(read_run_recipe(known[in_force]), recipe):
            _write(run, step, to_yaml(recipe))
    if changes:
        log(f"the recipe changes after step {step}:")
        for line in changes:
            log(f"  {line}")
        write_atomically(run.recipe, to_yaml(recipe))
    for first, path in known.items():
        if first > step or not step:  # the run returned to an earlier step
            path.unlink()


def _write(run: RunFolder, step: int, text: str) -> None:
    run.recipes.mkdir(exist_ok=True)
    write_atomically(run.recipes / f"step-{step:08d}.yaml", text)
