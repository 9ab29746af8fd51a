"""The reward model of the RLHF pipeline that DPO replaces: Bradley-Terry on pairs, its accuracy and calibration.

    python repro/reward_model.py config/reviews.py                          # writes out/reviews/reward_model
    python repro/ppo.py config/reviews.py --reward=out/reviews/reward_model # and is optimised against
    python repro/reward_model.py config/hh_cpu.py --learning_rate=1e-4

It is the GPT of model.py with one more output, a number at the response's last token, and starts from the SFT
weights. The loss is eq. 2 of arXiv 2305.18290: -log sigmoid(r(x, w) - r(x, l)). At the end it is judged on the
validation pairs: accuracy with its 95% interval, log-loss, and how often it is right where it says it is p sure.
The expected calibration error is the error of p, averaged over bins of p with their pairs.
"""
import json
import os
import sys
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import config                                                               # noqa: E402
from config import In, Literal, need                                        # noqa: E402
from model import GPT, GPTConfig                                            # noqa: E402
from nanodpo import checkpoint                                              # noqa: E402
from offline import first_is_better, rows_of, train                         # noqa: E402
from rollout import Task                                                    # noqa: E402


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
    def from_checkpoint(cls, folder, groups=None):
        """The last one of a folder, in eval mode. groups: the data it must fit. UserErrors."""
        paths = checkpoint.find(folder)
        need(paths, f'{folder} holds no checkpoint: run repro/reward_model.py first')
        state = checkpoint.read(paths[-1])
        need('reward.weight' in state['model'], f'{paths[-1]} is no reward model: run repro/reward_model.py')
        model = cls(GPTConfig(**state['model_config']))
        model.load_state_dict(state['model'])
        if groups is not None:
            groups.check_model(model.config, state.get('vocabulary'), folder)
        return model.eval()


def response_rewards(model, batch):
    """The reward of each response of a packed batch, read at its last token: (G, K)."""
    piece = batch.group[0] * (batch.K + 1) + batch.part[0]              # (T,) which prompt or response a token is of
    ends = torch.cat([piece[1:] != piece[:-1], piece.new_ones(1, dtype=torch.bool)])
    at = (ends & (batch.part[0] > 0)).nonzero()[:, 0]                   # (G*K,)
    states = model(batch.tokens, batch.positions, batch.mask, at)       # (G*K, C)
    return model.reward(states).view(-1, batch.K)


def bradley_terry_losses(rewards):
    """-log sigmoid(r_i - r_j) for all pairs of a group: (G, K) -> (G, K, K)."""
    return -F.logsigmoid(rewards[:, :, None] - rewards[:, None, :])


@torch.no_grad()
def all_rewards(model, groups):
    """The reward of every response of `groups`: (N, K) float64."""
    rewards = np.zeros((len(groups), groups.K))
    for batch in rows_of(groups, np.arange(len(groups)), model.wte.weight.device):
        rewards[batch.ids] = response_rewards(model, batch).double().cpu().numpy()
    return rewards


def interval(successes, n):
    """Wilson's 95% interval of a share."""
    z, p = 1.96, successes / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return float(middle - half), float(middle + half)


def correct(margins):
    """1 where a margin r(chosen) - r(rejected) is above 0, 0.5 where the two tie, else 0: (N,)."""
    return (margins > 0) + 0.5 * (margins == 0)


def judge(margins):
    """Of margins r(chosen) - r(rejected), (N,): accuracy, log-loss and calibration.

    The calibration is in tenths of the confidence sigmoid(|margin|), from 0.5 to 1: a list of (mean confidence,
    share that is right, pairs). A tie counts one half.
    """
    right = correct(margins)
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    bins = np.minimum(((confidence - 0.5) * 20).astype(int), 9)
    table = []
    for b in np.unique(bins):
        inside = bins == b
        table.append((float(confidence[inside].mean()), float(right[inside].mean()), float(inside.sum())))
    error = sum(n * abs(says - is_right) for says, is_right, n in table) / len(right)
    return {'accuracy': float(right.mean()), 'interval': interval(right.sum(), len(right)),
            'log_loss': float(np.logaddexp(0, -margins).mean()), 'calibration': table, 'calibration_error': error}


# --- the knobs ------------------------------------------------------------------------------------

@dataclass
class Config:
    name: str = 'reviews'                           # the experiment: reads data/<name>, writes out/<name>/reward_model
    init_from: str = ''                             # '' = out/<name>/sft, or as in dpo.py
    batch_size: In[int, 'x >= 1'] = 32              # pairs a step
    epochs: In[int, 'x >= 1'] = 1                   # passes over the pairs; from the second on it over-fits
    max_steps: In[int, 'x >= 0'] = 0                # stop after so many steps; 0 = by epochs
    learning_rate: In[float, 'x > 0'] = 6e-4
    warmup_steps: In[int, 'x >= 1'] = 20            # linear, then linearly to 0
    eval_interval: In[int, 'x >= 1'] = 50           # steps between evaluations on all of val
    reward: str = ''                                # a Python file with the true reward, to compare: as in sample.py
    seed: In[int, '0 <= x < 2**32'] = 1337          # of the order of pairs
    device: Literal['auto', 'cpu', 'cuda'] = 'auto'     # auto = cuda where there is one, else cpu


def report(judged, rewards, task):
    """Print what `judge` found at the end, and how it goes with the true reward."""
    low, high = judged['interval']
    print(f'\n{len(rewards):,} validation pairs: accuracy {judged["accuracy"]:.3f} (95%: {low:.3f} to {high:.3f}), '
          f'log-loss {judged["log_loss"]:.4f}, expected calibration error {judged["calibration_error"]:.3f}\n\n'
          f'{"says":>8}{"is right":>10}{"pairs":>8}')
    for says, is_right, n in judged['calibration']:
        print(f'{says:8.1%}{is_right:10.1%}{n:8,.0f}')
    if not task.rewards:
        return
    groups = [[piece.tolist() for piece in task.val[i]] for i in range(len(task.val))]
    prompts = [group[0] for group in groups]
    true = [task.score(prompts, [group[k] for group in groups])['true_reward'] for k in (1, 2)]
    margins = rewards[:, 0] - rewards[:, 1]
    true_margins = true[0] - true[1]
    print(f'\nthe true reward agrees with {correct(true_margins).mean():.1%} of these labels; the model\'s margins '
          f'correlate with its own at {np.corrcoef(margins, true_margins)[0, 1]:.3f}')


def main(argv=None):
    cfg = config.load(Config, 'reward_model', argv)
    task = Task(cfg.name, cfg.reward, cfg.device)
    better = first_is_better(task.train)
    first_is_better(task.val)
    model = RewardModel.from_policy(task.load(cfg.init_from)).to(task.device)
    steps = cfg.max_steps or cfg.epochs * -(-len(task.train) // cfg.batch_size)
    print(f'reward_model on {task.device}, {steps:,} steps:\n{config.show(cfg)}')
    out_dir = os.path.join('out', cfg.name, 'reward_model')

    def losses_of(batch):
        return bradley_terry_losses(response_rewards(model, batch))

    run = train(model, losses_of, task.train, better, steps, cfg.batch_size, cfg.learning_rate, cfg.warmup_steps,
                cfg.seed)
    with checkpoint.open_run(out_dir, 0) as log:
        for step, loss, norm in tqdm(run, 'reward model', steps, disable=None):
            if step % cfg.eval_interval == 0 or step == steps:
                rewards = all_rewards(model, task.val)                                  # (N, 2)
                judged = judge(rewards[:, 0] - rewards[:, 1])
                tqdm.write(f'step {step:>6,}/{steps:,} | loss {loss:.4f} | grad {norm:6.2f} | eval/loss '
                           f'{judged["log_loss"]:.4f} | eval/acc {judged["accuracy"]:.3f} | calibration error '
                           f'{judged["calibration_error"]:.3f}')
                record = {f'eval/{key}': value for key, value in judged.items()}
                log.write(json.dumps({'step': step, 'loss': loss, **record}) + '\n')
    checkpoint.save(out_dir, steps, model, dict(stage='reward_model', config=asdict(cfg),
                                                vocabulary=task.train.vocabulary))
    report(judged, rewards, task)
    print(f'done: {out_dir}')


if __name__ == '__main__':
    config.run(main)
