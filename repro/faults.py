"""What happens when things break: a bounded campaign of faults against every stage, with its score.

    python repro/faults.py                                      # all of it
    python repro/faults.py --only=damage --seed=57 --trials=1   # one trial again, as a failure names it

  kill      SIGKILL at random moments, half of them aimed at files being written. A run is killed twice, restarted with
            --resume each time (prepare: the same command), and left to end. Its weights, optimizer, log and data are
            bit for bit those of a run that nobody disturbed. After each kill all finished checkpoints can be read,
            and a data set is the old one, the new one, or refused
  rename    the same, with SIGKILL right before each call that changes a folder (replace, remove, mkdir ...) in turn
  operation the same, right before each of the first 50 file operations of every stage, as python's audit events count
  signal    SIGHUP, SIGTERM or SIGINT in the place of SIGKILL: the stage stops or ends, and what it says of that holds
  both      two stages that write one folder at once: one waits before a file operation, the other one runs meanwhile.
            Who ends with status 0 has made what it makes alone; who does not says who holds the folder
  full      a disk that fills up at a random level: one line, status not 0, and what stood there still stands. Once
            there is room the run goes on to the same end
  damage    a file cut short, with one bit flipped, empty, or swapped with that of another run, and each stage that
            reads it: it refuses with one line and changes nothing, or its result is that of the undamaged file
  lines     mutated JSONL lines among good ones: no traceback, no hang, every bad line counted, every good one kept, by
            an oracle of its own. Then none is allowed, and the first ten are named
  code      checkpoints and data with code or foreign content in them, hashes right: refused in one line, nothing is run
  odd       a table of single cases: closed streams, ranks set by hand, exploded weights, links, FIFOs, long names,
            control characters, sys.exit(0) in files of the user, runs that would be lost or called done

Whatever is done, no trial may hang, grow beyond 4 GB, print a traceback or a control character, or lose what existed.

Stages run for real, in a process of their own that is forked from one which has torch loaded; every eighth trial starts
python anew: with -O, LANG=C and no HOME. A trial depends on its class and seed alone, as far as kills can. The full
disk is a small tmpfs where the user may mount one, else a limit on the size of files. Exit status 1 if anything failed.
Writes <out>.md and .json.

A Hugging Face directory has no hash: a bit flipped inside its weights, or in a number of its config.json, cannot be
seen. Such trials pass and are counted as `unseen`.
"""
import argparse
import collections
import contextlib
import functools
import gzip
import hashlib
import importlib
import io
import json
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import signal
import socket
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
sys.path[:0] = [str(ROOT), str(ROOT / 'repro')]
HANGUP = signal.signal(signal.SIGHUP, signal.SIG_DFL)       # under nohup, too, the stages take it as without
import config                                                                               # noqa: E402
from config import UserError                                                                # noqa: E402
from nanodpo import checkpoint, export                                                      # noqa: E402
from nanodpo.data import Groups, sha256_file, sha256_json                                   # noqa: E402
from sweep import write_json                                                                # noqa: E402
signal.signal(signal.SIGHUP, HANGUP)

MODULES = {name: name for name in ('prepare_prefs', 'sft', 'dpo', 'sample', 'draw_prefs', 'page')}
MODULES['export'] = 'nanodpo.export'
MAINS = {name: importlib.import_module(module).main for name, module in MODULES.items()}    # before any fork
BARE = dict(LC_ALL='C', LANG='C', PYTHONDONTWRITEBYTECODE='', PYTHONPATH=f'{ROOT}:{ROOT}/repro')    # of a new python


def flags(text):
    return text.split()


SMALL = flags('--batch_size=16 --device=cpu --save_interval=1 --eval_interval=2 --log_interval=2 --schedule=constant '
              '--warmup_steps=2')
SFT = ['sft', *flags('--name=own --init_from=scratch --n_layer=1 --n_head=2 --n_embd=16 --dropout=0.1'), *SMALL]
DPO = ['dpo', *flags('--name=own --learning_rate=1e-3 --precompute_ref'), *SMALL]
KTO = ['dpo', *flags('--name=likes --init_from=out/own/sft --loss=kto --learning_rate=1e-3 --max_steps=2'), *SMALL]
HF = ['dpo', *flags('--name=own --init_from=hf --learning_rate=1e-3 --max_steps=2'), *SMALL]
PREPARE = ['prepare_prefs', *flags('--name=own --source=pairs.jsonl --tokenizer=bytes --max_length=64 '
                                   '--max_prompt_length=24 --val_fraction=0.2')]
DRAW = ['draw_prefs', *flags('--name=drawn --source=data/own --policy=out/own/sft --reward=reward.py --num_samples=2 '
                             '--num_prompts=8 --max_new_tokens=4 --device=cpu')]
SAMPLE = ['sample', *flags('--name=own --num_prompts=3 --max_new_tokens=8 --device=cpu')]
EXPORT = ['export', 'out/own/dpo', 'exported']
COMMANDS = {        # what is run in a copy of the base, and what its result is
    'prepare': (PREPARE, 'data/own'),
    'fresh': ([*PREPARE, '--name=drawn'], 'data/drawn'),
    'replace': ([*PREPARE, '--seed=2'], 'data/own'),
    'again': ([*PREPARE, '--seed=3'], 'data/own'),
    'draw': (DRAW, 'data/drawn'),
    'sft': ([*SFT, '--max_steps=8'], 'out/own/sft'),
    'dpo': ([*DPO, '--max_steps=8'], 'out/own/dpo'),
    'resume': ([*DPO, '--max_steps=8', '--resume'], 'out/own/dpo'),
    'kto': (KTO, 'out/likes/dpo'),
    'hf': (HF, 'out/own/dpo'),
    'sample': (SAMPLE, None),
    'export': (EXPORT, 'exported'),
    'export sft': (['export', 'out/own/sft', 'exported'], 'exported'),
    'page': (['page', 'page.html', 'samples.jsonl'], 'page.html'),
    'other sft': ([*SFT, '--max_steps=3', '--seed=2'], 'out/own/sft'),
    'beside': ([*DPO, '--max_steps=5', '--run_name=beside'], 'out/own/beside'),
    'other dpo': ([*DPO, '--max_steps=5', '--beta=0.9'], 'out/own/dpo'),
    'dpo as sft': ([*HF, '--run_name=sft'], 'out/own/sft'),
}
RUNS = 'sft', 'dpo', 'resume', 'beside', 'other sft', 'other dpo', 'dpo as sft'
Done = collections.namedtuple('Done', 'status out err seconds')
MEMORY = 4_000_000          # KB, of any process


# ----------------------------------------------------------------------------------------------------
# running a stage

def behave(command, cwd, tag, new, before):
    """The child: the stage's main as its script would run it, then out."""
    stage, *args = command
    status = 1
    try:
        os.chdir(cwd)
        for fd, name in ((1, 'stdout'), (2, 'stderr')):
            os.dup2(os.open(f'{cwd}{tag}.{name}', os.O_WRONLY), fd)
        sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(fd, 'w', closefd=False), 'utf-8', line_buffering=True)
                                  for fd in (1, 2))
        before()
        if new:
            environment = {key: value for key, value in os.environ.items() if key != 'HOME'} | BARE
            os.execve(sys.executable, [sys.executable, '-O', '-m', MODULES[stage], *args], environment)
        sys.argv = [f'{stage}.py', *args]
        config.run(MAINS[stage])
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
        os._exit(status)


def launch(command, cwd, new=False, before=lambda: None, tag=''):
    """Start a stage in the folder `cwd`. -> its process

    new: by starting python. before: called in the child first. It prints to <cwd><tag>.stdout and .stderr.
    """
    for name in ('stdout', 'stderr'):
        Path(f'{cwd}{tag}.{name}').write_text('')
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        behave(command, cwd, tag, new, before)
    return pid


def finish(pid, cwd, kill=None, limit=120, tag=''):
    """Wait for a process of `launch`. -> Done, of which the status is a word if it broke what none may break

    kill: a function of the seconds so far that says when to SIGKILL. limit: of seconds, on an idle machine; beyond them
    it hangs.
    """
    began = time.perf_counter()
    broken = ''
    while not (ended := os.wait4(pid, os.WNOHANG))[0]:
        if kill and not os.path.getsize(f'{cwd}{tag}.stdout'):
            began = time.perf_counter()         # python is still importing: nothing to break
        seconds = time.perf_counter() - began
        if kill and kill(seconds):
            os.kill(pid, signal.SIGKILL)
            kill = None
        elif seconds > limit * max(1, os.getloadavg()[0] / os.cpu_count()) and not broken:
            broken = 'hang'
            os.kill(pid, signal.SIGKILL)
        time.sleep(2e-4 if kill else 5e-3)
    out, err = (Path(f'{cwd}{tag}.{name}').read_bytes().decode(errors='replace') for name in ('stdout', 'stderr'))
    if ended[2].ru_maxrss > MEMORY:
        broken = f'{ended[2].ru_maxrss / 1e6:.1f} GB'
    elif 'Traceback' in err or 'panicked' in err:
        broken = 'traceback'
    elif control := re.search(r'[\x00-\x08\x0b-\x1f\x7f-\x9f]', out + err):
        broken = f'prints {control[0]!r}'
    return Done(broken or os.waitstatus_to_exitcode(ended[1]), out, err, time.perf_counter() - began)


def run(command, cwd, new=False, kill=None, before=lambda: None, limit=120):
    return finish(launch(command, cwd, new, before), cwd, kill, limit)


def one_line(done):
    """Whether a stage refused as it should: status 1, and one line on stderr."""
    return done.status == 1 and done.err.startswith('error: ') and done.err.count('\n') == 1


def tail(done):
    return f'status {done.status}: {(done.err.strip() or done.out.strip())[-300:]}'


# ----------------------------------------------------------------------------------------------------
# what there is

def snapshot(folder):
    """Every file below a folder with its content's hash."""
    return {str(p.relative_to(folder)): sha256_file(p) for p in sorted(Path(folder).rglob('*')) if p.is_file()}


def digest(value):
    """A hash of nested plain values and tensors, to the bit."""
    if isinstance(value, torch.Tensor):
        content = hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()
        value = (str(value.dtype), tuple(value.shape), content)
    elif isinstance(value, dict):
        value = sorted((repr(k), digest(v)) for k, v in value.items())
    elif isinstance(value, (list, tuple)):
        value = [digest(v) for v in value]
    return hashlib.sha256(repr(value).encode()).hexdigest()


def result(cwd, folder, done):
    """What a run has made, comparable: a data set's files; of sample.py what it printed; of a training run the kept
    checkpoints with their weights and optimizer, and the log but for timing."""
    if folder is None:
        return {'printed': done.out}
    made = Path(cwd, folder)
    if not folder.startswith('out'):
        return snapshot(made) if made.is_dir() else {folder: sha256_file(made)}
    paths = checkpoint.find(str(made))
    older = [Path(path).stem for path in paths[:-2]]        # a kill in `save` may leave one more
    parts = {'files': sorted(p.name for p in made.iterdir() if p.stem not in older)}
    for path in paths[-2:]:
        state = checkpoint.read(path)
        state['config'].pop('resume')
        state.pop('command')            # the resumed run's has --resume
        parts |= {f'{os.path.basename(path)} {key}': digest(value) for key, value in state.items()}
    parts['log'] = []
    for line in (made / 'log.jsonl').read_bytes().splitlines():
        with contextlib.suppress(ValueError):           # a line with a flipped bit: no row, and the log is another one
            parts['log'].append({k: v for k, v in json.loads(line).items() if 'second' not in k})
    return parts


def leftovers(cwd):
    """Temporary files and folders that stayed. A lock of a dead process locks nothing, and the next one tells of it."""
    paths = [p.relative_to(cwd) for p in Path(cwd).rglob('*')]
    return [str(p) for p in paths if re.search(r'\.tmp$|/\.tmp-|nanodpo-', str(p))]


def lost(before, after):
    """The files of which the content is nowhere any more. before, after: snapshots"""
    return [path for path in before if before[path] not in after.values()]


def differs(ours, theirs):
    """'' where two results are the same, else the first things that are not."""
    keys = [k for k in sorted(ours.keys() | theirs.keys()) if ours.get(k) != theirs.get(k)]
    return ', '.join(keys[:4])


# ----------------------------------------------------------------------------------------------------
# the base: what all trials start from, made by the stages

def sentence(rng, low, high):
    return ' ' + ''.join(rng.choice(list('abcde é.')) for _ in range(rng.integers(low, high))) + 'x'


def write_jsonl(path, rows):
    Path(path).write_text(''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows))


REWARD = 'def reward(prompts, responses):\n    return [float(sum(map(ord, r)) % 97) for r in responses]\n'


def make_base(base, seed):
    """Data sets `own` (pairs) and `likes` (unpaired), a finished SFT run, six steps of a DPO run, an exported model."""
    base.mkdir()
    rng = np.random.default_rng(seed)
    write_jsonl(base / 'pairs.jsonl', [
        dict(prompt=f'Q{i}' + sentence(rng, 1, 12), chosen=sentence(rng, 1, 20) + 'w',
             rejected=sentence(rng, 1, 20) + 'l') for i in range(60)])
    write_jsonl(base / 'likes.jsonl', [
        dict(prompt=f'Q{i}', completion=sentence(rng, 1, 20), label=bool(rng.random() < 0.6)) for i in range(60)])
    (base / 'reward.py').write_text(REWARD)
    likes = [flag.replace('own', 'likes').replace('pairs', 'likes') for flag in PREPARE]
    for command in (PREPARE, likes, [*SFT, '--max_steps=4'], [*DPO, '--max_steps=6'], [*SAMPLE, '--json']):
        done = run(command, base)
        assert done.status == 0, tail(done)
    (base / 'samples.jsonl').write_text(done.out)
    export.save_pretrained(checkpoint.load_model(str(base / 'out/own/sft')), str(base / 'hf'))


def copy(base, where):
    shutil.copytree(base, where)
    return where


@functools.cache
def undisturbed(base, name):
    """What a command makes of a copy of the base that nobody disturbs: its result, seconds and numbers of file
    operations, all and those that change a folder. It is done once, by the worker that first asks."""
    file = base.parent / f'undisturbed-{name}.json'
    command, folder = COMMANDS[name]
    if not file.exists():
        cwd = copy(base, base.parent / f'undisturbed-{name}-{os.getpid()}')

        def count():
            at_operation(-1, f'{cwd}.operations', 0)
            at_operation(-1, f'{cwd}.changes', 0, CHANGES)
        done = run(command, cwd, before=count)
        assert done.status == 0, tail(done)
        facts = dict(result=result(cwd, folder, done), seconds=done.seconds)
        facts |= {what: os.path.getsize(f'{cwd}.{what}') for what in ('operations', 'changes')}
        Path(f'{cwd}.json').write_text(json.dumps(facts))
        os.replace(f'{cwd}.json', file)
        shutil.rmtree(cwd)
    return json.loads(file.read_text())


# ----------------------------------------------------------------------------------------------------
# kills

CHANGES = 'os.rename', 'os.remove', 'os.mkdir', 'os.rmdir'
OPERATIONS = 'open', 'os.listdir', 'os.scandir', 'os.truncate', 'os.link', 'os.symlink', 'os.utime', *CHANGES


def at_operation(n, count, number, events=OPERATIONS):
    """From here on this process sends itself the signal `number` right before its n-th operation on files below its
    folder. The file `count` grows by a byte each. events: of python's audit events."""
    counter = os.open(count, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    here = os.getcwd() + os.sep
    seen = []

    def trace(event, args):
        if event in events and isinstance(args[0], (str, bytes)):
            if os.path.abspath(os.fsdecode(args[0])).startswith(here):
                seen.append(event)
                os.write(counter, b'.')
                if len(seen) == n + 1:
                    os.kill(os.getpid(), number)
    sys.addaudithook(trace)


def unreadable(cwd, name, base):
    """'' where after a kill all that is finished can be read, else what cannot."""
    folder = COMMANDS[name][1]
    if folder is None or not (cwd / folder).exists():
        return ''
    made = cwd / folder
    if folder == 'page.html':
        return differs({folder: sha256_file(made)}, undisturbed(base, name)['result']) and 'half a page'
    if folder == 'exported':
        if snapshot(made) == undisturbed(base, name)['result']:
            return ''
        try:
            checkpoint.load_model(str(made))
        except UserError:
            return ''
        return 'a half-written export is read as whole'
    if folder.startswith('data'):
        now = {k: v for k, v in snapshot(made).items() if not k.startswith('.tmp-')}
        if now in (snapshot(base / folder), undisturbed(base, name)['result'], {}):
            return ''
        try:
            for split in ('train', 'val'):
                Groups(str(made), split)
        except UserError:
            return ''           # neither old nor new, and refused
        return 'a mixed set is read as whole'
    paths = checkpoint.find(str(made))
    try:
        for path in paths:
            checkpoint.read(path)
    except UserError as error:
        return error.message
    if name == 'resume' and not paths:
        return 'no checkpoint is left'
    for cache in (cwd / 'out/own').glob('reference-*.npz'):
        with np.load(cache) as file:
            file['logps']
    return ''


def again(command):
    """The command that goes on after a kill."""
    return [*command, '--resume'] if command[0] in ('sft', 'dpo') and '--resume' not in command else command


def aimed(rng, cwd, folder, seconds):
    """A function that says when to kill: at a random time, or a few milliseconds after some temporary file appears."""
    if rng.random() < 0.5:
        at = rng.uniform(0, seconds)
        return lambda now: now > at
    nth = int(rng.integers(1, 7))
    delay = float(rng.choice([0, rng.uniform(0, 5e-3)]))
    pattern = '*.tmp'
    if folder.startswith('data'):
        pattern, nth = '.tmp-*/meta.json', 1
    seen = dict(count=0, there=False, at=0.0)

    def now_is_the_time(now):
        there = any((cwd / folder).glob(pattern))
        seen['count'] += there and not seen['there']
        seen['there'] = there
        if seen['count'] >= nth and not seen['at']:
            seen['at'] = now
        return seen['at'] and now >= seen['at'] + delay
    return now_is_the_time


def to_the_end(cwd, name, base, new, but=()):
    """Run on until the end, undisturbed. -> '' or what is wrong with the result, but for some of its parts"""
    command, folder = COMMANDS[name]
    done = run(again(command), cwd, new)
    if folder == 'exported' and one_line(done) and 'is not empty: export into' in done.err:
        shutil.rmtree(cwd / folder)
        done = run(command, cwd, new)
    if done.status:
        return f'does not go on: {tail(done)}'
    made = result(cwd, folder, done) | dict.fromkeys(but)
    wrong = differs(made, undisturbed(base, name)['result'] | dict.fromkeys(but))
    if wrong:
        return f'not what an undisturbed run makes: {wrong}'
    return ', '.join(f'{left} stays' for left in leftovers(cwd))


def start(name, base, cwd):
    """A copy of the base for a command that is to be killed: a new training run has no older one in its way."""
    copy(base, cwd)
    if name in ('sft', 'dpo'):
        shutil.rmtree(cwd / COMMANDS[name][1])


def kill(seed, rng, base, cwd, new):
    name = ('sft', 'dpo', 'replace', 'resume', 'draw')[seed % 5]
    command, folder = COMMANDS[name]
    expected = undisturbed(base, name)
    start(name, base, cwd)
    kills = tries = 0
    while kills < 2 and tries < 30:
        tries += 1
        done = run(again(command) if kills else command, cwd, new, kill=aimed(rng, cwd, folder, expected['seconds']))
        if done.status == -signal.SIGKILL:
            kills += 1
            if wrong := unreadable(cwd, name, base):
                return f'{name}, after a kill: {wrong}', kills
            continue
        if wrong := tail(done) if done.status else differs(result(cwd, folder, done), expected['result']):
            return f'{name}, restarted: {wrong}', kills
        shutil.rmtree(cwd)              # it was faster than the kill
        start(name, base, cwd)
    wrong = to_the_end(cwd, name, base, new)
    return wrong and f'{name}: {wrong}', kills


def interrupted(name, n, number, events, base, cwd, new):
    """Send a signal to a command before its n-th operation, then let it go on. -> '' or what is wrong, its signals"""
    command, folder = COMMANDS[name]
    start(name, base, cwd)
    before = snapshot(cwd)
    done = run(command, cwd, before=lambda: at_operation(n, f'{cwd}.count', number, events))
    what = f'{name}, {signal.Signals(number).name} before operation {n}: '
    if done.status == 0:                    # a fresh run has one or two operations fewer
        wrong = differs(result(cwd, folder, done), undisturbed(base, name)['result'])
        return wrong and what + f'status 0, but {wrong}', 0
    ways = {-number} if number == signal.SIGKILL else {-number, 128 + number, 1}
    if done.status not in ways or done.err.count('\n') > 1 or done.status == 1 and not one_line(done):
        return what + tail(done), 1
    if done.status > 1 and not re.search(r'saved at step \d', done.out):
        return what + 'it says that it has saved nothing', 1
    after = snapshot(cwd)
    changed = [path for path in before if before[path] != after.get(path) and not path.startswith(str(folder))]
    but = ['log'] if done.status > 1 else []        # the step that a signal ends is not evaluated
    wrong = changed and f'changed {changed}' or unreadable(cwd, name, base) or to_the_end(cwd, name, base, new, but)
    return wrong and what + wrong, 1


def rename(seed, rng, base, cwd, new):
    names = ('replace', 'sft', 'dpo', 'resume')
    name = names[seed % len(names)]
    n = seed // len(names) % undisturbed(base, name)['changes']
    return interrupted(name, n, signal.SIGKILL, CHANGES, base, cwd, new)


STAGES = 'fresh', 'replace', 'draw', 'sft', 'dpo', 'resume', 'sample', 'export', 'page'


def operation(seed, rng, base, cwd, new):
    n, which = divmod(seed, len(STAGES))
    return interrupted(STAGES[which], n, signal.SIGKILL, OPERATIONS, base, cwd, new)


STOPPED = [(name, number) for name in STAGES for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT)]


def stop(seed, rng, base, cwd, new):
    name, number = STOPPED[seed % len(STOPPED)]
    n = int(rng.integers(undisturbed(base, name)['operations']))
    return interrupted(name, n, number, OPERATIONS, base, cwd, new)


# ----------------------------------------------------------------------------------------------------
# two at once

PAIRS = [       # who waits before an operation, and who runs meanwhile
    ('replace', 'again'), ('again', 'replace'), ('fresh', 'draw'), ('draw', 'fresh'), ('draw', 'draw'),
    ('sft', 'other sft'), ('other sft', 'sft'), ('sft', 'dpo as sft'), ('dpo as sft', 'sft'),
    ('dpo', 'other dpo'), ('other dpo', 'dpo'), ('dpo', 'resume'), ('resume', 'dpo'), ('resume', 'resume'),
    ('dpo', 'beside'), ('export', 'export sft'), ('export sft', 'export'), ('page', 'page'),
]
HELD = 'is in use by process|is not empty|page.html cannot be written'       # what the one says that gives way
PLACES = 8      # before which operations: so many, spread over all


def both(seed, rng, base, cwd, new):
    names = PAIRS[seed % len(PAIRS)]
    copy(base, cwd)
    for cache in (cwd / 'out/own').glob('reference-*'):
        cache.unlink()                          # both write it
    n = int((seed // len(PAIRS) + 0.5) / PLACES * undisturbed(base, names[0])['operations'])
    pid = launch(COMMANDS[names[0]][0], cwd, tag='-first',
                 before=lambda: at_operation(n, f'{cwd}.count', signal.SIGSTOP))
    os.waitid(os.P_PID, pid, os.WEXITED | os.WSTOPPED | os.WNOWAIT)
    meanwhile = run(COMMANDS[names[1]][0], cwd, new)
    os.kill(pid, signal.SIGCONT)
    dones = list(zip(names, [finish(pid, cwd, tag='-first'), meanwhile]))
    what = f'{names[0]} waits before operation {n} for {names[1]}: '
    for name, done in dones:
        if done.status and not (one_line(done) and re.search(HELD, done.err)):
            return what + f'{name}: {tail(done)}', 0
    ended = [(name, done) for name, done in dones if done.status == 0]
    wrong = all_is_there(base, cwd, names, ended) or ', '.join(leftovers(cwd))
    return wrong and what + f'{len(ended)} ended, {wrong}', len(dones) - len(ended)


def all_is_there(base, cwd, names, ended):
    """'' where what each ended run makes is there, and what was there before, else what is not."""
    expected = [(name, undisturbed(base, name)['result']) for name, _ in ended]
    folder = COMMANDS[names[0]][1]
    if names[0] not in RUNS:                # the last one replaces the other
        made = result(cwd, folder, None)
        return '' if made in [content for _, content in expected] else f'{folder} is of neither'
    paths = sorted((cwd / folder).parent.glob(f'{Path(folder).name}*'))         # an earlier run has a number
    found = [result(cwd, str(path.relative_to(cwd)), None) for path in paths]
    for other in {COMMANDS[name][1] for name in names} - {folder}:
        found.append(result(cwd, other, None))
    if (base / folder).exists() and 'resume' not in names:
        expected.append(('the earlier run', result(base, folder, None)))
    return ', '.join(f'{name} is lost' for name, content in expected if content not in found)


# ----------------------------------------------------------------------------------------------------
# a full disk

def resize(cwd, size):
    subprocess.run(['mount', '-o', f'remount,size={size}', str(cwd)], check=True)


def full(seed, rng, base, cwd, new):
    name = ('sft', 'dpo', 'replace', 'resume', 'draw')[seed % 5]
    cwd.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=100m', 'tmpfs', str(cwd)]
    mounted = subprocess.run(mount, stderr=subprocess.DEVNULL).returncode == 0
    try:
        room = int(rng.uniform(0, 40_000 if COMMANDS[name][1].startswith('data') else 250_000))
        wrong, refused = fill_up(name, base, cwd, new, room, mounted)
        return wrong and f'{name} with {room:,} bytes left: {wrong}', refused
    finally:
        if mounted:
            subprocess.run(['umount', '-l', str(cwd)], check=True)


def fill_up(name, base, cwd, new, room, mounted):
    """Run a command with `room` bytes left, then with enough. -> '' or what is wrong, whether it was refused"""
    command, folder = COMMANDS[name]
    shutil.copytree(base, cwd, dirs_exist_ok=True)
    if name in ('sft', 'dpo'):
        shutil.rmtree(cwd / folder)
    if name == 'dpo':
        for cache in (cwd / 'out/own').glob('reference-*'):
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
            return tail(done), 0
        lost = [k for k in before if before[k] != after.get(k)]
        if folder.startswith('out'):
            lost = [k for k in lost if not k.startswith(folder)]
        if lost or leftovers(cwd):
            return f'changed {lost}, left {leftovers(cwd)}', 0
        if wrong := unreadable(cwd, name, base):
            return wrong, 0
        if mounted:
            resize(cwd, '100m')
    wrong = to_the_end(cwd, name, base, new)
    return wrong and f'then room: {wrong}', int(done.status != 0)


# ----------------------------------------------------------------------------------------------------
# damaged files

DATA = [f'data/own/{file}' for file in ('train.bin', 'val.bin', 'train.idx.npy', 'val.idx.npy', 'tokenizer.json',
                                        'meta.json')]
LABELS = ['data/likes/train.labels.npy', 'data/likes/val.labels.npy']
LIKES = [path.replace('own', 'likes') for path in DATA] + LABELS
START = ['out/own/sft/step-000004.pt', 'out/own/sft/step-000004.json']
RUN = [f'out/own/dpo/step-{step}.{end}' for step in ('000006', '000005') for end in ('pt', 'json')]
CACHE = ['out/own/reference-train.npz', 'out/own/reference-val.npz']
READS = {
    'sft': DATA,
    'dpo': DATA + START + CACHE,
    'resume': DATA + START + CACHE + RUN + ['out/own/dpo/log.jsonl'],
    'kto': LIKES,
    'hf': ['hf/config.json', 'hf/model.safetensors'],
    'sample': DATA + START + RUN[:2],
    'prepare': DATA,
    'draw': DATA + START,
}
HARMS = 'cut', 'flip', 'empty', 'swap', 'pipe', 'folder'
WRITTEN = {('prepare', path) for path in DATA[:-1]} | {('resume', path) for path in RUN}
CELLS = [(name, path, how) for name, paths in READS.items() for path in paths for how in HARMS
         if how != 'folder' or (name, path) not in WRITTEN]     # no folder where it writes a file


def harm(path, how, rng, other):
    """Damage a file. -> a word on where"""
    content = bytearray(path.read_bytes())
    if how == 'cut':
        at = int(rng.integers(len(content)))
        path.write_bytes(content[:at])
        return f'cut at {at}'
    if how == 'flip':
        at = int(rng.integers(len(content)))
        bit = int(rng.integers(8))
        content[at] ^= 1 << bit
        path.write_bytes(content)
        return f'bit {bit} of byte {at} flipped'
    if how in ('pipe', 'folder'):
        path.unlink()
        os.mkfifo(path) if how == 'pipe' else path.mkdir()
        return f'is a {how}'
    path.write_bytes(b'' if how == 'empty' else other.read_bytes())
    return 'empty' if how == 'empty' else 'of another run'


def damage(seed, rng, base, cwd, new):
    name, path, how = CELLS[seed % len(CELLS)]
    command, folder = COMMANDS[name]
    copy(base, cwd)
    what = f'{name}, {path} {harm(cwd / path, how, rng, base.parent / "other" / path)}: '
    before = snapshot(cwd)
    done = run(command, cwd, new, limit=60)
    if done.status:
        changed = differs(before, snapshot(cwd))
        wrong = (changed and f'changed {changed}') if one_line(done) else tail(done)
        return wrong and what + wrong, 1
    wrong = differs(result(cwd, folder, done), undisturbed(base, name)['result'])
    if path.endswith('log.jsonl') and wrong == 'log':
        wrong = ''                      # what cannot be read of it is lost; nothing depends on it
    if wrong and name == 'hf':
        return '', 'unseen'
    if not wrong and name == 'resume' and path == RUN[0] and 'refused: ' not in done.out:
        wrong = 'the run does not say that it went back'
    return wrong and what + f'accepted, and its result is another one: {wrong}', 0


# ----------------------------------------------------------------------------------------------------
# mutated lines

KINDS = 'pairs', 'rankings', 'unpaired', 'documents', 'conversations', 'demonstrations', 'translated'
TRANSLATE = '''name = 'own'


def row(raw):
    if not isinstance(raw, dict):
        return raw
    if type(raw.get('gap')) in (int, float) and raw['gap'] < 1:
        return None
    return {'prompt': raw.get('question'), 'chosen': raw.get('good'), 'rejected': raw.get('bad')}
'''


def good_row(kind, rng, i):
    text = functools.partial(sentence, rng, 1, 30)
    prompt = f'Q{i}' + text()
    if kind == 'documents':
        return dict(text=prompt)
    if kind == 'pairs':
        return dict(prompt=prompt, chosen=text() + 'w', rejected=text() + 'l')
    if kind == 'translated':
        gap = float(rng.choice([0.5, 1.25, 2.5])) if i > 1 else 2
        return dict(question=prompt, good=text() + 'w', bad=text() + 'l', gap=gap)
    if kind == 'conversations':
        return good_conversations(rng, prompt, text)
    if kind == 'demonstrations':
        return dict(prompt=prompt, completion=text())
    if kind == 'rankings':
        row = dict(prompt=prompt, responses=[text() + mark for mark in 'abc'])
        return row | (dict(scores=rng.permutation(3).tolist()) if rng.random() < 0.5 else {})
    return dict(prompt=prompt, completion=text(), label=bool(rng.random() < 0.5))


def good_conversations(rng, prompt, text):
    """A pair of which the prompt, the sides or both are messages."""
    roles = ['system'] * int(rng.integers(2)) + ['user', 'assistant'] * int(rng.integers(3)) + ['user']
    before = [dict(role=role, content=prompt + text()) for role in roles]
    chosen, rejected = (dict(role='assistant', content=text() + mark) for mark in 'wl')
    how = rng.integers(5)
    if how < 3:                     # whole conversations, with or without their beginning or a string in `prompt`
        row = [{}, dict(prompt=before), dict(prompt=text())][how]
        return row | dict(chosen=before + [chosen], rejected=before + [rejected])
    if how == 3:
        return dict(prompt=before, chosen=[chosen], rejected=[rejected] if rng.random() < 0.5 else rejected['content'])
    return dict(prompt=prompt, chosen=[chosen], rejected=[rejected])


def is_text(value, blank=False):
    """The oracle's: a string that can be written down, and holds something."""
    return isinstance(value, str) and not any('\ud800' <= c <= '\udfff' for c in value) and bool(blank or value.strip())


def expected(kind, line):
    """What the documented format says of a line, bytes.

    None of a blank one, False of a bad one, () of one that is left out and nobody's mistake, else [prompt, response,
    ...] and the label. Written from the docstring of nanodpo/rows.py alone.
    """
    if not line.strip(b' \t\r\n\v\f'):
        return None
    try:
        row = json.loads(line.decode('utf-8').removeprefix('\ufeff'))
    except (ValueError, RecursionError):
        return False
    if kind == 'documents' and isinstance(row, str):
        return is_text(row) and (['', row], None)
    if not isinstance(row, dict):
        return False
    if kind == 'documents':
        return is_text(row.get('text')) and (['', row['text']], None)
    if kind == 'conversations':
        return expected_of_messages(row)
    if kind == 'translated':
        return expected_of_translated(row)
    if not is_text(row.get('prompt'), blank=True):
        return False
    if kind == 'unpaired':
        label = str(row.get('label')).strip().lower()
        good = is_text(row.get('completion')) and label in ('true', 'false', '1', '0')
        return good and ([row['prompt'], row['completion']], label in ('true', '1'))
    if kind == 'demonstrations':
        return is_text(row.get('completion')) and 'label' not in row and ([row['prompt'], row['completion']], None)
    responses = [row.get('chosen'), row.get('rejected')] if kind == 'pairs' else row.get('responses')
    count = 2 if kind == 'pairs' else 3
    if not isinstance(responses, list) or len(responses) != count or not all(map(is_text, responses)):
        return False
    if len(set(responses)) < count:
        return False
    if kind == 'rankings' and 'scores' in row:
        scores = row['scores']
        if not isinstance(scores, list) or any(type(s) not in (int, float) for s in scores):
            return False
        if any(s != s or abs(s) == np.inf for s in scores):
            return False
        if len(scores) != 3 or len(set(scores)) < 3:
            return False
        responses = [responses[i] for i in sorted(range(3), key=lambda i: scores[i], reverse=True)]
    return [row['prompt'], *responses], None


def expected_of_translated(row):
    """expected, of what TRANSLATE reads: a blank or a repeated response is nobody's mistake there."""
    if type(row.get('gap')) in (int, float) and row['gap'] < 1:
        return ()
    texts = [row.get('question'), row.get('good'), row.get('bad')]
    prompt, chosen, rejected = texts
    if not is_text(prompt, blank=True):
        return False
    for text in (chosen, rejected):
        if not is_text(text, blank=True):
            return False
        if not is_text(text):
            return ()
    return () if chosen == rejected else (texts, None)


def turns_of(value, role):
    """[(role, content), ...] of messages or of what `role` says; None where it is neither."""
    if isinstance(value, str):
        return [(role, value)] if is_text(value, blank=True) else None
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list) or not value:
        return None
    turns = []
    for message in value:
        known = isinstance(message, dict) and isinstance(message.get('role'), str)
        role = message['role'].strip().lower() if known else ''
        if role not in ('system', 'user', 'assistant', 'tool') or not is_text(message.get('content'), blank=True):
            return None
        turns.append((role, message['content']))
    return turns


def expected_of_messages(row):
    """expected, of an object of pairs that are conversations, or answers to one."""
    prompt = row.get('prompt')
    before = [] if prompt is None else turns_of(prompt, 'user')
    sides = [turns_of(row.get(key), 'assistant') for key in ('chosen', 'rejected')]
    if before is None or None in sides:
        return False
    if prompt is None:                      # then what is rejected may be an answer alone
        before = sides[0][:-1]
    asked = [content.strip() for _, content in before]
    sides = [before + side if side[0][0] == 'assistant' else side for side in sides]
    for side in sides:
        said = '\n'.join(content for _, content in side[:-1])
        if prompt is not None and not all(content in said for content in asked):
            return False
        if side[-1][0] == 'tool':
            return ()
        roles = [role for role, _ in side if role != 'tool']
        roles = roles[roles[0] == 'system':]
        if not roles or roles != ['user', 'assistant'] * (len(roles) // 2):
            return False
        if side[:-1] != sides[0][:-1]:
            return ()
    if not all(side[-1][1].strip() for side in sides) or sides[0][-1] == sides[1][-1]:
        return False
    if any(role == 'tool' for role, _ in sides[0]):
        return ()

    def after(content):
        return content if content[:1].isspace() else ' ' + content
    text = ''
    for role, content in sides[0][:-1]:
        text += {'system': content, 'user': f'\n\nHuman: {content}\n\nAssistant:', 'assistant': after(content)}[role]
    framed = isinstance(prompt, str) and prompt.startswith('\n\nHuman: ') and prompt.endswith('\n\nAssistant:')
    if framed and sides[0][:-1] == before:
        text = prompt
    return [text, *(after(side[-1][1]) for side in sides)], None


ODD = [None, True, 3, 2.5, [], {}, '', ' ', '\n\t', ['x'], {'a': 'b'}, 'x' * 3, '\u2028', '\u3000', '\x00', '\ufeff',
       '\U0001f469\u200d\U0001f680', '<|endoftext|>', 'é' * 1000, '\ud800', '\udfff\ud800', -1, 10**30, 1e308, 0]
NUMBERS = [b'1' * 5000, b'1e999', b'-Infinity', b'NaN', b'1' * 400, b'0.' + b'3' * 5000, b'-0']
INSIDE = [b'\x00', b'\\u0000', b'\r', b'\xe2\x80\xa8', b'\\ud83d', b'\xed\xa0\x80', b'\xf0\x9f\x98', b'\\', b'"',
          b'\x85']
WHOLE = [b'', b'   ', b'\t\r', b'\x0c', b'null', b'[]', b'"text"', b'3', b'{}', b'[' * 100_000, b'\xef\xbb\xbf', b'//',
         b'{' * 50]
BOM = b'\xef\xbb\xbf'


def pick(rng, values):
    return values[rng.integers(len(values))]


def mutate_object(how, row, key, rng):
    """One change to a good row, in place; most values of `how` are a change to its line instead."""
    if how == 0:
        row[key] = pick(rng, ODD)
    elif how == 1:
        del row[key]
    elif how == 2:
        row[str(key)[::-1]] = row.pop(key)
    elif how == 3:
        other = rng.choice(list(row))
        row[key], row[other] = row[other], row[key]
    elif how == 4:
        values = dict(reversed(row.items()))
        row.clear()
        row.update(values, extra=pick(rng, ODD), **{'': 1})
    elif how == 5 and isinstance(row[key], list):
        row[key] = list(row[key])
        at = rng.integers(len(row[key]))
        new = pick(rng, ODD)
        if isinstance(row[key][at], dict) and rng.random() < 0.8:
            if rng.random() < 0.5:
                new = str(rng.choice(['system', 'user', 'assistant', 'tool']))
            new = row[key][at] | {str(rng.choice(['role', 'content', 'name'])): new}
        row[key][at] = new
    elif how == 6 and isinstance(row[key], list):
        row[key] = row[key] + row[key][:1] if rng.random() < 0.5 else row[key][1:]
    elif how == 7:
        row[key] = str(rng.choice(list('a \n1é^'))) * int(rng.choice([1000, 30_000, 1_000_000], p=[0.6, 0.37, 0.03]))


def mutate_line(how, line, key, rng):
    """One change to a line, bytes."""
    at = int(rng.integers(len(line) + 1))
    before, after = line[:at], line[at:]
    if how == 8:
        return before + bytes(rng.integers(0, 256, rng.integers(1, 4), dtype=np.uint8)) + after
    if how == 9:
        return before + after[int(rng.integers(1, 5)):]
    if how == 10:
        return before
    if how == 11 and after:
        return before + bytes([after[0] ^ 1 << int(rng.integers(8))]) + after[1:]
    if how == 12:
        deep = int(rng.choice([50, 100_000]))
        opening, closing = pick(rng, [(b'[', b']'), (b'{"a":', b'}')])
        name = str(rng.choice([key, 'deep'])).encode()
        return line[:-1] + b', "%s": ' % name + opening * deep + b'1' + closing * deep + b'}'
    if how == 13:
        return line[:-1] + b', "%s": %s}' % (str(rng.choice([key, 'number'])).encode(), pick(rng, NUMBERS))
    if how == 14:
        return line[:-1] + b', "%s": "twice"}' % str(key).encode()
    if how == 15:
        return pick(rng, [BOM + line, BOM * 2 + line, before + BOM + after, b'\xff\xfe' + line])
    if how == 16:
        return before + pick(rng, INSIDE) + after
    if how == 17:
        return pick(rng, WHOLE)
    if how == 18:
        return line + pick(rng, [b'\r', b' ', b',', b'}', line, b'\x1a', b' \r\r'])
    if how == 19:
        return line.replace(b'"', b"'") if rng.random() < 0.5 else line.decode(errors='replace').encode('utf-16')
    if how == 20:
        return bytes(rng.integers(0, 256, rng.integers(1, 60), dtype=np.uint8))
    if how == 21:
        return b' ' + line + b'\t'
    return line


def mutate(row, rng):
    """A line (bytes, without line feed) made from a good row by one change."""
    row = dict(row)
    key = rng.choice(list(row))
    how = int(rng.integers(22))
    mutate_object(how, row, key, rng)
    line = json.dumps(row, ensure_ascii=bool(rng.random() < 0.3)).encode(errors='surrogatepass')
    return mutate_line(how, line, key, rng).replace(b'\n', b'\r')


def kept_texts(folder):
    """Every group of a set of bytes, back as texts with its label, and how many rows were dropped."""
    splits = json.loads((folder / 'meta.json').read_text())['splits']
    rows = []
    for split, info in splits.items():
        tokens = np.fromfile(folder / f'{split}.bin', info['dtype'])
        index = np.load(folder / f'{split}.idx.npy')
        labels = [None] * len(index)
        if 'labels_sha256' in info:
            labels = np.load(folder / f'{split}.labels.npy').tolist()
        for bounds, label in zip(index, labels):
            pieces = [tokens[a:b] for a, b in zip(bounds, bounds[1:])]
            rows.append(([bytes(piece[piece < 256].tolist()).decode() for piece in pieces], label))
    return rows, sum(sum(info['dropped'].values()) for info in splits.values())


def lines(seed, rng, base, cwd, new, n=250):
    kind = KINDS[seed % len(KINDS)]
    content, mutated = [], 0
    while mutated < n:
        row = good_row(kind, rng, len(content))
        good = len(content) < 2 or rng.random() < 0.2
        mutated += not good
        content.append(json.dumps(row).encode() if good else mutate(row, rng))
    cwd.mkdir()
    (cwd / 'own.py').write_text(TRANSLATE)
    (cwd / 'own.jsonl').write_bytes(b'\n'.join(content) + b'\n' * int(rng.integers(2)))
    verdicts = [expected(kind, line) for line in content]
    good = [v for v in verdicts if v]
    bad = [i for i, v in enumerate(verdicts, 1) if v is False]
    knob = 'documents' if kind == 'documents' else 'source'
    command = ['prepare_prefs', *flags(f'--name=own --{knob}=own.jsonl --tokenizer=bytes --max_length=3000000 '
                                       '--max_prompt_length=1000000'), *(['own.py'] if kind == 'translated' else [])]
    done = run([*command, '--max_bad_lines=100000'], cwd, new, limit=60)
    what = f'{kind}, {len(good)} good and {len(bad)} bad lines: '
    if done.status or 'Traceback' in done.err or 'panicked' in done.err:
        return what + tail(done), mutated
    kept, dropped = kept_texts(cwd / 'data/own')
    if sorted(kept, key=repr) != sorted(good, key=repr) or dropped != len(bad) + verdicts.count(()):
        lost = [repr(row)[:150] for row in good if row not in kept]
        lost += [repr(row)[:150] for row in kept if row not in good]
        return what + f'kept {len(kept)}, dropped {dropped}; such as {lost[:3]}', mutated
    before = snapshot(cwd)
    done = run(command, cwd, new, limit=60)
    named = [int(number) for number in re.findall(r'^(?:error: )?own\.jsonl line (\d+): ', done.err, re.M)]
    refused = done.status == 1 and named == bad[:10] and done.err.rstrip().endswith('with --max_bad_lines=N)')
    if bad and not (refused and snapshot(cwd) == before):
        return what + f'none allowed, names {named}, {tail(done)}', mutated
    return '', mutated


# ----------------------------------------------------------------------------------------------------
# code and foreign content

class Payload:
    """Unpickled by pickle, it makes a file."""
    def __reduce__(self):
        return exec, ("open('code-was-run', 'w').close()",)


class Foreign:
    """A class that no checkpoint of ours holds."""


def as_checkpoint(path, content):
    """Put bytes, or what torch.save makes of an object, in place of a checkpoint, with the hash that fits."""
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    path.with_suffix('.json').write_text(json.dumps({'step': int(path.stem[5:]), 'sha256': sha256_file(path)}))


def zipped(pickled):
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w') as z:
        files = {'data.pkl': pickled, 'version': b'3\n', 'byteorder': b'little', 'data/0': b'\0' * 64}
        for name, content in files.items():
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


def other_config(state, **changes):
    return state | {'model_config': state['model_config'] | changes}


def other_weights(state, change):
    return state | {'model': {name: change(p) for name, p in state['model'].items()}}


RED = '\x1b[31mred\x07'
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
    'no heads': lambda state: other_config(state, n_head=0),
    'a negative width': lambda state: other_config(state, n_embd=-16),
    'weights of other shapes': lambda state: state | {'model': {k: v[:1] for k, v in state['model'].items()}},
    'an optimizer that is none': lambda state: state | {'optimizer': {}},
    'weights that are no tensors': lambda state: state | {'model': {k: 1 for k in state['model']}},
    'a config that is a list': lambda state: state | {'config': [1]},
    'a beta that is text': lambda state: state | {'config': state['config'] | {'beta': 'high'}},
    'a beta that is no number': lambda state: state | {'config': state['config'] | {'beta': float('nan')}},
    'an epsilon that is text': lambda state: other_config(state, layer_norm_epsilon='1e-5'),
    'a million layers': lambda state: other_config(state, n_layer=10**6),
    'a million columns': lambda state: other_config(state, n_embd=10**6),
    'integer weights': lambda state: other_weights(state, lambda p: (100 * p).long()),
    'complex weights': lambda state: other_weights(state, lambda p: p.to(torch.complex64)),
    'a weight that is no number': lambda state: other_weights(state, lambda p: p / 0),
    'infinite weights': lambda state: other_weights(state, lambda p: p + torch.inf),
    'a name with control characters': lambda state: state | {'model': state['model'] | {RED: torch.zeros(2)}},
    'no fingerprint of its start': lambda state: state | {'origin': {'data': state['origin']['data']}},
    'no origin': lambda state: {k: v for k, v in state.items() if k != 'origin'},
    'text': lambda state: b'hello',
    'gzip': lambda state: b'\x1f\x8b' + b'\0' * 50,
}


def sealed(folder, change):
    """Change meta.json by a function or a dict, with the hash that fits."""
    path = folder / 'meta.json'
    meta = json.loads(path.read_text())
    del meta['sha256']
    if callable(change):
        change(meta)
    else:
        meta |= change
    path.write_text(json.dumps(meta | {'sha256': sha256_json(meta)}))


def replaced(path, content):
    """Put bytes in place of a file of a data set, with the hash that fits."""
    path.write_bytes(content)
    split, kind, *_ = path.name.split('.')
    sealed(path.parent, lambda meta: meta['splits'][split].update({f'{kind}_sha256': sha256_file(path)}))


def odd_tokenizer(folder, changes):
    changed_json(folder / 'tokenizer.json', changes)
    sealed(folder, dict(tokenizer_sha256=sha256_file(folder / 'tokenizer.json')))


def changed_json(path, changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def object_array():
    file = io.BytesIO()
    np.save(file, np.array([Payload()], object), allow_pickle=True)
    return file.getvalue()


def pickled_model(folder):
    (folder / 'model.safetensors').unlink()
    torch.save({'wte.weight': Payload()}, folder / 'pytorch_model.bin')


def pickled_cache(path):
    np.savez(path, key=np.array([Payload()], object), logps=np.array([Payload()], object))


def remote_code(folder):
    changed_json(folder / 'config.json', {'auto_map': {'AutoModelForCausalLM': 'evil.Model'}})
    (folder / 'evil.py').write_text("open('code-was-run', 'w')")


OWN, HF_CONFIG = 'data/own', 'hf/config.json'
FILES = {           # other files: (the command that reads them, what is done to a path, the path and what it is given)
    'an index with code': ('dpo', replaced, f'{OWN}/train.idx.npy', object_array()),
    'labels with code': ('kto', replaced, 'data/likes/train.labels.npy', object_array()),
    'an index that is text': ('dpo', replaced, f'{OWN}/val.idx.npy', b'hello'),
    'an empty bin': ('dpo', replaced, f'{OWN}/train.bin', b''),
    'a bin of another length': ('dpo', replaced, f'{OWN}/train.bin', b'\0' * 200),
    'a tokenizer of no tokens': ('sample', odd_tokenizer, OWN, dict(tokens=[])),
    'a tokenizer of numbers': ('sample', odd_tokenizer, OWN, dict(tokens=[1, 2])),
    'a tokenizer without a pattern': ('sample', odd_tokenizer, OWN, dict(pattern='(')),
    'a tokenizer whose name is a path': ('sample', sealed, OWN, dict(tokenizer='../../pairs.jsonl')),
    'a tokenizer that is not there': ('sample', sealed, OWN, dict(tokenizer='no-such-tokenizer')),
    'splits that are a list': ('dpo', sealed, OWN, dict(splits=[])),
    'a split that is a number': ('dpo', sealed, OWN, dict(splits={'train': 1, 'val': 2})),
    'a type with code': ('dpo', sealed, OWN, lambda meta: meta['splits']['train'].update(dtype='object')),
    'max_length that is text': ('sft', sealed, OWN, dict(max_length='long')),
    'a vocabulary that is text': ('sft', sealed, OWN, dict(vocab_size='many')),
    'a template that is a number': ('sample', sealed, OWN, dict(template=7)),
    'meta.json that is a list': ('dpo', Path.write_text, f'{OWN}/meta.json', '[1]'),
    'meta.json, deeply nested': ('dpo', Path.write_text, f'{OWN}/meta.json', '[' * 100_000),
    'a pickled Hugging Face model': ('hf', pickled_model, 'hf'),
    'a Hugging Face config that is a list': ('hf', Path.write_text, HF_CONFIG, '[]'),
    'a Hugging Face config of no heads': ('hf', changed_json, HF_CONFIG, dict(n_head=0)),
    'a Hugging Face config of words': ('hf', changed_json, HF_CONFIG, dict(n_embd='wide', n_layer=None)),
    'a Hugging Face config, negative': ('hf', changed_json, HF_CONFIG, dict(n_layer=-1)),
}
HARMLESS = {        # code that nobody asks for: the result is as ever
    'a reference cache with code': ('dpo', pickled_cache, CACHE[0]),
    'remote code in a Hugging Face config': ('hf', remote_code, 'hf'),
    'code as text in a step file': ('dpo', changed_json, START[1],
                                    dict(config="__import__('os').system('touch code-was-run')")),
}
NOT_RESUMED = {'no heads', 'a negative width', 'a million layers', 'a million columns'}     # a run has its model
RESUMED = {'an optimizer that is none', 'no fingerprint of its start', 'no origin'}         # nobody else reads that
CODE = [(reader, what) for what in CHECKPOINTS for reader in ('dpo', 'resume', 'sample', 'draw', 'export')
        if what not in (NOT_RESUMED if reader == 'resume' else RESUMED)]
CODE += [(reader, what) for what, (reader, *_) in (FILES | HARMLESS).items()]


def code(seed, rng, base, cwd, new):
    reader, what = CODE[seed % len(CODE)]
    command, folder = COMMANDS[reader]
    copy(base, cwd)
    if what in CHECKPOINTS:
        places = {'resume': RUN[::2], 'sample': RUN[:1], 'export': RUN[:1]}.get(reader, START[:1])
        for path in places:         # a run that resumes would go back to the one before
            as_checkpoint(cwd / path, CHECKPOINTS[what](checkpoint.read(str(base / path))))
    else:
        _, change, path, *content = (FILES | HARMLESS)[what]
        change(cwd / path, *content)
    before = snapshot(cwd)
    done = run(command, cwd, new)
    after = snapshot(cwd)
    if 'code-was-run' in after:
        return f'{reader}, {what}: THE CODE WAS RUN', 0
    if what in HARMLESS:
        made, expected = {} if done.status else result(cwd, folder, done), undisturbed(base, reader)['result']
        told = [key for key in expected if key.endswith('model_config')]        # it keeps what a base says of itself
        wrong = tail(done) if done.status else differs(made | dict.fromkeys(told), expected | dict.fromkeys(told))
        return wrong and f'{reader}, {what}: {wrong}', 0
    if not one_line(done):
        return f'{reader}, {what}: {tail(done)}', 0
    changed = differs(before, after)
    return changed and f'{reader}, {what}: changed {changed}', 1


# ----------------------------------------------------------------------------------------------------
# single cases

SAME = 'the same result as undisturbed'
ANY = 'any result, or one line'
# names: of commands; says: SAME, ANY or words of the one line; change: of the folder; child: called in the process
Case = collections.namedtuple('Case', 'names says flags change child new', defaults=('', None, None, False))


def closed(fd, name):
    def child():
        os.close(fd)
        setattr(sys, name, None)            # as python has it that starts so
    return child


def printing(where):
    """Standard output goes to a path, or to a pipe that nobody reads."""
    def child():
        read, write = os.pipe()
        os.close(read)
        os.dup2(os.open(where, os.O_WRONLY) if where else write, 1)
        sys.stdout = open(1, 'w', closefd=False)
    return child


def rank(number, **environment):
    known = dict(WORLD_SIZE='2', RANK=f'{number}', LOCAL_RANK=f'{number}', MASTER_ADDR='127.0.0.1', MASTER_PORT='9')
    return lambda: os.environ.update(known | environment)


def beside_a_server():
    """Rank 1, where at the port of rank 0 something listens that never answers."""
    server = socket.create_server(('127.0.0.1', 0))
    rank(1, MASTER_PORT=str(server.getsockname()[1]))()
    os.set_inheritable(os.dup(server.fileno()), True)       # it stays open


def little_memory():
    resource.setrlimit(resource.RLIMIT_AS, (3 * MEMORY * 1000, resource.RLIM_INFINITY))


def wrote(path, content):
    content = content.encode() if isinstance(content, str) else content
    return lambda cwd: (cwd / path).write_bytes(content)


def pipe(path):
    def change(cwd):
        (cwd / path).unlink(missing_ok=True)
        os.mkfifo(cwd / path)
    return change


def linked(path, to, moved=True):
    """In place of a path stands a link, to where it was moved or to what is not there yet."""
    def change(cwd):
        (cwd / 'scratch').mkdir()
        if moved:
            os.rename(cwd / path, cwd / to)
        elif (cwd / path).exists():
            shutil.rmtree(cwd / path)
        os.symlink(cwd / to, cwd / path)
    return change


def link_to_precious(path):
    def change(cwd):
        (cwd / 'precious').mkdir()
        (cwd / 'precious/file').write_text('precious')
        if path.endswith('.npz.tmp'):
            (cwd / path.removesuffix('.tmp')).unlink()          # a cache is written where there is none
        os.symlink(cwd / ('precious' if path.endswith('set') else 'precious/file'), cwd / path)
    return change


def before_it(name, *more, n=None):
    """Another command is run first, and killed before its n-th file operation where that is given."""
    def change(cwd):
        def child():
            if n is not None:
                at_operation(n, f'{cwd}.count', signal.SIGKILL)
        run([*COMMANDS[name][0], *more], cwd, before=child)
    return change


def rows(**changes):
    """mine.jsonl, of which the second row has other fields."""
    good = [dict(prompt=f'Q{i}', chosen=' yes', rejected=' no') for i in range(8)]
    good[1] |= changes
    return wrote('mine.jsonl', ''.join(json.dumps(row) + '\n' for row in good))


def parquet(cwd):
    import pyarrow
    import pyarrow.parquet
    rows = [{'prompt': f'{i}', 'chosen': ' a', RED: ' b'} for i in range(9)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), cwd / 'mine.parquet')


def big_row(cwd):
    with gzip.open(cwd / 'mine.jsonl.gz', 'wb', compresslevel=1) as file:
        file.write(b'{"prompt": "')
        for _ in range(400):
            file.write(b'a ' * 500_000)
        file.write(b'", "chosen": "b", "rejected": "c"}\n')


def shard_elsewhere(cwd):
    os.rename(cwd / 'hf/model.safetensors', cwd / 'model.safetensors')
    index = dict(weight_map={'wte.weight': '../model.safetensors'})
    (cwd / 'hf/model.safetensors.index.json').write_text(json.dumps(index))


def temporary():
    os.environ['TMPDIR'] = tempfile.tempdir = os.getcwd()


def killed_dry_run(cwd):
    def child():
        temporary()
        at_operation(4, f'{cwd}.count', signal.SIGKILL)
    run([*PREPARE, '--dry_run'], cwd, before=child)
    for path in cwd.glob('nanodpo-scratch-*'):
        os.utime(path, (0, 0))              # a new one may be of a live process


TRAINING = 'sft, dpo, resume'
WRITING = 'fresh, replace, draw, sft, dpo, resume, export'
ALL = WRITING + ', sample, page'
ENDING = ALL.replace('resume, ', '')      # a run that is resumed replaces its checkpoints before it ends so
MANY = 'x' * 300
EXPLODED = 'not finite|broke the model| is nan| is inf'
EXIT = 'import sys\nsys.exit(0)\n'
ROWS = 'def pairs(split, seed):\n    yield dict(prompt="a", chosen="b", rejected="c")\n    sys.exit(0)\n'
MINE = '--source=mine.jsonl'
LIMIT = '--join_timeout=1'
SINGLE = {
    # what a process is started in
    'standard output is closed': Case(WRITING, SAME, child=closed(1, 'stdout')),
    'standard error is closed': Case(ALL, SAME, child=closed(2, 'stderr')),
    'standard input is closed': Case(ALL, SAME, child=closed(0, 'stdin')),
    'standard output is full': Case(ENDING, 'No space left', child=printing('/dev/full')),
    'nobody reads its output': Case(ENDING, 'Broken pipe', child=printing('')),
    'nobody reads its help': Case(ALL, ANY, '--help', child=printing('')),
    'python -O, LANG=C, no HOME': Case(ALL, SAME, new=True),
    'WORLD_SIZE=abc': Case(WRITING[:-8], 'start with torchrun|one process', child=rank(0, WORLD_SIZE='abc')),
    'WORLD_SIZE=0': Case(TRAINING, 'start with torchrun', child=rank(0, WORLD_SIZE='0')),
    'rank 5 of 2': Case(TRAINING, 'start with torchrun', child=rank(5)),
    'WORLD_SIZE alone': Case(TRAINING, 'start with torchrun', child=lambda: os.environ.update(WORLD_SIZE='2')),
    'RANK alone': Case(ALL, SAME, child=lambda: os.environ.update(RANK='3')),
    'rank 0 waits for nobody': Case('sft, dpo', 'do not meet', LIMIT, child=rank(0, MASTER_PORT='0')),
    'rank 1 finds nobody': Case('sft, dpo', 'do not meet', LIMIT, child=rank(1)),
    'rank 1 finds another server': Case('sft, dpo', 'does not answer', LIMIT, child=beside_a_server),
    # what is no success
    'exploded weights': Case(TRAINING + ', kto, hf', EXPLODED, '--learning_rate=1e20 --warmup_steps=0'),
    'exploded weights, saved at once': Case(TRAINING, EXPLODED, '--learning_rate=1e20 --warmup_steps=0 '
                                           '--eval_interval=0 --log_interval=100'),
    'exploded weights in one step': Case('sft, dpo, kto, hf', EXPLODED, '--learning_rate=1e20 --warmup_steps=0 '
                                        '--max_steps=1 --save_interval=0 --eval_interval=0'),
    'fewer steps than there are': Case('resume', 'beyond the 4 steps', '--max_steps=4'),
    '--resume forgotten twice': Case('dpo', SAME, change=before_it('dpo', '--max_steps=1')),
    'a run that finished, then one killed early': Case('dpo, resume', SAME, change=before_it('dpo', n=60)),
    'a killed dry run': Case('fresh', ANY, '--dry_run', killed_dry_run, temporary),
    # links, and files where folders should be
    'a run on another disk': Case('dpo, resume', SAME, change=linked('out/own/dpo', 'scratch/run')),
    'a run that will be on another disk': Case('dpo', SAME, change=linked('out/own/dpo', 'scratch/run', moved=False)),
    'out on another disk': Case(TRAINING + ', sample', SAME, change=linked('out', 'scratch/out')),
    'data on another disk': Case(ALL, SAME, change=linked('data', 'scratch/data')),
    'a set on another disk': Case(ALL, SAME, change=linked('data/own', 'scratch/data')),
    'an export on another disk': Case('export', SAME, change=linked('exported', 'scratch/hf', moved=False)),
    'a log that is a link': Case('dpo, resume', SAME, change=linked('out/own/dpo/log.jsonl', 'scratch/log')),
    **{f'a link called {Path(path).name}': Case(names, SAME, change=link_to_precious(path)) for path, names in {
        'out/own/dpo/log.jsonl.tmp': 'resume', 'out/own/dpo/step-000007.pt.tmp': 'resume',
        'out/own/dpo/step-000007.json.tmp': 'resume', 'out/own/reference-train.npz.tmp': 'beside',
        'out/own/.dpo.lock': 'dpo, resume', 'data/.own.lock': 'replace', 'data/own/.tmp-set': 'replace',
        'page.html.tmp': 'page', '.exported.lock': 'export'}.items()},
    'a lock that is a pipe': Case('dpo', ANY, change=pipe('out/own/.dpo.lock')),
    'a lock that is a folder': Case('dpo', ANY, change=lambda cwd: (cwd / 'out/own/.dpo.lock').mkdir()),
    'a file in place of a set': Case('fresh, draw', 'drawn', change=wrote('data/drawn', 'mine')),
    'a file in place of a run': Case('beside', 'beside', change=wrote('out/own/beside', 'mine')),
    'a file in place of an export': Case('export', 'exported', change=wrote('exported', 'mine')),
    'a folder in place of a page': Case('page', 'page.html', change=lambda cwd: (cwd / 'page.html').mkdir()),
    'an export into what is there': Case('export', 'not empty', change=linked('exported', 'hf', moved=False)),
    'a shard elsewhere': Case('hf', 'model.safetensors', change=shard_elsewhere),
    # files of the user that are none
    **{f'sys.exit(0) in a {what}': Case(names, 'SystemExit: 0', flag, wrote('mine.py', content))
       for what, names, flag, content in (
           ('config', ALL.replace(', export', '').replace(', page', '').replace('draw, ', ''), 'mine.py', EXIT),
           ('source', 'fresh, replace', '--source=mine.py', EXIT),
           ('source of rows', 'fresh', '--source=mine.py', 'import sys\n' + ROWS),
           ('row(raw)', 'fresh', 'mine.py', 'import sys\n\ndef row(raw):\n    sys.exit(0)\n'),
           ('reward', 'sample, draw', '--reward=mine.py', EXIT),
           ('call of a reward', 'sample, draw', '--reward=mine.py',
            'import sys\n\ndef reward(prompts, responses):\n    sys.exit(0)\n'))},
    'a key that is no string': Case('sft, dpo, fresh', 'unknown key', 'mine.py',
                                   wrote('mine.py', 'sft = {1: 2}\ndpo = {3: 4}\nprepare = {(): 1}\n')),
    'a pipe as config': Case('fresh, sft, dpo, sample', 'mine.py', 'mine.py', pipe('mine.py')),
    'a pipe as source': Case('fresh', 'mine.jsonl', MINE, pipe('mine.jsonl')),
    'a pipe as a source of python': Case('fresh', 'mine.py', '--source=mine.py', pipe('mine.py')),
    'a pipe in a folder of data': Case('fresh', 'train.jsonl', '--source=hf', pipe('hf/train.jsonl')),
    'a pipe as documents': Case('fresh', 'mine.txt', '--documents=mine.txt', pipe('mine.txt')),
    'a pipe as prompts': Case('sample', 'mine.txt', '--prompts_file=mine.txt', pipe('mine.txt')),
    'a pipe as reward': Case('sample, draw', 'mine.py', '--reward=mine.py', pipe('mine.py')),
    # names
    **{f'300 characters in {flag[2:] or "a path"}': Case(names, '.', f'{flag}{"=" * (flag > "")}{MANY}')
       for flag, names in {
           '--name': 'fresh, sft, dpo, sample, draw', '--run_name': 'sft, dpo, sample', '--source': 'fresh, draw',
           '--init_from': 'sft, dpo', '--tokenizer': 'fresh', '--policy': 'draw', '--reward': 'draw, sample',
           '--after': 'sample', '--data': 'export', '': 'fresh, sft, dpo, sample, export, page'}.items()},
    **{f'control characters in {flag[2:] or "a path"}': Case(names, '.', f'{flag}{"=" * (flag > "")}{RED}')
       for flag, names in {
           '--name': 'fresh, sft, dpo', '--source': 'fresh, draw', '--init_from': 'sft, dpo', '--tokenizer': 'fresh',
           '--' + RED: 'fresh, sft, dpo, sample', '--loss': 'dpo', '--after': 'sample', '--reward': 'sample',
           '': 'fresh, dpo, export, page'}.items()},
    # control characters in data
    'control characters in a key': Case('fresh', ANY, MINE, rows(**{RED: 'x'})),
    'control characters in a text': Case('fresh', ANY, MINE, rows(prompt=RED, chosen=RED)),
    'control characters in a text, looked at': Case('fresh', ANY, MINE + ' --dry_run', rows(prompt=RED, chosen=RED)),
    'control characters in a bad row': Case('fresh', 'mine.jsonl line 2', MINE, rows(chosen={RED: RED})),
    'control characters in a role': Case('fresh', 'mine.jsonl line 2', MINE, rows(chosen=[dict(role=RED, content='')])),
    'control characters in a label': Case('fresh', 'mine.jsonl line 2', MINE, wrote('mine.jsonl', ''.join(
        json.dumps(dict(prompt='Q', completion=' a', label=label)) + '\n' for label in (True, RED, False)))),
    'control characters in a header': Case('fresh', '.', '--source=mine.csv',
                                          wrote('mine.csv', f'prompt,chosen,{RED}\na,b,c\nd,e,f\n')),
    'control characters in a column': Case('fresh', '.', '--source=mine.parquet', parquet),
    'control characters in prompts': Case('sample', ANY, '--prompts_file=mine.txt', wrote('mine.txt', f'{RED}\n')),
    'control characters in a message of the user': Case('sample, draw', 'ValueError', '--reward=mine.py', wrote(
        'mine.py', f'def reward(prompts, responses):\n    raise ValueError({RED!r})\n')),
    'control characters in a Hugging Face config': Case('hf', '.', change=lambda cwd: changed_json(
        cwd / HF_CONFIG, {'model_type': RED})),
    'a row of 400 MB in 2 MB': Case('fresh', ANY, '--source=mine.jsonl.gz', big_row, little_memory),
}
CASES = [(name, what) for what, case in SINGLE.items() for name in case.names.split(', ')]


def odd(seed, rng, base, cwd, new):
    name, what = CASES[seed % len(CASES)]
    case = SINGLE[what]
    command, folder = COMMANDS[name]
    copy(base, cwd)
    if case.change:
        case.change(cwd)
    before = snapshot(cwd)
    links = [path for path in cwd.rglob('*') if path.is_symlink() and not path.is_file()]       # to folders
    own = os.path.relpath(os.path.realpath(cwd / (folder or 'nothing')), os.path.realpath(cwd))     # a link's folder
    done = run([*command, *flags(case.flags)], cwd, new or case.new, before=case.child or (lambda: None), limit=60)
    said = one_line(done) and (case.says == ANY or re.search(case.says, done.err))
    wrong = '' if said or case.says == ANY and done.status == 0 else tail(done)
    if case.says == SAME and done.status == 0:
        wrong = differs(result(cwd, folder, done), undisturbed(base, name)['result'])
    if not wrong:
        kept = {path: content for path, content in before.items() if not path.endswith(('log.jsonl', '.lock'))
                and not (done.status == 0 and path.startswith(own))}
        gone = lost(kept, snapshot(cwd))
        gone += [path.name for path in links if not path.is_symlink() and not path.name.startswith('.tmp-')]
        left = [path for path in leftovers(cwd) if not re.search(r'/dpo\.\d/', path)]     # a moved run keeps its own
        wrong = ', '.join([f'{path} is lost' for path in gone] + [f'{path} stays' for path in left])
    return wrong and f'{name}, {what}: {wrong}', int(done.status != 0)


# ----------------------------------------------------------------------------------------------------
# the campaign

CLASSES = {         # name: (function, trials, what its second number counts)
    'kill': (kill, 50, 'kills'),
    'rename': (rename, 120, 'kills'),
    'operation': (operation, 50 * len(STAGES), 'kills'),
    'signal': (stop, 4 * len(STOPPED), 'signals'),
    'both': (both, PLACES * len(PAIRS), 'refused'),
    'full': (full, 60, 'refused'),
    'damage': (damage, len(CELLS), 'refused'),
    'lines': (lines, 40, 'lines'),
    'code': (code, len(CODE), 'refused'),
    'odd': (odd, len(CASES), 'refused'),
}


def trial(job):
    """One trial, in a worker. -> dict"""
    name, seed, work = job
    began, cwd = time.perf_counter(), work / f'{name}-{seed}'
    rng = np.random.default_rng([list(CLASSES).index(name), seed])
    try:
        wrong, n = CLASSES[name][0](seed, rng, work / 'base', cwd, new=seed % 8 == 7)
    except (Exception, UserError):
        wrong, n = traceback.format_exc()[-600:], 0
    shutil.rmtree(cwd, ignore_errors=True)
    for left in work.glob(f'{cwd.name}.*'):
        left.unlink()
    return dict(name=name, seed=seed, wrong=wrong, n=n, seconds=round(time.perf_counter() - began, 3))


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
                for done in pool.imap_unordered(trial, jobs):
                    results.append(done)
                    bar.update()
                    if done['wrong']:
                        tqdm.write(f'{name} FAILED, again with {repeat(done)}\n    {done["wrong"]}')
            print(row_of(name, results), flush=True)
    return results


def repeat(done):
    return f'--only={done["name"]} --seed={done["seed"]} --trials=1'


def row_of(name, results):
    """A line of the table: class, trials, passed, what it counts, seconds."""
    own = [r for r in results if r['name'] == name]
    count = sum(r['n'] for r in own if r['n'] != 'unseen')
    unseen = sum(r['n'] == 'unseen' for r in own)
    counted = f'{count:,} {CLASSES[name][2]}' + (f', {unseen} unseen' if unseen else '')
    passed = sum(not r['wrong'] for r in own)
    return f'{name:10}{len(own):>8,}{passed:>9,}   {counted:26}{sum(r["seconds"] for r in own):>7,.0f} s'


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', choices=CLASSES, help='one class')
    parser.add_argument('--seed', type=int, default=0, help="of the first trial; the others' count on from it")
    parser.add_argument('--trials', type=int, default=0, help='of each class at most; 0 = all')
    parser.add_argument('--workers', type=int, default=os.cpu_count())
    parser.add_argument('--out', default='', help='default: repro/results/faults, where all was run')
    options = parser.parse_args(argv)
    names = [options.only] if options.only else list(CLASSES)
    began = time.perf_counter()
    head = f'{"class":10}{"trials":>8}{"passed":>9}   {"of which":26}{"of a core":>9}'
    print(f'seed {options.seed}, {options.workers} trials at a time\n{head}', flush=True)
    with tempfile.TemporaryDirectory() as work:
        BARE['PYTHONPYCACHEPREFIX'] = f'{work}/compiled'        # what -O makes of torch, once
        results = campaign(names, options.seed, options.trials, options.workers, Path(work))
    results.sort(key=lambda r: (names.index(r['name']), r['seed']))
    failed = [r for r in results if r['wrong']]
    table = '\n'.join([head, *(row_of(name, results) for name in names)])
    verdict = (f'{len(results) - len(failed):,} of {len(results):,} trials passed, seed {options.seed}, '
               f'{time.perf_counter() - began:,.0f} s')
    print(f'\n{table}\n{verdict}')
    out = options.out or (str(ROOT / 'repro/results/faults') if not options.only and not options.trials else '')
    if out:
        again = ''.join(f'- `{repeat(r)}`: {" ".join(r["wrong"].split())}\n' for r in failed)
        title = f'# Faults\n\n`python repro/faults.py --seed={options.seed}`; what the classes are says its docstring.'
        Path(out + '.md').write_text(f'{title}\n\n```\n{table}\n```\n\n{verdict}.\n{again}')
        write_json(out + '.json', results)
        print(f'written: {out}.md, .json')
    return int(bool(failed))


if __name__ == '__main__':
    sys.exit(main())
