"""What only a GPU shows: FlexAttention's backward pass, compiled once for all lengths, and steps that never wait."""
import copy
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

import dpo
import model as model_file
from conftest import VOCAB, random_groups, read_log, small_gpt, write_data
from model import GPT, GPTConfig, Stretches, packed_mask
from nanodpo import run
from nanodpo.data import Groups, Sampled, pack

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
DPO = ['--name=tiny', '--batch_size=8', '--learning_rate=1e-4', '--warmup_steps=0', '--eval_interval=0',
       '--save_interval=0']


@NEEDS_GPU
@pytest.mark.parametrize('compiled', [False, True])
@pytest.mark.parametrize('n_head', [2, 4])              # heads of 16, and of 8, which are padded to 16
def test_flex_attention_and_dense_attention_give_the_same_gradients(tmp_path, n_head, compiled):
    groups = Groups(write_data(tmp_path / 'd', {'train': random_groups(40, 2, np.random.default_rng(3))}), 'train')
    model = GPT(GPTConfig(64, VOCAB, 2, n_head, 32))
    model.load_state_dict(small_gpt().state_dict())
    model.cuda()
    twin = copy.deepcopy(model)
    if compiled:
        run.compile_blocks(model)
    batch = pack(groups, list(range(40)), 128)
    flex, dense = batch.to(torch.device('cuda', 0)), batch.to(torch.device('cuda', 0))
    dense.mask = Stretches([m.cuda() for m in packed_mask(batch.group, batch.part, batch.cuts).masks])
    a, b = dpo.response_logps(model, flex), dpo.response_logps(twin, dense)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
    weights = torch.arange(80.0, device='cuda').view(40, 2)
    (a * weights).sum().backward()
    (b * weights).sum().backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters()):
        difference = (p.grad - q.grad).norm() / q.grad.norm().clamp(min=1e-6)
        assert difference < 1e-3, (name, difference)


@NEEDS_GPU
def test_nothing_is_compiled_anew_after_the_first_steps(experiment):
    torch.compiler.reset()
    before = counters['stats']['unique_graphs']
    dpo.main([*DPO, '--max_steps=3'])                   # --compile is on where the device is a GPU
    graphs = counters['stats']['unique_graphs']
    dpo.main([*DPO, '--max_steps=24'])
    assert counters['stats']['unique_graphs'] == graphs > before
    assert read_log('out/tiny/dpo')[0]['eval/loss'] == pytest.approx(np.log(2), abs=1e-3)


@NEEDS_GPU
def test_rows_of_gpt2_xl_are_compiled_once_on_both_sides_of_every_threshold(n_layer=2):
    """Inductor asks of its fused reductions 1600 T >= 5 * 2^20, T >= 3200 and T >= 4096, of the scored tokens, too.
    What is compiled for one length must serve all, in training, in evaluation and for the reference."""
    torch.compiler.reset()
    with torch.device('cuda'):
        policy = GPT(GPTConfig(1024, 50257, n_layer, 25, 1600))
    worker = run.Worker('cuda', 'bfloat16')
    reference = copy.deepcopy(policy).eval().requires_grad_(False)
    for module in reference.modules():
        if isinstance(module, torch.nn.Linear):
            module.bfloat16()
    for model in (policy, reference):
        run.compile_blocks(model)
    rng, graphs = np.random.default_rng(0), []
    for n in (26, 8, 24, 64, 30, 36, 38, 16):           # of 128 tokens each, 112 of them scored
        groups = Sampled([[rng.integers(0, 50257, size).tolist() for size in (16, 56, 56)] for _ in range(n)])
        batch = pack(groups, list(range(n)), 128).to(worker.device)
        assert (batch.tokens.numel(), len(batch.target)) == (128 * n, -(-112 * n // 128) * 128)
        with worker.autocast:
            logps = dpo.response_logps(policy.train(), batch)
            logps.sum().backward()
            with torch.no_grad():
                dpo.response_logps(reference, batch)
                dpo.response_logps(policy.eval(), batch)
        graphs.append(counters['stats']['unique_graphs'])
    assert len(set(graphs)) == 1, f'compiled anew: {graphs}'


@NEEDS_GPU
def test_a_step_waits_for_the_gpu_only_where_it_logs(experiment):
    waits = []
    torch.cuda.set_sync_debug_mode('warn')
    try:
        for steps in (4, 4, 24):            # the first compiles
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter('always')
                dpo.main([*DPO, f'--max_steps={steps}', f'--log_interval={steps}', '--compile=False', '--kl_prompts=0'])
            waits.append(sum('synchroniz' in str(w.message) for w in caught))
    finally:
        torch.cuda.set_sync_debug_mode('default')
    assert waits[1] == waits[2], f'20 steps more, {waits[2] - waits[1]} waits more'


@NEEDS_GPU
def test_a_worker_has_the_number_of_its_gpu():
    assert run.Worker('auto').device == run.Worker('cuda').device == torch.device('cuda', 0)


def test_generate_compiles_nothing_and_keeps_off_cudnn(monkeypatch):
    """cuDNN makes a plan for every new length of the keys; torch.compile might make a kernel."""
    allowed, before = [], torch.backends.cuda.cudnn_sdp_enabled()
    attention = F.scaled_dot_product_attention

    def watched(*args, **options):
        allowed.append((torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled()))
        return attention(*args, **options)
    monkeypatch.setattr(model_file.F, 'scaled_dot_product_attention', watched)
    plain = small_gpt()
    blockwise = copy.deepcopy(plain)
    run.compile_blocks(blockwise)
    graphs = counters['stats']['unique_graphs']
    prompts = [[1, 2, 3], [4]]
    assert blockwise.generate(prompts, 9, 256, seed=3) == plain.generate(prompts, 9, 256, seed=3)
    assert counters['stats']['unique_graphs'] == graphs
    assert set(allowed) == {(False, True)} and torch.backends.cuda.cudnn_sdp_enabled() == before


def test_bfloat16_that_a_gpu_only_emulates_is_not_chosen(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    monkeypatch.setattr(torch.cuda, 'set_device', lambda device: None)
    for supported in (False, True):
        def answer(including_emulation=True):
            return including_emulation or supported
        monkeypatch.setattr(torch.cuda, 'is_bf16_supported', answer)
        assert run.Worker('cuda').bf16 == supported
    assert not run.Worker('cpu').bf16 and run.Worker('cpu', 'bfloat16').bf16
