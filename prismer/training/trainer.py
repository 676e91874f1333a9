"""The training loop: step, log, evaluate, save, and stop when asked to."""

import time
from collections.abc import Iterator
from contextlib import closing, nullcontext
from itertools import islice

import torch
import torch.distributed as dist

from prismer.batch import Batch
from prismer.costs.profiling import StepProfile
from prismer.errors import InputError
from prismer.evaluation.report import main_scores
from prismer.evaluation.scores import scores
from prismer.files import write_atomically
from prismer.training import zero
from prismer.training.evaluation import checkpoint_score, labelled
from prismer.training.progress import Progress, plot_metrics
from prismer.training.results import finish_run
from prismer.training.schedule import instance_rows, keyed_seed, learning_rate
from prismer.training.setup import DTYPES, Run
from prismer.training.skipped import SkippedSamples
from prismer.training.stopping import StopRequest
from prismer.training.streams import print_on_rank_zero
from prismer.training.wandb_run import WandbRun


class Trainer:
    """Trains one run: `Trainer(Run(config, settings)).fit()`, on every rank.

    Args:
        run: what to train.
        profile: steps to profile on rank 0, after two of warm-up; 0 is none.

    Attributes:
        step: optimizer steps done.

    Raises:
        ValueError: if fewer steps are left than profiling takes.
    """

    def __init__(self, run: Run, *, profile: int = 0) -> None:
        self.run, self.config, self.engine = run, run.config, run.engine
        resumed = run.resumed or dict(step=0, loss_sum=0.0, loss_count=0)
        self.step, self.loss_count = resumed["step"], resumed["loss_count"]
        self.saved_step = self.step if run.resumed else None
        # losses since the last log; trainer.json has their sum over ranks
        self.loss_sum = torch.tensor(resumed["loss_sum"] / dist.get_world_size(), device=run.device)
        self.profile = open_profile(run, profile, self.step) if profile else None
        self.progress: Progress | None = None

    def fit(self) -> int:
        """Train to the last step, or until told to stop; returns the exit code of the process."""
        run, path = self.run, self.run.folder.path
        if self.step >= run.total_steps and (path / "finished.json").is_file():
            print_on_rank_zero(f"{path} is finished; raise --steps or --epochs, or set it aside with --fresh")
            return 0
        started = time.time()
        if run.is_rank_zero:
            (path / "finished.json").unlink(missing_ok=True)
            wandb = WandbRun(self.config, path, self.step) if self.config.wandb else None
            self.progress = Progress(path, self.step, run.total_steps, wandb)
        val = {labelled("val", name): loader for name, loader in run.val_loaders.items()}
        self.skipped = SkippedSamples(path, {"train": run.loader, **val}, run.group)

        with StopRequest(run.group) as stop:
            self._restart_clock()
            with closing(self._micro_batches()) as batches:
                while self.step < run.total_steps and not stop.reason:
                    with self.profile.step() if self.profile else nullcontext():
                        self._train_step(batches)
                    self._after_step(stopping=stop.anywhere())
            if self.progress:
                self.progress.close()
            if stop.reason:
                self.skipped.record(self.step)
                print_on_rank_zero(self.skipped.summary())
                print_on_rank_zero(f"stopped by {stop.reason}; saved at step {self.step} of {run.total_steps}")
                run.folder.share(run.group)
                zero.end_distributed(run.group)
                return stop.exit_code
        # each rank reads the best checkpoint
        run.folder.share(run.group)
        finish_run(run, self.step, time.time() - started, self.skipped)
        run.folder.share(run.group)
        zero.end_distributed(run.group)
        return 0

    def _micro_batches(self) -> Iterator[Batch]:
        """This rank's training batches from the current step on, epoch after epoch."""
        epoch, step = divmod(self.step, self.run.steps_per_epoch)
        while True:
            start, end = (n * self.config.accumulation for n in (step, self.run.steps_per_epoch))
            with closing(self.run.loader.epoch(epoch, start)) as batches:
                yield from islice(batches, end - start)
            epoch, step = epoch + 1, 0

    def _train_step(self, batches: Iterator[Batch]) -> None:
        config, run = self.config, self.run
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, run.total_steps, config)
        # dropout differs between ranks and between steps, but not between a run and its resumption
        torch.manual_seed(keyed_seed(config.seed, self.step, dist.get_rank()))
        rows = instance_rows(config.seed, self.step, run.model.config.num_instances).to(run.device)
        for _ in range(config.accumulation):
            batch = next(batches)
            batch.images.instance_rows = rows
            loss = self.engine(batch)
            self.engine.backward(loss)
            self.engine.step()
            # stays on the device, since reading it would wait for the step
            self.loss_sum += loss.detach().float() / config.accumulation
        self.step += 1
        self.loss_count += 1
        # DeepSpeed skips a step whose gradients are not finite, as those of a non-finite loss are
        if self.engine.skipped_steps:
            raise zero.SharedError(
                f"loss or gradients are not finite at step {self.step}; the last checkpoint is of step "
                f"{self.saved_step or 0}; lower learning_rate or set gradient_clipping, and resume"
            )

    def _after_step(self, stopping: bool) -> None:
        """Log, evaluate and save, whichever is due."""
        config, step = self.config, self.step
        last, epoch_ends = step == self.run.total_steps, step % self.run.steps_per_epoch == 0
        if self.progress:
            self.progress.advance()
        if self.profile and self.profile.finished:
            self._show_profile()
        if step % config.log_every == 0 or last:
            self._log()
            self.skipped.record(step)
        paused, score = time.monotonic(), None
        evaluation_is_due = step % config.eval_every == 0 if config.eval_every else epoch_ends
        if (evaluation_is_due or last) and self.run.val_loaders and not stopping:
            score = self._evaluate()
        if step % config.save_every == 0 or epoch_ends or score is not None or last or stopping:
            self._save(score)
        # evaluation and checkpoints do not count as training time
        self.clock += time.monotonic() - paused

    def _restart_clock(self) -> None:
        self.clock, self.clock_step = time.monotonic(), self.step

    def _total_loss(self) -> float:
        """The sum of the losses since the last log, over steps and ranks (collective)."""
        total = self.loss_sum.clone()
        dist.all_reduce(total)
        return float(total)

    def _log(self) -> None:
        row = dict(step=self.step, kind="train", epoch=self.step / self.run.steps_per_epoch)
        row["loss"] = self._total_loss() / (self.loss_count * dist.get_world_size())
        seconds = time.monotonic() - self.clock
        if self.progress:
            row["learning_rate"] = learning_rate(self.step - 1, self.run.total_steps, self.config)
            row["gradient_norm"] = float(self.engine.get_global_grad_norm())
            row["samples_per_s"] = (self.step - self.clock_step) * self.config.batch_size / seconds
            self.progress.record(row)
        self.loss_sum.zero_()
        self.loss_count = 0
        self._restart_clock()

    def _evaluate(self) -> float | None:
        """Score the current weights on every validation split (collective); returns the score of the checkpoint."""
        model = self.run.new_replica()
        zero.copy_weights(self.engine, model)
        splits = []
        for name, loader in self.run.val_loaders.items():
            found = scores(self.run.predict(model, loader, limit=self.config.eval_images))
            splits.append(found)
            if self.progress:
                self.progress.record(dict(step=self.step, kind=labelled("validation", name), **found))
                shown = ", ".join(f"{k} {v:.3f}" for k, v in main_scores(found).items())
                self.progress.print_line(f"step {self.step}{name and f', {name}'}: {shown}")
        if self.progress:
            plot_metrics(self.run.folder.path)
        return checkpoint_score(splits)

    def _save(self, score: float | None) -> None:
        """Write a checkpoint, unless this step has one (collective)."""
        if self.step == self.saved_step:
            return
        state = dict(
            step=self.step,
            epoch=self.step // self.run.steps_per_epoch,
            samples=self.step * self.config.batch_size,
            loss_sum=self._total_loss(),
            loss_count=self.loss_count,
            precision=self.run.precision,
            world_size=dist.get_world_size(),
            seed=self.config.seed,
        )
        self.run.folder.save(self.engine, state, score)
        self.saved_step = self.step

    def _show_profile(self) -> None:
        """Print the figures of the profiled steps and write them to profile.txt (rank 0)."""
        paused = time.monotonic()
        table = self.profile.report()
        write_atomically(self.run.folder.path / "profile.txt", (table + "\n").encode())
        self.progress.print_line(table)
        self.profile = None
        self.clock += time.monotonic() - paused


def open_profile(run: Run, steps: int, done: int) -> StepProfile | None:
    """A profile of the next `steps` steps on rank 0, after `done` steps of the run; None on other ranks.

    Raises:
        ValueError: if `steps` is negative, or fewer steps are left than profiling takes.
    """
    if steps < 0:
        raise InputError(f"--profile is {steps}; give the number of steps to profile")
    trace = run.folder.path / "trace.json.gz"
    profile = StepProfile(trace, device=run.device, dtype=DTYPES[run.precision], steps=steps)
    left = run.total_steps - done
    if left < profile.needed:
        raise InputError(
            f"{left} steps are left, and profiling {steps} takes {profile.needed} with warm-up and counting; "
            f"raise --steps, or lower --profile"
        )
    return profile if run.is_rank_zero else None
