"""Train a Prismer with ZeRO-3: `deepspeed train.py --config zero3.json`; `torchrun` and plain `python` do as well.

With nothing else it trains the embedded demonstration: preset tiny on rendered scenes. The settings of a run are the
fields of prismer.training.config.TrainConfig; give them in a "prismer" section of the JSON, the most common also as
flags.
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
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    beside = Path(__file__).with_name("zero3.json")
    parser.add_argument("--config", default=str(beside), help="DeepSpeed JSON, with an optional prismer section")
    parser.add_argument("--task", help="joint, pretrain, caption, vqa or classify")
    parser.add_argument("--data", help="dataset folder with train/ and val/")
    parser.add_argument("--model", help="preset, or model folder to start from")
    # torchrun takes --run for an abbreviation of its own --run-path, wherever it stands
    parser.add_argument("--run", "--name", help="name of the run: the folder under runs/")
    parser.add_argument("--steps", type=int, help="optimizer steps in all")
    parser.add_argument("--epochs", type=int, help="passes over the data")
    parser.add_argument("--fresh", action="store_true", help="set an earlier run of this name aside and start anew")
    parser.add_argument(
        "--profile",
        type=int,
        nargs="?",
        const=3,
        default=0,
        metavar="N",
        help="profile N steps (3), then go on: trace.json.gz and profile.txt in the folder of the run",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Train.

    Returns:
        0 when finished; 128 + signal number if stopped and saved. What fails ends the process at once, with one
        sentence on stderr: code 2 if the settings, the data or the files of the run are wrong or the loss is not
        finite, 1 if the machine fails (the disk is full, another process of the run ended).
    """
    _open_streams()
    arguments = parse_arguments()
    # imported late, so that --help and a mistyped flag answer at once
    from prismer.training.config import read_config
    from prismer.training.trainer import Trainer

    flags = ("task", "data", "model", "run", "steps", "epochs")
    trainer = None
    try:
        config, settings = read_config(arguments.config, **{name: getattr(arguments, name) for name in flags})
        trainer = Trainer(
            config, settings, local_rank=arguments.local_rank, fresh=arguments.fresh, profile=arguments.profile
        )
        return trainer.fit()
    except KeyboardInterrupt:
        _leave(128 + signal.SIGINT)
    except Exception as error:
        _fail(error, training=trainer is not None)
        raise


def _fail(error: Exception, training: bool) -> None:
    """Say in one sentence why the run ends, and end this process; return only from a mistake of ours.

    The others may be waiting for this one in a collective: it must be gone, so that they, or the launcher, notice.
    """
    from prismer.errors import is_a_sentence
    from prismer.files import is_disk_failure, sentence
    from prismer.training.zero import SharedError, peer_ended

    if isinstance(error, OSError):
        text, code = sentence(error), 1 if training or is_disk_failure(error) else 2
    elif peer_ended(error):
        text, code = "another process of this run ended, and its message says why", 1
    elif is_a_sentence(error):
        text, code = str(error), 2
    else:
        return
    # until training begins, and where they say so, errors are the same on all ranks: one of a machine tells
    alike = not training or isinstance(error, SharedError)
    if not alike or os.environ.get("LOCAL_RANK", "0") == "0":
        # below the progress bar; in one write, so that the lines of several processes do not mix
        bar = "\n" if training and os.environ.get("RANK", "0") == "0" else ""
        with contextlib.suppress(OSError):
            sys.stderr.write(bar + "".join(f"train.py: {line}\n" for line in text.splitlines()))
    if peer_ended(error):
        # a launcher reports the process that it sees end first, and that should be the other
        time.sleep(3)
    _leave(code)


def _leave(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        # a reader that has gone does not change the code
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    # the threads of the process group, left alone, may abort the interpreter's exit and hide the code
    os._exit(code)


def _open_streams() -> None:
    """Open the standard streams that the shell closed, so that no file of the run gets their numbers."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)
    sys.stderr = sys.stderr or open(2, "w", closefd=False)


if __name__ == "__main__":
    sys.exit(main())
