"""`prismer plan`: the memory, FLOPs, communication and time of a training run, or the time of a labelling job.

It prints one screen, before the run starts.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from prismer.cli.plan_label import add_label_options, plan_labelling
from prismer.errors import InputError, check_count
from prismer.training.tasks import TASKS

if TYPE_CHECKING:
    from prismer.costs.plan import Memory, Plan, Setup
    from prismer.training.config import TrainConfig

# shares of the peak that the table of step times shows
_EFFICIENCIES = (0.2, 0.3, 0.4, 0.5, 0.6)
# (title, field of costs.plan.Memory)
_COLUMNS = (
    ("weights", "parameters"),
    ("grads", "gradients"),
    ("optim", "optimizer"),
    ("kept", "kept"),
    ("logits", "logits"),
    ("working", "working"),
    ("comm", "communication"),
    ("batch", "batch"),
)


def add_plan_command(commands: argparse._SubParsersAction) -> None:
    """Add plan to the commands of `prismer`."""
    plan = commands.add_parser(
        "plan",
        help="estimate memory, FLOPs, communication and time of a training run with ZeRO 0 to 3, or the time of a "
        "labelling job",
    )
    plan.add_argument("--model", metavar="MODEL", help="preset or model folder (default: the config's, or base)")
    plan.add_argument(
        "--gpus", type=_counts, metavar="N", help="number of GPUs (default 1; with --label several, default 1,8,64)"
    )
    plan.add_argument("--gpu-memory", type=float, default=80.0, metavar="GB", help="memory of one GPU (default 80)")
    plan.add_argument(
        "--reserve",
        type=float,
        default=4.0,
        metavar="GB",
        help="memory left for CUDA, cuDNN, NCCL and fragmentation (default 4)",
    )
    plan.add_argument("--config", type=Path, metavar="JSON", help="config of the run, such as zero3.json")
    plan.add_argument("--task", choices=tuple(TASKS), help="default: the config's, or pretrain")
    plan.add_argument("--image-size", type=int, metavar="PX", help="side of the RGB input")
    plan.add_argument(
        "--expert-text",
        metavar="EXPERT,...",
        help="experts whose detections are read as text (default: the config's, or the model's own)",
    )
    plan.add_argument("--freeze", metavar="MODE", help="freeze mode (default: the task's)")
    plan.add_argument("--batch", type=int, metavar="N", help="images in a micro-batch of one GPU")
    plan.add_argument("--captions", type=int, metavar="N", help="captions per image")
    plan.add_argument("--questions", type=int, metavar="N", help="questions per image")
    plan.add_argument("--precision", choices=("bf16", "fp32"), help="default: the config's, or bf16")
    plan.add_argument(
        "--checkpointing",
        action="store_true",
        default=None,
        help="time a step that recomputes each block in its backward pass",
    )
    plan.add_argument("--offload", action="store_true", help="mark the row whose optimizer is on the host")
    plan.add_argument(
        "--peak",
        type=float,
        default=0.8,
        metavar="PFLOPS",
        help="dense peak of one GPU in 10^15 FLOP/s (default 0.8, a bf16 H100)",
    )
    plan.add_argument(
        "--efficiency",
        type=float,
        default=0.4,
        metavar="SHARE",
        help="share of the peak that a step reaches (default 0.4)",
    )
    add_label_options(plan)
    plan.set_defaults(run=_plan)


def _counts(text: str) -> list[int]:
    """Whole numbers with commas between them, as the `type` of an option."""
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number, nor numbers with commas between them") from None


def _plan(args: argparse.Namespace) -> None:
    if args.label is not None:
        plan_labelling(args, args.gpus or [1, 8, 64])
        return
    if args.gpus is not None and len(args.gpus) > 1:
        raise InputError("--gpus gives several numbers; give one, or plan a labelling job with --label")
    args.gpus = args.gpus[0] if args.gpus else 1
    for name in ("gpus", "batch", "image_size", "captions"):
        value = getattr(args, name)
        if value is not None:
            check_count(f"--{name.replace('_', '-')}", value)
    for name in ("gpu_memory", "peak"):
        if getattr(args, name) <= 0:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be above 0")
    if not 0 < args.efficiency <= 1:
        raise InputError(f"--efficiency is {args.efficiency}; give a share of the peak, up to 1")
    if not 0 <= args.reserve < args.gpu_memory:
        raise InputError(f"--reserve {args.reserve} leaves nothing of --gpu-memory {args.gpu_memory}; lower it")
    train, engine = _settings(args)
    plan, batch = _plan_of(args, train, engine)
    budget = int((args.gpu_memory - args.reserve) * 1e9)
    rows = _rows(plan, batch, budget)
    print("\n".join(_head(args, train, plan, batch)))
    print("\n".join(_table(args, train, rows, batch)))
    print("\n".join(_costs(args, train, plan, batch)))
    if not any(memory.total <= budget for _, memory, _ in rows):
        setup, _, largest = max(rows, key=lambda row: row[2])
        fits = f"{largest} with {_name(setup)}" if largest else "nothing, at any batch; more GPUs"
        raise InputError(
            f"{batch} images per GPU do not fit into {args.gpu_memory:g} GB in any row; what would fit: {fits}"
        )


def _settings(args: argparse.Namespace) -> "tuple[TrainConfig, dict]":
    """The run's TrainConfig and engine settings, from the config file and the flags."""
    from prismer.training.config import TrainConfig
    from prismer.training.engine_settings import read_config

    given = dict(
        task=args.task,
        model=args.model,
        image_size=args.image_size,
        expert_text=args.expert_text,
        freeze=args.freeze,
        captions_per_image=args.captions,
        questions_per_image=args.questions,
        precision=args.precision,
        gradient_checkpointing=args.checkpointing,
    )
    if args.config is not None:
        train, engine = read_config(args.config, **given)
    else:
        given = {"task": "pretrain", "model": "base"} | {
            name: value for name, value in given.items() if value is not None
        }
        train, engine = TrainConfig.for_task(**given), {}
    return train, engine


def _plan_of(args: argparse.Namespace, train: "TrainConfig", engine: dict) -> "tuple[Plan, int]":
    """The Plan, and the number of images in a micro-batch."""
    from prismer.costs.info import model_config
    from prismer.costs.plan import Job, Plan, ZeroSettings, texts_of

    config = model_config(train.model)
    if train.image_size:
        config = config.replace(image_size=train.image_size)
    if train.text_experts is not None:
        config = config.replace(expert_text=train.text_experts)
    batch = args.batch or train.micro_batch(args.gpus)
    job = Job(
        config=config,
        freeze=train.freeze,
        precision="bf16" if train.precision == "auto" else train.precision,
        texts=texts_of(train, config),
        world=args.gpus,
        accumulation=train.accumulation,
        zero=ZeroSettings.from_engine(engine),
    )
    return Plan(job), batch


def _rows(plan: "Plan", batch: int, budget: int) -> "list[tuple[Setup, Memory, int]]":
    """(setup, its memory, its largest micro-batch within `budget` bytes)."""
    from prismer.costs.plan import SETUPS

    return [(s, plan.memory(s, batch), plan.largest_batch(s, budget, hint=batch)) for s in SETUPS]


def _name(setup: "Setup") -> str:
    offload = ", optimizer on the host" if setup.offload else ""
    return f"ZeRO {setup.stage}{offload}{', checkpointing' if setup.checkpointing else ''}"


def _head(args: argparse.Namespace, train: "TrainConfig", plan: "Plan", batch: int) -> list[str]:
    job, weights = plan.job, plan.weights
    config, total, trained = job.config, sum(weights.sizes), sum(weights.trained)
    images = batch * job.world * job.accumulation
    tokens = f"{config.num_context_tokens} image tokens"
    if config.expert_text:
        tokens += f" and {config.num_detection_tokens} detection tokens"
    texts = " and ".join(f"{n} of {t} tokens" for n, t in job.texts)
    pieces = f" in {job.accumulation} micro-batches" if job.accumulation > 1 else ""
    gpus = f"{job.world} GPU{'s' if job.world > 1 else ''} of {args.gpu_memory:g} GB"
    return [
        f"{config.name}, {train.task}, {config.image_size} px, {job.freeze}, {job.precision}, {gpus}",
        f"{total:,} parameters, {trained:,} trained; {tokens}; texts: {texts}",
        f"all gradients: {weights.bytes_each * trained / 1e9:,.3g} GB",
        f"micro-batch {batch} images per GPU, {images:,} images per step{pieces}",
        "",
    ]


def _table(
    args: argparse.Namespace, train: "TrainConfig", rows: "list[tuple[Setup, Memory, int]]", batch: int
) -> list[str]:
    from prismer.costs.plan import Setup

    largest = max(memory.total for _, memory, _ in rows)
    unit, scale, digits = ("GB", 1e9, 2) if largest >= 2e9 else ("MB", 1e6, 1)
    lines = [
        f"peak memory of one GPU, {unit} (besides {args.reserve:g} GB that stay free); * the setup you asked for",
        "ZeRO optim recompute" + "".join(f"{title:>8}" for title, _ in _COLUMNS) + f"{'total':>9}{'fits':>6}",
    ]
    asked = Setup(stage=3, offload=args.offload, checkpointing=train.gradient_checkpointing)
    for setup, memory, most in rows:
        parts = "".join(f"{getattr(memory, name) / scale:8.{digits}f}" for _, name in _COLUMNS)
        where = "host" if setup.offload else "GPU"
        again = "blocks" if setup.checkpointing else "-"
        fits = str(most) if most >= batch else f"{most}!"
        mark = "*" if setup == asked else " "
        lines.append(f"{setup.stage:>2} {mark} {where:<5} {again:<9}{parts}{memory.total / scale:9.{digits}f}{fits:>6}")
    lines.append("fits: images in the largest micro-batch; ! fewer than you asked for")
    return lines


def _tera(flops: int) -> str:
    return f"{flops / 1e12:,.4g}"


def _costs(args: argparse.Namespace, train: "TrainConfig", plan: "Plan", batch: int) -> list[str]:
    checkpointing, world = train.gradient_checkpointing, plan.job.world
    forward, backward = plan.flops(batch, checkpointing)
    plain = plan.flops(batch, False)[1]
    total = forward + backward
    again = f" ({_tera(backward - plain)} of it recomputed)" if checkpointing else ""
    lines = [
        "",
        f"TFLOP per step of a GPU: forward {_tera(forward)}, backward {_tera(backward)}{again}, sum {_tera(total)}",
    ]
    seconds = total / (args.peak * 1e15 * args.efficiency)
    if world > 1:
        sent = [plan.sent(stage) for stage in range(4)]
        shown = ", ".join(f"ZeRO {stage} {n / 1e9:,.3g}" for stage, n in enumerate(sent))
        lines.append(f"GB that one GPU sends in a step: {shown}")
        lines.append(
            f"GB/s of network to send it during a step at efficiency {args.efficiency:g}: "
            f"ZeRO 0-2 {sent[2] / seconds / 1e9:,.3g}, ZeRO 3 {sent[3] / seconds / 1e9:,.3g}"
        )
    images = batch * world * plan.job.accumulation
    shares = sorted({*_EFFICIENCIES, args.efficiency})
    lines += [
        f"time of a step at {args.peak:g} PFLOP/s x efficiency, arithmetic only",
        "efficiency" + "".join(f"{f'{share:g}':>11}" for share in shares),
    ]
    times = [total / (args.peak * 1e15 * share) for share in shares]
    lines.append("seconds   " + "".join(f"{t:11.4g}" for t in times))
    lines.append("images/s  " + "".join(f"{images / t:11,.0f}" for t in times))
    if args.offload:
        from prismer.costs.plan import Setup

        host = plan.host(Setup(stage=3, offload=True))
        lines.append(f"host memory for the optimizer and gradients of one GPU: {host / 1e9:,.2f} GB")
    return lines
