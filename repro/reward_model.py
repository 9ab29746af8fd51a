"""The reward model of the RLHF pipeline that DPO replaces: Bradley-Terry on pairs, its accuracy and its calibration.

    python repro/reward_model.py config/reviews.py                          # writes out/reviews/reward_model
    python repro/ppo.py config/reviews.py --reward=out/reviews/reward_model # and is optimised against
    python repro/reward_model.py config/hh_cpu.py --learning_rate=1e-4

The GPT of model.py with one more output, a number at the response's last token; eq. 2 of arXiv 2305.18290:
-log sigmoid(r(x, w) - r(x, l)). It starts from the SFT weights. At the end, on the validation pairs: accuracy with its
95% interval, log-loss, and how often the model is right where it says it is p sure; the error of that, averaged over
bins of p with their pairs (expected calibration error).
"""
import json
import math
import os
import signal
import sys
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import config                                                                               # noqa: E402
import prepare_prefs                                                                        # noqa: E402
from config import In, Literal                                                              # noqa: E402
from model import GPT, CheckpointError, GPTConfig, find_checkpoints, open_run, read_checkpoint, save_checkpoint    # noqa: E402
from offline import first_is_better, rows_of, train                                         # noqa: E402
from rollout import Task                                                                    # noqa: E402


class RewardModel(GPT):
    """A GPT with a reward head, which starts at 0."""
    def __init__(self, gpt_config):
        super().__init__(gpt_config)
        self.reward = torch.nn.Linear(gpt_config.n_embd, 1, bias=False)
        torch.nn.init.zeros_(self.reward.weight)

    @classmethod
    def from_policy(cls, policy):
        """With the weights of a GPT."""
        model = cls(policy.config)
        model.load_state_dict(policy.state_dict(), strict=False)
        return model

    @classmethod
    def from_checkpoint(cls, folder):
        """The last one of a folder, and what it records. Raises CheckpointError."""
        found = find_checkpoints(folder)
        if not found:
            raise CheckpointError(f'{folder} holds no checkpoint: run repro/reward_model.py first')
        state = read_checkpoint(found[-1])
        if 'reward.weight' not in state['model']:
            raise CheckpointError(f'{found[-1]} is no reward model: run repro/reward_model.py')
        model = cls(GPTConfig(**state['model_config']))
        model.load_state_dict(state['model'])
        return model, state


def response_rewards(model, batch):
    """The reward of each response of a packed batch: (G, K)."""
    return prepare_prefs.response_rewards(model, model.reward.weight, batch)


def bradley_terry_losses(rewards):
    """-log sigmoid(r_i - r_j) for all pairs of a group: (G, K) -> (G, K, K)."""
    return -F.logsigmoid(rewards[:, :, None] - rewards[:, None, :])


@torch.no_grad()
def all_rewards(model, groups):
    """The reward of every response of `groups`: (N, K) float64."""
    rewards = np.zeros((len(groups.lengths), groups.K))
    for batch in rows_of(groups, np.arange(len(rewards)), model.wte.weight.device):
        rewards[batch.ids] = response_rewards(model, batch).double().cpu().numpy()
    return rewards


def interval(successes, n):
    """Wilson's 95% interval of a share."""
    z, p = 1.96, successes / n
    middle, half = (p + z * z / (2 * n)) / (1 + z * z / n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return middle - half, middle + half


def judge(margins):
    """Of margins r(chosen) - r(rejected), (N,): accuracy (a tie counts one half), log-loss, calibration in tenths of
    the confidence sigmoid(|margin|), from 0.5 to 1: list of (mean confidence, share right, pairs)."""
    right = (margins > 0) + 0.5 * (margins == 0)
    sure = 1 / (1 + np.exp(-np.abs(margins)))
    bins = np.minimum(((sure - 0.5) * 20).astype(int), 9)
    table = [(sure[bins == b].mean(), right[bins == b].mean(), int((bins == b).sum())) for b in range(10) if (bins == b).any()]
    return {'accuracy': float(right.mean()), 'interval': interval(right.sum(), len(right)),
            'log_loss': float(np.logaddexp(0, -margins).mean()), 'calibration': [tuple(map(float, row)) for row in table],
            'calibration_error': float(sum(n * abs(said - was) for said, was, n in table) / len(right))}


# -----------------------------------------------------------------------------
# the knobs

@dataclass
class Config:
    name: str = 'reviews'                           # of the experiment: reads data/<name>, writes out/<name>/reward_model
    init_from: str = ''                             # '' = out/<name>/sft, or as in dpo.py
    batch_size: In[int, 'x >= 1'] = 32              # pairs a step
    epochs: In[int, 'x >= 1'] = 1                   # passes over the pairs; from the second on it over-fits
    max_steps: In[int, 'x >= 0'] = 0                # stop after so many steps; 0 = by epochs
    learning_rate: In[float, 'x > 0'] = 6e-4
    warmup_steps: In[int, 'x >= 1'] = 20            # linear, then linearly to 0
    eval_interval: In[int, 'x >= 1'] = 50           # steps between evaluations on all of val
    reward: str = ''                                # a Python file with the true reward, to compare with: as in sample.py
    seed: In[int, '0 <= x < 2**32'] = 1337          # of the order of pairs
    device: Literal['auto', 'cpu', 'cuda'] = 'auto' # auto = cuda where there is one, else cpu


def main(argv=None):
    cfg = config.load(Config, 'reward_model', argv)
    device = torch.device(cfg.device if cfg.device != 'auto' else 'cuda' if torch.cuda.is_available() else 'cpu')
    task = Task(cfg.name, cfg.reward)
    better = first_is_better(task.train)
    first_is_better(task.val)
    model = RewardModel.from_policy(task.load(cfg.init_from)).to(device)
    steps = cfg.max_steps or cfg.epochs * -(-len(task.train) // cfg.batch_size)
    print(f'reward_model on {device}, {steps:,} steps:\n{config.show(cfg)}')
    out_dir = os.path.join('out', cfg.name, 'reward_model')

    def losses_of(batch):
        return bradley_terry_losses(response_rewards(model, batch))

    with open_run(out_dir, 0) as log:
        for step, loss, norm in tqdm(train(model, losses_of, task.train, better, steps, cfg.batch_size, cfg.learning_rate,
                                           cfg.warmup_steps, cfg.seed), total=steps, desc='reward model', disable=None):
            if step % cfg.eval_interval == 0 or step == steps:
                rewards = all_rewards(model, task.val)                                  # (N, 2)
                found = judge(rewards[:, 0] - rewards[:, 1])
                tqdm.write(f'step {step:>6,}/{steps:,} | loss {loss:.4f} | grad {norm:6.2f} | eval/loss {found["log_loss"]:.4f} '
                           f'| eval/acc {found["accuracy"]:.3f} | calibration error {found["calibration_error"]:.3f}')
                log.write(json.dumps({'step': step, 'loss': loss, **{f'eval/{key}': value for key, value in found.items()}}) + '\n')
    save_checkpoint(out_dir, steps, model, dict(stage='reward_model', config=asdict(cfg), vocabulary=task.train.vocabulary))
    low, high = found['interval']
    print(f'\n{len(rewards):,} validation pairs: accuracy {found["accuracy"]:.3f} (95%: {low:.3f} to {high:.3f}), log-loss '
          f'{found["log_loss"]:.4f}, expected calibration error {found["calibration_error"]:.3f}\n\n'
          f'{"says":>8}{"is right":>10}{"pairs":>8}')
    for said, was, n in found['calibration']:
        print(f'{said:8.1%}{was:10.1%}{n:8,.0f}')
    if task.rewards:
        pieces = [[piece.tolist() for piece in task.val[i]] for i in range(len(task.val))]
        true = np.stack([task.score([p[0] for p in pieces], [p[k] for p in pieces])['true_reward'] for k in (1, 2)], 1)
        margins = rewards[:, 0] - rewards[:, 1], true[:, 0] - true[:, 1]
        print(f'\nthe true reward agrees with {((margins[1] > 0) + 0.5 * (margins[1] == 0)).mean():.1%} of these labels; the '
              f'model\'s margins correlate with its own at {np.corrcoef(*margins)[0, 1]:.3f}')
    print(f'done: {out_dir}')


if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    main()
