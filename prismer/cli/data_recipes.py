"""`prismer data recipes`: the commands that download and import the datasets of the published training set."""

import argparse
import re
import textwrap

_WIDTH = 116


def add_recipes_command(steps: argparse._SubParsersAction) -> None:
    """Add `recipes` to the steps of `prismer data`."""
    recipes = steps.add_parser("recipes", help="print the commands that download and import a published dataset")
    names = ("cc12m", "cc3m", "sbu", "coco", "vg")
    recipes.add_argument("name", nargs="?", choices=names, metavar="NAME", help=f"{', '.join(names)}; default: a list")
    recipes.set_defaults(run=_print_recipe)


def _print_recipe(args: argparse.Namespace) -> None:
    from prismer.dataloading.sources.recipes import PUBLISHED_SET, RECIPES

    if args.name is None:
        for name, recipe in RECIPES.items():
            print(f"{name:<6} {recipe.title}: {recipe.pairs}; disk: {recipe.size}")
        print()
        for line in PUBLISHED_SET:
            print(textwrap.fill(line, _WIDTH, break_long_words=False, break_on_hyphens=False))
        return
    recipe = RECIPES[args.name]
    notes = (f"{recipe.title}: {recipe.pairs}.", f"Disk: {recipe.size}.", f"Licence: {recipe.licence}.")
    for note in notes:
        print(textwrap.fill(note, _WIDTH, initial_indent="# ", subsequent_indent="# "))
    for command in (*recipe.download, *recipe.imports):
        print(_folded(command))


def _folded(command: str) -> str:
    """A long command on several lines, as a shell reads them."""
    if command.startswith("#") or len(command) <= _WIDTH:
        return command
    # an option and its value stay together
    words = re.sub(r" (--\S+) (?!--)", " \\1\0", command)
    lines = textwrap.wrap(words, _WIDTH - 2, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return " \\\n".join(lines).replace("\0", " ")
