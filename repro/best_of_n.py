"""Best-of-N, the baseline without training: draw N responses from the SFT model, keep the one of highest reward.

    python repro/best_of_n.py config/reviews.py --reward=config/reviews.py              # by the true reward
    python repro/best_of_n.py config/reviews.py --reward=out/reviews/reward_model --true_reward=config/reviews.py

For each N up to --n it prints the mean reward that chose, and the mean true reward where one is named. Beside them
stands log N - (N-1)/N, the KL from the SFT model if no two responses had equal rewards; with ties it is less. One
drawing serves all N, cut into blocks of N.
"""
import json
import math
import os
import sys
from dataclasses import dataclass

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import config                                                   # noqa: E402
from config import In, Literal                                  # noqa: E402
from nanodpo.text import text_of                                # noqa: E402
from ppo import read_score                                      # noqa: E402
from rollout import Task                                        # noqa: E402


def best_of_n(chooser, values, n):
    """The mean of `values` over the best responses of each prompt: (P,).

    Both are rewards (P, M) of M responses to each of P prompts. Of each block of n responses the one that `chooser`
    rates highest counts; M is a multiple of n.
    """
    blocks = chooser.reshape(len(chooser), -1, n)
    best = blocks.argmax(-1)[:, :, None]
    return np.take_along_axis(values.reshape(blocks.shape), best, -1)[:, :, 0].mean(1)


def bound(n):
    """log n - (n - 1) / n, nats."""
    return math.log(n) - (n - 1) / n


@dataclass
class Config:
    name: str = 'reviews'                           # of the experiment: prompts of data/<name>, val
    init_from: str = ''                             # '' = out/<name>/sft, or as in dpo.py
    reward: str = ''                                # what chooses: a Python file, or a folder of reward_model.py
    true_reward: str = ''                           # a Python file to judge what was chosen; '' = reward, if it is one
    n: In[int, 'x >= 1 and x & (x - 1) == 0'] = 64  # responses a prompt, a power of two
    num_prompts: In[int, 'x >= 2'] = 100            # of val
    temperature: In[float, 'x > 0'] = 1.0
    max_new_tokens: In[int, 'x >= 1'] = 64          # of a response
    json: bool = False                              # the responses chosen of the most, a JSON line each, on stdout
    seed: In[int, 'x >= 0'] = 1337
    device: Literal['auto', 'cpu', 'cuda'] = 'auto'     # auto = cuda where there is one, else cpu


def main(argv=None):
    cfg = config.load(Config, 'best_of_n', argv)
    chooser_file = cfg.reward if cfg.reward.endswith('.py') else ''
    true_file = cfg.true_reward or chooser_file
    judge = Task(cfg.name, true_file)
    task = Task(cfg.name, chooser_file, cfg.device)
    score = read_score(task, cfg.reward)
    model = task.load(cfg.init_from)
    prompts = task.prompts('val', cfg.num_prompts)
    repeated = [prompt for prompt in prompts for _ in range(cfg.n)]
    responses = task.draw(model, repeated, cfg.seed, cfg.temperature, cfg.max_new_tokens, desc='responses')
    columns = {'reward': np.asarray(score(repeated, responses)).reshape(len(prompts), -1)}
    chooser = columns['reward']
    if true_file:
        columns['true reward'] = judge.score(repeated, responses)['true_reward'].reshape(len(prompts), -1)
    if cfg.json:
        for i, best in enumerate(chooser.argmax(1)):
            text = text_of(task.tokenizer, responses[i * cfg.n + best])
            print(json.dumps({'prompt': text_of(task.tokenizer, prompts[i]), 'sample': 0,
                              'after': {'text': text, 'reward': chooser[i, best]}}))
        return
    print(f'{len(prompts):,} prompts\n{"N":>5}{"KL at most":>12}' + ''.join(f'{name:>18}' for name in columns))
    for n in (2**k for k in range(cfg.n.bit_length())):
        line = f'{n:>5}{bound(n):>12.3f}'
        for values in columns.values():
            best = best_of_n(chooser, values, n)                # (P,)
            line += f'{best.mean():+11.3f} ±{best.std(ddof=1) / math.sqrt(len(best)):.3f}'
        print(line)


if __name__ == '__main__':
    config.run(main)
