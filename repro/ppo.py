"""PPO, the reinforcement learning that DPO replaces: sample, score, take clipped steps, hold the KL.

    python repro/ppo.py config/reviews.py --reward=config/reviews.py --target_kl=6      # the true reward: "PPO-GT"
    python repro/ppo.py config/reviews.py --reward=out/reviews/reward_model --target_kl=6   # a learned one
    python sample.py config/reviews.py --after=out/reviews/ppo                              # what came of it

It follows Ziegler et al. (arXiv 1909.08593) and Ouyang et al. (arXiv 2203.02155). A token is an action. Its reward is
-coef log(pi / ref), and the last token also gets the score. Advantages are generalized ones (arXiv 1506.02438). The
policy's loss is clipped (arXiv 1707.06347), and so is the value's, as in OpenAI's code. A controller moves coef to hold
the sequence KL at a target. The value function is a network of its own that starts from the same weights. Of a score only differences
matter, so it is whitened with the mean and deviation of all scores seen. One process.
"""
import json
import math
import os
import sys
from dataclasses import asdict, dataclass

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import config                                                                       # noqa: E402
from config import In, Literal, need                                                # noqa: E402
from nanodpo import checkpoint                                                      # noqa: E402
from nanodpo.data import Sampled, epoch_order                                       # noqa: E402
from offline import rows_of                                                         # noqa: E402
from reward_model import RewardModel, all_rewards                                   # noqa: E402
from rollout import Task                                                            # noqa: E402
from sft import target_logps                                                        # noqa: E402


def advantages_and_returns(rewards, values, mask, lam):
    """Generalized advantage estimation without discount: A_t = sum_k lam^k delta_{t+k}, delta_t = r_t + V_{t+1} - V_t.

    rewards, values: (n, L), of the tokens where mask (n, L) is true, a prefix of each row; V after the last token is 0.
    -> advantages, returns = advantages + values; (n, L), zeros outside the mask.
    """
    advantages, ahead = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
    next_values = torch.cat([values[:, 1:] * mask[:, 1:], torch.zeros_like(values[:, :1])], 1)
    deltas = (rewards + next_values - values) * mask
    for t in reversed(range(rewards.shape[1])):
        ahead = deltas[:, t] + lam * ahead
        advantages[:, t] = ahead
    return advantages, (advantages + values) * mask


def clipped_losses(logps, old_logps, advantages, values, old_values, returns, clip):
    """Clipped policy loss (arXiv 1707.06347, eq. 7) and clipped squared error of the values: all (S,), of tokens."""
    ratio = (logps - old_logps).exp()
    policy_losses = -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    value_losses = 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)
    return policy_losses, value_losses


def state_values(value_model, batch):
    """The value of the state before every response token: (S,). value_model: a RewardModel's head, read as a value."""
    states = value_model(batch.tokens, batch.positions, batch.mask, batch.predictor)
    return value_model.reward(states)[:len(batch.response), 0]


@torch.no_grad()
def side_by_side(outputs, model, groups, mask):
    """outputs(model, batch) (S,) of all rollouts as (n, L), zeros outside the mask."""
    table = torch.zeros(mask.shape, device=mask.device)
    for batch in rows_of(groups, np.arange(len(mask)), mask.device):
        rows = torch.zeros(batch.G, mask.shape[1], device=mask.device)
        rows[mask[batch.ids]] = outputs(model, batch)
        table[batch.ids] = rows
    return table


def clipped_step(policy, value_model, optimizer, groups, ids, mask, tables, cfg):
    """One optimizer step on the rollouts `ids`. -> the policy's loss, the gradient norms of policy and value model.

    tables: old log-probs, advantages, old values and returns of all rollouts, (n, L) each.
    """
    tokens = mask[ids].sum()
    loss = 0.0
    for batch in rows_of(groups, ids, mask.device):
        old_logps, advantages, old_values, returns = (table[batch.ids][mask[batch.ids]] for table in tables)     # (S,)
        policy_losses, value_losses = clipped_losses(target_logps(policy, batch), old_logps, advantages,
                                                     state_values(value_model, batch), old_values, returns, cfg.clip)
        ((policy_losses.sum() + value_losses.sum()) / tokens).backward()
        loss += policy_losses.sum().item() / tokens.item()
    norms = [torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip).item()
             for model in (policy, value_model)]
    if np.isfinite(norms).all():
        optimizer.step()
    optimizer.zero_grad()
    return loss, *norms


class Whitening:
    """Mean and deviation of all scores seen."""
    def __init__(self):
        self.seen, self.total, self.squares = 0, 0.0, 0.0

    def __call__(self, scores):
        """The scores of one more round, (n,), whitened."""
        self.seen += len(scores)
        self.total += scores.sum().item()
        self.squares += scores.square().sum().item()
        mean = self.total / self.seen
        return (scores - mean) / math.sqrt(max(self.squares / self.seen - mean * mean, 1e-8))


def ppo(policy, reference, task, score, prompts, cfg):
    """Train `policy` in place. A generator: after each step it yields (step, {what to log}).

    task: a rollout.Task; score: (prompts, responses) -> (n,) array; prompts: lists of ids; cfg: a Config.
    """
    device = policy.wte.weight.device
    value_model = RewardModel.from_policy(reference).to(device).requires_grad_(True)
    optimizer = torch.optim.AdamW([{'params': [*model.parameters()]} for model in (policy, value_model)],
                                  betas=(0.9, 0.95), weight_decay=0.0)
    shuffled = np.random.default_rng(cfg.seed)
    whiten = Whitening()
    coef = cfg.kl_coef
    for step in range(1, cfg.steps + 1):
        for group, learning_rate in zip(optimizer.param_groups, (cfg.learning_rate, cfg.value_learning_rate)):
            group['lr'] = learning_rate * min(1, step / cfg.warmup_steps)
        # rollouts, each prompt once an epoch, and what the policy that made them thinks of each token
        places = (divmod(k, len(prompts)) for k in range((step - 1) * cfg.batch_size, step * cfg.batch_size))
        asked = [prompts[epoch_order(len(prompts), cfg.seed, epoch)[i]] for epoch, i in places]
        n = len(asked)
        policy.eval()
        responses = task.draw(policy, asked, cfg.seed * 1_000 + step, max_new_tokens=cfg.max_new_tokens)
        groups = Sampled(list(zip(asked, responses)))
        scores = torch.as_tensor(score(asked, responses), dtype=torch.float32, device=device)       # (n,)
        lengths = torch.tensor([len(ids) for ids in responses], device=device)
        mask = torch.arange(int(lengths.max()), device=device) < lengths[:, None]                   # (n, L)
        old_logps = side_by_side(target_logps, policy, groups, mask)
        old_values = side_by_side(state_values, value_model, groups, mask)
        log_ratio = old_logps - side_by_side(target_logps, reference, groups, mask)
        kl = log_ratio.sum(1).mean().item()                                                     # of sequences, nats
        # rewards: the KL penalty at all tokens, the score at the last
        rewards = -coef * log_ratio
        rewards[torch.arange(n, device=device), lengths - 1] += whiten(scores)
        advantages, returns = advantages_and_returns(rewards, old_values, mask, cfg.gae_lambda)
        advantages = (advantages - advantages[mask].mean()) / (advantages[mask].std() + 1e-8) * mask
        # a few passes of clipped steps
        policy.train()
        steps = []
        for _ in range(cfg.ppo_epochs):
            for ids in np.array_split(shuffled.permutation(n), cfg.minibatches):
                tables = old_logps, advantages, old_values, returns
                steps.append(clipped_step(policy, value_model, optimizer, groups, ids, mask, tables, cfg))
                need(np.isfinite(steps[-1]).all(), f'step {step}: the gradient is not finite: lower the learning rate')
        loss, grad_norm, _ = np.mean(steps, 0)
        explained = 1 - (returns - old_values)[mask].var() / (returns[mask].var() + 1e-8)
        yield step, {'score': scores.mean().item(), 'kl': kl, 'kl_coef': coef, 'loss': loss, 'grad_norm': grad_norm,
                     'value/explained_variance': explained.item(),
                     'tokens': lengths.float().mean().item(), 'samples': whiten.seen}
        # Ziegler et al.'s proportional controller, its error clipped at 20%
        coef *= 1 + cfg.kl_gain * min(max(kl / cfg.target_kl - 1, -0.2), 0.2)


def read_score(task, path):
    """What --reward names, a Python file or a reward model: (prompts, responses), lists of ids -> (n,)."""
    need(path, 'reward is not set: a Python file with reward(prompts, responses), or a folder of repro/reward_model.py')
    if path.endswith('.py'):
        return lambda prompts, responses: task.score(prompts, responses)['true_reward']
    model = RewardModel.from_checkpoint(path, task.train).to(task.device)
    return lambda prompts, responses: all_rewards(model, Sampled(list(zip(prompts, responses))))[:, 0]


# ----------------------------------------------------------------------------------------------------
# the knobs

@dataclass
class Config:
    name: str = 'reviews'                           # of the experiment: prompts of data/<name>, writes out/<name>/ppo
    init_from: str = ''                             # policy and reference: '' = out/<name>/sft, or as in dpo.py
    reward: str = ''                                # a Python file with reward(prompts, responses), or a folder of
                                                    # reward_model.py
    target_kl: In[float, 'x > 0'] = 6.0             # of sequences, nats: where the controller holds the policy
    steps: In[int, 'x >= 1'] = 24                   # rounds of sampling and learning
    batch_size: In[int, 'x >= 2'] = 256             # samples a round, each of another prompt
    ppo_epochs: In[int, 'x >= 1'] = 1               # passes over a round's samples; 2 cost more and gave no more
    minibatches: In[int, 'x >= 1'] = 8              # optimizer steps a pass
    learning_rate: In[float, 'x > 0'] = 6e-4        # searched on the reviews: repro/results/frontier-search.md
    value_learning_rate: In[float, 'x > 0'] = 2e-3  # of the value model
    warmup_steps: In[int, 'x >= 1'] = 4             # rounds, linear, then constant
    kl_coef: In[float, 'x >= 0'] = 1.0              # of the penalty at the start, in deviations of the score a nat; a
                                                    # short run depends on it more than on the target: too low, and
                                                    # the KL is ill spent
    kl_gain: In[float, 'x >= 0'] = 0.5              # of the controller: times 1 -+ 0.2 kl_gain a round at most; 0 = off
    clip: In[float, 'x > 0'] = 0.2                  # of the probability ratio and of the value's move
    gae_lambda: In[float, '0 <= x <= 1'] = 0.95     # bias (0) against variance (1) of the advantages; no discount
    grad_clip: In[float, 'x > 0'] = 1.0             # largest gradient norm
    max_new_tokens: In[int, 'x >= 1'] = 64          # of a sample
    eval_interval: In[int, 'x >= 1'] = 10           # rounds between evaluations on held-out prompts
    eval_prompts: In[int, 'x >= 2'] = 250           # of val
    seed: In[int, '0 <= x < 2**32'] = 1337
    device: Literal['auto', 'cpu', 'cuda'] = 'auto'     # auto = cuda where there is one, else cpu


def main(argv=None):
    cfg = config.load(Config, 'ppo', argv)
    need(cfg.minibatches <= cfg.batch_size, f'minibatches={cfg.minibatches} are more than batch_size={cfg.batch_size}')
    task = Task(cfg.name, cfg.reward if cfg.reward.endswith('.py') else '', cfg.device)
    score = read_score(task, cfg.reward)
    policy = task.load(cfg.init_from)
    reference = task.load(cfg.init_from).requires_grad_(False)
    prompts = task.prompts('train', 0)
    held_out = task.prompts('val', cfg.eval_prompts)
    print(f'ppo on {task.device}, {len(prompts):,} prompts, {cfg.steps * cfg.batch_size:,} samples:\n'
          f'{config.show(cfg)}')
    out_dir = os.path.join('out', cfg.name, 'ppo')

    def evaluate(step):
        policy.eval()
        responses = task.draw(policy, held_out, cfg.seed, max_new_tokens=cfg.max_new_tokens)
        mean_score = float(np.mean(score(held_out, responses)))
        kl = float(task.ratios(policy, reference, held_out, responses).mean())
        tqdm.write(f'eval {step:>6,}/{cfg.steps:,} | score {mean_score:+.3f} | KL {kl:6.3f}')
        log.write(json.dumps({'step': step, 'eval/score': mean_score, 'eval/kl': kl}) + '\n')

    with checkpoint.open_run(out_dir, 0) as log:
        evaluate(0)
        for step, record in tqdm(ppo(policy, reference, task, score, prompts, cfg), 'ppo', cfg.steps, disable=None):
            log.write(json.dumps({'step': step, **record}) + '\n')
            if step == 1 or step % 5 == 0 or step == cfg.steps:
                tqdm.write(f'step {step:>6,}/{cfg.steps:,} | score {record["score"]:+.3f} | KL {record["kl"]:6.3f} | '
                           f'coef {record["kl_coef"]:.4f} | loss {record["loss"]:+.4f} | grad '
                           f'{record["grad_norm"]:.2f} | value explains {record["value/explained_variance"]:+.2f} | '
                           f'{record["tokens"]:.0f} tokens | {record["samples"]:,} samples')
            if step % cfg.eval_interval == 0 or step == cfg.steps:
                evaluate(step)
    record = dict(stage='ppo', config=asdict(cfg), vocabulary=task.train.vocabulary)
    checkpoint.save(out_dir, cfg.steps, policy, record)
    print(f'done: {out_dir}')


if __name__ == '__main__':
    config.run(main)
