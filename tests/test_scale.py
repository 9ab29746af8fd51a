"""repro/scale.py: its bookkeeping against independent counts. No test can check its model of GPUs."""
import json

import numpy as np
import pytest
import torch

from conftest import random_groups, run_stage, write_data
from model import GPT, GPTConfig, packed_mask
from nanodpo.data import Groups, pack, plan_rows, step_groups
import scale

WORK = np.array([[[1000, 1024, 2e5, 400, 512]], [[1100, 1152, 2e5, 500, 512]]])        # 2 ranks, a row each


@pytest.fixture
def groups(tmp_path):
    data = random_groups(90, 2, np.random.default_rng(3), 100)
    return Groups(write_data(tmp_path / 'data', {'train': data}, 256), 'train')


def test_planner_statistics_equal_what_pack_makes_of_the_same_rows(groups):
    works, _, _ = scale.simulate(groups, 32, 8, 500, steps=3, seed=5)
    batches = [step_groups(90, 32, step, 5) for step in (0, 1, 3)]          # step 2 is the epoch's short one
    imbalance = []
    for work, ids in zip(works, batches):
        planned = plan_rows(ids, groups.lengths[ids], 8, 500)
        assert work.shape == (8, len(planned[0]), 5)
        for rank, rows in enumerate(planned):
            for j, row in enumerate(rows):
                batch = pack(groups, row, 128)
                seen = packed_mask(batch.group, batch.part).masks[0] & (batch.group >= 0)[0][None, None, None]
                assert work[rank, j].tolist() == [(batch.group >= 0).sum(), batch.tokens.numel(), seen.sum(),
                                                  len(batch.response), len(batch.target)]
        loads = [sum(int(groups.lengths[i]) for row in rows for i in row) for rows in planned]
        imbalance.append(max(loads) * 8 / sum(loads) - 1)
    row = scale.planner_row(groups, 32, 8, works, 0, 0)
    assert row['tokens imbalance'] == pytest.approx(np.mean(imbalance))
    assert row['tokens worst'] == pytest.approx(max(imbalance))


def test_flops_equal_four_forwards_of_groups_and_parameters_equal_the_models(groups):
    ids = np.arange(40)
    work = np.array(scale.row_work(groups, ids))
    work[[1, 4]] = work[[0, 3]]                                             # without the padding
    for config in (GPTConfig(), GPTConfig(256, 1000, 3, 4, 64)):
        seconds = scale.rank_seconds(config, work[None, None], 0.5)[0, 0]
        assert seconds * scale.PEAK * 0.5 == pytest.approx(4 * groups.forward_flops(ids, config))
    assert sum(scale.num_params(config)) == GPT(config).num_params()
    with torch.device('meta'):
        for dimensions in scale.SHAPES.values():
            config = scale.shape(*dimensions)
            assert sum(scale.num_params(config)) == sum(p.numel() for p in GPT(config).parameters())


def test_all_reduce_is_nothing_alone_and_exposed_is_between_the_embeddings_and_all_of_it():
    config = scale.shape(*scale.SHAPES['GPT-2 XL'])
    alone = scale.step_seconds(config, WORK[:1], 0, 0)
    assert scale.ring(1, 1e9) == alone['ring'] == alone['all-reduce'] == alone['waiting'] == 0
    most = 2e9 / scale.NVLINK + 1e9 / scale.BUCKET * scale.LATENCY[0]       # however many GPUs a node has
    assert scale.ring(2, 1e9) < scale.ring(8, 1e9) < most < scale.ring(32, 1e9)
    embeddings = scale.ring(2, 4 * scale.num_params(config)[1])
    for tokens in (1, 10, 100, 1000):
        parts = scale.step_seconds(config, WORK * tokens, 1e-4, 1e-4)
        assert embeddings <= parts['all-reduce'] <= parts['ring']
        slowest = scale.rank_seconds(config, WORK * tokens, scale.UTILISATION).max()
        assert parts['compute'] + parts['waiting'] == pytest.approx(slowest)
    assert parts['all-reduce'] == embeddings and parts['input'] == 0
    assert scale.step_seconds(config, WORK, 0, 10)['input'] > 9             # ten seconds to pack a row would show
    tokens = scale.hidden_tokens(8, 4, 0.4)     # the blocks' backward on so many tokens takes as long as their ring
    assert 4 * tokens * 1e9 / (scale.PEAK * 0.4) == pytest.approx(scale.ring(8, 4e9))


def test_memory_grows_with_what_it_should_and_the_largest_model_just_fits():
    config = scale.shape(*scale.SHAPES['GPT-2 XL'])
    base = scale.memory(config, 8192)
    assert base > max(scale.memory(config, tokens) for tokens in (256, 4096))
    assert base > scale.memory(config, 8192, live=False)
    checkpointed = scale.memory(config, 8192, checkpointing=True)
    assert base > checkpointed > scale.memory(config, 8192, checkpointing=True, state_shards=8)
    assert scale.memory(config, 8192, optimizer='adamw') > base
    assert base > scale.memory(config, 8192, shards=8) > scale.memory(config, 8192, shards=32)
    sizes = [scale.memory(scale.shape(*dimensions), 8192) for dimensions in scale.SHAPES.values()]
    assert sizes == sorted(sizes)
    params, layers, width = scale.largest(80e9, 8192)
    assert params == sum(scale.num_params(scale.shape(layers, 1, width)))
    assert scale.memory(scale.shape(layers, 1, width), 8192) <= 80e9
    width += 64
    assert scale.memory(scale.shape(width // 128, 1, width), 8192) > 80e9


def test_activations_are_what_autograd_keeps(groups):
    """Bytes a token, layer and unit of width in bfloat16, from storages saved for the backward; on the CPU attention's
    output is kept twice (2) where stretches are joined, and its dense mask, which FlexAttention does not have."""
    batch, kept = pack(groups, list(range(12)), 1), []
    for layers in (1, 3):
        model = GPT(GPTConfig(1024, 257, layers, 4, 128))
        weights, saved = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

        def keep(x):
            wide = x.dtype == torch.bfloat16 and x.dim() == 2 and min(x.shape) >= 128
            copy_of_a_weight = wide and batch.tokens.numel() not in x.shape
            mask = x.dim() == 4 and x.shape[1] == 1
            if x.untyped_storage().data_ptr() not in weights and not copy_of_a_weight and not mask:
                saved[x.untyped_storage().data_ptr()] = x, x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast('cpu', torch.bfloat16):
            model(batch.tokens, batch.positions, packed_mask(batch.group, batch.part, batch.cuts))
        kept.append(sum(size for _, size in saved.values()))
    per_unit = (kept[1] - kept[0]) / 2 / batch.tokens.numel() / 128
    assert scale.ACTIVATIONS <= per_unit < scale.ACTIVATIONS + 3


def test_scale_writes_a_table_figures_and_no_paths(tmp_path):
    done = run_stage('repro/scale.py', '--pairs=600', '--steps=2', '--out=scale', cwd=tmp_path)
    report = json.loads((tmp_path / 'scale.json').read_text())
    assert (tmp_path / 'scale.md').read_text() == done.stdout and (tmp_path / 'scale.png').stat().st_size > 10000
    assert str(tmp_path) not in json.dumps(report) and len(report['planner']) == 6
    for row in report['steps']:
        assert row['seconds'] == pytest.approx(sum(row[part] for part in scale.PARTS))
        assert row['all-reduce'] <= row['ring'] and 0 < row['scaling'] < 1.01
    with pytest.raises(SystemExit) as caught:
        scale.main(['--pairs=100'])
    assert caught.value.code.startswith('error: ') and '512 pairs' in caught.value.code
