"""Checkpoints: <folder>/step-000100.pt, and beside it step-000100.json with its SHA-256.

The .json is written last: it makes the .pt count.
"""
import contextlib
import glob
import hashlib
import json
import os
import re
import shutil
import warnings
from dataclasses import asdict

import torch

from config import UserError, need
from model import GPT, GPTConfig
from nanodpo.data import sha256_file


# ----------------------------------------------------------------------------------------------------
# on disk

@contextlib.contextmanager
def written_aside(*paths):
    """The names to write to, one a path. At the end they are renamed to the paths, in order; after an error they go."""
    aside = [path + '.tmp' for path in paths]
    try:
        yield aside
        for name, path in zip(aside, paths):
            os.replace(name, path)
    finally:
        for name in aside:
            with contextlib.suppress(FileNotFoundError):
                os.remove(name)


def save(folder, step, model, state, keep=2):
    """Write the model and `state`, tensors and plain Python, as checkpoint `step`. Raises OSError.

    Then all but the last `keep` checkpoints go. So do those of a later step, which a resumed run has left behind.
    """
    path = os.path.join(folder, f'step-{step:06}.pt')
    state = dict(state, format=1, step=step, model_config=asdict(model.config), model=model.state_dict())
    with written_aside(path, path[:-3] + '.json') as (weights_file, record_file):
        with open(weights_file, 'wb') as f:
            try:
                torch.save(state, f)
            except RuntimeError as error:       # torch's zip writer hides the disk's own error
                raise OSError(getattr(error.__context__, 'strerror', None) or str(error)) from None
            f.flush()
            os.fsync(f.fileno())
        with open(record_file, 'w') as f:
            json.dump(dict(step=step, config=state.get('config'), sha256=sha256_file(weights_file)), f, indent=2)
    up_to_now = [p for p in find(folder) if step_of(p) <= step]
    keep_only(folder, up_to_now[-keep:])


def keep_only(folder, kept):
    """Remove all checkpoints of a folder but `kept`, and what a killed run has left half-written or half-removed."""
    for path in set(find(folder)) - set(kept):
        os.remove(path[:-3] + '.json')          # first: it makes the weights count
    for path in glob.glob(os.path.join(glob.escape(folder), 'step-*')):
        if path not in kept and re.search(r'step-\d+\.(pt|pt\.tmp|json\.tmp)$', path):
            os.remove(path)


def step_of(path):
    """The step in the name of a checkpoint's .pt or .json, None where there is none."""
    match = re.search(r'step-(\d+)\.(pt|json)$', path)
    return int(match[1]) if match else None


def find(folder):
    """The checkpoints of a folder, oldest first: paths of .pt files."""
    records = [p for p in glob.glob(os.path.join(glob.escape(folder), 'step-*.json')) if step_of(p) is not None]
    return [p[:-5] + '.pt' for p in sorted(records, key=step_of)]


def read(path):
    """The state of a checkpoint, on the CPU. Raises UserError where it is cut short, altered or foreign."""
    try:
        with open(path[:-3] + '.json') as f:
            sha256 = json.load(f)['sha256']
        need(sha256_file(path) == sha256, f'{path} is damaged: its content is not what {path[:-3]}.json records')
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')     # torch's guesses about foreign files; ours is one line
            state = torch.load(path, map_location='cpu', weights_only=True)     # no code is ever run from a checkpoint
        ours = state['format'] == 1 and {'model', 'model_config', 'step'} <= state.keys()
    except OSError as error:
        raise UserError(f'{path} cannot be read as a checkpoint: {error.strerror}: {error.filename}') from None
    except Exception as error:      # whatever a foreign file makes of json and torch
        raise UserError(f'{path} is not a checkpoint of this project ({type(error).__name__})') from None
    need(ours, f'{path} is not a checkpoint of this version of the project')
    need(step_of(path) in (None, state['step']), f'{path} is not what its name says, but step {state["step"]}')
    return state


def read_last(folder, say):
    """The last checkpoint of a folder that can be read, its state and path; None, '' where the folder has none.

    say: prints why a checkpoint was refused. Raises UserError where all were.
    """
    paths = find(folder)
    for path in reversed(paths):
        try:
            return read(path), path
        except UserError as error:
            say(f'refused: {error.message}')
    need(not paths, f'cannot resume: no checkpoint of {folder} can be read')
    return None, ''


# ----------------------------------------------------------------------------------------------------
# the folder of a run

def open_run(folder, start_step):
    """Make the folder of a run ready to go on after step `start_step`, and open its log.jsonl to append.

    At 0 a run that stands there already is moved to <folder>.previous, which is replaced. Otherwise the log loses its
    lines beyond the step: they will be written again. Raises OSError.
    """
    if start_step == 0 and find(folder):
        shutil.rmtree(folder + '.previous', ignore_errors=True)
        os.rename(folder, folder + '.previous')
    os.makedirs(folder, exist_ok=True)
    paths = find(folder)                        # killed in its last save, a run has not removed the oldest yet
    last = sum(step_of(p) <= start_step for p in paths)
    keep_only(folder, paths[max(0, last - 2):])
    log = os.path.join(folder, 'log.jsonl')
    lines = []
    if start_step and os.path.exists(log):
        with open(log, 'rb') as f:
            lines = [line for line in f if is_logged(line, start_step)]
    with written_aside(log) as (log_file,), open(log_file, 'wb') as f:
        f.writelines(lines)
    return open(log, 'a', buffering=1)


def is_logged(line, step):
    """Whether a line of log.jsonl is of a step up to `step`. It is not where a kill has torn it."""
    try:
        return line.endswith(b'\n') and json.loads(line)['step'] <= step
    except (ValueError, LookupError, TypeError):
        return False


# ----------------------------------------------------------------------------------------------------
# models

def load_model(init_from, groups=None, **options):
    """The weights of `init_from` as a GPT, on the CPU. Its `.record` is what a checkpoint says beside its weights.

    init_from: a checkpoint of ours, as a .pt or as a folder, whose last one counts; or GPT-2 weights, as a folder in
    the Hugging Face layout or a hub name. groups: the data that the model must fit. options: GPTConfig fields that are
    no part of the weights (dropout, activation_checkpointing). Raises UserError.
    """
    paths = [init_from] if init_from.endswith('.pt') else find(init_from)
    model = load_checkpoint(paths, options) if paths else load_gpt2(init_from, options)
    if groups is not None:
        groups.check_model(model.config, model.record.get('vocabulary'), init_from)
    return model


def load_checkpoint(paths, options):
    """The model of the last of the checkpoints `paths`."""
    try:
        record = read(paths[-1])
    except UserError as error:
        before = f'; the one before it is {paths[-2]}' if len(paths) > 1 else ''
        raise UserError(error.message + before) from None
    try:
        model = GPT(GPTConfig(**record.pop('model_config') | options))
        model.load_state_dict(record.pop('model'))
    except Exception as error:      # whatever foreign content makes of torch
        raise UserError(f'{paths[-1]}: its weights are not those of its model_config '
                        f'({type(error).__name__})') from None
    record.pop('optimizer', None)
    model.record = record
    return model


def load_gpt2(name_or_dir, options):
    """GPT.from_pretrained, with one line for whatever is wrong."""
    here = os.path.isdir(name_or_dir)
    files = os.listdir(name_or_dir) if here else []
    need('config.json' in files or not here,
         f'{name_or_dir} holds neither a checkpoint (step-*.pt) nor GPT-2 weights (config.json)')
    need('pytorch_model.bin' not in files or any(file.endswith('.safetensors') for file in files),
         f'{name_or_dir}: model.safetensors does not exist; convert pytorch_model.bin first: '
         f'transformers.GPT2LMHeadModel.from_pretrained({name_or_dir!r}).save_pretrained({name_or_dir!r})')
    what = f'{name_or_dir} cannot be read as GPT-2 weights'
    if not here:
        what = f"'{name_or_dir}' is neither a directory here nor GPT-2 weights that the hub gives"
    try:
        model = GPT.from_pretrained(name_or_dir, **options)
    except ImportError as error:
        raise UserError(f'{name_or_dir}: to read GPT-2 weights, pip install {error.name}') from None
    except Exception as error:      # whatever a wrong name or a damaged file makes of the hub, json and safetensors
        kind = '' if type(error) is ValueError else f'{type(error).__name__}: '
        raise UserError(f'{what}: {kind}{error}') from None
    model.record = {}
    return model


def fingerprint(model):
    """SHA-256 over every parameter's name, shape and bytes, hex: the same weights, wherever they came from."""
    digest = hashlib.sha256()
    for name, p in sorted(model.state_dict().items()):
        digest.update(f'{name} {tuple(p.shape)} {p.dtype}'.encode())
        digest.update(p.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
