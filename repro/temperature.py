"""The paper's figures 2 (right) and 3: win rate against reference completions, over sampling temperatures and over training.

    python repro/frontier.py        # first: it trains the policies and the reward models
    python repro/temperature.py     # writes repro/results/temperature.json, .md and .png

A win is a higher true reward than the completion that the data set's pairs prefer for the same held-out prefix, a tie one
half; it takes the place of the paper's GPT-4. DPO, PPO and preferred-FT are the policies at the end of frontier.py's runs
named in POLICIES; the win of a prefix is the mean over their seeds. Best-of-N draws from the SFT model and chooses by the
learned reward of seed 1, as in the paper. Intervals are 95%, over prefixes. The second figure trains DPO of seed 1 again
and looks every few steps.
"""
import glob
import json
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
from config import In, UserError                                                            # noqa: E402
from best_of_n import best_of_n                                                             # noqa: E402
from frontier import BATCH, FOUND, GRID, WARMUP                                             # noqa: E402
from offline import dpo_losses, even_steps, policy_logps, train                             # noqa: E402
from reward_model import RewardModel, all_rewards                                           # noqa: E402
from sweep import be_a_worker                                                               # noqa: E402
from rollout import Task                                                                    # noqa: E402
from prepare_prefs import Sampled                                                           # noqa: E402

BETA = 1.0          # of DPO: the setting of frontier.py whose policies end furthest out with their text intact
POLICIES = {'dpo': ('DPO, beta 1', 'dpo-beta=1-*=0.0006', 'C0'), 'ppo': ('PPO, learned reward, target KL 6', 'ppo-*target_kl=6', 'C3'),
            'ppo_gt': ('PPO-GT, true reward, target KL 6', 'ppo_gt-*target_kl=6', 'C1'), 'preferred_ft': ('preferred-FT', 'preferred_ft', 'C2')}
TEMPERATURES = (0.0, 0.25, 0.5, 0.75, 1.0)
OVER_STEPS = (0.25, 0.7, 1.0)       # temperatures of the second figure
NS = (1, 4, 16, 64, 128)


def wins(task, prompts, responses, reference_rewards):
    """Of each sample, 1, 0 or 0.5: its true reward against that of its prefix's reference completion. (prefixes, samples)"""
    rewards = task.score(prompts, responses)['true_reward'].reshape(len(reference_rewards), -1)
    return np.where(rewards == reference_rewards[:, None], 0.5, rewards > reference_rewards[:, None])


def reference_completions(task, prompts):
    """The true reward of the response that the data prefers, for each of these prompts of val: (n,)."""
    chosen = {}
    for i in range(len(task.val)):
        chosen.setdefault(tuple(task.val[i][0].tolist()), task.val[i][1].tolist())
    return task.score(prompts, [chosen[tuple(p)] for p in prompts])['true_reward']


def work(kind, where, temperature, cfg):
    """One curve's point, or DPO's training. -> wins of each prefix (prefixes,), for best_of_n {N: such}"""
    torch.set_num_threads(1)
    task = Task(cfg['name'], cfg['reward'])
    prompts = task.prompts('val', cfg['held_out'])
    reference_rewards = reference_completions(task, prompts)
    if kind == 'best_of_n':
        most = max(NS) if temperature else 1        # at 0 all samples are one
        repeated = [p for p in prompts for _ in range(most)]
        responses = task.draw(task.load(''), repeated, 1, temperature)
        said = all_rewards(RewardModel.from_checkpoint(where)[0].eval(), Sampled(list(zip(repeated, responses))))
        won, found = wins(task, repeated, responses, reference_rewards), {}
        for n in NS:
            found[n] = best_of_n(said.reshape(won.shape), won, min(n, most))
        return found
    if kind == 'over steps':
        data = torch.load(where)
        groups, rewards, policy = Sampled(data['groups']), data['rewards'], task.load('')
        better, steps = rewards[:, :, None] > rewards[:, None, :], FOUND['dpo']['epochs'] * -(-len(rewards) // BATCH)

        setting = next(setting for setting in GRID['dpo'] if setting['beta'] == BETA)
        looks = even_steps(steps, 12)

        def losses_of(batch):
            return dpo_losses(policy_logps(policy, batch), data['ref_logps'][batch.ids], setting['beta'])

        def look():
            return [wins(task, prompts, task.draw(policy.eval(), prompts, 1, t), reference_rewards).mean(1) for t in OVER_STEPS]
        found = {0: look()}
        for step, _, _ in train(policy.train(), losses_of, groups, better, steps, BATCH, setting['learning_rate'], WARMUP, 1):
            if step in looks:
                found[step] = look()
                policy.train()
        return found
    policy = task.load(where)
    samples = cfg['samples'] if temperature else 1
    repeated = [p for p in prompts for _ in range(samples)]
    return wins(task, repeated, task.draw(policy, repeated, 1, temperature), reference_rewards).mean(1)


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
        colour, best = colours.get(label), label.startswith('best')
        left.errorbar(x, [100 * m for m, _ in points], [100 * h for _, h in points], label=label, capsize=2, marker='o', ms=3,
                      color=next(greys) if best else colour, ls='--' if best else '-', lw=1.3)
    for j, temperature in enumerate(OVER_STEPS):
        mean, half = np.array([over_steps[step][j] for step in over_steps]).T * 100
        right.plot(list(over_steps), mean, marker='o', ms=3, color=f'C{j}', label=f'temperature {temperature:g}')
        right.fill_between(list(over_steps), mean - half, mean + half, color=f'C{j}', alpha=0.12, lw=0)
    left.set(title='win rate against the preferred completions of the data', xlabel='sampling temperature', xticks=TEMPERATURES)
    right.set(title=f'DPO, beta {BETA:g}: win rate over training', xlabel='step')
    left.legend(fontsize=8, frameon=False, ncols=2, loc='lower center')
    right.legend(fontsize=9, frameon=False)
    for ax in (left, right):
        ax.axhline(50, color='0.6', lw=0.8, ls=':')
        ax.set(ylabel='win rate, %', ylim=(0, 100))
        ax.grid(alpha=0.2)
        ax.spines[['top', 'right']].set_visible(False)
    plot.savefig(path, dpi=110)


# -----------------------------------------------------------------------------
# the knobs

@dataclass
class Config:
    name: str = 'reviews'                           # of the experiment: reads out/<name>/frontier
    reward: str = config.EMBEDDED                   # a Python file with the true reward: as in sample.py
    held_out: In[int, 'x >= 2'] = 150               # prefixes of val
    samples: In[int, 'x >= 1'] = 2                  # of each prefix, policy and temperature
    workers: In[int, 'x >= 1'] = os.cpu_count() or 1    # processes, one thread each
    out: str = os.path.join(ROOT, 'repro', 'results', 'temperature')


def main(argv=None):
    cfg = config.load(Config, 'temperature', argv)
    folder = os.path.join('out', cfg.name, 'frontier')
    where = {method: sorted(glob.glob(os.path.join(glob.escape(folder), 'seed-[1-9]*', pattern + '*', '')))
             for method, (_, pattern, _) in {**POLICIES, 'reward_model': ('', 'reward_model', '')}.items()}
    if missing := [method for method, found in where.items() if not found]:
        raise UserError(f'{folder} holds no policy of {", ".join(missing)}: run repro/frontier.py first')
    knobs = {'name': cfg.name, 'reward': cfg.reward, 'held_out': cfg.held_out, 'samples': cfg.samples}
    jobs = [('best_of_n', where['reward_model'][0], t) for t in sorted(TEMPERATURES, reverse=True)]
    jobs += [('over steps', os.path.join(folder, 'seed-1', 'data.pt'), 0.0)]
    jobs += [('SFT', os.path.join('out', cfg.name, 'sft'), t) for t in TEMPERATURES]
    jobs += [(method, path, t) for method in POLICIES for path in where[method] for t in TEMPERATURES]
    began, found = time.perf_counter(), {}
    with ProcessPoolExecutor(cfg.workers, multiprocessing.get_context('spawn'), be_a_worker) as pool:
        running = {pool.submit(work, *job, knobs): job for job in jobs}
        for future in tqdm(as_completed(running), total=len(jobs), desc='win rates', disable=None):
            found[running[future]] = future.result()
    print(f'{len(jobs)} jobs took {time.perf_counter() - began:,.0f} s')

    curves = {label: [estimate(np.mean([found[method, path, t] for path in where[method]], 0)) for t in TEMPERATURES]
              for method, (label, _, _) in POLICIES.items()}
    curves['SFT'] = [estimate(found[jobs[len(TEMPERATURES) + 1][:2] + (t,)]) for t in TEMPERATURES]
    for n in NS:
        curves[f'best of {n}'] = [estimate(found['best_of_n', where['reward_model'][0], t][n]) for t in TEMPERATURES]
    steps = {step: [estimate(won) for won in looks] for step, looks in found[jobs[len(TEMPERATURES)]].items()}
    lines = ['| win rate, % | ' + ' | '.join(f'T = {t:g}' for t in TEMPERATURES) + ' |', '| --- | ' + ' | '.join('---:' for _ in TEMPERATURES) + ' |']
    lines += [f'| {label} | ' + ' | '.join(f'{100 * m:.1f} ± {100 * h:.1f}' for m, h in points) + ' |' for label, points in curves.items()]
    lines += ['', '| DPO over steps, % | ' + ' | '.join(map(str, steps)) + ' |', '| --- | ' + ' | '.join('---:' for _ in steps) + ' |']
    lines += [f'| T = {t:g} | ' + ' | '.join(f'{100 * steps[s][j][0]:.1f}' for s in steps) + ' |' for j, t in enumerate(OVER_STEPS)]
    os.makedirs(os.path.dirname(cfg.out) or '.', exist_ok=True)
    with open(cfg.out + '.md', 'w') as f:
        f.write('\n'.join(lines) + '\n')
    with open(cfg.out + '.json', 'w') as f:
        json.dump({'temperatures': TEMPERATURES, 'curves': curves, 'over_steps': {'temperatures': OVER_STEPS, **steps}}, f)
    figure(curves, steps, cfg.out + '.png')
    print('\n'.join(lines) + f'\nwritten: {cfg.out}.md, .json, .png')


if __name__ == '__main__':
    main()
