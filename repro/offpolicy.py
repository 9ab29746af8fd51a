"""Implicit against explicit reward off the distribution: DPO's, and a reward model's of the same size.

    python repro/offpolicy.py       # after the quickstart's first two stages; writes repro/results/offpolicy.*

arXiv 2409.03650: DPO's implicit reward beta log(policy / reference) fits its pairs as well as a reward model does. On
pairs from elsewhere it is right less often, by 3 points in the mean. Here the pairs are reviews of a part
of the grammar of config/reviews.py: two thirds of each list's pairs of opposites, and two thirds of the sentences.
Their labels are noisy, Bradley-Terry on the true reward. Both judges start from the reviews' SFT model, which has
read the whole grammar, and see the same pairs once. Then they judge new pairs, whose true rewards differ by CLOSEST
to FARTHEST nats: from the same part, and from SHIFTS, where something is new. Texts of more sentences have two
remarks more, in no more tokens than the longest training pair. Longer texts are the same without that limit. A judge
is right where it gives the response of higher true reward more; a tie is half right.

A seed stands for the part, the pairs, their labels and order. Each judge has the learning rate of RATES that is
right most often on pairs of the same part, on a seed of its own.
"""
import importlib.util
import itertools
import math
import os
import random
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, 'repro')]
import config                                                               # noqa: E402
import delta                                                                # noqa: E402
from config import In, need, reviews                                        # noqa: E402
from family import table                                                    # noqa: E402
from nanodpo.data import Sampled                                            # noqa: E402
from nanodpo.rows import Row                                                # noqa: E402
from pathologies_figure import BLUE, EXACT, ORANGE, cell, interval, of      # noqa: E402
from prepare_prefs import encode                                            # noqa: E402
from reward_model import RewardModel, all_rewards, bradley_terry_losses, correct, response_rewards     # noqa: E402
from rollout import Task                                                    # noqa: E402
from sweep import write_report                                                # noqa: E402

CLOSEST, FARTHEST = 1.0, 3.0        # nats of true reward between the two responses that are judged
DRAWS = 4                           # responses of DPO's policy to a prompt, of which one pair is taken
RATES = 6e-4, 1.2e-3, 2.4e-3
JUDGES = {'implicit': "DPO's implicit reward", 'explicit': 'the reward model'}
SAME = 'as trained'
SAMPLES = "DPO's own samples"
SHIFTS = 'some new words', 'only new words', 'new sentences', 'more sentences', 'longer texts', SAMPLES


# ----------------------------------------------------------------------------------------------------
# parts of the grammar

def grammar(opposites, forms):
    """A copy of config/reviews.py that draws with these words and sentences alone; a word's weight stays."""
    spec = importlib.util.spec_from_file_location('part_of_reviews', reviews.__file__)
    part = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(part)
    part.OPPOSITES, part.FORMS, part.weights = opposites, forms, reviews.weights
    return part


def divide(items, rng):
    """A list in two, at random: the third that is held out, and the others."""
    items = rng.sample(items, len(items))
    third = max(1, len(items) // 3)
    return items[:third], items[third:]


def parts(seed):
    """{what is judged: the grammar that writes it}, all but SAMPLES."""
    rng = random.Random(f'parts {seed}')
    words = {kind: divide(pairs.split(), rng) for kind, pairs in reviews.OPPOSITES.items()}
    sentences = {kind: divide(forms, rng) for kind, forms in reviews.FORMS.items()}
    new_words, old_words = ({kind: ' '.join(sides[i]) for kind, sides in words.items()} for i in range(2))
    new, old = ({kind: sides[i] for kind, sides in sentences.items()} for i in range(2))
    two_remarks = [' '.join(pair) for pair in itertools.product(old['remark'], repeat=2)]
    longer = [f'{remarks} {verdict}' for remarks, verdict in itertools.product(two_remarks, old['verdict'])]
    more = grammar(old_words, {**old, 'verdict': longer})
    return {SAME: grammar(old_words, old), 'some new words': grammar(reviews.OPPOSITES, old),
            'only new words': grammar(new_words, old), 'new sentences': grammar(old_words, new),
            'more sentences': more, 'longer texts': more}


def prompt_of(part, rng, judged):
    """The first words of a review. Prompts of pairs to judge are never those of training pairs."""
    while True:
        prompt = ' '.join(part.review(rng)[0].split(' ')[:rng.randint(*part.PROMPT_WORDS)])
        if reviews.held_out(prompt) == judged:
            return prompt


def training_rows(part, n, rng):
    """n pairs with noisy labels: Rows of the prompt, the chosen and the rejected response."""
    rows = []
    while len(rows) < n:
        prompt = prompt_of(part, rng, judged=False)
        pair = [part.review(rng, prompt + ' ')[0][len(prompt):] for _ in range(2)]
        first, second = reviews.reward([prompt] * 2, pair)
        if rng.random() > 1 / (1 + math.exp(second - first)):
            pair.reverse()
        if pair[0] != pair[1]:
            rows.append(Row(prompt, pair))
    return rows


def gap_fits(gap):
    return CLOSEST <= abs(gap) <= FARTHEST


def judged_groups(task, part, n, rng, longest):
    """n pairs of at most `longest` tokens: [prompt, response of higher true reward, the other one], ids."""
    groups = []
    while len(groups) < n:
        prompt = prompt_of(part, rng, judged=True)
        pair = [part.review(rng, prompt + ' ')[0][len(prompt):] for _ in range(2)]
        first, second = reviews.reward([prompt] * 2, pair)
        if gap_fits(first - second):
            group, = encoded(task, [Row(prompt, pair if first > second else pair[::-1])])
            groups += [group] * (tokens_of(group) <= longest)
    return groups


def drawn_groups(task, policy, part, n, rng, seed):
    """At most n pairs of the policy's own responses: [prompt, higher true reward, lower], ids."""
    rows = [Row(prompt_of(part, rng, judged=True), []) for _ in range(n)]
    prompts = [list(prompt) for prompt, in encoded(task, rows)]
    repeated = [prompt for prompt in prompts for _ in range(DRAWS)]
    responses = task.draw(policy, repeated, seed)
    rewards = task.score(repeated, responses)['true_reward'].reshape(-1, DRAWS)
    groups = []
    for i, row in enumerate(rewards):
        fitting = [(w, l) for w, l in itertools.permutations(range(DRAWS), 2)
                   if row[w] > row[l] and gap_fits(row[w] - row[l])]
        if fitting:
            groups.append([prompts[i], *(responses[i * DRAWS + k] for k in rng.choice(fitting))])
    need(groups, f'no two responses of the policy to a prompt differ by {CLOSEST:g} to {FARTHEST:g} nats, in {n} '
         'prompts: raise --judged')
    return groups


def encoded(task, rows):
    """Rows as groups of ids."""
    return [encode(row, task.tokenizer, task.val.meta['template']) for row in rows]


def tokens_of(group):
    """Of the prompt with the longest response."""
    prompt, *responses = group
    return len(prompt) + max(map(len, responses))


# ----------------------------------------------------------------------------------------------------
# the two judges

def learn(judge, task, reference, groups, cfg, rate, seed):
    """The SFT model, as a policy or with a reward head, after one pass over groups [prompt, chosen, rejected]."""
    knobs = SimpleNamespace(batch_size=cfg.batch_size, beta=cfg.beta, learning_rate=rate)
    if judge == 'implicit':
        return delta.learn(task, reference, groups, 'DPO', knobs, seed)
    model = RewardModel.from_policy(task.load('')).train()

    def losses_of(batch):
        return bradley_terry_losses(response_rewards(model, batch))

    return delta.one_pass(model, losses_of, groups, knobs, seed)


def margins_of(judge, model, task, reference, groups, beta):
    """The reward of the first response less that of the second, of groups (N): (N,)."""
    if judge == 'explicit':
        rewards = all_rewards(model, Sampled(groups))
    else:
        rewards = beta * (task.logps(model, groups) - task.logps(reference, groups))
    return rewards[:, 0] - rewards[:, 1]


def accuracy(*judging):
    """The share of pairs of which margins_of says what the true reward says; a tie counts one half."""
    return float(correct(margins_of(*judging)).mean())


# ----------------------------------------------------------------------------------------------------
# the runs

def best_rates(task, reference, cfg):
    """{judge: the rate with the most right on pairs as trained}, on seed 0, which no other run has; and the rows."""
    part = parts(0)[SAME]
    rng = random.Random('pairs 0')
    train = encoded(task, training_rows(part, cfg.pairs, rng))
    judged = judged_groups(task, part, cfg.judged, rng, math.inf)
    rows = []
    for judge, rate in tqdm(list(itertools.product(JUDGES, RATES)), 'rates', disable=None):
        model = learn(judge, task, reference, train, cfg, rate, 0)
        rows.append(dict(judge=judge, rate=rate, accuracy=accuracy(judge, model, task, reference, judged, cfg.beta)))
    return {judge: max(of(rows, judge=judge), key=lambda row: row['accuracy'])['rate'] for judge in JUDGES}, rows


def one_seed(task, reference, cfg, rates, seed):
    """Both judges' accuracy on SAME and SHIFTS: a row each."""
    writers = parts(seed)
    rng = random.Random(f'pairs {seed}')
    train = encoded(task, training_rows(writers[SAME], cfg.pairs, rng))
    longest = dict.fromkeys(writers, math.inf) | {'more sentences': max(map(tokens_of, train))}
    judged = {name: judged_groups(task, part, cfg.judged, rng, longest[name]) for name, part in writers.items()}
    models = {judge: learn(judge, task, reference, train, cfg, rates[judge], seed) for judge in JUDGES}
    judged[SAMPLES] = drawn_groups(task, models['implicit'], writers[SAME], cfg.judged, rng, seed)
    return [dict(seed=seed, judged=name, judge=judge, pairs=len(groups),
                 accuracy=accuracy(judge, models[judge], task, reference, groups, cfg.beta))
            for name, groups in judged.items() for judge in JUDGES]


# ----------------------------------------------------------------------------------------------------
# the report

def accuracies(rows, name):
    """Of the pairs `name`, one value a seed: {judge: accuracies, 'difference': implicit less explicit}, in points."""
    sides = {judge: [100 * row['accuracy'] for row in of(rows, judged=name, judge=judge)] for judge in JUDGES}
    return {**sides, 'difference': [a - b for a, b in zip(*sides.values())]}


def text(rows, searched):
    """The report as Markdown."""
    lines = [['pairs judged, accuracy in %', *JUDGES.values(), 'difference, points']]
    for name in (SAME, *SHIFTS):
        found = accuracies(rows, name)
        lines.append([name, *(cell(found[judge], '.1f') for judge in JUDGES), cell(found['difference'], '+.1f')])
    rates = [['accuracy in % by learning rate', *(f'{rate:g}' for rate in RATES)]]
    rates += [[label, *(f'{100 * row["accuracy"]:.1f}' for row in of(searched, judge=judge))]
              for judge, label in JUDGES.items()]
    return table(lines) + '\n' + table(rates)


def figure(rows, path):
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    plot, axes = plt.subplots(1, 2, figsize=(11, 4.6), constrained_layout=True, sharey=True)
    names = (SAME, *SHIFTS)
    for judge, colour, shift in zip(JUDGES, (BLUE, ORANGE), (0.12, -0.12)):
        middle, half = zip(*(interval(accuracies(rows, name)[judge]) for name in names))
        places = [len(names) - 1 - i + shift for i in range(len(names))]
        axes[0].errorbar(middle, places, xerr=half, fmt='o', capsize=3, color=colour, label=JUDGES[judge])
    axes[0].axvline(50, color=EXACT, lw=1, ls='--', label='chance')
    axes[0].set(title='Accuracy against the true reward', xlabel='% of pairs', ylim=(-0.6, len(names) - 0.4),
                yticks=range(len(names)), yticklabels=names[::-1])
    middle, half = zip(*(interval(accuracies(rows, name)['difference']) for name in names))
    axes[1].errorbar(middle, range(len(names))[::-1], xerr=half, fmt='o', capsize=3, color=BLUE)
    axes[1].axvline(0, color=EXACT, lw=1, ls='--')
    axes[1].set(title='Implicit less explicit, the same pairs', xlabel='points of accuracy')
    for ax in axes:
        ax.grid(alpha=0.2)
        ax.spines[['top', 'right']].set_visible(False)
    plot.legend(loc='outside lower center', ncols=3, fontsize=9, frameon=False)
    plot.savefig(path, dpi=110)


# ----------------------------------------------------------------------------------------------------
# the knobs

@dataclass
class Config:
    name: str = 'reviews'                           # of the experiment: data/<name>, out/<name>/sft
    seeds: In[int, '2 <= x <= 10'] = 5
    pairs: In[int, 'x >= 1'] = 6000                 # to learn from
    judged: In[int, 'x >= 1'] = 500                 # of each kind; prompts of the policy's samples
    beta: In[float, 'x > 0'] = 0.5                  # of DPO, as config/reviews.py
    batch_size: In[int, 'x >= 1'] = 16              # pairs a step
    out: str = os.path.join(ROOT, 'repro', 'results', 'offpolicy')


def main(argv=None):
    cfg = config.load(Config, 'offpolicy', argv)
    need(cfg.pairs > 5 * cfg.batch_size, f'pairs={cfg.pairs} are too few: more than 5 steps of batch_size are needed')
    torch.set_num_threads(1)
    task = Task(cfg.name, reviews.__file__)
    reference = task.load('').requires_grad_(False)
    rates, searched = best_rates(task, reference, cfg)
    rows = []
    for seed in tqdm(range(1, cfg.seeds + 1), 'seeds', disable=None):
        found = one_seed(task, reference, cfg, rates, seed)
        for name in (SAME, *SHIFTS):
            implicit, explicit = (100 * row['accuracy'] for row in of(found, judged=name))
            tqdm.write(f'seed {seed} | {name:17} | implicit {implicit:.1f}% | explicit {explicit:.1f}%')
        rows += found
    said = text(rows, searched)
    print(said)
    write_report(cfg.out, said, dict(rates=searched, runs=rows))
    figure(rows, cfg.out + '.png')
    print(f'written: {cfg.out}.md, .json, .png')


if __name__ == '__main__':
    config.run(main)
