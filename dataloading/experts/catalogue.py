"""Which networks there are for each expert, and loading the ones that somebody asks for.

An expert is asked for as `EXPERT`, `EXPERT=NETWORK` or `EXPERT=NETWORK@SOURCE`, where the source is a local folder or a
hub id; "all" is every expert with its default network.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

import torch

from prismer.dataloading.experts.network import MissingWeights, Network
from prismer.experts import EXPERTS

_MODULES = {
    "depth": "depth",
    "normal": "normal",
    "seg": "segmentation",
    "edge": "edge",
    "obj_detection": "objects",
    "ocr_detection": "words",
}


@dataclass(frozen=True)
class Choice:
    """One expert that was asked for: its network, and where the weights lie (None: where the card says)."""

    expert: str
    network: type[Network]
    source: str | None = None


def networks_of(expert: str) -> tuple[type[Network], ...]:
    """The networks that can make an expert's maps, the default first.

    Raises:
        ValueError: if the expert is unknown.
    """
    if expert not in EXPERTS:
        raise ValueError(f"unknown expert {expert!r}; choose from all, {', '.join(EXPERTS)}")
    return import_module(f"prismer.dataloading.experts.{_MODULES[expert]}").NETWORKS


def find_network(name: str) -> type[Network]:
    """The network of that name.

    Raises:
        ValueError: if there is none.
    """
    known = [network for expert in EXPERTS for network in networks_of(expert)]
    for network in known:
        if network.card.name == name:
            return network
    names = ", ".join(network.card.name for network in known)
    raise ValueError(f"unknown network {name!r}; choose from {names}")


def choose(asked: str | Sequence[str]) -> list[Choice]:
    """What was asked for, in an order in which every network finds what it reads.

    Args:
        asked: "all", one expert or several; see above.

    Raises:
        ValueError: if an expert or network is unknown, or an expert comes twice.
    """
    items = [asked] if isinstance(asked, str) else list(asked)
    if not items:
        raise ValueError(f"no expert was asked for; choose from all, {', '.join(EXPERTS)}")
    chosen: dict[str, Choice] = {}
    for item in items:
        for choice in _parse(item):
            if choice.expert in chosen and item != "all":
                raise ValueError(f"{choice.expert} is asked for twice; name one network for it")
            # "all" fills up what was named one by one
            chosen.setdefault(choice.expert, choice)
    return _in_order(list(chosen.values()))


def load_networks(asked: str | Sequence[str], device: str | torch.device = "cpu") -> tuple[list[Network], list[str]]:
    """Load what can be loaded.

    Args:
        asked: see `choose`.
        device: where the networks run.

    Returns:
        The networks, in the order of `choose`, and one sentence for each that is missing.

    Raises:
        MissingWeights: if none can be loaded; with all the sentences.
        ValueError: as `choose`, or if a source holds something else.
    """
    networks, missing = [], []
    for choice in choose(asked):
        card = choice.network.card
        absent = set(card.needs) - {network.card.expert for network in networks}
        try:
            if absent:
                raise MissingWeights(
                    f"{card.name} makes {card.expert} from {', '.join(sorted(absent))}, which is not at work; "
                    f"ask for it too, or choose another network for {card.expert}"
                )
            networks.append(choice.network.load(choice.source, device))
        except MissingWeights as error:
            missing.append(f"{card.expert}: {error}")
    if not networks:
        raise MissingWeights("; ".join(missing))
    return networks, missing


def _parse(item: str) -> list[Choice]:
    if item == "all":
        return [Choice(expert, networks_of(expert)[0]) for expert in EXPERTS]
    expert, has_network, rest = item.partition("=")
    networks = networks_of(expert)
    if not has_network:
        return [Choice(expert, networks[0])]
    name, _, source = rest.partition("@")
    for network in networks:
        if network.card.name == name:
            return [Choice(expert, network, source or None)]
    names = ", ".join(network.card.name for network in networks)
    raise ValueError(f"unknown network {name!r} for {expert}; choose from {names}")


def _in_order(choices: list[Choice]) -> list[Choice]:
    placed: list[Choice] = []
    while choices:
        waiting = {choice.expert for choice in choices}
        ready = [choice for choice in choices if waiting.isdisjoint(choice.network.card.reads)]
        # what reads itself in a circle could never start
        assert ready, f"{sorted(waiting)} read each other"
        placed += ready
        choices = [choice for choice in choices if choice not in ready]
    return placed
