"""A tiny rendered dataset, a tiny random model, and a way to launch train.py on them."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from prismer.config import PrismerConfig, prismer_tiny
from prismer.dataloading.scenes.dataset import render_dataset
from prismer.dataloading.store.shards import ShardDataset
from prismer.model import Prismer
from prismer.tokenizer import Tokenizer
from prismer.training.progress import read_metrics
from tests.train import forks
from tests.train.forks import Forks

ROOT = Path(__file__).resolve().parents[2]
SIDE = 64


def small_config(**changes) -> PrismerConfig:
    """A Prismer of 0.2 M parameters with all six experts."""
    sizes = dict(
        image_size=SIDE,
        label_size=SIDE,
        vision_width=32,
        vision_depth=2,
        vision_heads=2,
        resampler_depth=1,
        resampler_heads=2,
        num_latents=4,
        text_width=32,
        text_depth=2,
        text_heads=2,
        text_mlp_width=64,
    )
    return prismer_tiny(**{**sizes, **changes})


@dataclass
class Run:
    """One launch of train.py."""

    process: subprocess.Popen | Forks
    folder: Path
    log: Path

    def steps(self) -> int:
        """The last step in metrics.jsonl."""
        return max((row["step"] for row in read_metrics(self.folder)), default=0)

    def losses(self) -> dict[int, float]:
        """Step -> training loss, from metrics.jsonl."""
        return {row["step"]: row["loss"] for row in read_metrics(self.folder) if row["kind"] == "train"}

    def wait_for_step(self, step: int, timeout: float = 240) -> None:
        """Wait until `step` is logged."""
        end = time.monotonic() + timeout
        while self.steps() < step:
            assert self.process.poll() is None, f"ended before step {step}:\n{self.text()}"
            assert time.monotonic() < end, f"no step {step} in {timeout} s:\n{self.text()}"
            time.sleep(0.02)

    def end(self, timeout: float = 240) -> int:
        """Wait for the exit code."""
        return self.process.wait(timeout)

    def text(self) -> str:
        """Everything that the processes printed."""
        return self.log.read_text()

    def ranks_alive(self) -> int:
        """Number of processes of the launch that are alive; zombies do not count."""
        states = subprocess.run(["ps", "-o", "stat=", "-g", str(self.process.pid)], capture_output=True, text=True)
        return sum(not line.startswith("Z") for line in states.stdout.split())


class Workshop:
    """A dataset, a model, and launches of train.py on them; every launch gets a port of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, 29600 + os.getpid() % 300
        self.processes: list[subprocess.Popen | Forks] = []
        render_dataset(folder / "data", train=64, val=8, test=0, size=SIDE, label_size=SIDE, workers=1, progress=False)
        train = ShardDataset(folder / "data" / "train")
        texts = [
            text
            for i in range(len(train))
            for text in [*train.meta(i)["captions"], *(q["question"] for q in train.meta(i)["questions"])]
        ]
        tokenizer = Tokenizer.train(texts, 320)
        torch.manual_seed(0)
        Prismer(small_config(vocab_size=tokenizer.vocab_size), tokenizer).save_pretrained(folder / "model")

    def launch(
        self,
        run: str,
        launcher: str = "fork",
        flags: tuple[str, ...] = (),
        largest_file: int = resource.RLIM_INFINITY,
        **settings,
    ) -> Run:
        """Start train.py.

        Args:
            run: name of the run.
            launcher: "python", "deepspeed N" or "torchrun N"; "fork" runs as "python" does and spares the imports,
                and "fork N" runs N ranks without a launcher.
            flags: further flags of train.py.
            largest_file: a write beyond so many bytes of a file fails, as on a full disk.
            settings: the prismer section of the config.
        """
        section = dict(
            data=str(self.folder / "data"),
            model=str(self.folder / "model"),
            batch_size=8,
            log_every=1,
            save_every=3,
            eval_every=1000,
            eval_batch_size=8,
            warmup_steps=2,
            captions_per_image=1,
            questions_per_image=2,
        )
        # shard small parameters too, as those of large models are
        zero = dict.fromkeys(
            (
                "stage3_param_persistence_threshold",
                "stage3_max_reuse_distance",
                "stage3_max_live_parameters",
                "stage3_prefetch_bucket_size",
            ),
            0,
        )
        config = dict(zero_optimization=dict(stage=3, **zero), prismer={**section, **settings})
        (self.folder / f"{run}.json").write_text(json.dumps(config))
        folder = self.folder / "runs" / run
        name, _, count = launcher.partition(" ")
        self.port += 1
        arguments = [
            ROOT / "train.py",
            "--config",
            self.folder / f"{run}.json",
            # torchrun reads --run as its own --run-path
            "--name" if name == "torchrun" else "--run",
            folder,
            *flags,
        ]
        log = self.folder / f"{run}.log"
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        environment["OMP_NUM_THREADS"] = "1"
        process: subprocess.Popen | Forks
        if name == "fork":
            process = forks.start(arguments, log, self.folder, environment, int(count or 1), largest_file)
            self.processes.append(process)
            return Run(process, folder, log)

        binaries = Path(sys.executable).parent
        command = {
            "python": [sys.executable],
            "deepspeed": [binaries / "deepspeed", "--num_accelerators", count, "--master_port", str(self.port)],
            "torchrun": [binaries / "torchrun", "--nproc_per_node", count, "--master_port", str(self.port)],
        }[name]

        def prepare() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
            # under nohup the tests would inherit an ignored signal and pass it on
            signal.signal(signal.SIGHUP, signal.SIG_DFL)

        with open(log, "a") as file:
            process = subprocess.Popen(
                [str(word) for word in (*command, *arguments)],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=self.folder,
                start_new_session=True,
                preexec_fn=prepare,
            )
        self.processes.append(process)
        return Run(process, folder, log)

    def clean_up(self) -> None:
        """End the processes that a failed test left running."""
        for process in self.processes:
            process.kill()
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    """The dataset, the model and the launches of all training tests."""
    shop = Workshop(tmp_path_factory.mktemp("train"))
    yield shop
    shop.clean_up()
