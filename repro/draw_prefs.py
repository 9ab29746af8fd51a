"""Preference pairs drawn from a policy and ranked by a reward: a data set for dpo.py, as prepare_prefs.py makes one.

    python repro/draw_prefs.py --name=online --source=data/reviews --policy=out/reviews/sft --reward=config/reviews.py
    torchrun --standalone --nproc_per_node=8 repro/draw_prefs.py ...        # the same bytes, sooner
    python dpo.py config/reviews.py --name=online --init_from=out/reviews/sft     # with the knobs of a small model

`source` is a prepared set. The policy continues each distinct prompt of its train and of its val, num_samples times.
The reward ranks the responses. The best and the worst become a pair, or all that differ. Equal responses have equal
rewards, and equal rewards make no pair. A set is made again only if a knob, the policy, the reward or the source
changed.
"""
import dataclasses
import itertools
import os
import shutil
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch.distributed as dist
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import config                                                                               # noqa: E402
from config import In, Literal, need                                                        # noqa: E402
from nanodpo import checkpoint, look                                                        # noqa: E402
from nanodpo.data import (Groups, Sampled, distinct_prompts, read_meta, replacing, sha256_file, sha256_json,
                          why_remake, write_meta, write_split)                                 # noqa: E402
from nanodpo.rollout import draw_responses, read_reward                                     # noqa: E402
from nanodpo.run import Run                                                                 # noqa: E402
from nanodpo.rows import Row                                                                # noqa: E402
from nanodpo.text import load_tokenizer, text_of                                            # noqa: E402
from reward_model import RewardModel, all_rewards                                           # noqa: E402


# ----------------------------------------------------------------------------------------------------
# the knobs

@dataclass
class Config:
    name: str = ''                  # the new set: writes data/<name>/
    source: str = ''                # a prepared set, data/<name>, for its prompts, tokenizer and lengths
    policy: str = ''                # whose responses: a checkpoint, as dpo.py's init_from
    reward: str = ''                # a .py file with reward(prompts, responses), or a folder of repro/reward_model.py
    num_samples: In[int, 'x >= 2'] = 4              # responses to each prompt
    num_prompts: In[int, 'x >= 0'] = 0              # distinct ones of train, and as many of val at most; 0 = all
    pairing: Literal['best_worst', 'all'] = 'best_worst'    # one pair a prompt, or all pairs of different rewards
    temperature: In[float, 'x > 0'] = 1.0           # of the draws
    max_new_tokens: In[int, 'x >= 1'] = 128         # of a response; fewer where max_length leaves less
    batch_size: In[int, 'x >= 1'] = 64              # responses drawn at once; another one gives other draws
    seed: In[int, 'x >= 0'] = 1337                  # of the draws, and of which prompts
    device: Literal['auto', 'cpu', 'cuda', 'mps'] = 'auto'  # auto = cuda where there is one, else cpu
    join_timeout: In[int, 'x >= 1'] = 120           # seconds to wait at the start for the other processes

    dtype = 'auto'                  # no knobs, but Run asks for them
    compile = False


def check(cfg):
    """UserErrors, before anything is read."""
    need(cfg.source and cfg.policy and cfg.reward, 'source, policy and reward must be set: a prepared set, a '
         'checkpoint, and a .py file with reward(prompts, responses) or a folder of repro/reward_model.py')
    reward_file(cfg.reward)
    need(os.path.isdir(cfg.source), f'source={cfg.source!r} must be a prepared set (data/<name>), whose prompts the '
         'policy continues')
    need(os.path.realpath(cfg.source) != os.path.realpath(os.path.join('data', cfg.name)),
         f'{cfg.source} would be replaced by what is drawn from its prompts: set another --name')


# ----------------------------------------------------------------------------------------------------
# responses, rewards, pairs

def draw(cfg, run, policy, sources):
    """Responses to the prompts of each split, on all ranks: {split: [[prompt, response_1, ..., response_K], ...]}.

    A batch of prompts is always the same one and has its own seed, so it does not matter which rank draws it.
    """
    size = max(1, cfg.batch_size // cfg.num_samples)
    batches = []
    for split, groups in sources.items():
        prompts = distinct_prompts(groups, cfg.num_prompts, cfg.seed)
        batches += [(split, prompts[i:i + size]) for i in range(0, len(prompts), size)]
    policy.to(run.device).eval()
    meta = sources['train'].meta
    mine = {}
    for number in tqdm(range(run.rank, len(batches), run.world), 'drawing', unit=' batches',
                       disable=None if run.rank == 0 else True):
        _, prompts = batches[number]
        repeated = [prompt for prompt in prompts for _ in range(cfg.num_samples)]
        with run.autocast:
            responses = draw_responses(policy, repeated, meta, meta['max_length'], len(repeated), cfg.seed,
                                       cfg.max_new_tokens, number=number, temperature=cfg.temperature)
        mine[number] = [[prompt, *responses[i * cfg.num_samples:(i + 1) * cfg.num_samples]]
                        for i, prompt in enumerate(prompts)]
    of_all_ranks = {number: groups for part in run.gather(mine) for number, groups in part.items()}
    drawn = {split: [] for split in sources}
    for number, (split, _) in enumerate(batches):
        drawn[split] += of_all_ranks[number]
    return drawn


def reward_file(path):
    """The file behind the knob `reward`: itself, or the last checkpoint of a folder."""
    paths = [path] if os.path.isfile(path) and path.endswith('.py') else checkpoint.find(path)
    need(paths, f'reward {path} is neither a .py file nor a folder with a checkpoint of repro/reward_model.py')
    return paths[-1]


def open_reward(path, source, device):
    """What the knob `reward` names, as a function: N groups [prompt, response_1, ..., response_K] -> (N, K) float64.

    source: a split of the set, which a reward model must fit.
    """
    if not path.endswith('.py'):
        model = RewardModel.from_checkpoint(path, source).to(device)
        return lambda groups: all_rewards(model, Sampled(groups))
    score = read_reward(path)
    tokenizer = load_tokenizer(source.folder, source.meta['tokenizer'])

    def rewards_of(groups):
        texts = [(text_of(tokenizer, prompt), text_of(tokenizer, ids)) for prompt, *responses in groups
                 for ids in responses]
        prompts, responses = zip(*texts)
        return np.array(score(prompts, responses)['true_reward'], np.float64).reshape(len(groups), -1)
    rewards_of([[piece.tolist() for piece in source[0][:2]]])       # before the draws: it may load, or lack, a model
    return rewards_of


def pair_up(groups, rewards, pairing):
    """The pairs of groups [prompt, response_1, ..., response_K], and how many were tied. rewards: (N, K).

    -> [[prompt, chosen, rejected], ...], their rewards (n, 2), int. best_worst takes the first of the best and the
    last of the worst.
    """
    pairs, kept, tied = [], [], 0
    for (prompt, *responses), r in zip(groups, rewards):
        candidates = itertools.combinations(range(len(r)), 2)
        if pairing == 'best_worst':
            candidates = [(r.argmax(), len(r) - 1 - r[::-1].argmin())]
        for i, j in candidates:
            better, worse = (i, j) if r[i] > r[j] else (j, i)
            if r[better] == r[worse]:
                tied += 1
            else:
                pairs.append([prompt, responses[better], responses[worse]])
                kept.append((r[better], r[worse]))
    return pairs, np.array(kept), tied


def make_pairs(cfg, drawn, rewards_of):
    """-> {split: pairs}, {split: {'tied': n}}, {split: mean rewards of samples, chosen, rejected}"""
    splits, dropped, means = {}, {}, {}
    for split, groups in drawn.items():
        rewards = rewards_of(groups)
        need(np.isfinite(rewards).all(), f'{cfg.reward}: a reward is not finite')
        for r, (_, *responses) in zip(rewards, groups):     # copies are equal, whatever a noisy judge says
            r[:] = r[[responses.index(ids) for ids in responses]]
        splits[split], kept, tied = pair_up(groups, rewards, cfg.pairing)
        need(splits[split], f'no pairs for {split}: all {cfg.num_samples} samples of each of its {len(groups):,} '
             'prompts have equal rewards')
        chosen, rejected = kept.mean(0).tolist()
        dropped[split] = {'tied': tied}
        means[split] = {'samples': float(rewards.mean()), 'chosen': chosen, 'rejected': rejected}
    return splits, dropped, means


def write_set(folder, source, splits, dropped=None, **facts):
    """Write groups of ids as the set `folder`, with the tokenizer, template and lengths of the set `source`.

    splits: {'train': [[prompt, response_1, ..., response_K], ...], 'val': ...}, lists of ids; a prompt and a response
    have at most max_length. dropped: {split: {reason: n}}. facts: more for meta.json, which is returned. The set that
    stood in `folder` is replaced at the end, or not at all.
    """
    given = read_meta(source)
    tokenizer = load_tokenizer(source, given['tokenizer'])
    same = ('format', 'template', 'max_length', 'max_prompt_length', 'tokenizer', 'vocab_size', 'eot_token')
    meta = dict(facts, source=source, splits={}, **{key: given[key] for key in same if key in given})
    seen = {}
    with replacing(folder) as aside:
        if meta['tokenizer'].endswith('.json'):
            shutil.copyfile(os.path.join(source, meta['tokenizer']), os.path.join(aside, meta['tokenizer']))
        for split, groups in splits.items():
            longest = max(len(prompt) + max(map(len, responses)) for prompt, *responses in groups)
            need(longest <= meta['max_length'], f'{split} has {longest} tokens, max_length is {meta["max_length"]}')
            lost = (dropped or {}).get(split, {})
            info = dict(read=len(groups) + sum(lost.values()), kept=len(groups), dropped=lost)
            info |= look.lost(groups, groups)
            ends = [ids[-1] for _, *responses in groups for ids in responses]
            info['truncated']['responses'] = len(ends) - ends.count(meta['eot_token'])
            meta['splits'][split] = info | write_split(aside, split, groups, meta['vocab_size'])
            texts = [[text_of(tokenizer, piece) for piece in group] for group in groups]
            seen[split] = [Row(prompt, responses) for prompt, *responses in texts], groups, groups
        meta['notes'] = look.suspicions(meta, seen)
        write_meta(aside, meta)
    return read_meta(folder)


# ----------------------------------------------------------------------------------------------------
# the run

def main(argv=None):
    started = time.time()
    cfg = config.load(Config, 'draw_prefs', argv)
    check(cfg)
    run = Run(cfg, 'draw_prefs')
    run.say(config.show(cfg))
    sources = {split: Groups(cfg.source, split) for split in ('train', 'val')}
    policy = checkpoint.load_model(cfg.policy, sources['train'], dropout=0.0)
    knobs = {key: value for key, value in dataclasses.asdict(cfg).items() if key not in ('name', 'join_timeout')}
    weights = checkpoint.fingerprint(policy)
    facts = {'content of source': sha256_json(sources['train'].meta), 'policy': weights,
             'reward': sha256_file(reward_file(cfg.reward))}
    run.check_alike(knobs | facts)
    inputs = sha256_json(knobs | facts)
    folder = os.path.join('data', cfg.name)
    why = run.gather(run.on_first(lambda: why_remake(folder, inputs), f'cannot read {folder}'))[0]
    if not why:
        for note in read_meta(folder)['notes']:
            run.say(f'note: {note}')
        run.say(f'{folder} is reused: same knobs, same source')
    else:
        run.say(f'making {folder}: {why}')
        rewards_of = run.on_first(lambda: open_reward(cfg.reward, sources['train'], run.device), cfg.reward)
        drawn = draw(cfg, run, policy, sources)
    if run.world > 1:
        dist.destroy_process_group()
    if not why or run.rank > 0:         # rank 0 goes on alone: the others need not wait until all is scored
        return
    splits, dropped, means = make_pairs(cfg, drawn, rewards_of)
    del knobs['source']
    meta = run.alone().on_first(lambda: write_set(folder, cfg.source, splits, dropped, inputs=inputs, rewards=means,
                                                  policy_fingerprint=weights, **knobs), f'cannot write {folder}')
    print(look.table(meta))
    for split, values in means.items():
        print(f'mean reward, {split}: ' + ', '.join(f'{value:+.3f} {what}' for what, value in values.items()))
    for note in meta['notes']:
        print(f'note: {note}')
    print(f'{folder} is ready, {time.time() - started:.1f} s')


if __name__ == '__main__':
    config.run(main)
