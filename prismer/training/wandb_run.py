"""The metrics of a run on Weights & Biases, beside metrics.jsonl and TensorBoard.

`train.py --wandb PROJECT`, or "wandb" in the "prismer" section of the config, turns it on. The library's own settings
apply: `wandb login` once, or WANDB_MODE=offline to send nothing.
"""

import dataclasses
import secrets
from pathlib import Path

from prismer.errors import InputError, MachineError
from prismer.files import write_json
from prismer.reading import read_json
from prismer.training.config import TrainConfig

_ID_FILE = "wandb.json"


class WandbRun:
    """One run on Weights & Biases; a resumed run goes on in the same one.

    Args:
        config: of the training run; `config.wandb` is the project.
        folder: the run folder, which keeps the id of the run there.
        start: the step from which the run starts or resumes; at 0 a new run begins.

    Raises:
        ValueError: if the library refuses the project or finds no login.
        RuntimeError: if the library is not installed.
    """

    def __init__(self, config: TrainConfig, folder: Path, start: int) -> None:
        try:
            import wandb
        except ImportError:
            raise MachineError("wandb is not installed; run pip install 'prismer-vlm[wandb]'") from None
        file = folder / _ID_FILE
        if not start or not file.is_file():
            write_json(file, dict(id=secrets.token_hex(8)))
        try:
            self._run = wandb.init(
                project=config.wandb,
                id=read_json(file, dict)["id"],
                name=config.run,
                dir=str(folder),
                config=dataclasses.asdict(config),
                resume="allow",
            )
        except wandb.Error as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
            raise InputError(
                f"wandb does not start ({reason}); run wandb login, set WANDB_MODE=offline, or leave wandb out"
            ) from None
        # a resumed run repeats steps since its last checkpoint, which wandb's own counter would refuse
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def record(self, row: dict) -> None:
        """Send the numbers of a row of metrics.jsonl."""
        values = {key: value for key, value in row.items() if isinstance(value, int | float) and key != "step"}
        if values:
            self._run.log({"step": row["step"], **{f"{row['kind']}/{key}": value for key, value in values.items()}})

    def close(self) -> None:
        """Send what is left, and end the run there."""
        self._run.finish()
