"""Proves that renamed scenes are true, that their names reach labels and texts alike, and that no held-out name trains.

python -m pytest tests/data/test_renamed_scenes.py
"""

import re
from functools import partial

import numpy as np
import pytest

from prismer.batch import PART
from prismer.config import prismer_tiny
from prismer.dataloading.feed.loader import Loader
from prismer.dataloading.scenes import dataset as scenes
from prismer.dataloading.scenes.captions_and_questions import ATTRIBUTES, write_questions
from prismer.dataloading.scenes.exact_labels import OBJECT_CLASSES, SEG_CLASSES, outline
from prismer.dataloading.scenes.layout import WORDS, sample_layout
from prismer.dataloading.scenes.names import kind_names, plural_of, regular_plural, sign_words, with_article
from prismer.dataloading.scenes.rename import has_shapes, rename_shapes
from prismer.dataloading.semantics.features import Semantics
from prismer.dataloading.store.shards import ShardDataset
from prismer.experts import TEXT_EXPERTS
from prismer.shipped import shipped_folder
from prismer.texts import encode_caption, format_answer
from prismer.tokenizer import Tokenizer
from tests.data.test_captions_and_questions import _answer, _check_caption

CLASSES = {"seg": SEG_CLASSES, "obj_detection": OBJECT_CLASSES}
CONFIG = prismer_tiny(image_size=48, label_size=32)
SHAPES = ATTRIBUTES["shape"]


@pytest.fixture(scope="module")
def outlines() -> list[dict]:
    """Scenes without images."""
    return [outline(sample_layout(np.random.default_rng(i))) for i in range(25)]


def rename(scene: dict, names=None, seed: int = 0) -> tuple[dict, dict]:
    names = kind_names()[0] if names is None else names
    return rename_shapes(names, {"scene": scene, "source": "here"}, CLASSES, np.random.default_rng(seed))


def with_shapes(text: str, kinds: list[str]) -> str:
    """The text with the shapes in the places of their names."""
    for shape, kind in zip(SHAPES, kinds, strict=True):
        text = re.sub(rf"\b{plural_of(kind)}\b", f"{shape}s", text)
        text = re.sub(rf"\b{kind}\b", shape, text)
    return text


def test_renamed_texts_are_true(outlines):
    # a plural like the singular would leave the interpreter in doubt
    names = [name for name in kind_names()[0] if plural_of(name) != name]
    kinds_of_questions = set()
    for i, scene in enumerate(outlines):
        for seed in range(4):
            meta, _ = rename(scene, names, seed=100 * i + seed)
            kinds = meta["scene"]["kinds"]
            assert len(meta["captions"]) >= 4 and len(meta["questions"]) >= 6
            for caption in meta["captions"]:
                _check_caption(scene, with_shapes(caption, kinds))
            for entry in meta["questions"]:
                (answer,) = entry["answers"]
                question = with_shapes(entry["question"], kinds)
                question = re.sub(
                    r"^what is (left of|right of|in front of|behind) ", r"what shape is the object \1 ", question
                )
                question = re.sub(
                    r"^what (is|kind of object is) the (?!colour|shape|number)", "what shape is the ", question
                )
                signs = {**scene, "signs": [{**sign, "box": sign["screen"]} for sign in scene["signs"]]}
                assert with_shapes(answer["answer"], kinds) == _answer(signs, question, entry["kind"]), entry
                kinds_of_questions.add(entry["kind"])
            written = " ".join([*meta["captions"], *(entry["question"] for entry in meta["questions"])])
            assert not re.search("|".join(SHAPES) + "|shape", written)
    assert kinds_of_questions == {"yes/no", "count", "colour", "name", "relation", "read"}


def test_names_of_a_scene_are_consistent_and_the_scene_on_disk_is_left_alone(outlines):
    scene = next(s for s in outlines if len(s["objects"]) > 2)
    before = repr(scene)
    meta, classes = rename(scene)
    kinds = meta["scene"]["kinds"]
    assert repr(scene) == before and meta["source"] == "here"
    assert classes == {"seg": [*kinds, "sign", "ground", "sky"], "obj_detection": [*kinds, "sign"]}
    new = dict(zip(SHAPES, kinds, strict=True))
    assert [thing["shape"] for thing in meta["scene"]["objects"]] == [new[thing["shape"]] for thing in scene["objects"]]
    # an apple tree is not a tree
    for seed in range(20):
        found = rename(scene, ["tree", "apple tree", "pine tree", "dog", "cat", "bird"], seed)[0]["scene"]["kinds"]
        assert sum(kind.endswith("tree") for kind in found) == 1
    # the same draw gives the same texts, another draw other names
    assert rename(scene) == (meta, classes) and rename(scene, seed=1)[0]["scene"]["kinds"] != kinds


def test_boxes_are_drawn_as_inexact_as_those_of_a_detector(outlines):
    given = {"obj_detection": {"0": [0.4, 0.4, 0.5, 0.6, 1.0], "1": [0.0, 0.1, 0.3, 0.2, 1.0]}, "ocr_detection": {}}
    before, wider, scores = repr(given), [], []
    for seed in range(200):
        meta, _ = rename_shapes(
            kind_names()[0], {"scene": outlines[0], "boxes": given}, CLASSES, np.random.default_rng(seed)
        )
        assert meta["boxes"].keys() == given.keys() and meta["boxes"]["obj_detection"].keys() == {"0", "1"}
        (left, top, right, bottom, score), other = meta["boxes"]["obj_detection"].values()
        # about the same centre, by the same factor in both directions, and within the image
        assert left + right == pytest.approx(0.9, abs=3e-4) and top + bottom == pytest.approx(1.0, abs=3e-4)
        assert bottom - top == pytest.approx(2 * (right - left), abs=5e-4) and min(other) >= 0 and max(other) <= 1
        wider.append((right - left) / 0.1)
        scores += [score, other[4]]
    assert repr(given) == before
    assert min(wider) > 0.999 and max(wider) < 3.001 and 0.2 < np.mean(np.array(wider) > 1.001) < 0.4
    assert 0.4 <= min(scores) < 0.45 and 0.95 < max(scores) <= 1 and len(set(scores)) > 250


def test_captions_of_a_renamed_scene_list_everything_from_left_to_right(outlines):
    lists = 0
    for scene in outlines:
        meta, _ = rename(scene)
        objects = sorted(meta["scene"]["objects"], key=lambda thing: thing["screen"][0])
        kinds = list(dict.fromkeys(thing["shape"] for thing in objects))
        words = [sign["word"] for sign in meta["scene"]["signs"]]
        for caption in meta["captions"]:
            places = [re.search(rf"\b({kind}|{plural_of(kind)})\b", caption) for kind in kinds]
            complete = all([*places, *(re.search(rf"\b{word}\b", caption) for word in words)])
            if complete and not re.search(" of | behind | in front ", caption):
                lists += 1
                assert places == sorted(places, key=lambda match: match.start())
    assert lists > 2.5 * len(outlines)


def test_plurals_and_articles():
    plurals = {"dog": "dogs", "bus": "buses", "box": "boxes", "cherry": "cherries", "toy": "toys", "couch": "couches"}
    assert all(regular_plural(one) == many for one, many in plurals.items())
    irregular = {"person": "people", "mouse": "mice", "sheep": "sheep", "knife": "knives", "potato": "potatoes"}
    assert all(plural_of(one) == many for one, many in irregular.items())
    nouns = ["apple", "uniform", "umbrella", "hourglass", "house", "utensil", "orange dog", "small owl", "urn"]
    assert [with_article(noun).split()[0] for noun in nouns] == ["an", "a", "an", "an", "a", "a", "an", "a", "an"]


def test_a_renamed_scene_with_irregular_plurals_and_vowels():
    thing = {"size": "small", "material": "matte", "colour": "red", "shape": "sphere"}
    things = [
        {**thing, "screen": [0.2, 0.5], "distance": 5.0},
        {**thing, "screen": [0.5, 0.5], "distance": 5.0},
        {**thing, "shape": "cube", "screen": [0.8, 0.5], "distance": 5.0},
    ]
    # the names are drawn from four, so that each seed is another order
    texts = set()
    for seed in range(60):
        meta, _ = rename({"objects": things, "signs": []}, ["person", "apple", "mouse", "uniform"], seed)
        texts |= {*meta["captions"], *(q["question"] for q in meta["questions"])}
    written = " ".join(texts)
    for right, wrong in (
        ("people", "persons"),
        ("mice", "mouses"),
        ("an apple", "a apple"),
        ("a uniform", "an uniform"),
    ):
        assert right in written and wrong not in written


def test_held_out_names_and_words_are_apart_from_those_of_training():
    for seen, held_out in (kind_names(), sign_words()):
        assert not set(seen) & set(held_out) and 0.09 < len(held_out) / len((*seen, *held_out)) < 0.2
        assert len(set(seen)) == len(seen) and all(re.fullmatch("[a-z]+( [a-z]+)*", name) for name in seen)
    # not even as a part of another entry
    alone = {name for _, held_out in (kind_names(), sign_words()) for name in held_out if " " not in name}
    regular = {name for name in kind_names()[0] if plural_of(name) == regular_plural(name)}
    assert not alone & {word for name in (*regular, *sign_words()[0]) for word in name.split()}
    seen, held_out = kind_names()
    assert len(seen) > 1500 and all(plural_of(name) == regular_plural(name) for name in held_out)
    # words with another use in the texts
    taken = {"object", "sign", "picture", "ground", *(value for values in ATTRIBUTES.values() for value in values)}
    assert not taken & {word for name in (*seen, *held_out) for word in name.split()}
    assert not {*sign_words()[0], *sign_words()[1]} & {*WORDS}


def test_a_damaged_scene_is_refused_and_another_sample_stays_as_it_is():
    with pytest.raises(ValueError, match="scene in its JSON is damaged .* render the dataset again"):
        rename({"objects": [{"shape": "pyramid"}], "signs": []})
    meta = {"captions": ["a dog"]}
    same, classes = rename_shapes(kind_names()[0], meta, CLASSES, np.random.default_rng(0))
    assert same is meta and classes is CLASSES
    assert has_shapes(CLASSES) and not has_shapes({"obj_detection": ["dog"]}) and not has_shapes({})


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> ShardDataset:
    folder = tmp_path_factory.mktemp("scenes")
    scenes.render_dataset(folder, train=8, val=0, test=0, size=48, label_size=32, workers=1, progress=False)
    return ShardDataset(folder / "train")


def open_loader(dataset: ShardDataset, held_out: bool = False, **options) -> Loader:
    options = dict(batch_size=4, rename=partial(rename_shapes, kind_names()[held_out])) | options
    return Loader(dataset, config=CONFIG, semantics=Semantics.spelling(), threads=1, **options)


def test_label_features_carry_the_names_of_the_texts(dataset):
    spelling = Semantics.spelling()
    for batch in open_loader(dataset).epoch(0):
        for b, meta in enumerate(batch.meta):
            kinds = meta["scene"]["kinds"]
            names = [*kinds, "sign", "ground", "sky"]
            for i in np.unique(batch.images.labels["seg"][b]):
                found = batch.images.features[batch.images.rows["seg"][b, i]].numpy()
                assert (found == spelling.rows([names[i]])[0]).all()
            for i, class_id in meta["instances"].items():
                found = batch.images.features[batch.images.rows["obj_detection"][b, int(i)]].numpy()
                if (batch.images.labels["obj_detection"][b] == int(i)).any():
                    assert (found == spelling.rows([names[class_id]])[0]).all()
            assert {thing["shape"] for thing in meta["scene"]["objects"]} <= set(kinds) <= set(kind_names()[0])


def test_detections_name_what_the_texts_name(dataset):
    tokenizer = Tokenizer.from_folder(shipped_folder("names"))
    config = CONFIG.replace(expert_text=TEXT_EXPERTS, vocab_size=tokenizer.vocab_size)
    options = dict(batch_size=4, semantics=Semantics.spelling(), tokenizer=tokenizer, threads=1)
    loader = Loader(dataset, config=config, rename=partial(rename_shapes, kind_names()[0]), **options)
    for batch in loader.epoch(0):
        for ids, facts, meta in zip(
            batch.images.detections.ids, batch.images.detections.facts, batch.meta, strict=True
        ):
            begins = [i for i in range(len(ids)) if ids[i] != tokenizer.pad_id and not facts[i, PART]]
            ends = [*begins[1:], int((ids != tokenizer.pad_id).sum())]
            found = sorted(tokenizer.decode(ids[a:b]) for a, b in zip(begins, ends, strict=True))
            names = [*meta["scene"]["kinds"], "sign"]
            told = [*(names[i] for i in meta["instances"].values()), *meta["words"].values()]
            assert found == sorted(f" {name}" for name in told)


def names_by_key(*loaders: Loader, epoch: int = 0, start_step: int = 0) -> dict[str, list[str]]:
    batches = [batch for loader in loaders for batch in loader.epoch(epoch, start_step)]
    return {
        key: meta["scene"].get("kinds", SHAPES)
        for batch in batches
        for key, meta in zip(batch.keys, batch.meta, strict=True)
    }


def test_names_depend_on_seed_epoch_and_sample_alone(dataset):
    whole = names_by_key(open_loader(dataset))
    assert len(whole) == 8 and len({tuple(kinds) for kinds in whole.values()}) == 8
    halves = [open_loader(dataset, batch_size=2, rank=rank, world=2) for rank in (0, 1)]
    assert names_by_key(*halves) == whole
    resumed = names_by_key(open_loader(dataset), start_step=1)
    assert len(resumed) == 4 and resumed.items() <= whole.items()
    assert names_by_key(open_loader(dataset), epoch=1) != whole != names_by_key(open_loader(dataset, seed=1))
    held_out = names_by_key(open_loader(dataset, held_out=True, training=False))
    assert {kind for kinds in held_out.values() for kind in kinds} <= set(kind_names()[1])


def test_a_sample_without_labels_keeps_its_own_names(dataset):
    assert set(map(tuple, names_by_key(open_loader(dataset, drop_labels=1.0)).values())) == {tuple(SHAPES)}
    some = names_by_key(open_loader(dataset, drop_labels=0.5))
    whole = names_by_key(open_loader(dataset))
    kept = {key for key in some if some[key] != SHAPES}
    assert 0 < len(kept) < 8 and all(some[key] == whole[key] for key in kept)


def test_signs_of_many_words(tmp_path):
    few = scenes._vocabulary({"split": "train"})
    about = {"sign_words": "many"}
    train, val = (scenes._vocabulary({**about, "split": split}) for split in ("train", "val"))
    seen, held_out = map(set, sign_words())
    assert few == WORDS and set(train) == {*WORDS, *seen}
    assert held_out < set(val) and 0.4 < len(held_out) / len(val) < 0.6 and set(val) - held_out < seen
    settings = dict(train=2, val=0, test=0, size=32, label_size=32, workers=1, progress=False)
    scenes.render_dataset(tmp_path, **settings, sign_words="many")
    with pytest.raises(ValueError, match="holds scenes rendered with"):
        scenes.render_dataset(tmp_path, **settings)
    with pytest.raises(ValueError, match="sign_words is 'lots'; choose few or many"):
        scenes.render_dataset(tmp_path, **settings, sign_words="lots")
    # every word fits on a board
    assert max(map(len, train + val)) <= 6
    kinds = {}
    for word in (next(iter(seen)), next(iter(held_out))):
        thing = {
            "size": "small",
            "material": "matte",
            "colour": "red",
            "shape": "cube",
            "screen": [0.5] * 2,
            "distance": 5.0,
        }
        scene = {"objects": [thing], "signs": [{"word": word, "screen": [0.5, 0.2], "distance": 9.0}]}
        questions = write_questions(scene, np.random.default_rng(0))
        kinds[word] = {q["kind"] for q in questions if q["answers"][0]["answer"] == word}
    assert list(kinds.values()) == [{"read"}, {"read unseen"}]


def test_the_tokenizer_spells_each_form_of_a_name_with_the_same_tokens(outlines):
    tokenizer = Tokenizer.from_folder(shipped_folder("names"))
    assert tokenizer.vocab_size <= 4096
    for names, most in zip(kind_names(), (3.8, 4.0), strict=True):
        ids = [tokenizer.encode(f" {name}") for name in names]
        assert np.mean(list(map(len, ids))) < most and max(map(len, ids)) <= 9
        answers = [tokenizer.encode(format_answer(name)) for name in names]
        alike = [a[1:] == b[1:] and a[0] != b[0] for a, b in zip(ids, answers, strict=True)]
        assert np.mean(alike) > 0.98
        (s,) = tokenizer.encode("s")
        assert all(tokenizer.encode(f" {name}s") == [*spelled, s] for name, spelled in zip(names, ids, strict=True))
        assert all(tokenizer.decode(spelled) == f" {name}" for name, spelled in zip(names, ids, strict=True))
    # no held-out name has a token of its own, and what every text uses has one
    assert all(len(tokenizer.encode(f" {name}")) > 1 for name in (*kind_names()[1], *sign_words()[1]))
    common = " the a an is there of red large shiny object left in front Yes No 2 Red".split(" ")[1:]
    assert all(len(tokenizer.encode(f" {word}")) == 1 for word in common)
    # captions are cut at 30 tokens
    cut = total = 0
    for i, scene in enumerate(outlines):
        for caption in rename(scene, seed=i)[0]["captions"]:
            ids = encode_caption(tokenizer, caption)[0]
            cut += len(tokenizer.encode(caption.capitalize())) + 2 > len(ids)
            total += 1
    assert total > 100 and cut <= 0.03 * total
