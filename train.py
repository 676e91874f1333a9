"""Train a Prismer with ZeRO-3: `deepspeed train.py --config zero3.json`; `torchrun` and plain `python` do as well.

With nothing else it trains the embedded demonstration: preset tiny on rendered scenes. The settings of a run are the
fields of prismer.train_config.TrainConfig; give them in a "prismer" section of the JSON, the commonest also as flags.
A run that was interrupted continues when the same command is given again.
"""

import argparse
import os
import sys
from pathlib import Path


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    beside = Path(__file__).with_name("zero3.json")
    parser.add_argument(
        "--config", default=str(beside), help="DeepSpeed JSON, with an optional prismer section"
    )
    parser.add_argument("--task", help="joint, pretrain, caption, vqa or classify")
    parser.add_argument("--data", help="dataset folder with train/ and val/")
    parser.add_argument("--model", help="preset, or model folder to start from")
    # torchrun takes --run for an abbreviation of its own --run-path, wherever it stands
    parser.add_argument("--run", "--name", help="name of the run: the folder under runs/")
    parser.add_argument("--steps", type=int, help="optimizer steps in all")
    parser.add_argument("--epochs", type=int, help="passes over the data")
    parser.add_argument(
        "--fresh", action="store_true", help="set an earlier run of this name aside and start anew"
    )
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
    """Train; returns 0 when finished, 2 if the settings are wrong, 128 + signal number if stopped and saved."""
    arguments = parse_arguments()
    # imported late, so that --help and a mistyped flag answer at once
    import torch.distributed as dist

    from prismer.train_config import read_config
    from prismer.trainer import Trainer

    flags = ("task", "data", "model", "run", "steps", "epochs")
    try:
        config, settings = read_config(
            arguments.config, **{name: getattr(arguments, name) for name in flags}
        )
        trainer = Trainer(
            config,
            settings,
            local_rank=arguments.local_rank,
            fresh=arguments.fresh,
            profile=arguments.profile,
        )
    except (ValueError, OSError) as error:
        # every rank fails alike, one says so
        if os.environ.get("RANK", "0") == "0":
            print(f"train.py: {error}", file=sys.stderr)
        # the group's threads, left alone, may abort the interpreter's exit and hide the code
        if dist.is_initialized():
            dist.destroy_process_group()
        return 2
    return trainer.fit()


if __name__ == "__main__":
    sys.exit(main())
