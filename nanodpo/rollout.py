"""Responses drawn from a model, and what is measured on them: log-probs, KL, a reward file's score."""
import contextlib
import math
import runpy
import sys

import numpy as np
import torch
from tqdm import tqdm

from config import UserError, need
from nanodpo.data import Sampled, batches, distinct_prompts, row_limit


def draw_responses(model, prompts, tokenizer, room, batch_size, seed, max_new_tokens=None, number=0, desc='', **knobs):
    """One response to each prompt, lists of ids: at most max_new_tokens, and at most `room` with its prompt.

    Batches are numbered, the first is `number`. Each has its own seed, so it does not matter which process draws which.
    knobs: of GPT.generate. tokenizer: (id of the end token, size of the vocabulary).
    """
    drawn = []
    for j in tqdm(range(0, len(prompts), batch_size), desc, disable=None if desc else True, leave=False):
        some = prompts[j:j + batch_size]
        new = min(max_new_tokens or room, room - min(map(len, some)))
        drawn += model.generate(some, new, *tokenizer, seed=(seed * 1_000_003 + number + j // batch_size) % 2**63, **knobs)
    return [ids[:room - len(prompt)] for ids, prompt in zip(drawn, prompts)]


@torch.no_grad()
def token_logps_of(model, groups, run):
    """Log-probability of every token of every response, nats: for each group a list of K float64 arrays."""
    groups = Sampled(groups)
    logps = np.zeros(len(groups.tokens))
    for batch in batches(groups, np.arange(len(groups)), run, row_limit(0, run.device, groups)):
        with run.autocast:
            scored = model(batch.tokens, batch.positions, batch.mask, batch.predictor, batch.target)
        at = [np.arange(groups.index[i, 1], groups.index[i, -1]) for i in batch.ids]        # in the row's order
        logps[np.concatenate(at)] = scored[:len(batch.response)].cpu().numpy()
    return [[logps[a:b] for a, b in zip(bounds[1:], bounds[2:])] for bounds in groups.index.tolist()]


@torch.no_grad()
def estimate_kl(policy, ratios, groups, n, seed, run, row_tokens):
    """KL(policy || reference) of whole responses, nats: the mean of log pi - log ref over one response of the policy to
    each of n prompts of `groups`, and its standard error. The same draws every time, whoever draws them."""
    size, room, meta = 16, groups.meta['max_length'], groups.meta
    prompts = distinct_prompts(groups, n, seed)
    sums = torch.zeros(2, dtype=run.exact, device=run.device)           # of the ratios, and of their squares
    for j in range(run.rank, math.ceil(len(prompts) / size), run.world):
        some = prompts[j * size:(j + 1) * size]
        with run.autocast:
            made = draw_responses(policy, some, (meta['eot_token'], meta['vocab_size']), room, size, seed, number=j)
            groups_ = Sampled([[p, ids] for p, ids in zip(some, made)])
            for batch in batches(groups_, np.arange(len(groups_)), run.alone(), max(row_tokens, int(groups_.lengths.max()))):
                drawn = ratios(batch).to(run.exact)                 # (G, 1)
                sums += torch.stack([drawn.sum(), drawn.square().sum()])
    mean, square = (run.sum(sums) / len(prompts)).tolist()
    return dict(kl=mean, kl_error=math.sqrt(max(0, square - mean ** 2) / max(1, len(prompts) - 1)))


def read_reward(path):
    """The functions of a reward file as one: (prompts, responses) -> {name: list of float or bool}.

    The file defines reward(prompts, responses) and, if it likes, metrics(prompts, responses) -> {name: values}. What
    it prints goes to stderr. Its exceptions are its author's to read, with their traceback.
    """
    found = runpy.run_path(path)
    need(callable(found.get('reward')), f'reward file {path} defines no function reward(prompts, responses)')

    def score(prompts, responses):
        with contextlib.redirect_stdout(sys.stderr):
            given = {'true_reward': found['reward'](list(prompts), list(responses))}
            if 'metrics' in found:
                given |= found['metrics'](list(prompts), list(responses))
        scores = {str(name): [v if isinstance(v, (bool, np.bool_)) else float(v) for v in values]
                  for name, values in given.items()}
        for name, values in scores.items():
            need(len(values) == len(responses) and np.isfinite(values).all(), f'reward file {path}: {name} must be '
                 f'{len(responses)} finite numbers')
        return scores
    return score
