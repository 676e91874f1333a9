"""Attention of a resampler, composed of torch's operators, in both orders."""

import torch
from torch import Tensor

from prismer.kernels import matmul
from prismer.kernels.absorbed_projection import bmm, image_slices, put_images, take_images

# the absorbed order; on the CPU some images at a time


def _mixture(mixed: Tensor, share: Tensor, gamma: Tensor, beta: Tensor, probs_z: Tensor, query: Tensor) -> Tensor:
    """t of the formulas in `__init__.py`, (n, Q, D): gamma * mixed + beta * share + probs_z query."""
    total = (mixed.to(share.dtype) * gamma).addcmul_(share[..., None], beta.to(share.dtype))
    return torch.baddbmm(total.to(query.dtype), probs_z, query)


def attend(
    a: Tensor, query: Tensor, x_hat: Tensor, gamma: Tensor, beta: Tensor, keep: bool, keep_mixed: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Absorbed queries (H, B * M, D) -> t of the same shape, probs, share, mixed (empty if not kept)."""
    (B, M, D), L = query.shape, x_hat.shape[1]
    Q, compute = a.shape[0] * M, torch.promote_types(query.dtype, torch.float32)
    probs = query.new_empty(B if keep else 0, Q, M + L)
    share = query.new_empty(B if keep_mixed else 0, Q, dtype=compute)
    mixed = query.new_empty(B if keep_mixed else 0, Q, D)
    t, beta = torch.empty_like(a), beta.to(compute)
    for images in image_slices(query, Q * max(M + L, D)):
        u, x, a_here = query[images], x_hat[images], take_images(a, B, images)
        scores = u.new_empty(len(u), Q, M + L)
        bmm(a_here, u.mT, out=scores[..., :M])
        # a softmax ignores what all keys share, so subtract the offset of the inputs from the scores of the few latents
        scores[..., :M] -= torch.matmul(a_here.to(compute), beta)[..., None]
        bmm((a_here * gamma).to(u.dtype), x.mT, out=scores[..., M:])
        p = torch.softmax(scores, -1, out=probs[images] if keep else None)
        mixed_here, share_here = bmm(p[..., M:], x), p[..., M:].sum(-1, dtype=compute)
        if keep_mixed:
            mixed[images], share[images] = mixed_here, share_here
        put_images(_mixture(mixed_here, share_here, gamma, beta, p[..., :M], u), t, B, images)
    return t, probs, share, mixed


def attend_backward(
    a: Tensor,
    dt: Tensor,
    query: Tensor,
    x_hat: Tensor,
    gamma: Tensor,
    beta: Tensor,
    probs: Tensor,
    share: Tensor,
    mixed: Tensor,
    needs: dict[str, bool],
    results: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor]:
    """Gradients of `attend`: fills those of query (its keys' part), x_hat and norm; returns da, and t again."""
    (B, M, D), L, Q = query.shape, x_hat.shape[1], probs.shape[1]
    compute = torch.promote_types(query.dtype, torch.float32)
    dquery, dx_hat, dgamma, dbeta, _, _ = results
    da, t = torch.empty_like(a), torch.empty_like(a if needs["in_proj_weight"] else a[:0])
    for images in image_slices(query, 2 * Q * max(M + L, D)):
        u, x, p = query[images], x_hat[images], probs[images]
        dt_here = take_images(dt, B, images)
        pair = torch.cat([take_images(a, B, images), dt_here], dim=1)
        scaled = (pair * gamma).to(u.dtype)
        # gradients of scores above probabilities: one product with (a, dt) gives the gradient of the keys
        both = u.new_empty(len(u), 2 * Q, M + L)
        dscores, dprobs = both[:, :Q], both[:, Q:]
        bmm(pair[:, Q:], u.mT, out=dprobs[..., :M])
        dprobs[..., :M] -= torch.matmul(dt_here.to(compute), beta.to(compute))[..., None]
        bmm(scaled[:, Q:], x.mT, out=dprobs[..., M:])
        dscores.copy_(torch._softmax_backward_data(dprobs, p, -1, p.dtype))
        if needs["x_hat"] or needs["query"]:
            dprobs.copy_(p)
        if needs["x_hat"]:
            bmm(both[..., M:].mT, scaled, out=dx_hat[images])
        if needs["query"]:
            bmm(both[..., :M].mT, pair, out=dquery[images])
        if any(needs[name] for name in needs if name != "x_hat"):
            mixed_da = bmm(dscores[..., M:], x)
            share_da = dscores[..., M:].sum(-1, dtype=compute)
            put_images(_mixture(mixed_da, share_da, gamma, beta, dscores[..., :M], u), da, B, images)
        if needs["norm"]:
            products = (mixed_da.to(compute) * pair[:, :Q]).addcmul_(mixed[images].to(compute), pair[:, Q:].to(compute))
            dgamma += products.sum((0, 1))
            weights = torch.cat([share_da, share[images]], dim=1).view(-1)
            dbeta += torch.mv(pair.to(compute).view(-1, D).T, weights)
        if needs["in_proj_weight"]:
            again = _mixture(mixed[images], share[images], gamma, beta, p[..., :M], u)
            put_images(again, t, B, images)
    return da, t


def bias_gradient(dq: Tensor, dy: Tensor, dbias: Tensor) -> None:
    D = dq.shape[1]
    torch.sum(dq, 0, out=dbias[:D])
    dbias[D : 2 * D].zero_()
    torch.sum(dy, 0, out=dbias[2 * D :])


# the ordinary order


def _split_heads(t: Tensor, H: int) -> Tensor:
    """(n, R, D) -> (n * H, R, K); of one image it is a view."""
    return t.unflatten(2, (H, -1)).transpose(1, 2).flatten(0, 1)


def _normed(x_hat: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """The input of the projections; not saved, since x_hat is."""
    return torch.addcmul(beta, x_hat, gamma).to(x_hat.dtype)


def ordinary_forward(
    query: Tensor, x_hat: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor, bias: Tensor, H: int, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (B, M, D), L = query.shape, x_hat.shape[1]
    scale, w_kv = (D // H) ** -0.5, weight[D:]
    q = matmul.linear(query.view(-1, D), weight[:D], bias[:D]).view(B, M, D)
    kv = q.new_empty(B * (M + L), 2 * D)
    kv[: B * M] = matmul.linear(query.view(-1, D), w_kv)
    kv[B * M :] = matmul.linear(_normed(x_hat, gamma, beta).view(-1, D), w_kv)
    kv_z, kv_x = kv[: B * M].view(B, M, 2 * D), kv[B * M :].view(B, L, 2 * D)
    probs, out = q.new_empty(B if keep else 0, H * M, M + L), torch.empty_like(query)
    for images in image_slices(query, max(H * M * (M + L), 2 * D * (M + L))):
        q_here = _split_heads(q[images], H)
        k_z, v_z, k_x, v_x = (_split_heads(t, H) for kv in (kv_z, kv_x) for t in kv[images].chunk(2, 2))
        scores = q.new_empty(len(q_here), M, M + L)
        for part, k in ((scores[..., :M], k_z), (scores[..., M:], k_x)):
            torch.baddbmm(part, q_here, k.mT, beta=0, alpha=scale, out=part)
        p = torch.softmax(scores, -1)
        o = torch.baddbmm(torch.bmm(p[..., :M], v_z), p[..., M:], v_x)
        out[images].unflatten(2, (H, -1)).copy_(o.unflatten(0, (-1, H)).transpose(1, 2))
        if keep:
            probs[images] = p.view(-1, H * M, M + L)
    # the probabilities of a query sum to one, so b_v passes through
    return out.add_(bias[2 * D :]), q, probs, kv


def ordinary_backward(
    dy: Tensor,
    query: Tensor,
    x_hat: Tensor,
    gamma: Tensor,
    beta: Tensor,
    weight: Tensor,
    q: Tensor,
    probs: Tensor,
    kv: Tensor,
    H: int,
    needs: dict[str, bool],
    results: tuple[Tensor, ...],
) -> None:
    (B, M, D), L = query.shape, x_hat.shape[1]
    scale, w_kv = (D // H) ** -0.5, weight[D:]
    dquery, dx_hat, dgamma, dbeta, dweight, dbias = results
    need_dq = needs["query"] or needs["in_proj_weight"] or needs["in_proj_bias"]
    need_dkv = needs["query"] or needs["x_hat"] or needs["norm"] or needs["in_proj_weight"]
    parts = [t.view(B, -1, 2 * D) for t in (kv[: B * M], kv[B * M :])]
    dkv = torch.empty_like(kv if need_dkv else kv[:0])
    dparts = [t.view(B, -1, 2 * D) for t in (dkv[: B * M], dkv[B * M :])] if need_dkv else []
    dq = torch.empty_like(q if need_dq else q[:0])
    for images in image_slices(query, max(H * M * (M + L), 2 * D * (M + L))):
        n = len(query[images])
        q_here, do = (_split_heads(t[images], H) for t in (q, dy))
        p = probs[images].view(n * H, M, M + L)
        ks, vs = ([_split_heads(part[images].chunk(2, 2)[i], H) for part in parts] for i in (0, 1))
        keys = slice(0, M), slice(M, M + L)
        dprobs = torch.empty_like(p)
        for part, v in zip(keys, vs, strict=True):
            torch.bmm(do, v.mT, out=dprobs[..., part])
        dscores = torch._softmax_backward_data(dprobs, p, -1, p.dtype)
        if need_dq:
            o = torch.baddbmm(do, dscores[..., keys[0]], ks[0], beta=0, alpha=scale)
            torch.baddbmm(o, dscores[..., keys[1]], ks[1], alpha=scale, out=o)
            dq[images].unflatten(2, (H, -1)).copy_(o.unflatten(0, (-1, H)).transpose(1, 2))
        for part, d in zip(keys, dparts, strict=False):
            dk, dv = (t.unflatten(2, (H, -1)).transpose(1, 2) for t in d[images].chunk(2, 2))
            zero = do.new_empty(n * H, part.stop - part.start, D // H)
            o = torch.baddbmm(zero, dscores[..., part].mT, q_here, beta=0, alpha=scale)
            dk.copy_(o.unflatten(0, (n, H)))
            dv.copy_(torch.bmm(p[..., part].mT, do).unflatten(0, (n, H)))
    rows, dq, dkv_z, dkv_x = query.view(-1, D), dq.view(-1, D), dkv[: B * M], dkv[B * M :]
    if needs["x_hat"] or needs["norm"]:
        dx = matmul.mm(dkv_x, w_kv)
    if needs["norm"]:
        # in chunks of images, so that the products in fp32 stay small
        for images in image_slices(query, L * D):
            dx_here = dx.view(B, L, D)[images].to(dgamma.dtype)
            dgamma += (dx_here * x_hat[images]).sum((0, 1))
            dbeta += dx_here.sum((0, 1))
    if needs["x_hat"]:
        torch.mul(dx.view(B, L, D), gamma, out=dx_hat)
    if needs["query"]:
        dquery = dquery.view(-1, D)
        dquery.copy_(matmul.mm(dkv_z, w_kv))
        dquery += matmul.mm(dq, weight[:D])
    if needs["in_proj_weight"]:
        dweight[:D] = matmul.mm(dq.T, rows)
        dweight[D:] = matmul.mm(dkv_x.T, _normed(x_hat, gamma, beta).view(-1, D))
        dweight[D:] += matmul.mm(dkv_z.T, rows)
    if needs["in_proj_bias"]:
        bias_gradient(dq, dy.view(-1, D), dbias)
