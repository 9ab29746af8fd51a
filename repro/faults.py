"""What happens when things break: a bounded campaign of faults against every stage, with its score.

    python repro/faults.py                                  # all of it
    python repro/faults.py --only=damage --seed=57 --trials=1   # one trial again, as a failure names it

  kill      SIGKILL at random moments, half of them aimed at files being written. A run is killed twice, restarted with
            --resume each time (prepare: the same command), and left to end: weights, optimizer, log and data are bit for
            bit those of a run that nobody disturbed; after each kill all finished checkpoints can be read, and a data set
            is the old one, the new one, or refused
  rename    the same, with SIGKILL right before each call that changes a folder (replace, remove, mkdir ...) in turn
  full      a disk that fills up at a random level: one line, status not 0, what stood there still stands, and once there is
            room the run goes on to the same end
  damage    a file cut short, with one bit flipped, empty, or swapped with that of another run, and each stage that reads it:
            it refuses with one line and changes nothing, or its result is that of the undamaged file, to the bit
  lines     mutated JSONL lines among good ones: no traceback, no hang, every bad line counted, every good one kept, by an
            oracle of its own; then with none allowed: the first ten are named
  code      checkpoints and data with code or foreign content in them, hashes right: refused in one line, nothing is run

Stages run for real, in a process of their own that is forked from one which has torch loaded; every eighth trial starts
python anew. A trial depends on its class and seed alone, as far as kills can. The full disk is a small tmpfs where the user
may mount one, else a limit on the size of files. Exit status 1 if anything failed. Writes <out>.md and .json.

A Hugging Face directory has no hash: a bit flipped inside its weights, or in a number of its config.json, cannot be seen.
Such trials pass and are counted as `unseen`.
"""
import argparse
import collections
import contextlib
import functools
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from pathlib import Path

os.environ |= {'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1', 'RUST_BACKTRACE': '0', 'TQDM_MININTERVAL': '10'}
import numpy as np
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import dpo                                                                                  # noqa: E402
import prepare_prefs                                                                        # noqa: E402
import sample                                                                               # noqa: E402
import sft                                                                                  # noqa: E402
from config import UserError                                                                # noqa: E402
from model import CheckpointError, find_checkpoints, load_model, read_checkpoint                        # noqa: E402
from prepare_prefs import Groups, sha256_file, write_meta                                   # noqa: E402

STAGES = {'prepare_prefs': prepare_prefs.main, 'sft': sft.main, 'dpo': dpo.main, 'sample': sample.main}
SMALL = '--batch_size=16 --device=cpu --save_interval=1 --eval_interval=2 --log_interval=2 --schedule=constant --warmup_steps=2'.split()
SFT = ['sft', '--name=own', '--init_from=scratch', '--n_layer=1', '--n_head=2', '--n_embd=16', '--dropout=0.1', *SMALL]
DPO = ['dpo', '--name=own', '--learning_rate=1e-3', '--precompute_ref', *SMALL]
PREPARE = ['prepare_prefs', '--name=own', '--source=pairs.jsonl', '--tokenizer=bytes', '--max_length=64', '--max_prompt_length=24',
           '--val_fraction=0.2']
COMMANDS = {        # what is run in a copy of the base, and what its result is
    'prepare': (PREPARE, 'data/own'),
    'replace': ([*PREPARE, '--seed=2'], 'data/own'),
    'draw': ('prepare_prefs --name=drawn --source=data/own --policy=out/own/sft --reward=reward.py --num_samples=2 --num_prompts=8 '
             '--max_new_tokens=4 --device=cpu'.split(), 'data/drawn'),
    'sft': ([*SFT, '--max_steps=8'], 'out/own/sft'),
    'dpo': ([*DPO, '--max_steps=8'], 'out/own/dpo'),
    'resume': ([*DPO, '--max_steps=8', '--resume'], 'out/own/dpo'),
    'kto': (['dpo', '--name=likes', '--init_from=out/own/sft', '--loss=kto', '--learning_rate=1e-3', *SMALL, '--max_steps=2'], 'out/likes/dpo'),
    'hf': (['dpo', '--name=own', '--init_from=hf', '--learning_rate=1e-3', *SMALL, '--max_steps=2'], 'out/own/dpo'),
    'sample': ('sample --name=own --num_prompts=3 --max_new_tokens=8 --device=cpu'.split(), None),
}
Done = collections.namedtuple('Done', 'status out err seconds')


# -----------------------------------------------------------------------------
# running a stage

def behave(stage, args, cwd, before):
    """The child: the stage's main as its script would run it, then out."""
    status = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.chdir(cwd)
        for fd, name in ((1, 'stdout'), (2, 'stderr')):
            file = os.open(f'{cwd}.{name}', os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, fd)
        sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(fd, 'w', closefd=False), 'utf-8', line_buffering=True) for fd in (1, 2))
        sys.argv = [f'{stage}.py', *args]
        before()
        STAGES[stage](args)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
        os._exit(status)


def run(command, cwd, new=False, kill=None, before=lambda: None, limit=120):
    """A stage in the folder `cwd`. new: by starting python; kill: a function of the seconds so far that says when to SIGKILL;
    before: called in a forked child first. A run of more than `limit` seconds is a hang: status 'hang'. -> Done"""
    stage, *args = command
    began = time.perf_counter()
    Path(f'{cwd}.stdout').touch()
    if new:
        with open(f'{cwd}.stdout', 'w') as out, open(f'{cwd}.stderr', 'w') as err:
            child = subprocess.Popen([sys.executable, str(ROOT / f'{stage}.py'), *args], cwd=cwd, stdout=out, stderr=err,
                                     preexec_fn=before)
        pid, poll = child.pid, lambda: child.poll() is not None
    else:
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            behave(stage, args, cwd, before)
        left = []

        def poll():
            left.extend([os.waitstatus_to_exitcode(code) for found, code in [os.waitpid(pid, os.WNOHANG)] if found])
            return left
    hung = False
    while not poll():
        if kill and not os.path.getsize(f'{cwd}.stdout'):
            began = time.perf_counter()         # python is still importing: nothing to break
        seconds = time.perf_counter() - began
        if kill and kill(seconds):
            os.kill(pid, signal.SIGKILL)
            kill = None
        elif seconds > limit and not hung:
            hung = True
            os.kill(pid, signal.SIGKILL)
        time.sleep(2e-4 if kill else 5e-3)
    status = child.returncode if new else left[0]
    out, err = (Path(f'{cwd}.{name}').read_text(errors='replace') for name in ('stdout', 'stderr'))
    return Done('hang' if hung else status, out, err, time.perf_counter() - began)


def one_line(done):
    """Whether a stage refused as it should: status 1, and one line on stderr."""
    return done.status == 1 and done.err.startswith('error: ') and done.err.count('\n') == 1


def tail(done):
    return f'status {done.status}: {(done.err.strip() or done.out.strip())[-300:]}'


# -----------------------------------------------------------------------------
# what there is

def snapshot(folder):
    """Every file below a folder with its content's hash."""
    return {str(p.relative_to(folder)): sha256_file(p) for p in sorted(Path(folder).rglob('*')) if p.is_file()}


def digest(value):
    """A hash of nested plain values and tensors, to the bit."""
    if isinstance(value, torch.Tensor):
        value = (str(value.dtype), tuple(value.shape), hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest())
    elif isinstance(value, dict):
        value = sorted((repr(k), digest(v)) for k, v in value.items())
    elif isinstance(value, (list, tuple)):
        value = [digest(v) for v in value]
    return hashlib.sha256(repr(value).encode()).hexdigest()


def result(cwd, folder, done):
    """What a run has made, comparable: a data set's files; of a training run the kept checkpoints with their weights and
    optimizer, and the log but for timing; of sample.py what it printed."""
    if folder is None:
        return {'printed': done.out}
    found = Path(cwd, folder)
    if folder.startswith('data'):
        return snapshot(found)
    parts = {'files': sorted(p.name for p in found.iterdir())}
    for path in find_checkpoints(str(found)):
        state = read_checkpoint(path)
        state['config'].pop('resume')
        parts |= {f'{os.path.basename(path)} {key}': digest(value) for key, value in state.items()}
    with open(found / 'log.jsonl') as f:
        parts['log'] = [{k: v for k, v in json.loads(line).items() if 'second' not in k} for line in f]
    return parts


def leftovers(cwd):
    """Temporary files that stayed."""
    return [str(p.relative_to(cwd)) for p in Path(cwd).rglob('*') if p.name.endswith('.tmp') or p.name.startswith('.tmp-')]


def differs(ours, theirs):
    """'' where two results are the same, else the first things that are not."""
    keys = [k for k in sorted(ours.keys() | theirs.keys()) if ours.get(k) != theirs.get(k)]
    return ', '.join(keys[:4])


# -----------------------------------------------------------------------------
# the base: what all trials start from, made by the stages

def sentence(rng, low, high):
    return ' ' + ''.join(rng.choice(list('abcde é.')) for _ in range(rng.integers(low, high))) + 'x'


def write_jsonl(path, rows):
    Path(path).write_text(''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows))


def make_base(base, seed):
    """Data sets `own` (pairs) and `likes` (unpaired), a finished SFT run, six steps of a DPO run, an exported model."""
    base.mkdir()
    rng = np.random.default_rng(seed)
    write_jsonl(base / 'pairs.jsonl', [dict(prompt=f'Q{i}' + sentence(rng, 1, 12), chosen=sentence(rng, 1, 20) + 'w',
                                            rejected=sentence(rng, 1, 20) + 'l') for i in range(60)])
    write_jsonl(base / 'likes.jsonl', [dict(prompt=f'Q{i}', completion=sentence(rng, 1, 20), label=bool(rng.random() < 0.6)) for i in range(60)])
    (base / 'reward.py').write_text('def reward(prompts, responses):\n    return [float(sum(map(ord, r)) % 97) for r in responses]\n')
    likes = [*(flag.replace('own', 'likes').replace('pairs', 'likes') for flag in PREPARE)]
    for command in (PREPARE, likes, [*SFT, '--max_steps=4'], [*DPO, '--max_steps=6']):
        done = run(command, base)
        assert done.status == 0, tail(done)
    load_model(str(base / 'out/own/sft'))[0].save_pretrained(str(base / 'hf'))


def copy(base, where):
    shutil.copytree(base, where)
    return where


@functools.cache
def undisturbed(base, name):
    """What a command makes of a copy of the base that nobody disturbs, its seconds and its number of changes to folders.
    It is done once, by the worker that first asks."""
    file, (command, folder) = base.parent / f'undisturbed-{name}.json', COMMANDS[name]
    if not file.exists():
        cwd = copy(base, base.parent / f'undisturbed-{name}-{os.getpid()}')
        Path(f'{cwd}.changes').touch()
        done = run(command, cwd, before=lambda: stop_at_change(-1, f'{cwd}.changes'))
        assert done.status == 0, tail(done)
        found = dict(result=result(cwd, folder, done), seconds=done.seconds, changes=os.path.getsize(f'{cwd}.changes'))
        Path(f'{cwd}.json').write_text(json.dumps(found))
        os.replace(f'{cwd}.json', file)
        shutil.rmtree(cwd)
    return json.loads(file.read_text())


# -----------------------------------------------------------------------------
# kills

def stop_at_change(n, count):
    """From here on this process dies right before its n-th call that changes a folder; the file `count` grows by a byte each."""
    def deadly(function):
        def call(*args, **options):
            with open(count, 'ab') as f:
                f.write(b'.')
                f.flush()
                if f.tell() == n + 1:
                    os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **options)
        return call
    for name in ('replace', 'rename', 'remove', 'unlink', 'mkdir', 'rmdir'):
        setattr(os, name, deadly(getattr(os, name)))


def whole(cwd, name, base):
    """'' where after a kill all that is finished can be read, else what cannot."""
    folder = COMMANDS[name][1]
    if folder.startswith('data'):
        now = {k: v for k, v in snapshot(cwd / folder).items() if not k.startswith('.tmp-')} if (cwd / folder).is_dir() else {}
        old = snapshot(base / folder) if (base / folder).is_dir() else {}
        if now in (old, undisturbed(base, name)['result'], {}):
            return ''
        try:
            for split in ('train', 'val'):
                Groups(str(cwd / folder), split)
        except UserError:
            return ''           # neither old nor new, and refused
        return 'a mixed set is read as whole'
    try:
        for path in find_checkpoints(str(cwd / folder)):
            read_checkpoint(path)
    except CheckpointError as error:
        return str(error)
    if name == 'resume' and not find_checkpoints(str(cwd / folder)):
        return 'no checkpoint is left'
    for cache in (cwd / 'out/own').glob('reference-*.npz'):
        with np.load(cache) as file:
            file['logps']
    return ''


def again(command):
    """The command that goes on after a kill."""
    return command if command[0] == 'prepare_prefs' or '--resume' in command else [*command, '--resume']


def aimed(rng, cwd, folder, seconds):
    """A function that says when to kill: at a random time, or a few milliseconds after some temporary file appears."""
    if rng.random() < 0.5:
        at = rng.uniform(0, seconds)
        return lambda now: now > at
    nth, delay, seen = int(rng.integers(1, 7)), float(rng.choice([0, rng.uniform(0, 5e-3)])), [0, False, 0.0]
    pattern = '.tmp-*/meta.json' if folder.startswith('data') else '*.tmp'
    nth = 1 if folder.startswith('data') else nth

    def now_is_the_time(now):
        there = any((cwd / folder).glob(pattern))
        seen[0] += there and not seen[1]
        seen[1] = there
        if seen[0] >= nth and not seen[2]:
            seen[2] = now
        return seen[2] and now >= seen[2] + delay
    return now_is_the_time


def to_the_end(cwd, name, base, new):
    """Run on until the end, undisturbed. -> '' or what is wrong with the result"""
    command, folder = COMMANDS[name]
    done = run(again(command), cwd, new)
    if done.status:
        return f'does not go on: {tail(done)}'
    wrong = differs(result(cwd, folder, done), undisturbed(base, name)['result'])
    return f'not what an undisturbed run makes: {wrong}' if wrong else ', '.join(f'{left} stays' for left in leftovers(cwd))


def start(name, base, cwd):
    """A copy of the base for a command that is to be killed: a new training run has no older one in its way."""
    copy(base, cwd)
    if name in ('sft', 'dpo'):
        shutil.rmtree(cwd / COMMANDS[name][1])
    return cwd


def kill(seed, rng, base, cwd, new):
    name = ('sft', 'dpo', 'replace', 'resume', 'draw')[seed % 5]
    command, folder = COMMANDS[name]
    start(name, base, cwd)
    kills, tries = 0, 0
    while kills < 2 and tries < 30:
        tries += 1
        done = run(command if not kills else again(command), cwd, new, kill=aimed(rng, cwd, folder, undisturbed(base, name)['seconds']))
        if done.status == -9:
            kills += 1
            if wrong := whole(cwd, name, base):
                return f'{name}, after a kill: {wrong}', kills
            continue
        if wrong := tail(done) if done.status else differs(result(cwd, folder, done), undisturbed(base, name)['result']):
            return f'{name}, restarted: {wrong}', kills
        shutil.rmtree(cwd)              # it was faster than the kill
        start(name, base, cwd)
    return (wrong := to_the_end(cwd, name, base, new)) and f'{name}: {wrong}', kills


def rename(seed, rng, base, cwd, new):
    names = ('replace', 'sft', 'dpo', 'resume')
    name = names[seed % len(names)]
    command, folder = COMMANDS[name]
    start(name, base, cwd)
    n = seed // len(names) % undisturbed(base, name)['changes']
    done = run(command, cwd, before=lambda: stop_at_change(n, f'{cwd}.changes'))
    if done.status == 0:
        return '', 0                # its last changes, of which a fresh run has one or two fewer
    wrong = f'status {done.status} instead of a kill' if done.status != -9 else whole(cwd, name, base)
    wrong = wrong or to_the_end(cwd, name, base, new)
    return wrong and f'{name}, killed before change {n}: {wrong}', 1


# -----------------------------------------------------------------------------
# a full disk

def resize(cwd, size):
    subprocess.run(['mount', '-o', f'remount,size={size}', str(cwd)], check=True)


def full(seed, rng, base, cwd, new):
    name = ('sft', 'dpo', 'replace', 'resume', 'draw')[seed % 5]
    command, folder = COMMANDS[name]
    cwd.mkdir()
    room = int(rng.uniform(0, 40_000 if folder.startswith('data') else 250_000))
    mounted = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=100m', 'tmpfs', str(cwd)], stderr=subprocess.DEVNULL).returncode == 0
    try:
        shutil.copytree(base, cwd, dirs_exist_ok=True)
        if name in ('sft', 'dpo'):
            shutil.rmtree(cwd / folder)
            for cache in (cwd / 'out/own').glob('reference-*') if name == 'dpo' else ():
                cache.unlink()
        before = snapshot(cwd)
        if mounted:
            space = os.statvfs(cwd)
            resize(cwd, (space.f_blocks - space.f_bfree) * space.f_frsize + room)

        def limit():
            if not mounted:
                resource.setrlimit(resource.RLIMIT_FSIZE, (room // 4, resource.RLIM_INFINITY))
        done = run(command, cwd, new, before=limit)
        if done.status:
            after = snapshot(cwd)
            if not one_line(done):
                return f'{name} with {room:,} bytes left: {tail(done)}', 0
            lost = [k for k in before if before[k] != after.get(k) and (folder.startswith('data') or not k.startswith(folder))]
            if lost or leftovers(cwd):
                return f'{name} with {room:,} bytes left: changed {lost}, left {leftovers(cwd)}', 0
            if wrong := whole(cwd, name, base):
                return f'{name} with {room:,} bytes left: {wrong}', 0
            if mounted:
                resize(cwd, '100m')
        wrong = to_the_end(cwd, name, base, new)
        return wrong and f'{name} with {room:,} bytes left, then room: {wrong}', int(done.status != 0)
    finally:
        if mounted:
            subprocess.run(['umount', '-l', str(cwd)], check=True)


# -----------------------------------------------------------------------------
# damaged files

DATA = [f'data/own/{file}' for file in ('train.bin', 'val.bin', 'train.idx.npy', 'val.idx.npy', 'tokenizer.json', 'meta.json')]
LIKES = [path.replace('own', 'likes') for path in DATA] + ['data/likes/train.labels.npy', 'data/likes/val.labels.npy']
START, RUN = (['out/own/sft/step-000004.pt', 'out/own/sft/step-000004.json'], ['out/own/dpo/step-000006.pt', 'out/own/dpo/step-000006.json',
                                                                              'out/own/dpo/step-000005.pt', 'out/own/dpo/step-000005.json'])
CACHE = ['out/own/reference-train.npz', 'out/own/reference-val.npz']
READS = {'sft': DATA, 'dpo': DATA + START + CACHE, 'resume': DATA + START + CACHE + RUN + ['out/own/dpo/log.jsonl'], 'kto': LIKES,
         'hf': ['hf/config.json', 'hf/model.safetensors'], 'sample': DATA + START + RUN[:2], 'prepare': DATA, 'draw': DATA + START}
CELLS = [(name, path, how) for name, paths in READS.items() for path in paths for how in ('cut', 'flip', 'empty', 'swap')]


def harm(path, how, rng, other):
    """Damage a file. -> a word on where"""
    content = bytearray(path.read_bytes())
    if how == 'cut':
        at = int(rng.integers(len(content)))
        path.write_bytes(content[:at])
        return f'cut at {at}'
    if how == 'flip':
        at, bit = int(rng.integers(len(content))), int(rng.integers(8))
        content[at] ^= 1 << bit
        path.write_bytes(content)
        return f'bit {bit} of byte {at} flipped'
    path.write_bytes(b'' if how == 'empty' else other.read_bytes())
    return 'empty' if how == 'empty' else 'of another run'


def damage(seed, rng, base, cwd, new):
    name, path, how = CELLS[seed % len(CELLS)]
    command, folder = COMMANDS[name]
    copy(base, cwd)
    where = harm(cwd / path, how, rng, base.parent / 'other' / path)
    before = snapshot(cwd)
    done = run(command, cwd, new)
    what = f'{name}, {path} {where}: '
    if done.status:
        after = snapshot(cwd)
        wrong = '' if one_line(done) else tail(done)
        return wrong and what + wrong or (differs(before, after) and what + f'changed {differs(before, after)}'), 1
    wrong = differs(result(cwd, folder, done), undisturbed(base, name)['result'])
    if path.endswith('log.jsonl'):      # what cannot be read of it is lost, or what was flipped stays; nothing depends on it
        wrong = wrong if wrong != 'log' else ''
    if wrong and name == 'hf':
        return '', 'unseen'
    if not wrong and name == 'resume' and path == RUN[0] and 'refused: ' not in done.out:
        wrong = 'the run does not say that it went back'
    return wrong and what + f'accepted, and its result is another one: {wrong}', 0


# -----------------------------------------------------------------------------
# mutated lines

def good_row(kind, rng, i):
    text = lambda: sentence(rng, 1, 30)         # noqa: E731
    if kind == 'documents':
        return dict(text=f'{i}' + text())
    if kind in ('pairs', 'scored'):
        low, gap = round(float(rng.uniform(-5, 5)), 2), float(rng.choice([0.5, 1.25, 2.5])) if i > 1 else 2
        scores = dict(score_chosen=low + gap, score_rejected=low) if kind == 'scored' else {}
        return dict(prompt=f'Q{i}' + text(), chosen=text() + 'w', rejected=text() + 'l') | scores
    if kind == 'conversations':
        roles = ['system'] * int(rng.integers(2)) + ['user', 'assistant'] * int(rng.integers(3)) + ['user']
        before = [dict(role=role, content=f'{i}' + text()) for role in roles]
        sides = [dict(role='assistant', content=text() + mark) for mark in 'wl']
        how = rng.integers(5)               # what stands in `prompt`, and under the sides
        if how < 3:
            prompt = {0: {}, 1: dict(prompt=before), 2: dict(prompt=text())}[how]
            return prompt | {key: before + [side] for key, side in zip(('chosen', 'rejected'), sides)}
        if how == 3:
            return dict(prompt=before, chosen=sides[:1], rejected=sides[1:] if rng.random() < 0.5 else sides[1]['content'])
        return dict(prompt=f'Q{i}' + text(), chosen=sides[:1], rejected=sides[1:])
    if kind == 'demonstrations':
        return dict(prompt=f'Q{i}' + text(), completion=text())
    if kind == 'rankings':
        row = dict(prompt=f'Q{i}' + text(), responses=[text() + mark for mark in 'abc'])
        return row | (dict(scores=rng.permutation(3).tolist()) if rng.random() < 0.5 else {})
    return dict(prompt=f'Q{i}' + text(), completion=text(), label=bool(rng.random() < 0.5))


def expected(kind, line):
    """What the documented format says of a line (bytes): None of a blank one, False of a bad one, () of a pair whose scores are
    less than 1 apart, else [prompt, response, ...] and the label. Written from the docstrings of prepare_prefs.py alone."""
    if not line.strip(b' \t\r\n\v\f'):
        return None
    try:
        row = json.loads(line.decode('utf-8').removeprefix('\ufeff'))
    except (ValueError, RecursionError):
        return False

    def is_text(value, blank=False):
        return isinstance(value, str) and not any('\ud800' <= c <= '\udfff' for c in value) and bool(blank or value.strip())
    if kind == 'documents':
        return isinstance(row, dict) and is_text(row.get('text')) and (['', row['text']], None)
    if kind == 'conversations':
        return isinstance(row, dict) and expected_of_messages(row, is_text)
    if not isinstance(row, dict) or not is_text(row.get('prompt'), blank=True):
        return False
    if kind == 'unpaired':
        good = is_text(row.get('completion')) and row.get('label') in (True, False) and isinstance(row['label'], bool)
        return good and ([row['prompt'], row['completion']], row['label'])
    if kind == 'demonstrations':
        return is_text(row.get('completion')) and 'label' not in row and ([row['prompt'], row['completion']], None)
    if kind in ('pairs', 'scored'):
        responses = [row.get('chosen'), row.get('rejected')]
        if not all(map(is_text, responses)) or responses[0] == responses[1]:
            return False
        if kind == 'scored':
            scores = [row.get('score_chosen'), row.get('score_rejected')]
            if any(type(score) not in (int, float) or not abs(score) <= sys.float_info.max for score in scores):
                return False
            if float(scores[0]) - float(scores[1]) < 1:
                return ()
        return [row['prompt'], *responses], None
    responses = row.get('responses')
    if not isinstance(responses, list) or len(responses) != 3 or not all(map(is_text, responses)) or len(set(responses)) < 3:
        return False
    if 'scores' in row:
        scores = row['scores']
        if not isinstance(scores, list) or any(type(s) not in (int, float) or s != s or s in (np.inf, -np.inf) for s in scores):
            return False
        if len(scores) != 3 or len(set(scores)) < 3:
            return False
        responses = [responses[i] for i in sorted(range(3), key=lambda i: scores[i], reverse=True)]
    return [row['prompt'], *responses], None


def expected_of_messages(row, is_text):
    """expected, of an object of pairs that are conversations, or answers to one."""
    def turns(value, role):
        """[(role, content), ...], or None."""
        if isinstance(value, str):
            return [(role, value)] if is_text(value, blank=True) else None
        if not isinstance(value, list) or not value:
            return None
        good = all(isinstance(m, dict) and m.get('role') in ('system', 'user', 'assistant') and is_text(m.get('content'), blank=True)
                   for m in value)
        return [(m['role'], m['content']) for m in value] if good else None
    prompt, sides = row.get('prompt'), [row.get('chosen'), row.get('rejected')]
    before = [] if prompt is None else turns(prompt, 'user')
    sides = [turns(side, 'assistant') for side in sides]
    if before is None or None in sides:
        return False
    whole = [before + side if side[0][0] == 'assistant' else side for side in sides]
    for side in whole:
        roles = [role for role, _ in side]
        roles = roles[roles[0] == 'system':]
        if not roles or len(roles) % 2 or roles != ['user', 'assistant'] * (len(roles) // 2) or not side[-1][1].strip():
            return False
        if isinstance(prompt, list) and side[:len(before)] != before:
            return False
    if whole[0][:-1] != whole[1][:-1] or whole[0][-1] == whole[1][-1]:
        return False

    def after(content):
        return content if content[:1].isspace() else ' ' + content
    if isinstance(prompt, str) and whole[0][:-1] == before and prompt.startswith('\n\nHuman: ') and prompt.endswith('\n\nAssistant:'):
        text = prompt
    else:
        text = ''.join({'system': content, 'user': f'\n\nHuman: {content}\n\nAssistant:', 'assistant': after(content)}[role]
                       for role, content in whole[0][:-1])
    return [text, *(after(side[-1][1]) for side in whole)], None


def mutate(row, rng):
    """A line (bytes, without line feed) made from a good row by one to three changes."""
    row, odd = dict(row), [None, True, 3, 2.5, [], {}, '', ' ', '\n\t', ['x'], {'a': 'b'}, 'x' * 3, '\u2028', '\u3000', '\x00', '\ufeff',
                           '\U0001f469\u200d\U0001f680', '<|endoftext|>', 'é' * 1000, '\ud800', '\udfff\ud800', -1, 10**30, 1e308, 0]
    key = rng.choice(list(row))
    how = rng.integers(22)
    if how == 0:
        row[key] = odd[rng.integers(len(odd))]
    elif how == 1:
        del row[key]
    elif how == 2:
        row[str(key).upper()] = row.pop(key)
    elif how == 3:
        other = rng.choice(list(row))
        row[key], row[other] = row[other], row[key]
    elif how == 4:
        row = dict(reversed(row.items())) | {'extra': odd[rng.integers(len(odd))], '': 1}
    elif how == 5 and isinstance(row[key], list):
        row[key], at, new = list(row[key]), rng.integers(len(row[key])), odd[rng.integers(len(odd))]
        if isinstance(row[key][at], dict) and rng.random() < 0.8:
            field = str(rng.choice(['role', 'content', 'name']))
            new = row[key][at] | {field: str(rng.choice(['system', 'user', 'assistant', 'tool'])) if rng.random() < 0.5 else new}
        row[key][at] = new
    elif how == 6 and isinstance(row[key], list):
        row[key] = row[key] + row[key][:1] if rng.random() < 0.5 else row[key][1:]
    elif how == 7:
        row[key] = str(rng.choice(list('a \n1é^'))) * int(rng.choice([1000, 30_000, 1_000_000], p=[0.6, 0.37, 0.03]))
    line = json.dumps(row, ensure_ascii=bool(rng.random() < 0.3)).encode(errors='surrogatepass')
    at = int(rng.integers(len(line) + 1))
    if how == 8:
        line = line[:at] + bytes(rng.integers(0, 256, rng.integers(1, 4), dtype=np.uint8)) + line[at:]
    elif how == 9:
        line = line[:at] + line[at + int(rng.integers(1, 5)):]
    elif how == 10:
        line = line[:at]
    elif how == 11 and at < len(line):
        line = line[:at] + bytes([line[at] ^ 1 << int(rng.integers(8))]) + line[at + 1:]
    elif how == 12:
        deep = int(rng.choice([50, 100_000]))
        opening, closing = [(b'[', b']'), (b'{"a":', b'}')][rng.integers(2)]
        line = line[:-1] + b', "%s": ' % str(rng.choice([key, 'deep'])).encode() + opening * deep + b'1' + closing * deep + b'}'
    elif how == 13:
        number = [b'1' * 5000, b'1e999', b'-Infinity', b'NaN', b'1' * 400, b'0.' + b'3' * 5000, b'-0'][rng.integers(7)]
        line = line[:-1] + b', "%s": %s}' % (str(rng.choice([key, 'number'])).encode(), number)
    elif how == 14:
        line = line[:-1] + b', "%s": "twice"}' % str(key).encode()
    elif how == 15:
        line = [b'\xef\xbb\xbf' + line, b'\xef\xbb\xbf' * 2 + line, line[:at] + b'\xef\xbb\xbf' + line[at:], b'\xff\xfe' + line][rng.integers(4)]
    elif how == 16:
        line = line[:at] + [b'\x00', b'\\u0000', b'\r', b'\xe2\x80\xa8', b'\\ud83d', b'\xed\xa0\x80', b'\xf0\x9f\x98', b'\\', b'"', b'\x85'][
            rng.integers(10)] + line[at:]
    elif how == 17:
        line = [b'', b'   ', b'\t\r', b'\x0c', b'null', b'[]', b'"text"', b'3', b'{}', b'[' * 100_000, b'\xef\xbb\xbf', b'//', b'{' * 50][rng.integers(13)]
    elif how == 18:
        line = line + [b'\r', b' ', b',', b'}', line, b'\x1a', b' \r\r'][rng.integers(7)]
    elif how == 19:
        line = line.replace(b'"', b"'") if rng.random() < 0.5 else line.decode(errors='replace').encode('utf-16')
    elif how == 20:
        line = bytes(rng.integers(0, 256, rng.integers(1, 60), dtype=np.uint8))
    elif how == 21:
        line = b' ' + line + b'\t'
    return line.replace(b'\n', b'\r')


def kept_texts(folder):
    """Every group of a set of bytes, back as texts with its label, and how many rows were dropped."""
    meta, rows = json.loads((folder / 'meta.json').read_text()), []
    for split, info in meta['splits'].items():
        tokens, index = np.fromfile(folder / f'{split}.bin', info['dtype']), np.load(folder / f'{split}.idx.npy')
        labels = np.load(folder / f'{split}.labels.npy').tolist() if 'labels_sha256' in info else [None] * len(index)
        for bounds, label in zip(index, labels):
            pieces = [tokens[a:b] for a, b in zip(bounds, bounds[1:])]
            rows.append(([bytes(piece[piece < 256].tolist()).decode() for piece in pieces], label))
    return rows, sum(sum(info['dropped'].values()) for info in meta['splits'].values())


def lines(seed, rng, base, cwd, new, n=250):
    kind = ('pairs', 'rankings', 'unpaired', 'documents', 'conversations', 'demonstrations', 'scored')[seed % 7]
    content, mutated = [], 0
    while mutated < n:
        row, good = good_row(kind, rng, len(content)), len(content) < 2 or rng.random() < 0.2
        mutated += not good
        content.append(json.dumps(row).encode() if good else mutate(row, rng))
    cwd.mkdir()
    (cwd / 'own.jsonl').write_bytes(b'\n'.join(content) + b'\n' * int(rng.integers(2)))
    content = b'\n'.join(content).split(b'\n')
    verdicts = [expected(kind, line) for line in content]
    good, bad, close = [v for v in verdicts if v], [i for i, v in enumerate(verdicts, 1) if v is False], verdicts.count(())
    command = f'prepare_prefs --name=own --{"documents" if kind == "documents" else "source"}=own.jsonl --tokenizer=bytes --max_length=3000000 --max_prompt_length=1000000'.split()
    command += ['--min_gap=1'] * (kind == 'scored')
    done = run([*command, '--max_bad_lines=100000'], cwd, new, limit=60)
    what = f'{kind}, {len(good)} good and {len(bad)} bad lines: '
    if done.status or 'Traceback' in done.err or 'panicked' in done.err:
        return what + tail(done), mutated
    kept, dropped = kept_texts(cwd / 'data/own')
    if sorted(kept, key=repr) != sorted(good, key=repr) or dropped != len(bad) + close:
        lost = [repr(row)[:150] for row in good if row not in kept] + [repr(row)[:150] for row in kept if row not in good]
        return what + f'kept {len(kept)}, dropped {dropped}; such as {lost[:3]}', mutated
    before = snapshot(cwd)
    done = run(command, cwd, new, limit=60)
    named = [int(number) for number in re.findall(r'^(?:error: )?own\.jsonl line (\d+): ', done.err, re.M)]
    if bad and (done.status != 1 or named != bad[:10] or not done.err.rstrip().endswith('with --max_bad_lines=N)') or snapshot(cwd) != before):
        return what + f'none allowed, names {named}, {tail(done)}', mutated
    return '', mutated


# -----------------------------------------------------------------------------
# code and foreign content

class Payload:
    """Unpickled by pickle, it makes a file."""
    def __reduce__(self):
        return exec, ("open('code-was-run', 'w').close()",)


class Foreign:
    """A class that no checkpoint of ours holds."""


def as_checkpoint(path, content):
    """Put bytes, or what torch.save makes of an object, in place of a checkpoint, with the hash that fits."""
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    path.with_suffix('.json').write_text(json.dumps({'step': int(path.stem[5:]), 'sha256': sha256_file(path)}))


def zipped(pickled):
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w') as z:
        for name, content in (('data.pkl', pickled), ('version', b'3\n'), ('byteorder', b'little'), ('data/0', b'\0' * 64)):
            z.writestr(f'archive/{name}', content)
    return file.getvalue()


def legacy(value):
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def scripted():
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), file)
    return file.getvalue()


CHECKPOINTS = {     # what stands in place of a checkpoint: a function of the real one's state
    'a pickle with code': lambda state: pickle.dumps(Payload()),
    'code in a pickle of protocol 0': lambda state: pickle.dumps(Payload(), 0),
    'code beside the weights': lambda state: state | {'extra': Payload()},
    'code in the config': lambda state: state | {'config': Payload()},
    'code in the optimizer': lambda state: state | {'optimizer': [Payload()]},
    'code in the legacy format': lambda state: legacy(state | {'extra': Payload()}),
    'a zip with code in its pickle': lambda state: zipped(pickle.dumps(Payload(), 2)),
    'a zip that is no checkpoint': lambda state: zipped(b'hello'),
    'a class of somebody': lambda state: state | {'extra': Foreign()},
    'a whole model object': lambda state: torch.nn.Linear(2, 2),
    'TorchScript': lambda state: scripted(),
    'weights alone': lambda state: state['model'],
    'a list': lambda state: [1, 2],
    'a later format': lambda state: state | {'format': 99},
    'another step': lambda state: state | {'step': 1000},
    'a step that is no number': lambda state: state | {'step': 'x'},
    'no step': lambda state: {k: v for k, v in state.items() if k != 'step'},
    'a model_config that is a list': lambda state: state | {'model_config': [1]},
    'no heads': lambda state: state | {'model_config': state['model_config'] | {'n_head': 0}},
    'a negative width': lambda state: state | {'model_config': state['model_config'] | {'n_embd': -16}},
    'weights of other shapes': lambda state: state | {'model': {k: v[:1] for k, v in state['model'].items()}},
    'an optimizer that is none': lambda state: state | {'optimizer': {}},
    'weights that are no tensors': lambda state: state | {'model': {k: 1 for k in state['model']}},
    'text': lambda state: b'hello',
    'gzip': lambda state: b'\x1f\x8b' + b'\0' * 50,
}


def sealed(folder, **changes):
    write_meta(str(folder), prepare_prefs.read_meta(str(folder)) | changes)


def replaced(folder, file, content, key):
    """Put bytes in place of a file of a data set, with the hash that fits."""
    (folder / file).write_bytes(content)
    meta = prepare_prefs.read_meta(str(folder))
    meta['splits'][file.split('.')[0]][key] = sha256_file(folder / file)
    write_meta(str(folder), meta)


def object_array():
    file = io.BytesIO()
    np.save(file, np.array([Payload()], object), allow_pickle=True)
    return file.getvalue()


def odd_tokenizer(folder, **changes):
    saved = json.loads((folder / 'tokenizer.json').read_text())
    (folder / 'tokenizer.json').write_text(json.dumps(saved | changes))
    meta = json.loads((folder / 'meta.json').read_text())
    meta.pop('sha256')
    write_meta(str(folder), meta)


def pickled_hf(cwd):
    (cwd / 'hf/model.safetensors').unlink()
    torch.save({'wte.weight': Payload()}, cwd / 'hf/pytorch_model.bin')


def pickled_cache(cwd):
    np.savez(cwd / 'out/own/reference-train.npz', key=np.array([Payload()], object), logps=np.array([Payload()], object))


def hf_config(cwd, **changes):
    path = cwd / 'hf/config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


FILES = {           # other files: (the command that reads them, what is done to the folder)
    'an index with code': ('dpo', lambda cwd: replaced(cwd / 'data/own', 'train.idx.npy', object_array(), 'idx_sha256')),
    'labels with code': ('kto', lambda cwd: replaced(cwd / 'data/likes', 'train.labels.npy', object_array(), 'labels_sha256')),
    'an index that is text': ('dpo', lambda cwd: replaced(cwd / 'data/own', 'val.idx.npy', b'hello', 'idx_sha256')),
    'an empty bin': ('dpo', lambda cwd: replaced(cwd / 'data/own', 'train.bin', b'', 'bin_sha256')),
    'a bin of another length': ('dpo', lambda cwd: replaced(cwd / 'data/own', 'train.bin', b'\0' * 200, 'bin_sha256')),
    'a tokenizer of no tokens': ('sample', lambda cwd: odd_tokenizer(cwd / 'data/own', tokens=[])),
    'a tokenizer of numbers': ('sample', lambda cwd: odd_tokenizer(cwd / 'data/own', tokens=[1, 2])),
    'a tokenizer without a pattern': ('sample', lambda cwd: odd_tokenizer(cwd / 'data/own', pattern='(')),
    'a tokenizer whose name is a path': ('sample', lambda cwd: sealed(cwd / 'data/own', tokenizer='../../pairs.jsonl')),
    'a tokenizer that is not there': ('dpo', lambda cwd: sealed(cwd / 'data/own', tokenizer='no-such-tokenizer')),
    'splits that are a list': ('dpo', lambda cwd: sealed(cwd / 'data/own', splits=[])),
    'a split that is a number': ('dpo', lambda cwd: sealed(cwd / 'data/own', splits={'train': 1, 'val': 2})),
    'a type with code': ('dpo', lambda cwd: (meta := prepare_prefs.read_meta(str(cwd / 'data/own')), meta['splits']['train'].update(dtype='object'),
                                             write_meta(str(cwd / 'data/own'), meta))),
    'max_length that is text': ('sft', lambda cwd: sealed(cwd / 'data/own', max_length='long')),
    'a vocabulary that is text': ('sft', lambda cwd: sealed(cwd / 'data/own', vocab_size='many')),
    'a template that is a number': ('sample', lambda cwd: sealed(cwd / 'data/own', template=7)),
    'meta.json that is a list': ('dpo', lambda cwd: (cwd / 'data/own/meta.json').write_text('[1]')),
    'meta.json, deeply nested': ('dpo', lambda cwd: (cwd / 'data/own/meta.json').write_text('[' * 100_000)),
    'a pickled Hugging Face model': ('hf', pickled_hf),
    'a Hugging Face config that is a list': ('hf', lambda cwd: (cwd / 'hf/config.json').write_text('[]')),
    'a Hugging Face config of no heads': ('hf', lambda cwd: hf_config(cwd, n_head=0)),
    'a Hugging Face config of words': ('hf', lambda cwd: hf_config(cwd, n_embd='wide', n_layer=None)),
    'a Hugging Face config, negative': ('hf', lambda cwd: hf_config(cwd, n_layer=-1)),
}
HARMLESS = {        # code that nobody asks for: the result is as ever
    'a reference cache with code': ('dpo', pickled_cache),
    'remote code in a Hugging Face config': ('hf', lambda cwd: (hf_config(cwd, auto_map={'AutoModelForCausalLM': 'evil.Model'}),
                                                                (cwd / 'hf/evil.py').write_text("open('code-was-run', 'w')"))),
    'code as text in a step file': ('dpo', lambda cwd: (path := cwd / START[1]) and path.write_text(json.dumps(
        json.loads(path.read_text()) | {'config': "__import__('os').system('touch code-was-run')"}))),
}
NOT_RESUMED = {'a model_config that is a list', 'no heads', 'a negative width'}      # a run that resumes has it from where it began
RESUMED = {'an optimizer that is none'}                                              # nobody else reads that
CODE = ([(reader, what) for what in CHECKPOINTS for reader in ('dpo', 'resume', 'sample', 'draw')
         if what not in (NOT_RESUMED if reader == 'resume' else RESUMED)] +
        [(reader, what) for what, (reader, _) in (FILES | HARMLESS).items()])


def code(seed, rng, base, cwd, new):
    reader, what = CODE[seed % len(CODE)]
    command, folder = COMMANDS[reader]
    copy(base, cwd)
    if what in CHECKPOINTS:
        places = RUN[::2] if reader == 'resume' else [RUN[0] if reader == 'sample' else START[0]]
        for path in places:         # a run that resumes would go back to the one before
            as_checkpoint(cwd / path, CHECKPOINTS[what](read_checkpoint(str(base / path))))
    else:
        (FILES | HARMLESS)[what][1](cwd)
    before = snapshot(cwd)
    done = run(command, cwd, new)
    what = f'{reader}, {what}: '
    if 'code-was-run' in snapshot(cwd):
        return what + 'THE CODE WAS RUN', 0
    if what.split(', ', 1)[1][:-2] in HARMLESS:
        wrong = tail(done) if done.status else differs(result(cwd, folder, done), undisturbed(base, reader)['result'])
        return wrong and what + wrong, 0
    if not one_line(done):
        return what + tail(done), 0
    return differs(before, snapshot(cwd)) and what + f'changed {differs(before, snapshot(cwd))}', 1


# -----------------------------------------------------------------------------
# the campaign

CLASSES = {         # name: (function, trials, what its second number counts)
    'kill': (kill, 50, 'kills'),
    'rename': (rename, 120, 'kills'),
    'full': (full, 60, 'refused'),
    'damage': (damage, 300, 'refused'),
    'lines': (lines, 40, 'lines'),
    'code': (code, len(CODE), 'refused'),
}


def trial(job):
    """One trial, in a worker. -> dict"""
    name, seed, work = job
    began, cwd = time.perf_counter(), work / f'{name}-{seed}'
    try:
        wrong, n = CLASSES[name][0](seed, np.random.default_rng([list(CLASSES).index(name), seed]), work / 'base', cwd, seed % 8 == 7)
    except Exception:
        wrong, n = traceback.format_exc()[-600:], 0
    shutil.rmtree(cwd, ignore_errors=True)
    for left in work.glob(f'{cwd.name}.*'):
        left.unlink()
    return dict(name=name, seed=seed, wrong=wrong, n=n, seconds=time.perf_counter() - began)


def campaign(names, seed, trials, workers, work):
    """All trials of the classes `names` in the folder `work`, a line a class. -> list of dicts, one a trial"""
    make_base(work / 'base', 1)
    if 'damage' in names:
        make_base(work / 'other', 2)
    results = []
    with multiprocessing.get_context('fork').Pool(workers) as pool:
        for name in names:
            jobs = [(name, seed + i, work) for i in range(min(trials or 10**9, CLASSES[name][1]))]
            with tqdm(total=len(jobs), desc=name, unit=' trials', disable=None, leave=False) as bar:
                for found in pool.imap_unordered(trial, jobs):
                    results.append(found)
                    bar.update()
                    if found['wrong']:
                        tqdm.write(f'{name} FAILED, again with --only={name} --seed={found["seed"]} --trials=1\n    {found["wrong"]}')
            print(row_of(name, results), flush=True)
    return results


def row_of(name, results):
    """A line of the table: class, trials, passed, what it counts, seconds."""
    some = [r for r in results if r['name'] == name]
    count = sum(r['n'] for r in some if not isinstance(r['n'], str))
    unseen = sum(r['n'] == 'unseen' for r in some)
    counted = f'{count:,} {CLASSES[name][2]}' + (f', {unseen} unseen' if unseen else '')
    return f'{name:10}{len(some):>8,}{sum(not r["wrong"] for r in some):>9,}   {counted:26}{sum(r["seconds"] for r in some):>7,.0f} s'


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', choices=CLASSES, help='one class')
    parser.add_argument('--seed', type=int, default=0, help="of the first trial; the others' count on from it")
    parser.add_argument('--trials', type=int, default=0, help='of each class at most; 0 = all')
    parser.add_argument('--workers', type=int, default=os.cpu_count())
    parser.add_argument('--out', default='', help='default: repro/results/faults, where all was run')
    options = parser.parse_args(argv)
    names, began = [options.only] if options.only else list(CLASSES), time.perf_counter()
    head = f'{"class":10}{"trials":>8}{"passed":>9}   {"of which":26}{"of a core":>9}'
    print(f'seed {options.seed}, {options.workers} trials at a time\n{head}', flush=True)
    with tempfile.TemporaryDirectory() as work:
        results = campaign(names, options.seed, options.trials, options.workers, Path(work))
    failed = [r for r in results if r['wrong']]
    table = '\n'.join([head, *(row_of(name, results) for name in names)])
    verdict = f'{len(results) - len(failed):,} of {len(results):,} trials passed, seed {options.seed}, {time.perf_counter() - began:,.0f} s'
    print(f'\n{table}\n{verdict}')
    out = options.out or (str(ROOT / 'repro/results/faults') if not options.only and not options.trials else '')
    if out:
        again = [f'- `--only={r["name"]} --seed={r["seed"]} --trials=1`: {" ".join(r["wrong"].split())}\n' for r in failed]
        Path(out + '.md').write_text(f'# Faults\n\n`python repro/faults.py --seed={options.seed}`; what the classes are says its docstring.\n\n```\n{table}\n```\n\n'
                                     f'{verdict}.\n{"".join(again)}')
        Path(out + '.json').write_text(json.dumps(sorted(results, key=lambda r: (names.index(r['name']), r['seed'])), indent=0) + '\n')
        print(f'written: {out}.md, .json')
    return int(bool(failed))


if __name__ == '__main__':
    sys.exit(main())
