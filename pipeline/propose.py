"""Optuna proposes settings, several at a time, and hears what they scored; its study lies under STORE. Sole home of optuna."""

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline.grid import Grid, Range
from store.errors import Refused


def check(grids: Sequence[Grid]) -> None:
    """Refuse what Optuna cannot be asked for."""
    if importlib.util.find_spec("optuna") is None:
        raise Refused(
            "TRIALS needs Optuna: pip install 'readcache[sweep]', or leave TRIALS out and every setting of the grid is trained"
        )
    if len(grids) != 1:
        raise Refused(f"TRIALS proposes from one grid, and GRID holds a list of {len(grids)}; give one")
    for name, values in grids[0].items():
        if not isinstance(values, Range) and not all(isinstance(value, str | int | float | bool | None) for value in values):
            raise Refused(f"{name}: values that Optuna chooses from are plain ones, not {values}")


def propose(
    path: Path, name: str, grid: Grid, trials: int, width: int, seed: int,
    score: Callable[[list[dict[str, Any]]], list[float | None]], told: Callable[[int, int], None],
) -> list[tuple[dict[str, Any], float]]:  # fmt: skip
    """Run a study until it has so many scored trials, `width` at a time; all of them, the best first.

    path: of its SQLite file. name: of the study, by which it goes on where it was interrupted. score: from settings to what is to
    be as high as can be; None for one that failed. told: how many are there when it begins, of how many.
    """
    optuna = importlib.import_module("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path.parent.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(storage=f"sqlite:///{path}", study_name=name, direction="maximize", load_if_exists=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        # heads of one pass are proposed before any of them is scored: the sampler is to keep them apart. Its seed moves on with
        # the study: one that goes on would begin with the same proposals again
        study.sampler = optuna.samplers.TPESampler(seed=seed + len(study.trials), constant_liar=True)
    states = optuna.trial.TrialState
    for left in study.get_trials(states=(states.RUNNING,)):  # of a process that is gone
        study.tell(left.number, state=states.FAIL)
    done = len(study.get_trials(states=(states.COMPLETE,)))
    told(done, trials)
    failed = 0
    while done < trials:
        asked = [study.ask() for _ in range(min(width, trials - done))]
        for trial, found in zip(asked, score([_setting(trial, grid) for trial in asked]), strict=True):
            study.tell(trial, found, state=states.FAIL if found is None else states.COMPLETE)
            done, failed = done + (found is not None), failed + (found is None)
        if failed > trials:
            raise Refused(f"{failed} settings of the grid found no number for their loss; lower its learning rates")
    scored = sorted(study.get_trials(states=(states.COMPLETE,)), key=lambda trial: -trial.value)
    return [(_plain(trial.params, grid), trial.value) for trial in scored]


def _setting(trial: Any, grid: Grid) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, values in grid.items():
        if not isinstance(values, Range):
            found[name] = trial.suggest_categorical(name, values)
        elif values.whole:
            found[name] = trial.suggest_int(name, values.low, values.high, log=values.log, step=values.step or 1)
        else:
            found[name] = trial.suggest_float(name, values.low, values.high, log=values.log, step=values.step)
    return found


def _plain(params: dict[str, Any], grid: Grid) -> dict[str, Any]:
    """In the grid's order."""
    return {name: params[name] for name in grid}
