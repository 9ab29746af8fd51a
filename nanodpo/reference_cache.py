"""The reference's log-probs of a whole data set, computed once and kept in out/<name>/reference-<split>.npz."""
import math
import os

import numpy as np
import torch
from tqdm import tqdm

from config import UserError, need, one_line
from nanodpo.data import batches
from nanodpo.folder import written_aside


@torch.no_grad()
def compute(run, score, reference, groups, ids, row_tokens):
    """(len(groups), K): log-probs of the groups `ids`, zeros elsewhere; every rank has all."""
    logps = torch.zeros(len(groups), groups.K)
    parts = np.array_split(ids, math.ceil(len(ids) / 1024))
    for part in tqdm(parts, f'reference {groups.split}', disable=None if run.rank == 0 else True):
        for batch in batches(groups, part, run, row_tokens):
            with run.autocast:
                logps[batch.ids] = score(reference, batch).cpu()
    return run.sum(logps)


def read(path, key, live):
    """The cached log-probs. A UserError if the key is another, or the first few do not equal `live`, computed now."""
    need(os.path.isfile(path), 'none cached')
    with one_line('the cache is damaged'), np.load(path) as file:
        need(str(file['key']) == key, 'the cache is of other data or weights')
        logps = torch.from_numpy(file['logps'])
        rtol = 2e-2 if 'bfloat16' in key else 1e-4          # beside other pairs they round differently
        need(torch.allclose(logps[:len(live)], live, rtol, atol=1e-3), 'the cache does not equal live values')
    return logps


def write(path, key, logps, say):
    """Keep them for the next run, or say why not: a full disk, or another run of this experiment that writes it now."""
    try:
        with written_aside(path) as aside, open(aside, 'wb') as f:
            np.savez(f, key=key, logps=logps.numpy())
    except OSError as error:
        say(f'note: {path} is not kept: {error}')


def load_or_compute(run, weights, score, reference, groups, row_tokens):
    """(N, K): the log-probs of all groups. weights: the reference's fingerprint; score(reference, batch): (G, K)."""
    path = os.path.join('out', run.cfg.name, f'reference-{groups.split}.npz')       # outlives this run
    key = f'{groups.fingerprint} {weights} {"bfloat16" if run.bf16 else "float32"}'
    live = compute(run, score, reference, groups, np.arange(min(16, len(groups))), row_tokens)[:16]
    reason = ''
    try:
        logps = read(path, key, live)
    except UserError as error:
        reason = error.message
    reason = max(run.gather(reason))        # '' if all ranks have read it
    how = f'{reason}, computing them' if reason else f'from {path}, equal to live ones'
    run.say(f'reference log-probs of {groups.split}: {how}')
    if reason:
        logps = compute(run, score, reference, groups, np.arange(len(groups)), row_tokens)
        run.on_first(lambda: write(path, key, logps, run.say), f'cannot write {path}')
    return logps
