"""CLIP: Stable Diffusion's text encoder and tokenizer, and the image encoder beside them.

The text encoder turns token ids [B, 77] into the context [B, 77, C] of the U-Net. The image
encoder puts pictures into the same space as captions. One class covers CLIP ViT-L (SD 1.x),
OpenCLIP ViT-H (SD 2.x, SD-Turbo) and small models; the configuration tells them apart.

Module names are those of `transformers`, so its state dictionaries load as they are.
Source: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language
Supervision".
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Pieces
from torch import Tensor, nn

# Options of `text_encoder/config.json` that are supported with this value only.
FIXED = dict(attention_dropout=0.0)


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"gelu": F.gelu, "quick_gelu": quick_gelu}


# -------------------- transformer layers, for texts and pictures

def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, C] -> [B, heads, N, C / heads]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention of [B, N, C]. With `causal`, no token sees a later one."""

    def __init__(self, c: int, heads: int):
        super().__init__()
        if heads < 1 or c % heads:
            raise ValueError(f"{c} channels cannot be split into {heads} heads of equal width")
        self.heads = heads
        self.q_proj = nn.Linear(c, c)
        self.k_proj = nn.Linear(c, c)
        self.v_proj = nn.Linear(c, c)
        self.out_proj = nn.Linear(c, c)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        q = split_heads(self.q_proj(x), self.heads)  # [B, heads, N, C / heads]
        k = split_heads(self.k_proj(x), self.heads)
        v = split_heads(self.v_proj(x), self.heads)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out_proj(h.transpose(1, 2).flatten(2))  # [B, N, C]


class MLP(nn.Module):
    def __init__(self, c: int, c_hidden: int, activation: str):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.fc1 = nn.Linear(c, c_hidden)
        self.fc2 = nn.Linear(c_hidden, c)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class Layer(nn.Module):
    """[B, N, C] -> [B, N, C]: pre-norm attention and MLP."""

    def __init__(self, c: int, c_hidden: int, heads: int, activation: str, eps: float):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(c, eps=eps)
        self.self_attn = Attention(c, heads)
        self.layer_norm2 = nn.LayerNorm(c, eps=eps)
        self.mlp = MLP(c, c_hidden, activation)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), causal)
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    def __init__(self, layers: list[Layer]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        for layer in self.layers:
            x = layer(x, causal)
        return x


# -------------------- text encoder

@dataclass
class TextConfig:
    """The defaults are OpenCLIP ViT-H without its last layer (SD 2.x, SD-Turbo)."""
    vocab_size: int = 49408
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 23
    num_attention_heads: int = 16
    max_position_embeddings: int = 77
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407

    def __post_init__(self):
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(
                f"the text encoder's hidden_act {self.hidden_act!r} is not supported;"
                f" expected one of {', '.join(sorted(ACTIVATIONS))}"
            )


class TextEmbeddings(nn.Module):
    """Token ids [B, N] -> [B, N, C]."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        # CLIP's own initialisation. It is small compared with what attention adds, so that after
        # a few layers every position carries the whole prompt up to it.
        for embedding in (self.token_embedding, self.position_embedding):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        N = ids.shape[1]
        return self.token_embedding(ids) + self.position_embedding.weight[:N]


class TextTransformer(nn.Module):
    """The parts of TextEncoder, which runs them."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.embeddings = TextEmbeddings(config)
        layers = [
            Layer(
                config.hidden_size,
                config.intermediate_size,
                config.num_attention_heads,
                config.hidden_act,
                config.layer_norm_eps,
            )
            for _ in range(config.num_hidden_layers)
        ]
        self.encoder = Encoder(layers)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class TextEncoder(nn.Module):
    """Module names are those of `transformers`' `CLIPTextModel`."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.text_model = TextTransformer(config)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [B, 77] -> context [B, 77, C], after the last layer norm."""
        h = self.text_model.embeddings(ids)
        h = self.text_model.encoder(h, causal=True)
        return self.text_model.final_layer_norm(h)

    def pooled(self, ids: Tensor) -> Tensor:
        """Token ids [B, 77] -> the context at the first end-of-text token, [B, C]."""
        end_id = self.config.eos_token_id
        # Old configurations say 2, but mean the highest id of the vocabulary.
        end = ids.argmax(-1) if end_id == 2 else (ids == end_id).int().argmax(-1)
        rows = torch.arange(len(ids), device=ids.device)
        return self(ids)[rows, end]

    @torch.no_grad()
    def set_embeddings(self, ids: list[int], vectors: Tensor) -> None:
        """Gives the tokens of these ids the embeddings [n, C]. The table grows where it must."""
        before = self.text_model.embeddings.token_embedding.weight
        rows = max(len(before), max(ids) + 1)
        weight = before.new_zeros(rows, before.shape[1])
        weight[:len(before)] = before
        weight[ids] = vectors.to(weight)
        table = nn.Embedding.from_pretrained(weight, freeze=not before.requires_grad)
        self.text_model.embeddings.token_embedding = table
        self.config = replace(self.config, vocab_size=rows)


# -------------------- tokenizer

class Tokenizer:
    """Prompts -> token ids [B, 77]: the start token, at most 75 pieces, the end token, padding.

    `pieces` is a tokenizer of the `tokenizers` library, as `clip_pieces` builds it; padding and
    special tokens are added here. `pad` fills the row: SD 1.x uses the end token, SD 2.x `!`.
    ValueError if the length is not 3 to 1000 or a special token is not in the vocabulary.
    """

    def __init__(
        self,
        pieces: Pieces,
        length: int = 77,
        pad: str = "<|endoftext|>",
        start: str = "<|startoftext|>",
        end: str = "<|endoftext|>",
    ):
        self.pieces = pieces
        self.length = length
        self.tokens = dict(pad=pad, start=start, end=end)
        self.pad = pieces.token_to_id(pad)
        self.start = pieces.token_to_id(start)
        self.end = pieces.token_to_id(end)

        if not isinstance(length, int) or not 2 < length <= 1000:
            raise ValueError(
                f"the tokenizer's model_max_length is {length!r}; expected 3 to 1000"
            )
        for token in (pad, start, end):
            if pieces.token_to_id(token) is None:
                raise ValueError(
                    f"the tokenizer's vocabulary has no piece {token!r}, which its configuration"
                    " names: use a vocabulary and a configuration of the same model"
                )
        # A special token is one piece wherever it stands in a text. SD 2.x pads with `!`, so
        # that "wow!" ends in the piece `!` and not in `!</w>`.
        added = self._added()
        pieces.add_special_tokens([token for token in (pad, start, end) if token not in added])
        self.following = self._find_following()

    def _added(self) -> dict[str, int]:
        """The tokens that are never split, and their ids."""
        decoder = self.pieces.get_added_tokens_decoder()
        return {token.content: number for number, token in decoder.items()}

    def _find_following(self) -> dict[int, list[int]]:
        """For each token that stands for several vectors: the ids that follow its own.

        As in `diffusers`, the other vectors of a token `<cat>` belong to `<cat>_1`, `<cat>_2`, ...
        """
        added = self._added()
        following = {}
        for token, number in added.items():
            others = []
            while f"{token}_{len(others) + 1}" in added:
                others.append(added[f"{token}_{len(others) + 1}"])
            if others:
                following[number] = others
        return following

    def add_token(self, token: str, vectors: int) -> list[int]:
        """Adds a token that stands for so many vectors. Returns their ids.

        ValueError if it is in the vocabulary already.
        """
        tokens = [token, *(f"{token}_{i}" for i in range(1, vectors))]
        for name in (*tokens, f"{token}_{vectors}"):
            if self.pieces.token_to_id(name) is not None:
                raise ValueError(f"the tokenizer has a token {name!r} already")
        self.pieces.add_tokens(tokens)
        self.following = self._find_following()
        return [self.pieces.token_to_id(name) for name in tokens]

    def encode(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, however many, without start, end and padding."""
        try:
            encodings = self.pieces.encode_batch(texts, add_special_tokens=False)
        except TypeError:
            # Python strings may hold lone surrogates, from JSON or the command line.
            raise ValueError(
                f"{texts!r:.200} contains a lone surrogate (half a character);"
                " expected text that can be encoded as UTF-8"
            ) from None
        if not self.following:
            return [encoding.ids for encoding in encodings]

        rows = []
        for encoding in encodings:
            row = []
            for number in encoding.ids:
                row += [number, *self.following.get(number, [])]
            rows.append(row)
        return rows

    def __call__(self, texts: str | list[str]) -> Tensor:
        """Texts -> ids [B, length]. Longer texts are cut; the end token stays."""
        if isinstance(texts, str):
            texts = [texts]
        rows = []
        for ids in self.encode(texts):
            row = [self.start, *ids[:self.limit], self.end]
            padding = [self.pad] * (self.length - len(row))
            rows.append(row + padding)
        return torch.tensor(rows, dtype=torch.long)

    @property
    def limit(self) -> int:
        """How many ids of a text there is room for, besides the start and the end token."""
        return self.length - 2

    def cut_off(self, text: str) -> str | None:
        """The end of a text for which there is no room, or None if all of it is kept."""
        encoding = self.pieces.encode(text, add_special_tokens=False)
        count = 0
        for number, (start, _) in zip(encoding.ids, encoding.offsets):
            count += 1 + len(self.following.get(number, []))
            if count > self.limit:
                return text[start:]
        return None


def clip_pieces(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Pieces:
    """CLIP's byte-level BPE, from a vocabulary (piece -> id) and the merges in their order."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    bpe = models.BPE(
        vocab=vocab,
        merges=merges,
        continuing_subword_prefix="",
        end_of_word_suffix="</w>",
        fuse_unk=False,
        unk_token=end if end in vocab else None,
    )
    pieces = Pieces(bpe)

    one_space = normalizers.Replace(Regex(r"\s+"), " ")
    pieces.normalizer = normalizers.Sequence(
        [normalizers.NFC(), one_space, normalizers.Lowercase()]
    )

    words = Regex(
        r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
        r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    )
    pieces.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(words, behavior="removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])
    pieces.decoder = decoders.ByteLevel()
    pieces.add_special_tokens([token for token in (start, end) if token in vocab])
    return pieces


# -------------------- image encoder

# Mean and standard deviation of the pictures that CLIP was trained on, per channel, in [0, 1].
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass
class VisionConfig:
    """The defaults are the image encoder of CLIP ViT-B/32."""
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    projection_dim: int = 512
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5


VISION_B32 = VisionConfig()
TEXT_B32 = TextConfig(
    hidden_size=512,
    intermediate_size=2048,
    num_hidden_layers=12,
    num_attention_heads=8,
    hidden_act="quick_gelu",
)


def normalise(x: Tensor) -> Tensor:
    """Pictures [B, 3, H, W] in [-1, 1] -> CLIP's pixels: standardised by its mean and deviation."""
    mean = x.new_tensor(MEAN).view(3, 1, 1)
    std = x.new_tensor(STD).view(3, 1, 1)
    return (x * 0.5 + 0.5 - mean) / std


def prepare(x: Tensor, size: int = 224) -> Tensor:
    """Pictures [B, 3, H, W] in [-1, 1] -> CLIP's pixels [B, 3, size, size], differentiable.

    Normalised, then resized bilinearly without antialiasing and regardless of the aspect ratio,
    as img2img-turbo's `train_pix2pix_turbo.py` does.
    """
    return F.interpolate(normalise(x), (size, size), mode="bilinear", align_corners=False)


class VisionEmbeddings(nn.Module):
    """Pixels [B, 3, S, S] -> tokens [B, 1 + patches, C], the class token first."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        patches = (config.image_size // config.patch_size) ** 2
        self.class_embedding = nn.Parameter(torch.randn(config.hidden_size))
        self.patch_embedding = nn.Conv2d(
            3, config.hidden_size, config.patch_size, stride=config.patch_size, bias=False
        )
        self.position_embedding = nn.Embedding(1 + patches, config.hidden_size)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels)  # [B, C, S / patch, S / patch]
        patches = patches.flatten(2).transpose(1, 2)  # [B, patches, C]
        class_token = self.class_embedding.expand(len(pixels), 1, -1)
        tokens = torch.cat([class_token, patches], dim=1)
        return tokens + self.position_embedding.weight


class VisionTransformer(nn.Module):
    """The parts of ImageEncoder, which runs them."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        # Spelt as in files.
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        layers = [
            Layer(
                config.hidden_size,
                config.intermediate_size,
                config.num_attention_heads,
                config.hidden_act,
                config.layer_norm_eps,
            )
            for _ in range(config.num_hidden_layers)
        ]
        self.encoder = Encoder(layers)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class ImageEncoder(nn.Module):
    """Module names are those of `transformers`' `CLIPVisionModelWithProjection`."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.vision_model = VisionTransformer(config)
        self.visual_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [B, 3, 224, 224] -> embeddings [B, 512], not of unit length."""
        return self.levels(pixels, ())[0]

    def levels(self, pixels: Tensor, after: tuple[int, ...]) -> list[Tensor]:
        """Features of several depths, of normalised pixels [B, 3, 224, 224].

        For each layer number in `after`, counted from 1: the patch tokens that come out of the
        layer, as a map [B, 768, 7, 7]. Last in the list: the embedding [B, 512].
        """
        vision = self.vision_model
        side = self.config.image_size
        if pixels.shape[2:] != (side, side):
            raise ValueError(
                f"CLIP's image encoder takes pixels of {side}x{side},"
                f" not of {pixels.shape[3]}x{pixels.shape[2]}"
            )

        maps = []
        h = vision.pre_layrnorm(vision.embeddings(pixels))
        for number, layer in enumerate(vision.encoder.layers, start=1):
            h = layer(h, causal=False)
            if number in after:
                patches = h[:, 1:].transpose(1, 2)  # [B, C, patches]
                rows = side // self.config.patch_size
                maps.append(patches.unflatten(2, (rows, -1)))
        embedding = self.visual_projection(vision.post_layernorm(h[:, 0]))
        return [*maps, embedding]


# -------------------- both encoders

class CLIP(nn.Module):
    """Both encoders, and the space [B, 512] in which a picture lies near its caption."""

    def __init__(self, vision: VisionConfig, text: TextConfig):
        super().__init__()
        self.image = ImageEncoder(vision)
        self.text = TextEncoder(text)
        self.text_projection = nn.Linear(text.hidden_size, vision.projection_dim, bias=False)

    def embed_captions(self, ids: Tensor) -> Tensor:
        """Token ids [B, 77] -> embeddings [B, 512], not of unit length."""
        return self.text_projection(self.text.pooled(ids))

    def similarity(self, x: Tensor, captions: Tensor) -> Tensor:
        """Cosine similarity [B] of each picture with its own caption.

        x: pictures [B, 3, H, W] in [-1, 1]; captions: embedded captions [B, 512].
        """
        pixels = prepare(x, self.image.config.image_size)
        return F.cosine_similarity(self.image(pixels), captions)


def from_state_dict(
    tensors: dict[str, Tensor],
    vision: VisionConfig = VISION_B32,
    text: TextConfig = TEXT_B32,
) -> CLIP:
    """A frozen CLIP from the tensors of `openai/clip-vit-base-patch32`, in their own dtype."""
    with torch.device("meta"):
        network = CLIP(vision, text)

    # The files name the tensors without the prefixes of our two encoders.
    our_names = {}
    for name in network.state_dict():
        our_names[name.removeprefix("image.").removeprefix("text.")] = name

    renamed = {}
    for name, tensor in tensors.items():
        # Not needed: the temperature of CLIP's training loss, and the numbers 0, 1, 2, ...
        if not name.endswith(("logit_scale", ".position_ids")):
            renamed[our_names.get(name, name)] = tensor
    network.load_state_dict(renamed, assign=True)
    return network.eval().requires_grad_(False)
