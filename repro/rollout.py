"""What the scripts here that sample share: prompts of data/<name>, responses drawn from a model, rewards, and KL.

A policy is judged on held-out prompts by samples at temperature 1: the mean of the reward, and the mean over the same
samples of log policy(y | x) - log reference(y | x), summed over the response, which is unbiased for the sequence KL.
"""
import math
import os
import sys
from contextlib import nullcontext

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from config import UserError                                                    # noqa: E402
from model import CheckpointError, find_checkpoints, load_model                 # noqa: E402
from prepare_prefs import Groups, load_tokenizer, read_reward, text_of          # noqa: E402
from sample import response_logps, val_prompts                                  # noqa: E402


class Task:
    """data/<name>/ as a source of prompts, and the reward of a Python file (see `reward` of sample.py), or None."""
    def __init__(self, name, reward=''):
        self.folder = os.path.join('data', name)
        self.train, self.val = Groups(self.folder, 'train'), Groups(self.folder, 'val')
        self.tokenizer = load_tokenizer(self.folder, self.val.meta['tokenizer'])
        self.rewards = read_reward(reward) if reward else None

    def prompts(self, split, n):
        """The first n distinct prompts of a split in a fixed shuffled order, fewer where it has fewer: lists of ids."""
        return val_prompts(self.train if split == 'train' else self.val, n)

    def load(self, init_from):
        """A policy, on the CPU, in eval mode. init_from: as in dpo.py; '' is out/<name>/sft."""
        init_from = init_from or os.path.join('out', os.path.basename(self.folder), 'sft')
        if not find_checkpoints(init_from) and not os.path.isdir(init_from):
            raise UserError(f'{init_from} holds no checkpoint: run sft.py with this config first, or name another')
        try:
            model, record = load_model(init_from, dropout=0.0)
        except CheckpointError as error:
            raise UserError(error) from None
        self.train.check_model(model.config, record.get('vocabulary'), init_from)
        return model.eval()

    def score(self, prompts, responses):
        """The reward file's results, lists of ids in: {'true_reward': (n,), and its metrics}, float arrays."""
        found = self.rewards(*([text_of(self.tokenizer, ids) for ids in side] for side in (prompts, responses)))
        return {name: np.array(values, dtype=np.float64) for name, values in found.items()}

    def draw(self, model, prompts, seed, temperature=1.0, max_new_tokens=64, batch_size=512, bar=None):
        """One response to each prompt: lists of ids, at most max_new_tokens long. `bar` is a tqdm to move on."""
        room = model.config.block_size - max(map(len, prompts))
        responses = []
        for i in range(0, len(prompts), batch_size):
            some = prompts[i:i + batch_size]
            responses += model.generate(some, min(max_new_tokens, room), self.tokenizer.eot_token, self.val.meta['vocab_size'],
                                        temperature, seed=(seed * 1_000_003 + i) % 2**63)
            if bar is not None:
                bar.update(len(some))
        return responses

    def ratios(self, policy, reference, prompts, responses):
        """log policy(y|x) - log reference(y|x) of each response, nats: (n,) float64."""
        groups = list(zip(prompts, responses))
        device = policy.wte.weight.device
        scored = [response_logps(model, groups, device, nullcontext()) for model in (policy, reference)]
        return (scored[0] - scored[1])[:, 0].numpy()

    def evaluate(self, policy, reference, prompts, num_samples, seed):
        """Means over samples, {'true_reward', 'kl', 'tokens', the reward file's metrics}, and with '/error' their
        standard errors, those of the mean over prompts."""
        was_training = policy.training
        policy.eval()
        repeated = [p for p in prompts for _ in range(num_samples)]
        responses = self.draw(policy, repeated, seed)
        found = self.score(repeated, responses)
        found['kl'] = self.ratios(policy, reference, repeated, responses)
        found['tokens'] = np.array([len(r) for r in responses], dtype=np.float64)
        policy.train(was_training)
        result = {}
        for name, values in found.items():
            means = values.reshape(-1, num_samples).mean(1)
            result[name], result[name + '/error'] = float(means.mean()), float(means.std(ddof=1) / math.sqrt(len(means)))
        return result
