"""A GPT-2, whole, in one file.

    model = GPT(GPTConfig(n_layer=4, n_head=4, n_embd=128))     # random weights
    model = GPT.from_pretrained('gpt2')                         # a hub name, or a directory in that layout

A batch is one packed row: many groups [prompt | response_1 | ... | response_K] side by side. `packed_mask` says who
sees whom; with `target`, `forward` gives log-probs of the scored tokens alone. `generate` samples with a key-value cache.

Departures from GPT-2: dropout acts on embeddings and residual branches, not on attention weights (FlexAttention has
none). Weights are float32; a stage casts with autocast.
"""
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

flex = torch.compile(flex_attention, dynamic=True)      # rows vary in length; inlined where a whole Block is compiled
block_mask = torch.compile(create_block_mask, dynamic=True)
NOT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def check(condition, message):
    """An assert that `python -O` keeps."""
    if not condition:
        raise ValueError(message)


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


# -----------------------------------------------------------------------------
# attention over packed rows

@dataclass
class Stretches:
    """Dense masks, (1, 1, n, n) each, one a stretch of the row, in order.

    A class, because torch.compile would specialise on the length of a list.
    """
    masks: list


def visible(group, part):
    """The attention rule, as FlexAttention's mask_mod, of a row with group and part (1, T).

    A query sees a key of its own group that does not come after it, in the prompt (part 0) or in its own response.
    The result is the same numbers as each prompt + response alone.
    """
    def rule(b, h, q, k):
        return (group[b, q] == group[b, k]) & (q >= k) & ((part[b, k] == 0) | (part[b, k] == part[b, q]))
    return rule


def packed_block_mask(group, part):
    """`visible` as a BlockMask: FlexAttention skips blocks where nobody sees anybody. T is a multiple of 128."""
    T = group.shape[1]
    return block_mask(visible(group, part), 1, None, T, T, device=group.device)


def packed_mask(group, part, cuts=()):
    """`visible` as a mask for GPT.forward. group, part: (1, T); cuts: places in the row that no group crosses.

    On CUDA this is a BlockMask. Elsewhere FlexAttention has no backward pass. There it is dense booleans for
    scaled_dot_product_attention, for each stretch between two cuts.
    """
    if group.is_cuda:
        return packed_block_mask(group, part)
    rule = visible(group, part)
    stretches = torch.arange(group.shape[1], device=group.device).tensor_split(cuts)
    return Stretches([rule(0, 0, t[:, None], t[None, :])[None, None] for t in stretches])


def row_attention(q, k, v, mask):
    """FlexAttention over a packed row. q, k, v: (1, H, T, D); mask: BlockMask. -> (1, H, T, D)"""
    D = q.shape[-1]
    if D < 16:          # the least that it takes on CUDA: zeros add nothing
        q, k, v = (F.pad(x, (0, 16 - D)) for x in (q, k, v))
    return flex(q, k, v, block_mask=mask, scale=D ** -0.5)[..., :D]


@torch.compiler.disable         # the lengths change with every row
def stretch_attention(q, k, v, mask):
    """Attention within each stretch of a row alone. q, k, v: (1, H, T, D); mask: Stretches. -> (1, T, H, D)"""
    sizes = [m.shape[-1] for m in mask.masks]
    outputs = []
    for q, k, v, m in zip(q.split(sizes, 2), k.split(sizes, 2), v.split(sizes, 2), mask.masks):
        outputs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=m).transpose(1, 2))
    return torch.cat(outputs, 1)


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
            y = row_attention(q, k, v, mask).transpose(1, 2)
        elif isinstance(mask, Stretches):
            y = stretch_attention(q, k, v, mask)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
        return self.c_proj(y.reshape(B, T, C))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.ln_1 = nn.LayerNorm(C, config.layer_norm_epsilon)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(C, config.layer_norm_epsilon)
        self.c_fc = nn.Linear(C, 4 * C)
        self.c_proj = nn.Linear(4 * C, C)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, mask, at=None, cache=None, positions=None):
        x = x + self.dropout(self.attn(self.ln_1(x), mask, cache, positions))
        if at is not None:          # the last block: nothing beyond here mixes tokens, so only the scored ones go on
            x = x.flatten(0, 1).index_select(0, at)
        return x + self.dropout(self.c_proj(F.gelu(self.c_fc(self.ln_2(x)), approximate='tanh')))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        check(config.n_embd % config.n_head == 0, f'n_embd={config.n_embd} is not a multiple of n_head={config.n_head}')
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

    def forward(self, tokens, positions, mask, at=None, target=None, cache=None):
        """Hidden states after the last norm, (B, T, C), or at the flat indices `at` (S,) into B*T alone, (S, C); with
        target, (S,), instead the log-probs of these tokens there, (S,) float32, nats.

        tokens, positions: (B, T); mask: of packed_mask, or boolean (B, 1, T, keys); cache: of generate.
        """
        x = self.dropout(self.wte(tokens) + self.wpe(positions))        # (B, T, C)
        for i, block in enumerate(self.h):
            last = at if i == len(self.h) - 1 else None
            if self.config.activation_checkpointing and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, mask, last, use_reentrant=False)
            else:
                x = block(x, mask, last, cache and cache[i], positions)
        x = self.ln_f(x)
        return x if target is None else token_logps(x, self.wte.weight, target)

    def num_params(self):
        """Parameters, the head counted once: int."""
        return sum(p.numel() for p in self.parameters())

    def configure_optimizer(self, name, learning_rate, weight_decay):
        """RMSprop, the paper's, or AdamW; weight decay on matrices alone."""
        matrices = [p for p in self.parameters() if p.dim() >= 2]
        others = [p for p in self.parameters() if p.dim() < 2]
        groups = [dict(params=matrices, weight_decay=weight_decay), dict(params=others, weight_decay=0.0)]
        if name == 'rmsprop':
            return torch.optim.RMSprop(groups, lr=learning_rate)
        return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=self.wte.weight.device.type != 'mps')

    # -------------------------------------------------------------------------
    # sampling

    @torch.no_grad()
    @torch.compiler.set_stance('force_eager')       # one key more at every step: compile nothing for a length,
    @sdpa_kernel(NOT_CUDNN)                         # and let cuDNN build no plan for it
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
        check(0 < min(lengths) <= max(lengths) < self.config.block_size,
             f'prompts must have 1 to {self.config.block_size - 1} tokens, got {min(lengths)} to {max(lengths)}')
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
    # GPT-2 weights in the Hugging Face layout; nanodpo/export.py writes them

    @classmethod
    def from_pretrained(cls, name_or_dir, **options):
        """The model in a directory with config.json and model.safetensors, or of that name on the hub.

        options: GPTConfig fields that are no part of the weights (dropout, activation_checkpointing). ValueErrors where
        the model is no GPT-2 or a file is damaged. Where one is missing, the disk's or the hub's own error.
        """
        from safetensors import SafetensorError, safe_open
        folder = name_or_dir
        if not os.path.isdir(folder):
            from huggingface_hub import snapshot_download
            folder = snapshot_download(name_or_dir, allow_patterns=['config.json', 'model*.safetensors*'])
        hf = dict(n_positions=1024, layer_norm_epsilon=1e-5) | json.loads(Path(folder, 'config.json').read_bytes())
        allowed = dict(model_type=['gpt2'], activation_function=['gelu_new', 'gelu_pytorch_tanh'],
                       tie_word_embeddings=[True], n_inner=[None, 4 * hf.get('n_embd', 0)], scale_attn_weights=[True],
                       scale_attn_by_inverse_layer_idx=[False], add_cross_attention=[False])
        for key, values in allowed.items():
            check(key not in hf or hf[key] in values, f'{key}={hf.get(key)!r}, this model is GPT-2 with {values[0]!r}')
        sizes = {key: hf.get(key) for key in ('n_positions', 'vocab_size', 'n_layer', 'n_head', 'n_embd')}
        for key, size in sizes.items():
            check(type(size) is int and 0 < size < 2**31, f'{key} is {size!r} in config.json')
        eps = hf['layer_norm_epsilon']
        check(type(eps) in (int, float) and 0 <= eps < 1, f'layer_norm_epsilon is {eps!r} in config.json')

        files = ['model.safetensors']           # or, of a large model, several
        index = Path(folder, 'model.safetensors.index.json')
        if index.exists() and not Path(folder, files[0]).exists():
            files = sorted(set(json.loads(index.read_bytes())['weight_map'].values()))
        tensors = {}
        for file in files:
            try:
                with safe_open(os.path.join(folder, file), 'pt') as f:
                    tensors |= {name.removeprefix('transformer.'): f.get_tensor(name) for name in f.keys()}
            except SafetensorError as error:
                raise ValueError(f'{file} is damaged: {error}') from None
        layers = len({name.split('.')[1] for name in tensors if name.startswith('h.')})
        check(layers == hf['n_layer'], f'weights of {layers} layers, but n_layer={hf["n_layer"]} in config.json')
        with torch.device('meta'):              # shapes alone: no time for random weights
            model = cls(GPTConfig(*sizes.values(), layer_norm_epsilon=eps, **options))
        state = {}
        for name, (hf_name, p) in zip(model.state_dict(), hf_names(model)):
            check(hf_name in tensors, f'no tensor {hf_name}')
            tensor = tensors.pop(hf_name)
            tensor = tensor.t() if transposed(hf_name) else tensor
            check(tensor.shape == p.shape and tensor.is_floating_point(), f'{hf_name} has shape {list(tensor.shape)} '
                  f'and type {tensor.dtype}, config.json makes it {list(p.shape)}')
            state[name] = torch.empty(p.shape).copy_(tensor)    # float32; no view of the file, which may be replaced
        model.load_state_dict(state, assign=True)
        head = tensors.pop('lm_head.weight', model.wte.weight)
        left = [name for name in tensors if not name.endswith(('.attn.bias', '.attn.masked_bias'))]     # causal masks
        check(not left and torch.equal(head.float(), model.wte.weight), 'weights that GPT-2 has no place for: '
              f'{", ".join(left[:3]) or "lm_head"}')
        return model


def hf_names(model):
    """(Hugging Face's name, parameter) for every parameter; only the MLP's differ from ours."""
    for name, p in model.named_parameters():
        yield re.sub(r'^(h\.\d+\.)(c_fc|c_proj)', r'\1mlp.\2', name), p


def transposed(name):
    """Hugging Face keeps GPT-2's linear layers as (in, out), nn.Linear as (out, in)."""
    return name.endswith(('c_attn.weight', 'c_proj.weight', 'c_fc.weight'))


# -----------------------------------------------------------------------------
# the output head

def _tile_logsumexp(logits):
    return logits.float().logsumexp(-1)


def _tile_gradient(logits, normalizer, grad, column, inside):
    """g (1[target] - p) for a tile of the vocabulary, in the logits' type."""
    d_logits = logits.float().sub_(normalizer[:, None]).exp_().mul_(-grad[:, None])
    at_target = (grad * inside)[:, None]
    if logits.is_cuda:      # compiled: a comparison fuses with the line above, a scatter would not
        d_logits += at_target * (column == torch.arange(logits.shape[1], device=logits.device))
    else:
        d_logits.scatter_add_(1, column, at_target)
    return d_logits.to(logits.dtype)


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


