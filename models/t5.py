"""T5 v1.1's text encoder and tokenizer, as PixArt uses them: captions in, a context [B, 120, C] and a mask out.

Module names are those of `transformers`' `T5EncoderModel` (4096 wide and 24 layers in PixArt), so its state dictionary
loads as it is; `encoder.embed_tokens.weight`, which some files add, is `shared.weight` again. Source: Raffel et al.
2020, and Shazeer 2020 for the gate."""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer as Pieces
from tokenizers import decoders, models, normalizers, pre_tokenizers
from torch import Tensor, nn

FIXED = dict(model_type="t5", feed_forward_proj="gated-gelu", dense_act_fn="gelu_new", is_gated_act=True,
             is_decoder=False)


@dataclass
class T5Config:
    """The defaults are those of `transformers`, whose files leave out what equals them."""
    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64  # the width of one head
    d_ff: int = 2048
    num_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6

    def __post_init__(self):
        buckets, distance = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if buckets < 4 or buckets % 2 or distance <= buckets // 4:
            raise ValueError(f"the text encoder has {buckets} relative positions up to a distance of {distance};"
                             " expected an even number from 4 and a distance of more than a quarter of it")


class RMSNorm(nn.Module):
    def __init__(self, c: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(c))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)).to(self.weight.dtype)


def position_buckets(n: int, buckets: int, max_distance: int, device: torch.device | None = None) -> Tensor:
    """[n, n]: for row (query) i and column (key) j, which of the learned biases stands for the distance j - i. Half of
    the buckets are for each direction; in each, half are single distances and half grow logarithmically up to
    `max_distance`, beyond which all share the last."""
    position = torch.arange(n, device=device)
    distance, buckets = position - position[:, None], buckets // 2
    far, exact = distance.abs(), buckets // 2
    logarithmic = exact + (torch.log(far.float() / exact) / math.log(max_distance / exact) * (buckets - exact)).long()
    return torch.where(distance > 0, buckets, 0) + torch.where(far < exact, far, logarithmic.clamp(max=buckets - 1))


class Attention(nn.Module):
    """Heads of their own width; the scores are not scaled: T5's initial weights do that."""

    def __init__(self, c: int, heads: int, c_head: int, buckets: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(c, heads * c_head, bias=False) for _ in range(3))
        self.o = nn.Linear(heads * c_head, c, bias=False)
        self.relative_attention_bias = nn.Embedding(buckets, heads) if buckets else None  # in block 0, for all

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=1.0)  # [B, heads, N, c_head]
        return self.o(h.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Gated: GELU(W0 x) W1 x, tanh-GELU."""

    def __init__(self, c: int, c_hidden: int):
        super().__init__()
        self.wi_0, self.wi_1 = nn.Linear(c, c_hidden, bias=False), nn.Linear(c, c_hidden, bias=False)
        self.wo = nn.Linear(c_hidden, c, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x)
        if h.dtype == torch.float16:  # the trained model's sums here exceed 65504: from here on the stream is float32
            with torch.autocast(h.device.type, enabled=False):
                return F.linear(h.float(), self.wo.weight.float())
        return self.wo(h)


class Block(nn.Module):
    """[B, N, C] -> [B, N, C], norms first; the `first` holds the table of positions for all."""

    def __init__(self, c: T5Config, first: bool):
        super().__init__()
        buckets = c.relative_attention_num_buckets if first else 0
        self.layer = nn.ModuleList([
            nn.ModuleDict(dict(SelfAttention=Attention(c.d_model, c.num_heads, c.d_kv, buckets),
                               layer_norm=RMSNorm(c.d_model, c.layer_norm_epsilon))),
            nn.ModuleDict(dict(DenseReluDense=FeedForward(c.d_model, c.d_ff),
                               layer_norm=RMSNorm(c.d_model, c.layer_norm_epsilon)))])

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        attention, feed_forward = self.layer
        x = x + attention["SelfAttention"](attention["layer_norm"](x), bias)
        return x + feed_forward["DenseReluDense"](feed_forward["layer_norm"](x))


class Encoder(nn.Module):
    """Token ids [B, N] -> [B, N, C] after the last norm."""

    def __init__(self, c: T5Config):
        super().__init__()
        self.block = nn.ModuleList([Block(c, i == 0) for i in range(c.num_layers)])
        self.final_layer_norm = RMSNorm(c.d_model, c.layer_norm_epsilon)

    def forward(self, x: Tensor, buckets: Tensor, mask: Tensor) -> Tensor:
        bias = self.block[0].layer[0]["SelfAttention"].relative_attention_bias(buckets).permute(2, 0, 1)
        bias = bias[None].masked_fill(mask[:, None, None] == 0, torch.finfo(bias.dtype).min)  # [B, heads, N, N]
        for block in self.block:
            x = block(x, bias)
        return self.final_layer_norm(x)


class T5Encoder(nn.Module):
    """Module names are those of `transformers`' `T5EncoderModel`."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = Encoder(config)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Token ids [B, N] of any length and their mask [B, N], 0 where there is padding -> context [B, N, C]. The
        padding's own rows are filled too; who reads them must be given the mask."""
        c = self.config
        buckets = position_buckets(ids.shape[1], c.relative_attention_num_buckets, c.relative_attention_max_distance,
                                   ids.device)
        return self.encoder(self.shared(ids), buckets, mask)


def clean(text: str) -> str:
    """A caption as the PixArt pipeline of `diffusers` gives it to the tokenizer where bs4 and ftfy are not installed;
    with them it also removes links, addresses, markup and doubled punctuation, which are left in here."""
    return text.lower().strip()


class T5Tokenizer:
    """Captions to ids [B, length] and their mask [B, length]: pieces, `</s>`, padding (id 0 in T5), which the mask
    marks with 0. A longer text loses its end, not its `</s>`. `pieces`: of `pieces_from_spiece` or `pieces_from_json`;
    120 is PixArt's length."""

    def __init__(self, pieces: Pieces, length: int = 120):
        self.pieces, self.length = pieces, length
        self.pad, self.end = pieces.token_to_id("<pad>"), pieces.token_to_id("</s>")
        if self.pad is None or self.end is None:
            raise ValueError(f"the tokenizer has no piece {'<pad>' if self.pad is None else '</s>'};"
                             " expected one of T5, which has both")

    def __call__(self, texts: str | list[str]) -> tuple[Tensor, Tensor]:
        texts, ids, mask = [texts] if isinstance(texts, str) else texts, [], []
        try:
            encodings = self.pieces.encode_batch(texts, add_special_tokens=False)
        except TypeError:  # of half a surrogate pair, which JSON and command lines let through
            raise ValueError(f"{texts!r:.200} holds half a character; expected text as UTF-8 has it") from None
        for encoding in encodings:
            row = [*encoding.ids[:self.length - 1], self.end]
            ids.append(row + [self.pad] * (self.length - len(row)))
            mask.append([1] * len(row) + [0] * (self.length - len(row)))
        return torch.tensor(ids, dtype=torch.long), torch.tensor(mask, dtype=torch.long)


def t5_pieces(vocab: list[tuple[str, float]], unknown: int, charsmap: bytes, special: list[str]) -> Pieces:
    """The unigram model as `transformers` builds it: pieces with their log probabilities, the id of the unknown one,
    sentencepiece's table of characters to replace, and the pieces that stand for themselves wherever they are."""
    if not 0 <= unknown < len(vocab):
        raise ValueError(f"the unknown piece is {unknown} of {len(vocab)}")
    for i, (piece, score) in enumerate(vocab):
        if not 0 < len(piece) <= 1000 or not math.isfinite(score):
            raise ValueError(f"piece {i} has {len(piece)} characters and the score {score}")
    pieces = Pieces(models.Unigram(vocab, unk_id=unknown, byte_fallback=False))
    if charsmap:
        check_charsmap(charsmap)
        pieces.normalizer = normalizers.Precompiled(charsmap)
    words = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    pieces.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), words])
    pieces.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    pieces.add_special_tokens(special)
    return pieces


def check_charsmap(data: bytes) -> None:
    """The table is a double-array trie, its size in bytes before it, then the texts that its leaves point into. The
    library that reads it trusts every offset, so that a damaged one would stop the process: all are checked here."""
    size = int.from_bytes(data[:4], "little")
    if not size or size % 1024 or size >= len(data) - 4:
        raise ValueError(f"the table of characters has {len(data)} bytes and a trie of {size}")
    data[4 + size:].decode()
    trie = np.frombuffer(data, "<u4", size // 4, offset=4).astype(np.int64)
    texts = np.frombuffer(data, np.uint8, offset=4 + size)
    nodes = np.flatnonzero(trie < 1 << 31)  # the others are leaves, reached from a node alone
    children = nodes ^ (trie[nodes] >> 10 << ((trie[nodes] & 512) >> 6))
    if nodes[:1].tolist() != [0] or children.max() >= len(trie):  # blocks of 256: with its start, a node's whole family
        raise ValueError("the table of characters points outside its trie")
    leaves = trie[children[(trie[nodes] & 256) > 0]] & ((1 << 31) - 1)
    if leaves.max(initial=0) >= len(texts) or (texts[leaves] & 0xc0 == 0x80).any():
        raise ValueError("the table of characters points outside its texts")
