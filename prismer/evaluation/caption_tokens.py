"""The tokens of a caption, as the Penn Treebank tokenizer of the COCO caption toolkit makes them.

The text becomes lower case, contractions are split, and punctuation is dropped, so that scores are comparable with
published ones.
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
    r"|(?i:no)\.(?=\s*\d)"
    # 3.5, 1,000.00, 10:30, 3/4, +5, but 10-year-old and 4x4 are words
    r"|(?:(?<!\S)[-+.])?\d+(?:[.,:/]\d+)*(?![^\W_]|[-./][^\W_])"
    r"|(?i:'n'|y'(?=all\b)|'t(?=(?:is|was)\b))"
    r"|(?i:n't|'(?:s|m|d|re|ve|ll|n|cause)|ma'am)(?![^\W_])"
    r"|'\d\ds?\b"
    r"|[A-Z]+&[A-Z]+"
    # words with hyphens, slashes and dots inside; o'clock, d'oeuvres, l'avion
    r"|(?:[#@](?=[^\W\d_]))?(?:(?i:[dol]'(?=[^\W\d_])))?[^\W_]+(?:(?:[-./]|_+)[^\W_]+)*"
    r"|[!?]+|\.{3,}|-+|\S"
)
_NEGATION = re.compile(r"(?<=[^\W\d_])(?=n't(?![^\W_]))", re.IGNORECASE)
_TYPOGRAPHIC = str.maketrans(
    {"‘": "'", "’": "'", "“": '"', "”": '"', "«": '"', "»": '"', "–": "--", "—": "--", "…": "..."}
)
_WORDS = "cannot can not;gonna gon na;gotta got ta;wanna wan na;gimme gim me;lemme lem me"
_BRACKETS = "( -lrb-;) -rrb-;[ -lsb-;] -rsb-;{ -lcb-;} -rcb-"
_REPLACED = {token: parts for token, *parts in map(str.split, f"{_WORDS};{_BRACKETS}".split(";"))}
# the toolkit drops a fixed list of marks, which contains neither brackets nor "!!"
_DROPPED = re.compile(r"['\"`,.:;!?]|-{1,}|\.{3,}")


def tokenize_caption(caption: str) -> list[str]:
    """The lower-case tokens of a caption, without punctuation.

    `"A dog's close-up, isn't it?"` gives a, dog, 's, close-up, is, n't, it.
    """
    text = _NEGATION.sub(" ", caption.translate(_TYPOGRAPHIC))
    tokens = []
    for token in _TOKEN.findall(text):
        if not _DROPPED.fullmatch(token):
            token = token.lower()
            tokens.extend(_REPLACED.get(token, [token]))
    return tokens
