"""What only a GPU shows: FlexAttention's backward pass, compiled once for all lengths, and steps that never wait."""
import copy
import warnings

import numpy as np
import pytest
import torch

import dpo
from conftest import random_groups, read_log, small_gpt, write_data
from model import Stretches, packed_mask
from prepare_prefs import Groups, pack

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
RUN = ['--name=tiny', '--batch_size=8', '--learning_rate=1e-4', '--warmup_steps=0', '--eval_interval=0', '--save_interval=0']


@pytest.mark.parametrize('compiled', [False, True])
def test_flex_attention_and_dense_attention_give_the_same_gradients(tmp_path, compiled):
    groups = Groups(write_data(tmp_path / 'd', {'train': random_groups(40, 2, np.random.default_rng(3))}), 'train')
    model = small_gpt().cuda()
    twin = copy.deepcopy(model)
    net = torch.compile(model, dynamic=True) if compiled else model
    batch = pack(groups, list(range(40)), 128)
    on_gpu = batch.on(torch.device('cuda', 0))
    dense = Stretches([m.cuda() for m in packed_mask(batch.group, batch.part, batch.cuts).masks])
    a = dpo.response_logps(net, model.wte.weight, on_gpu, packed_mask(on_gpu.group, on_gpu.part))
    b = dpo.response_logps(twin, twin.wte.weight, on_gpu, dense)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
    (a * torch.arange(80.0, device='cuda').view(40, 2)).sum().backward()
    (b * torch.arange(80.0, device='cuda').view(40, 2)).sum().backward()
    for (name, p), q in zip(model.named_parameters(), twin.named_parameters()):
        difference = (p.grad - q[1].grad).norm() / q[1].grad.norm().clamp(min=1e-6)
        assert difference < 1e-3, (name, difference)


def test_nothing_is_compiled_anew_after_the_first_steps(experiment):
    from torch._dynamo.utils import counters
    dpo.main([*RUN, '--max_steps=6', '--compile=True'])
    graphs = counters['stats']['unique_graphs']
    dpo.main([*RUN, '--max_steps=6', '--compile=True'])
    once = counters['stats']['unique_graphs'] - graphs
    dpo.main([*RUN, '--max_steps=24', '--compile=True'])
    assert counters['stats']['unique_graphs'] - graphs - once <= once, 'a longer run compiles no more than a short one'
    assert read_log('out/tiny/dpo')[0]['eval/loss'] == pytest.approx(np.log(2), abs=1e-3)


def test_a_step_waits_for_the_gpu_only_where_it_logs(experiment):
    waits = []
    torch.cuda.set_sync_debug_mode('warn')
    try:
        for steps in (4, 4, 24):            # the first compiles
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter('always')
                dpo.main([*RUN, f'--max_steps={steps}', f'--log_interval={steps}', '--compile=False'])
            waits.append(sum('synchroniz' in str(w.message) for w in caught))
    finally:
        torch.cuda.set_sync_debug_mode('default')
    assert waits[1] == waits[2], f'20 steps more, {waits[2] - waits[1]} waits more'
