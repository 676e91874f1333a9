"""Proves, without a GPU, that the step of beam search and a pass of ranking can be recorded as CUDA graphs.

A stand-in records the operators and replays them on the same memory (graph_stand_in.py). Results equal the eager ones,
for other images, prompts and weights than those of the recording. A program that reads a value on the host, keeps a
tensor, or counts in Python is refused or gives other results.

Run: pytest tests/model/test_capture.py
"""

import gc
import threading
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from prismer import capture, generation
from prismer.costs.counting import CostCounter
from prismer.generation import BeamSearch, beam_search, read_prompts
from prismer.kernels import dispatch
from prismer.ranking import AnswerTrie, rank_answers
from tests.model.graph_stand_in import CannotRecord, RefuseHostMethods, install, recordings_of, storage
from tests.model.test_generation import PLAIN, build_decoder, draw_context, draw_prompts
from tests.model.test_ranking import ANSWERS, END

TRIE = AnswerTrie(ANSWERS, END)


@pytest.fixture
def graphs(monkeypatch):
    """Recording on the CPU, with the ops that a watched program sees, so that eager runs take the same ones."""
    install(monkeypatch)
    with dispatch.as_if_watched(True):
        yield


def eagerly(function, *args, **options):
    with capture.eager():
        return function(*args, **options)


def check_memory(recording, decoder, *results):
    """The graph reads its arguments and weights alone, keeps nothing alive, and lends no memory to the results."""
    graph = recording._graph
    arguments = {storage(leaf) for leaf in tree_leaves(recording.arguments)}
    weights = {storage(weight) for weight in (*decoder.parameters(), *decoder.buffers())}
    assert set(graph.outside) <= arguments | weights, "the program reads memory that nobody keeps for it"
    assert graph.escaped(recording.result) == []
    assert not {storage(t) for t in results} & (arguments | set(graph._fresh))


@pytest.mark.parametrize("dtype", (pytest.param(torch.float64, marks=pytest.mark.long), torch.float32), ids=str)
@pytest.mark.parametrize("end_bias", (-30.0, 1.8, 2.5, 60.0))
@pytest.mark.parametrize("options", (dict(), dict(beams=1), dict(beams=4, length_penalty=-1.0, scoring="modern")))
def test_replayed_searches_equal_eager_ones(graphs, options, end_bias, dtype):
    """The second search is recorded; it and the following ones replay steps on images and prompts of their own."""
    decoder, options = build_decoder(3, dtype, end_bias), {**PLAIN, **options}
    lengths = [[3, 6], [5]]
    for seed in range(4):
        context, groups = draw_context(2, seed, dtype), draw_prompts(lengths, seed)
        ours = beam_search(decoder, context, groups, **options)
        expected = eagerly(beam_search, decoder, context, groups, **options)
        assert ours.tokens == expected.tokens
        torch.testing.assert_close(ours.scores, expected.scores)
        assert len(recordings_of(decoder)) == min(seed, 1)
    (recording,) = recordings_of(decoder)
    # three searches: to the limit if nothing ends, and no further than the end of all prompts
    replays, most = recording._graph.replays, 3 * (options["max_new_tokens"] - 1)
    assert replays == most if end_bias < 0 else 0 < replays < most if end_bias > 10 else 0 < replays <= most
    check_memory(recording, decoder, ours.scores)


@pytest.mark.parametrize("top_k", (4, None))
@pytest.mark.parametrize("max_tokens", (8192, 60))
def test_replayed_rankings_equal_eager_ones(graphs, top_k, max_tokens):
    """Padding to classes of sizes changes no score, and short lists are one pass."""
    decoder, lengths = build_decoder(1), [[5, 2, 8], [], [3], [7, 7]]
    for seed in range(4):
        context, groups = draw_context(4, seed), draw_prompts(lengths, seed)
        ours = rank_answers(decoder, context, groups, TRIE, top_k=top_k, max_tokens=max_tokens)
        expected = eagerly(rank_answers, decoder, context, groups, TRIE, top_k=top_k, max_tokens=max_tokens)
        assert torch.equal(ours.candidates, expected.candidates) and torch.equal(ours.best, expected.best)
        torch.testing.assert_close(ours.scores, expected.scores)
    for recording in recordings_of(decoder):
        check_memory(recording, decoder, ours.scores)
        assert recording._graph.replays
    assert len(recordings_of(decoder)) == 1


@pytest.mark.parametrize("read_out", ("pad", "last", "batch"))
def test_padding_to_classes_of_sizes_changes_no_result(graphs, monkeypatch, read_out):
    decoder, context, groups = build_decoder(1), draw_context(2), draw_prompts([[4, 6], [5]])
    padded = rank_answers(decoder, context, groups, TRIE, read_out=read_out)
    generated = beam_search(decoder, context, groups, read_out=read_out, **PLAIN)
    monkeypatch.setattr(capture, "_DEVICES", ("cuda",))
    exact = rank_answers(decoder, context, groups, TRIE, read_out=read_out)
    torch.testing.assert_close(padded.scores, exact.scores)
    expected = beam_search(decoder, context, groups, read_out=read_out, **PLAIN)
    assert generated.tokens == expected.tokens
    torch.testing.assert_close(generated.scores, expected.scores)


def test_done_prompts_stay_as_they_are_in_replays(graphs):
    """With a penalty that favours length, better hypotheses after a prompt is done are ignored."""
    decoder, options = build_decoder(0, end_bias=2.5), {**PLAIN, "beams": 2, "length_penalty": 2.0, "min_new_tokens": 1}
    for seed in range(3):
        case = draw_context(8, seed), draw_prompts([[4]] * 8, seed)
        ours = beam_search(decoder, *case, **options)
        expected = eagerly(beam_search, decoder, *case, **options)
        assert ours.tokens == expected.tokens
        torch.testing.assert_close(ours.scores, expected.scores)
    assert recordings_of(decoder)


def test_searches_of_one_shape_share_their_memory(graphs):
    """Beam search and ranking read the same images and prompts: their copies exist once."""
    decoder, context, groups = build_decoder(1), draw_context(2), draw_prompts([[4], [6]])
    for _ in range(2):
        beam_search(decoder, context, groups, **PLAIN)
        rank_answers(decoder, context, groups, TRIE, read_out="last")
    search, ranking = recordings_of(decoder)
    (cross, prompts, *_), _ = search.arguments
    shared = {storage(leaf) for leaf in tree_leaves((cross, prompts))}
    assert shared == {storage(leaf) for leaf in tree_leaves(ranking.arguments[:2])}


def test_weights_may_change_in_place_and_may_move(graphs):
    decoder, context, groups = build_decoder(3), draw_context(2), draw_prompts([[4], [6]])

    def check():
        ours = beam_search(decoder, context, groups, **PLAIN)
        expected = eagerly(beam_search, decoder, context, groups, **PLAIN)
        assert ours.tokens == expected.tokens
        torch.testing.assert_close(ours.scores, expected.scores)
        return ours.scores

    check()
    before = check()
    (first,) = recordings_of(decoder)
    with torch.no_grad():
        for weight in decoder.parameters():
            weight.data.mul_(0.9)
    assert not torch.equal(check(), before) and recordings_of(decoder) == [first]
    decoder.layers[0].mlp.output.weight = torch.nn.Parameter(decoder.layers[0].mlp.output.weight * 2)
    check()
    assert first not in recordings_of(decoder)
    check()
    assert len(recordings_of(decoder)) == 1


def test_each_request_for_a_backend_has_its_own_recording(graphs):
    decoder = build_decoder(3)
    for number, backend in enumerate(("torch", "mlp:torch", "reference"), start=1):
        with dispatch.use_backend(backend):
            for _ in range(2):
                beam_search(decoder, draw_context(1), [[[0, 5]]], **PLAIN)
        assert len(recordings_of(decoder)) == number


def test_a_recording_that_fails_is_reported_once_and_runs_eagerly(graphs, monkeypatch):
    class Broken:
        def __init__(self):
            raise torch.AcceleratorError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Broken)
    decoder, context = build_decoder(3), draw_context(1)
    expected = eagerly(beam_search, decoder, context, [[[0, 5]]], **PLAIN)
    beam_search(decoder, context, [[[0, 5]]], **PLAIN)
    with pytest.warns(UserWarning, match="was not recorded.*stream is capturing"):
        second = beam_search(decoder, context, [[[0, 5]]], **PLAIN)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        third = beam_search(decoder, context, [[[0, 5]]], **PLAIN)
    assert second.tokens == third.tokens == expected.tokens


def test_the_number_of_recordings_is_bounded(graphs, monkeypatch):
    monkeypatch.setattr(capture, "_MOST_RECORDINGS", 2)
    monkeypatch.setattr(capture, "_MOST_SEEN", 3)
    decoder = build_decoder(3)
    for new_tokens in (3, 4, 5, 3):
        for _ in range(2):
            options = {**PLAIN, "max_new_tokens": new_tokens}
            ours = beam_search(decoder, draw_context(1), [[[0, 5]]], **options)
            assert ours.tokens == eagerly(beam_search, decoder, draw_context(1), [[[0, 5]]], **options).tokens
    lengths = [len(recording.arguments[0].columns) for recording in recordings_of(decoder)]
    assert lengths == [5, 3]
    (shelf,) = capture._shelves[decoder].values()
    assert len(shelf.seen) == 3


def test_a_decoder_takes_its_recordings_along(graphs):
    decoder, before = build_decoder(3), len(capture._shelves)
    for _ in range(2):
        beam_search(decoder, draw_context(1), [[[0, 5]]], **PLAIN)
    (recording,) = recordings_of(decoder)
    alive = weakref.ref(decoder), weakref.ref(recording)
    del decoder, recording
    gc.collect()
    assert [ref() for ref in alive] == [None, None] and len(capture._shelves) == before


def test_threads_wait_for_one_another(graphs):
    decoder, start = build_decoder(3), threading.Barrier(4)
    cases = [(draw_context(1, seed), draw_prompts([[4]], seed)) for seed in range(4)]
    expected = [eagerly(beam_search, decoder, *case, **PLAIN).tokens for case in cases]

    def run(case):
        start.wait()
        with dispatch.as_if_watched(True):
            return [beam_search(decoder, *case, **PLAIN).tokens for _ in range(5)]

    with ThreadPoolExecutor(4) as pool:
        for found, tokens in zip(pool.map(run, cases), expected, strict=True):
            assert found == [tokens] * 5


def planted_host_read(memory, state):
    if state.done.all():
        raise StopIteration


def planted_list(memory, state):
    state.generated.tolist()


def planted_copy(memory, state):
    state.sums.cpu()


def planted_constant(memory, state):
    state.sums.add_(torch.tensor([1.0], dtype=state.sums.dtype))


def planted_mask(memory, state):
    state.sums[state.done]


@pytest.mark.parametrize("fault", (planted_host_read, planted_list, planted_copy, planted_constant, planted_mask))
def test_a_step_that_needs_the_host_is_not_recorded(graphs, monkeypatch, fault):
    step = BeamSearch.forward

    def planted(self, memory, state):
        fault(memory, state)
        return step(self, memory, state)

    monkeypatch.setattr(BeamSearch, "forward", planted)
    decoder, groups = build_decoder(3, end_bias=-30.0), draw_prompts([[4]])
    beam_search(decoder, draw_context(1), groups, **PLAIN)
    with pytest.raises(CannotRecord, match="needs the host"):
        beam_search(decoder, draw_context(1), groups, **PLAIN)


def test_a_step_that_keeps_a_tensor_is_found(graphs, monkeypatch):
    step, kept = BeamSearch.forward, []

    def planted(self, memory, state):
        kept.append(state.sums + 1)
        return step(self, memory, state)

    monkeypatch.setattr(BeamSearch, "forward", planted)
    decoder, groups = build_decoder(3), draw_prompts([[4]])
    for _ in range(2):
        ours = beam_search(decoder, draw_context(1), groups, **PLAIN)
    with pytest.raises(AssertionError, match="aten::add"):
        check_memory(*recordings_of(decoder), decoder, ours.scores)


def test_a_step_that_reads_a_tensor_of_its_own_is_found(graphs, monkeypatch):
    """Such as a table that lives as long as one search: its memory would be given to others."""
    step, own = BeamSearch.forward, torch.zeros(1, dtype=torch.float64)

    def planted(self, memory, state):
        return step(self, memory, state._replace(sums=state.sums + own))

    monkeypatch.setattr(BeamSearch, "forward", planted)
    decoder, groups = build_decoder(3), draw_prompts([[4]])
    for _ in range(2):
        ours = beam_search(decoder, draw_context(1), groups, **PLAIN)
    with pytest.raises(AssertionError, match="nobody keeps"):
        check_memory(*recordings_of(decoder), decoder, ours.scores)


def test_a_step_that_counts_in_python_gives_other_results(graphs, monkeypatch):
    """The number of the step would be that of the recording in every replay."""
    step, steps = BeamSearch.forward, []

    def planted(self, memory, state):
        steps.append(None)
        return step(self, memory, state._replace(sums=state.sums * (1 + len(steps))))

    monkeypatch.setattr(BeamSearch, "forward", planted)
    decoder, groups = build_decoder(3, end_bias=-30.0), draw_prompts([[4]])
    for _ in range(2):
        ours = beam_search(decoder, draw_context(1), groups, **PLAIN)
    expected = eagerly(beam_search, decoder, draw_context(1), groups, **PLAIN)
    assert not torch.equal(ours.scores, expected.scores)


def test_a_step_needs_no_memory_of_the_host():
    """On the meta device, every copy to the host and every read of a value raises."""
    decoder = build_decoder(3)
    with torch.inference_mode():
        cross = decoder.project_context(draw_context(2))
        prompts = read_prompts(decoder, cross, draw_prompts([[4], [6]]), "last", 7)
        options = dict(beams=3, max_new_tokens=7, min_new_tokens=2, length_penalty=1.0, classic=True)
        search = BeamSearch(decoder.to("meta"), **options)
        memory = tree_map_only(torch.Tensor, lambda t: t.to("meta"), search.remember(cross, prompts))
        state = search.start(memory)
        for _ in range(2):
            assert search.step_in_place(memory, state).is_meta


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def global_hook():
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize(
    "reason, enter",
    (
        ("eager is active", capture.eager),
        ("gradients", torch.enable_grad),
        ("deterministic", deterministic),
        ("autocast", lambda: torch.autocast("cpu", torch.bfloat16)),
        ("mode watches", CostCounter),
        ("mode watches", RefuseHostMethods),
        ("every module", global_hook),
    ),
)
def test_programs_run_eagerly_inside_some_contexts(graphs, reason, enter):
    decoder, device = build_decoder(), torch.device("cpu")
    with torch.no_grad():
        assert capture.why_eager(decoder, device) is None
        with enter():
            assert reason in capture.why_eager(decoder, device)
        assert capture.why_eager(decoder, device) is None


@pytest.mark.parametrize(
    "change",
    (
        lambda layer: layer.register_forward_hook(lambda *args: None),
        lambda layer: setattr(layer, "forward", layer.forward),
        lambda layer: layer.compile(backend="eager"),
    ),
    ids=("hook", "forward", "compiled"),
)
def test_a_changed_decoder_runs_eagerly(graphs, change):
    decoder = build_decoder()
    change(decoder.layers[1].mlp)
    with torch.no_grad():
        assert capture.why_eager(decoder, torch.device("cpu")).startswith("layers.1.mlp has hooks")


def test_a_cpu_records_nothing():
    decoder = build_decoder()
    assert "has no CUDA graphs" in capture.why_eager(decoder, torch.device("cpu"))
    for _ in range(3):
        beam_search(decoder, draw_context(1), [[[0, 5]]], **PLAIN)
    assert recordings_of(decoder) == []
    assert [capture.size_class(n, torch.device("cpu")) for n in (0, 1, 17, 1000)] == [0, 1, 17, 1000]


def test_size_classes_are_few_and_close():
    classes = [capture.size_class(n, torch.device("cuda")) for n in range(8193)]
    assert classes == sorted(classes) and len(set(classes)) < 40
    assert all(n <= size <= max(16, n + 16, 1.25 * n) for n, size in enumerate(classes))
    assert all(capture.size_class(size, torch.device("cuda")) == size for size in set(classes))


def test_a_flag_is_read_one_question_late(graphs):
    flag = capture.LateFlag(torch.device("cpu"))
    given = [False, True, False, True, True]
    assert [flag.read(torch.tensor(value)) for value in given] == [False, *given[:-1]]
    # read at once on a CPU
    capture_on = capture.LateFlag(torch.device("meta"))
    assert [capture_on.read(torch.tensor(value)) for value in given] == given


def test_an_additional_step_changes_nothing(monkeypatch):
    """As the flag is read late, a step more than needed runs."""
    decoder, context, groups = build_decoder(0, end_bias=2.5), draw_context(3), draw_prompts([[4]] * 3)
    options = {**PLAIN, "max_new_tokens": 20, "min_new_tokens": 1}
    expected = beam_search(decoder, context, groups, **options)
    monkeypatch.setattr(generation.LateFlag, "read", lambda self, flag: False)
    ours = beam_search(decoder, context, groups, **options)
    assert ours.tokens == expected.tokens and torch.equal(ours.scores, expected.scores)
