"""What several test files need: the stages importable, the shared real data where it is, small data sets and models."""
import base64
import csv
import gzip
import importlib
import json
import multiprocessing
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / 'shared'
sys.path[:0] = [str(ROOT), str(ROOT / 'repro')]
if (SHARED / 'tiktoken_cache').is_dir():
    os.environ.setdefault('TIKTOKEN_CACHE_DIR', str(SHARED / 'tiktoken_cache'))
os.environ.setdefault('HF_HUB_OFFLINE', '1')
torch.set_num_threads(1)        # for models this small a second one only costs, most of all on a busy machine

from model import GPT, GPTConfig                        # noqa: E402
from nanodpo import checkpoint                          # noqa: E402
from nanodpo.data import FORMAT, Groups, read_meta, sha256_file, write_meta        # noqa: E402
from nanodpo.text import load_tokenizer                 # noqa: E402

VOCAB = 257         # bytes and the end token


def write_data(folder, splits, max_length=64, labels={}):
    """data/<name>/ by hand, a byte vocabulary. splits: {split: list of [prompt, response_1, ...] of id lists}.
    labels: {split: list of bool}, of unpaired examples."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokens = [base64.b64encode(bytes([i])).decode() for i in range(256)]
    (folder / 'tokenizer.json').write_text(json.dumps(dict(name='bytes', pattern='(?s).', tokens=tokens)))
    meta = dict(format=FORMAT, tokenizer='tokenizer.json', vocab_size=VOCAB, eot_token=256, template='{prompt}',
                max_length=max_length, splits={})
    for split, groups in splits.items():
        pieces = [piece for group in groups for piece in group]
        bounds = np.cumsum([0] + [len(piece) for piece in pieces])
        width = len(groups[0])
        index = np.array([[*bounds[i * width:(i + 1) * width], bounds[(i + 1) * width]] for i in range(len(groups))])
        np.concatenate(pieces).astype(np.uint16).tofile(folder / f'{split}.bin')
        np.save(folder / f'{split}.idx.npy', index.astype(np.int64))
        meta['splits'][split] = dict(groups=len(groups), K=width - 1, dtype='uint16',
                                     bin_sha256=sha256_file(folder / f'{split}.bin'),
                                     idx_sha256=sha256_file(folder / f'{split}.idx.npy'))
        if split in labels:
            np.save(folder / f'{split}.labels.npy', np.array(labels[split], bool))
            meta['splits'][split]['labels_sha256'] = sha256_file(folder / f'{split}.labels.npy')
    write_meta(folder, meta)
    return folder


def random_groups(n, K, rng, longest=20, ends=True):
    """n ragged groups of bytes; single-token prompts and responses among them."""
    def piece():
        return list(rng.integers(0, 256, rng.integers(1, longest + 1)))
    groups = [[piece(), *(piece() + [256] * ends for _ in range(K))] for _ in range(n)]
    groups[0][0] = groups[0][0][:1]
    groups[min(1, n - 1)][1] = groups[min(1, n - 1)][1][-1:]
    return groups


def small_gpt(seed=0, block_size=64, vocab_size=VOCAB, spread=1.0, **options):
    """A random GPT whose predictions are far from uniform: GPT-2's initialisation would hide mistakes."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(block_size, vocab_size, 2, 4, 32, **options))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.15 * spread if p.dim() > 1 else 0.1)
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            torch.nn.init.normal_(module.weight, 1.0, 0.1)
    return model


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    """In a fresh directory: data/tiny with 48 + 10 pairs, out/tiny/sft with a random model. -> the directory."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    folder = write_data('data/tiny', {'train': random_groups(48, 2, rng), 'val': random_groups(10, 2, rng)})
    os.makedirs('out/tiny/sft')
    checkpoint.save('out/tiny/sft', 1, small_gpt(),
                    dict(config={}, optimizer={}, vocabulary=Groups(folder, 'train').vocabulary))
    return tmp_path


def write_rows(path, rows):
    """Rows as a file of the sort that its name says. Bytes stand as they are: the file's, or a line's."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == '.gz':
        write_rows(path.with_suffix(''), rows)
        path.write_bytes(gzip.compress(path.with_suffix('').read_bytes()))
        path.with_suffix('').unlink()
    elif isinstance(rows, bytes):
        path.write_bytes(rows)
    elif path.suffix == '.parquet':
        import pyarrow.parquet
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == '.csv':
        with open(path, 'w', newline='', encoding='utf-8') as f:
            table = csv.DictWriter(f, list(rows[0]))
            table.writeheader()
            for row in rows:
                table.writerow({key: text if isinstance(text, str) else json.dumps(text) for key, text in row.items()})
    elif path.suffix == '.json':
        path.write_text(json.dumps(rows))
    else:
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        path.write_bytes(b''.join(line + b'\n' for line in lines))


def prepare(*flags, name='made', tokenizer='bytes'):
    """Run the stage here. -> {split: groups as strings, labels after them}, meta.json"""
    import prepare_prefs
    prepare_prefs.main([f'--name={name}', f'--tokenizer={tokenizer}', *flags])
    folder = os.path.join('data', name)
    meta = read_meta(folder)
    tokens = load_tokenizer(folder, meta['tokenizer'])
    texts = {}
    for split in meta['splits']:
        groups = Groups(folder, split)
        texts[split] = [[tokens.decode(list(part)) for part in group] for group in groups]
        if groups.labels is not None:
            texts[split] = [[*text, bool(label)] for text, label in zip(texts[split], groups.labels, strict=True)]
    return texts, meta


def prepare_all(*flags, **options):
    """The groups of train and val together, sorted, and meta.json."""
    texts, meta = prepare(*flags, **options)
    return sorted(texts['train'] + texts['val']), meta


def error_of(*flags, **options):
    """The line with which the stage ends, having changed nothing."""
    before = {path: path.stat().st_mtime_ns for path in Path().glob('data/**/*') if path.is_file()}
    with pytest.raises(SystemExit) as stop:
        prepare(*flags, **options)
    assert isinstance(stop.value.code, str) and '\n' not in stop.value.code
    assert before == {path: path.stat().st_mtime_ns for path in Path().glob('data/**/*') if path.is_file()}
    return stop.value.code


@pytest.fixture(scope='session')
def gpt2():
    """GPT-2's tokenizer, where it is cached."""
    tiktoken = pytest.importorskip('tiktoken')
    if not os.path.isdir(os.environ.get('TIKTOKEN_CACHE_DIR', '')):
        pytest.skip('no cached GPT-2 tokenizer')
    return tiktoken.get_encoding('gpt2')


def run_stage(script, *args, cwd=None, processes=1, env=None, check=True):
    """A stage as a user runs it, under torchrun for several processes. -> CompletedProcess with text output."""
    torchrun = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
    command = [sys.executable, *(torchrun if processes > 1 else []), ROOT / script, *args]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300,
                          env={**os.environ, 'OMP_NUM_THREADS': '1', **(env or {})})
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def by_hand(rank, world, port):
    return {'RANK': str(rank), 'LOCAL_RANK': str(rank), 'WORLD_SIZE': str(world), 'MASTER_ADDR': '127.0.0.1',
            'MASTER_PORT': str(port)}


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def one_rank(stage, environment, folder, args, results):
    os.environ.update(environment)
    os.chdir(folder)
    said = ''
    try:
        importlib.import_module(stage).main(args)
    except BaseException as error:
        said = error.code if isinstance(error, SystemExit) else repr(error)
    results.put((int(environment['RANK']), said))


def run_ranks(stage, args, folders=None):
    """A stage by one process for each of `args`, its flags. Started without torchrun; torch is imported once for all.

    folders: where each runs. -> {rank: its error, '' for none}
    """
    here = os.getcwd()
    server = multiprocessing.get_context('forkserver')
    server.set_forkserver_preload(['dpo'])
    ranks = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('PYTHONPATH', str(ROOT))
        results, port = server.Queue(), free_port()
        for rank, flags in enumerate(args):
            folder = os.path.join(here, folders[rank] if folders else '.')
            task = (stage, by_hand(rank, len(args), port), folder, flags, results)
            ranks.append(server.Process(target=one_rank, args=task))
            ranks[-1].start()
    try:
        return dict(results.get(timeout=120) for _ in args)
    finally:
        for process in ranks:
            process.kill()


def last_checkpoint(folder):
    return checkpoint.read(checkpoint.find(folder)[-1])


def save_sft(model, step=2, folder='out/tiny/sft'):
    """A checkpoint of `model` where dpo.py looks for its policy."""
    os.makedirs(folder, exist_ok=True)
    checkpoint.save(folder, step, model, dict(config={}, optimizer={}, vocabulary=None))


def read_log(folder):
    """log.jsonl as a list of dicts."""
    return [json.loads(line) for line in open(Path(folder) / 'log.jsonl')]
