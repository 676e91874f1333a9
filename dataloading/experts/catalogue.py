"""The networks of each expert, and loading the networks that a user asks for.

A user asks for an expert with `EXPERT`, `EXPERT=NETWORK` or `EXPERT=NETWORK@SOURCE`, where the source is a local folder
or a hub id. "all" is every expert with its default network.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

import torch

from prismer.dataloading.experts.network import Network
from prismer.dataloading.experts.weights import MissingWeights
from prismer.errors import InputError
from prismer.experts import EXPERTS


@dataclass(frozen=True)
class ExpertRequest:
    """One expert that a user asks for.

    Attributes:
        expert: a key of EXPERTS.
        network: the network that makes its maps.
        source: folder or hub id of the weights; None is the network's default.
    """

    expert: str
    network: type[Network]
    source: str | None = None


def networks_of(expert: str) -> tuple[type[Network], ...]:
    """The networks that can make the maps of an expert, the default first.

    Raises:
        ValueError: if the expert is unknown.
    """
    if expert not in EXPERTS:
        raise InputError(f"unknown expert {expert!r}; choose from all, {', '.join(EXPERTS)}")
    return import_module(f"prismer.dataloading.experts.{EXPERTS[expert].module}").NETWORKS


def find_network(name: str) -> type[Network]:
    """The network called `name`.

    Raises:
        ValueError: if there is none.
    """
    known = {network.info.name: network for expert in EXPERTS for network in networks_of(expert)}
    if name not in known:
        raise InputError(f"unknown network {name!r}; choose from {', '.join(known)}")
    return known[name]


def parse_requests(asked: str | Sequence[str]) -> list[ExpertRequest]:
    """Parse what a user asks for, and sort it so that each network comes after its inputs.

    Args:
        asked: one item or several, in the form that the top of this file describes. "all" adds the experts that the
            items before it do not name.

    Raises:
        ValueError: if an expert or network is unknown, or an expert is named twice.
    """
    items = [asked] if isinstance(asked, str) else list(asked)
    if not items:
        raise InputError(f"no expert was asked for; choose from all, {', '.join(EXPERTS)}")
    requests: dict[str, ExpertRequest] = {}
    for item in items:
        for request in _parse(item):
            if request.expert in requests and item != "all":
                raise InputError(f"{request.expert} is asked for twice; name one network for it")
            requests.setdefault(request.expert, request)
    return _in_order(list(requests.values()))


def load_networks(asked: str | Sequence[str], device: str | torch.device = "cpu") -> tuple[list[Network], list[str]]:
    """Load the networks whose weights are on this machine.

    Args:
        asked: see `parse_requests`.
        device: where the networks run.

    Returns:
        The networks, in the order of `parse_requests`, and one sentence for each network that is missing.

    Raises:
        MissingWeights: if no network can be loaded; the message holds all the sentences.
        ValueError: as `parse_requests`, or if a source holds something else.
    """
    networks, missing = [], []
    for request in parse_requests(asked):
        info = request.network.info
        absent = set(info.inputs) - {network.info.expert for network in networks}
        try:
            if absent and info.inputs_required:
                raise MissingWeights(
                    f"{info.name} makes {info.expert} from {', '.join(sorted(absent))}, which is not loaded; "
                    f"ask for it too, or choose another network for {info.expert}"
                )
            networks.append(request.network.load(request.source, device))
        except MissingWeights as error:
            missing.append(f"{info.expert}: {error}")
    if not networks:
        raise MissingWeights("; ".join(missing))
    return networks, missing


def _parse(item: str) -> list[ExpertRequest]:
    if item == "all":
        return [ExpertRequest(expert, networks_of(expert)[0]) for expert in EXPERTS]
    expert, has_network, rest = item.partition("=")
    networks = networks_of(expert)
    if not has_network:
        return [ExpertRequest(expert, networks[0])]
    name, _, source = rest.partition("@")
    for network in networks:
        if network.info.name == name:
            return [ExpertRequest(expert, network, source or None)]
    names = ", ".join(network.info.name for network in networks)
    raise InputError(f"unknown network {name!r} for {expert}; choose from {names}")


def _in_order(requests: list[ExpertRequest]) -> list[ExpertRequest]:
    placed: list[ExpertRequest] = []
    while requests:
        waiting = {request.expert for request in requests}
        ready = [request for request in requests if waiting.isdisjoint(request.network.info.inputs)]
        assert ready, f"{sorted(waiting)} are inputs of each other"
        placed += ready
        requests = [request for request in requests if request not in ready]
    return placed
