"""A GPT-2, whole, in one file.

    model = GPT(GPTConfig(n_layer=4, n_head=4, n_embd=128))     # random weights
    model = GPT.from_pretrained('gpt2')                         # a hub name, or a directory in that layout
    model.save_pretrained('gpt2-dpo')                           # transformers and what builds on it load this

    python model.py out/hh/dpo hh-hf                # the same of a checkpoint, with the tokenizer and turn template of data/hh
    python model.py gpt2 gpt2-hf --data=data/hh     # of a name or directory, which does not say what data it is for

`forward` gives hidden states for a packed row: it holds many groups [prompt | response_1 | ... | response_K] side by
side, and `packed_mask` says who sees whom. The tied output head stands apart (`token_logps`), because it is needed
at response tokens only. `generate` samples with a key-value cache.

Departures from GPT-2: dropout acts on embeddings and residual branches, not on attention weights (FlexAttention
has none). The weights are float32; a stage casts with autocast.
"""
import glob
import hashlib
import json
import math
import os
import re
import shutil
import sys
import tempfile
import urllib.error
import urllib.request
import warnings
from dataclasses import asdict, dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

flex = torch.compile(flex_attention, dynamic=True)      # inlined where the whole model is compiled; rows vary in length
block_mask = torch.compile(create_block_mask, dynamic=True)


@dataclass
class GPTConfig:
    block_size: int = 1024      # longest prompt + response, in tokens
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    layer_norm_epsilon: float = 1e-5
    activation_checkpointing: bool = False      # recompute blocks in the backward pass: less memory, more time


class CheckpointError(ValueError):
    """Weights that this model cannot load; the message is one line."""


# -----------------------------------------------------------------------------
# attention over packed rows

@dataclass
class Stretches:
    """Dense masks (1, 1, n, n) of a row's stretches; no list, whose length torch.compile would compile for."""
    masks: list


def visible(group, part):
    """The whole attention rule, as FlexAttention's mask_mod: a query sees a key of its own group, not after it, in the
    prompt (part 0) or in its own response. The result is the same numbers as each prompt + response alone."""
    def rule(b, h, q, k):
        return (group[b, q] == group[b, k]) & (q >= k) & ((part[b, k] == 0) | (part[b, k] == part[b, q]))
    return rule


def packed_block_mask(group, part):
    """The BlockMask of a row whose length is a multiple of 128: blocks where nobody sees anybody are skipped."""
    T = group.shape[1]
    return block_mask(visible(group, part), 1, None, T, T, device=group.device)


def packed_mask(group, part, cuts=()):
    """Who sees whom in a packed row, `visible`: group, part (1, T) -> a mask for GPT.forward.

    On CUDA a FlexAttention BlockMask. Elsewhere FlexAttention has no backward pass: there it is dense booleans for
    scaled_dot_product_attention, one for each stretch between `cuts`, places in the row that no group crosses.
    """
    if group.is_cuda:
        return packed_block_mask(group, part)
    rule, stretches = visible(group, part), torch.arange(group.shape[1], device=group.device).tensor_split(cuts)
    return Stretches([rule(0, 0, t[:, None], t[None, :])[None, None] for t in stretches])


@torch.compiler.disable         # the lengths change with every row
def stretch_attention(q, k, v, mask):
    """Attention within each stretch of a row alone. q, k, v: (1, H, T, D); mask: Stretches. -> (1, T, H, D)"""
    stretches = zip(*(x.split([m.shape[-1] for m in mask.masks], dim=2) for x in (q, k, v)), mask.masks)
    return torch.cat([F.scaled_dot_product_attention(q, k, v, attn_mask=m).transpose(1, 2) for q, k, v, m in stretches], dim=1)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, mask, cache=None, positions=None):
        B, T, C = x.shape
        q, k, v = (y.view(B, T, self.n_head, -1) for y in self.c_attn(x).split(C, dim=2))      # (B, T, H, D)
        if cache is not None:       # write this call's keys and values into their slots, attend to all up to now
            rows = torch.arange(B, device=x.device)[:, None]
            cache[0][rows, positions], cache[1][rows, positions] = k, v
            k, v = (c[:, :mask.shape[-1]] for c in cache)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))                                        # (B, H, T, D)
        if isinstance(mask, BlockMask):
            y = flex(q, k, v, block_mask=mask).transpose(1, 2)
        elif isinstance(mask, Stretches):
            y = stretch_attention(q, k, v, mask)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
        return self.c_proj(y.reshape(B, T, C))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, eps = config.n_embd, config.layer_norm_epsilon
        self.ln_1, self.attn = nn.LayerNorm(C, eps), Attention(config)
        self.ln_2, self.c_fc, self.c_proj = nn.LayerNorm(C, eps), nn.Linear(C, 4 * C), nn.Linear(4 * C, C)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, mask, at=None, cache=None, positions=None):
        x = x + self.dropout(self.attn(self.ln_1(x), mask, cache, positions))
        if at is not None:          # the last block: nothing beyond here mixes tokens, so only the scored ones go on
            x = x.flatten(0, 1).index_select(0, at)
        return x + self.dropout(self.c_proj(F.gelu(self.c_fc(self.ln_2(x)), approximate='tanh')))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head:
            raise CheckpointError(f'n_embd={config.n_embd} is not a multiple of n_head={config.n_head}')
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)       # also the output head
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        for name, p in self.named_parameters():     # GPT-2's initialisation
            if p.dim() == 2:
                residual = name.endswith('c_proj.weight')
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if residual else 0.02)
            elif name.endswith('bias'):
                nn.init.zeros_(p)

    def forward(self, tokens, positions, mask, at=None, cache=None):
        """Hidden states after the last norm: (B, T, C), or (S, C) at the flat indices `at` (S,) into B*T alone.

        tokens, positions: (B, T); mask: of packed_mask, or boolean (B, 1, T, keys); cache: of generate.
        """
        x = self.dropout(self.wte(tokens) + self.wpe(positions))        # (B, T, C)
        for i, block in enumerate(self.h):
            last = at if i == len(self.h) - 1 else None
            if self.config.activation_checkpointing and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, mask, last, use_reentrant=False)
            else:
                x = block(x, mask, last, cache and cache[i], positions)
        return self.ln_f(x)

    def num_params(self):
        """Parameters, the head counted once: int."""
        return sum(p.numel() for p in self.parameters())

    # -------------------------------------------------------------------------
    # sampling

    @torch.no_grad()
    def generate(self, prompts, max_new_tokens, end_token, vocab_size=None, temperature=1.0, top_k=0, top_p=1.0,
                 seed=0):
        """Sample one response for each prompt, all in one batch, with a key-value cache.

        prompts: list of lists of ids. end_token: its id, where a response ends. vocab_size: the tokenizer's; no
        id from there on is ever drawn. temperature 0 is greedy; top_k 0 and top_p 1 cut nothing.
        -> list of lists of ids, at most max_new_tokens each, the end token included where it was drawn.

        A sequence's slots in the cache are its positions, so prompts of unequal length need no padding on the
        left. Draws invert the cumulative distribution at one uniform number a sequence and step: two models
        with the same seed share them, and differ only where their distributions do.
        """
        lengths = [len(p) for p in prompts]
        if min(lengths) < 1 or max(lengths) >= self.config.block_size:
            raise ValueError(f'prompts must have 1 to {self.config.block_size - 1} tokens, got {min(lengths)} to {max(lengths)}')
        was_training = self.training
        self.eval()
        device, B, C = self.wte.weight.device, len(prompts), self.config.n_embd
        size = min(max(lengths) + max_new_tokens, self.config.block_size)
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else self.wte.weight.dtype
        cache = [torch.zeros(2, B, size, self.config.n_head, C // self.config.n_head, device=device, dtype=dtype)
                 for _ in self.h]
        noise = torch.Generator().manual_seed(seed)
        tokens = torch.zeros(B, max(lengths), dtype=torch.long)
        for row, prompt in zip(tokens, prompts):
            row[:len(prompt)] = torch.tensor(prompt)
        tokens = tokens.to(device)
        positions = torch.arange(max(lengths), device=device).expand(B, -1)
        last = torch.tensor(lengths, device=device) - 1                 # (B,) the newest token's position
        slots, rows = torch.arange(size, device=device), torch.arange(B, device=device)
        drawn, done = [], torch.zeros(B, dtype=torch.bool, device=device)
        for step in range(max_new_tokens):
            seen = max(lengths) + step
            mask = slots[:min(seen, size)] <= positions[:, None, :, None]           # (B, 1, T, seen)
            hidden = self(tokens, positions, mask, cache=cache)
            hidden = hidden[rows, last] if step == 0 else hidden[:, 0]              # (B, C)
            logits = F.linear(hidden, self.wte.weight).float()[:, :vocab_size]      # (B, V)
            u = torch.rand(B, generator=noise, dtype=torch.float64).to(device, torch.float32)
            new = draw(logits, u, temperature, top_k, top_p)
            drawn.append(torch.where(done, -1, new))                                # -1: after the end
            done |= new == end_token
            last = last + 1
            done |= last == self.config.block_size - 1              # prompt + response fill the positions
            if done.all():
                break
            tokens, positions = new[:, None], last.clamp(max=size - 1)[:, None]     # (B, 1)
        self.train(was_training)
        return [[t for t in row if t >= 0] for row in zip(*(new.tolist() for new in drawn))] if drawn else [[] for _ in prompts]

    # -------------------------------------------------------------------------
    # GPT-2 weights in the Hugging Face layout

    @classmethod
    def from_pretrained(cls, name_or_dir, **options):
        """The model in a directory with config.json and model.safetensors, or of that name on the hub.

        options: GPTConfig fields that are no part of the weights (dropout, activation_checkpointing).
        Raises CheckpointError where the files are missing, damaged or of an architecture that is not GPT-2's.
        """
        try:
            from safetensors import SafetensorError, safe_open
            path = _fetcher(name_or_dir)
        except ImportError as error:
            raise CheckpointError(f'{name_or_dir}: to read GPT-2 weights, pip install {error.name}') from None
        hf = _read_json(path('config.json'))
        if 'model_type' in hf and hf['model_type'] != 'gpt2':
            raise CheckpointError(f"{name_or_dir}: model_type={hf['model_type']!r}, this model is GPT-2 and needs 'gpt2'")
        sizes = {'n_positions': hf.get('n_positions', 1024)}        # in GPTConfig's order
        sizes |= {key: hf.get(key) for key in ('vocab_size', 'n_layer', 'n_head', 'n_embd')}
        for key, value in sizes.items():
            if type(value) is not int or not 1 <= value < 2**31:
                raise CheckpointError(f"{name_or_dir}/config.json: {key} is {value!r}, it must be a positive whole number")
        allowed = dict(activation_function=['gelu_new', 'gelu_pytorch_tanh'],           # two names of one function
                       tie_word_embeddings=[True], n_inner=[4 * sizes['n_embd'], None],
                       scale_attn_weights=[True], scale_attn_by_inverse_layer_idx=[False], add_cross_attention=[False])
        for key, values in allowed.items():
            if key in hf and hf[key] not in values:
                raise CheckpointError(f'{name_or_dir}: {key}={hf[key]!r}, this model is GPT-2 and needs {values[0]!r}')
        eps = hf.get('layer_norm_epsilon', 1e-5)
        if type(eps) not in (int, float) or not 0 <= eps < 1:
            raise CheckpointError(f'{name_or_dir}/config.json: layer_norm_epsilon is {eps!r}, it must be a number such as 1e-05')

        files = ['model.safetensors']           # or, of a large model, several
        if path(files[0], optional=True) is None and (index := path('model.safetensors.index.json', optional=True)):
            shards = _read_json(index).get('weight_map')
            if not isinstance(shards, dict) or not all(isinstance(file, str) for file in shards.values()):
                raise CheckpointError(f'{index} does not say which file holds which tensor (weight_map)')
            files = sorted(set(shards.values()))
        tensors = {}
        for file in files:
            try:
                with safe_open(path(file), 'pt') as f:
                    tensors.update({key.removeprefix('transformer.'): f.get_tensor(key) for key in f.keys()})
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f'{name_or_dir}/{file} is damaged: {error}') from None

        layers = len({key.split('.')[1] for key in tensors if key.startswith('h.')})
        if layers != sizes['n_layer']:
            raise CheckpointError(f"{name_or_dir} holds weights of {layers} layers, config.json says n_layer={sizes['n_layer']}")
        with torch.device('meta'):              # shapes alone: no time for random weights
            model = cls(GPTConfig(*sizes.values(), layer_norm_epsilon=eps, **options))
        ours = {}
        for name, (theirs, p) in zip(model.state_dict(), _hf_names(model)):
            if theirs not in tensors:
                raise CheckpointError(f'{name_or_dir} has no tensor {theirs}')
            tensor = tensors.pop(theirs)
            tensor = tensor.t() if _transposed(theirs) else tensor
            if tensor.shape != p.shape:
                raise CheckpointError(f'{name_or_dir}: {theirs} has shape {tuple(tensor.shape)}, config.json '
                                      f'makes it {tuple(p.shape)}')
            if not tensor.is_floating_point():
                raise CheckpointError(f'{name_or_dir}: {theirs} is of {tensor.dtype}, not of floating point')
            ours[name] = torch.empty(p.shape).copy_(tensor)      # float32; no view of the file, which may be replaced
        model.load_state_dict(ours, assign=True)
        head = tensors.pop('lm_head.weight', None)
        left = [k for k in tensors if not k.endswith(('.attn.bias', '.attn.masked_bias'))]     # causal-mask buffers
        if left or head is not None and not torch.equal(head.float(), model.wte.weight):
            raise CheckpointError(f"{name_or_dir} holds weights that GPT-2 has no place for: {', '.join(left[:3]) or 'lm_head'}")
        return model

    def save_pretrained(self, folder, data_dir='', end_token=None):
        """Write what transformers' GPT2LMHeadModel loads, and with data_dir (data/<name>) what its AutoTokenizer does: the
        tokenizer and turn template of that data set.

        A vocabulary padded beyond the tokenizer's is cut to it, so that no id without a token is ever generated.
        end_token: the id where a text ends (default: the tokenizer's; without one the last, as GPT-2's).
        All files are written aside, then take the place of an earlier export's. Where that fails the folder is as it was;
        raises CheckpointError or OSError.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file
        if error := export_error(folder, data_dir):
            raise CheckpointError(error)
        c, size = self.config, self.config.vocab_size
        if data_dir:
            from prepare_prefs import load_tokenizer, read_meta, save_tokenizer     # here: weights alone need none of ours
            meta = read_meta(data_dir)
            size, end_token = meta['vocab_size'], meta['eot_token'] if end_token is None else end_token
            if size > c.vocab_size:
                raise CheckpointError(f'{data_dir} has a vocabulary of {size:,}, the model of {c.vocab_size:,}')
        end_token = size - 1 if end_token is None else end_token
        ends = dict(bos_token_id=end_token, eos_token_id=end_token, pad_token_id=end_token)
        hf = dict(architectures=['GPT2LMHeadModel'], model_type='gpt2', activation_function='gelu_new', vocab_size=size,
                  n_positions=c.block_size, n_ctx=c.block_size, n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd,
                  layer_norm_epsilon=c.layer_norm_epsilon, attn_pdrop=0.0, embd_pdrop=c.dropout, resid_pdrop=c.dropout,
                  dtype='float32', made_by=MADE_BY, **ends)
        tensors = {f'transformer.{theirs}': (p.t() if _transposed(theirs) else p).detach().float().cpu().contiguous()
                   for theirs, p in _hf_names(self)}
        tensors['transformer.wte.weight'] = tensors['transformer.wte.weight'][:size].contiguous()
        existed = os.path.isdir(folder)
        os.makedirs(folder, exist_ok=True)
        for left in glob.glob(os.path.join(glob.escape(folder), '.export-*')):      # by a run that was killed
            shutil.rmtree(left)
        try:
            with tempfile.TemporaryDirectory(prefix='.export-', dir=folder) as aside:
                try:
                    save_file(tensors, os.path.join(aside, 'model.safetensors'), metadata={'format': 'pt'})
                except SafetensorError as error:        # the disk's own error, in its words
                    raise OSError(f'{folder}/model.safetensors: {error}') from None
                for file, content in (('config.json', hf), ('generation_config.json', ends)):
                    with open(os.path.join(aside, file), 'w') as f:
                        json.dump(content, f, indent=2)
                shutil.copymode(f.name, os.path.join(aside, 'model.safetensors'))       # safetensors lets nobody else read it
                if data_dir:
                    save_tokenizer(aside, load_tokenizer(data_dir, meta['tokenizer']), meta['template'], c.block_size)
                _take_the_place(aside, folder)
        except BaseException:
            if not existed:
                os.rmdir(folder)
            raise


MADE_BY = 'nanoDPO'         # in config.json: an export of ours may be replaced by another, nothing else is
EXPORTED = ('model.safetensors', 'generation_config.json', 'tokenizer.json', 'tokenizer_config.json', 'vocab.json', 'merges.txt',
            'config.json')
CONTRADICTING = ('model.safetensors.index.json', 'pytorch_model.bin', 'pytorch_model.bin.index.json', 'chat_template.jinja',
                 'special_tokens_map.json', 'added_tokens.json')        # readers would mix these with what we write


def export_error(folder, data_dir='', keep=()):
    """Why save_pretrained could not write to `folder`, one line; '' where nothing stands against it.

    keep: the directories and files that a run begins with and writes to, which its export must not mix with.
    """
    try:
        import safetensors      # noqa: F401
        if data_dir:
            from prepare_prefs import load_tokenizer, read_meta
            load_tokenizer(data_dir, read_meta(data_dir)['tokenizer'])      # tiktoken's may have to be downloaded
    except ImportError as error:
        return f'{folder} cannot be exported to: pip install {error.name}'
    except SystemExit as error:
        return f'{folder} cannot be exported to: {str(error).removeprefix("error: ")}'
    above = os.path.abspath(folder)
    while not os.path.lexists(above):
        above = os.path.dirname(above)
    if not os.path.isdir(above):
        return f'{folder} cannot be exported to: {above} is not a directory'
    if not os.access(above, os.R_OK | os.W_OK | os.X_OK):
        return f'{folder} cannot be exported to: no permission to write in {above}'
    if any(os.path.realpath(folder) == os.path.realpath(path) for path in keep if path):
        return f'{folder} is what the run begins with or writes to: export to another directory'
    if find_checkpoints(folder):
        return f'{folder} holds the checkpoints of a run: export to another directory'
    present = set(os.listdir(folder)) if os.path.isdir(folder) else set()
    try:
        ours = 'config.json' in present and _read_json(os.path.join(folder, 'config.json')).get('made_by') == MADE_BY
    except CheckpointError:
        ours = False
    if foreign := sorted(present.intersection(CONTRADICTING if ours else CONTRADICTING + EXPORTED)):
        return f'{folder} holds {foreign[0]}, which is of no export of ours: choose another directory'
    return ''


def _take_the_place(aside, folder):
    """Move the files of a whole export, in `aside`, in place of an earlier one; if that fails midway it comes back."""
    for file in os.listdir(aside):
        with open(os.path.join(aside, file), 'rb') as f:
            os.fsync(f.fileno())
    old = tempfile.mkdtemp(dir=aside)
    try:
        for file in EXPORTED:
            for source, target in ((folder, old), (aside, folder)):
                if os.path.exists(os.path.join(source, file)):
                    os.replace(os.path.join(source, file), os.path.join(target, file))
    except BaseException:
        for file in os.listdir(old):
            os.replace(os.path.join(old, file), os.path.join(folder, file))
        raise


def _read_json(path):
    """The object in a JSON file, or a CheckpointError."""
    try:
        with open(path, encoding='utf-8') as f:
            found = json.load(f)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f'{path} is not JSON: {error}') from None
    except OSError as error:
        raise CheckpointError(f'{path} cannot be read: {error.strerror}') from None
    if not isinstance(found, dict):
        raise CheckpointError(f'{path} holds no JSON object')
    return found


def _hf_names(model):
    """(Hugging Face's name, parameter) for every parameter; only the MLP's differ from ours."""
    for name, p in model.named_parameters():
        yield re.sub(r'^(h\.\d+\.)(c_fc|c_proj)', r'\1mlp.\2', name), p


def _transposed(name):
    """Hugging Face keeps GPT-2's linear layers as (in, out), nn.Linear as (out, in)."""
    return name.endswith(('c_attn.weight', 'c_proj.weight', 'c_fc.weight'))


def hub_answers():
    """Whether the hub can be reached: without it its client would retry for half a minute."""
    try:
        urllib.request.urlopen(os.environ.get('HF_ENDPOINT', 'https://huggingface.co'), timeout=5).close()
    except OSError as error:
        return isinstance(error, urllib.error.HTTPError)        # that is an answer
    return True


def _fetcher(name_or_dir):
    """A function from a file's name to its path, in the directory or downloaded from the hub."""
    def local(file, optional=False):
        path = os.path.join(name_or_dir, file)
        if os.path.isfile(path):
            return path
        if optional:
            return None
        raise CheckpointError(f'{path} does not exist' + ('; convert pytorch_model.bin first: '
                              f'transformers.GPT2LMHeadModel.from_pretrained({name_or_dir!r}).save_pretrained({name_or_dir!r})'
                              if os.path.isfile(os.path.join(name_or_dir, 'pytorch_model.bin')) else ''))

    if os.path.isdir(name_or_dir):
        return local
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError
    offline = bool(os.environ.get('HF_HUB_OFFLINE')) or not hub_answers()    # then the cache or nothing, at once

    def hub(file, optional=False):
        try:
            return hf_hub_download(name_or_dir, file, local_files_only=offline)
        except Exception as error:      # of many kinds: no such name, no such file, no network, no token
            if optional and isinstance(error, EntryNotFoundError):
                return None
            raise CheckpointError(f"'{name_or_dir}' is neither a directory here nor to be had from the hub: {file}: "
                                  f'{type(error).__name__} (offline, or a wrong name?)') from None

    return hub


# -----------------------------------------------------------------------------
# the output head

def _tile_logsumexp(logits):
    return logits.float().logsumexp(-1)


def _tile_gradient(logits, normalizer, grad, column, inside):
    """g (1[target] - p) for a tile of the vocabulary, in the logits' type."""
    d_logits = logits.float().sub_(normalizer[:, None]).exp_().mul_(-grad[:, None])
    return d_logits.scatter_add_(1, column, (grad * inside)[:, None]).to(logits.dtype)


_fused = {f: torch.compile(f, dynamic=True) for f in (_tile_logsumexp, _tile_gradient)}     # on CUDA


class _TokenLogps(torch.autograd.Function):
    """token_logps, with logits for `tile` entries of the vocabulary at a time, made again in the backward pass."""

    @staticmethod
    def forward(ctx, states, weight, target, tile, dtype):
        logsumexp = _fused[_tile_logsumexp] if states.is_cuda else _tile_logsumexp
        ctx.input_dtypes = states.dtype, weight.dtype
        states, head = states.to(dtype), weight.to(dtype)                                   # (S, C), (V, C)
        logps = torch.zeros(len(target), dtype=torch.float32, device=target.device)         # (S,)
        normalizer = torch.full_like(logps, -torch.inf)
        for v in range(0, len(head), tile):
            logits = states @ head[v:v + tile].t()                                          # (S, tile)
            normalizer = torch.logaddexp(normalizer, logsumexp(logits))
            column, inside = _in_tile(target, v, logits.shape[1])
            logps += logits.gather(1, column)[:, 0] * inside
        ctx.save_for_backward(states, head, target, normalizer)
        ctx.tile = tile
        return logps - normalizer

    @staticmethod
    def backward(ctx, grad):
        states, head, target, normalizer = ctx.saved_tensors
        gradient = _fused[_tile_gradient] if states.is_cuda else _tile_gradient
        states_dtype, weight_dtype = ctx.input_dtypes
        d_states, d_head = torch.zeros_like(states, dtype=torch.float32), torch.empty_like(head, dtype=weight_dtype)
        for v in range(0, len(head), ctx.tile):
            piece = head[v:v + ctx.tile]
            d_logits = gradient(states @ piece.t(), normalizer, grad, *_in_tile(target, v, len(piece)))
            d_states += d_logits @ piece
            d_head[v:v + ctx.tile] = d_logits.t() @ states
        return d_states.to(states_dtype), d_head, None, None, None


def _in_tile(target, first, width):
    """Which column of the tile a target is, (S, 1), and whether it lies in it at all, (S,)."""
    column = target - first
    return column.clamp(0, width - 1)[:, None], (0 <= column) & (column < width)


def token_logps(states, weight, target, tile=4096):
    """log p(target) of the scored tokens.

    states: (S, C), the hidden states that predict them, GPT.forward's at `at`; weight: (V, C), the head; target: (S,)
    -> (S,) float32, nats. The matmuls run in autocast's type where that is on, the softmax in float32. No logits are
    kept: memory is S * tile, whatever the vocabulary.
    """
    device = states.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype
    return _TokenLogps.apply(states, weight, target, tile, dtype)


def draw(logits, u, temperature=1.0, top_k=0, top_p=1.0):
    """One id a row from logits (B, V), by inverting the cumulative distribution at u (B,) in [0, 1). -> (B,)"""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if 0 < top_k < logits.shape[1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, ids = logits.softmax(-1).sort(descending=True, stable=True)
        outside = ordered.cumsum(-1) - ordered >= top_p         # the first is always inside
        logits = logits.masked_fill(outside.scatter(1, ids, outside), -torch.inf)
    exact = torch.float32 if logits.device.type == 'mps' else torch.float64     # a long float32 sum drifts; MPS has no other
    cumulative = logits.softmax(-1).to(exact).cumsum(-1)
    new = torch.searchsorted(cumulative, u[:, None].to(exact) * cumulative[:, -1:], right=True)[:, 0]
    # u * total rounded up to total would fall past the end: take the last id that has any probability
    last = logits.shape[1] - 1 - logits.flip(1).ne(-torch.inf).int().argmax(1)
    return torch.minimum(new, last)


# -----------------------------------------------------------------------------
# checkpoints: <folder>/step-000100.pt, and step-000100.json with its hash, written last

def save_checkpoint(folder, step, model, state, keep=2):
    """Write the model and `state` (tensors and plain Python) as checkpoint `step`, then drop all but the last `keep`,
    and any of a later step, which a resumed run has left behind.

    Written aside and renamed; the .json, which makes it count, comes last. Raises OSError where the disk does.
    """
    path = os.path.join(folder, f'step-{step:06}.pt')
    state = dict(state, format=1, step=step, model_config=asdict(model.config), model=model.state_dict())
    record = dict(step=step, config=state.get('config'))
    try:
        with open(path + '.tmp', 'wb') as f:
            out = _HashingFile(f)
            try:
                torch.save(state, out)
            except RuntimeError as error:       # the zip writer's own error hides the disk's
                raise OSError(f'{path}: {out.error or error}') from None
            f.flush()
            os.fsync(f.fileno())
        record['sha256'] = out.digest.hexdigest()
        with open(path[:-3] + '.json.tmp', 'w') as f:
            json.dump(record, f, indent=2)
        os.replace(path + '.tmp', path)
        os.replace(path[:-3] + '.json.tmp', path[:-3] + '.json')
    finally:
        for leftover in (path + '.tmp', path[:-3] + '.json.tmp'):
            if os.path.exists(leftover):
                os.remove(leftover)
    found = find_checkpoints(folder)
    last = found.index(path) + 1
    _keep_only(folder, found[max(0, last - keep):last])


def _keep_only(folder, kept):
    """Remove all checkpoints of a folder but `kept`, and what a killed run has left half-written or half-removed."""
    for old in set(find_checkpoints(folder)) - set(kept):
        os.remove(old[:-3] + '.json')           # first: it makes the weights count
    for left in glob.glob(os.path.join(glob.escape(folder), 'step-*')):
        if re.search(r'step-\d+\.(pt|pt\.tmp|json\.tmp)$', left) and left not in kept:
            os.remove(left)


class _HashingFile:
    """A file for torch.save that hashes what passes, and remembers what the disk said."""
    def __init__(self, file):
        self.file, self.digest, self.error = file, hashlib.sha256(), None

    def write(self, data):
        self.digest.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error.strerror
            raise

    def flush(self):
        self.file.flush()


def find_checkpoints(folder):
    """The checkpoints of a folder, oldest first: list of paths of .pt files."""
    found = [path[:-5] + '.pt' for path in glob.glob(os.path.join(glob.escape(folder), 'step-*.json')) if _step_of(path) is not None]
    return sorted(found, key=_step_of)


def _step_of(path):
    """The step in the name of a checkpoint's file, None where there is none."""
    number = re.search(r'step-(\d+)\.(pt|json)$', path)
    return number and int(number[1])


def read_checkpoint(path):
    """A checkpoint's state, on the CPU, as it was saved; a CheckpointError where it is cut short, altered or foreign."""
    try:
        with open(path[:-3] + '.json') as f:
            record = json.load(f)
        digest = hashlib.sha256()
        with open(path, 'rb') as f:
            while block := f.read(1 << 24):
                digest.update(block)
        if digest.hexdigest() != record['sha256']:
            raise CheckpointError(f'{path} is damaged: its content is not what {path[:-3]}.json records')
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')     # torch's guesses about foreign files; ours is one line
            state = torch.load(path, map_location='cpu', weights_only=True)     # no code is ever run from a checkpoint
        if not isinstance(state, dict) or state.get('format') != 1 or not {'model', 'model_config', 'step'} <= state.keys():
            raise CheckpointError(f'{path} is not a checkpoint of this project (or of a later version of it)')
        if _step_of(path) not in (None, state['step']):
            raise CheckpointError(f'{path} is not what its name says, but step {state["step"]}')
        return state
    except OSError as error:
        raise CheckpointError(f'{path} cannot be read as a checkpoint: {error.strerror}: {error.filename}') from None
    except CheckpointError:
        raise
    except Exception as error:      # whatever a foreign file makes of json and torch
        raise CheckpointError(f'{path} is not a checkpoint of this project ({type(error).__name__})') from None


def open_run(folder, start_step):
    """Make the folder of a run ready to go on after step `start_step`, and open its log.jsonl to append.

    At 0 a run that stands there already is moved to <folder>.previous (which goes), so that it is not mixed with
    the new one. Otherwise lines of the log that lie past the step are dropped: they will be written again.
    """
    if start_step == 0 and find_checkpoints(folder):
        shutil.rmtree(folder + '.previous', ignore_errors=True)
        os.rename(folder, folder + '.previous')
    os.makedirs(folder, exist_ok=True)
    found = find_checkpoints(folder)            # killed in its last save, a run has not removed the oldest yet
    last = sum(_step_of(p) <= start_step for p in found)
    _keep_only(folder, found[max(0, last - 2):])
    path = os.path.join(folder, 'log.jsonl')
    kept = []
    if start_step and os.path.exists(path):
        with open(path, 'rb') as f:
            for line in f:
                try:
                    kept += [line] if json.loads(line)['step'] <= start_step else []
                except (ValueError, KeyError, TypeError):
                    pass        # the torn line of a killed run
    try:
        with open(path + '.tmp', 'wb') as f:
            f.writelines(kept)
        os.replace(path + '.tmp', path)
    finally:
        if os.path.exists(path + '.tmp'):       # the disk is full
            os.remove(path + '.tmp')
    return open(path, 'a', buffering=1)


def load_model(init_from, **options):
    """The weights of `init_from` as a GPT: a checkpoint of ours (folder: its last one; or a .pt), or GPT-2's.

    options: GPTConfig fields that are no part of the weights. -> model, and what the checkpoint says beside its
    weights (stage, config, vocabulary, init_fingerprint, ...; {} for GPT-2's). Raises CheckpointError.
    """
    if not init_from.endswith('.pt') and not find_checkpoints(init_from):
        if os.path.isdir(init_from) and not os.path.isfile(os.path.join(init_from, 'config.json')):
            raise CheckpointError(f'{init_from} holds neither a checkpoint (step-*.pt) nor GPT-2 weights (config.json)')
        try:
            return GPT.from_pretrained(init_from, **options), {}
        except CheckpointError:
            raise
        except Exception as error:      # whatever a damaged file makes of json, torch and safetensors
            raise CheckpointError(f'{init_from} cannot be read as GPT-2 weights ({type(error).__name__}: {error})') from None
    path = init_from if init_from.endswith('.pt') else find_checkpoints(init_from)[-1]
    try:
        state = read_checkpoint(path)
    except CheckpointError as error:
        others = [] if init_from.endswith('.pt') else find_checkpoints(init_from)[-2:-1]
        raise CheckpointError(f'{error}' + ''.join(f'; the one before it is {p}' for p in others)) from None
    known = {f.name for f in fields(GPTConfig)}
    try:
        model = GPT(GPTConfig(**{k: v for k, v in state['model_config'].items() if k in known} | options))
        model.load_state_dict(state['model'])
    except Exception as error:      # whatever foreign content makes of torch
        raise CheckpointError(f'{path}: its weights are not those of its model_config ({type(error).__name__})') from None
    return model, {key: value for key, value in state.items() if key not in ('model', 'optimizer')}


def fingerprint(model):
    """SHA-256 over every parameter's name, shape and bytes, hex: the same weights, wherever they came from."""
    digest = hashlib.sha256()
    for name, p in sorted(model.state_dict().items()):
        digest.update(f'{name} {tuple(p.shape)} {p.dtype}'.encode())
        digest.update(p.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def peak_flops(device):
    """The device's dense bfloat16 peak by its data sheet, FLOP/s; 0 where it is not known."""
    if device.type != 'cuda':
        return 0
    name = torch.cuda.get_device_name(device)
    peaks = {'H200': 989e12, 'H100': 989e12, 'B200': 2250e12, 'A100': 312e12, 'L40S': 362e12, 'RTX 4090': 165e12}
    return next((peak for key, peak in peaks.items() if key in name), 0)


# -----------------------------------------------------------------------------
# the command: any weights that load, as transformers has them

def main(argv):
    from config import UserError            # here, not above: the model by itself needs none of ours
    from prepare_prefs import Groups, read_meta
    usage = 'python model.py WEIGHTS DIRECTORY [--data=data/NAME]'
    if {'-h', '--help'} & set(argv):
        print(f'usage: {usage}\n\n'
              'WEIGHTS    a checkpoint folder or .pt of ours, a directory in the Hugging Face layout, or a GPT-2 name on the hub\n'
              'DIRECTORY  gets them in that layout, with the tokenizer and turn template of the data set\n'
              '--data     by default the one that a checkpoint was trained on; --data= exports the weights alone')
        return
    paths, flags = ([a for a in argv if a.startswith('-') == flag] for flag in (False, True))
    if len(paths) != 2 or '' in paths or any(not flag.startswith('--data=') for flag in flags):
        raise UserError(f'usage: {usage}')
    source, folder = paths
    try:
        model, record = load_model(source, dropout=0.0)
        name = record.get('config', {}).get('name')
        data_dir = flags[-1].removeprefix('--data=') if flags else os.path.join('data', name) if name else None
        advice = 'add --data=data/NAME, whose tokenizer is exported too, or --data= for the weights alone'
        if data_dir is None:
            raise UserError(f'{source} does not say what data it is for: {advice}')
        if data_dir and not os.path.isdir(data_dir):
            raise UserError(f'{data_dir} does not exist here, and with it the tokenizer: {advice}')
        if data_dir:
            meta = read_meta(data_dir)
            Groups(data_dir, list(meta['splits'])[-1]).check_model(model.config, record.get('vocabulary'), source)
        model.save_pretrained(folder, data_dir)
    except CheckpointError as error:
        raise UserError(error) from None
    except OSError as error:
        raise UserError(f'cannot write {folder}: {error.strerror or error}; it is as it was') from None
    print(f'{folder}: {model.num_params():,} parameters of {source}, '
          + (f"tokenizer and template {meta['template']!r} of {data_dir}" if data_dir else 'no tokenizer'))
    if data_dir and model.config.vocab_size > meta['vocab_size']:
        print(f"the vocabulary of {model.config.vocab_size:,} was cut to the tokenizer's {meta['vocab_size']:,}")


if __name__ == '__main__':
    main(sys.argv[1:])
