"""Checkpoints: <folder>/step-000100.pt, and step-000100.json with its SHA-256, written last: it makes the .pt count."""
import glob
import hashlib
import json
import os
import re
import shutil
from dataclasses import asdict

import torch

from config import UserError, need
from model import GPT, GPTConfig


class HashingFile:
    """A file for torch.save that hashes what passes."""
    def __init__(self, file):
        self.file, self.digest, self.flush = file, hashlib.sha256(), file.flush

    def write(self, data):
        self.digest.update(data)
        return self.file.write(data)


def save(folder, step, model, state, keep=2):
    """Write the model and `state` (tensors and plain Python) as checkpoint `step`, written aside and renamed; then drop
    all but the last `keep`, and any of a later step, which a resumed run has left behind. Raises OSError."""
    path = os.path.join(folder, f'step-{step:06}.pt')
    state = dict(state, format=1, step=step, model_config=asdict(model.config), model=model.state_dict())
    try:
        with open(path + '.tmp', 'wb') as f:
            out = HashingFile(f)
            torch.save(state, out)
            f.flush()
            os.fsync(f.fileno())
        with open(path[:-3] + '.json.tmp', 'w') as f:
            json.dump(dict(step=step, config=state.get('config'), sha256=out.digest.hexdigest()), f, indent=2)
        os.replace(path + '.tmp', path)
        os.replace(path[:-3] + '.json.tmp', path[:-3] + '.json')
    except RuntimeError as error:       # torch's zip writer hides the disk's own error
        raise OSError(f'{path}: {error}') from None
    keep_only(folder, [p for p in find(folder) if step_of(p) <= step][-keep:])


def keep_only(folder, kept):
    """Remove all checkpoints of a folder but `kept`, and what a killed run has left half-written."""
    for old in set(find(folder)) - set(kept):
        os.remove(old[:-3] + '.json')
    for left in glob.glob(os.path.join(glob.escape(folder), 'step-*')):
        if left not in kept and re.search(r'step-\d+\.(pt|pt\.tmp|json\.tmp)$', left):
            os.remove(left)


def step_of(path):
    return int(re.search(r'step-(\d+)\.(?:pt|json)$', path)[1])


def find(folder):
    """The checkpoints of a folder, oldest first: paths of .pt files."""
    found = [path[:-5] + '.pt' for path in glob.glob(os.path.join(glob.escape(folder), 'step-*.json'))]
    return sorted((path for path in found if re.search(r'step-\d+\.pt$', path)), key=step_of)


def read(path):
    """A checkpoint's state, on the CPU; a UserError where it is cut short, altered or foreign."""
    try:
        with open(path[:-3] + '.json') as f:
            recorded = json.load(f)['sha256']
        with open(path, 'rb') as f:
            need(hashlib.file_digest(f, 'sha256').hexdigest() == recorded, f'{path} is damaged: it is not what '
                 f'{path[:-3]}.json records')
        state = torch.load(path, map_location='cpu', weights_only=True)     # no code is ever run from a checkpoint
        need(state['format'] == 1 and state['step'] == step_of(path), f'{path} is of another format or step')
        return state
    except OSError as error:
        raise UserError(f'{path} cannot be read: {error.strerror}: {error.filename}') from None
    except UserError:
        raise
    except Exception as error:          # whatever a foreign file makes of json and torch
        raise UserError(f'{path} is no checkpoint of this project ({type(error).__name__})') from None


def read_last(folder, say):
    """The last checkpoint of a folder that can be read, and its path; None, '' where there is none at all."""
    found = find(folder)
    for path in reversed(found):
        try:
            return read(path), path
        except UserError as error:
            say(f'refused: {error}')
    need(not found, f'cannot resume: no checkpoint of {folder} can be read')
    return None, ''


def open_run(folder, start_step):
    """Make the folder of a run ready to go on after step `start_step`, and open its log.jsonl to append.

    At 0 a run that stands there already is moved to <folder>.previous, which is replaced. Otherwise lines of the log
    beyond the step are dropped: they will be written again.
    """
    if start_step == 0 and find(folder):
        shutil.rmtree(folder + '.previous', ignore_errors=True)
        os.rename(folder, folder + '.previous')
    os.makedirs(folder, exist_ok=True)
    keep_only(folder, [p for p in find(folder) if step_of(p) <= start_step][-2:])
    path, kept = os.path.join(folder, 'log.jsonl'), []
    if start_step and os.path.exists(path):
        with open(path) as f:
            lines = f.read().split('\n')[:-1]           # what follows the last line break was torn by a kill
        kept = [line for line in lines if json.loads(line)['step'] <= start_step]
    with open(path + '.tmp', 'w') as f:
        f.writelines(line + '\n' for line in kept)
    os.replace(path + '.tmp', path)
    return open(path, 'a', buffering=1)


def load_model(init_from, groups=None, **options):
    """The weights of `init_from` as a GPT: a checkpoint of ours (a folder: its last one; or a .pt), or GPT-2's.

    groups: the data it must fit. options: GPTConfig fields that are no part of the weights. -> model, with `.record`,
    what its checkpoint says beside the weights ({} for GPT-2's).
    """
    record, found = {}, [init_from] if init_from.endswith('.pt') else find(init_from)
    need(found or not os.path.isdir(init_from) or os.path.isfile(os.path.join(init_from, 'config.json')),
         f'{init_from} holds neither a checkpoint (step-*.pt) nor GPT-2 weights (config.json)')
    if found:
        record = read(found[-1])
        model = GPT(GPTConfig(**record.pop('model_config') | options))
        model.load_state_dict(record.pop('model'))
        del record['optimizer']
    else:
        try:
            model = GPT.from_pretrained(init_from, **options)
        except ValueError as error:
            raise UserError(error) from None
    if groups is not None:
        groups.check_model(model.config, record.get('vocabulary'), init_from)
    model.record = record
    return model


def fingerprint(model):
    """SHA-256 over every parameter's name, shape and bytes, hex: the same weights, wherever they came from."""
    digest = hashlib.sha256()
    for name, p in sorted(model.state_dict().items()):
        digest.update(f'{name} {tuple(p.shape)} {p.dtype}'.encode())
        digest.update(p.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
