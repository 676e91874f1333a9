"""Train a Prismer with ZeRO-3: `deepspeed train.py --config zero3.json`; `torchrun` and plain `python` work as well.

Without other flags it trains the embedded demonstration: preset tiny on rendered scenes. The settings of a run are the
fields of prismer.training.config.TrainConfig; give them in a "prismer" section of the JSON, the most common ones also
as flags.
A run that was interrupted continues when the same command is given again.
"""

import argparse
import contextlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    beside = Path(__file__).with_name("zero3.json")
    parser.add_argument("--config", default=str(beside), help="DeepSpeed JSON, with an optional prismer section")
    parser.add_argument("--task", help="joint, pretrain, caption, vqa or classify")
    parser.add_argument("--data", help="dataset folder with train/ and val/, or several: a,b:0.2,c")
    parser.add_argument(
        "--model", help="where to start from: a preset, a model folder, or a name of `prismer models list`"
    )
    parser.add_argument(
        "--expert-text",
        help="experts whose detections the decoder reads as text: obj_detection,ocr_detection, one of them, or none",
    )
    parser.add_argument(
        "--rename-kinds",
        action="store_true",
        default=None,
        help="give the shapes of rendered scenes other names in every image, so that the experts' names count",
    )
    # torchrun reads --run as an abbreviation of its own --run-path, wherever it stands
    parser.add_argument("--run", "--name", help="name of the run: the folder under runs/")
    parser.add_argument("--steps", type=int, help="optimizer steps in all")
    parser.add_argument("--epochs", type=int, help="passes over the data")
    parser.add_argument("--fresh", action="store_true", help="move an earlier run of this name aside and start anew")
    parser.add_argument(
        "--profile",
        type=int,
        nargs="?",
        const=3,
        default=0,
        metavar="N",
        help="profile N steps (default 3) into trace.json.gz and profile.txt in the run's folder, then go on",
    )
    parser.add_argument("--wandb", metavar="PROJECT", help="also send the metrics to this project of Weights & Biases")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Train.

    Returns:
        0 when finished; 128 + signal number if stopped and saved. A failure ends the process at once, with one sentence
        on stderr: with code 2 if the settings, the data or the files of the run are wrong or the loss is not finite,
        with code 1 if the machine fails (the disk is full, another process of the run ended).
    """
    _open_streams()
    arguments = parse_arguments()
    # imported late, so that --help and a mistyped flag are answered at once
    from prismer.training.engine_settings import read_config
    from prismer.training.setup import Run
    from prismer.training.trainer import Trainer

    flags = ("task", "data", "model", "expert_text", "rename_kinds", "run", "steps", "epochs", "wandb")
    trainer = None
    try:
        config, settings = read_config(arguments.config, **{name: getattr(arguments, name) for name in flags})
        run = Run(config, settings, local_rank=arguments.local_rank, fresh=arguments.fresh)
        trainer = Trainer(run, profile=arguments.profile)
        return trainer.fit()
    except KeyboardInterrupt:
        _leave(128 + signal.SIGINT)
    except Exception as error:
        _fail(error, training=trainer is not None)
        raise


def _fail(error: Exception, training: bool) -> None:
    """Print one sentence that says why the run ends, and end this process; return only if the error is a bug.

    Other processes may be waiting for this one in a collective; only its end shows them, and the launcher, the failure.
    """
    from prismer.errors import InputError, MachineError
    from prismer.files import is_disk_failure, sentence
    from prismer.training.zero import SharedError, is_peer_failure

    if isinstance(error, OSError):
        text, code = sentence(error), 1 if training or is_disk_failure(error) else 2
    elif is_peer_failure(error):
        text, code = "another process of this run ended, and its message says why", 1
    elif isinstance(error, InputError | MachineError):
        text, code = str(error), 2
    else:
        return
    # all ranks fail alike during set-up and with a SharedError; then only one process of a machine prints
    shared = not training or isinstance(error, SharedError)
    if not shared or os.environ.get("LOCAL_RANK", "0") == "0":
        # starts below the progress bar, and is one write, so that the lines of several processes do not mix
        bar = "\n" if training and os.environ.get("RANK", "0") == "0" else ""
        with contextlib.suppress(OSError):
            sys.stderr.write(bar + "".join(f"train.py: {line}\n" for line in text.splitlines()))
    if is_peer_failure(error):
        # a launcher reports the process that ends first, which should be the other one
        time.sleep(3)
    _leave(code)


def _leave(code: int) -> NoReturn:
    """End this process at once; its threads, such as those of the process group, end with it."""
    for stream in (sys.stdout, sys.stderr):
        # a closed pipe must not change the exit code
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    # with sys.exit, the threads of the process group may abort the interpreter and hide the exit code
    os._exit(code)


def _open_streams() -> None:
    """Open the standard streams that the shell closed, so that no file of the run gets their file numbers."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)
    sys.stderr = sys.stderr or open(2, "w", closefd=False)


if __name__ == "__main__":
    sys.exit(main())
