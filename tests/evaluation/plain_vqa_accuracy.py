"""The VQA evaluation a second time, from the rules alone: one character at a time, in exact fractions.

It has no line in common with prismer/evaluation/vqa_accuracy.py, and every contraction is written out.
"""

from fractions import Fraction

MARKS = set('; / [ ] " { } ( ) = + \\ _ - > < @ ` , ? !'.split())
DIGITS = dict(none=0, zero=0, one=1, two=2, three=3, four=4, five=5, six=6, seven=7, eight=8, nine=9, ten=10)
# from:to; a line for each first letter. Those with a capital letter never match a text in lower case
CONTRACTIONS = dict(
    pair.split(":")
    for pair in """
aint:ain't arent:aren't
cant:can't couldve:could've couldnt:couldn't couldn'tve:couldn't've couldnt've:couldn't've
didnt:didn't doesnt:doesn't dont:don't
hadnt:hadn't hadnt've:hadn't've hadn'tve:hadn't've hasnt:hasn't havent:haven't hed:he'd hed've:he'd've he'dve:he'd've
hes:he's howd:how'd howll:how'll hows:how's
Id've:I'd've I'dve:I'd've Im:I'm Ive:I've isnt:isn't itd:it'd itd've:it'd've it'dve:it'd've itll:it'll
let's:let's
maam:ma'am mightnt:mightn't mightnt've:mightn't've mightn'tve:mightn't've mightve:might've mustnt:mustn't mustve:must've
neednt:needn't notve:not've
oclock:o'clock oughtnt:oughtn't ow's'at:'ow's'at 'ows'at:'ow's'at 'ow'sat:'ow's'at
shant:shan't shed've:she'd've she'dve:she'd've she's:she's shouldve:should've shouldnt:shouldn't
shouldnt've:shouldn't've shouldn'tve:shouldn't've somebody'd:somebodyd somebodyd've:somebody'd've
somebody'dve:somebody'd've somebodyll:somebody'll somebodys:somebody's someoned:someone'd someoned've:someone'd've
someone'dve:someone'd've someonell:someone'll someones:someone's somethingd:something'd something'dve:something'd've
somethingd've:something'd've somethingll:something'll
thats:that's thered:there'd thered've:there'd've there'dve:there'd've therere:there're theres:there's theyd:they'd
theyd've:they'd've they'dve:they'd've theyll:they'll theyre:they're theyve:they've twas:'twas
wasnt:wasn't wed've:we'd've we'dve:we'd've weve:we've werent:weren't whatll:what'll whatre:what're whats:what's
whatve:what've whens:when's whered:where'd wheres:where's whereve:where've whod:who'd whod've:who'd've who'dve:who'd've
wholl:who'll whos:who's whove:who've whyll:why'll whyre:why're whys:why's wont:won't wouldve:would've wouldnt:wouldn't
wouldnt've:wouldn't've wouldn'tve:wouldn't've
yall:y'all yall'll:y'all'll y'allll:y'all'll yall'd've:y'all'd've y'alld've:y'all'd've y'all'dve:y'all'd've youd:you'd
youd've:you'd've you'dve:you'd've youll:you'll youre:you're youve:you've
""".split()
)


def processed(text: str) -> str:
    """A text after the rules for punctuation, full stops, numbers, articles and contractions, in this order."""
    pairs = list(zip(text, text[1:], strict=False))
    glued = {b for a, b in pairs if a == " "} | {a for a, b in pairs if b == " "}
    number = any(
        a.isdecimal() and b == "," and c.isdecimal() for a, b, c in zip(text, text[1:], text[2:], strict=False)
    )
    kept = ""
    for character in text:
        if character not in MARKS:
            kept += character
        elif not number and character not in glued:
            kept += " "
    clean, stops_left = "", 32
    for character, follower in zip(kept, kept[1:] + " ", strict=False):
        if character == "." and not follower.isdecimal() and stops_left:
            stops_left -= 1
        else:
            clean += character
    words = []
    for word in clean.lower().split():
        if word in DIGITS:
            word = str(DIGITS[word])
        if word in ("a", "an", "the"):
            continue
        words.append(CONTRACTIONS.get(word, word))
    return " ".join(words)


def accuracy(prediction: str, answers: list[str]) -> Fraction:
    """The mean over the people of the accuracy against all others."""
    table = {ord("\n"): " ", ord("\t"): " "}
    prediction, answers = prediction.translate(table).strip(), [a.translate(table).strip() for a in answers]
    if any(answer != answers[0] for answer in answers):
        prediction, answers = processed(prediction), list(map(processed, answers))
    total = Fraction(0)
    for left_out in range(len(answers)):
        matches = 0
        for person, answer in enumerate(answers):
            matches += person != left_out and answer == prediction
        total += min(Fraction(1), Fraction(matches, 3))
    return total / len(answers)
