"""Training: build the run from its config, step by step, evaluate, save, resume, and report.

Everything random is keyed by (seed, step): the order of the data (loader.py), augmentation, dropout, the rows of the
instance table. So a run that was killed and resumed is the same run, loss for loss, without any stored generator.
"""

import io
import math
import sys
import time
from collections.abc import Iterator
from contextlib import closing, nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from prismer.batch import Batch
from prismer.costs.profiling import StepProfile
from prismer.dataloading.scenes.dataset import render_dataset
from prismer.dataloading.store.shards import CorruptSample
from prismer.files import write_atomically, write_json
from prismer.freezing import freeze
from prismer.model import Prismer
from prismer.precision import choose_precision, slow_resumption
from prismer.training import zero as engines
from prismer.training.config import MAX_STEPS, TrainConfig
from prismer.training.data import check_readable, find_dataset, open_loaders, read_texts
from prismer.training.evaluation import Knowledge, blind_guesses, describe, scores
from prismer.training.initial_model import start_config, start_model
from prismer.training.progress import Progress, plot_metrics, tell
from prismer.training.results import draw_samples, write_results
from prismer.training.run_folder import RunFolder, export_checkpoint, restore_optimizer
from prismer.training.skipped import SkippedSamples
from prismer.training.stopping import StopRequest

SCENES = TrainConfig.data
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def learning_rate(step: int, total: int, config: TrainConfig) -> float:
    """The rate of step `step` of `total`: linear warm-up, then a cosine to the minimum (0-based)."""
    peak, low, warmup = (config.learning_rate, config.min_learning_rate, min(config.warmup_steps, total))
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * progress))


def keyed_seed(*key: int) -> int:
    """A 63-bit seed that depends on every number of the key."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


def instance_rows(seed: int, step: int, num_instances: int) -> Tensor:
    """(256,) int64: for each object id its row of the instance table, one permutation per step, alike on all ranks."""
    generator = torch.Generator().manual_seed(keyed_seed(seed, step))
    order = torch.randperm(num_instances, generator=generator)
    return order[torch.arange(256) % num_instances]


class Trainer:
    """One run, on every rank: `Trainer(config, settings).fit()`.

    Args:
        config: what to train.
        settings: engine settings, as `train_config.read_config` returned them.
        local_rank: from the launcher, if it gave one.
        fresh: set an earlier run of this name aside (renamed, not deleted) instead of continuing it.
        profile: steps to profile on rank 0, after two of warm-up; 0 is none.

    Raises:
        ValueError: if config, settings, data, model and an earlier run of this name do not fit together.
    """

    def __init__(
        self,
        config: TrainConfig,
        settings: dict,
        *,
        local_rank: int | None = None,
        fresh: bool = False,
        profile: int = 0,
    ):
        self.config = config
        self.device = engines.start_distributed(local_rank)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.group = engines.host_group()
        self.run = RunFolder(config.folder)
        micro_batch = config.micro_batch(self.world)
        engines.check_settings(config, settings)
        self.precision = engines.on_first_rank(lambda: self._prepare(fresh), self.group)

        checkpoint = self.run.last()
        if checkpoint:
            model = Prismer.from_pretrained(checkpoint)
        else:
            # every rank builds the same weights; DeepSpeed keeps a part of each
            model = start_model(config.model, config.image_size, config.seed)
        model.set_gradient_checkpointing(config.gradient_checkpointing)
        self.tokenizer, self.model_config = model.tokenizer, model.config
        trainable, parameters = freeze(model, config.freeze)
        self._say(f"trainable: {trainable:,} of {parameters:,} parameters ({trainable / parameters:.0%})")
        first = not checkpoint
        engines.on_first_rank(lambda: read_texts(config, model, self.run.path, first, self._say), self.group)
        self.knowledge = Knowledge.load(self.run.path)
        self.loader, self.val = open_loaders(config, model, self.knowledge.classes, micro_batch, self.device)
        if self.val:
            check_readable(self.val, self.group)
        self.steps_per_epoch = self.loader.steps_per_epoch // config.accumulation
        if not self.steps_per_epoch:
            raise ValueError(
                f"{self.loader.dataset.folder} has fewer images than batch_size {config.batch_size}; lower it"
            )
        self.total = config.steps or config.epochs * self.steps_per_epoch
        if self.total > MAX_STEPS:
            raise ValueError(
                f"epochs {config.epochs} of {self.steps_per_epoch} steps are {self.total} steps; at most {MAX_STEPS}"
            )

        self.engine = engines.build_engine(model.train(), config, settings, self.precision)
        self.step, self.loss_sum, self.loss_count = 0, torch.zeros((), device=self.device), 0
        if checkpoint:
            state = restore_optimizer(self.engine, checkpoint)
            self.step, self.loss_count = state["step"], state["loss_count"]
            # it is a sum over ranks
            self.loss_sum += state["loss_sum"] / self.world
            self._say(f"resuming {self.run.path} at step {self.step} of {self.total}")
        self.saved_step = self.step if checkpoint else -1
        self.profile = self._open_profile(profile) if profile else None

    # set-up

    def _prepare(self, fresh: bool) -> str:
        """What rank 0 does before anything is built; returns the precision."""
        config, data = self.config, Path(self.config.data)
        model = start_config(config.model)
        if config.data != SCENES:
            find_dataset(data)
        # nothing is moved for a command that is wrong in itself
        if moved := self.run.claim(fresh):
            self._say(f"the earlier run was moved to {moved}")
        self.run.check()
        if config.data == SCENES and not ((data / "train").is_dir() and (data / "val").is_dir()):
            self._say(f"rendering the embedded dataset into {data}")
            render_dataset(data)
            find_dataset(data)

        width = model.vision_width

        def decide() -> str:
            chosen, why = choose_precision(config.precision, width, self.device)
            self._say(why)
            return chosen

        precision, changes = self.run.settle(config, decide)
        if self.run.last() and (slow := slow_resumption(precision, width, self.device)):
            self._say(slow)
        for change in changes:
            self._say(f"changed since the run was started: {change}")
        return precision

    def _open_profile(self, steps: int) -> StepProfile | None:
        if steps < 0:
            raise ValueError(f"--profile is {steps}; give the number of steps to profile")
        profile = StepProfile(
            self.run.path / "trace.json.gz", device=self.device, dtype=DTYPES[self.precision], steps=steps
        )
        left = self.total - self.step
        if left < profile.needed:
            raise ValueError(
                f"{left} steps are left, and profiling {steps} takes {profile.needed} with warm-up and counting; "
                f"raise --steps, or lower --profile"
            )
        return profile if self.rank == 0 else None

    def _say(self, text: str) -> None:
        if text and self.rank == 0:
            tell(text, sys.stdout)

    # training

    def fit(self) -> int:
        """Train to the end, or until told to stop; returns the exit code of the process."""
        if self.step >= self.total and (self.run.path / "finished.json").is_file():
            self._say(f"{self.run.path} is finished; raise --steps or --epochs, or set it aside with --fresh")
            return 0
        begun, progress = time.time(), None
        if self.rank == 0:
            (self.run.path / "finished.json").unlink(missing_ok=True)
            progress = Progress(self.run.path, self.step, self.total)
        loaders = {"train": self.loader, **({"val": self.val} if self.val else {})}
        self.skipped = SkippedSamples(self.run.path, loaders, self.group)
        with StopRequest(self.group) as stop:
            self._restart_clock()
            while self.step < self.total and not stop.reason:
                epoch, within = divmod(self.step, self.steps_per_epoch)
                with closing(self.loader.epoch(epoch, within * self.config.accumulation)) as batches:
                    for _ in range(within, min(self.steps_per_epoch, self.total - self.step + within)):
                        with self.profile.step() if self.profile else nullcontext():
                            self._train_step(batches)
                        self._after_step(progress, stopping=stop.everywhere())
                        if stop.reason:
                            break
            if progress:
                progress.close()
            if stop.reason:
                self.skipped.note(self.step)
                self._say(self.skipped.summary())
                engines.end_distributed(self.group)
                self._say(f"stopped by {stop.reason}; saved at step {self.step} of {self.total}")
                return stop.exit_code
        self._finish(time.time() - begun)
        engines.end_distributed(self.group)
        return 0

    def _train_step(self, batches: Iterator[Batch]) -> None:
        """One optimizer step."""
        config = self.config
        engines.set_learning_rate(self.engine, learning_rate(self.step, self.total, config))
        # dropout differs between ranks and steps, and not between a run and its resumption
        torch.manual_seed(keyed_seed(config.seed, self.step, self.rank))
        rows = instance_rows(config.seed, self.step, self.model_config.num_instances).to(self.device)
        for _ in range(config.accumulation):
            batch = next(batches)
            batch.images.instance_rows = rows
            loss = self.engine(batch)
            self.engine.backward(loss)
            self.engine.step()
            # stays on the device: reading it would wait for the step
            self.loss_sum += loss.detach().float() / config.accumulation
        self.step += 1
        self.loss_count += 1
        # DeepSpeed leaves a step out when its gradients are not finite, which a non-finite loss implies
        if self.engine.skipped_steps:
            raise engines.SharedError(
                f"loss or gradients are not finite at step {self.step}; the last checkpoint is of step "
                f"{max(self.saved_step, 0)}; lower learning_rate or set gradient_clipping, and resume"
            )

    def _after_step(self, progress: Progress | None, stopping: bool) -> None:
        """Show, log, evaluate and save, whichever is due."""
        config, step = self.config, self.step
        if progress:
            progress.advance()
        if self.profile and self.profile.finished:
            self._show_profile(progress)
        last = step == self.total
        if step % config.log_every == 0 or last:
            self._log(progress)
            self.skipped.note(self.step)
        epoch_ends = step % self.steps_per_epoch == 0
        due = step % config.eval_every == 0 if config.eval_every else epoch_ends
        paused, score = time.monotonic(), None
        if (due or last) and self.val and not stopping:
            score = self._evaluate(progress)
        if step % config.save_every == 0 or epoch_ends or score is not None or last or stopping:
            self._save(score)
        # a pause is not training time
        self.clock += time.monotonic() - paused

    def _show_profile(self, progress: Progress) -> None:
        paused = time.monotonic()
        table = self.profile.report()
        write_atomically(self.run.path / "profile.txt", (table + "\n").encode())
        progress.say(table)
        self.profile = None
        self.clock += time.monotonic() - paused

    def _restart_clock(self) -> None:
        self.clock, self.clock_step = time.monotonic(), self.step

    def _log(self, progress: Progress | None) -> None:
        mean = self._global_loss() / (self.loss_count * self.world)
        seconds = time.monotonic() - self.clock
        if progress:
            progress.record(
                dict(
                    step=self.step,
                    kind="train",
                    epoch=self.step / self.steps_per_epoch,
                    loss=mean,
                    learning_rate=learning_rate(self.step - 1, self.total, self.config),
                    gradient_norm=float(self.engine.get_global_grad_norm()),
                    samples_per_s=(self.step - self.clock_step) * self.config.batch_size / seconds,
                )
            )
        self.loss_sum.zero_()
        self.loss_count = 0
        self._restart_clock()

    def _global_loss(self) -> float:
        """The sum of the losses since the last log over steps and ranks (a collective)."""
        total = self.loss_sum.clone()
        dist.all_reduce(total)
        return float(total)

    def _save(self, score: float | None) -> None:
        if self.step == self.saved_step:
            return
        state = dict(
            step=self.step,
            epoch=self.step // self.steps_per_epoch,
            samples=self.step * self.config.batch_size,
            loss_sum=self._global_loss(),
            loss_count=self.loss_count,
            precision=self.precision,
            world_size=self.world,
            seed=self.config.seed,
        )
        self.run.save(self.engine, state, score)
        self.saved_step = self.step

    # evaluation

    def _replica(self) -> Prismer:
        """A plain model on this rank, in the precision of the run."""
        model = Prismer(self.model_config, self.tokenizer)
        return model.to(device=self.device, dtype=DTYPES[self.precision]).eval()

    def _evaluate(self, progress: Progress | None) -> float | None:
        model = self._replica()
        engines.copy_weights(self.engine, model)
        found = scores(self._describe(model, limit=self.config.eval_images))
        if progress:
            progress.record(dict(step=self.step, kind="validation", **found))
            progress.say(f"step {self.step}: " + ", ".join(f"{k} {v:.3f}" for k, v in found.items()))
            plot_metrics(self.run.path)
        return found.get("score")

    def _describe(self, model: Prismer, **options) -> list[dict]:
        return describe(model, self.val, task=self.config.task, knowledge=self.knowledge, group=self.group, **options)

    def _finish(self, seconds: float) -> None:
        """Export the best model, compare it with blind guesses and blank images, and say that the run is finished."""
        best = Prismer.from_pretrained(self.run.best())
        if self.rank == 0:
            export_checkpoint(self.run.path, self.run.path / "model")
            plot_metrics(self.run.path)
        about = dict(
            steps=self.step,
            best_checkpoint=self.run.best().name,
            precision=self.precision,
            processes=self.world,
            seconds_since_last_start=round(seconds, 1),
        )
        if self.val:
            model = self._replica()
            model.load_state_dict(best.state_dict())
            records = self._describe(model)
            columns = [
                scores(records),
                scores(blind_guesses(records, self.knowledge)),
                scores(self._describe(model, blank=True)),
            ]
        self.skipped.note(self.step)
        self._say(self.skipped.summary())
        about["skipped_samples"] = len(self.skipped.names)
        if self.val and self.rank == 0:
            self._say(write_results(self.run.path, columns, len(records), about))
            self._draw(records[:8])
        if self.rank == 0:
            write_json(self.run.path / "finished.json", about)
            self._say(f"finished: {self.run.path}/model, results.md, loss.png, samples.png")

    def _draw(self, records: list[dict]) -> None:
        shown, pictures = [], []
        for record in records:
            try:
                jpeg = self.val.dataset[self._position(record["key"])].jpeg
                pictures.append(Image.open(io.BytesIO(jpeg)).convert("RGB"))
            except (CorruptSample, OSError) as error:
                self._say(f"samples.png leaves {record['key']} out: {error}")
                continue
            shown.append(record)
        if shown:
            draw_samples(self.run.path / "samples.png", pictures, shown)

    def _position(self, key: str) -> int:
        """Where the validation split has the sample `key`."""
        dataset = self.val.dataset
        for i in range(len(dataset)):
            try:
                if dataset.key(i) == key:
                    return i
            except CorruptSample:
                # a shard without its index has no keys, and no records
                continue
        raise AssertionError(f"{key} was read from {dataset.folder} and is not in it")
