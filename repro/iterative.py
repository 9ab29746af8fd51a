"""Online DPO in rounds, each on pairs drawn from the policy of the round before, against offline DPO on as many pairs.

    python repro/iterative.py           # makes the reviews and their SFT model if they are missing, then all runs
    python repro/iterative.py --quick   # one seed, two rounds, fewer prompts

A round draws num_samples responses to prompts that no round before has used (draw_prefs.py). The best by the true
reward and the worst become a pair. The round trains on these pairs alone (dpo.py), from where the round before ended:

  fixed      the reference is the SFT model, in all rounds
  moved      the reference is the policy that the round began with and drew from
  offline    all pairs are drawn from the SFT model. Its point at round r is a run of its own from the SFT model, on the
             pairs of r rounds, with as many optimizer steps as r rounds of the others have

After each round the policy is judged on held-out prompts: mean true reward, KL from the SFT model, share of well-formed
reviews. A seed decides the prompts and their order, the draws and the order of training. The SFT model is one.

Runs go to out/reviews/iterative, with what they drew and trained: one that was stopped begins again, a finished one
stays. Writes <out>.json, .md and .png.
"""
import contextlib
import math
import os
import shutil
import signal
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import config                                                                               # noqa: E402
import dpo                                                                                  # noqa: E402
import draw_prefs                                                                           # noqa: E402
from config import In, need                                                                 # noqa: E402
from frontier import grammar_frontier, mean_and_error, prepare                              # noqa: E402
from nanodpo.checkpoint import fingerprint                                                  # noqa: E402
from nanodpo.data import Groups, distinct_prompts, read_meta                                # noqa: E402
from nanodpo.text import text_of                                                            # noqa: E402
from rollout import Task                                                                    # noqa: E402
from sweep import path_of, sweep, write_results                                             # noqa: E402

LABELS = {'fixed': 'online, reference fixed', 'moved': 'online, reference moved', 'offline': 'offline'}
COLOURS = {'fixed': 'C0', 'moved': 'C3', 'offline': 'C7'}
SAMPLES = 4                 # of each held-out prompt, at every evaluation
LONGEST = 64                # tokens of a response; the grammar's are shorter


# ----------------------------------------------------------------------------------------------------
# a run: one way, one seed, all rounds

def work(job, _):
    """Do a run in its own folder, which has a data/ and an out/ of its own. -> {'points': one a round}"""
    torch.set_num_threads(1)
    common, way, seed = job['common'], job['method'], job['seed']
    task = Task(common['name'], common['reward'])
    sft = task.load('')
    val = task.prompts('val', 10**9)
    held_out, others = val[:common['held_out']], val[common['held_out']:]
    size = common['prompts']
    prompts = distinct_prompts(task.train, common['rounds'] * size, seed)
    steps = math.ceil(size / common['batch_size']) * common['epochs']
    points = [{'round': 0, 'pairs': 0, 'steps': 0, **task.evaluate(sft, sft, held_out, SAMPLES, seed + 500)}]
    source = os.path.abspath(task.folder)
    sft_folder = os.path.abspath(os.path.join('out', common['name'], 'sft'))
    policy = sft_folder
    so_far = {'train': [], 'val': []}
    home = os.getcwd()
    shutil.rmtree(path_of(job))
    os.makedirs(path_of(job))
    os.chdir(path_of(job))
    try:
        for r in range(1, common['rounds'] + 1):
            with open('log.txt', 'a') as log, contextlib.redirect_stdout(log):
                draw_round(common, r, 1000 * seed + r, source, sft_folder if way == 'offline' else policy,
                           {'train': prompts[(r - 1) * size:r * size], 'val': others})
                for split in so_far:
                    drawn = Groups(f'data/round-{r}', split)
                    so_far[split] += [[piece.tolist() for piece in group] for group in drawn]
                if way == 'offline':
                    draw_prefs.write_set(f'data/rounds-1-to-{r}', source, so_far)
                    policy = train(common, f'rounds-1-to-{r}', sft_folder, sft_folder, r * steps, 1000 * seed + r)
                else:
                    reference = sft_folder if way == 'fixed' else policy
                    policy = train(common, f'round-{r}', policy, reference, steps, 1000 * seed + r)
            points.append({'round': r, 'pairs': len(so_far['train']), 'steps': r * steps,
                           **task.evaluate(task.load(policy), sft, held_out, SAMPLES, seed + 500)})
    finally:
        os.chdir(home)
    return {'points': points}


def draw_round(common, r, seed, source, policy, prompts):
    """Make data/round-<r>, the pairs that the policy draws to {split: prompts}."""
    end = read_meta(source)['eot_token']                # only the prompts are used: their responses are an end token
    groups = {split: [[prompt, [end]] for prompt in of_split] for split, of_split in prompts.items()}
    draw_prefs.write_set('data/prompts', source, groups)
    draw_prefs.main([f'--name=round-{r}', '--source=data/prompts', f'--policy={policy}',
                     f'--reward={common["reward"]}', f'--num_samples={common["num_samples"]}',
                     f'--max_new_tokens={LONGEST}', f'--seed={seed}', '--device=cpu'])


def train(common, name, init_from, reference, steps, seed):
    """Train on data/<name>. -> the folder of the policy"""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    dpo.main([f'--name={name}', f'--init_from={init_from}', f'--ref_from={reference}', f'--beta={common["beta"]}',
              f'--batch_size={common["batch_size"]}', f'--max_steps={steps}', '--optimizer=adamw',
              f'--learning_rate={common["learning_rate"]}', '--schedule=linear', '--warmup_steps=10',
              '--eval_interval=0', '--kl_prompts=0', f'--seed={seed}', '--device=cpu'])
    for number, handler in handlers.items():            # dpo.py has set its own
        signal.signal(number, handler)
    return os.path.abspath(f'out/{name}/dpo')


def summary(result):
    """One line on a finished run."""
    return 'reward, KL by round: ' + ', '.join(f'{p["true_reward"]:+.2f} {p["kl"]:.2f}' for p in result['points'])


# ----------------------------------------------------------------------------------------------------
# the table and the figure

def over_seeds(results):
    """{way: {measure: (rounds + 1, seeds)}}, in the order of LABELS."""
    measures = {}
    for way in LABELS:
        runs = [result['points'] for result in results if result['job']['method'] == way]
        measures[way] = {key: np.array([[point[key] for point in run] for run in runs]).T for key in runs[0][0]}
    return measures


def cell(values, text='{:+.2f}'):
    """Mean over seeds, and its standard error where there is one."""
    mean, error = mean_and_error(values)
    return text.format(mean) + ('' if math.isnan(error) else f' ± {error:.2f}')


def table(results):
    """Markdown: a row a way and round, means over seeds and their errors. Then each online way against offline."""
    measures = over_seeds(results)
    rows = [['', 'round', 'pairs', 'steps', 'true reward', 'KL from SFT', 'well-formed', 'tokens']]
    for way, m in measures.items():
        for r in range(len(m['round'])):
            if r == 0 and way != 'fixed':       # round 0 is the same for all
                continue
            formed = f'{m["well_formed"][r].mean():.1%}' if 'well_formed' in m else '-'
            rows.append([LABELS[way] if r else 'SFT', str(r), f'{m["pairs"][r].mean():,.0f}',
                         f'{m["steps"][r].mean():,.0f}', cell(m['true_reward'][r]), cell(m['kl'][r], '{:.2f}'), formed,
                         f'{m["tokens"][r].mean():.1f}'])
    rows.insert(1, ['---'] + ['---:'] * (len(rows[0]) - 1))
    text = ''.join(f'| {" | ".join(row)} |\n' for row in rows)
    text += '\nTrue reward and KL minus those of offline DPO on as many pairs, nats, paired by seed, by round:\n\n'
    offline = measures['offline']
    for way, m in measures.items():
        if way != 'offline':
            gaps = [f'{cell(m["true_reward"][r] - offline["true_reward"][r])} and '
                    f'{cell(m["kl"][r] - offline["kl"][r])} after {r}' for r in range(1, len(m['round']))]
            text += f'- {LABELS[way]}: {", ".join(gaps)}\n'
    return text


def figure(results, optimum, path):
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    plot, axes = plt.subplots(1, 3, figsize=(15, 4.8), constrained_layout=True)
    measures = over_seeds(results)
    for way, m in measures.items():
        rounds = m['round'][:, 0]
        mean, error = {}, {}
        for key in ('true_reward', 'kl'):
            mean[key], error[key] = np.nan_to_num([mean_and_error(row) for row in m[key]]).T
        style = dict(color=COLOURS[way], marker='o', ms=5, lw=1.8, ls='--' if way == 'offline' else '-')
        for ax, key in zip(axes, ('true_reward', 'kl')):
            ax.plot(rounds, mean[key], label=LABELS[way], **style)
            ax.fill_between(rounds, mean[key] - error[key], mean[key] + error[key], color=COLOURS[way], alpha=0.2, lw=0)
        axes[2].errorbar(mean['kl'], mean['true_reward'], error['true_reward'], error['kl'], capsize=2, **style)
    reach = max(result['points'][-1]['kl'] for result in results) * 1.1
    within = optimum[optimum[:, 0] <= reach]
    axes[2].plot(*within.T, color='k', lw=1.2, ls=':', label='the optimum on the grammar, exact')
    by_round = f'round; offline: pairs / {next(iter(measures.values()))["pairs"][1].mean():,.0f}'
    reward, distance = 'mean true reward, nats', 'KL(policy || SFT), nats a sequence'
    axes[0].set(title='true reward', xlabel=by_round, ylabel=reward, xticks=rounds)
    axes[1].set(title='distance from the SFT model', xlabel=by_round, ylabel=distance, xticks=rounds)
    axes[2].set(title='what the distance buys', xlabel=distance, ylabel=reward)
    axes[0].legend(frameon=False, loc='lower right')
    axes[2].legend(frameon=False, loc='lower right')
    for ax in axes:
        ax.grid(alpha=0.2)
        ax.spines[['top', 'right']].set_visible(False)
    plot.savefig(path, dpi=110)


# ----------------------------------------------------------------------------------------------------
# the knobs

@dataclass
class Config:
    name: str = 'reviews'                           # of the experiment; the runs go to out/<name>/iterative
    reward: str = config.EMBEDDED                   # a Python file with the true reward: as in sample.py
    seeds: In[int, 'x >= 1'] = 3                    # 1 to so many
    rounds: In[int, 'x >= 1'] = 4
    prompts: In[int, 'x >= 1'] = 500                # of train, a round
    num_samples: In[int, 'x >= 2'] = 4              # of each, of which the best and the worst become a pair
    beta: In[float, 'x > 0'] = 1.0
    learning_rate: In[float, 'x > 0'] = 4e-4        # AdamW, linear to 0 in each round; 3e-4 left much unlearned,
                                                    # 6e-4 cost form
    epochs: In[int, 'x >= 1'] = 2                   # passes over a round's pairs
    batch_size: In[int, 'x >= 1'] = 16              # pairs a step
    held_out: In[int, 'x >= 2'] = 250               # prompts of val; the drawn sets take theirs from the others
    workers: In[int, 'x >= 1'] = os.cpu_count() or 1    # runs at a time, one thread each
    quick: bool = False                             # one seed, two rounds, 200 prompts, 100 held out
    out: str = ''                                   # '' = repro/results/iterative, with -quick


def main(argv=None):
    cfg = config.load(Config, 'iterative', argv)
    variant = 'iterative-quick' if cfg.quick else 'iterative'
    seeds, rounds, prompts, held_out = cfg.seeds, cfg.rounds, cfg.prompts, cfg.held_out
    if cfg.quick:
        seeds, rounds, prompts, held_out = 1, 2, 200, 100
    prepare(cfg.name)
    reward = os.path.abspath(cfg.reward)
    task = Task(cfg.name, reward)
    for split, wanted in (('train', rounds * prompts), ('val', held_out + 1)):
        there = len(task.prompts(split, wanted))
        need(there >= wanted, f'data/{cfg.name} has {there:,} distinct prompts in {split}, {wanted:,} are needed: '
             'lower rounds, prompts or held_out')
    common = {'name': cfg.name, 'reward': reward, 'folder': os.path.join('out', cfg.name, variant), 'rounds': rounds,
              'prompts': prompts, 'held_out': held_out, 'num_samples': cfg.num_samples, 'beta': cfg.beta,
              'learning_rate': cfg.learning_rate, 'epochs': cfg.epochs, 'batch_size': cfg.batch_size,
              'sft': fingerprint(task.load('')), 'data': task.train.fingerprint}
    jobs = [{'method': way, 'seed': seed, 'common': common} for seed in range(1, seeds + 1)
            for way in ('offline', 'fixed', 'moved')]
    began = time.perf_counter()
    results = sweep(jobs, cfg.workers, work, lambda job, jobs: [], summary)
    seconds = sum(r['seconds'] for r in results)
    print(f'the runs took {time.perf_counter() - began:,.0f} s, of one core {seconds:,.0f} s')

    out = cfg.out or os.path.join(ROOT, 'repro', 'results', variant)
    os.makedirs(os.path.dirname(out) or '.', exist_ok=True)
    starts = [text_of(task.tokenizer, ids) + ' ' for ids in task.prompts('val', held_out)]
    text = table(results)
    figure(results, grammar_frontier(starts, [1e9, *np.geomspace(30, 0.08, 40)]), out + '.png')
    write_results(out, text, results)
    print(f'\n{text}\nwritten: {out}.md, .json, .png')


if __name__ == '__main__':
    config.run(main)
