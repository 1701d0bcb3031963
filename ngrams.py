"""A linear model on hashed n-grams of tokens: what a bag of words sees of a review, beside what a GPT sees of it."""

import warnings

import numpy as np
import torch
import torch.nn.functional as F

BUCKETS = 1 << 19
STRENGTH = 30.0  # weight of the data against the L2 penalty, as C in liblinear


def counts(rows, n):
    """(bucket, value, row offset) of the distinct 1- to n-grams of each row of ids; values are 1 + log count."""
    ids = np.concatenate(rows).astype(np.uint64)
    owner = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    code, keys = np.zeros_like(ids), []
    for k in range(min(n, len(ids))):
        whole = np.zeros(len(ids), dtype=bool)  # the n-gram of k + 1 tokens that begins here ends in the same row
        whole[:len(ids) - k] = owner[k:] == owner[:len(ids) - k]
        code = (code + np.concatenate([ids[k:], np.zeros(k, np.uint64)]) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)  # wraps: meant to
        code ^= code >> np.uint64(29)
        keys.append(owner[whole] * BUCKETS + (code[whole] >> np.uint64(20)).astype(np.int64) % BUCKETS)
    keys, times = np.unique(np.concatenate(keys), return_counts=True)
    return keys % BUCKETS, 1 + np.log(times), np.searchsorted(keys, np.arange(len(rows)) * BUCKETS)


class Ngrams:
    """TF-IDF of n-grams (sublinear, of length 1) and a multinomial logistic regression on them."""

    def __init__(self, n, idf, weight, bias):
        self.n, self.idf, self.weight, self.bias = n, idf, weight, bias  # (BUCKETS,), (BUCKETS, classes), (classes,)

    @classmethod
    def train(cls, rows, labels, classes, n, steps=60):
        """From rows of ids; n-grams that stand in one row only are left out."""
        bucket, _, _ = counts(rows, n)
        frequency = torch.from_numpy(np.bincount(bucket, minlength=BUCKETS))
        idf = torch.where(frequency > 1, torch.log((1 + len(rows)) / (1 + frequency)) + 1, 0.0).float()
        model = cls(n, idf, torch.zeros(BUCKETS, classes), torch.zeros(classes))
        features = model.features(rows)
        columns = torch.nonzero(idf)[:, 0]
        kept = features.index_select(1, columns).coalesce()
        with warnings.catch_warnings(action="ignore"):  # "in beta state"
            features, transposed = kept.to_sparse_csr(), kept.t().to_sparse_csr()
        weight, bias = torch.zeros(len(columns), classes), torch.zeros(classes)
        solver = torch.optim.LBFGS([weight, bias], max_iter=steps, history_size=8, line_search_fn="strong_wolfe")
        wanted = F.one_hot(torch.from_numpy(labels), classes).float()

        def objective():
            """The penalised loss; its gradients are written down, as autograd is slow with sparse matrices."""
            logs = (features @ weight + bias).log_softmax(dim=-1)
            slope = STRENGTH * (logs.exp() - wanted)
            weight.grad, bias.grad = transposed @ slope + weight, slope.sum(dim=0)
            return 0.5 * weight.square().sum() - STRENGTH * (logs * wanted).sum()

        solver.step(objective)
        model.weight[columns], model.bias = weight, bias
        return model

    def features(self, rows):
        """(N, BUCKETS) sparse; each row has the length 1."""
        bucket, value, offsets = (torch.from_numpy(array) for array in counts(rows, self.n))
        value = value.float() * self.idf[bucket]
        owner = torch.bucketize(torch.arange(len(bucket)), offsets, right=True) - 1
        norm = torch.zeros(len(rows)).index_add(0, owner, value.square()).sqrt().clamp(min=1e-9)
        return torch.sparse_coo_tensor(torch.stack([owner, bucket]), value / norm[owner], (len(rows), BUCKETS),
                                       check_invariants=False, is_coalesced=True)

    def log_probabilities(self, rows):
        """(N, classes) of rows of ids."""
        return (self.features(rows) @ self.weight + self.bias).log_softmax(dim=-1).numpy()
