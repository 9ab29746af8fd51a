"""What the scripts here that sample share: a data set's prompts, responses to them, their reward and their KL.

A policy is judged on held-out prompts, by samples at temperature 1. Its KL is the mean over these samples of
log policy(y | x) - log reference(y | x), summed over the response: an unbiased estimate.
"""
import math
import os
import sys

import numpy as np
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from config import need                                                         # noqa: E402
from nanodpo import checkpoint                                                  # noqa: E402
from nanodpo.data import Groups, distinct_prompts                               # noqa: E402
from nanodpo.rollout import draw_responses, read_reward, token_logps_of         # noqa: E402
from nanodpo.run import Worker                                                  # noqa: E402
from nanodpo.text import load_tokenizer, text_of                                # noqa: E402


class Task:
    """data/<name>/ as a source of prompts, a reward file (see `reward` of sample.py) or none, and a device."""
    def __init__(self, name, reward='', device='cpu'):
        self.folder = os.path.join('data', name)
        self.train = Groups(self.folder, 'train')
        self.val = Groups(self.folder, 'val')
        self.tokenizer = load_tokenizer(self.folder, self.val.meta['tokenizer'])
        self.rewards = read_reward(reward) if reward else None
        self.worker = Worker(device, 'float32')
        self.device = self.worker.device

    def prompts(self, split, n):
        """The first n distinct prompts of a split in a fixed shuffled order, or all there are: lists of ids."""
        return distinct_prompts(self.train if split == 'train' else self.val, n, seed=0)

    def load(self, init_from):
        """A policy in eval mode. init_from: as in dpo.py; '' is out/<name>/sft."""
        init_from = init_from or os.path.join('out', os.path.basename(self.folder), 'sft')
        need(init_from.endswith('.pt') or os.path.isdir(init_from),
             f'{init_from} holds no checkpoint: run sft.py with this config first, or name another')
        return checkpoint.load_model(init_from, self.train, dropout=0.0).to(self.device).eval()

    def score(self, prompts, responses):
        """What the reward file says of lists of ids: {'true_reward': (n,), and its metrics}, float arrays."""
        texts = ([text_of(self.tokenizer, ids) for ids in side] for side in (prompts, responses))
        return {name: np.array(values, dtype=np.float64) for name, values in self.rewards(*texts).items()}

    def draw(self, model, prompts, seed, temperature=1.0, max_new_tokens=64, desc=''):
        """One response to each prompt: lists of ids, at most max_new_tokens long. desc: of a bar, '' for none."""
        size = 512
        room = model.config.block_size
        responses = []
        for i in tqdm(range(0, len(prompts), size), desc, unit=' batches', disable=None if desc else True):
            responses += draw_responses(model, prompts[i:i + size], self.val.meta, room, size, seed, max_new_tokens,
                                        number=i, temperature=temperature)
        return responses

    def logps(self, model, groups):
        """log p(response | prompt), nats, of [[prompt, response_1, ..., response_K], ...]: (N, K) float64."""
        return np.array([[tokens.sum() for tokens in group] for group in token_logps_of(model, groups, self.worker)])

    def ratios(self, policy, reference, prompts, responses):
        """log policy(y|x) - log reference(y|x) of each response, nats: (n,) float64."""
        groups = list(zip(prompts, responses))
        return (self.logps(policy, groups) - self.logps(reference, groups))[:, 0]

    def evaluate(self, policy, reference, prompts, num_samples, seed):
        """Means over samples: {'true_reward', 'kl', 'tokens', the reward file's metrics}.

        Each has its standard error beside it, under its name and '/error': that of the mean over prompts.
        """
        was_training = policy.training
        policy.eval()
        repeated = [prompt for prompt in prompts for _ in range(num_samples)]
        responses = self.draw(policy, repeated, seed)
        measures = self.score(repeated, responses)
        measures['kl'] = self.ratios(policy, reference, repeated, responses)
        measures['tokens'] = np.array([len(ids) for ids in responses], dtype=np.float64)
        policy.train(was_training)
        result = {}
        for name, values in measures.items():
            means = values.reshape(-1, num_samples).mean(1)
            result[name] = float(means.mean())
            result[name + '/error'] = float(means.std(ddof=1) / math.sqrt(len(means)))
        return result
