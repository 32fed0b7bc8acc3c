"""T5 v1.1: the text encoder and tokenizer of PixArt.

Captions become a context [B, 120, C] and a mask [B, 120]. PixArt uses T5-XXL, 4096 wide and
24 layers deep. Module names are those of `transformers`' `T5EncoderModel`, so its state
dictionary loads as it is; `encoder.embed_tokens.weight`, which some files add, repeats
`shared.weight`.

Sources: Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text
Transformer"; for the gated MLP, Shazeer 2020, "GLU Variants Improve Transformer".
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer as Pieces
from tokenizers import decoders, models, normalizers, pre_tokenizers
from torch import Tensor, nn

# Options of `text_encoder/config.json` that are supported with this value only.
FIXED = dict(
    model_type="t5",
    feed_forward_proj="gated-gelu",
    dense_act_fn="gelu_new",
    is_gated_act=True,
    is_decoder=False,
)


# -------------------- text encoder

@dataclass
class T5Config:
    """The defaults are those of `transformers`: its files leave out what equals them."""
    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64  # width of one head
    d_ff: int = 2048
    num_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6

    def __post_init__(self):
        buckets = self.relative_attention_num_buckets
        distance = self.relative_attention_max_distance
        if buckets < 4 or buckets % 2 or distance <= buckets // 4:
            raise ValueError(
                f"the text encoder has {buckets} relative positions up to a distance of {distance};"
                " expected an even number, at least 4, and a distance above a quarter of it"
            )


class RMSNorm(nn.Module):
    """Divides by the root mean square over the channels; computed in float32 for half precision."""

    def __init__(self, c: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(c))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype in (torch.float16, torch.bfloat16):
            x = x.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x.to(self.weight.dtype)


def position_buckets(
    n: int,
    buckets: int,
    max_distance: int,
    device: torch.device | None = None,
) -> Tensor:
    """Which learned bias belongs to query i and key j: bucket numbers [n, n], by distance j - i.

    Half of the buckets are for each direction. Of these, half stand for one distance each, and
    half for ranges that grow logarithmically up to `max_distance`. All greater distances share
    the last bucket.
    """
    buckets = buckets // 2  # of one direction
    exact = buckets // 2
    position = torch.arange(n, device=device)
    distance = position - position[:, None]  # [n, n]
    far = distance.abs()

    share = torch.log(far.float() / exact) / math.log(max_distance / exact)
    logarithmic = exact + (share * (buckets - exact)).long()
    bucket = torch.where(far < exact, far, logarithmic.clamp(max=buckets - 1))
    return torch.where(distance > 0, buckets, 0) + bucket


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, heads * C] -> [B, heads, N, C]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention of [B, N, C], with heads of width `c_head`.

    The scores are not divided by sqrt(c_head): T5's initial weights account for it. Only the
    first block has `buckets` and with them the position biases, which all blocks share.
    """

    def __init__(self, c: int, heads: int, c_head: int, buckets: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(c, heads * c_head, bias=False)
        self.k = nn.Linear(c, heads * c_head, bias=False)
        self.v = nn.Linear(c, heads * c_head, bias=False)
        self.o = nn.Linear(heads * c_head, c, bias=False)
        self.relative_attention_bias = nn.Embedding(buckets, heads) if buckets else None

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """bias [B, heads, N, N] is added to the scores."""
        q = split_heads(self.q(x), self.heads)  # [B, heads, N, c_head]
        k = split_heads(self.k(x), self.heads)
        v = split_heads(self.v(x), self.heads)
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=1.0)
        return self.o(h.transpose(1, 2).flatten(2))  # [B, N, C]


class FeedForward(nn.Module):
    """The gated MLP: W2 (GELU(W0 x) * W1 x), with the tanh approximation of GELU."""

    def __init__(self, c: int, c_hidden: int):
        super().__init__()
        self.wi_0 = nn.Linear(c, c_hidden, bias=False)
        self.wi_1 = nn.Linear(c, c_hidden, bias=False)
        self.wo = nn.Linear(c_hidden, c, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x)
        if h.dtype == torch.float16:
            # In the trained model these sums exceed float16's 65504. From the first block on, the
            # residual stream is float32.
            with torch.autocast(h.device.type, enabled=False):
                return F.linear(h.float(), self.wo.weight.float())
        return self.wo(h)


class Block(nn.Module):
    """[B, N, C] -> [B, N, C]: pre-norm attention and MLP. The first block has the biases."""

    def __init__(self, c: T5Config, first: bool):
        super().__init__()
        buckets = c.relative_attention_num_buckets if first else 0
        attention = nn.ModuleDict({
            "SelfAttention": Attention(c.d_model, c.num_heads, c.d_kv, buckets),
            "layer_norm": RMSNorm(c.d_model, c.layer_norm_epsilon),
        })
        feed_forward = nn.ModuleDict({
            "DenseReluDense": FeedForward(c.d_model, c.d_ff),
            "layer_norm": RMSNorm(c.d_model, c.layer_norm_epsilon),
        })
        self.layer = nn.ModuleList([attention, feed_forward])

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        attention, feed_forward = self.layer
        x = x + attention["SelfAttention"](attention["layer_norm"](x), bias)
        return x + feed_forward["DenseReluDense"](feed_forward["layer_norm"](x))


class Encoder(nn.Module):
    """All blocks and the last norm, [B, N, C] -> [B, N, C]."""

    def __init__(self, c: T5Config):
        super().__init__()
        self.block = nn.ModuleList([Block(c, first=i == 0) for i in range(c.num_layers)])
        self.final_layer_norm = RMSNorm(c.d_model, c.layer_norm_epsilon)

    def forward(self, x: Tensor, buckets: Tensor, mask: Tensor) -> Tensor:
        """buckets [N, N] of `position_buckets`; mask [B, N], 0 at tokens that nobody sees."""
        bias_of_bucket = self.block[0].layer[0]["SelfAttention"].relative_attention_bias
        bias = bias_of_bucket(buckets).permute(2, 0, 1)  # [heads, N, N]
        hidden = mask[:, None, None] == 0  # [B, 1, 1, N]
        bias = bias[None].masked_fill(hidden, torch.finfo(bias.dtype).min)  # [B, heads, N, N]
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
        """Token ids [B, N] of any length N -> context [B, N, C].

        mask [B, N] is 0 at padding. The context has values there too, so whoever reads it needs
        the mask.
        """
        buckets = position_buckets(
            ids.shape[1],
            self.config.relative_attention_num_buckets,
            self.config.relative_attention_max_distance,
            ids.device,
        )
        return self.encoder(self.shared(ids), buckets, mask)


# -------------------- tokenizer

def clean(text: str) -> str:
    """Cleans a caption as `diffusers`' PixArt pipeline does where bs4 and ftfy are not installed.

    With them it would also remove links, addresses, markup and doubled punctuation.
    """
    return text.lower().strip()


class T5Tokenizer:
    """Captions -> token ids [B, length] and their mask [B, length], which is 0 at padding.

    A row is the text's pieces, `</s>`, then padding. `pieces` is a tokenizer of the `tokenizers`
    library, as `t5_pieces` builds it. PixArt's length is 120.
    """

    def __init__(self, pieces: Pieces, length: int = 120):
        self.pieces = pieces
        self.length = length
        self.pad = pieces.token_to_id("<pad>")
        self.end = pieces.token_to_id("</s>")
        for piece in ("<pad>", "</s>"):
            if pieces.token_to_id(piece) is None:
                raise ValueError(
                    f"the tokenizer has no piece {piece}; expected T5's, which has <pad> and </s>"
                )

    def encode(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, however many, without end and padding."""
        try:
            encodings = self.pieces.encode_batch(texts, add_special_tokens=False)
        except TypeError:
            # Python strings may hold lone surrogates, from JSON or the command line.
            raise ValueError(
                f"{texts!r:.200} contains a lone surrogate (half a character);"
                " expected text that can be encoded as UTF-8"
            ) from None
        return [encoding.ids for encoding in encodings]

    def __call__(self, texts: str | list[str]) -> tuple[Tensor, Tensor]:
        """Texts -> ids and mask. Longer texts are cut; `</s>` stays."""
        if isinstance(texts, str):
            texts = [texts]
        ids = []
        mask = []
        for text_ids in self.encode(texts):
            row = [*text_ids[:self.limit], self.end]
            padding = self.length - len(row)
            ids.append(row + [self.pad] * padding)
            mask.append([1] * len(row) + [0] * padding)
        return torch.tensor(ids, dtype=torch.long), torch.tensor(mask, dtype=torch.long)

    @property
    def limit(self) -> int:
        """How many ids of a text there is room for, besides the end token."""
        return self.length - 1

    def cut_off(self, text: str) -> str | None:
        """The end of a text for which there is no room, or None if all of it is kept."""
        encoding = self.pieces.encode(text, add_special_tokens=False)
        if len(encoding.ids) <= self.limit:
            return None
        start, _ = encoding.offsets[self.limit]
        return text[start:]


def t5_pieces(
    vocab: list[tuple[str, float]],
    unknown: int,
    charsmap: bytes,
    special: list[str],
) -> Pieces:
    """T5's unigram model, put together as `transformers` does.

    vocab: the pieces with their log probabilities; unknown: the id of the unknown piece;
    charsmap: sentencepiece's compiled table of characters to replace, or empty; special: the
    pieces that are never split, wherever they stand in a text.

    The `tokenizers` library trusts its input: a damaged charsmap ends the process. Check what
    comes from a file before.
    """
    pieces = Pieces(models.Unigram(vocab, unk_id=unknown, byte_fallback=False))
    if charsmap:
        pieces.normalizer = normalizers.Precompiled(charsmap)
    spaces = dict(replacement="▁", prepend_scheme="always", split=True)
    pieces.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.WhitespaceSplit(),
        pre_tokenizers.Metaspace(**spaces),
    ])
    pieces.decoder = decoders.Metaspace(**spaces)
    pieces.add_special_tokens(special)
    return pieces
