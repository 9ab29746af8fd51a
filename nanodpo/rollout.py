"""Responses drawn from a model, and what is measured on them: log-probs, KL, the score of a reward file."""
import contextlib
import math
import runpy
import sys

import numpy as np
import torch
from tqdm import tqdm

from config import need, one_line
from nanodpo.data import Sampled, batches, distinct_prompts, row_limit
from nanodpo.folder import regular


def draw_responses(model, prompts, meta, room, batch_size, seed, max_new_tokens=None, number=0, desc='', **knobs):
    """One response to each prompt, lists of ids: at most max_new_tokens, and with its prompt at most `room`.

    Batches are numbered from `number` on. Each has a seed of its own: any process draws the same. knobs: of generate.
    """
    responses = []
    for i in tqdm(range(0, len(prompts), batch_size), desc, leave=False, disable=None if desc else True):
        batch = prompts[i:i + batch_size]
        batch_seed = (seed * 1_000_003 + number + i // batch_size) % 2**63
        new_tokens = min(max_new_tokens or room, room - min(map(len, batch)))
        with one_line('cannot sample'):
            drawn = model.generate(batch, new_tokens, meta['eot_token'], meta['vocab_size'], seed=batch_seed, **knobs)
        responses += [ids[:room - len(prompt)] for ids, prompt in zip(drawn, batch)]
    return responses


@torch.no_grad()
def token_logps_of(model, groups, worker, desc=''):
    """Log-probs of all tokens of responses, nats: a list of K float64 arrays for each group [prompt, K responses]."""
    groups = Sampled(groups)
    logps = np.zeros(len(groups.tokens))
    rows = batches(groups, np.arange(len(groups)), worker.alone(), row_limit(0, worker.device, groups))
    for batch in tqdm(rows, desc, unit=' rows', leave=False, disable=None if desc else True):
        with worker.autocast:
            scored = model(batch.tokens, batch.positions, batch.mask, batch.predictor, batch.target)
        places = [np.arange(groups.index[i, 1], groups.index[i, -1]) for i in batch.ids]        # in the row's order
        logps[np.concatenate(places)] = scored[:len(batch.response)].cpu().numpy()
    return [[logps[start:end] for start, end in zip(bounds[1:], bounds[2:])] for bounds in groups.index.tolist()]


@torch.no_grad()
def estimate_kl(score, policy, reference, groups, n, seed, run, row_tokens):
    """{'kl', 'kl_error'}: KL(policy || reference), nats, from a response to each of n prompts."""
    size = 16
    room = groups.meta['max_length']
    prompts = distinct_prompts(groups, n, seed)
    sums = torch.zeros(2, dtype=run.exact, device=run.device)           # of log ratios, and of their squares
    for number in range(run.rank, math.ceil(len(prompts) / size), run.world):
        asked = prompts[number * size:(number + 1) * size]
        with run.autocast:
            responses = draw_responses(policy, asked, groups.meta, room, size, seed, number=number)
            drawn = Sampled([[prompt, ids] for prompt, ids in zip(asked, responses)])
            for batch in batches(drawn, np.arange(len(drawn)), run.alone(), max(row_tokens, int(drawn.lengths.max()))):
                ratio = (score(policy, batch) - score(reference, batch)).to(run.exact)                  # (G, 1)
                sums += torch.stack([ratio.sum(), ratio.square().sum()])
    mean, square = (run.sum(sums) / len(prompts)).tolist()
    return {'kl': mean, 'kl_error': math.sqrt(max(0, square - mean ** 2) / max(1, len(prompts) - 1))}


def mean_and_error(values, num_samples):
    """{'mean', 'error'} of values, num_samples a prompt. Its standard error is over prompts, of one over samples."""
    rows = np.array(values, dtype=np.float64).reshape(-1, num_samples)
    means = rows.mean(1) if len(rows) > 1 else rows[0]
    error = float(means.std(ddof=1)) / math.sqrt(len(means)) if len(means) > 1 else None
    return {'mean': float(means.mean()), 'error': error}


def read_reward(path):
    """A reward file's functions as one: (prompts, responses) -> {name: list of float or bool}. UserErrors.

    They are reward(prompts, responses) -> numbers and perhaps metrics(prompts, responses) -> {name: values}.
    """
    with one_line(f'reward file {path}', path), contextlib.redirect_stdout(sys.stderr):
        functions = runpy.run_path(regular(path))
    need(callable(functions.get('reward')), f'reward file {path} defines no function reward(prompts, responses)')

    def score(prompts, responses):
        with one_line(f'reward file {path}', path), contextlib.redirect_stdout(sys.stderr):
            scores = {'true_reward': functions['reward'](list(prompts), list(responses))}
            if 'metrics' in functions:
                scores |= functions['metrics'](list(prompts), list(responses))
            for name, values in scores.items():
                scores[name] = [bool(x) if isinstance(x, (bool, np.bool_)) else float(x) for x in values]
                need(len(scores[name]) == len(responses) and all(map(math.isfinite, scores[name])),
                     f'reward file {path}: {name} must be {len(responses)} finite numbers')
        return scores
    return score
