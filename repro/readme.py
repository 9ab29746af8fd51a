"""Run every command of the README, in its order, in a fresh copy of the project.

    python repro/readme.py                  # all of them
    python repro/readme.py --list           # what would run, and what is added to it
    python repro/readme.py --from=N         # from the Nth on; with --folder, after the ones before it
    python repro/readme.py --folder=try     # work in this new folder and keep it; otherwise a temporary one

A command runs as it is written. What it would take from the hub stands in the copy as a small folder of the same name,
in the hub's own layout. Data sets have made-up rows, and every GPT-2 has two narrow layers of random weights. The
reader's own file is written too. A command that would take long gets a flag that makes it small, LONG, and the output
says so. The exit status is 1 where a command fails.
"""
import argparse
import gzip
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import config                                       # noqa: E402

LONG = {        # a command's beginning: (what is added, how long it takes without)
    'bash test.sh': ('-kpacked', '6 minutes'),
}


def commands(text):
    """The commands of a text, in order, each once: indented lines that begin with the name of a program."""
    text = re.sub(r' *\\{1,2}\n *', ' ', text)     # a command that goes on in the next line, of a docstring too
    lines = re.findall(r'^ {4,}((?:python|torchrun|bash|sbatch) .*)$', text, re.M)
    found = [command.strip() for line in lines for command in re.split(r'\s+#', line)[0].split(' && ')]
    return list(dict.fromkeys(found))


def added(command):
    """(what is added to a command, how long it would take without), or None."""
    return next((LONG[start] for start in LONG if command.startswith(start)), None)


# ----------------------------------------------------------------------------------------------------
# what stands in for the hub, and for the reader's file

SUBJECTS = ('tea', 'coffee', 'bread', 'soup', 'rice', 'salad', 'a garden', 'a kettle', 'a bicycle', 'a letter',
            'a kite', 'a shelf', 'a fire', 'a tent', 'a clock', 'a drum')
ADVICE = ('slowly', 'with care', 'in the morning', 'twice a week', 'by the window', 'with a friend', 'before noon',
          'in the rain')


def pairs(n, seed):
    """n made-up (question, good answer, bad answer)."""
    draw = random.Random(seed)
    for i in range(n):
        what = f'{draw.choice(SUBJECTS)} number {i}'
        yield (f'How do I make {what}?',
               f'Make {what} {draw.choice(ADVICE)}, {draw.choice(ADVICE)}, and look at it again.',
               f'Look up {what} {draw.choice(ADVICE)} by yourself.')


def write_lines(path, rows):
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    with (gzip.open if path.endswith('.gz') else open)(path, 'wt', encoding='utf-8') as f:
        f.writelines(json.dumps(row) + '\n' for row in rows)


def stand_ins(folder):
    """Write into `folder` what the README's commands take from the hub, and the file that it calls yours."""
    from model import GPT, GPTConfig
    from nanodpo.export import save_pretrained
    for name in ('gpt2', 'gpt2-xl'):
        save_pretrained(GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32)), os.path.join(folder, name))
    train, test = list(pairs(200, 1)), list(pairs(20, 2))
    for split, rows in (('train', train), ('test', test)):
        dialogues = [{side: f'\n\nHuman: {question}\n\nAssistant: {answer}'
                      for side, answer in (('chosen', good), ('rejected', bad))} for question, good, bad in rows]
        for subset in ('harmless-base', 'helpful-base'):
            write_lines(f'{folder}/Anthropic/hh-rlhf/{subset}/{split}.jsonl.gz', dialogues)
    write_lines(f'{folder}/pairs.jsonl', [dict(prompt=question, chosen=' ' + good, rejected=' ' + bad)
                                          for question, good, bad in train[:80]])


def copy_project(folder):
    """The files that git tracks, or would, into `folder`."""
    git = ['git', 'ls-files', '-co', '--exclude-standard', '-z']
    names = subprocess.run(git, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split('\0')):
        if os.path.isfile(os.path.join(ROOT, name)):
            target = os.path.join(folder, name)
            os.makedirs(os.path.dirname(target), exist_ok=True)
            shutil.copy2(os.path.join(ROOT, name), target)


# ----------------------------------------------------------------------------------------------------

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--list', action='store_true')
    parser.add_argument('--from', dest='first', type=int, default=1)
    parser.add_argument('--folder', default='')
    options = parser.parse_args(argv)
    with open(os.path.join(ROOT, 'README.md'), encoding='utf-8') as f:
        numbered = list(enumerate(commands(f.read()), 1))
    if options.list:
        for i, command in numbered:
            more = added(command)
            print(f'{i:3}  {command}' + (f'   [{more[0]}: else {more[1]}]' if more else ''))
        return
    folder = os.path.abspath(options.folder or tempfile.mkdtemp(prefix='readme-'))
    if not os.path.exists(os.path.join(folder, 'README.md')):
        copy_project(folder)
        stand_ins(folder)
    failed, began = [], time.time()
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1', 'WANDB_MODE': 'offline',
           'PATH': os.path.dirname(sys.executable) + os.pathsep + os.environ['PATH'], 'VIRTUAL_ENV': sys.prefix}
    for i, command in numbered[options.first - 1:]:
        more = added(command)
        start = time.time()
        line = command + (f' {more[0]}' if more else '')
        done = subprocess.run(['bash', '-o', 'pipefail', '-c', line], cwd=folder, env=env, text=True,
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        word = 'FAILED' if done.returncode else 'ok'
        print(f'{i:3}/{len(numbered)}  {word:6} {time.time() - start:4.0f} s  {line}', flush=True)
        if done.returncode:
            failed.append(command)
            print('\n'.join('        ' + line for line in done.stdout.splitlines()[-15:]), flush=True)
    run = len(numbered[options.first - 1:])
    print(f'{run - len(failed)} of {run} commands ended well, {time.time() - began:.0f} s'
          + (f'; the folder is {folder}' if options.folder or failed else ''))
    if not options.folder and not failed:
        shutil.rmtree(folder)
    raise SystemExit(bool(failed))


if __name__ == '__main__':
    config.run(main)
