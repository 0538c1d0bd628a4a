"""The folder of a run: whether it may be written, and whether it holds the run that is to be resumed."""

import shlex
from pathlib import Path
from typing import Literal

from peerlm.errors import UserError
from peerlm.files import is_partial, remove_partials, write_json
from peerlm.train.checkpoint import list_checkpoints
from peerlm.train.config import TrainConfig
from peerlm.train.recipe import first_difference, load_recipe, to_dict

Resume = bool | Literal["auto"]
"""Whether to resume; "auto": where there is something to resume."""


def check_run(config: TrainConfig, *, resume: Resume) -> None:
    """Raise UserError unless `config.run` can be started, or resumed with the same configuration."""
    run = Path(config.run)
    if resume == "auto":
        resume = run.is_dir() and any(run.iterdir())
    if not resume:
        if run.exists() and not (run.is_dir() and not any(run.iterdir())):
            if not run.is_dir() or _holds_other_things(run):
                raise UserError(f"{run} exists and is not a run: choose another folder with --output")
            raise UserError(
                f"the run folder {run} already exists: resume it with `{resume_command(run)}`, or choose another with "
                "--output"
            )
        return
    if not run.is_dir():
        raise UserError(f"there is no run {run} to resume: leave out --resume to start it")
    if _holds_other_things(run):
        raise UserError(f"{run} is not a run, for it has no config.json: choose another folder with --set run=...")
    if not (run / "config.json").is_file():
        return
    difference = first_difference(load_recipe(run / "config.json"), config)
    if difference is not None:
        raise UserError(
            f"cannot resume {run}, for {difference}: resume with `{resume_command(run)}`, or start another run"
        )


def _holds_other_things(run: Path) -> bool:
    """Whether a folder without config.json holds more than a killed process left half written."""
    if (run / "config.json").is_file():
        return False
    empty = run / "checkpoints"  # as earlier versions made it first
    return any(not is_partial(path) and not (path == empty and not any(empty.iterdir())) for path in run.iterdir())


def open_run(config: TrainConfig) -> None:
    """Make the run's folder if need be, write config.json, remove what a killed process left half written."""
    run, checkpoints = Path(config.run), Path(config.run) / "checkpoints"
    run.mkdir(parents=True, exist_ok=True)
    remove_partials(run)
    write_json(run / "config.json", to_dict(config))  # first: by it the folder is known as a run
    checkpoints.mkdir(exist_ok=True)
    remove_partials(checkpoints)


def resume_command(run: Path) -> str:
    """What to type to resume a run, for a shell."""
    return f"peerlm train {shlex.quote(str(run))} --resume"


def last_good(run: Path) -> str:
    """Which checkpoint a run would resume from, in words."""
    checkpoints = list_checkpoints(run)
    return f"the last good checkpoint is {checkpoints[-1]}" if checkpoints else f"{run} has no checkpoint yet"
