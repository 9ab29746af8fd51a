"""Checkpoints: <folder>/step-000100.pt, and step-000100.json with its SHA-256, which is written last."""
import hashlib
import json
import math
import os
import re
import warnings
from dataclasses import asdict, fields
from pathlib import Path

import torch

from config import UserError, need, one_line
from model import GPTConfig, check
from nanodpo import hf
from nanodpo.data import sha256_file
from nanodpo.folder import written_aside


def save(folder, step, model, state, keep=2):
    """Write the model and `state` as checkpoint `step`. The last `keep` up to it stay, no others. Raises OSError."""
    path = os.path.join(folder, f'step-{step:06}')
    check_weights(model, f'step {step} is not saved, those before it are untouched')
    os.makedirs(folder, exist_ok=True)
    state = dict(state, format=1, step=step, model_config=asdict(model.config), model=model.state_dict())
    with written_aside(path + '.json') as record, written_aside(path + '.pt') as weights, open(weights, 'wb') as f:
        try:
            torch.save(state, f)
        except RuntimeError as error:           # torch's zip writer hides the disk's own error
            raise OSError(str(error.__context__ or error)) from None
        f.flush()
        os.fsync(f.fileno())
        about = dict(step=step, config=state.get('config'), sha256=sha256_file(weights))
        Path(record).write_text(json.dumps(about, indent=2))
    keep_only(folder, [p for p in find(folder) if step_of(p) <= step][-keep:])


def step_of(path):
    """The step in the name of a checkpoint's .pt or .json, None where there is none."""
    match = re.search(r'step-(\d+)\.(pt|json)$', path)
    return int(match[1]) if match else None


def find(folder):
    """The checkpoints of a folder, oldest first: paths of .pt files."""
    paths = [str(path.with_suffix('.pt')) for path in Path(folder).glob('step-*.json')]
    return sorted([path for path in paths if step_of(path) is not None], key=step_of)


def keep_only(folder, kept):
    """Remove all checkpoints of a folder but `kept`, and what a killed run has left of others."""
    for path in sorted(Path(folder).glob('step-*')):        # a .json before its .pt
        if re.search(r'step-\d+\.(json|pt)(\.tmp)?$', path.name) and str(path.with_suffix('.pt')) not in kept:
            path.unlink()


# what a checkpoint may hold, of which kind; `config` holds knobs
KINDS = dict(step=int, model=dict, model_config=dict, config=dict, optimizer=dict, origin=dict, stage=str, launch=str)
KNOBS = dict(name=str, loss=str, beta=float) | {field.name: field.type for field in fields(GPTConfig)}


def check_state(state):
    """ValueError where a checkpoint, which may be a stranger's, is not what `save` writes."""
    for key, kind in KINDS.items():
        check(isinstance(state.get(key, kind()), kind), f'{key} must be a {kind.__name__}')
    for knob, value in (state.get('config', {}) | state['model_config']).items():
        kind = KNOBS.get(knob, type(value))
        good = type(value) in (kind, type(None)) or kind is float and type(value) is int
        check(good and (kind is not float or math.isfinite(value or 0)), f'{knob}={value!r:.80}')
    for name, weight in state['model'].items():
        check(torch.is_floating_point(weight), f'{name} holds no real numbers')


def check_weights(model, what):
    """UserError where a weight is not a finite number."""
    for name, weight in model.state_dict().items():
        need(weight.isfinite().all(), f'{what}: {name} holds a weight that is not finite')


def read(path):
    """The state of a checkpoint, on the CPU. Raises UserError where it is cut short, altered or foreign."""
    with one_line(f'{path} cannot be read as a checkpoint'), warnings.catch_warnings():
        warnings.simplefilter('ignore')         # torch's, of foreign files
        sha256 = json.loads(Path(path[:-3] + '.json').read_bytes())['sha256']
        need(sha256_file(path) == sha256, f'{path} is damaged (SHA-256): use the checkpoint before it')
        state = torch.load(path, map_location='cpu', weights_only=True)     # never runs code
        need(state['format'] == 1, f'{path} is of another version of this project')
        check_state(state)
        need(step_of(path) in (None, state['step']), f'{path} is not what its name says, but step {state["step"]}')
    return state


def read_last(folder, say):
    """State and path of the last readable checkpoint, (None, '') if there is none. UserError if all are bad."""
    for path in reversed(find(folder)):
        try:
            return read(path), path
        except UserError as error:
            say(f'refused: {error.message}')
    need(not find(folder), f'cannot resume: no checkpoint of {folder} can be read')
    return None, ''


def open_run(folder, start_step, say=print):
    """Make a run's folder ready to go on after start_step. -> its log.jsonl, to append to. Raises OSError.

    At 0 an earlier run is moved to <folder>.1, or the next free number. Else the log loses its lines beyond the step.
    What a kill has left half-written is removed.
    """
    folder = os.path.realpath(folder) if os.path.islink(folder) else folder     # a link stays, to its disk
    if start_step == 0 and find(folder):
        number = 1
        while os.path.lexists(f'{folder}.{number}'):
            number += 1
        os.rename(folder, f'{folder}.{number}')
        say(f'the run that was in {folder} is now in {folder}.{number}')
    os.makedirs(folder, exist_ok=True)
    whole = [step_of(path) for path in find(folder)]
    for path in sorted(Path(folder).glob('*')):
        if path.suffix == '.tmp' or path.suffix == '.pt' and step_of(str(path)) not in [None, *whole]:
            path.unlink()
            say(f'note: removed {path}, which was never finished')
    older = [path for path in find(folder) if step_of(path) <= start_step]
    keep_only(folder, set(find(folder)) - set(older[:-2]))          # a run killed in `save` may have left three
    log = os.path.join(folder, 'log.jsonl')
    lines = []
    if start_step and os.path.exists(log):
        complete = re.findall(rb'(?m)^({"step": (\d+).*}\n)', Path(log).read_bytes())    # a kill may tear one
        lines = [line for line, step in complete if int(step) <= start_step]
    with written_aside(log) as aside:
        Path(aside).write_bytes(b''.join(lines))
    return open(log, 'a', buffering=1)


# --- models ---------------------------------------------------------------------------------------

def load_model(init_from, groups=None, **options):
    """The weights of `init_from` as a GPT, on the CPU. Its `.record` is what a checkpoint holds beside them.

    init_from: a .pt, a folder of which the last one counts, or weights as for hf.from_pretrained.
    groups: the data that the model must fit. options: as of hf.from_pretrained. Raises UserError.
    """
    path = (find(init_from) or [init_from])[-1]
    record = {}
    with one_line(f'{path} is no checkpoint, and no directory or hub name of weights that can be read'):
        if path.endswith('.pt'):
            record = read(path)
            weights = record.pop('model')
            model = hf.empty(GPTConfig(**record.pop('model_config') | options), weights)
            model.load_state_dict({name: weight.float() for name, weight in weights.items()}, assign=True)
            record.pop('optimizer', None)
        else:
            model = hf.from_pretrained(path, **options)
    check_weights(model, path)
    model.record = record
    if groups is not None:
        groups.check_model(model.config, record.get('vocabulary'), init_from)
    return model


def fingerprint(model):
    """SHA-256 over every parameter's name, shape and bytes, hex: equal for the same weights from anywhere."""
    digest = hashlib.sha256()
    for name, p in sorted(model.state_dict().items()):
        digest.update(f'{name} {tuple(p.shape)} {p.dtype}'.encode())
        digest.update(p.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
