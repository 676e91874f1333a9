"""Inference written as plainly as possible, to compare with: one image, one text and one hypothesis at a time. Every
token, key and value is recomputed at every step, in Python lists and loops; only the layers are the library's.
"""

import torch
import torch.nn.functional as F

from prismer.text import causal_attend


def token_logits(decoder, context, prompt, generated, pad_reads):
    """Logits (len(generated) + 1, V) of each generated token and the next one.

    With `pad_reads` one `<pad>` stands between prompt and generated tokens and predicts the first of them. It is no key
    and has position pad_id; kept tokens have positions from pad_id + 1. A `<pad>` or `<s>` that the model generates is
    an ordinary token.
    """
    pad_id = decoder.config.pad_id
    ids = prompt + [pad_id] * pad_reads + generated
    keep, positions = [], []
    for i in range(len(ids)):
        keep.append(not (pad_reads and i == len(prompt)))
        positions.append(pad_id + sum(keep) if keep[-1] else pad_id)
    device = context.device
    attend = causal_attend(torch.tensor([keep], device=device))
    ids, positions = torch.tensor([ids], device=device), torch.tensor([positions], device=device)
    hidden = decoder.run(ids, positions, attend, context)
    logits = decoder.logits(decoder.transform(hidden))[0, len(prompt) - 1 + pad_reads :]
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def plain_beam_search(
    next_log_probs, prompt_length, eos_id, *, beams, max_new_tokens, min_new_tokens, length_penalty, scoring
):
    """(tokens, score) of the best hypothesis; `next_log_probs(tokens)` gives a list of V numbers."""

    def normalise(total, generated, ended):
        length = prompt_length + generated if scoring == "classic" else generated + ended
        return total / length**length_penalty

    open_beams, hypotheses = [(0.0, [])], []
    for step in range(max_new_tokens):
        extensions = []
        for total, tokens in open_beams:
            for token, log_prob in enumerate(next_log_probs(tokens)):
                if not (token == eos_id and step < min_new_tokens):
                    extensions.append((total + log_prob, tokens, token))
        extensions.sort(key=lambda extension: -extension[0])
        open_beams = []
        for rank, (total, tokens, token) in enumerate(extensions[: 2 * beams]):
            if token != eos_id:
                open_beams.append((total, tokens + [token]))
            elif rank < beams:
                hypotheses.append((normalise(total, step, True), tokens))
        open_beams = open_beams[:beams]
        hypotheses = sorted(hypotheses, key=lambda hypothesis: -hypothesis[0])[:beams]
        attainable = normalise(extensions[0][0], step, True)
        if len(hypotheses) == beams and hypotheses[-1][0] >= attainable:
            break
    else:
        for total, tokens in open_beams:
            hypotheses.append((normalise(total, max_new_tokens, False), tokens))
    score, tokens = max(hypotheses, key=lambda hypothesis: hypothesis[0])
    return tokens, score


def plain_generate(decoder, context, groups, *, read_out="last", **options):
    """[(tokens, score)] of all prompts, image by image."""
    results = []
    for b, prompt, pad_reads in _texts(groups, read_out):

        def next_log_probs(tokens, image=context[b : b + 1], prompt=prompt, pad_reads=pad_reads):
            return token_logits(decoder, image, prompt, tokens, pad_reads)[-1].log_softmax(-1).tolist()

        results.append(plain_beam_search(next_log_probs, len(prompt), decoder.config.eos_id, **options))
    return results


def plain_rank(decoder, context, groups, answers, *, top_k=None, read_out="pad"):
    """[(best, candidates, scores)] of all questions, image by image; candidates in list order."""
    results = []
    for b, prompt, pad_reads in _texts(groups, read_out):
        image = context[b : b + 1]
        first = token_logits(decoder, image, prompt, [], pad_reads)[0].softmax(-1).tolist()
        likeliest = sorted(range(len(answers)), key=lambda i: (-first[answers[i][0]], i))
        candidates = sorted(likeliest[: top_k or len(answers)])
        scores = []
        for i in candidates:
            logits = token_logits(decoder, image, prompt, answers[i][:-1], pad_reads)
            target = torch.tensor(answers[i], device=logits.device)
            smoothing = decoder.config.label_smoothing
            loss = F.cross_entropy(logits, target, label_smoothing=smoothing, reduction="sum")
            scores.append(-float(loss) / len(answers[i]))
        results.append((candidates[scores.index(max(scores))], candidates, scores))
    return results


def _texts(groups, read_out):
    longest = max(len(prompt) for group in groups for prompt in group)
    for b, group in enumerate(groups):
        for prompt in group:
            yield b, prompt, read_out == "pad" or (read_out == "batch" and len(prompt) < longest)
