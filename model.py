"""A GPT, whole, in one file: GPT-2, GPT-NeoX (Pythia), Llama 3 and its kin (SmolLM2), Qwen2.5 and Qwen3.

    model = GPT(GPTConfig(n_layer=4, n_head=4, n_embd=128))     # random weights, the architecture of GPT-2
    model = hf.from_pretrained('Qwen/Qwen3-0.6B')               # nanodpo/hf.py: a hub name or a directory

A batch is one packed row: many groups [prompt | response_1 | ... | response_K] side by side. `packed_mask` says who
sees whom. `forward` gives log-probs of the scored tokens alone, `generate` samples with a key-value cache.
Weights are float32; autocast casts them. FlexAttention has no dropout of attention weights.
"""
import functools
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

flex = torch.compile(flex_attention, dynamic=True)      # rows vary in length; inlined where a whole Block is compiled
block_mask = torch.compile(create_block_mask, dynamic=True)


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
    # what tells the families apart; the defaults are GPT-2's
    n_kv_head: int = 0          # heads of keys and values, each shared by n_head / n_kv_head queries; 0 = n_head
    head_dim: int = 0           # 0 = n_embd / n_head
    n_inner: int = 0            # width of the MLP; 0 = 4 n_embd
    activation: str = 'gelu_tanh'   # of the MLP: gelu_tanh, gelu, silu
    gated: bool = False         # the MLP is act(gate(x)) fc(x), not act(fc(x))
    rms_norm: bool = False      # RMSNorm, not LayerNorm
    qk_norm: bool = False       # RMSNorm over each head's queries and keys
    qkv_bias: bool = True       # biases of queries, keys and values
    bias: bool = True           # of all other linear layers
    parallel: bool = False      # attention and MLP read the same x
    tied: bool = True           # the embedding is the output head, too
    rotary_dim: int = 0         # dimensions of a head that are rotated by their position; 0 = learned positions
    rope_theta: float = 10000.0     # the slowest of them turns once in about 2 pi rope_theta positions
    rope_scaling: tuple = ()    # Llama 3.1's: factor, low_freq_factor, high_freq_factor, original positions
    hf: dict = None             # config.json of the model that the weights come from; None = trained from scratch

    def __post_init__(self):
        whole = self.head_dim or self.n_embd % self.n_head == 0
        check(whole, f'n_embd={self.n_embd} is not a multiple of n_head={self.n_head}')
        self.n_kv_head = self.n_kv_head or self.n_head
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        self.n_inner = self.n_inner or 4 * self.n_embd


# --- attention over packed rows -------------------------------------------------------------------

@dataclass
class Stretches:
    """Dense masks, (1, 1, n, n). A class, because torch.compile would specialise on the length of a list."""
    masks: list


def visible(group, part):
    """The attention rule, as FlexAttention's mask_mod. A query sees earlier keys of its own group: those of the prompt
    (part 0) and of its own response. So the numbers are those of each prompt + response alone."""
    def rule(b, h, q, k):
        return (group[b, q] == group[b, k]) & (q >= k) & ((part[b, k] == 0) | (part[b, k] == part[b, q]))
    return rule


def packed_mask(group, part, cuts=()):
    """`visible` as a mask for GPT.forward; FlexAttention's BlockMask skips blocks where nobody sees anybody.

    Only on CUDA has FlexAttention a backward pass. Elsewhere the mask is dense booleans for
    scaled_dot_product_attention, for each stretch between two `cuts`: places in the row that no group crosses.
    """
    rule, T = visible(group, part), group.shape[1]
    if group.is_cuda:           # T is a multiple of 128
        return block_mask(rule, 1, None, T, T, device=group.device)
    stretches = torch.arange(T, device=group.device).tensor_split(cuts)
    return Stretches([rule(0, 0, t[:, None], t[None, :])[None, None] for t in stretches])


def row_attention(q, k, v, mask):
    """FlexAttention over a packed row. q: (1, H, T, D); k, v: (1, Hkv, T, D); mask: BlockMask. -> (1, H, T, D)"""
    D = q.shape[-1]
    if D < 16:          # the least that it takes on CUDA: zeros add nothing
        q, k, v = (F.pad(x, (0, 16 - D)) for x in (q, k, v))
    return flex(q, k, v, block_mask=mask, scale=D ** -0.5, enable_gqa=True)[..., :D]


def dense_attention(q, k, v, mask):
    """SDPA under a boolean mask. Its fast kernels share no keys among queries: keys and values are repeated."""
    queries = q.shape[1] // k.shape[1]
    if queries > 1:
        k, v = k.repeat_interleave(queries, 1), v.repeat_interleave(queries, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@torch.compiler.disable         # the lengths change with every row
def stretch_attention(q, k, v, mask):
    """Attention within each stretch of a row alone. q, k, v: as of row_attention; mask: Stretches. -> (1, T, H, D)"""
    sizes = [m.shape[-1] for m in mask.masks]
    stretches = zip(q.split(sizes, 2), k.split(sizes, 2), v.split(sizes, 2), mask.masks)
    outputs = [dense_attention(q, k, v, m) for q, k, v, m in stretches]
    return torch.cat([y.transpose(1, 2) for y in outputs], 1)


def rotary(positions, config):
    """Cosine and sine of the angles by which rotary positions turn: (B, T) -> two of (B, T, 1, rotary_dim), float32."""
    steps = torch.arange(0, config.rotary_dim, 2, device=positions.device).float()
    frequency = 1 / config.rope_theta ** (steps / config.rotary_dim)                # radians a position
    if config.rope_scaling:     # Llama 3.1's: slow rotations are slowed by `factor`, fast ones kept, others between
        factor, low, high, original = config.rope_scaling
        turns = original * frequency / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (kept + (1 - kept) / factor)
    angle = (positions[:, :, None].float() * frequency).repeat(1, 1, 2)[:, :, None]
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """x (B, T, H, D) with its first rotary_dim dimensions turned, as pairs (i, i + rotary_dim / 2)."""
    turned, rest = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], dim=-1)
    a, b = turned.chunk(2, dim=-1)
    return torch.cat([turned * cos + torch.cat([-b, a], dim=-1) * sin, rest], dim=-1)


def norm(config, width):
    """LayerNorm, or RMSNorm, over a last dimension of that width."""
    return (nn.RMSNorm if config.rms_norm else nn.LayerNorm)(width, config.layer_norm_epsilon)


ACTIVATIONS = dict(gelu_tanh=functools.partial(F.gelu, approximate='tanh'), gelu=F.gelu, silu=F.silu)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.head_dim = config.head_dim
        self.sizes = [heads * self.head_dim for heads in (config.n_head, config.n_kv_head, config.n_kv_head)]
        self.c_attn = nn.Linear(config.n_embd, sum(self.sizes), bias=config.qkv_bias)
        self.c_proj = nn.Linear(self.sizes[0], config.n_embd, bias=config.bias)
        self.q_norm = norm(config, config.head_dim) if config.qk_norm else None
        self.k_norm = norm(config, config.head_dim) if config.qk_norm else None

    def forward(self, x, mask, rotation=None, cache=None, positions=None):
        B, T, C = x.shape
        q, k, v = (y.view(B, T, -1, self.head_dim) for y in self.c_attn(x).split(self.sizes, dim=2))   # (B, T, H, D)
        if self.q_norm is not None:     # in the weights' type: under autocast q and k are bfloat16
            q, k = self.q_norm(q.type_as(self.q_norm.weight)), self.k_norm(k.type_as(self.k_norm.weight))
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        q, k = q.type_as(v), k.type_as(v)
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
            y = dense_attention(q, k, v, mask).transpose(1, 2)
        return self.c_proj(y.flatten(2))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, inner = config.n_embd, config.n_inner
        self.parallel = config.parallel
        self.ln_1 = norm(config, C)
        self.attn = Attention(config)
        self.ln_2 = norm(config, C)
        self.c_gate = nn.Linear(C, inner, bias=config.bias) if config.gated else None
        self.c_fc = nn.Linear(C, inner, bias=config.bias)
        self.c_proj = nn.Linear(inner, C, bias=config.bias)
        self.activation = ACTIVATIONS[config.activation]
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, mask, rotation=None, at=None, cache=None, positions=None):
        y = x + self.dropout(self.attn(self.ln_1(x), mask, rotation, cache, positions))
        if at is not None:          # the last block: nothing beyond here mixes tokens, so only the scored ones go on
            x, y = (z.flatten(0, 1).index_select(0, at) for z in (x, y))
        return y + self.dropout(self.mlp(self.ln_2(x if self.parallel else y)))

    def mlp(self, x):
        if self.c_gate is None:
            return self.c_proj(self.activation(self.c_fc(x)))
        return self.c_proj(self.activation(self.c_gate(x)) * self.c_fc(x))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = None if config.rotary_dim else nn.Embedding(config.block_size, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = norm(config, config.n_embd)
        self.lm_head = None if config.tied else nn.Linear(config.n_embd, config.vocab_size, bias=False)
        for name, p in self.named_parameters():     # GPT-2's initialisation
            if p.dim() == 2:
                residual = name.endswith('c_proj.weight')
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if residual else 0.02)
            elif name.endswith('bias'):
                nn.init.zeros_(p)

    @property
    def head(self):
        """The weight of the output head, (V, C)."""
        return self.wte.weight if self.lm_head is None else self.lm_head.weight

    def forward(self, tokens, positions, mask, at=None, target=None, cache=None):
        """The hidden states after the last norm: (B, T, C), or with `at` (S,), flat indices into B*T, (S, C).
        With target (S,) also, log p of these tokens there instead: (S,) float32, nats.

        tokens, positions: (B, T); mask: of packed_mask, or boolean (B, 1, T, keys); cache: of generate.
        """
        x = self.wte(tokens)                                            # (B, T, C)
        x = self.dropout(x if self.wpe is None else x + self.wpe(positions))
        rotation = rotary(positions, self.config) if self.wpe is None else None
        for i, block in enumerate(self.h):
            last = at if i == len(self.h) - 1 else None
            if self.config.activation_checkpointing and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, mask, rotation, last, use_reentrant=False)
            else:
                x = block(x, mask, rotation, last, cache and cache[i], positions)
        x = self.ln_f(x)
        return x if target is None else token_logps(x, self.head, target)

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
        fused = self.wte.weight.device.type != 'mps'
        return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=fused)

    # --- sampling ---------------------------------------------------------------------------------

    @torch.no_grad()
    @torch.compiler.set_stance('force_eager')       # a key more at every step: no compiling, no plans of cuDNN's
    @sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
    def generate(self, prompts, max_new_tokens, end_token, vocab_size=None, temperature=1.0, top_k=0, top_p=1.0,
                 seed=0):
        """Sample one response for each prompt, all in one batch, with a key-value cache.

        prompts: lists of ids. A response ends with end_token. Ids from vocab_size on are never drawn.
        temperature 0 is greedy; top_k 0 and top_p 1 cut nothing. -> lists of at most max_new_tokens ids.

        A sequence's slots in the cache are its positions: prompts of unequal length need no padding on the left.
        Each draw inverts the cumulative distribution at a uniform number. Two models with the same seed share
        these numbers, so they differ only where their distributions do.
        """
        lengths = [len(p) for p in prompts]
        check(0 < min(lengths) <= max(lengths) < self.config.block_size,
             f'prompts must have 1 to {self.config.block_size - 1} tokens, got {min(lengths)} to {max(lengths)}')
        was_training = self.training
        self.eval()
        device = self.wte.weight.device
        B, H, D = len(prompts), self.config.n_kv_head, self.config.head_dim
        size = min(max(lengths) + max_new_tokens, self.config.block_size)
        cache = [torch.zeros(2, B, size, H, D, device=device, dtype=matmul_dtype(self.wte.weight)) for _ in self.h]
        noise = torch.Generator().manual_seed(seed)
        tokens = nn.utils.rnn.pad_sequence([torch.tensor(p) for p in prompts], batch_first=True).to(device)
        positions = torch.arange(max(lengths), device=device).expand(B, -1)
        last = torch.tensor(lengths, device=device) - 1                 # (B,) the newest token's position
        slots = torch.arange(size, device=device)
        rows = torch.arange(B, device=device)
        done = torch.zeros(B, dtype=torch.bool, device=device)
        drawn = torch.empty(B, 0, dtype=torch.long, device=device)
        for step in range(max_new_tokens):
            seen = max(lengths) + step
            mask = slots[:min(seen, size)] <= positions[:, None, :, None]           # (B, 1, T, seen)
            hidden = self(tokens, positions, mask, cache=cache)
            hidden = hidden[rows, last] if step == 0 else hidden[:, 0]              # (B, C)
            logits = F.linear(hidden, self.head).float()[:, :vocab_size]            # (B, V)
            check(logits.isfinite().all(), 'the model gives logits that are not finite')
            u = torch.rand(B, generator=noise, dtype=torch.float64).to(device, torch.float32)
            new = draw(logits, u, temperature, top_k, top_p)
            drawn = torch.cat([drawn, torch.where(done, -1, new)[:, None]], 1)      # -1: after the end
            done |= new == end_token
            last = last + 1
            done |= last == self.config.block_size - 1              # prompt + response fill the positions
            if done.all():
                break
            tokens, positions = new[:, None], last.clamp(max=size - 1)[:, None]     # (B, 1)
        self.train(was_training)
        return [[token for token in row if token >= 0] for row in drawn.tolist()]


# --- the output head ------------------------------------------------------------------------------

def _tile_logsumexp(logits):
    return logits.float().logsumexp(-1)


def _tile_gradient(logits, normalizer, grad, column):
    """g (1[target] - p) for a tile of the vocabulary, in the logits' type. column: (S,), the target's, or outside."""
    d_logits = logits.float().sub_(normalizer[:, None]).exp_().mul_(-grad[:, None])
    if logits.is_cuda:      # compiled: a comparison fuses with the line above, an index would not
        d_logits += grad[:, None] * (column[:, None] == torch.arange(logits.shape[1], device=logits.device))
    else:
        inside = ((0 <= column) & (column < logits.shape[1])).nonzero()[:, 0]
        d_logits[inside, column[inside]] += grad[inside]
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
            inside = (v <= target) & (target < v + tile)
            logps += logits.gather(1, (target - v).where(inside, 0)[:, None])[:, 0] * inside
        ctx.save_for_backward(states, head, target, normalizer)
        ctx.tile = tile
        return logps - normalizer

    @staticmethod
    def backward(ctx, grad):
        states, head, target, normalizer = ctx.saved_tensors
        gradient = _fused[_tile_gradient] if states.is_cuda else _tile_gradient
        states_dtype, weight_dtype = ctx.input_dtypes
        d_states = torch.zeros_like(states, dtype=torch.float32)
        d_head = torch.empty_like(head, dtype=weight_dtype)
        for v in range(0, len(head), ctx.tile):
            piece = head[v:v + ctx.tile]
            d_logits = gradient(states @ piece.t(), normalizer, grad, target - v)
            d_states += d_logits @ piece
            d_head[v:v + ctx.tile] = d_logits.t() @ states
        return d_states.to(states_dtype), d_head, None, None, None


def token_logps(states, weight, target, tile=4096):
    """log p(target) of the scored tokens, (S,) float32, nats; the softmax runs in float32.

    states: (S, C), the hidden states that predict them; weight: (V, C), the head; target: (S,). No logits are kept:
    memory is S * tile, whatever the vocabulary.
    """
    return _TokenLogps.apply(states, weight, target, tile, matmul_dtype(states))


def matmul_dtype(x):
    """The type in which a matmul of x runs: autocast's where that is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def draw(logits, u, temperature=1.0, top_k=0, top_p=1.0):
    """One id a row from logits (B, V), by inverting the cumulative distribution at u (B,) in [0, 1). -> (B,)"""
    if temperature < 1e-30:         # greedy; float32 cannot divide by less
        return logits.argmax(-1)
    logits = logits / temperature
    if 0 < top_k < logits.shape[1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, ids = logits.softmax(-1).sort(descending=True, stable=True)
        outside = ordered.cumsum(-1) - ordered >= top_p         # the first is always inside
        logits = logits.masked_fill(outside.scatter(1, ids, outside), -torch.inf)
    exact = torch.float32 if logits.device.type == 'mps' else torch.float64     # a long float32 sum drifts
    cumulative = logits.softmax(-1).to(exact).cumsum(-1)
    total = cumulative[:, -1:]
    u = u[:, None].to(exact) * total
    u = u.minimum(total.nextafter(torch.zeros_like(total)))     # rounded up to total, it would fall past the end
    return torch.searchsorted(cumulative, u, right=True)[:, 0]
