"""The published losses over a whole matrix of scores, each as its paper has it: plain, in one graph, and independent of ours.

query: (B, D) unit rows, float64. passage: (P, D); the first B are the queries' own positives, those behind them hard negatives,
of query `i % B` the i-th. scale: the inverse temperature.
"""

import math

import torch
from torch.nn.functional import binary_cross_entropy, cross_entropy, logsigmoid, relu


def info_nce(query, passage, scale):
    return cross_entropy(scale * query @ passage.T, torch.arange(len(query)))


def symmetric(query, passage, scale):
    number = torch.arange(len(query))
    return (cross_entropy(scale * query @ passage.T, number) + cross_entropy(scale * passage[: len(query)] @ query.T, number)) / 2


def nt_xent(query, passage, scale):
    """SimCLR's 2 B rows, each against all others."""
    rows = torch.cat([query, passage])
    scores = (scale * rows @ rows.T).fill_diagonal_(-torch.inf)
    return cross_entropy(scores, torch.arange(len(rows)).roll(len(query)))


def gte(query, passage, scale):
    """Li et al. 2023, eq. 2: one denominator of four blocks, of which two hold the positive."""
    n = len(query)
    own = torch.eye(n, dtype=torch.bool)
    scores = torch.cat([query @ passage.T, query @ query.T, passage[:n] @ query.T, passage[:n] @ passage.T], 1)
    is_itself = torch.zeros_like(scores, dtype=torch.bool)
    is_itself[:, len(passage) : len(passage) + n] = is_itself[:, len(passage) + 2 * n :][:, :n] = own
    total = torch.logsumexp((scale * scores).masked_fill(is_itself, -torch.inf), 1)
    return (total - scale * (query * passage[:n]).sum(1)).mean()


def negatives_of(query, passage):
    """Return the scores of all but the own positive, (B, P - 1)."""
    is_own = torch.eye(len(query), len(passage), dtype=torch.bool)
    return (query @ passage.T)[~is_own].view(len(query), -1)


def positive_of(query, passage):
    return (query * passage[: len(query)]).sum(1)


def dcl(query, passage, scale):
    return (torch.logsumexp(scale * negatives_of(query, passage), 1) - scale * positive_of(query, passage)).mean()


def dclw(query, passage, scale, sigma=0.5):
    positive = positive_of(query, passage)
    weight = 2 - len(query) * torch.softmax(positive.detach() / sigma, 0)
    return (torch.logsumexp(scale * negatives_of(query, passage), 1) - weight * scale * positive).mean()


def debiased(query, passage, scale, share=0.1, hardness=None):
    """Chuang et al.'s listing; with hardness Robinson et al.'s."""
    positive, negative = (scale * positive_of(query, passage)).exp(), (scale * negatives_of(query, passage)).exp()
    count = negative.shape[1]
    if hardness is not None:
        weight = (hardness * negatives_of(query, passage).detach()).exp()
        negative = weight * negative / weight.mean(1, keepdim=True)
    left = torch.maximum((negative.sum(1) - share * count * positive) / (1 - share), count * (-scale).exp())
    return -(positive / (positive + left)).log().mean()


def additive_margin(query, passage, scale, margin=0.2):
    scores = query @ passage.T
    return cross_entropy(scale * (scores - margin * torch.eye(*scores.shape)), torch.arange(len(query)))


def additive_angle(query, passage, scale, margin=0.2):
    scores, is_own = query @ passage.T, torch.eye(len(query), len(passage), dtype=torch.bool)
    return cross_entropy(scale * torch.where(is_own, (scores.arccos() + margin).cos(), scores), torch.arange(len(query)))


def weighted(query, passage, scale, hardness, mean_weight=False, which="all"):
    """LLaVE's eq. 5 and its kin: negatives weigh exp(hardness * score), over their mean with mean_weight."""
    n = len(query)
    scores, is_own = query @ passage.T, torch.eye(n, len(passage), dtype=torch.bool)
    is_brought = (torch.arange(len(passage)) % n == torch.arange(n)[:, None]) & ~is_own
    has_weight = {"all": ~is_own, "in_batch": ~is_own & ~is_brought, "own": is_brought}[which]
    log_weight = torch.where(has_weight, hardness * scores.detach(), 0)
    if mean_weight:
        log_mean = log_weight[~is_own].view(n, -1).exp().mean(1, keepdim=True).log()
        log_weight = torch.where(is_own, 0, log_weight - log_mean)
    return cross_entropy(scale * scores + log_weight, torch.arange(n))


def focal(query, passage, scale, gamma=0.5):
    log_p = torch.log_softmax(scale * query @ passage.T, 1).diagonal()
    return -((1 - log_p.detach().exp()) ** gamma * log_p).mean()


def progressive(query, passage, scale, progress=0.3):
    loss = cross_entropy(scale * query @ passage.T, torch.arange(len(query)), reduction="none")
    hard = 1 - (-loss).exp().detach()
    return (loss * 2 * ((1 - progress) * (1 - hard) + progress * hard)).mean()


def masked(query, passage, scale, limit, hardest=None):
    """False negatives out, by a limit of the positive's score; then the hardest of the rest."""
    positive, negative = positive_of(query, passage), negatives_of(query, passage)
    logits = (scale * negative).masked_fill(negative > limit(positive)[:, None], -torch.inf)
    if hardest is not None:
        logits = logits.sort(1, descending=True).values[:, :hardest]
    return cross_entropy(torch.cat([scale * positive[:, None], logits], 1), torch.zeros(len(query), dtype=torch.int64))


def own_only(query, passage, scale):
    """NV-Embed's second stage: the hard negatives that a query brings, and no others."""
    n = len(query)
    is_row = torch.arange(len(passage)) % n == torch.arange(n)[:, None]
    return cross_entropy((scale * query @ passage.T).masked_fill(~is_row, -torch.inf), torch.arange(n))


def cacr(query, passage, scale):
    far = 2 - 2 * negatives_of(query, passage)
    return (2 - 2 * positive_of(query, passage) - (torch.softmax(-2 * far, 1) * far).sum(1)).mean()


def smoothed(query, passage, scale, smoothing=0.1):
    return cross_entropy(scale * query @ passage.T, torch.arange(len(query)), label_smoothing=smoothing)


def uniform(query, passage, scale):
    return 2 - 2 * positive_of(query, passage).mean() + (-2 * torch.pdist(query).square()).exp().mean().log()


def arm(query, passage, scale):
    own = (passage[: len(query)] @ passage.T).detach()
    is_own = torch.eye(*own.shape, dtype=torch.bool)
    margin = (1 - own)[~is_own].view(len(query), -1)
    return (positive_of(query, passage)[:, None] - negatives_of(query, passage) - margin).square().mean()


def siglip(query, passage, scale, bias=-1.0):
    labels = 2 * torch.eye(len(query), len(passage)).double() - 1
    return -logsigmoid(labels * (scale * query @ passage.T + bias)).sum() / len(query)


def groco(query, passage, scale, hardest=3, steepness=1.0):
    """The odd-even network as products of n x n matrices, one for every layer, as in diffsort."""
    negative = negatives_of(query, passage).sort(1, descending=True).values[:, :hardest].flip(1)
    total = 0.0
    for scores in steepness * scale * torch.cat([negative, positive_of(query, passage)[:, None]], 1):
        n, permutation = len(scores), torch.eye(hardest + 1).double()
        for layer in range(n):
            swap = torch.eye(n).double()
            for low in range(layer % 2, n - 1, 2):
                keep = torch.atan(scores[low + 1] - scores[low]) / math.pi + 0.5
                pair = torch.stack([torch.stack([keep, 1 - keep]), torch.stack([1 - keep, keep])])
                rows = torch.tensor([low, low + 1])
                swap = swap.index_put((rows[:, None], rows[None]), pair)
            scores, permutation = swap @ scores, swap @ permutation
        on_top = permutation[-1].clamp(0, 1)
        wanted = torch.zeros(n).double()
        wanted[-1] = 1
        # Of the two groups of ranks each has its cross entropy, and they are equal.
        total = total + (binary_cross_entropy(on_top, wanted) + binary_cross_entropy(1 - on_top, 1 - wanted)) / 2
    return total / len(query)


def pair_temperature(query, passage, scale, slope=0.4, offset=-0.2, spread=4.0, weight=0.1):
    scores = query @ passage.T
    times = torch.exp(math.log(spread) * torch.tanh(slope * scores + offset))
    regularizer = (times.log() + 1 / times - 1).mean(1)
    return (cross_entropy(scale * scores / times, torch.arange(len(query)), reduction="none") + weight * regularizer).mean()


def several(query, passage, scale, positives, reading):
    """positives: of each query, its own first. The three readings of several positives."""
    losses = []
    for row, own in zip(scale * query @ passage.T, positives, strict=True):
        others = torch.tensor([j for j in range(len(passage)) if j not in own])
        positive, negative = row[torch.tensor(own)], torch.logsumexp(row[others], 0)
        if reading == "mean":
            losses.append((torch.logaddexp(negative, positive) - positive).mean())
        elif reading == "sum":
            losses.append(torch.logaddexp(negative, positive.logsumexp(0)) - positive.logsumexp(0))
        else:
            losses.append((row.logsumexp(0) - positive).mean())
    return torch.stack(losses).mean()


def cosent(score, grade, scale):
    """All two pairs, as in sentence-transformers."""
    lead = scale * (score[:, None] - score[None, :])
    is_wrong_way = grade[:, None] < grade[None, :]
    return torch.logsumexp(torch.cat([torch.zeros(1).double(), lead[is_wrong_way]]), 0)


def correlation(score, grade, scale):
    return 1 - torch.corrcoef(torch.stack([score, grade]))[0, 1]


def hinge(query, passage, scale, margin=0.1):
    """Of the worked example in docs/objectives.md."""
    return relu(margin + negatives_of(query, passage) - positive_of(query, passage)[:, None]).sum(1).mean()
