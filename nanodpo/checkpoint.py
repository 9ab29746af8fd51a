"""Checkpoints: <folder>/step-000100.pt, and step-000100.json with its SHA-256, which is written last."""
import hashlib
import itertools
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
from nanodpo.folder import regular, written_aside


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
    last = [path for path in find(folder) if step_of(path) <= step][-keep:]
    for path in map(Path, set(find(folder)) - set(last)):
        path.with_suffix('.json').unlink()      # first: without it nobody reads the weights
        path.unlink(missing_ok=True)


def step_of(path):
    """The step in the name of a checkpoint's .pt or .json, None where there is none."""
    match = re.search(r'step-(\d+)\.(pt|json)$', path)
    return int(match[1]) if match else None


def find(folder):
    """The checkpoints of a folder, oldest first: paths of .pt files."""
    paths = [str(path.with_suffix('.pt')) for path in Path(folder).glob('step-*.json')]
    return sorted([path for path in paths if step_of(path) is not None], key=step_of)


# what a checkpoint may hold, of which kind: first of all, then among the knobs of the run and of its model
KINDS = dict(step=int, model=dict, model_config=dict, config=dict, optimizer=dict, origin=dict, stage=str, launch=str)
KNOBS = dict(name=str, init_from=str, ref_from=str, loss=str, beta=float) | {f.name: f.type for f in fields(GPTConfig)}


def check_state(state):
    """ValueError or TypeError where a checkpoint, which may be a stranger's, is not what `save` writes."""
    for key, kind in KINDS.items():
        check(isinstance(state.get(key, kind()), kind), f'{key} must be a {kind.__name__}')
    for knob, value in (state.get('config', {}) | state['model_config']).items():
        kind = (int, float) if KNOBS.get(knob) is float else KNOBS.get(knob, object)
        good = isinstance(value, kind) or value is None and knob in ('beta', 'hf')
        check(good and (not isinstance(value, float) or math.isfinite(value)), f'{knob}={value!r:.80}')
    json.dumps([state[key] for key in state if key not in ('model', 'optimizer')])      # all others are plain values
    sizes = [state['model_config'].get(key, 1) for key in ('block_size', 'vocab_size', 'n_head', 'n_embd')]
    check(min(sizes) > 0, f'model_config has a size of {min(sizes)}')
    for name, weight in state['model'].items():
        check(torch.is_floating_point(weight), f'{name} holds no real numbers')
        check(weight.nbytes <= weight.untyped_storage().nbytes(), f'{name} is larger than what the file holds of it')


def check_weights(model, what):
    """UserError where a weight is not a finite number."""
    for name, weight in model.state_dict().items():
        need(weight.isfinite().all(), f'{what}: {name} holds a weight that is not finite')


def read(path):
    """The state of a checkpoint, on the CPU. Raises UserError where it is cut short, altered or foreign."""
    with one_line(f'{path} cannot be read as a checkpoint'), warnings.catch_warnings():
        warnings.simplefilter('ignore')         # torch's, of foreign files
        sha256 = json.loads(Path(regular(path[:-3] + '.json')).read_bytes())['sha256']
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
        number = next(n for n in itertools.count(1) if not os.path.lexists(f'{folder}.{n}'))
        os.rename(folder, f'{folder}.{number}')
        say(f'the run that was in {folder} is now in {folder}.{number}')
    os.makedirs(folder, exist_ok=True)
    log = os.path.join(folder, 'log.jsonl')
    for path in sorted(Path(folder).iterdir()):
        half = re.fullmatch(r'(step-\d+\.(pt|json)|log\.jsonl)\.tmp', path.name)
        alone = re.fullmatch(r'step-\d+\.pt', path.name) and not path.with_suffix('.json').exists()
        if half or alone or path.name == 'log.jsonl' and start_step == 0:       # of a run that saved nothing
            path.unlink()
            say(f'note: removed {path}, which was never finished')
    lines = []
    if os.path.isfile(log):
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
