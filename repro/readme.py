"""Run every command of the README, in its order, in a fresh copy of the project.

    python repro/readme.py                  # all of them
    python repro/readme.py --list           # what would run, and what is added to it
    python repro/readme.py --from=N         # from the Nth on; with --folder, after the ones before it
    python repro/readme.py --folder=try     # work in this new folder and keep it; otherwise a temporary one

A command runs as it is written. What it would take from the hub stands in the copy as a small folder of the same name, in
the hub's own layout: data sets with made-up rows, GPT-2 of every name with two narrow layers of random weights. The reader's own files
are written too. A command that would take long gets a flag that makes it small, LONG, and the output says so; one that cannot run
here is named with the reason, ELSEWHERE. Exit status 1 where a command fails.
"""
import argparse
import gzip
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

LONG = {        # a command's beginning: (what is added, how long it takes without)
    'bash test.sh': ('-kpacked', '6 minutes'),
    'python repro/frontier.py': ('--quick', '42 minutes'),
    'python repro/faults.py': ('--trials=3', '7 minutes'),
}
ELSEWHERE = {
    'sbatch': 'needs Slurm; tests/test_launch.py runs the script with stand-ins for its commands',
    'torchrun --nnodes=4': 'needs four nodes; tests/test_launch.py starts two agents on one machine',
}


def commands(text):
    """The commands of a Markdown text, in order, each once: indented lines that begin with the name of a program."""
    text = re.sub(r' *\\{1,2}\n *', ' ', text)     # a command that goes on in the next line, of a docstring too
    lines = re.findall(r'^ {4,}((?:[A-Z_]+=\S+ )?(?:python|torchrun|bash|sbatch) .*)$', text, re.M)
    return list(dict.fromkeys(command.strip() for line in lines for command in re.split(r'\s+#', line)[0].split(' && ')))


def added(command):
    """(what is added to a command, why), or None."""
    return next((LONG[start] for start in LONG if command.startswith(start) and '--quick' not in command), None)


def arguments(command):
    """A command as a list for subprocess, and its environment variables: python and torchrun are those that run this."""
    words, env = shlex.split(command), {}
    while '=' in words[0]:
        key, _, env[key] = words.pop(0).partition('=')
    program = {'python': [sys.executable], 'torchrun': [sys.executable, '-m', 'torch.distributed.run']}
    return program.get(words[0], words[:1]) + words[1:], env


# -----------------------------------------------------------------------------
# what stands in for the hub, and for the reader's files

SUBJECTS = 'tea coffee bread soup rice salad a garden a kettle a bicycle a letter a kite a shelf a fire a tent a clock a drum'.split()
ADVICE = 'slowly', 'with care', 'in the morning', 'twice a week', 'by the window', 'with a friend', 'before noon', 'in the rain'


def pairs(n, seed):
    """n made-up (question, good answer, bad answer)."""
    draw = random.Random(seed)
    for i in range(n):
        what = f'{draw.choice(SUBJECTS)} number {i}'
        yield (f'How do I make {what}?', f'Make {what} {draw.choice(ADVICE)}, {draw.choice(ADVICE)}, and look at it again.',
               f'Look up {what} {draw.choice(ADVICE)} by yourself.')


def write_lines(path, rows):
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    with (gzip.open if path.endswith('.gz') else open)(path, 'wt', encoding='utf-8') as f:
        f.writelines(json.dumps(row) + '\n' for row in rows)


def stand_ins(folder):
    """Write into `folder` what the README's commands take from the hub, and the files that it calls yours."""
    from model import GPT, GPTConfig
    for name in ('gpt2', 'gpt2-large', 'gpt2-xl'):
        GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32)).save_pretrained(os.path.join(folder, name))
    both = {'train': list(pairs(200, 1)), 'test': list(pairs(20, 2))}
    for split, rows in both.items():
        for subset in ('harmless-base', 'helpful-base'):
            write_lines(f'{folder}/Anthropic/hh-rlhf/{subset}/{split}.jsonl.gz',
                        [{side: f'\n\nHuman: {q}\n\nAssistant: {a}' for side, a in (('chosen', w), ('rejected', l))} for q, w, l in rows])
    rows = both['train'][:80]
    own = {
        'pairs.jsonl': [dict(prompt=q, chosen=' ' + w, rejected=' ' + l) for q, w, l in rows],
        'chats.jsonl': [{side: [dict(role='user', content=q), dict(role='assistant', content=a)]
                         for side, a in (('chosen', w), ('rejected', l))} for q, w, l in rows],
        'rated.jsonl': [dict(question=q, good=' ' + w, bad=' ' + l, score_chosen=i % 5, score_rejected=1) for i, (q, w, l) in enumerate(rows)],
        'rankings.jsonl': [dict(prompt=q, responses=[' ' + w, ' ' + w[:20], ' ' + l]) for q, w, l in rows],
        'likes.jsonl': [dict(prompt=q, completion=' ' + (w, l)[i % 2], label=i % 2 == 0) for i, (q, w, l) in enumerate(rows)],
    }
    for name, rows in own.items():
        write_lines(os.path.join(folder, name), rows)
    with open(os.path.join(folder, 'prompts.txt'), 'w') as f:
        f.writelines(f'{q}\n' for q, *_ in both['test'])


def copy_project(folder):
    """The files that git tracks, or would, into `folder`."""
    names = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard', '-z'], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split('\0')):
        if os.path.isfile(os.path.join(ROOT, name)):
            target = os.path.join(folder, name)
            os.makedirs(os.path.dirname(target), exist_ok=True)
            shutil.copy2(os.path.join(ROOT, name), target)


# -----------------------------------------------------------------------------

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--list', action='store_true')
    parser.add_argument('--from', dest='first', type=int, default=1)
    parser.add_argument('--folder', default='')
    options = parser.parse_args(argv)
    with open(os.path.join(ROOT, 'README.md'), encoding='utf-8') as f:
        found = commands(f.read())
    if options.list:
        for i, command in enumerate(found, 1):
            more = added(command)
            print(f'{i:3}  {command}' + (f'   [{more[0]}: else {more[1]}]' if more else ''))
        return
    folder = os.path.abspath(options.folder or tempfile.mkdtemp(prefix='readme-'))
    if not os.path.exists(os.path.join(folder, 'README.md')):
        copy_project(folder)
        stand_ins(folder)
    run, failed, began = 0, [], time.time()
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1', 'WANDB_MODE': 'offline',
           'PATH': os.path.dirname(sys.executable) + os.pathsep + os.environ['PATH'], 'VIRTUAL_ENV': sys.prefix}
    for i, command in enumerate(found, 1):
        if i < options.first:
            continue
        if why := next((ELSEWHERE[start] for start in ELSEWHERE if command.startswith(start)), None):
            print(f'{i:3}/{len(found)}  not run    {command}   ({why})', flush=True)
            continue
        more = added(command)
        words, own = arguments(command)
        start = time.time()
        done = subprocess.run(words + ([more[0]] if more else []), cwd=folder, env=env | own, text=True, stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        run += 1
        word = 'ok' if done.returncode == 0 else 'FAILED'
        print(f'{i:3}/{len(found)}  {word:6} {time.time() - start:4.0f} s  {command}' + (f'   [run with {more[0]}]' if more else ''), flush=True)
        if done.returncode:
            failed.append(command)
            print('\n'.join('        ' + line for line in done.stdout.splitlines()[-15:]), flush=True)
    print(f'{run - len(failed)} of {run} commands ended well, {len(found) - run} of the README were not run; {time.time() - began:.0f} s'
          + (f'; the folder is {folder}' if options.folder or failed else ''))
    if not options.folder and not failed:
        shutil.rmtree(folder)
    raise SystemExit(bool(failed))


if __name__ == '__main__':
    main()
