"""CLIP's text encoder and tokenizer, as Stable Diffusion uses them: prompts in, a context [B, 77, C] out. Below them
its image encoder, which judges pictures and their captions.

One class for CLIP ViT-L (SD 1.x), OpenCLIP ViT-H (SD 2.x, SD-Turbo) and small ones, told apart by `config.json`.
Module names are those of `transformers`' `CLIPTextModel`. Source: Radford et al. 2021."""

import json
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Pieces
from torch import Tensor, nn

FIXED = dict(attention_dropout=0.0)


@dataclass
class TextConfig:
    """Defaults are those of OpenCLIP ViT-H without its last layer (SD 2.x, SD-Turbo)."""
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
            raise ValueError(f"the text encoder's hidden_act is {self.hidden_act!r};"
                             f" built here are {sorted(ACTIVATIONS)}")


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"gelu": F.gelu, "quick_gelu": quick_gelu}


class Attention(nn.Module):
    """Multi-head attention of [B, N, C] to itself; `causal`: no token sees a later one."""

    def __init__(self, c: int, heads: int):
        super().__init__()
        if heads < 1 or c % heads:
            raise ValueError(f"{c} channels are to be {heads} heads of one width")
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(c, c) for _ in range(4))

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))  # [B, heads, N, C / heads]
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, c: int, c_hidden: int, activation: str):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.fc1 = nn.Linear(c, c_hidden)
        self.fc2 = nn.Linear(c_hidden, c)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class Layer(nn.Module):
    """[B, N, C] -> [B, N, C], norms first."""

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


class TextEmbeddings(nn.Module):
    """Token ids [B, N] -> [B, N, C]."""

    def __init__(self, c: TextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(c.vocab_size, c.hidden_size)
        self.position_embedding = nn.Embedding(c.max_position_embeddings, c.hidden_size)
        for embedding in (self.token_embedding, self.position_embedding):  # CLIP's own start, small beside what
            nn.init.normal_(embedding.weight, std=0.02)  # attention adds: every position soon tells of the whole prompt

    def forward(self, ids: Tensor) -> Tensor:
        return self.token_embedding(ids) + self.position_embedding.weight[:ids.shape[1]]


class TextTransformer(nn.Module):
    def __init__(self, c: TextConfig):
        super().__init__()
        self.embeddings = TextEmbeddings(c)
        self.encoder = Encoder([
            Layer(c.hidden_size, c.intermediate_size, c.num_attention_heads, c.hidden_act, c.layer_norm_eps)
            for _ in range(c.num_hidden_layers)
        ])
        self.final_layer_norm = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)


class TextEncoder(nn.Module):
    """Module names are those of `transformers`' `CLIPTextModel`."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.text_model = TextTransformer(config)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [B, 77] -> context [B, 77, C], after the last layer norm."""
        h = self.text_model.encoder(self.text_model.embeddings(ids), causal=True)
        return self.text_model.final_layer_norm(h)

    def pooled(self, ids: Tensor) -> Tensor:
        """Token ids [B, 77] -> the context at the end-of-text token, [B, C]."""
        # Old configurations say eos_token_id 2 where the end of text is in truth the highest id of the vocabulary.
        end = ids.argmax(-1) if self.config.eos_token_id == 2 else (ids == self.config.eos_token_id).int().argmax(-1)
        return self(ids)[torch.arange(len(ids), device=ids.device), end]


class Tokenizer:
    """Prompts to ids [B, 77]: start, at most 75 pieces, end, padding.

    `pieces` is a `tokenizers` tokenizer without padding or special tokens of its own; `pad` is what fills the rest:
    the end token itself in SD 1.x, `!` in SD 2.x, as the folder's files say."""

    def __init__(self, pieces: Pieces, length: int = 77, pad: str = "<|endoftext|>", start: str = "<|startoftext|>",
                 end: str = "<|endoftext|>"):
        self.pieces, self.length, self.tokens = pieces, length, dict(pad=pad, start=start, end=end)
        self.pad, self.start, self.end = (pieces.token_to_id(token) for token in (pad, start, end))
        if not isinstance(length, int) or not 2 < length <= 1000:
            raise ValueError(f"the tokenizer's model_max_length is {length!r}; expected 3 to 1000")
        for token, i in [(pad, self.pad), (start, self.start), (end, self.end)]:
            if i is None:
                raise ValueError(f"the tokenizer's vocabulary has no piece {token!r}, which its configuration asks for:"
                                 " vocab.json and tokenizer_config.json are not of one model")
        # A piece of its own wherever it stands in a text: with SD 2.x's padding, "wow!" ends in `!` and not in `!</w>`.
        pieces.add_special_tokens([pad, start, end])

    def __call__(self, texts: str | list[str]) -> Tensor:
        texts = [texts] if isinstance(texts, str) else texts
        rows = []
        try:
            encodings = self.pieces.encode_batch(texts, add_special_tokens=False)
        except TypeError:  # of half a surrogate pair, which JSON and command lines let through
            raise ValueError(f"{texts!r:.200} holds half a character; expected text as UTF-8 has it") from None
        for encoding in encodings:
            ids = [self.start, *encoding.ids[:self.length - 2], self.end]
            rows.append(ids + [self.pad] * (self.length - len(ids)))
        return torch.tensor(rows, dtype=torch.long)

    def to_json(self) -> str:
        return json.dumps(dict(pieces=self.pieces.to_str(), length=self.length, **self.tokens))

    @classmethod
    def from_json(cls, text: str) -> "Tokenizer":
        saved = json.loads(text)
        model = json.loads(saved.pop("pieces"))["model"]  # put together in CLIP's way, whatever else the file says
        return cls(clip_pieces(model["vocab"], [tuple(pair) for pair in model["merges"]]), **saved)


def clip_pieces(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Pieces:
    """CLIP's byte-level BPE from `vocab.json` and the lines of `merges.txt`."""
    end = "<|endoftext|>"
    pieces = Pieces(models.BPE(vocab=vocab, merges=merges, continuing_subword_prefix="", end_of_word_suffix="</w>",
                               fuse_unk=False, unk_token=end if end in vocab else None))
    pieces.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    words = Regex(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    pieces.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(words, behavior="removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    pieces.decoder = decoders.ByteLevel()
    pieces.add_special_tokens([token for token in ("<|startoftext|>", end) if token in vocab])
    return pieces


# ------------------------------------------------------------------------------------------------ pictures and captions

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass
class VisionConfig:
    """CLIP ViT-B/32's picture side."""
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
TEXT_B32 = TextConfig(hidden_size=512, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8,
                      hidden_act="quick_gelu")


def normalise(x: Tensor) -> Tensor:
    """Pictures [B, 3, H, W] in [-1, 1] -> as CLIP was trained: in [0, 1], less the mean, over the deviation."""
    mean, std = (x.new_tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    return (x * 0.5 + 0.5 - mean) / std


def prepare(x: Tensor, size: int = 224) -> Tensor:
    """Pictures [B, 3, H, W] in [-1, 1] -> pixels [B, 3, size, size] for the loss: normalised, then stretched bilinearly
    without antialiasing, as img2img-turbo's paired trainer does. Gradients flow."""
    return F.interpolate(normalise(x), (size, size), mode="bilinear", align_corners=False)


class VisionEmbeddings(nn.Module):
    """Pixels [B, 3, S, S] -> [B, 1 + patches, C], the class token first."""

    def __init__(self, c: VisionConfig):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(c.hidden_size))
        self.patch_embedding = nn.Conv2d(3, c.hidden_size, c.patch_size, stride=c.patch_size, bias=False)
        self.position_embedding = nn.Embedding((c.image_size // c.patch_size) ** 2 + 1, c.hidden_size)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # [B, N - 1, C]
        first = self.class_embedding.expand(len(pixels), 1, -1)
        return torch.cat([first, patches], dim=1) + self.position_embedding.weight


class VisionTransformer(nn.Module):
    def __init__(self, c: VisionConfig):
        super().__init__()
        self.embeddings = VisionEmbeddings(c)
        self.pre_layrnorm = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)  # spelt as in the files
        sizes = c.hidden_size, c.intermediate_size, c.num_attention_heads
        self.encoder = Encoder([Layer(*sizes, c.hidden_act, c.layer_norm_eps) for _ in range(c.num_hidden_layers)])
        self.post_layernorm = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)


class ImageEncoder(nn.Module):
    """Module names are those of `transformers`' `CLIPVisionModelWithProjection`."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.vision_model = VisionTransformer(config)
        self.visual_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [B, 3, 224, 224] -> embeddings [B, 512], not of length one."""
        return self.levels(pixels, ())[0]

    def levels(self, pixels: Tensor, after: tuple[int, ...]) -> list[Tensor]:
        """The patches' tokens after the layers `after`, from 1, as maps [B, 768, 7, 7]; last the embedding [B, 512]."""
        v, side = self.vision_model, self.config.image_size
        if pixels.shape[2:] != (side, side):
            raise ValueError(f"CLIP takes pixels of {side}x{side}, not of {pixels.shape[3]}x{pixels.shape[2]}")
        h, maps = v.pre_layrnorm(v.embeddings(pixels)), []
        for i, layer in enumerate(v.encoder.layers, 1):
            h = layer(h, causal=False)
            if i in after:
                maps.append(h[:, 1:].transpose(1, 2).unflatten(2, (side // self.config.patch_size, -1)))
        return [*maps, self.visual_projection(v.post_layernorm(h[:, 0]))]


class CLIP(nn.Module):
    """Both encoders and the space [B, 512] in which a picture lies near its caption."""

    def __init__(self, vision: VisionConfig, text: TextConfig):
        super().__init__()
        self.image = ImageEncoder(vision)
        self.text = TextEncoder(text)
        self.text_projection = nn.Linear(text.hidden_size, vision.projection_dim, bias=False)

    def embed_captions(self, ids: Tensor) -> Tensor:
        """Token ids [B, 77] -> [B, 512]."""
        return self.text_projection(self.text.pooled(ids))

    def similarity(self, x: Tensor, captions: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1], embedded captions [B, 512] -> cosine [B] of each picture with its own."""
        return F.cosine_similarity(self.image(prepare(x, self.image.config.image_size)), captions)


def from_state_dict(tensors: dict[str, Tensor], vision: VisionConfig = VISION_B32, text: TextConfig = TEXT_B32) -> CLIP:
    """CLIP, frozen, made of the tensors of a Hub file (`openai/clip-vit-base-patch32`), in their type."""
    with torch.device("meta"):
        network = CLIP(vision, text)
    # Left out are the temperature of CLIP's training, and 0 1 2 ...
    tensors = {name: t for name, t in tensors.items() if not name.endswith(("logit_scale", ".position_ids"))}
    ours = {name.removeprefix("image.").removeprefix("text."): name for name in network.state_dict()}
    network.load_state_dict({ours.get(name, name): t for name, t in tensors.items()}, assign=True)
    return network.eval().requires_grad_(False)
