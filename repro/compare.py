"""Two checkouts of this repository: the same bytes of data, and the same logged numbers to the last bit?

    git worktree add ../before COMMIT
    python repro/compare.py ../before                           # that one against this one
    python repro/compare.py ../before --source=hh-rlhf          # HH too, from a folder in the hub's layout

A check runs a stage of both checkouts side by side, as a user would, in temporary folders. Then it compares what they
leave: data/<name>/ byte by byte, log.jsonl number by number. Times do not count. All checks together take 10 minutes
on 2 CPU cores. The exit status is 1 where one differs. A result: repro/logs/compare.txt.
"""
import argparse
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
HH = ROOT.parent / 'shared/data/hh-rlhf'
REVIEWS = ['CHECKOUT/config/reviews.py', '--device=cpu']
SMALL = ['--init_from=scratch', '--n_layer=2', '--n_embd=64', '--warmup_steps=5', '--batch_size=16', '--device=cpu',
         '--learning_rate=1e-3', '--log_interval=1']
STEPS = ['--max_steps=20', '--eval_interval=0', '--warmup_steps=5', '--log_interval=1', '--kl_prompts=20']
LOSSES = 'dpo cdpo robust ipo ipo_mean hinge dpo_norm simpo orpo kto plackett_luce'.split()
ON_PAIRS = [['--eval_interval=5', '--kl_prompts=64'], *([f'--loss={loss}'] for loss in LOSSES)]
ON_PAIRS += [['--nll_coef=0.1'], ['--loss=simpo', '--nll_coef=0.1'], ['--precompute_ref=True'], ['--row_tokens=512'],
             ['--optimizer=adamw', '--schedule=cosine', '--weight_decay=0.1'], ['--dtype=bfloat16']]


def rows_of(kind, n=300):
    """n rows of words by chance, of a kind that the reviews are not: 'unpaired' or 'rankings'."""
    rng = random.Random(kind)

    def text():
        words = 'one two three four five six seven'.split()
        return ' ' + ' '.join(rng.choice(words) for _ in range(rng.randint(1, 12)))

    for i in range(n):
        if kind == 'unpaired':
            yield dict(prompt=f'{i}{text()}', completion=text(), label=rng.random() < 0.6)
        else:
            yield dict(prompt=f'{i}{text()}', responses=[f'{text()} {k}' for k in range(4)])


def checks(source):
    """(title, what it leaves, the command) of every check, in an order in which they can run."""
    yield 'prepare, the reviews', 'data/reviews', ['CHECKOUT/prepare_prefs.py', 'CHECKOUT/config/reviews.py']
    if source:
        prepare = ['CHECKOUT/prepare_prefs.py', 'CHECKOUT/config/hh_cpu.py', f'--source={source}']
        yield 'prepare, HH', 'data/hh_cpu', prepare
    sft = ['CHECKOUT/sft.py', *REVIEWS, '--max_steps=40', '--eval_interval=20', '--log_interval=1']
    yield 'sft, 40 steps', 'out/reviews/sft', sft
    for flags in ON_PAIRS:
        yield f'dpo {" ".join(flags)}, 20 steps', 'out/reviews/dpo', ['CHECKOUT/dpo.py', *REVIEWS, *STEPS, *flags]
    two = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    yield 'dpo by two processes, 20 steps', 'out/reviews/dpo', [*two, 'CHECKOUT/dpo.py', *REVIEWS, *STEPS]
    for kind, loss in (('unpaired', 'kto'), ('rankings', 'plackett_luce')):
        prepare = [f'--source={kind}.jsonl', '--tokenizer=bytes', '--max_length=256', '--max_prompt_length=128']
        yield f'prepare, {kind}', f'data/{kind}', ['CHECKOUT/prepare_prefs.py', f'--name={kind}', *prepare]
        sft = ['CHECKOUT/sft.py', f'--name={kind}', *SMALL, '--dropout=0.1', '--max_steps=40']
        yield f'sft on {kind} with dropout, 40 steps', f'out/{kind}/sft', sft
        dpo = ['CHECKOUT/dpo.py', f'--name={kind}', '--device=cpu', '--batch_size=16', f'--loss={loss}', *STEPS]
        yield f'dpo --loss={loss} on {kind}, 20 steps', f'out/{kind}/dpo', dpo


def run_both(command, checkouts, folders):
    """Run the command with both checkouts at the same time, each in its own folder. SystemExit where one fails."""
    running = []
    for checkout, folder in zip(checkouts, folders):
        words = [word.replace('CHECKOUT', str(checkout)) for word in command]
        environment = dict(os.environ, OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1')
        running.append(subprocess.Popen([sys.executable, *words], cwd=folder, env=environment, text=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    outputs = [process.communicate()[0] for process in running]
    for process, output, checkout in zip(running, outputs, checkouts):
        if process.returncode:
            raise SystemExit(f'{output[-2000:]}\nerror: {" ".join(command)} failed in {checkout}')


def compare_data(old, new):
    """-> '' and their size, or which files of two data sets differ. meta.json does not count: it may say more."""
    names = [sorted(path.name for path in folder.iterdir() if path.name != 'meta.json') for folder in (old, new)]
    if names[0] != names[1]:
        return f'files {names[0]}, then {names[1]}', ''
    other = [name for name in names[0] if (old / name).read_bytes() != (new / name).read_bytes()]
    size = sum((new / name).stat().st_size for name in names[0])
    return ', '.join(other), f'{len(names[0])} files, {size:,} bytes'


def compare_logs(old, new):
    """-> '' and how many numbers two logs hold, or where and by how much they differ. Times do not count."""
    logs = [[json.loads(line) for line in (folder / 'log.jsonl').open()] for folder in (old, new)]
    count, other = 0, []
    for before, after in itertools.zip_longest(*logs, fillvalue={}):
        keys = [key for key in before | after if 'second' not in key]
        count += len(keys)
        for key in keys:
            a, b = before.get(key), after.get(key)
            if a is None or b is None:
                return f'{key} in line {before or after} of one log alone', ''
            if a != b:
                other.append((abs(a - b) / max(abs(a), abs(b)), f'step {after["step"]}: {key} {a}, then {b}'))
    if other:
        return f'{len(other)} of {count} numbers, by at most {max(other)[0]:.0e} of their size; first {other[0][1]}', ''
    return '', f'{len(logs[0])} lines, {count:,} numbers'


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('checkout', type=Path)
    parser.add_argument('--source', type=Path, default=HH if HH.is_dir() else None)
    args = parser.parse_args()
    checkouts = args.checkout.resolve(), ROOT
    plan = list(checks(args.source and args.source.resolve()))
    differ = 0
    with tempfile.TemporaryDirectory() as place:
        folders = Path(place, 'old'), Path(place, 'new')
        for folder in folders:
            folder.mkdir()
            for kind in ('unpaired', 'rankings'):
                Path(folder, f'{kind}.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows_of(kind)))
        for title, leaves, command in tqdm(plan, 'checks'):
            for folder in folders:
                shutil.rmtree(folder / leaves, ignore_errors=True)
            run_both(command, checkouts, folders)
            compare = compare_data if leaves.startswith('data') else compare_logs
            difference, amount = compare(*(folder / leaves for folder in folders))
            differ += bool(difference)
            tqdm.write(f'{"OTHER" if difference else "same "}  {title:68} {difference or amount}')
    print(f'{len(plan) - differ} of {len(plan)} checks are the same')
    raise SystemExit(differ > 0)


if __name__ == '__main__':
    main()
