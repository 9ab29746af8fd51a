"""The paper's figures 2 (right) and 3: win rate against reference completions, over temperatures and over training.

    python repro/frontier.py        # first: it trains the policies and the reward models
    python repro/temperature.py     # writes repro/results/temperature.json, .md and .png

A win is a higher true reward than that of the pair's preferred completion of the same held-out prefix. A tie is one
half. This takes the place of the paper's GPT-4. DPO, PPO and preferred-FT are the policies at the end of
frontier.py's runs named in POLICIES. The win of a prefix is the mean over their seeds. Best-of-N draws from the SFT
model and chooses by the learned reward of seed 1, as in the paper. Intervals are 95%, over prefixes. The second figure
trains DPO of seed 1 again and looks every few steps.
"""
import glob
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import config                                                                               # noqa: E402
from config import In, need                                                                 # noqa: E402
from best_of_n import best_of_n                                                             # noqa: E402
from dpo import response_logps                                                              # noqa: E402
from frontier import FOUND, GRID, train_offline                                             # noqa: E402
from offline import dpo_losses                                                              # noqa: E402
from ppo import read_score                                                                  # noqa: E402
from rollout import Task                                                                    # noqa: E402
from sweep import be_a_worker, write_report                                                   # noqa: E402

BETA = 1.0          # of DPO: the setting of frontier.py whose policies end furthest out with their text intact
POLICIES = {'dpo': ('DPO, beta 1', 'dpo-beta=1-*=0.0006', 'C0'),
            'ppo': ('PPO, learned reward, target KL 6', 'ppo-*target_kl=6', 'C3'),
            'ppo_gt': ('PPO-GT, true reward, target KL 6', 'ppo_gt-*target_kl=6', 'C1'),
            'preferred_ft': ('preferred-FT', 'preferred_ft', 'C2')}
TEMPERATURES = (0.0, 0.25, 0.5, 0.75, 1.0)
OVER_STEPS = (0.25, 0.7, 1.0)       # temperatures of the second figure
NS = (1, 4, 16, 64, 128)


class Judge:
    """Win rates on the held-out prefixes."""
    def __init__(self, cfg):
        self.task = Task(cfg['name'], cfg['reward'])
        self.samples = cfg['samples']
        self.prompts = self.task.prompts('val', cfg['held_out'])
        chosen = {}
        for i in range(len(self.task.val)):
            prompt, response = self.task.val[i][:2]
            chosen.setdefault(tuple(prompt.tolist()), response.tolist())
        preferred = [chosen[tuple(prompt)] for prompt in self.prompts]
        self.reference_rewards = self.task.score(self.prompts, preferred)['true_reward']        # (n,)

    def wins(self, prompts, responses):
        """Of each sample, 1, 0 or 0.5: its true reward against that of its prefix's preferred one. (n, samples)"""
        rewards = self.task.score(prompts, responses)['true_reward'].reshape(len(self.prompts), -1)
        reference_rewards = self.reference_rewards[:, None]
        return np.where(rewards == reference_rewards, 0.5, rewards > reference_rewards)

    def draw(self, policy, samples, temperature):
        """Prompts and responses, `samples` of each prefix; at temperature 0 all are the same, and one is enough."""
        repeated = [prompt for prompt in self.prompts for _ in range(samples if temperature else 1)]
        return repeated, self.task.draw(policy, repeated, 1, temperature)

    def policy(self, where, temperature):
        """The wins of the policy in a folder, of each prefix: (n,)."""
        return self.wins(*self.draw(self.task.load(where), self.samples, temperature)).mean(1)

    def best_of_n(self, where, temperature):
        """The wins of the best of N by the reward model in a folder: {N: (n,)}."""
        prompts, responses = self.draw(self.task.load(''), max(NS), temperature)
        won = self.wins(prompts, responses)                                                     # (n, samples)
        rewards = read_score(self.task, where)(prompts, responses).reshape(won.shape)
        return {n: best_of_n(rewards, won, min(n, won.shape[1])) for n in NS}

    def over_steps(self, where):
        """DPO, trained again on the data in a file: {step: the wins at each temperature of OVER_STEPS}."""
        data = torch.load(where)
        policy = self.task.load('')
        setting = FOUND['dpo'] | next(setting for setting in GRID['dpo'] if setting['beta'] == BETA)

        def losses_of(batch):
            return dpo_losses(response_logps(policy, batch), data['ref_logps'][batch.ids], BETA)

        def look():
            return [self.wins(*self.draw(policy.eval(), 1, temperature)).mean(1) for temperature in OVER_STEPS]

        looks = {0: look()}
        policy.train()
        for step in train_offline(policy, losses_of, data, setting['epochs'], setting['learning_rate'], 1, 12):
            looks[step] = look()
            policy.train()
        return looks


def work(kind, where, temperature, cfg):
    """One point of a curve, or DPO's training, in a worker: what Judge gives."""
    torch.set_num_threads(1)
    judge = Judge(cfg)
    if kind == 'over steps':
        return judge.over_steps(where)
    return judge.best_of_n(where, temperature) if kind == 'best_of_n' else judge.policy(where, temperature)


def estimate(per_prefix):
    """(n,) -> mean, half of its 95% interval."""
    return float(np.mean(per_prefix)), float(1.96 * np.std(per_prefix, ddof=1) / np.sqrt(len(per_prefix)))


def figure(curves, over_steps, path):
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    plot, (left, right) = plt.subplots(1, 2, figsize=(13, 5), constrained_layout=True)
    colours = {label: colour for label, _, colour in POLICIES.values()} | {'SFT': '0.4'}
    greys = iter(plt.get_cmap('Purples')(np.linspace(0.4, 1, len(NS))))
    for i, (label, points) in enumerate(curves.items()):
        x = np.array(TEMPERATURES) + 0.004 * (i - len(curves) / 2)      # bars side by side
        mean, half = np.array(points).T * 100
        best = label.startswith('best')
        left.errorbar(x, mean, half, label=label, color=next(greys) if best else colours[label],
                      ls='--' if best else '-', lw=1.3, capsize=2, marker='o', ms=3)
    for j, temperature in enumerate(OVER_STEPS):
        mean, half = np.array([over_steps[step][j] for step in over_steps]).T * 100
        right.plot(list(over_steps), mean, marker='o', ms=3, color=f'C{j}', label=f'temperature {temperature:g}')
        right.fill_between(list(over_steps), mean - half, mean + half, color=f'C{j}', alpha=0.12, lw=0)
    left.set(title='win rate against the preferred completions of the data', xlabel='sampling temperature',
             xticks=TEMPERATURES)
    right.set(title=f'DPO, beta {BETA:g}: win rate over training', xlabel='step')
    left.legend(fontsize=8, frameon=False, ncols=2, loc='lower center')
    right.legend(fontsize=9, frameon=False)
    for ax in (left, right):
        ax.axhline(50, color='0.6', lw=0.8, ls=':')
        ax.set(ylabel='win rate, %', ylim=(0, 100))
        ax.grid(alpha=0.2)
        ax.spines[['top', 'right']].set_visible(False)
    plot.savefig(path, dpi=110)


# ----------------------------------------------------------------------------------------------------
# the knobs

@dataclass
class Config:
    name: str = 'reviews'                           # of the experiment: reads out/<name>/frontier
    reward: str = config.EMBEDDED                   # a Python file with the true reward: as in sample.py
    held_out: In[int, 'x >= 2'] = 150               # prefixes of val
    samples: In[int, 'x >= 1'] = 2                  # of each prefix, policy and temperature
    workers: In[int, 'x >= 1'] = os.cpu_count() or 1    # processes, one thread each
    out: str = os.path.join(ROOT, 'repro', 'results', 'temperature')


def table(curves, over_steps):
    """Markdown, both figures in numbers."""
    lines = ['| win rate, % | ' + ' | '.join(f'T = {t:g}' for t in TEMPERATURES) + ' |',
             '| --- | ' + ' | '.join('---:' for _ in TEMPERATURES) + ' |']
    for label, points in curves.items():
        lines.append(f'| {label} | ' + ' | '.join(f'{100 * m:.1f} ± {100 * h:.1f}' for m, h in points) + ' |')
    lines += ['', '| DPO over steps, % | ' + ' | '.join(map(str, over_steps)) + ' |',
              '| --- | ' + ' | '.join('---:' for _ in over_steps) + ' |']
    for j, t in enumerate(OVER_STEPS):
        cells = [f'{100 * points[j][0]:.1f}' for points in over_steps.values()]
        lines.append(f'| T = {t:g} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines) + '\n'


def main(argv=None):
    cfg = config.load(Config, 'temperature', argv)
    folder = os.path.join('out', cfg.name, 'frontier')
    patterns = {method: pattern for method, (_, pattern, _) in POLICIES.items()} | {'reward_model': 'reward_model'}
    where = {method: sorted(glob.glob(os.path.join(glob.escape(folder), 'seed-[1-9]*', pattern + '*', '')))
             for method, pattern in patterns.items()}
    missing = [method for method, paths in where.items() if not paths]
    need(not missing, f'{folder} holds no policy of {", ".join(missing)}: run repro/frontier.py first')
    knobs = {'name': cfg.name, 'reward': cfg.reward, 'held_out': cfg.held_out, 'samples': cfg.samples}
    reward_model, sft = where['reward_model'][0], os.path.join('out', cfg.name, 'sft')
    training = 'over steps', os.path.join(folder, 'seed-1', 'data.pt'), 0.0
    jobs = [('best_of_n', reward_model, t) for t in sorted(TEMPERATURES, reverse=True)]
    jobs += [training]
    jobs += [('SFT', sft, t) for t in TEMPERATURES]
    jobs += [(method, path, t) for method in POLICIES for path in where[method] for t in TEMPERATURES]
    began, won = time.perf_counter(), {}
    with ProcessPoolExecutor(cfg.workers, multiprocessing.get_context('spawn'), be_a_worker) as pool:
        running = {pool.submit(work, *job, knobs): job for job in jobs}
        for future in tqdm(as_completed(running), 'win rates', len(jobs), disable=None):
            won[running[future]] = future.result()
    print(f'{len(jobs)} jobs took {time.perf_counter() - began:,.0f} s')

    curves = {label: [estimate(np.mean([won[method, path, t] for path in where[method]], 0)) for t in TEMPERATURES]
              for method, (label, _, _) in POLICIES.items()}
    curves['SFT'] = [estimate(won['SFT', sft, t]) for t in TEMPERATURES]
    for n in NS:
        curves[f'best of {n}'] = [estimate(won['best_of_n', reward_model, t][n]) for t in TEMPERATURES]
    over_steps = {step: [estimate(wins) for wins in looks] for step, looks in won[training].items()}
    text = table(curves, over_steps)
    write_report(cfg.out, text, {'temperatures': TEMPERATURES, 'curves': curves,
                                 'over_steps': {'temperatures': OVER_STEPS, **over_steps}})
    figure(curves, over_steps, cfg.out + '.png')
    print(f'{text}written: {cfg.out}.md, .json, .png')


if __name__ == '__main__':
    config.run(main)
