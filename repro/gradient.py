"""What DPO's gradient does: with and without its weight, and why the chosen responses' log-probability falls.

    python repro/gradient.py        # the reviews, after prepare_prefs.py and sft.py; writes repro/results/gradient.*

The gradient of DPO is -beta sigmoid(-beta h) (grad log pi(w) - grad log pi(l)) (arXiv 2305.18290, section 4).
"Unweighted" is the paper's ablation, the same without sigmoid(-beta h): a pair that is right already pushes as hard as
one that is wrong. Both start from the SFT model, with the same pairs, rate and steps. The figure shows the
log-probabilities of both sides on validation pairs. On samples for the same prompts it shows the true reward and the
share that is still a review.

Why the chosen log-prob may fall. The loss sees only differences, so nothing holds log pi(w) up. And where both sides
of the pairs are samples of the reference, as here, their mean must fall whatever is learned: over all samples of the
reference the mean of log(pi / ref) is -KL(ref || pi). Chosen and rejected are these samples, sorted. Their implicit
rewards lie half a margin above and below that mean. So the chosen one is below zero as soon as half the margin is less
than beta KL(ref || pi).
"""
import math
import os
import sys
from dataclasses import dataclass

import torch
from tqdm import tqdm

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import config                                                                               # noqa: E402
from config import In                                                                       # noqa: E402
from dpo import response_logps                                                              # noqa: E402
from offline import dpo_losses, even_steps, first_is_better, mean_logps, train, unweighted_losses   # noqa: E402
from rollout import Task                                                                    # noqa: E402
from sweep import write_json                                                                # noqa: E402


def figure(runs, path):
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    plot, axes = plt.subplots(2, 3, figsize=(13, 6.5), constrained_layout=True)
    for row, (method, points) in zip(axes, runs.items()):
        steps = [p['step'] for p in points]
        start = points[0]
        for side, colour in (('chosen', 'C2'), ('rejected', 'C3')):
            row[0].plot(steps, [p[side] - start[side] for p in points], color=colour, marker='o', ms=3, label=side)
        row[0].plot(steps, [(p['chosen'] + p['rejected'] - start['chosen'] - start['rejected']) / 2 for p in points],
                    color='0.4', ls='--', label='mean of both = -KL(ref || policy)')
        row[0].axhline(0, color='0.6', lw=0.8)
        row[0].set_title(f'{method}: log(policy / ref), validation pairs', fontsize=10)
        row[0].set_ylabel('nats a response')
        row[1].plot(steps, [p['true_reward'] for p in points], color='C0', marker='o', ms=3,
                    label='true reward of samples, nats')
        row[1].plot(steps, [p['kl'] for p in points], color='C1', marker='o', ms=3, label='KL(policy || ref), nats')
        row[1].set_title(f'{method}: samples', fontsize=10)
        row[2].plot(steps, [100 * p['well_formed'] for p in points], color='C4', marker='o', ms=3,
                    label='still a review, %')
        row[2].plot(steps, [p['tokens'] for p in points], color='C5', marker='o', ms=3, label='tokens a sample')
        row[2].set_title(f'{method}: samples', fontsize=10)
        row[2].set_ylim(0, 105)
        for ax in row:
            ax.legend(fontsize=8, frameon=False)
            ax.set_xlabel('step')
            ax.grid(alpha=0.2)
            ax.spines[['top', 'right']].set_visible(False)
    plot.savefig(path, dpi=110)


# ----------------------------------------------------------------------------------------------------
# the knobs

@dataclass
class Config:
    name: str = 'reviews'                           # of the experiment: data/<name>, out/<name>/sft
    reward: str = config.EMBEDDED                   # a Python file with the true reward; its metrics have `well_formed`
    beta: In[float, 'x > 0'] = 0.5                  # as config/reviews.py
    learning_rate: In[float, 'x > 0'] = 6e-4        # as config/reviews.py, for both
    batch_size: In[int, 'x >= 1'] = 32              # pairs a step
    epochs: In[int, 'x >= 1'] = 1
    warmup_steps: In[int, 'x >= 1'] = 20
    evaluations: In[int, 'x >= 1'] = 12
    held_out: In[int, 'x >= 2'] = 250               # prompts sampled for at each
    seed: In[int, '0 <= x < 2**32'] = 1337
    out: str = os.path.join(ROOT, 'repro', 'results', 'gradient')


def main(argv=None):
    cfg = config.load(Config, 'gradient', argv)
    task = Task(cfg.name, cfg.reward)
    reference = task.load('').requires_grad_(False)
    prompts = task.prompts('val', cfg.held_out)
    steps = cfg.epochs * math.ceil(len(task.train) / cfg.batch_size)
    looks = even_steps(steps, cfg.evaluations)
    runs = {}

    def look(method, step, policy):
        chosen, rejected = mean_logps(policy, task.val)
        measured = task.evaluate(policy, reference, prompts, 1, cfg.seed)
        tqdm.write(f'{method:10} {step:>5,}/{steps:,} | logps chosen {chosen:8.2f} rejected {rejected:8.2f} | reward '
                   f'{measured["true_reward"]:+6.2f} | KL {measured["kl"]:6.2f} | well-formed '
                   f'{measured["well_formed"]:6.1%} | {measured["tokens"]:.0f} tokens')
        runs[method].append({'step': step, 'chosen': chosen, 'rejected': rejected, **measured})

    for method in ('dpo', 'unweighted'):
        policy = task.load('').train()
        runs[method] = []

        def losses_of(batch):
            logps = response_logps(policy, batch)
            if method == 'unweighted':
                return unweighted_losses(logps, cfg.beta)
            with torch.no_grad():
                ref_logps = response_logps(reference, batch)
            return dpo_losses(logps, ref_logps, cfg.beta)

        look(method, 0, policy)
        run = train(policy, losses_of, task.train, first_is_better(task.train), steps, cfg.batch_size,
                    cfg.learning_rate, cfg.warmup_steps, cfg.seed)
        for step, _, _ in tqdm(run, method, steps, disable=None):
            if step in looks:
                look(method, step, policy)
    os.makedirs(os.path.dirname(cfg.out) or '.', exist_ok=True)
    write_json(cfg.out + '.json', runs)
    figure(runs, cfg.out + '.png')
    print(f'written: {cfg.out}.json, .png')


if __name__ == '__main__':
    config.run(main)
