"""Proves that batch norm over two processes equals batch norm over their joint batch, forward and backward; that its
running statistics stay fp32; that stems side by side are stems one by one, with two messages for all; and that
attention and adaptor are their formulas. Run: pytest tests/model/test_layers.py
"""

import multiprocessing
import socket

import pytest
import torch
import torch.distributed as dist
from torch import nn

from prismer.batch_norm import GlobalBatchNorm2d, norm_relu_conv
from prismer.kernels.modules import Adaptor, MultiheadAttention


def _norm_and_input() -> tuple[GlobalBatchNorm2d, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    norm = GlobalBatchNorm2d(5)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(4, 5, 3, 3) * torch.arange(1, 5)[:, None, None, None] + 7
    return norm, x, torch.randn(4, 5, 3, 3)


def _one_rank(rank: int, port: int, results) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    norm, x, dy = _norm_and_input()
    x = x[2 * rank : 2 * rank + 2].requires_grad_()
    y = norm(x)
    y.backward(dy[2 * rank : 2 * rank + 2])
    dist.all_reduce(norm.weight.grad)
    dist.all_reduce(norm.bias.grad)
    # numpy arrays: tensors would travel through shared memory that ends with this process
    results.put(
        (
            rank,
            *(
                t.detach().numpy()
                for t in (y, x.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var)
            ),
        )
    )
    dist.destroy_process_group()


def test_batch_norm_over_two_processes_is_that_of_the_joint_batch():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [context.Process(target=_one_rank, args=(rank, port, results)) for rank in range(2)]
    for worker in workers:
        worker.start()
    first, second = sorted((results.get(timeout=180) for _ in workers), key=lambda item: item[0])
    for worker in workers:
        worker.join(30)

    reference = nn.BatchNorm2d(5)
    norm, x, dy = _norm_and_input()
    reference.load_state_dict(norm.state_dict())
    x.requires_grad_()
    y = reference(x)
    y.backward(dy)
    expected = (y, x.grad, reference.weight.grad, reference.bias.grad, reference.running_mean, reference.running_var)
    names = ("y", "dx", "dweight", "dbias", "running_mean", "running_var")
    for i, (name, want) in enumerate(zip(names, expected, strict=True), start=1):
        parts = [torch.from_numpy(rank[i]) for rank in (first, second)]
        got = torch.cat(parts) if name in ("y", "dx") else parts[0]
        torch.testing.assert_close(got, want.detach(), rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def _stem_layers(dtype=torch.float32):
    """Two maps of different sizes, each with a norm and a convolution of its own, and gradients of the outputs."""
    torch.manual_seed(1)
    layers, maps, dys = [], [], []
    for channels, side in ((6, 5), (3, 8)):
        norm, conv = GlobalBatchNorm2d(channels), nn.Conv2d(channels, 4, 3, padding=1, bias=False)
        nn.init.normal_(norm.weight, 1, 0.3)
        nn.init.normal_(norm.bias)
        x = torch.randn(4, channels, side, side) * torch.arange(1, 5)[:, None, None, None] + 2
        layers.append((norm.to(dtype), conv.to(dtype)))
        maps.append(x.to(dtype, memory_format=torch.channels_last))
        dys.append(torch.randn(4, 4, side, side).to(dtype))
    return layers, maps, dys


def _run_stem_layers(run, layers, maps, dys):
    maps = [x.detach().requires_grad_() for x in maps]
    outputs = run(layers, maps)
    torch.autograd.backward(outputs, dys)
    found = {}
    for i, ((norm, conv), x, y) in enumerate(zip(layers, maps, outputs, strict=True)):
        found |= {f"y{i}": y, f"dx{i}": x.grad, f"dweight{i}": norm.weight.grad, f"dbias{i}": norm.bias.grad}
        found |= {f"dkernel{i}": conv.weight.grad, f"mean{i}": norm.running_mean, f"var{i}": norm.running_var}
        found |= {f"batches{i}": norm.num_batches_tracked}
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def _plain(layers, maps):
    outputs = []
    for (norm, conv), x in zip(layers, maps, strict=True):
        if x.requires_grad:
            norm.num_batches_tracked += 1
        y = nn.functional.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, True, 0.1, 1e-5)
        outputs.append(conv(torch.relu(y)))
    return outputs


def _stems_of_one_rank(rank: int, port: int, results) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    layers, maps, dys = _stem_layers()
    own = slice(2 * rank, 2 * rank + 2)
    messages, send = [], dist.all_reduce
    dist.all_reduce = lambda x, *args, **options: messages.append(x.numel()) or send(x, *args, **options)
    found = _run_stem_layers(norm_relu_conv, layers, [x[own] for x in maps], [dy[own] for dy in dys])
    dist.all_reduce = send
    for name in found:
        if name[:2] in ("dw", "db", "dk"):
            dist.all_reduce(found[name])
    results.put((rank, len(messages), {name: tensor.numpy() for name, tensor in found.items()}))
    dist.destroy_process_group()


def test_stems_over_two_processes_are_those_of_the_joint_batch_in_two_messages():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [context.Process(target=_stems_of_one_rank, args=(rank, port, results)) for rank in range(2)]
    for worker in workers:
        worker.start()
    ranks = sorted((results.get(timeout=180) for _ in workers), key=lambda item: item[0])
    for worker in workers:
        worker.join(30)
    expected = _run_stem_layers(_plain, *_stem_layers())
    for name, want in expected.items():
        parts = [torch.from_numpy(found[name]) for _, _, found in ranks]
        got = torch.cat(parts) if name[:1] == "y" or name[:2] == "dx" else parts[0]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    # the statistics forward and the sums backward, for all maps together
    assert [messages for _, messages, _ in ranks] == [2, 2]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_stems_side_by_side_are_stems_one_by_one(dtype):
    together = _run_stem_layers(norm_relu_conv, *_stem_layers(dtype))
    layers, maps, dys = _stem_layers(dtype)

    def one_by_one(layers, maps):
        return [norm_relu_conv([pair], [x])[0] for pair, x in zip(layers, maps, strict=True)]

    alone = _run_stem_layers(one_by_one, layers, maps, dys)
    for name, tensor in together.items():
        assert torch.equal(tensor, alone[name]), name


def test_batch_norm_statistics_stay_fp32():
    norm, x, _ = _norm_and_input()
    norm = norm.bfloat16()
    assert norm.weight.dtype == torch.bfloat16
    y = norm(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert norm.running_mean.dtype == norm.running_var.dtype == torch.float32
    reference = nn.BatchNorm2d(5)
    reference(x.bfloat16().float())
    torch.testing.assert_close(norm.running_mean, reference.running_mean)
    assert norm.eval()(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("with_context", [False, True])
def test_packed_attention_is_multihead_attention(with_context):
    torch.manual_seed(0)
    ours, theirs = MultiheadAttention(24, 3), nn.MultiheadAttention(24, 3, batch_first=True)
    for p in ours.parameters():
        nn.init.normal_(p, std=0.5)
    theirs.load_state_dict(ours.state_dict())
    x, context = torch.randn(2, 5, 24), torch.randn(2, 9, 24)
    source = context if with_context else x
    expected = theirs(x, source, source)[0]
    torch.testing.assert_close(ours(x, context if with_context else None), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("late", [False, True])
def test_an_adaptor_is_its_formula(late):
    torch.manual_seed(0)
    adaptor = Adaptor(8, late=late)
    for p in adaptor.parameters():
        nn.init.normal_(p)
    x = torch.randn(3, 8)
    norm = nn.functional.layer_norm
    inner = x if late else norm(x, (8,), adaptor.norm.weight, adaptor.norm.bias)
    hidden = torch.relu(inner @ adaptor.down.weight.T + adaptor.down.bias) ** 2
    expected = x + hidden @ adaptor.up.weight.T + adaptor.up.bias
    if late:
        expected = norm(expected, (8,), adaptor.norm.weight, adaptor.norm.bias)
    torch.testing.assert_close(adaptor(x), expected, rtol=1e-4, atol=1e-4)
