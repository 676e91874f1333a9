"""Errors that are meant for the user, whose message is one sentence: what was given, what was expected, what to do.

The ops themselves refuse wrong arguments with a plain ValueError, which is meant for a programmer.
"""


class InputError(ValueError):
    """A setting, an argument or a file is wrong; the user has to change it."""


class MachineError(RuntimeError):
    """This machine lacks something: an extension, a package, weights, or a readable disk."""
