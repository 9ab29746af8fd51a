"""The numbers: packed rows, the head, the order, each against an independent computation."""
import copy
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import dpo
from conftest import random_groups, small_gpt, write_data
from model import block_mask, token_logps, visible
from nanodpo.data import Groups, batches, pack, plan_rows, step_groups
from nanodpo.run import Worker, compile_blocks

NEEDS_COMPILER = pytest.mark.skipif(shutil.which('g++') is None, reason='torch.compile needs a C++ compiler on a CPU')


def one_at_a_time(model, groups):
    """(N, K) log-probs, each prompt + response alone through the model, float64 log-softmax: shares no packing code."""
    sums = []
    for prompt, response in [(group[0], response) for group in groups for response in group[1:]]:
        ids = torch.tensor([[int(t) for t in (*prompt, *response)]])
        T = ids.shape[1]
        hidden = model(ids, torch.arange(T)[None], torch.ones(1, 1, T, T, dtype=torch.bool).tril())
        logps = F.linear(hidden, model.wte.weight).double().log_softmax(-1)[0, :-1]
        sums.append(logps.gather(1, ids[0, 1:, None])[len(prompt) - 1:].sum())
    return torch.stack(sums).view(len(groups), -1)


def packed(model, groups, row_tokens):
    """(N, K) log-probs through the product's path, every row planned."""
    logps = [None] * len(groups)
    for batch in batches(groups, np.arange(len(groups)), Worker('cpu'), row_tokens):
        for group, of_group in zip(batch.ids, dpo.response_logps(model, batch)):
            logps[group] = of_group
    return torch.stack(logps)


@pytest.fixture
def split(tmp_path):
    """A function: groups of ids -> the same as Groups, written and read."""
    def made(data, max_length=64):
        return Groups(write_data(tmp_path / 'd', {'train': data}, max_length), 'train')
    return made


@pytest.mark.parametrize('row_tokens', [96, 1000])
@pytest.mark.parametrize('K', [1, 2, 3])
def test_packed_logps_and_gradients_equal_one_sequence_at_a_time(split, K, row_tokens):
    data = random_groups(12, K, np.random.default_rng(K))
    data.append([[7] * 11, *([3] * 7,) * K])                    # responses alike, no end token
    lengths = [sum(map(len, group)) for group in data]
    T = max(*lengths, row_tokens if row_tokens < 256 else 0)
    data[2][1] += [5] * (T - lengths[2])        # group 2 fills a row exactly
    groups = split(data, max_length=256)
    assert groups.lengths[2] == T
    row_tokens = max(T, row_tokens)             # the first fills a row exactly, the second takes several stretches
    assert row_tokens == T or len(pack(groups, plan_rows(np.arange(13), groups.lengths, 1, row_tokens)[0][0]).cuts)
    model = small_gpt(block_size=256)
    twin = copy.deepcopy(model)
    a, b = packed(model, groups, row_tokens), one_at_a_time(twin, data)
    assert b.min() < -50, 'sums over many tokens, far from 0'
    torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    weights = torch.randn(b.shape, dtype=torch.float64)
    (a * weights).sum().backward()
    (b * weights).sum().backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters()):
        scale = q.grad.abs().max().item()       # float32 sums of terms of this size
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=2e-6 * scale, msg=lambda m: f'{name}: {m}')


@pytest.mark.parametrize('bf16', [False, True])
@pytest.mark.parametrize('compiled', [False, pytest.param(True, marks=NEEDS_COMPILER)])
def test_the_fast_path_rounds_no_worse_than_one_sequence_at_a_time(split, compiled, bf16):
    """Both round at every operation, in another order: the bound is twice the plain path's own error, and 2^-22, since
    the plain path here sums in float64 and the fast one in float32."""
    data = random_groups(40, 2, np.random.default_rng(4))
    model = small_gpt(spread=0.5)
    net, exact_model = copy.deepcopy(model), copy.deepcopy(model).double()
    if compiled:
        compile_blocks(net)
    weights = torch.randn(40, 2, dtype=torch.float64)

    def logps_and_gradient(of, score, *arguments):
        with torch.autocast('cpu', torch.bfloat16, enabled=bf16 and of is not exact_model):
            logps = score(of, *arguments)
        gradient = torch.autograd.grad((logps * weights).sum(), list(of.parameters()))
        return logps.detach().double(), torch.cat([g.flatten().double() for g in gradient])
    exact = logps_and_gradient(exact_model, one_at_a_time, data)
    fast, plain = ([((a - b).norm() / b.norm()).item() for a, b in zip(result, exact)] for result in (
        logps_and_gradient(net, packed, split(data), 400), logps_and_gradient(model, one_at_a_time, data)))
    low, high = (1e-5, 0.05) if bf16 else (1e-9, 1e-5)
    assert all(low < e < high for e in plain), 'the precision is what it says'
    assert all(a < 2 * b + 2**-22 for a, b in zip(fast, plain)), (fast, plain)


def test_a_rank_without_groups_runs_an_empty_row_and_adds_nothing(split):
    groups, model = split(random_groups(3, 2, np.random.default_rng(5))), small_gpt()
    shares = plan_rows(np.arange(3), groups.lengths, 8, 1000)
    assert [len(share) for share in shares] == [1] * 8 and sum(share == [[]] for share in shares) == 5
    logps = dpo.response_logps(model, pack(groups, [], 128))
    assert logps.shape == (0, 2)
    logps.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters()), 'DDP waits for every gradient'


def test_mask_is_the_rule_for_every_pair_of_tokens(split):
    batch = pack(split([[[1, 2], [3, 4], [5]], [[6], [7], [8, 9]]]), [0, 1], 12)
    mask = batch.mask.masks[0][0, 0]
    owner = [(0, 0)] * 2 + [(0, 1)] * 2 + [(0, 2)] + [(1, 0), (1, 1)] + [(1, 2)] * 2
    for q in range(9):
        for k in range(12):
            sees = k <= q and k < 9 and owner[q][0] == owner[k][0] and owner[k][1] in (0, owner[q][1])
            assert mask[q, k].item() == sees, (q, k)
    assert mask[9:].any(1).all(), 'padding sees something, or its softmax is NaN'
    assert batch.positions[0, :9].tolist() == [0, 1, 2, 3, 2, 0, 1, 1, 2]


@NEEDS_COMPILER
def test_compiled_flex_attention_equals_the_dense_path_and_is_compiled_once_for_all_lengths(split, monkeypatch):
    """The path that CUDA takes, forward, on the CPU: block mask and blocks compiled, rows padded to blocks of 128."""
    from torch._dynamo.utils import counters
    from torch._inductor.codegen.common import KernelArgs
    # for the CPU torch 2.13 replaces the name ks2 in the C++ that it writes, within ks27, too
    monkeypatch.setattr(KernelArgs, 'size', lambda self, name: self._lookup('ks0', self.sizevars, name))
    groups, model = split(random_groups(60, 2, np.random.default_rng(3))), small_gpt()
    net = copy.deepcopy(model)
    compile_blocks(net)
    graphs = []
    for n in (12, 20, 3, 60, 30):
        batch = pack(groups, list(range(n)), 128)
        with torch.no_grad():
            dense = dpo.response_logps(model, batch)
            T = batch.tokens.numel()
            batch.mask = block_mask(visible(batch.group, batch.part), 1, None, T, T, device='cpu')
            fast = dpo.response_logps(net, batch)
        torch.testing.assert_close(fast, dense, rtol=1e-5, atol=1e-4)
        graphs.append(counters['stats']['unique_graphs'])
    assert graphs[0] > 0 and len(set(graphs)) == 1, f'compiled anew: {graphs}'


def test_head_values_and_gradients_equal_autograd_of_log_softmax():
    torch.manual_seed(0)
    states, weight = torch.randn(50, 8, dtype=torch.float64), torch.randn(31, 8, dtype=torch.float64)
    target, g = torch.randint(0, 31, (50,)), torch.randn(50)
    grads = []
    for score in (lambda s, w: token_logps(s, w, target, tile=7),
                  lambda s, w: (s @ w.t()).log_softmax(-1).gather(1, target[:, None])[:, 0]):
        s, w = states.clone().requires_grad_(), weight.clone().requires_grad_()
        logps = score(s, w)
        (logps * g).sum().backward()
        grads.append((logps.double().detach(), s.grad, w.grad))
    for a, b in zip(*grads):        # float32 softmax inside: 2^-23 of values up to about 20
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_the_head_never_holds_logits_of_the_whole_vocabulary():
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            out = op(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.numel = max(self.numel, out.numel())
            return out
    S, C, tile = 300, 4, 64
    for V in (1000, 20_000):
        states, weight = torch.randn(S, C, requires_grad=True), torch.randn(V, C, requires_grad=True)
        with Largest() as largest:
            token_logps(states, weight, torch.randint(0, V, (S,)), tile).sum().backward()
        assert largest.numel <= max(S * tile, V * C) < S * V


def test_dpo_gradient_reaches_the_weights_as_the_paper_writes_it(split):
    """grad of the loss = -beta sigma(-beta h) (grad log pi(w) - grad log pi(l)), through the whole packed path."""
    model, ref, beta = small_gpt(), small_gpt(seed=1), 0.2
    batch = pack(split(random_groups(1, 2, np.random.default_rng(8))), [0])
    logps, ref_logps = dpo.response_logps(model, batch), dpo.response_logps(ref, batch).detach()
    params = list(model.parameters())
    by_hand = [torch.autograd.grad(logps[0, k], params, retain_graph=True) for k in (0, 1)]
    h = (logps[0, 0] - logps[0, 1] - ref_logps[0, 0] + ref_logps[0, 1]).item()
    weight = -beta / (1 + math.exp(beta * h))
    loss = dpo.dpo_loss(*logps.t(), *ref_logps.t(), beta)[0].sum()
    for g, w, l in zip(torch.autograd.grad(loss, params), *by_hand):
        torch.testing.assert_close(g, weight * (w - l), rtol=1e-4, atol=1e-6 * abs(weight))


@pytest.mark.parametrize('world', [1, 2, 3, 8])
def test_every_group_once_an_epoch_whatever_the_world(world):
    n, batch_size, lengths = 103, 16, np.random.default_rng(0).integers(3, 60, 103)
    for epoch in (0, 1):
        seen = []
        for within in range(-(-n // batch_size)):
            ids = step_groups(n, batch_size, epoch * -(-n // batch_size) + within, seed=5)
            shares = plan_rows(ids, lengths[ids], world, 128)
            assert len({len(share) for share in shares}) == 1, 'ranks run different numbers of micro-steps'
            seen += [i for share in shares for row in share for i in row]
            assert all(lengths[row].sum() <= 128 for share in shares for row in share)
        assert sorted(seen) == list(range(n))
    assert step_groups(n, 16, 0, 5).tolist() != step_groups(n, 16, 7, 5).tolist(), 'epochs are shuffled anew'


def test_rows_waste_little_on_lengths_like_real_pairs():
    lengths = np.clip(np.random.default_rng(1).lognormal(5.5, 0.6, 256).astype(int), 20, 900)
    for world in (1, 8):
        shares = plan_rows(np.arange(256), lengths, world, 8192)
        assert sorted(i for share in shares for row in share for i in row) == list(range(256))
        rows = np.array([[lengths[row].sum() for row in share] for share in shares])           # (world, micro-steps)
        assert rows.sum() / (-(-rows // 128) * 128).sum() > 0.97
        assert (rows.max(0) / rows.mean(0)).max() < 1.05, 'a rank waits for another'


def test_many_equal_lengths_that_fit_badly_are_planned_in_a_few_tries():
    """Two of three eighths fit in a row. A third more rows are needed than tokens alone would ask for."""
    (rows,) = plan_rows(np.arange(20_000), np.full(20_000, 768), 1, 2048)
    assert sorted(sum(rows, [])) == list(range(20_000)) and 10_000 <= len(rows) <= 10_100 and max(map(len, rows)) == 2


@pytest.mark.parametrize('bf16', [False, True])
def test_step_0_is_ln_2_with_rewards_0_and_accuracy_one_half(split, bf16):
    policy = small_gpt(dropout=0.0).train()
    reference = copy.deepcopy(policy).eval().requires_grad_(False)
    batch = pack(split(random_groups(16, 2, np.random.default_rng(2))), list(range(16)))
    with torch.autocast('cpu', torch.bfloat16, enabled=bf16):
        logps = dpo.response_logps(policy, batch)
        with torch.no_grad():
            ref = dpo.response_logps(reference, batch)
    losses, chosen, rejected = dpo.dpo_loss(*logps.t(), *ref.t(), 0.1)
    stats = dpo.means(dpo.batch_stats(losses, torch.stack([chosen, rejected], 1), logps))
    assert stats['loss'] == pytest.approx(math.log(2), abs=1e-6)
    assert [stats[f'rewards/{key}'] for key in ('chosen', 'rejected', 'margins', 'accuracies')] == [0, 0, 0, 0.5]


def test_activation_checkpointing_changes_no_gradient(split):
    groups, grads = split(random_groups(4, 2, np.random.default_rng(2))), []
    for on in (False, True):
        model = small_gpt(activation_checkpointing=on).train()
        packed(model, groups, 256).sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))
