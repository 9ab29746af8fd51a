"""The reference's log-probs of a whole data set, computed once and kept in out/<name>/reference-<split>.npz.

They are keyed by data, weights and type, and the first few are checked against live ones: packed beside other pairs
they round differently, within 1e-4 of their size in float32, 2e-2 in bfloat16.
"""
import math
import os

import numpy as np
import torch
from tqdm import tqdm

from nanodpo.data import batches


@torch.no_grad()
def compute(run, score, groups, ids, row_tokens):
    """(len(groups), K): log-probs of the groups `ids`, zeros elsewhere; every rank has all."""
    logps = torch.zeros(len(groups), groups.K)
    for some in tqdm(np.array_split(ids, math.ceil(len(ids) / 1024)), f'reference {groups.split}',
                     disable=None if run.rank == 0 else True):
        for batch in batches(groups, some, run, row_tokens):
            with run.autocast:
                logps[batch.ids] = score(batch).cpu()
    return run.sum(logps)


def read(path, key, live):
    """The cached log-probs, None where there are none that can be trusted. live: the first few, computed now."""
    try:
        with np.load(path) as file:
            cached = torch.from_numpy(file['logps']) if str(file['key']) == key else None
    except Exception:       # missing, or whatever a damaged file makes of numpy
        return None
    tolerance = 2e-2 if 'bfloat16' in key else 1e-4
    good = cached is not None and torch.allclose(cached[:len(live)], live, rtol=tolerance, atol=1e-3)
    return cached if good else None


def load_or_compute(run, weights, score, splits, row_tokens):
    """{split: (N, K) log-probs} of `splits`, Groups. weights: the reference's fingerprint; score(batch): its log-probs."""
    found = {}
    for groups in splits:
        path = os.path.join('out', run.cfg.name, f'reference-{groups.split}.npz')       # outlives this run
        key = f'{groups.fingerprint} {weights} {"bfloat16" if run.bf16 else "float32"}'
        few = np.arange(min(16, len(groups)))
        live = compute(run, score, groups, few, row_tokens)[few]
        logps = read(path, key, live) if run.rank == 0 else None
        if run.sum(torch.tensor([int(logps is not None)])).item() == 0:                 # rank 0 alone reads
            run.say(f'reference log-probs of {groups.split}: computing them for {path}')
            logps = compute(run, score, groups, np.arange(len(groups)), row_tokens)
            run.on_first(lambda: np.savez(path, key=np.array(key), logps=logps.numpy()), f'cannot write {path}')
        else:
            run.say(f'reference log-probs of {groups.split}: from {path}, equal to live ones')
            logps = run.sum(logps if run.rank == 0 else torch.zeros(len(groups), groups.K))
        found[groups.split] = logps
    return found
