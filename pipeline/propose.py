"""Optuna proposes settings, several at a time, and hears what they scored; its study lies under STORE. Sole home of optuna."""

import contextlib
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import filelock

from pipeline.board import in_words
from pipeline.grid import Grid, Range
from store.errors import Refused

REPEATS = 20
"""times that a setting is asked for before there are taken to be no more new ones"""


def check(grids: Sequence[Grid]) -> None:
    """Refuse what Optuna cannot be asked for."""
    if importlib.util.find_spec("optuna") is None:
        raise Refused(
            "TRIALS needs Optuna: pip install 'readcache[sweep]', or leave TRIALS out and every setting of the grid is trained"
        )
    if len(grids) != 1:
        raise Refused(f"TRIALS proposes from one grid, and GRID holds a list of {len(grids)}; give one")
    if len(labels := grids[0].get("label", [None])) > 1:
        raise Refused(
            f"TRIALS ranks one task, and the label columns {', '.join(map(str, labels))} are several; sweep each by itself"
        )
    for name, values in grids[0].items():
        if not isinstance(values, Range) and not all(isinstance(value, str | int | float | bool | None) for value in values):
            raise Refused(f"{name}: values that Optuna chooses from are plain ones, not {values}")


def propose(
    path: Path, name: str, grid: Grid, trials: int, width: int, seed: int,
    score: Callable[[list[dict[str, Any]]], list[float | None]], told: Callable[[int, int], None],
) -> list[dict[str, Any]]:  # fmt: skip
    """Run a study until so many settings are scored, `width` at a time, each once; all of them, the best first.

    path: of its SQLite file. name: of the study, by which it goes on where it was interrupted. score: from settings to what is to
    be as high as can be; None for one that failed. told: how many are there when it begins, of how many. It ends earlier where
    there are no more settings, or where as many have failed.

    Raises Refused where another process runs this study, and where its file is damaged.
    """
    optuna = importlib.import_module("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(filelock.FileLock(f"{path}.lock", timeout=0))
        except filelock.Timeout:
            raise Refused(f"another process runs the study {path}; wait for it, or sweep another grid") from None
        study = _open(optuna, path, name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            # heads of one pass are proposed before any of them is scored: the sampler is to keep them apart. Its seed moves on
            # with the study: one that goes on would begin with the same proposals again
            study.sampler = optuna.samplers.TPESampler(seed=seed + len(study.trials), constant_liar=True)
        states = optuna.trial.TrialState
        for left in study.get_trials(states=(states.RUNNING,)):  # of a process that is gone
            study.tell(left.number, state=states.FAIL)
        known = {in_words(trial.params): trial.value for trial in study.get_trials(states=(states.COMPLETE,))}
        told(len(known), trials)
        failed = 0
        while (
            len(known) < trials
            and failed < trials
            and (asked := _ask(study, states, grid, known, min(width, trials - len(known))))
        ):
            for trial, found in zip(asked.values(), score([_setting(trial, grid) for trial in asked.values()]), strict=True):
                study.tell(trial, found, state=states.FAIL if found is None else states.COMPLETE)
                failed += found is None
                if found is not None:
                    known[in_words(trial.params)] = found
        scored = sorted(study.get_trials(states=(states.COMPLETE,)), key=lambda trial: -trial.value)
    settings = {in_words(trial.params): {option: trial.params[option] for option in grid} for trial in scored}
    return list(settings.values())


def _open(optuna: Any, path: Path, name: str) -> Any:
    try:
        return optuna.create_study(storage=f"sqlite:///{path}", study_name=name, direction="maximize", load_if_exists=True)
    except Exception as error:  # of whatever library lies below
        reason = " ".join(str(error).split())[:120]
        raise Refused(
            f"the study {path} does not open ({reason}); move it away and sweep again: trained heads are kept"
        ) from None


def _ask(study: Any, states: Any, grid: Grid, known: dict[str, float], count: int) -> dict[str, Any]:
    """Trials of settings that are new. One that is known is told what it scored, and another is asked for, up to a limit."""
    found: dict[str, Any] = {}
    for _ in range(REPEATS * count):
        trial = study.ask()
        _setting(trial, grid)
        words = in_words(trial.params)
        if words in known:
            study.tell(trial, known[words])
        elif words in found:
            study.tell(trial, state=states.FAIL)
        else:
            found[words] = trial
        if len(found) == count:
            break
    return found


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
