"""Region descriptions and questions as Visual Genome publishes them -> images with captions and questions."""

from prismer.dataloading.sources.annotations import (
    AnnotatedImage,
    AnnotationFile,
    Findings,
    answer_text,
    clean_captions,
    entries_of,
)
from prismer.dataloading.sources.json_lists import BadEntry, entry_id, inside_path, same_id
from prismer.dataloading.sources.vqa_questions import VG_WEIGHT
from prismer.dataloading.store.sample_json import meta_problems

# the two archives of the images unpack to these
FOLDERS = ("VG_100K", "VG_100K_2")


def image_folders(source: AnnotationFile, findings: Findings) -> dict[int | str, tuple[str, str]]:
    """Image id -> (folder, name) by `image_data.json`: the end of each address."""
    places = {}
    for place, entry in entries_of(source, "", findings):
        try:
            url = entry.get("url")
            if "image_id" not in entry or not isinstance(url, str) or url.count("/") < 2:
                raise BadEntry("has no image_id or no url")
            folder, _, name = inside_path("/".join(url.split("/")[-2:])).rpartition("/")
            places[same_id(entry_id(entry, "image_id"))] = folder, name
        except BadEntry as error:
            findings.fault(source.path, place, error)
    return places


def add_genome_images(
    images: dict[int | str, AnnotatedImage],
    source: AnnotationFile,
    places: dict[int | str, tuple[str, str]],
    findings: Findings,
) -> None:
    """Add the captions of `region_descriptions.json`, or the questions of `question_answers.json`, to images.

    An answer loses the full stop at its end, which answers of VQAv2 do not have. The weight of an answer is that of
    the published training lists.

    Args:
        images: image id -> image; receives those that it lacks.
        source: one of the two files.
        places: where images lie; one that is not there is `<id>.jpg` of an unknown folder.
        findings: receives what is odd.
    """
    field, seen = source.schema, set()
    for place, entry in entries_of(source, "", findings):
        try:
            parts = entry.get(field)
            if not isinstance(parts, list):
                raise BadEntry(f"has no list of {field}")
            parts = [part for part in parts if isinstance(part, dict)]
            if len(parts) < len(entry[field]):
                findings.count(source.path, f"entries of {field} are no objects and left out", f"in {place}")
            holder = next((x for x in (entry, *parts) if "image_id" in x), None)
            if holder is None and "id" not in entry:
                raise BadEntry("has no id of an image")
            image_id = entry_id(entry, "id") if holder is None else entry_id(holder, "image_id")
            key = same_id(image_id)
            folder, name = places.get(key) or ("", inside_path(f"{image_id}.jpg"))
            image = images.setdefault(key, AnnotatedImage(folder, name, {"image_id": image_id}))
            if key in seen:
                findings.count(source.path, "images are listed twice, and their texts come together", f"{image_id}")
            seen.add(key)
            if field == "regions":
                captions = clean_captions([part.get("phrase") for part in parts], source.path, image_id, findings)
                image.meta.setdefault("captions", []).extend(captions)
            else:
                asked = [_question(part, place, source, findings) for part in parts]
                image.meta.setdefault("questions", []).extend(question for question in asked if question)
        except BadEntry as error:
            findings.fault(source.path, place, error)


def _question(part: dict, place: str, source: AnnotationFile, findings: Findings) -> dict | None:
    """One question with its answer; None if it cannot be used, which is named."""
    try:
        number = entry_id(part, "qa_id") if "qa_id" in part else place
        answer = answer_text(part.get("answer"), source.path, number, findings).strip()
        question = {
            "question": part.get("question"),
            "answers": [{"answer": answer.removesuffix(".").strip() or answer, "weight": VG_WEIGHT}],
            "kind": "vg",
            **({"question_id": number} if "qa_id" in part else {}),
        }
        problems = meta_problems({"questions": [question]})
        if problems:
            raise BadEntry(problems[0])
    except BadEntry as error:
        findings.count(source.path, "questions cannot be used and are left out", f"in {place}: {error}")
        return None
    return question
