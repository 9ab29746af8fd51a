"""The paper's figure 2 (left) with a ground truth: mean true reward against KL from the reference, method by method.

    python repro/frontier.py            # prepares the reviews and their SFT model where they are missing, then sweeps
    python repro/frontier.py --quick    # one seed, fewer settings, less data
    python repro/frontier.py --search   # how the learning rates and PPO's knobs were chosen

As in arXiv 2305.18290, section 6.1, the SFT model draws 4 completions of each prefix, and the true reward labels all
their pairs (ties have no label). These methods learn from them:
  DPO at several beta
  PPO at several target KLs, against a reward model learned from the same pairs and, as "PPO-GT", the true reward
  unlikelihood, preferred-FT
  best-of-N, without training
Every few steps each policy is judged on held-out prefixes: mean true reward and sequence KL, both from samples. A seed
stands for the completions, the order and the rollouts; the SFT model is one. Unlike the paper's task, this one has a
known optimum. The SFT model has learned the grammar of config/reviews.py, and the grammar's own frontier of reward and
KL is computed exactly below.

Runs go to out/reviews/frontier, one file each. A sweep that was stopped goes on where it stopped, and a run whose
settings changed is made again. Writes <out>.json, .md and .png.
"""
import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import config                                                                               # noqa: E402
from config import In, UserError, need, reviews                                             # noqa: E402
from best_of_n import best_of_n, bound                                                      # noqa: E402
from dpo import response_logps                                                              # noqa: E402
from nanodpo import checkpoint                                                              # noqa: E402
from nanodpo.data import Sampled                                                            # noqa: E402
from nanodpo.text import text_of                                                            # noqa: E402
from offline import dpo_losses, even_steps, preferred_ft_losses, train, unlikelihood_losses # noqa: E402
from ppo import Config as PPOConfig, ppo, read_score                                        # noqa: E402
from reward_model import RewardModel, all_rewards, bradley_terry_losses, judge, response_rewards    # noqa: E402
from rollout import Task                                                                    # noqa: E402
from sweep import path_of, sweep, write_results                                             # noqa: E402

TARGETS = [{'target_kl': kl, 'kl_coef': coef} for kl, coef in ((3.0, 2.0), (6.0, 1.0), (9.0, 0.5), (12.0, 0.25))]
GRID = {        # the paper's settings; where PPO's KL controller starts, and DPO's rate by beta, were found by --search
    'dpo': [{'beta': beta, 'learning_rate': lr}
            for beta, lr in ((0.05, 3e-4), (0.1, 3e-4), (1.0, 6e-4), (1.0, 1.2e-3), (5.0, 6e-4))],
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
TWICE = {'ppo_epochs': 2, 'minibatches': 4}
ONCE = {'ppo_epochs': 1, 'minibatches': 8}      # as many steps
SEARCH = {      # what is tried instead of FOUND, at one setting of the grid or two
    'ppo_gt': [{'target_kl': 6.0, 'learning_rate': lr, 'kl_coef': coef, 'gae_lambda': lam, **passes}
               for lr, coef, lam, passes in (
                   (3e-4, 0.1, 0.95, TWICE), (1e-4, 0.1, 0.95, TWICE), (6e-4, 0.1, 0.95, TWICE),
                   (3e-4, 0.3, 0.95, TWICE), (3e-4, 1.0, 0.95, TWICE), (3e-4, 0.1, 1.0, TWICE),
                   (6e-4, 1.0, 0.95, TWICE), (1e-3, 1.0, 0.95, TWICE), (6e-4, 2.0, 0.95, TWICE),
                   (6e-4, 1.0, 0.95, ONCE))],
    'dpo': [{'beta': beta, 'learning_rate': lr}
            for beta, lr in ((0.1, 3e-4), (0.1, 6e-4), (0.1, 1.2e-3), (1.0, 6e-4), (1.0, 1.2e-3))],
    'unlikelihood': [{'alpha': 0.1, 'learning_rate': lr} for lr in (3e-5, 1e-4, 3e-4)],
    'preferred_ft': [{'learning_rate': lr} for lr in (1e-4, 3e-4, 1e-3)],
    'reward_model': [{'learning_rate': lr, 'epochs': n} for lr, n in ((1e-3, 2), (2e-3, 2), (4e-3, 2))],
}
K = 4                               # completions a prefix, as the paper
BATCH = 8                           # prefixes a step
WARMUP = 20                         # steps
ROLLOUTS = 256                      # PPO's samples a round
SAMPLES = 2                         # of each held-out prefix, at every evaluation
NS = (1, 2, 4, 8, 16, 32, 64)
BUDGETS = (1, 2, 4, 8)              # nats
LABELS = {'dpo': 'DPO', 'ppo': 'PPO, learned reward', 'ppo_gt': 'PPO-GT, true reward', 'unlikelihood': 'unlikelihood',
          'preferred_ft': 'preferred-FT', 'best_of_n': 'best of N, true reward',
          'best_of_n_learned': 'best of N, learned reward'}
COLOURS = dict(zip(LABELS, ('C0', 'C3', 'C1', 'C5', 'C2', 'C4', 'C6')))


# --- the optimum: the grammar's own frontier, exactly ---------------------------------------------

def grammar_log_z(start, lam):
    """log E exp(lam * reward) over the grammar's reviews that begin with `start`; lam: (n,) float64 -> (n,).

    Given the polarity z the sentences are independent, and so are the slots of a form: products of small sums.
    """
    def sentence(kind, z, start=''):
        """The sum over forms of their weight, and of their weight times E exp(lam * reward)."""
        ways = reviews.ways(kind, start)
        forms, weights = ways[0], ways[z]
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


# --- jobs: a dict of settings each, done by a worker process, as sweep.py says --------------------

def needs(job, jobs):
    """The jobs whose files this one reads."""
    wanted = {'data': (), 'reward_model': ('data',), 'ppo': ('data', 'reward_model'), 'best_of_n': ('reward_model',)}
    methods = wanted.get(job['method'], ('data',))
    return [other for other in jobs if other['seed'] == job['seed'] and other['method'] in methods]


def path_of_needed(method, needed):
    path, = [path_of(other) for other in needed if other['method'] == method]
    return path


def train_offline(model, losses_of, data, epochs, learning_rate, seed, evaluations):
    """Train on all pairs of the completions `data`. A generator: it yields the steps to look at."""
    groups, rewards = Sampled(data['groups']), data['rewards']
    better = rewards[:, :, None] > rewards[:, None, :]
    steps = epochs * math.ceil(len(groups) / BATCH)
    looks = even_steps(steps, evaluations)
    for step, _, _ in train(model, losses_of, groups, better, steps, BATCH, learning_rate, WARMUP, seed):
        if step in looks:
            yield step


def work(job, needed):
    """Do a job, in its worker. -> {'points': its evaluations, and what else there is to say}"""
    torch.set_num_threads(1)
    common = job['common']
    task = Task(common['name'], common['reward'])
    first, last = common['held_out']
    held_out = task.prompts('val', last)[first:]
    do = {'data': draw_data, 'reward_model': learn_reward, 'best_of_n': choose_best}.get(job['method'], learn_policy)
    return do(job, task, held_out, needed)


def draw_data(job, task, held_out, needed):
    """K completions of each prefix, with their true rewards and the reference's log-probs, to <path>.pt."""
    reference = task.load('')
    prompts = task.prompts('train', job['common']['prefixes'])
    repeated = [prompt for prompt in prompts for _ in range(K)]
    responses = task.draw(reference, repeated, job['seed'])
    rewards = task.score(repeated, responses)['true_reward'].reshape(-1, K)
    groups = [[prompt, *responses[i * K:(i + 1) * K]] for i, prompt in enumerate(prompts)]
    torch.save({'groups': groups, 'rewards': torch.tensor(rewards),
                'ref_logps': torch.tensor(task.logps(reference, groups)).float()}, path_of(job) + '.pt')
    return {'points': [], 'pairs': int((rewards[:, :, None] > rewards[:, None, :]).sum())}


def learn_reward(job, task, held_out, needed):
    """A reward model, judged on the pairs of K new completions of each held-out prefix."""
    reference = task.load('')
    model = RewardModel.from_policy(reference)
    data = torch.load(path_of_needed('data', needed) + '.pt')
    repeated = [prompt for prompt in held_out for _ in range(K)]
    responses = task.draw(reference, repeated, job['seed'] + 500)
    true = task.score(repeated, responses)['true_reward'].reshape(-1, K)
    pairs = true[:, :, None] > true[:, None, :]
    points = []
    for step in train_offline(model, lambda batch: bradley_terry_losses(response_rewards(model, batch)), data,
                              job['epochs'], job['learning_rate'], job['seed'], job['common']['evaluations']):
        rewards = all_rewards(model, Sampled(list(zip(repeated, responses))))[:, 0].reshape(-1, K)
        points.append({'step': step, **judge((rewards[:, :, None] - rewards[:, None, :])[pairs])})
    checkpoint.save(path_of(job), step, model, dict(stage='reward_model', config={}, vocabulary=task.train.vocabulary))
    return {'points': points}


def choose_best(job, task, held_out, needed):
    """Best-of-N by the true reward and by the learned one, for each N."""
    most = job['common']['most_of_n']
    repeated = [prompt for prompt in held_out for _ in range(most)]
    responses = task.draw(task.load(''), repeated, job['seed'] + 500)
    learned_reward = read_score(task, path_of_needed('reward_model', needed))
    true = task.score(repeated, responses)['true_reward'].reshape(-1, most)
    learned = learned_reward(repeated, responses).reshape(-1, most)
    points = []
    for method, chooser in (('best_of_n', true), ('best_of_n_learned', learned)):
        for n in NS:
            if n <= most:
                best = best_of_n(chooser, true, n)
                points.append({'method': method, 'n': n, 'kl': bound(n), 'true_reward': best.mean(),
                               'true_reward/error': best.std(ddof=1) / math.sqrt(len(best))})
    return {'points': points}


def learn_policy(job, task, held_out, needed):
    """A policy by one of the methods, judged on the held-out prefixes every few steps."""
    method, common, seed = job['method'], job['common'], job['seed']
    policy = task.load('')
    reference = task.load('').requires_grad_(False)
    data = torch.load(path_of_needed('data', needed) + '.pt')
    prompts = [group[0] for group in data['groups']]
    result = {'points': []}
    step = 0

    def true_reward(prompts, responses):
        return task.score(prompts, responses)['true_reward']

    def look(step, samples):
        measured = task.evaluate(policy, reference, held_out, SAMPLES, seed + 500)
        result['points'].append({'step': step, 'samples': samples, **measured})

    def losses_of(batch):
        logps = response_logps(policy, batch)
        if method == 'dpo':
            return dpo_losses(logps, data['ref_logps'][batch.ids], job['beta'])
        return unlikelihood_losses(logps, job['alpha']) if method == 'unlikelihood' else preferred_ft_losses(logps)

    if method in ('ppo', 'ppo_gt'):
        knobs = {key: value for key, value in job.items() if key in PPOConfig.__dataclass_fields__}
        cfg = PPOConfig(**{**knobs, 'steps': common['rounds'], 'batch_size': ROLLOUTS})
        score = true_reward if method == 'ppo_gt' else read_score(task, path_of_needed('reward_model', needed))
        for step, record in ppo(policy, reference, task, score, prompts, cfg):
            if step in even_steps(cfg.steps, common['evaluations']):
                look(step, record['samples'])
    else:
        try:
            for step in train_offline(policy, losses_of, data, job['epochs'], job['learning_rate'], seed,
                                      common['evaluations']):
                look(step, len(prompts) * K)
        except UserError as error:          # unlikelihood has no lower bound
            result['stopped'] = error.message
    checkpoint.save(path_of(job), step, policy, dict(stage=method, config=job, vocabulary=task.train.vocabulary))
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


# --- the table and the figure ---------------------------------------------------------------------

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
    lines = ['| method | ' + ' | '.join(f'KL <= {budget}' for budget in BUDGETS)
             + ' | well-formed at 2 | at 8 | samples |',
             '| --- | ' + ' | '.join('---:' for _ in BUDGETS) + ' | ---: | ---: | ---: |']
    best = {}
    for method, seeds in methods.items():
        cells = []
        for budget in BUDGETS:
            best[method, budget] = [best_at(points, budget)[0] for points in seeds.values()]
            mean, error = mean_and_error(best[method, budget])
            cells.append('-' if math.isnan(mean) else f'{mean:+.2f}' + plus_minus(error))
        for budget in (2, 8):
            points = [best_at(points, budget)[1] or {} for points in seeds.values()]
            shares = [point.get('well_formed', math.nan) for point in points]
            cells.append('-' if math.isnan(sum(shares)) else f'{np.mean(shares):.0%}')
        samples = max(point.get('samples', 0) for points in seeds.values() for point in points)
        cells.append('-' if method.startswith('best_of_n') else f'{samples:,}')
        lines.append(f'| {LABELS[method]} | ' + ' | '.join(cells) + ' |')
    exact = np.interp(BUDGETS, *optimum.T)
    lines.append("| the grammar's optimum | " + ' | '.join(f'{r:+.2f}' for r in exact) + ' | 100% | 100% | |')
    lines += ['', "DPO's best reward minus that of the others, nats, paired by seed, by KL budget:", '']
    for method in ('ppo', 'ppo_gt', 'unlikelihood', 'preferred_ft', 'best_of_n'):
        if 'dpo' in methods and method in methods:
            gaps = {budget: mean_and_error(np.subtract(best['dpo', budget], best[method, budget]))
                    for budget in BUDGETS}
            lines.append(f'- over {LABELS[method]}: ' + ', '.join(
                f'{gap:+.2f}{plus_minus(error)} within {budget}' for budget, (gap, error) in gaps.items()
                if not math.isnan(gap)))
    return '\n'.join(lines) + '\n'


def plus_minus(error):
    """A standard error as text, '' where there is none."""
    return '' if math.isnan(error) else f' ± {error:.2f}'


def figure(results, optimum, path):
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    plot, (left, right) = plt.subplots(1, 2, figsize=(13, 5.5), constrained_layout=True)
    reach = 12
    for method, seeds in by_method(results).items():
        points = [point for points in seeds.values() for point in points if point['kl'] <= reach]
        dots = dict(color=COLOURS[method], s=14, alpha=0.55, lw=0)
        line = dict(color=COLOURS[method], lw=1.8, label=LABELS[method])
        left.scatter([p['kl'] for p in points], [p['true_reward'] for p in points], **dots)
        formed = [p for p in points if 'well_formed' in p]
        right.scatter([p['kl'] for p in formed], [100 * p['well_formed'] for p in formed], **dots)
        if method.startswith('best_of_n'):      # a curve by itself
            curves = [[p['true_reward'] for p in points] for points in seeds.values()]
            left.plot([p['kl'] for p in points[:len(curves[0])]], np.mean(curves, 0), **line)
            continue
        # the frontier: the best reward within each KL, the mean over seeds
        budgets = np.linspace(0.1, reach, 160)
        frontier = np.mean([[best_at(points, budget)[0] for budget in budgets] for points in seeds.values()], 0)
        furthest = min(max(p['kl'] for p in points) for points in seeds.values())
        left.plot(budgets[budgets <= furthest], frontier[budgets <= furthest], **line)
    left.plot(*optimum[optimum[:, 0] <= reach].T, color='k', lw=1.2, ls='--', label='the optimum on the grammar, exact')
    kl = 'KL(policy || SFT), nats a sequence'
    left.set(title='true reward against KL: points are evaluations, lines the best within a KL', xlabel=kl,
             ylabel='mean true reward, nats', xlim=(0, reach))
    right.set(title='share of samples that are still reviews of the grammar', xlabel=kl,
              ylabel='well-formed, %', xlim=(0, reach), ylim=(40, 100))
    left.legend(fontsize=9, frameon=False, loc='lower right')
    for ax in (left, right):
        ax.grid(alpha=0.2)
        ax.spines[['top', 'right']].set_visible(False)
    plot.savefig(path, dpi=110)


# --- the knobs ------------------------------------------------------------------------------------

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
    search: bool = False                            # the search for FOUND, on seed 0 and the other prefixes of val
    out: str = ''                                   # '' = repro/results/frontier, with -quick or -search


def prepare(name):
    """Make the quickstart's data and SFT model where they are missing, as the quickstart does."""
    if name != 'reviews':
        return
    for script, is_there in (('prepare_prefs.py', os.path.isfile('data/reviews/meta.json')),
                             ('sft.py', checkpoint.find('out/reviews/sft'))):
        if not is_there:
            command = [sys.executable, os.path.join(ROOT, script), config.EMBEDDED]
            need(subprocess.run(command).returncode == 0, f'{script} failed')


def main(argv=None):
    cfg = config.load(Config, 'frontier', argv)
    need(not (cfg.quick and cfg.search), 'quick and search are both set: keep one')
    prepare(cfg.name)
    task = Task(cfg.name, cfg.reward)
    variant = '-quick' if cfg.quick else ''
    prefixes, rounds, evaluations = (600, 12, 3) if cfg.quick else (cfg.prefixes, cfg.rounds, cfg.evaluations)
    held_out = task.prompts('val', 2 * cfg.held_out)
    common = {'name': cfg.name, 'reward': cfg.reward, 'folder': os.path.join('out', cfg.name, 'frontier' + variant),
              'prefixes': prefixes, 'rounds': rounds, 'evaluations': evaluations,
              'most_of_n': 16 if cfg.quick else max(NS), 'held_out': [0, cfg.held_out],
              'sft': checkpoint.fingerprint(task.load(''))}
    if cfg.search:
        variant = '-search'
        common['held_out'] = [cfg.held_out, len(held_out)]
    first, last = common['held_out']
    needed = 'twice so many' if cfg.search else 'so many'
    need(last - first >= 2 and len(held_out) >= last, f'held_out={cfg.held_out}: data/{cfg.name} has '
         f'{len(task.prompts("val", 0))} distinct prompts in val, and {needed} are needed')
    jobs = []
    grid = SEARCH if cfg.search else {'reward_model': [{}], **(QUICK if cfg.quick else GRID)}
    for seed in [0] if cfg.search else [1] if cfg.quick else range(1, cfg.seeds + 1):
        jobs.append({'method': 'data', 'seed': seed, 'common': common})
        for method, settings in grid.items():
            for setting in settings:
                jobs.append({'method': method, 'seed': seed, 'common': common, **FOUND[method], **setting})
    began = time.perf_counter()
    results = sweep(jobs, cfg.workers, work, needs, summary)
    print(f'the sweep took {time.perf_counter() - began:,.0f} s; its runs '
          f'{sum(result["seconds"] for result in results):,.0f} s of one core')

    out = cfg.out or os.path.join(ROOT, 'repro', 'results', 'frontier' + variant)
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
    lines = ['| method | setting | ' + ' | '.join(f'KL <= {budget}' for budget in BUDGETS)
             + ' | at the end: reward, KL, well-formed |',
             '| --- | --- | ' + ' | '.join('---:' for _ in BUDGETS) + ' | ---: |']
    for result in results:
        job = result['job']
        last = result['points'][-1] if result['points'] else {}
        setting = ', '.join(f'{key} {job[key]:g}' for key in job if key not in ('method', 'seed', 'common'))
        if job['method'] == 'reward_model':
            lines.append(f'| reward model | {setting} |' + ' |' * len(BUDGETS) + f' accuracy {last["accuracy"]:.3f}, '
                         f'log-loss {last["log_loss"]:.4f}, calibration error {last["calibration_error"]:.3f} |')
        elif job['method'] != 'data':
            cells = ' | '.join(f'{best_at(result["points"], budget)[0]:+.2f}' for budget in BUDGETS)
            lines.append(f'| {LABELS[job["method"]]} | {setting} | {cells} | {last["true_reward"]:+.2f}, '
                         f'{last["kl"]:.1f}, {last["well_formed"]:.0%} |')
    return '\n'.join(lines) + '\n'


if __name__ == '__main__':
    config.run(main)
