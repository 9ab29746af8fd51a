"""PPO, the reinforcement learning that DPO replaces: sample, score, estimate advantages, take clipped steps, hold the KL.

    python repro/ppo.py config/reviews.py --reward=config/reviews.py --target_kl=6          # the true reward: "PPO-GT"
    python repro/ppo.py config/reviews.py --reward=out/reviews/reward_model --target_kl=6   # a learned one
    python sample.py config/reviews.py --after=out/reviews/ppo                              # what came of it

As Ziegler et al. (arXiv 1909.08593) and Ouyang et al. (arXiv 2203.02155) do: a token is an action, the reward is -coef
log(pi / ref) at every token plus the whitened score at the last; generalized advantage estimation (arXiv 1506.02438);
clipped policy and value losses (arXiv 1707.06347); a controller moves coef to hold the sequence KL at a target. The value
function is a network of its own that starts from the same weights. Of a score only differences matter, so it is whitened
with the mean and deviation of all scores seen. One process.
"""
import json
import math
import os
import signal
import sys
from dataclasses import asdict, dataclass

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import config                                                                               # noqa: E402
from config import In, Literal, UserError                                                   # noqa: E402
from model import CheckpointError, open_run, packed_mask, save_checkpoint, token_logps      # noqa: E402
from offline import rows_of                                                                 # noqa: E402
from prepare_prefs import Sampled, epoch_order                                              # noqa: E402
from reward_model import RewardModel, all_rewards                                           # noqa: E402
from rollout import Task                                                                    # noqa: E402


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


def action_logps(policy, batch):
    """Log-prob of every response token: (S,)."""
    states = policy(batch.tokens, batch.positions, packed_mask(batch.group, batch.part, batch.cuts), batch.predictor)
    return token_logps(states, policy.wte.weight, batch.target)[:len(batch.response)]


def state_values(value_model, batch):
    """The value of the state before every response token: (S,). value_model: a RewardModel, its head read as a value."""
    states = value_model(batch.tokens, batch.positions, packed_mask(batch.group, batch.part, batch.cuts), batch.predictor)
    return value_model.reward(states)[:len(batch.response), 0]


@torch.no_grad()
def side_by_side(outputs, model, groups, mask):
    """outputs(model, batch) (S,) of all rollouts as (n, L), zeros outside the mask."""
    whole = torch.zeros(mask.shape, device=mask.device)
    for batch in rows_of(groups, np.arange(len(mask)), mask.device):
        piece = torch.zeros(len(batch.ids), mask.shape[1], device=mask.device)
        piece[mask[batch.ids]] = outputs(model, batch)
        whole[batch.ids] = piece
    return whole


def ppo(policy, reference, task, score, prompts, cfg):
    """Train `policy` in place. A generator: after each step it yields (step, {what to log}).

    task: a rollout.Task; score: (prompts, responses) -> (n,) array; prompts: lists of ids; cfg: a Config.
    """
    device = policy.wte.weight.device
    value_model = RewardModel.from_policy(reference).to(device).requires_grad_(True)
    models = policy, value_model
    optimizer = torch.optim.AdamW([{'params': [*model.parameters()]} for model in models], betas=(0.9, 0.95), weight_decay=0.0)
    shuffled = np.random.default_rng(cfg.seed)
    coef, seen, total, squares = cfg.kl_coef, 0, 0.0, 0.0
    for step in range(1, cfg.steps + 1):
        for group, learning_rate in zip(optimizer.param_groups, (cfg.learning_rate, cfg.value_learning_rate)):
            group['lr'] = learning_rate * min(1, step / cfg.warmup_steps)
        # rollouts, each prompt once an epoch, and what the policy that made them thinks of each token
        epochs = (divmod(k, len(prompts)) for k in range((step - 1) * cfg.batch_size, step * cfg.batch_size))
        some = [prompts[epoch_order(len(prompts), cfg.seed, epoch)[i]] for epoch, i in epochs]
        policy.eval()
        responses = task.draw(policy, some, cfg.seed * 1_000 + step, max_new_tokens=cfg.max_new_tokens)
        groups, n = Sampled(list(zip(some, responses))), len(some)
        scores = torch.as_tensor(score(some, responses), dtype=torch.float32, device=device)        # (n,)
        lengths = torch.tensor([len(r) for r in responses], device=device)
        mask = torch.arange(int(lengths.max()), device=device) < lengths[:, None]                   # (n, L)
        old_logps, old_values = side_by_side(action_logps, policy, groups, mask), side_by_side(state_values, value_model, groups, mask)
        log_ratio = old_logps - side_by_side(action_logps, reference, groups, mask)
        kl = log_ratio.sum(1).mean().item()                                                         # of sequences, nats
        # rewards: the score, whitened, at the last token; the KL penalty at all
        seen, total, squares = seen + n, total + scores.sum().item(), squares + scores.square().sum().item()
        mean = total / seen
        rewards = -coef * log_ratio
        rewards[torch.arange(n, device=device), lengths - 1] += (scores - mean) / math.sqrt(max(squares / seen - mean * mean, 1e-8))
        advantages, returns = advantages_and_returns(rewards, old_values, mask, cfg.gae_lambda)
        advantages = (advantages - advantages[mask].mean()) / (advantages[mask].std() + 1e-8) * mask
        # a few passes of clipped steps
        policy.train()
        losses, norms = [], []
        for _ in range(cfg.ppo_epochs):
            for ids in np.array_split(shuffled.permutation(n), cfg.minibatches):
                tokens = mask[ids].sum()
                for batch in rows_of(groups, ids, device):
                    old_logp, advantage, old_value, return_ = (x[batch.ids][mask[batch.ids]] for x in
                                                               (old_logps, advantages, old_values, returns))     # (S,)
                    policy_losses, value_losses = clipped_losses(action_logps(policy, batch), old_logp, advantage,
                                                                 state_values(value_model, batch), old_value, return_, cfg.clip)
                    ((policy_losses.sum() + value_losses.sum()) / tokens).backward()
                    losses.append(policy_losses.sum().item() / tokens.item())
                norms.append([torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip).item() for model in models])
                if not np.isfinite(norms[-1]).all():
                    raise UserError(f'step {step}: the gradient is not finite: lower the learning rate')
                optimizer.step()
                optimizer.zero_grad()
        explained = 1 - (returns - old_values)[mask].var() / (returns[mask].var() + 1e-8)
        yield step, {'score': scores.mean().item(), 'kl': kl, 'kl_coef': coef, 'loss': sum(losses) / len(norms),
                     'grad_norm': np.mean(norms, 0)[0], 'value/explained_variance': explained.item(),
                     'tokens': lengths.float().mean().item(), 'samples': seen}
        # Ziegler et al.'s proportional controller, its error clipped at 20%
        coef *= 1 + cfg.kl_gain * min(max(kl / cfg.target_kl - 1, -0.2), 0.2)


def read_score(task, path, device):
    """What --reward names as a function (prompts, responses), lists of ids, -> (n,): a Python file, or a reward model."""
    if not path:
        raise UserError('reward is not set: a Python file with reward(prompts, responses), or a folder of repro/reward_model.py')
    if path.endswith('.py'):
        return lambda prompts, responses: task.score(prompts, responses)['true_reward']
    try:
        model, record = RewardModel.from_checkpoint(path)
    except CheckpointError as error:
        raise UserError(error) from None
    task.train.check_model(model.config, record.get('vocabulary'), path)
    model.to(device).eval()
    return lambda prompts, responses: all_rewards(model, Sampled(list(zip(prompts, responses))))[:, 0]


# -----------------------------------------------------------------------------
# the knobs

@dataclass
class Config:
    name: str = 'reviews'                           # of the experiment: prompts of data/<name>, writes out/<name>/ppo
    init_from: str = ''                             # policy and reference: '' = out/<name>/sft, or as in dpo.py
    reward: str = ''                                # a Python file with reward(prompts, responses), or a folder of reward_model.py
    target_kl: In[float, 'x > 0'] = 6.0             # of sequences, nats: where the controller holds the policy
    steps: In[int, 'x >= 1'] = 24                   # rounds of sampling and learning
    batch_size: In[int, 'x >= 2'] = 256             # samples a round, each of another prompt
    ppo_epochs: In[int, 'x >= 1'] = 1               # passes over a round's samples; 2 cost more and gave no more
    minibatches: In[int, 'x >= 1'] = 8              # optimizer steps a pass
    learning_rate: In[float, 'x > 0'] = 6e-4        # searched on the reviews: repro/results/frontier-search.md
    value_learning_rate: In[float, 'x > 0'] = 2e-3  # of the value model
    warmup_steps: In[int, 'x >= 1'] = 4             # rounds, linear, then constant
    kl_coef: In[float, 'x >= 0'] = 1.0              # of the penalty at the start, in deviations of the score a nat; in a short
                                                    # run it matters more than the target: too low, and the KL is ill spent
    kl_gain: In[float, 'x >= 0'] = 0.5              # of the controller: times at most 1 -+ 0.2 kl_gain a round; 0 = fixed coef
    clip: In[float, 'x > 0'] = 0.2                  # of the probability ratio and of the value's move
    gae_lambda: In[float, '0 <= x <= 1'] = 0.95     # bias (0) against variance (1) of the advantages; there is no discount
    grad_clip: In[float, 'x > 0'] = 1.0             # largest gradient norm
    max_new_tokens: In[int, 'x >= 1'] = 64          # of a sample
    eval_interval: In[int, 'x >= 1'] = 10           # rounds between evaluations on held-out prompts
    eval_prompts: In[int, 'x >= 2'] = 250           # of val
    seed: In[int, '0 <= x < 2**32'] = 1337
    device: Literal['auto', 'cpu', 'cuda'] = 'auto' # auto = cuda where there is one, else cpu


def main(argv=None):
    cfg = config.load(Config, 'ppo', argv)
    if cfg.minibatches > cfg.batch_size:
        raise UserError(f'minibatches={cfg.minibatches} are more than batch_size={cfg.batch_size}')
    device = torch.device(cfg.device if cfg.device != 'auto' else 'cuda' if torch.cuda.is_available() else 'cpu')
    task = Task(cfg.name, cfg.reward if cfg.reward.endswith('.py') else '')
    score = read_score(task, cfg.reward, device)
    policy, reference = (task.load(cfg.init_from).to(device).requires_grad_(trained) for trained in (True, False))
    prompts, held_out = task.prompts('train', len(task.train)), task.prompts('val', cfg.eval_prompts)
    print(f'ppo on {device}, {len(prompts):,} prompts, {cfg.steps * cfg.batch_size:,} samples:\n{config.show(cfg)}')
    out_dir = os.path.join('out', cfg.name, 'ppo')

    def evaluate(step):
        policy.eval()
        responses = task.draw(policy, held_out, cfg.seed, max_new_tokens=cfg.max_new_tokens)
        found = {'eval/score': float(np.mean(score(held_out, responses))),
                 'eval/kl': float(task.ratios(policy, reference, held_out, responses).mean())}
        tqdm.write(f'eval {step:>6,}/{cfg.steps:,} | score {found["eval/score"]:+.3f} | KL {found["eval/kl"]:6.3f}')
        log.write(json.dumps({'step': step, **found}) + '\n')

    with open_run(out_dir, 0) as log:
        evaluate(0)
        for step, found in tqdm(ppo(policy, reference, task, score, prompts, cfg), total=cfg.steps, desc='ppo', disable=None):
            log.write(json.dumps({'step': step, **found}) + '\n')
            if step == 1 or step % 5 == 0 or step == cfg.steps:
                tqdm.write(f'step {step:>6,}/{cfg.steps:,} | score {found["score"]:+.3f} | KL {found["kl"]:6.3f} | coef {found["kl_coef"]:.4f} '
                           f'| loss {found["loss"]:+.4f} | grad {found["grad_norm"]:.2f} | value explains '
                           f'{found["value/explained_variance"]:+.2f} | {found["tokens"]:.0f} tokens | {found["samples"]:,} samples')
            if step % cfg.eval_interval == 0 or step == cfg.steps:
                evaluate(step)
    save_checkpoint(out_dir, cfg.steps, policy, dict(stage='ppo', config=asdict(cfg), vocabulary=task.train.vocabulary))
    print(f'done: {out_dir}')


if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    main()
