"""Which exceptions are sentences for the user, and which are mistakes of ours whose traceback is needed."""

import dis


def is_a_sentence(error: BaseException) -> bool:
    """Whether this library raised `error` on purpose: a `raise` in its code, or an exception of its own kind.

    The same classes come out of torch, numpy and the interpreter for mistakes of ours, whose traceback is needed.
    """
    if type(error).__module__.startswith("prismer."):
        return True
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    frame = trace.tb_frame
    raised = dis.opname[frame.f_code.co_code[trace.tb_lasti]] == "RAISE_VARARGS"
    return raised and frame.f_globals.get("__name__", "").startswith("prismer.")
