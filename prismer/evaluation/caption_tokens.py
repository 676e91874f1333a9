"""The tokens of a caption, as the Penn Treebank tokenizer of the COCO caption toolkit makes them.

The text becomes lower case, contractions are split, and punctuation is dropped, so that scores are comparable with
published ones. tests/evaluation/test_toolkit.py compares the two. The known differences are rare in captions: paths of
more than three parts (a/b/c/d), versions (v2.0), tags (<b>), smileys such as :D, an initial with a full stop before a
word that often starts a sentence (row A. The), and a full stop that depends on the caption after this one.
"""

import re

# abbreviations, which keep their full stop: the first list in any case, the second only with a capital letter, since
# "he had to wash." ends a sentence
_ABBREVIATIONS = """mr mrs ms dr drs prof profs sen sens rep reps atty lt col gen messrs gov govs adm rev maj sgt cpl
pvt mt capt st ste ave pres lieut hon brig comdr cmdr pfc spc supt det jr sr bros blvd rd esq inc co cos corp ltd plc
etc vs jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu thurs fri ala ariz calif colo conn fla ga
ind kan ky md mich minn mo mont neb nev okla penn tenn va vt wis wyo al est dept univ bldg ft sq tel ext cf assn intl
natl""".split()
_CAPITAL_ABBREVIATIONS = "Miss Ark Del Ill La Mass Ore Pa Tex Wash".split()

_TOKEN = re.compile(
    r"(?:https?://|www\.)[^\s<>\"]*[^\s<>\".,;:!?)]"
    r"|[\w.+-]+@[\w-]+(?:\.[\w-]+)+"
    # U.S., a.m., Ph.D., initials and known abbreviations keep their last full stop
    rf"|(?:(?i:ph\.d|[^\W\d_](?:\.[^\W\d_])*|{'|'.join(_ABBREVIATIONS)})"
    rf"|{'|'.join(_CAPITAL_ABBREVIATIONS)})\.(?![^\W_])"
    r"|(?i:ca|fig|nos?|op|pp)\.(?=\s*\d)"
    # 10:30am and 3.5mm are two tokens, 50cm is one
    r"|(?:(?<!\S)[-+.])?\d+(?:[.,:]\d+)+(?=[^\W\d_])"
    # 3.5, 1,000.00, 10:30, 3/4, +5, but 10-year-old and 4x4 are words
    r"|(?:(?<!\S)[-+.])?\d+(?:[.,:/]\d+)*(?![^\W_]|[-./][^\W_])"
    r"|(?i:'n'|y'(?=all\b)|'t(?=(?:is|was)\b)|'(?:em|til)\b)"
    r"|(?i:n't|'(?:s|m|d|re|ve|ll|n|cause)|ma'am)(?![^\W_])"
    r"|'\d\ds?\b"
    r"|[A-Z]+&[A-Z]+|[Cc]\+\+"
    # words with hyphens, slashes and dots inside; o'clock, d'oeuvres, l'avion
    r"|(?:[#@](?=[^\W\d_]))?(?:(?i:[dol]'(?=[^\W\d_])))?[^\W_]+(?:(?:[-./]|_+)[^\W_]+)*"
    r"|[:;=]-?[()](?!\w)"
    r"|[!?]+|\.{3,}|-+|\*+|_+|\S"
)
_NEGATION = re.compile(r"(?<=[^\W\d_])(?=n't(?![^\W_]))", re.IGNORECASE)
_TYPOGRAPHIC = str.maketrans(
    {"‘": "'", "’": "'", "“": '"', "”": '"', "«": '"', "»": '"', "–": "--", "—": "--", "…": "..."}
    | {"£": "#", "€": "$", "¢": " cents "}
)
_ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&apos;": "'", "&nbsp;": " "}
_ENTITY = re.compile("|".join(_ENTITIES))
_WORDS = "cannot can not;gonna gon na;gotta got ta;wanna wan na;gimme gim me;lemme lem me"
_REPLACED = {token: parts for token, *parts in map(str.split, _WORDS.split(";"))}
_BRACKETS = str.maketrans({"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"})
# the toolkit drops a fixed list of marks, which contains neither brackets nor "!!"
_DROPPED = re.compile(r"['\"`,.:;!?]|-{1,4}|\.{3,}")


def tokenize_caption(caption: str) -> list[str]:
    """The lower-case tokens of a caption, without punctuation.

    `"A dog's close-up, isn't it?"` gives a, dog, 's, close-up, is, n't, it.
    """
    text = _ENTITY.sub(lambda found: _ENTITIES[found[0]], caption).translate(_TYPOGRAPHIC)
    text = _NEGATION.sub(" ", text)
    tokens = []
    for token in _TOKEN.findall(text):
        if not _DROPPED.fullmatch(token):
            token = token.lower().translate(_BRACKETS)
            tokens.extend(_REPLACED.get(token, [token]))
    return tokens
