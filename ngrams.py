"""A linear model on hashed n-grams of tokens: what a bag of words sees of a review, beside what a GPT sees of it."""

import warnings

import numpy as np
import torch
import torch.nn.functional as F

KEYS = 1 << 40  # of a million n-grams hardly two share a key
STRENGTH = 30.0  # weight of the data against the L2 penalty, as C in liblinear


def counts(rows, n):
    """(key, value, number of the row) of the distinct 1- to n-grams of each row of ids; keys rise in a row, values are 1 + log count."""
    ids = np.concatenate(rows).astype(np.uint64)
    owner = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    code, keys = np.zeros_like(ids), []
    for k in range(n):
        last = ids[k:]  # tokens of the n-grams of k + 1
        code = (code[:len(last)] + last + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)  # wraps: meant to
        code ^= code >> np.uint64(29)
        whole = owner[:len(last)] == owner[k:]  # in one row
        keys.append((owner[k:] * KEYS + (code >> np.uint64(20)).astype(np.int64) % KEYS)[whole])
    key, times = np.unique(np.concatenate(keys), return_counts=True)
    return key % KEYS, 1 + np.log(times), key // KEYS


class Ngrams:
    """TF-IDF of n-grams (sublinear, of length 1) and a multinomial logistic regression on them.

    The more an n-gram's frequency differs between classes, the less its weights are penalised (Wang and Manning 2012).
    """

    def __init__(self, n, idf, weight, bias, keys):
        """`keys` (G,) sorted, `idf` (G,), `weight` (G, classes), `bias` (classes,)."""
        self.n, self.idf, self.weight, self.bias, self.keys = n, idf, weight, bias, keys

    @classmethod
    def train(cls, rows, labels, classes, n):
        """From rows of ids; n-grams that stand in one row only are left out."""
        keys, frequency = map(torch.from_numpy, np.unique(counts(rows, n)[0], return_counts=True))
        keys, frequency = keys[frequency > 1], frequency[frequency > 1]
        idf = (torch.log((1 + len(rows)) / (1 + frequency)) + 1).float()
        features = cls(n, idf, None, None, keys).features(rows)
        row, column = features.indices()
        wanted = F.one_hot(torch.from_numpy(labels), classes).float()
        inside = torch.zeros(len(keys), classes).index_add(0, column, wanted[row])  # in how many rows of each class an n-gram stands
        share = lambda times: (times + 1) / (times + 1).sum(dim=0)
        ratio = (share(inside) / share(inside.sum(dim=1, keepdim=True) - inside)).log()
        with warnings.catch_warnings(action="ignore"):  # "in beta state"
            features, transposed = features.to_sparse_csr(), features.t().to_sparse_csr()
        weight, bias = torch.zeros_like(ratio), torch.zeros(classes)
        solver = torch.optim.LBFGS([weight, bias], max_iter=60, history_size=8, line_search_fn="strong_wolfe")

        def objective():
            """The penalised loss; its gradients are written down, as autograd is slow with sparse matrices."""
            logs = (features @ (ratio * weight) + bias).log_softmax(dim=-1)
            slope = STRENGTH * (logs.exp() - wanted)
            weight.grad, bias.grad = ratio * (transposed @ slope) + weight, slope.sum(dim=0)
            return 0.5 * weight.square().sum() - STRENGTH * (logs * wanted).sum()

        solver.step(objective)
        return cls(n, idf, ratio * weight, bias, keys)

    def features(self, rows):
        """(N, G) sparse; each row has the length 1."""
        key, value, owner = map(torch.from_numpy, counts(rows, self.n))
        column = torch.searchsorted(self.keys, key)
        known = F.pad(self.keys, (0, 1), value=-1)[column] == key  # torch.isin would sort all keys anew for each batch
        column, value, owner = column[known], value[known], owner[known]
        value = value.float() * self.idf[column]
        norm = torch.zeros(len(rows)).index_add(0, owner, value.square()).sqrt().clamp(min=1e-9)
        with torch.sparse.check_sparse_tensor_invariants(False):  # PyTorch 2.11 warns in spite of the argument of this name
            return torch.sparse_coo_tensor(torch.stack([owner, column]), value / norm[owner], (len(rows), len(self.idf)), is_coalesced=True)

    def log_probabilities(self, rows):
        """(N, classes) of rows of ids."""
        return (self.features(rows) @ self.weight + self.bias).log_softmax(dim=-1).numpy()
