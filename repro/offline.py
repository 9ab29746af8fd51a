"""Learning from responses that were drawn once and compared: the paper's baselines on pairs, and one loop for them all.

    python repro/offline.py config/reviews.py --method=preferred_ft                 # writes out/reviews/preferred_ft
    python repro/offline.py config/reviews.py --method=unlikelihood --alpha=0.1
    python sample.py config/reviews.py --after=out/reviews/unlikelihood             # and looks at what came of it

  preferred_ft    -log pi(w): supervised fine-tuning on the chosen responses
  unlikelihood    -log pi(w) + alpha log pi(l)
  unweighted      -beta [log pi(w) - log pi(l)]: the gradient of DPO without its weight sigmoid(-beta h)
(arXiv 2305.18290, section 6 and appendix C.3). None of them knows a reference; the only leash is to stop in time.

Here a group may hold K responses with any pairs among them, so that frontier.py trains on all 6 pairs of 4 responses at
the cost of 4; the loop serves DPO there and the reward model too. One process; dpo.py is the fast path.
"""
import json
import os
import sys
from dataclasses import asdict, dataclass

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import config                                                                               # noqa: E402
from config import In, Literal, UserError, need                                             # noqa: E402
from dpo import dpo_loss, response_logps                                                    # noqa: E402
from nanodpo import checkpoint                                                              # noqa: E402
from nanodpo.data import batches, row_limit, step_groups                                    # noqa: E402
from nanodpo.run import Worker                                                              # noqa: E402
from rollout import Task                                                                    # noqa: E402


# Losses of all ordered pairs of a group: logps (G, K) -> (G, K, K), [g, i, j] for "i is preferred to j".

def preferred_ft_losses(logps):
    return -logps[:, :, None].expand(-1, -1, logps.shape[1])


def unlikelihood_losses(logps, alpha):
    return -logps[:, :, None] + alpha * logps[:, None, :]


def unweighted_losses(logps, beta):
    return -beta * (logps[:, :, None] - logps[:, None, :])


def dpo_losses(logps, ref_logps, beta):
    return dpo_loss(logps[:, :, None], logps[:, None, :], ref_logps[:, :, None], ref_logps[:, None, :], beta)[0]


def rows_of(groups, ids, device):
    """The packed batches of the groups `ids`."""
    return batches(groups, ids, Worker(device.type), row_limit(0, device, groups))


def even_steps(steps, count):
    """`count` steps, fewer where there are fewer, evenly spaced up to the last: a set of int."""
    return set(np.linspace(0, steps, min(steps, count) + 1).round().astype(int)[1:].tolist())


def train(model, losses_of, groups, better, steps, batch_size, learning_rate, warmup_steps, seed):
    """AdamW on the mean loss over the pairs of each batch of groups; linear warm-up, then linearly to 0.

    losses_of: a packed batch -> losses (G, K, K) as above. better: (N, K, K) bool, the pairs there are. A generator:
    after each step it yields (step, mean loss, gradient norm), and the model is the caller's to look at.
    """
    device = next(model.parameters()).device
    better = torch.as_tensor(better, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(1, steps + 1):
        done = (step - warmup_steps) / (steps + 1 - warmup_steps)
        optimizer.param_groups[0]['lr'] = learning_rate * (step / warmup_steps if step <= warmup_steps else 1 - done)
        ids = step_groups(len(groups.lengths), batch_size, step - 1, seed)
        pairs, total = better[ids].sum(), 0.0
        if not pairs:           # all ties
            continue
        for batch in rows_of(groups, ids, device):
            loss = (losses_of(batch) * better[batch.ids]).sum() / pairs
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        if not torch.isfinite(norm):
            raise UserError(f'step {step}: the gradient is not finite: lower the learning rate')
        optimizer.step()
        optimizer.zero_grad()
        yield step, total, norm.item()


def first_is_better(groups):
    """The pairs of a data set whose groups are (chosen, rejected): (N, 2, 2)."""
    need(groups.K == 2, f'{groups.folder} holds groups of {groups.K} responses; pairs are needed')
    return np.tile(np.array([[False, True], [False, False]]), (len(groups), 1, 1))


# -----------------------------------------------------------------------------
# the knobs

@dataclass
class Config:
    name: str = 'reviews'                           # of the experiment: reads data/<name>, writes out/<name>/<method>
    method: Literal['preferred_ft', 'unlikelihood', 'unweighted'] = 'preferred_ft'
    init_from: str = ''                             # '' = out/<name>/sft, or as in dpo.py
    alpha: In[float, 'x >= 0'] = 0.1                # of unlikelihood; the paper tries 0.05 to 1
    beta: In[float, 'x > 0'] = 0.5                  # of unweighted, where it only scales the gradient
    batch_size: In[int, 'x >= 1'] = 32              # pairs a step
    epochs: In[int, 'x >= 1'] = 1                   # passes over the pairs
    max_steps: In[int, 'x >= 0'] = 0                # stop after so many steps; 0 = by epochs
    learning_rate: In[float, 'x > 0'] = 1e-4        # unlikelihood runs away at those of dpo.py
    warmup_steps: In[int, 'x >= 1'] = 20            # linear, then linearly to 0
    eval_interval: In[int, 'x >= 1'] = 50           # steps between evaluations on all of val
    seed: In[int, '0 <= x < 2**32'] = 1337          # of the order of pairs
    device: Literal['auto', 'cpu', 'cuda'] = 'auto' # auto = cuda where there is one, else cpu


@torch.no_grad()
def mean_logps(policy, groups):
    """Mean log-probability of chosen and rejected responses: (2,), nats."""
    rows = rows_of(groups, np.arange(len(groups)), policy.wte.weight.device)
    return sum(response_logps(policy, batch).double().sum(0) for batch in rows).cpu().numpy() / len(groups)


def main(argv=None):
    cfg = config.load(Config, 'offline', argv)
    task = Task(cfg.name, device=cfg.device)
    better = first_is_better(task.train)
    policy = task.load(cfg.init_from).train()
    losses_of = {'preferred_ft': lambda batch: preferred_ft_losses(response_logps(policy, batch)),
                 'unlikelihood': lambda batch: unlikelihood_losses(response_logps(policy, batch), cfg.alpha),
                 'unweighted': lambda batch: unweighted_losses(response_logps(policy, batch), cfg.beta)}[cfg.method]
    steps = cfg.max_steps or cfg.epochs * -(-len(task.train) // cfg.batch_size)
    print(f'{cfg.method} on {task.device}, {steps:,} steps:\n{config.show(cfg)}')
    out_dir = os.path.join('out', cfg.name, cfg.method)
    with checkpoint.open_run(out_dir, 0) as log:
        run = train(policy, losses_of, task.train, better, steps, cfg.batch_size, cfg.learning_rate, cfg.warmup_steps,
                    cfg.seed)
        for step, loss, norm in tqdm(run, cfg.method, steps, disable=None):
            if step % cfg.eval_interval == 0 or step == steps:
                chosen, rejected = mean_logps(policy, task.val)
                tqdm.write(f'step {step:>6,}/{steps:,} | loss {loss:9.3f} | grad {norm:8.2f} | '
                           f'eval/logps chosen {chosen:8.2f} rejected {rejected:8.2f}')
                log.write(json.dumps({'step': step, 'loss': loss, 'grad_norm': norm, 'eval/logps/chosen': chosen,
                                      'eval/logps/rejected': rejected}) + '\n')
    record = dict(stage=cfg.method, config=asdict(cfg), vocabulary=task.train.vocabulary)
    checkpoint.save(out_dir, steps, policy, record)
    print(f'done: {out_dir}')


if __name__ == '__main__':
    config.run(main)
