"""Proves that what runs a call is remembered for calls like it alone, and never serves a call that is traced.

Run: pytest tests/ops/test_plans.py
"""

import functools
import warnings
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from prismer.kernels import dispatch, mlp, tuning
from prismer.kernels.activation import OP as ACTIVATION
from prismer.kernels.activation import bias_activation
from prismer.kernels.adaptor import OP as ADAPTOR
from prismer.kernels.adaptor import adaptor
from prismer.kernels.attention import attention
from prismer.kernels.cross_attention import cross_attention
from prismer.kernels.cross_entropy import linear_cross_entropy
from prismer.kernels.decode_attention import decode_attention
from prismer.kernels.dispatch import TORCH, Op, use_backend
from prismer.kernels.few_rows import few_rows_linear
from prismer.kernels.instance_rows import add_instance_rows
from prismer.kernels.label_map import label_map
from prismer.kernels.layer_norm import OP as NORM
from prismer.kernels.layer_norm import add_layer_norm, layer_norm
from prismer.kernels.linear import OP as LINEARS
from prismer.kernels.linear import linears
from prismer.kernels.mlp import OP as MLP
from prismer.kernels.patch.gated_mlp import gated_mlp
from prismer.kernels.patch.resampler_projections import resampler_projections
from prismer.kernels.patch.rms_norm import add_rms_norm, rms_norm
from prismer.kernels.patch.rotary import rotary
from prismer.kernels.resampler_attention import resampler_attention
from prismer.kernels.tuning.tables import Entry, Table

pytestmark = pytest.mark.cpu

R, D, E, H = 6, 16, 24, 2
MASK = torch.arange(5) < torch.tensor([[5], [3]])
IDS, ROWS = torch.arange(2 * 16, dtype=torch.uint8).view(2, 4, 4) % 3, torch.arange(256).expand(2, 256) % 3
LABELS = torch.tensor([1, -100, 3, 0, 2, 1])
ANCESTORS = torch.tensor([[[0, -1], [0, 1]]])

# by name: the shapes of the tensors that may need a gradient, and the call
CALLS = {
    "layer_norm": (((2, 3, D), (D,), (D,)), layer_norm),
    "layer_norm of a matrix": (((R, D), (D,), (D,)), layer_norm),
    "add_layer_norm": (((R, D), (R, D), (D,), (D,)), lambda *t: torch.cat(add_layer_norm(*t))),
    "bias_activation": (((2, 3, D), (D,)), lambda h, bias: bias_activation(h, bias, "quick_gelu")),
    "mlp": (((R, D), (E, D), (E,), (D, E), (D,)), functools.partial(mlp.mlp, activation="gelu")),
    "mlp with quick_gelu": (
        ((2, 3, D), (E, D), (E,), (D, E), (D,)),
        functools.partial(mlp.mlp, activation="quick_gelu"),
    ),
    "adaptor": (((R, D), (D,), (D,), (D, D), (D,), (D, D), (D,)), functools.partial(adaptor, late=False)),
    "late adaptor": (((2, 3, D), (D,), (D,), (D, D), (D,), (D, D), (D,)), functools.partial(adaptor, late=True)),
    "linears": (((2, 3, D), (E, D), (E,), (E, D)), lambda x, w, b, v: torch.cat(linears(x, [(w, b), (v, None)]))),
    "attention": (
        ((2, H, 3, 32), (2, H, 5, 32), (2, H, 5, 32)),
        lambda q, k, v: attention(q, k, v, key_mask=MASK.to(q.device)),
    ),
    "attention of torch's operators": (
        ((2, H, 3, 32), (2, H, 5, 32), (2, H, 5, 32)),
        lambda q, k, v: attention(q, k, v, key_mask=MASK.to(q.device), backend="torch"),
    ),
    "linear_cross_entropy": (
        ((R, D), (5, D), (5,)),
        lambda x, w, b: linear_cross_entropy(x, w, b, LABELS.to(x.device), reduction="mean"),
    ),
    "losses of rows": (((R, D), (5, D), (5,)), lambda x, w, b: linear_cross_entropy(x, w, b, LABELS.to(x.device))),
    "label_map": (((3, D),), lambda f: label_map(IDS.to(f.device), ROWS.to(f.device), f, 6)),
    "instance_rows": (
        ((2, 4, D), (3, D), (4, D)),
        lambda x, table, p: add_instance_rows(x, IDS.to(x.device), table, None, 2, p),
    ),
    "few_rows_linear": (((2, 3, D), (E, D), (E,)), few_rows_linear),
    "rms_norm": (((2, 3, D), (D,)), rms_norm),
    "add_rms_norm": (((2, 3, D), (2, 3, D), (D,)), lambda *t: torch.cat(add_rms_norm(*t))),
    "gated_mlp": (((2, 3, D), (E, D), (E,), (E, D), (E,), (D, E), (D,)), gated_mlp),
    "rotary": (
        ((2, 5, 3, H, 8),),
        lambda x: rotary(x, *torch.linspace(-1, 1, 64, device=x.device).view(2, 4, 8), 2),
    ),
    "resampler_projections": (
        ((2, 3, D), (2, 4, D), (D,), (D,), (E, D), (D, D), (D, D)),
        lambda *t: torch.cat([part.flatten() for part in resampler_projections(*t)]),
    ),
    "cross_attention": (
        ((2, 3, D), (2, 5, E), (D, E), (D,), (D, E), (D,)),
        lambda *t: cross_attention(*t, H, order="absorbed"),
    ),
    "resampler_attention": (
        ((2, 3, D), (2, 5, D), (D,), (D,), (3 * D, D), (3 * D,)),
        lambda *t: resampler_attention(*t, H, order="absorbed"),
    ),
    "decode_attention": (
        ((1, H, 2, D), *[(1, H, 3, D)] * 4),
        lambda q, k, v, *others: decode_attention(
            q, k, v, torch.ones(1, 3, dtype=torch.bool, device=q.device), *others, ANCESTORS.to(q.device)
        ),
    ),
}
TRAINED = [name for name in CALLS if name != "decode_attention"]
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def draw(name, dtype=torch.float32, gradient=False, device="cpu"):
    generator = torch.Generator().manual_seed(5)
    made = (torch.randn(shape, generator=generator).to(device, dtype) for shape in CALLS[name][0])
    return [t.requires_grad_(gradient) for t in made]


def run(name, *tensors):
    return CALLS[name][1](*tensors)


def remember(name):
    """Fill the memory with plans of the same shapes, of other kinds."""
    for dtype, gradient in ((torch.float32, name in TRAINED), (torch.float32, False), (torch.float64, False)):
        run(name, *draw(name, dtype, gradient))
    run(name, *draw(name, device="meta"))


def cold(function):
    """The result of a function that remembers nothing."""
    tuning.generation += 1
    return function()


def gradients(name, tensors):
    y = run(name, *tensors)
    return y, *torch.autograd.grad(y, tensors, torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape))


# sums of another order, of numbers far above 1
close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)


def same(ours, expected):
    assert len(ours) == len(expected)
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.fixture(params=CALLS)
def name(request):
    remember(request.param)
    return request.param


@pytest.fixture(params=TRAINED)
def trained(request):
    remember(request.param)
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_and_gradients_are_those_of_the_definition(trained, dtype):
    tensors = draw(trained, dtype, gradient=True)
    for _ in range(2):
        ours = gradients(trained, tensors)
    same(ours, cold(lambda: gradients(trained, tensors)))
    with use_backend("reference"):
        expected = gradients(trained, tensors)
    # how far 16 bits may be off is for the tests of each op
    if dtype != torch.bfloat16:
        close([*ours], [*expected])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("context", (torch.no_grad, torch.inference_mode))
def test_without_a_gradient_the_numbers_are_the_same(name, dtype, context):
    tensors = draw(name, dtype, gradient=name in TRAINED)
    with context():
        ours = run(name, *tensors)
        same([ours], [cold(lambda: run(name, *tensors))])
        with use_backend("reference"):
            expected = run(name, *tensors)
    assert not ours.requires_grad and ours.is_inference() == (context is torch.inference_mode)
    if dtype != torch.bfloat16:
        close(ours, expected)


# the others have no kernel in Triton, or name their backend
NO_TRITON = (
    "linears",
    "few_rows_linear",
    "rms_norm",
    "add_rms_norm",
    "gated_mlp",
    "rotary",
    "resampler_projections",
    "cross_attention",
    "attention of torch's operators",
)
IN_TRITON = [n for n in CALLS if n not in NO_TRITON]


@pytest.mark.parametrize("name", IN_TRITON)
def test_prepared_launches_give_the_numbers_of_the_definition(name, running):
    """Twice with other tensors: a launch that is kept must not keep them."""
    for scale in (1, 2):
        with torch.no_grad(), running("triton"):
            tensors = [scale * t for t in draw(name)]
            with use_backend("triton"):
                ours = run(name, *tensors)
            with use_backend("reference"):
                close(ours, run(name, *tensors), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("gradient", (False, True))
def test_autocast_is_left_to_torchs_operators_as_before(trained, gradient):
    tensors = draw(trained, gradient=gradient)
    with torch.autocast("cpu", torch.bfloat16):
        ours = run(trained, *tensors)
        same([ours], [cold(lambda: run(trained, *tensors))])
    assert ours.requires_grad == gradient


def test_a_checkpoint_gives_the_same_gradients(trained):
    tensors = draw(trained, gradient=True)
    y = checkpoint(run, trained, *tensors, use_reentrant=False)
    dy = torch.linspace(-1, 1, y.numel()).view(y.shape)
    same((y, *torch.autograd.grad(y, tensors, dy)), gradients(trained, tensors))


def test_hooks_see_what_is_saved(trained):
    packed = []
    tensors = draw(trained, gradient=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t.clone()) or packed[-1], lambda t: t):
        ours = gradients(trained, tensors)
    assert packed
    same(ours, gradients(trained, tensors))


def test_only_a_leaf_that_trains_gets_a_gradient(trained):
    """A plan for one set of leaves does not serve another."""
    for i in range(len(CALLS[trained][0])):
        tensors = draw(trained)
        tensors[i].requires_grad_()
        y = run(trained, *tensors)
        assert y.requires_grad
        (ours,) = torch.autograd.grad(y.sum(), tensors[i])
        with use_backend("reference"):
            (expected,) = torch.autograd.grad(run(trained, *tensors).sum(), tensors[i])
        close(ours, expected)


def test_parameters_and_tensors_are_alike(name):
    tensors = draw(name)
    frozen = [torch.nn.Parameter(t, requires_grad=False) for t in tensors]
    same([run(name, *tensors)], [run(name, *frozen)])


class Names(TorchDispatchMode):
    """The operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.name())
        return function(*args, **(kwargs or {}))


def registered(name):
    """The op that a traced call shows, or None where attention takes torch's own."""
    plain = name.split()[0].removeprefix("add_").removeprefix("late_")
    known = {"late": "adaptor", "losses": "linear_cross_entropy"}
    return None if name == "attention" else f"prismer::{known.get(plain, plain)}"


def test_a_dispatch_mode_sees_the_registered_op(name):
    tensors = draw(name)
    with Names() as mode:
        ours = run(name, *tensors)
    close(ours, run(name, *tensors))
    assert registered(name) in (None, *mode.names)


def test_fake_tensors_stay_fake(name):
    expected = run(name, *draw(name))
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in draw_real(name)]
        out = run_fake(name, fakes)
    assert isinstance(out, FakeTensor) and (out.shape, out.dtype) == (expected.shape, expected.dtype)


@functools.cache
def draw_real(name):
    return draw(name)


def run_fake(name, fakes):
    with FakeTensorMode(allow_non_fake_inputs=True):
        return run(name, *fakes)


def test_meta_tensors_stay_on_meta(name):
    out, expected = run(name, *draw(name, device="meta")), run(name, *draw(name))
    assert out.device.type == "meta" and (out.shape, out.dtype) == (expected.shape, expected.dtype)


def test_a_compiled_call_holds_the_registered_op(name):
    graphs = []

    def backend(graph, inputs):
        graphs.append(str(graph.code))
        return graph

    torch._dynamo.reset()
    tensors = draw(name)
    compiled = torch.compile(functools.partial(run, name), backend=backend, fullgraph=True)
    close(compiled(*tensors), run(name, *tensors))
    op = registered(name)
    assert op is None or any(op.replace("::", ".") in code for code in graphs)


class Module(torch.nn.Module):
    def __init__(self, name):
        super().__init__()
        self.name = name

    def forward(self, *tensors):
        return run(self.name, *tensors)


def test_an_exported_call_holds_the_registered_op(name):
    tensors = draw(name)
    program = torch.export.export(Module(name), tuple(tensors))
    close(program.module()(*tensors), run(name, *tensors))
    op = registered(name)
    assert op is None or op.replace("::", ".") in str(program.graph)


def outcome(function):
    """The tensors that a transform gives, or the type of its error."""
    with warnings.catch_warnings():
        # of torch, where an op has no rule for batches
        warnings.simplefilter("ignore")
        try:
            found = function()
        except (NotImplementedError, RuntimeError) as error:
            return type(error)
    return [t for t in (found if isinstance(found, tuple) else (found,)) if t is not None]


def transforms(name, tensors):
    call = functools.partial(run, name)
    first, *others = tensors
    yield lambda: torch.func.grad(lambda *t: call(*t).float().sum(), argnums=tuple(range(len(tensors))))(*tensors)
    yield lambda: torch.func.vmap(lambda t: call(t, *others))(torch.stack((first, -first)))
    yield lambda: torch.func.jvp(lambda t: call(t, *others), (first,), (first,))


def test_transforms_of_torch_func_do_what_they_did(trained):
    """The numbers or the refusal of a process that remembers nothing."""
    tensors = draw(trained)
    for transform in transforms(trained, tensors):
        ours, expected = outcome(transform), cold(lambda t=transform: outcome(t))
        if isinstance(expected, type):
            assert ours is expected
        else:
            same(ours, expected)


@pytest.mark.parametrize("name", ("mlp", "adaptor", "attention", "decode_attention"))
def test_a_prepared_launch_knows_the_strides(name, running):
    """Of tensors that have the same shapes, and whose last two dimensions lie the other way round in memory."""
    with torch.no_grad(), running("triton"):
        for _ in range(2):
            tensors = draw(name)
            turned = [t.mT.contiguous().mT if t.dim() > 1 else t for t in tensors]
            expected = run(name, *tensors)
            close(run(name, *turned), expected, rtol=1e-3, atol=1e-3)
            close(run(name, tensors[0], *turned[1:]), expected, rtol=1e-3, atol=1e-3)


# what a plan depends on


def taken(function):
    """What each op took, by its name."""
    with tuning.recording() as found:
        function()
    return {key[0]: choice for (_, key), choice in found.items()}


class Planned:
    """Counts the plans of a toy op, whose plan says what it was made for."""

    def __init__(self):
        self.op, self.count, self.setting = None, 0, 0
        self.op = Op(name="toy", reference=None, backends=(TORCH,), depends=lambda: self.setting)

    def plan(self, *args):
        self.count += 1
        return f"plan {self.count}"

    def __call__(self, *args, **options):
        """The positional arguments are tensors or None, until the first that is not."""
        count = next((i for i, arg in enumerate(args) if isinstance(arg, (bool, int, float, str))), len(args))
        return self.op.resolve(self.plan, args[:count], *args[count:])


@pytest.fixture(params=(True, False), ids=("guards", "keys"))
def guards(request, monkeypatch):
    """With the guards of torch.compile, which are tried first, and where torch has none."""
    if not request.param:
        monkeypatch.setattr(dispatch, "_TensorGuards", None)
    return request.param


def test_a_plan_is_made_once_for_each_class_of_calls(guards):
    planned, x = Planned(), torch.randn(2, 3)
    first = planned(x, None, 0.5, "gelu", True)
    assert planned(torch.randn(2, 3), None, 0.5, "gelu", True) == first and planned.count == 1
    for other in (
        (torch.randn(3, 2), None, 0.5, "gelu", True),
        (torch.randn(3, 2).T, None, 0.5, "gelu", True),
        (x.double(), None, 0.5, "gelu", True),
        (x.to("meta"), None, 0.5, "gelu", True),
        (torch.randn(2, 3, requires_grad=True), None, 0.5, "gelu", True),
        (x, x, 0.5, "gelu", True),
        (x, None, 0.25, "gelu", True),
        (x, None, 0.5, "relu", True),
        (x, None, 0.5, "gelu", False),
    ):
        assert planned(*other) != first
        assert planned(*other) == f"plan {planned.count}"
    assert planned.count == 10 and planned(x, None, 0.5, "gelu", True) == first


def test_plans_differ_by_the_number_of_tensors_and_by_which_are_none(guards):
    planned, x, y = Planned(), torch.randn(2, 3), torch.randn(2, 3)
    calls = (x,), (x, y), (x, None), (None, x), (x, None, None), (None, x, None), (x, y, None), (x, None, y)
    first = [planned(*call) for call in calls]
    assert len(set(first)) == len(calls)
    assert [planned(*call) for call in calls] == first


def test_plans_differ_by_their_function(guards):
    planned, x = Planned(), torch.randn(2, 3)
    assert planned(x) == "plan 1"
    assert planned.op.resolve(lambda x: "another", (x,)) == "another"
    assert planned(x) == "plan 1"


def test_one_tensor_for_two_arguments_is_planned_once(guards):
    planned, x = Planned(), torch.randn(2, 3)
    assert planned(x, x) == planned(x, x) == planned(x, torch.randn(2, 3)) == "plan 1"


def test_plans_differ_by_the_type_that_autocast_gives(guards):
    planned, x = Planned(), torch.randn(2, 3)
    for _ in range(2):
        assert planned(x) == "plan 1"
        with torch.autocast("cpu", torch.bfloat16):
            assert planned(x) == "plan 2"


def refuse(*_):
    raise AssertionError("the key of the call was formed")


def test_no_key_is_formed_for_a_call_like_a_recent_one(monkeypatch):
    planned = Planned()
    inside = torch.no_grad, torch.inference_mode, functools.partial(torch.autocast, "cpu", torch.bfloat16)
    for context in inside:
        with context():
            calls = [(torch.randn(2, 3), None), (torch.randn(3), torch.randn(3)), (torch.randn(2, 3).T, None, "gelu")]
            for call in calls:
                planned(*call)
            with monkeypatch.context() as patched:
                patched.setattr(Op, "_look_up", refuse)
                for call in calls:
                    planned(*call)
    with pytest.raises(AssertionError, match="was formed"), monkeypatch.context() as patched:
        patched.setattr(Op, "_look_up", refuse)
        planned(torch.randn(2, 3), None)


def test_a_remembered_call_keeps_no_tensor_alive(guards):
    planned, x, y = Planned(), torch.randn(2, 3), torch.nn.Parameter(torch.randn(2, 3))
    planned(x, None, y)
    alive = [weakref.ref(t) for t in (x, y)]
    del x, y
    assert [reference() for reference in alive] == [None, None]


def test_a_plan_is_made_anew_where_something_else_changed(guards):
    planned, x = Planned(), torch.randn(2, 3)
    assert planned(x) == "plan 1"
    with torch.no_grad():
        assert planned(x) == "plan 2"
    with use_backend("torch"):
        assert planned(x) == "plan 3"
    with use_backend("layer_norm:torch"):
        assert planned(x) == "plan 4"
    planned.setting = 1
    assert planned(x) == "plan 5"
    planned.setting = 0
    assert planned(x) == "plan 1"
    with tuning.forcing({}):
        assert planned(x) == "plan 6"
    assert planned(x) == "plan 7" == planned(x)


class Functions(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def test_a_traced_call_is_planned_anew_however_often_its_like_was_seen(guards):
    planned, x = Planned(), torch.randn(2, 3)
    for i in range(2):
        planned(x)
        assert planned.count == 1 + 6 * i
        with Names():
            planned(x)
        with Functions():
            planned(x)
        with dispatch.as_if_watched(True):
            planned(x)
        with torch.autograd.forward_ad.dual_level():
            planned(x)
        torch.func.vmap(lambda t: planned(t) and t)(x)
        torch.func.grad(lambda t: planned(x) and t.sum())(x)
        assert planned.count == 1 + 6 * (i + 1)


def test_what_a_counter_did_not_see_is_planned_anew_when_it_sees_it(guards):
    planned, x = Planned(), torch.randn(2, 3)
    with Names():
        with dispatch.as_if_watched(False):
            assert planned(x) == planned(x) == "plan 1"
        assert (planned(x), planned(x)) == ("plan 2", "plan 3")
    assert planned(x) == "plan 1"


def test_nothing_is_remembered_of_what_is_traced_or_unknown(guards):
    planned, x = Planned(), torch.randn(2, 3)
    with Names():
        planned(x)
    with dispatch.as_if_watched(True):
        planned(x)
    with torch.autograd.forward_ad.dual_level():
        planned(x)
    torch.func.vmap(lambda t: planned(t) and t)(x)
    planned([x])
    planned(torch.Tensor._make_subclass(type("Sub", (torch.Tensor,), {}), x))
    assert planned.count == 6 and not planned.op._plans
    planned(x)
    assert planned.count == 7 and len(planned.op._plans) == 1


def test_a_failed_check_is_not_remembered():
    x, weight = torch.randn(4, 6), torch.randn(6)
    layer_norm(x, weight, weight)
    for _ in range(2):
        with pytest.raises(ValueError, match="weight is"):
            layer_norm(x, weight[:5], weight)
        with pytest.raises(ValueError, match="storage alone"), use_backend("layer_norm:torch"):
            layer_norm(x.to(torch.float8_e4m3fn), None, None)


def test_few_plans_are_kept(monkeypatch):
    monkeypatch.setattr(dispatch, "_MOST_REMEMBERED", 3)
    planned = Planned()
    for n in range(10):
        planned(torch.empty(n))
    assert len(planned.op._plans) <= 3 and len(planned.op._recent) <= dispatch._MOST_RECENT


def test_a_plan_holds_no_tensor():
    """A tensor in a plan would stay in memory as long as the process."""
    for name in CALLS:
        remember(name)
    seen, found = set(), []
    todo = [plan for op in dispatch.all_ops() for plan in op._plans.values()]
    assert len(todo) > 50
    while todo:
        thing = todo.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            found.append(thing)
        elif isinstance(thing, functools.partial):
            todo += [thing.func, *thing.args, *thing.keywords.values()]
        elif isinstance(thing, tuple | list):
            todo += thing
        elif getattr(thing, "__closure__", None):
            todo += [cell.cell_contents for cell in thing.__closure__]
    assert found == []


def norm_entry(choice, rows=R):
    return Entry(op="layer_norm", dtype="float32", gradient=False, shape=(8, D, 0), choice=choice, prior="host")


def norm_of(x, weight):
    """Whether a call is torch's own operator or the op, as the profiler sees it, which traces nothing."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        layer_norm(x, weight, weight)
    names = {event.name for event in profile.events() if event.cpu_parent is None}
    if "aten::layer_norm" in names:
        return "host"
    return "torch" if "aten::native_layer_norm" in names else "reference"


def test_a_request_counts_at_once():
    x, weight = draw("layer_norm of a matrix")[:2]
    assert norm_of(x, weight) == "host"
    for backend in ("layer_norm:torch", "reference", "torch"):
        with use_backend(backend):
            assert norm_of(x, weight) == norm_of(x, weight) == backend.removeprefix("layer_norm:")
        assert norm_of(x, weight) == "host"


def test_a_table_counts_at_once():
    x, weight = draw("layer_norm of a matrix")[:2]
    before, key = tuning.table("cpu"), ("layer_norm", torch.float32, False, (8, D, 0))
    try:
        for choice in ("host", "torch", "host"):
            entry = Entry(op=key[0], dtype="float32", gradient=False, shape=key[3], choice=choice, prior="host")
            tuning.use_table("cpu", Table(entries=(entry,)))
            assert norm_of(x, weight) == norm_of(x, weight) == choice
    finally:
        tuning.use_table("cpu", before)
    for choice in ("torch", "host"):
        with tuning.forcing({key: choice}):
            assert norm_of(x, weight) == norm_of(x, weight) == choice


def test_the_instruction_set_counts_at_once(monkeypatch):
    chosen = []
    monkeypatch.setattr("prismer.kernels.attention._choose", lambda *_, **facts: chosen.append(facts) or "sdpa")
    q = torch.randn(1, 1, 3, 16)
    for isa in ("avx2", "avx2", "baseline", "avx2"):
        monkeypatch.setenv("PRISMER_CPU_ISA", isa)
        attention(q, q, q)
    assert len(chosen) == 2
    torch.use_deterministic_algorithms(True)
    try:
        attention(q, q, q)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(chosen) == 3


@pytest.mark.parametrize("op", (MLP, LINEARS, ADAPTOR), ids=lambda op: op.name)
def test_a_setting_of_torch_counts_at_once(op, monkeypatch):
    routes = []
    monkeypatch.setattr(Op, "route", lambda self, *_: routes.append(self.name) or "host")
    name = op.name
    for enabled in (True, False, True):
        with torch.backends.mkldnn.flags(enabled=enabled):
            run(name, *draw(name))
    assert routes.count(name) == 2


def test_recording_sees_calls_that_were_remembered():
    h, bias = draw("bias_activation")
    bias_activation(h, bias, "gelu")
    key = "bias_activation"
    assert set(taken(lambda: bias_activation(h, bias, "gelu"))) == {key}
    assert set(taken(lambda: bias_activation(h, bias, "gelu"))) == {key}
    assert NORM.name not in taken(lambda: bias_activation(h, bias, "gelu")) and ACTIVATION._plans
