"""The schema of a sample's JSON, shared by the loader, the evaluation, the importers and the check.

    image_id       whole number or text: the image's id in the files of its benchmark
    domain         text: the part of the benchmark that has the image: in-domain, near-domain or out-domain in NoCaps
    captions       list of texts
    questions      list of {"question": text,
                            "answers": [{"answer": text, "weight": number}]     without them, one of a test set
                            "raw_answers": [string]     what each person said, also "", in the order of the file
                            "question_id": whole number or text
                            "question_type": text       its first words in VQA: "what color is the"
                            "answer_type": text         "yes/no", "number" or "other" in VQA
                            "kind": text}               of rendered scenes; all but "question" may be left out
    class          class name, or index in the dataset's class table
    instances      {id of the obj_detection map: index in the class table of obj_detection}
    words          {id of the ocr_detection map: text}
    boxes          {expert with such a table: {id: [left, top, right, bottom, score]}}, edges as shares of the
                   sides of the image, 0 to 1; the score, a confidence in 0 to 1, may be left out
    size           [height, width] of the image, px
    source, licence, ...   any JSON; not checked

Every field may be left out, but not by null. A text is a string that is not blank and that UTF-8 can hold: JSON can
spell a lone surrogate, on which every tokenizer fails.
"""

import math
from functools import partial

from prismer.errors import InputError, shown
from prismer.experts import BACKGROUND, EXPERTS
from prismer.reading import is_text
from prismer.texts import clean_caption, clean_question

# weights are shares of the people who gave an answer, or their number; a loss times more than this diverges
MAX_WEIGHT = 1e4
# readers look ids up in this spelling; "07" or "+7" would never be found
_IDS = frozenset(str(i) for i in range(BACKGROUND))


def meta_problems(meta: object, classes: dict[str, list[str]] | None = None) -> list[str]:
    """Everything in a sample's JSON that does not fit the schema, one sentence each; [] if all of it fits.

    Args:
        meta: any parsed JSON.
        classes: the dataset's class tables, to check indices against; None checks no index.
    """
    if not isinstance(meta, dict):
        return [f"its json is {show_json(meta)}; expected an object"]

    def names_of(table: str) -> list[str] | None:
        return None if classes is None else classes.get(table, [])

    problems: list[str] = []
    for name, check in (
        ("image_id", _image_id),
        ("domain", _domain),
        ("captions", _captions),
        ("questions", _questions),
        ("class", lambda value: _class(value, names_of("class"))),
        *((expert.table, partial(_table, name, names_of(name))) for name, expert in EXPERTS.items() if expert.table),
        ("boxes", _boxes),
        ("size", _size),
    ):
        if name in meta:
            problems += check(meta[name])
    return problems


def check_meta(meta: object, classes: dict[str, list[str]] | None = None) -> None:
    """Refuse the JSON of a sample that does not fit the schema.

    Raises:
        ValueError: with the first problem and the number of the others.
    """
    problems = meta_problems(meta, classes)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise InputError(problems[0] + more)


def _image_id(image_id: object) -> list[str]:
    if _is_id(image_id):
        return []
    return [f"its image_id is {show_json(image_id)}; expected a whole number or a text"]


def _domain(domain: object) -> list[str]:
    return [] if _is_text(domain) else [f"its domain is {show_json(domain)}; expected a text"]


def _captions(captions: object) -> list[str]:
    if not isinstance(captions, list):
        return [f"captions is {show_json(captions)}; expected a list of texts"]
    problems = []
    for number, caption in enumerate(captions):
        if not _is_text(caption):
            problems.append(f"caption {number} is {show_json(caption)}; expected a text")
        elif not clean_caption(caption):
            problems.append(f"caption {number} is {show_json(caption)}; it holds only punctuation")
    return problems


def _questions(questions: object) -> list[str]:
    if not isinstance(questions, list):
        return [f"questions is {show_json(questions)}; expected a list of objects"]
    problems = []
    for number, entry in enumerate(questions):
        if isinstance(entry, dict):
            problems += [f"question {number} {problem}" for problem in _question(entry)]
        else:
            problems.append(f"question {number} is {show_json(entry)}; expected an object")
    return problems


def _question(entry: dict) -> list[str]:
    """Each problem of a question, as the rest of a sentence that begins with its number."""
    problems = []
    question, answers = entry.get("question"), entry.get("answers", [])
    if not _is_text(question):
        problems.append(f"is {show_json(question)}; expected a text")
    else:
        try:
            clean_question(question)
        except ValueError:
            problems.append(f"is {show_json(question)}; it holds only punctuation")
    if entry.get("kind") is not None and not _is_text(entry["kind"]):
        problems.append(f"has the kind {show_json(entry['kind'])}; expected a text")
    for field in ("question_type", "answer_type"):
        if field in entry and not _is_text(entry[field]):
            problems.append(f"has the {field} {show_json(entry[field])}; expected a text")
    if "question_id" in entry and not _is_id(entry["question_id"]):
        problems.append(f"has the question_id {show_json(entry['question_id'])}; expected a whole number or a text")
    if not isinstance(answers, list):
        return [*problems, f"has answers {show_json(answers)}; expected a list of objects"]
    for answer in answers:
        if not isinstance(answer, dict):
            problems.append(f"has the answer {show_json(answer)}; expected an object")
            continue
        text, weight = answer.get("answer"), answer.get("weight")
        if not _is_text(text):
            problems.append(f"has the answer {show_json(text)}; expected a text")
        if not _is_number(weight) or not 0 < weight <= MAX_WEIGHT:
            problems.append(
                f"has an answer of weight {show_json(weight)}; expected a number above 0 and at most {MAX_WEIGHT:g}"
            )
    raw = entry.get("raw_answers", [])
    if not isinstance(raw, list) or not all(isinstance(a, str) and is_text(a) for a in raw):
        problems.append(f"has raw_answers {show_json(raw)}; expected a list of strings")
    return problems


def _class(value: object, names: list[str] | None) -> list[str]:
    if _is_index(value):
        if names is None or value < len(names):
            return []
        return [f"its class is {value}, the class table has {len(names)} names"]
    return [] if _is_text(value) else [f"its class is {show_json(value)}; expected a name or an index"]


def _table(expert: str, names: list[str] | None, table: object) -> list[str]:
    """Check the table of an expert whose ids number objects or words."""
    field, is_word = EXPERTS[expert].table, EXPERTS[expert].kind == "word"
    if not isinstance(table, dict):
        return [
            f"its '{field}' are {show_json(table)}; expected an object of id: {'text' if is_word else 'class index'}"
        ]
    problems = [f"its '{field}' have the id {show_json(i)}; expected 0 to 254" for i in table if i not in _IDS]
    for i in sorted(table.keys() & _IDS):
        entry = table[i]
        if is_word and not _is_text(entry):
            problems.append(f"word {i} is {show_json(entry)}; expected its text")
        elif not is_word and not _is_index(entry):
            problems.append(f"object {i} is of class {show_json(entry)}; expected an index")
        elif not is_word and names is not None and entry >= len(names):
            problems.append(f"object {i} is of class {entry}, the class table has {len(names)} names")
    return problems


def _boxes(boxes: object) -> list[str]:
    if not isinstance(boxes, dict):
        return [f"its 'boxes' are {show_json(boxes)}; expected an object of expert: {{id: box}}"]
    problems = []
    for expert, found in boxes.items():
        if expert not in EXPERTS or EXPERTS[expert].table is None:
            named = (name for name, known in EXPERTS.items() if known.table)
            problems.append(f"its 'boxes' name {show_json(expert)}; expected {' or '.join(named)}")
        elif not isinstance(found, dict):
            problems.append(f"its boxes of {expert} are {show_json(found)}; expected an object of id: box")
        else:
            problems += [
                f"its boxes of {expert} have the id {show_json(i)}; expected 0 to 254" for i in found if i not in _IDS
            ]
            problems += [
                f"box {i} of {expert} is not left, top, right, bottom as shares of the image, and a score in 0 to 1 or "
                f"none; label the sample again"
                for i in sorted(found.keys() & _IDS)
                if not _is_box(found[i])
            ]
    return problems


def _is_box(box: object) -> bool:
    if not isinstance(box, list | tuple) or len(box) not in (4, 5):
        return False
    if not all(_is_number(value) and 0 <= value <= 1 for value in box):
        return False
    return box[0] <= box[2] and box[1] <= box[3]


def _size(size: object) -> list[str]:
    if isinstance(size, list) and len(size) == 2 and all(_is_index(n) and n for n in size):
        return []
    return [f"its size is {show_json(size)}; expected [height, width]"]


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip()) and is_text(value)


def _is_id(value: object) -> bool:
    """Whether `value` can be an id in a benchmark's files."""
    return _is_text(value) or (isinstance(value, int) and not isinstance(value, bool))


def _is_index(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return isinstance(value, int) or math.isfinite(value)


def show_json(value: object) -> str:
    """A JSON value for a message: short, and in characters that any terminal prints."""
    if isinstance(value, (list, dict)):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    if value is None:
        return "null"
    return shown(value)
