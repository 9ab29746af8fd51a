"""The paper's figure 2 (left) with a ground truth: mean true reward against KL from the reference, method by method.

    python repro/frontier.py                # prepares the reviews and their SFT model where they are missing, then sweeps
    python repro/frontier.py --quick        # one seed, fewer settings, less data
    python repro/frontier.py --search       # how the learning rates and PPO's knobs were chosen

As in arXiv 2305.18290, section 6.1: 4 completions of each prefix from the SFT model, all their pairs labelled by the true
reward (ties have no label); DPO at several beta; PPO against a reward model learned from the same pairs and, as "PPO-GT",
against the true reward, at several target KLs; unlikelihood; preferred-FT; best-of-N. Every few steps each policy is judged
on held-out prefixes: mean true reward and sequence KL, both from samples. A seed stands for the completions, the order and
the rollouts; the SFT model is one. Unlike the paper's task, this one has a known optimum: the SFT model has learned the
grammar of config/reviews.py, and the grammar's own reward-KL frontier is computed exactly below.

Runs go to out/reviews/frontier, one file each: a sweep that was stopped goes on where it stopped, and a run whose settings
changed is made again. Writes <out>.json, .md and .png.
"""
import math
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import config                                                                               # noqa: E402
from config import In, UserError, reviews                                                   # noqa: E402
from best_of_n import best_of_n, bound                                                       # noqa: E402
from model import find_checkpoints, fingerprint, save_checkpoint                            # noqa: E402
from offline import dpo_losses, even_steps, policy_logps, preferred_ft_losses, train, unlikelihood_losses       # noqa: E402
from ppo import Config as PPOConfig, ppo                                                    # noqa: E402
from reward_model import RewardModel, all_rewards, bradley_terry_losses, judge, response_rewards    # noqa: E402
from rollout import Task                                                                    # noqa: E402
from prepare_prefs import Sampled, text_of                                                   # noqa: E402
from sample import response_logps                                                           # noqa: E402
from sweep import path_of, sweep, write_results                                                        # noqa: E402

TARGETS = [{'target_kl': kl, 'kl_coef': coef} for kl, coef in ((3.0, 2.0), (6.0, 1.0), (9.0, 0.5), (12.0, 0.25))]
GRID = {        # the paper's settings; where PPO's KL controller starts, and DPO's rate by beta, were found by --search
    'dpo': [{'beta': beta, 'learning_rate': lr} for beta, lr in ((0.05, 3e-4), (0.1, 3e-4), (1.0, 6e-4), (1.0, 1.2e-3), (5.0, 6e-4))],
    'ppo': TARGETS,
    'ppo_gt': TARGETS,
    'unlikelihood': [{'alpha': alpha} for alpha in (0.05, 0.1, 0.5, 1.0)],
    'preferred_ft': [{}],
    'best_of_n': [{}],
}
QUICK = {'dpo': GRID['dpo'][1:3], 'ppo': TARGETS[1:2], 'ppo_gt': TARGETS[1:2],
         'unlikelihood': [{'alpha': 0.1}], 'preferred_ft': [{}], 'best_of_n': [{}]}
FOUND = {       # by --search, repro/results/frontier-search.md
    'reward_model': {'learning_rate': 2e-3, 'epochs': 2},
    'dpo': {'epochs': 2},
    'ppo': {'learning_rate': 6e-4, 'gae_lambda': 0.95, 'ppo_epochs': 1, 'minibatches': 8},
    'ppo_gt': {'learning_rate': 6e-4, 'gae_lambda': 0.95, 'ppo_epochs': 1, 'minibatches': 8},
    'unlikelihood': {'learning_rate': 3e-4, 'epochs': 2},
    'preferred_ft': {'learning_rate': 1e-3, 'epochs': 2},
    'best_of_n': {},
}
TWICE, ONCE = {'ppo_epochs': 2, 'minibatches': 4}, {'ppo_epochs': 1, 'minibatches': 8}       # as many steps
SEARCH = {      # what is tried instead of FOUND, at one setting of the grid or two
    'ppo_gt': [{'target_kl': 6.0, 'learning_rate': lr, 'kl_coef': coef, 'gae_lambda': lam, **passes}
               for lr, coef, lam, passes in ((3e-4, 0.1, 0.95, TWICE), (1e-4, 0.1, 0.95, TWICE), (6e-4, 0.1, 0.95, TWICE),
                                             (3e-4, 0.3, 0.95, TWICE), (3e-4, 1.0, 0.95, TWICE), (3e-4, 0.1, 1.0, TWICE),
                                             (6e-4, 1.0, 0.95, TWICE), (1e-3, 1.0, 0.95, TWICE), (6e-4, 2.0, 0.95, TWICE),
                                             (6e-4, 1.0, 0.95, ONCE))],
    'dpo': [{'beta': 0.1, 'learning_rate': lr} for lr in (3e-4, 6e-4, 1.2e-3)] + [{'beta': 1.0, 'learning_rate': lr} for lr in (6e-4, 1.2e-3)],
    'unlikelihood': [{'alpha': 0.1, 'learning_rate': lr} for lr in (3e-5, 1e-4, 3e-4)],
    'preferred_ft': [{'learning_rate': lr} for lr in (1e-4, 3e-4, 1e-3)],
    'reward_model': [{'learning_rate': lr, 'epochs': n} for lr, n in ((1e-3, 2), (2e-3, 2), (4e-3, 2))],
}
K, BATCH, WARMUP = 4, 8, 20        # completions a prefix, as the paper; prefixes a step; steps
ROLLOUTS = 256                      # PPO's samples a round
SAMPLES = 2                         # of each held-out prefix, at every evaluation
NS = (1, 2, 4, 8, 16, 32, 64)
BUDGETS = (1, 2, 4, 8)              # nats
LABELS = {'dpo': 'DPO', 'ppo': 'PPO, learned reward', 'ppo_gt': 'PPO-GT, true reward', 'unlikelihood': 'unlikelihood',
          'preferred_ft': 'preferred-FT', 'best_of_n': 'best of N, true reward', 'best_of_n_learned': 'best of N, learned reward'}
COLOURS = dict(zip(LABELS, ('C0', 'C3', 'C1', 'C5', 'C2', 'C4', 'C6')))


# -----------------------------------------------------------------------------
# the optimum: the grammar's own frontier, exactly

def grammar_log_z(start, lam):
    """log E exp(lam * reward) over the grammar's reviews that begin with `start`; lam: (n,) float64 -> (n,).

    Given the polarity z the sentences are independent, and so are the slots of a form: products of small sums.
    """
    def sentence(kind, z, start=''):
        """The sum over forms of their weight, and of their weight times E exp(lam * reward)."""
        forms, weights = (ways := reviews.ways(kind, start))[0], ways[z]
        tilted = 0.0
        for choices, weight in zip(forms, weights):
            for options, *probabilities in choices:
                p = torch.tensor(probabilities[0 if z == 1 else 1], dtype=torch.float64)
                reward = torch.tensor(reviews.reward([''] * len(options), options), dtype=torch.float64)
                weight = weight * (p * torch.exp(lam[:, None] * reward)).sum(1) / p.sum()
            tilted = tilted + weight
        return sum(weights), tilted

    mass = tilted = 0.0
    for z in (1, -1):
        opening, remark, verdict = sentence('opening', z, start), sentence('remark', z), sentence('verdict', z)
        mass += opening[0]
        tilted = tilted + opening[1] * (1 + remark[1] / remark[0]) / 2 * verdict[1] / verdict[0]
    return torch.log(tilted / mass)


def grammar_frontier(starts, betas):
    """(KL, mean reward) of pi* = grammar * exp(reward / beta) for each beta, means over the prefixes: (n, 2).
    With l = 1 / beta: reward = d log Z / dl and KL = l * reward - log Z, pi* being an exponential family in l."""
    lam = 1 / torch.tensor(betas, dtype=torch.float64)
    lam.requires_grad_()
    log_z = sum(grammar_log_z(start, lam) for start in starts) / len(starts)        # (n,)
    reward, = torch.autograd.grad(log_z.sum(), lam)
    return torch.stack([lam * reward - log_z, reward], 1).detach().numpy()


# -----------------------------------------------------------------------------
# jobs: a dict of settings each, done by a worker process, as sweep.py says

def needs(job, jobs):
    """The jobs whose files this one reads."""
    wanted = {'data': (), 'reward_model': ('data',), 'ppo': ('data', 'reward_model'), 'best_of_n': ('reward_model',)}
    return [other for other in jobs if other['seed'] == job['seed'] and other['method'] in wanted.get(job['method'], ('data',))]


def work(job, needed):
    """Do a job, in its worker. -> {'points': its evaluations, and what else there is to say}"""
    torch.set_num_threads(1)
    common, seed = job['common'], job['seed']
    task = Task(common['name'], common['reward'])
    reference = task.load('').requires_grad_(False)
    first, last = common['held_out']
    held_out = task.prompts('val', last)[first:]
    cpu = torch.device('cpu')
    for other in needed:
        if other['method'] == 'data':
            data = torch.load(path_of(other) + '.pt')
            groups, better = Sampled(data['groups']), data['rewards'][:, :, None] > data['rewards'][:, None, :]
            prompts = [group[0] for group in data['groups']]
        else:
            reward_model = RewardModel.from_checkpoint(path_of(other))[0].eval()

    def true_reward(prompts, responses):
        return task.score(prompts, responses)['true_reward']

    def learned_reward(prompts, responses):
        return all_rewards(reward_model, Sampled(list(zip(prompts, responses))))[:, 0]

    def run_offline(model, losses_of):
        """The model after each so many steps; settings from the job."""
        steps = job['epochs'] * math.ceil(len(groups.lengths) / BATCH)
        looks = even_steps(steps, common['evaluations'])
        for step, _, _ in train(model, losses_of, groups, better, steps, BATCH, job['learning_rate'], WARMUP, seed):
            if step in looks:
                yield step

    result = {'points': []}
    if job['method'] == 'data':
        prompts = task.prompts('train', common['prefixes'])
        repeated = [p for p in prompts for _ in range(K)]
        responses = task.draw(reference, repeated, seed)
        rewards = true_reward(repeated, responses).reshape(-1, K)
        groups = [[p, *responses[i * K:(i + 1) * K]] for i, p in enumerate(prompts)]
        torch.save({'groups': groups, 'rewards': torch.tensor(rewards),
                    'ref_logps': response_logps(reference, groups, cpu, nullcontext()).float()}, path_of(job) + '.pt')
        result['pairs'] = int((rewards[:, :, None] > rewards[:, None, :]).sum())
    elif job['method'] == 'reward_model':
        model = RewardModel.from_policy(reference).requires_grad_(True)
        repeated = [p for p in held_out for _ in range(K)]
        responses = task.draw(reference, repeated, seed + 500)
        true = true_reward(repeated, responses).reshape(-1, K)
        for step in run_offline(model, lambda batch: bradley_terry_losses(response_rewards(model, batch))):
            said = all_rewards(model, Sampled(list(zip(repeated, responses))))[:, 0].reshape(-1, K)
            pairs = true[:, :, None] > true[:, None, :]
            result['points'].append({'step': step, **judge((said[:, :, None] - said[:, None, :])[pairs])})
        save_checkpoint(path_of(job), step, model, dict(stage='reward_model', config={}, vocabulary=task.train.vocabulary))
    elif job['method'] == 'best_of_n':
        most = common['most_of_n']
        repeated = [p for p in held_out for _ in range(most)]
        responses = task.draw(reference, repeated, seed + 500)
        true, said = (score(repeated, responses).reshape(len(held_out), most) for score in (true_reward, learned_reward))
        for chooser, values in (('best_of_n', true), ('best_of_n_learned', said)):
            for n in (n for n in NS if n <= most):
                best = best_of_n(values, true, n)
                result['points'].append({'method': chooser, 'n': n, 'kl': bound(n), 'true_reward': best.mean(),
                                         'true_reward/error': best.std(ddof=1) / math.sqrt(len(best))})
    else:
        policy = task.load('')

        def look(step, samples):
            found = task.evaluate(policy, reference, held_out, SAMPLES, seed + 500)
            result['points'].append({'step': step, 'samples': samples, **found})

        if job['method'] in ('ppo', 'ppo_gt'):
            knobs = {key: value for key, value in job.items() if key in PPOConfig.__dataclass_fields__}
            cfg = PPOConfig(**{**knobs, 'steps': common['rounds'], 'batch_size': ROLLOUTS})
            for step, found in ppo(policy, reference, task, true_reward if job['method'] == 'ppo_gt' else learned_reward, prompts, cfg):
                if step in even_steps(cfg.steps, common['evaluations']):
                    look(step, found['samples'])
        else:
            ref_logps = data['ref_logps']
            losses_of = {'dpo': lambda batch: dpo_losses(policy_logps(policy, batch), ref_logps[batch.ids], job['beta']),
                         'unlikelihood': lambda batch: unlikelihood_losses(policy_logps(policy, batch), job['alpha']),
                         'preferred_ft': lambda batch: preferred_ft_losses(policy_logps(policy, batch))}[job['method']]
            try:
                for step in run_offline(policy, losses_of):
                    look(step, len(prompts) * K)
            except UserError as error:          # unlikelihood has no lower bound
                result['stopped'] = error.message
        save_checkpoint(path_of(job), step, policy, dict(stage=job['method'], config=job, vocabulary=task.train.vocabulary))
    return result


def best_at(points, budget):
    """The highest true reward among points of at most so much KL, and that point; nan where there is none."""
    inside = [point for point in points if point['kl'] <= budget]
    best = max(inside, key=lambda point: point['true_reward'], default=None)
    return (best['true_reward'], best) if best else (math.nan, None)


def summary(result):
    """One line on a finished run."""
    points = result['points']
    if result['job']['method'] == 'data':
        return f'{result["pairs"]:,} pairs'
    if result['job']['method'] == 'reward_model':
        return f'accuracy {points[-1]["accuracy"]:.3f}, calibration error {points[-1]["calibration_error"]:.3f}'
    points = [p for p in points if p.get('method', 'best_of_n') == 'best_of_n']
    return (f'at the end reward {points[-1]["true_reward"]:+.2f}, KL {points[-1]["kl"]:.2f}; best within '
            + ', '.join(f'{budget}: {best_at(points, budget)[0]:+.2f}' for budget in BUDGETS))


# -----------------------------------------------------------------------------
# the table and the figure

def mean_and_error(values):
    """Mean over seeds, and its standard error (nan for one seed)."""
    values = np.array(values, dtype=float)
    return values.mean(), values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def by_method(results):
    """{method: {seed: all points of all its settings}}, in the order of LABELS; best-of-N gives two methods."""
    found = {method: {} for method in LABELS}
    for result in results:
        if result['job']['method'] in LABELS:
            for point in result['points']:
                method = point.get('method', result['job']['method'])
                found[method].setdefault(result['job']['seed'], []).append(point)
    return {method: seeds for method, seeds in found.items() if seeds}


def table(results, optimum):
    """Markdown: the best reward at each KL budget, mean over seeds and its standard error, and the verdict on DPO."""
    methods = by_method(results)
    lines = ['| method | ' + ' | '.join(f'KL <= {budget}' for budget in BUDGETS) + ' | well-formed at 2 | at 8 | samples |',
             '| --- | ' + ' | '.join('---:' for _ in BUDGETS) + ' | ---: | ---: | ---: |']
    best = {}
    for method, seeds in methods.items():
        cells = []
        for budget in BUDGETS:
            best[method, budget] = [best_at(points, budget)[0] for points in seeds.values()]
            mean, error = mean_and_error(best[method, budget])
            cells.append('-' if math.isnan(mean) else f'{mean:+.2f}' + ('' if math.isnan(error) else f' ± {error:.2f}'))
        for budget in (2, 8):
            shares = [best_at(points, budget)[1] or {} for points in seeds.values()]
            cells.append(f"{np.mean([s['well_formed'] for s in shares]):.0%}" if all('well_formed' in s for s in shares) else '-')
        samples = 0 if method.startswith('best_of_n') else max(p.get('samples', 0) for points in seeds.values() for p in points)
        lines.append(f'| {LABELS[method]} | ' + ' | '.join(cells) + (f' | {samples:,} |' if samples else ' | - |'))
    exact = np.interp(BUDGETS, *optimum.T)
    lines.append("| the grammar's optimum | " + ' | '.join(f'{r:+.2f}' for r in exact) + ' | 100% | 100% | |')
    verdict = []
    for method in ('ppo', 'ppo_gt', 'unlikelihood', 'preferred_ft', 'best_of_n'):
        if 'dpo' in methods and method in methods:
            gaps = [mean_and_error(np.subtract(best['dpo', budget], best[method, budget])) for budget in BUDGETS]
            verdict.append(f'- over {LABELS[method]}: ' + ', '.join(
                f'{gap:+.2f}' + ('' if math.isnan(error) else f' ± {error:.2f}') + f' within {budget}'
                for budget, (gap, error) in zip(BUDGETS, gaps) if not math.isnan(gap)))
    return '\n'.join(lines) + '\n\nDPO\'s best reward minus that of the others, nats, paired by seed, by KL budget:\n\n' + '\n'.join(verdict) + '\n'


def figure(results, optimum, path):
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    methods = by_method(results)
    plot, (left, right) = plt.subplots(1, 2, figsize=(13, 5.5), constrained_layout=True)
    reach = 12
    for method, seeds in methods.items():
        points = [p for found in seeds.values() for p in found if p['kl'] <= reach]
        style = dict(color=COLOURS[method], s=14, alpha=0.55, lw=0)
        left.scatter([p['kl'] for p in points], [p['true_reward'] for p in points], **style)
        formed = [p for p in points if 'well_formed' in p]
        right.scatter([p['kl'] for p in formed], [100 * p['well_formed'] for p in formed], **style)
        if method.startswith('best_of_n'):      # a curve by itself
            left.plot([p['kl'] for p in points[:len(points) // len(seeds)]], np.mean([[p['true_reward'] for p in found] for found in seeds.values()], 0),
                      color=COLOURS[method], lw=1.8, label=LABELS[method])
            continue
        # the frontier: the best reward within each KL, the mean over seeds
        budgets = np.linspace(0.1, reach, 160)
        frontier = np.array([[best_at(found, budget)[0] for budget in budgets] for found in seeds.values()]).mean(0)
        furthest = min(max(p['kl'] for p in found) for found in seeds.values())
        left.plot(budgets[budgets <= furthest], frontier[budgets <= furthest], color=COLOURS[method], lw=1.8, label=LABELS[method])
    left.plot(*optimum[optimum[:, 0] <= reach].T, color='k', lw=1.2, ls='--', label="the optimum on the grammar, exact")
    left.set(title='true reward against KL: points are evaluations, lines the best within a KL', xlabel='KL(policy || SFT), nats a sequence',
             ylabel='mean true reward, nats', xlim=(0, reach))
    right.set(title='share of samples that are still reviews of the grammar', xlabel='KL(policy || SFT), nats a sequence',
              ylabel='well-formed, %', xlim=(0, reach), ylim=(40, 100))
    left.legend(fontsize=9, frameon=False, loc='lower right')
    for ax in (left, right):
        ax.grid(alpha=0.2)
        ax.spines[['top', 'right']].set_visible(False)
    plot.savefig(path, dpi=110)


# -----------------------------------------------------------------------------
# the knobs

@dataclass
class Config:
    name: str = 'reviews'                           # of the experiment; the runs go to out/<name>/frontier
    reward: str = config.EMBEDDED                   # a Python file with the true reward: as in sample.py
    seeds: In[int, 'x >= 1'] = 3                    # 1 to so many
    prefixes: In[int, 'x >= 1'] = 1500              # distinct ones of train, 4 completions each
    rounds: In[int, 'x >= 1'] = 20                  # of PPO, 256 samples each: 5,120, where the others have 6,000
    evaluations: In[int, 'x >= 1'] = 6              # of each run
    held_out: In[int, 'x >= 2'] = 250               # prefixes of val
    workers: In[int, 'x >= 1'] = os.cpu_count() or 1    # runs at a time, one thread each
    quick: bool = False                             # one seed, 600 prefixes, 12 rounds, 3 evaluations, fewer settings
    search: bool = False                            # the search for FOUND instead, on seed 0 and the other prefixes of val
    out: str = ''                                   # '' = repro/results/frontier, with -quick or -search


def prepare(name):
    """Make the embedded experiment's data and SFT model where they are missing, as the quickstart does."""
    if name == 'reviews':
        for script, there in (('prepare_prefs.py', os.path.isfile('data/reviews/meta.json')),
                              ('sft.py', find_checkpoints('out/reviews/sft'))):
            if not there and subprocess.run([sys.executable, os.path.join(ROOT, script), config.EMBEDDED]).returncode:
                raise UserError(f'{script} failed')


def main(argv=None):
    cfg = config.load(Config, 'frontier', argv)
    if cfg.quick and cfg.search:
        raise UserError('quick and search are both set: keep one')
    prepare(cfg.name)
    task = Task(cfg.name, cfg.reward)
    reference = task.load('')
    prefixes, rounds, evaluations = (600, 12, 3) if cfg.quick else (cfg.prefixes, cfg.rounds, cfg.evaluations)
    held_out = task.prompts('val', 2 * cfg.held_out)
    common = {'name': cfg.name, 'reward': cfg.reward, 'folder': os.path.join('out', cfg.name, 'frontier' + ('-quick' if cfg.quick else '')),
              'prefixes': prefixes, 'rounds': rounds, 'evaluations': evaluations, 'most_of_n': 16 if cfg.quick else max(NS),
              'held_out': [0, cfg.held_out], 'sft': fingerprint(reference)}
    if cfg.search:
        common['held_out'] = [cfg.held_out, len(held_out)]
    if common['held_out'][1] - common['held_out'][0] < 2 or len(held_out) < common['held_out'][1]:
        raise UserError(f'held_out={cfg.held_out}: data/{cfg.name} has {len(task.prompts("val", 10**9))} distinct prompts in val, '
                        f'and {"twice " if cfg.search else ""}so many are needed')
    jobs = []
    for seed in [0] if cfg.search else [1] if cfg.quick else range(1, cfg.seeds + 1):
        jobs.append({'method': 'data', 'seed': seed, 'common': common})
        grid = {'reward_model': [{}], **(QUICK if cfg.quick else GRID)} if not cfg.search else SEARCH
        for method, settings in grid.items():
            jobs += [{'method': method, 'seed': seed, 'common': common, **FOUND[method], **setting} for setting in settings]
    began = time.perf_counter()
    results = sweep(jobs, cfg.workers, work, needs, summary)
    print(f'the sweep took {time.perf_counter() - began:,.0f} s; its runs {sum(r["seconds"] for r in results):,.0f} s of one core')

    out = cfg.out or os.path.join(ROOT, 'repro', 'results', 'frontier' + ('-quick' if cfg.quick else '-search' if cfg.search else ''))
    os.makedirs(os.path.dirname(out) or '.', exist_ok=True)
    if cfg.search:
        text = search_table(results)
    else:
        starts = [text_of(task.tokenizer, ids) + ' ' for ids in held_out[:cfg.held_out]]
        optimum = grammar_frontier(starts, [1e9, *np.geomspace(30, 0.08, 40)])
        text = table(results, optimum)
        figure(results, optimum, out + '.png')
    write_results(out, text, results)
    print(f'\n{text}\nwritten: {out}.md, .json' + ('' if cfg.search else ', .png'))


def search_table(results):
    """Markdown: every setting that was tried, with the best reward at each budget."""
    lines = ['| method | setting | ' + ' | '.join(f'KL <= {budget}' for budget in BUDGETS) + ' | at the end: reward, KL, well-formed |',
             '| --- | --- | ' + ' | '.join('---:' for _ in BUDGETS) + ' | ---: |']
    for result in results:
        job, last = result['job'], (result['points'] or [{}])[-1]
        setting = ', '.join(f'{key} {job[key]:g}' for key in job if key not in ('method', 'seed', 'common'))
        if job['method'] == 'reward_model':
            lines.append(f'| reward model | {setting} |' + ' |' * len(BUDGETS) + f' accuracy {last["accuracy"]:.3f}, log-loss '
                         f'{last["log_loss"]:.4f}, calibration error {last["calibration_error"]:.3f} |')
        elif job['method'] != 'data':
            cells = ' | '.join(f'{best_at(result["points"], budget)[0]:+.2f}' for budget in BUDGETS)
            lines.append(f'| {LABELS[job["method"]]} | {setting} | {cells} | {last["true_reward"]:+.2f}, {last["kl"]:.1f}, {last["well_formed"]:.0%} |')
    return '\n'.join(lines) + '\n'


if __name__ == '__main__':
    main()
