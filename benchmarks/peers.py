"""The other sides of the benchmarks: `diffusers`, and the official arrangement built from it.

"official-style" is how the img2img-turbo repository arranges `diffusers` and `peft`: adapters
beside their layers, skips handed on as attributes of the VAE's halves, a scheduler object for the
one step, and the text encoder asked each time. Its methods are replaced at run time, as there.
For unpaired training it is the order of the steps, on this code's networks.
"""

import copy
import re
import types
from collections.abc import Callable
from dataclasses import replace

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import ours
from benchmarks.inputs import PROMPT, module_inputs, pictures
from benchmarks.workers import Job, Requests, answer
from dataset.pictures import to_picture, to_tensor
from files import bases
from models import lora
from models.cyclegan_turbo import CycleGANTurbo, CycleGANTurboConfig
from models.discriminator import PatchDiscriminator, spectral_step
from models.pix2pix_turbo import UNET_TARGETS, VAE_TARGETS

# -------------------- diffusers

@torch.inference_mode()
def diffusers_modules(job: Job, requests: Requests) -> None:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    vae = AutoencoderKL.from_pretrained(job.base, subfolder="vae")
    unet = UNet2DConditionModel.from_pretrained(job.base, subfolder="unet")
    text_encoder = CLIPTextModel.from_pretrained(job.base, subfolder="text_encoder")
    for network in (vae, unet, text_encoder):
        network.to(job.device, job.dtype)
    width = unet.config.cross_attention_dim
    x, z, context, ids = module_inputs(job.size, job.batch, width, job.dtype, job.device)

    def work(task: str) -> Tensor:
        if task == "U-Net":
            return unet(z, 999, context).sample
        if task == "VAE encode":
            return vae.encode(x).latent_dist.mean
        if task == "VAE decode":
            return vae.decode(z).sample
        return text_encoder(ids)[0]

    answer(requests, work)


def diffusers_text(job: Job, requests: Requests) -> None:
    from diffusers import AutoencoderTiny, StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(job.base, torch_dtype=job.dtype)
    if job.vae:
        pipe.vae = AutoencoderTiny.from_pretrained(job.vae, torch_dtype=job.dtype)
    pipe.to(job.device)
    pipe.set_progress_bar_config(disable=True)

    def draw(task: tuple[int, int]) -> Tensor:
        size, batch = task
        output = pipe(
            [PROMPT] * batch,
            num_inference_steps=1,
            guidance_scale=0.0,
            height=size,
            width=size,
            generator=[torch.Generator().manual_seed(seed) for seed in range(batch)],
            output_type="pt",
        )
        return 2 * output.images - 1

    answer(requests, draw)


# A whole process: python -c DIFFUSERS_LOAD FOLDER DTYPE DEVICE SIZE OUTPUT
DIFFUSERS_LOAD = """
import sys, torch
from diffusers import StableDiffusionPipeline
folder, dtype, device, size, output = sys.argv[1:]
pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=getattr(torch, dtype))
pipe.to(device)
images = pipe(
    "a cat", num_inference_steps=1, guidance_scale=0.0, height=int(size), width=int(size)
).images
images[0].save(output)
"""


# -------------------- official-style

def encode_keeping_skips(encoder: nn.Module, x: Tensor) -> Tensor:
    """Replaces the forward method of the VAE's encoder."""
    x = encoder.conv_in(x)
    encoder.skips = []
    for block in encoder.down_blocks:
        encoder.skips.append(x)
        x = block(x)
    x = encoder.mid_block(x)
    return encoder.conv_out(encoder.conv_act(encoder.conv_norm_out(x)))


def decode_adding_skips(decoder: nn.Module, z: Tensor, latent_embeds: None = None) -> Tensor:
    """Replaces the forward method of the VAE's decoder."""
    x = decoder.mid_block(decoder.conv_in(z), latent_embeds)
    skips = reversed(decoder.skips)
    for i, (block, skip) in enumerate(zip(decoder.up_blocks, skips), start=1):
        skip_conv = getattr(decoder, f"skip_conv_{i}")
        x = block(x + skip_conv(skip * decoder.gamma), latent_embeds)
    return decoder.conv_out(decoder.conv_act(decoder.conv_norm_out(x)))


class Official(nn.Module):
    """pix2pix-Turbo in the official arrangement.

    With `merged` it is what a careful user of `diffusers` would do: the LoRA is fused. In eval
    mode the latent is the encoder's mean, where the repository samples it, so that pictures can
    be compared.
    """

    def __init__(self, job: Job, dtype: torch.dtype, merged: bool = False):
        from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTokenizer

        super().__init__()
        base = job.base
        self.tokenizer = CLIPTokenizer.from_pretrained(base, subfolder="tokenizer")
        self.text_encoder = CLIPTextModel.from_pretrained(base, subfolder="text_encoder")
        self.vae = AutoencoderKL.from_pretrained(base, subfolder="vae")
        self.unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
        skips = self._add_skips()
        self.requires_grad_(False)
        self._add_lora(skips)

        trained = safetensors.torch.load_file(job.checkpoint)
        load_trained(self.unet, trained, part="unet.", adapter="default")
        load_trained(self.vae, trained, part="vae.", adapter="vae_skip")
        if merged:
            for network in (self.unet, self.vae):
                network.fuse_lora()
                network.unload_lora()
        self.to(job.device, dtype).eval()

        self.scheduler = DDPMScheduler.from_pretrained(
            base, subfolder="scheduler", clip_sample=False
        )
        self.scheduler.set_timesteps(1, device=job.device)
        self.scheduler.alphas_cumprod = self.scheduler.alphas_cumprod.to(job.device)
        self.t = torch.tensor([999], device=job.device)

    def _add_skips(self) -> list[str]:
        """Gives the VAE skip convolutions. Returns their names."""
        encoder, decoder = self.vae.encoder, self.vae.decoder
        widths = self.vae.config.block_out_channels
        inputs = [*widths[-2::-1], widths[0]]
        outputs = [widths[-1], *widths[:0:-1]]
        names = []
        for i, (c_in, c_out) in enumerate(zip(inputs, outputs), start=1):
            names.append(f"skip_conv_{i}")
            setattr(decoder, names[-1], nn.Conv2d(c_in, c_out, 1, bias=False))
        encoder.forward = types.MethodType(encode_keeping_skips, encoder)
        decoder.forward = types.MethodType(decode_adding_skips, decoder)
        decoder.gamma = 1
        return names

    def _add_lora(self, skips: list[str]) -> None:
        from peft import LoraConfig

        vae_lora = LoraConfig(r=4, target_modules=[*VAE_TARGETS, *skips])
        self.vae.add_adapter(vae_lora, "vae_skip")
        self.unet.add_adapter(LoraConfig(r=8, target_modules=list(UNET_TARGETS)))

    def encode(self, prompts: list[str]) -> Tensor:
        ids = self.tokenizer(
            prompts,
            max_length=77,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        ).input_ids
        return self.text_encoder(ids.to(self.t.device))[0]

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> [B, 3, H, W] in [-1, 1]."""
        if context is None:
            context = self.encode([PROMPT] * len(x))
        scaling = self.vae.config.scaling_factor
        latent = self.vae.encode(x).latent_dist
        z = latent.sample() if self.training else latent.mode()
        z = z * scaling
        prediction = self.unet(z, self.t, encoder_hidden_states=context).sample
        x0 = self.scheduler.step(prediction, self.t, z).prev_sample.to(prediction.dtype)
        self.vae.decoder.skips = self.vae.encoder.skips
        return self.vae.decode(x0 / scaling).sample.clamp(-1, 1)


def load_trained(network: nn.Module, trained: dict, part: str, adapter: str) -> None:
    """Loads one part of our checkpoint under peft's names. Exactly that will be trained."""
    own = {}
    for name, tensor in trained.items():
        if name.startswith(part):
            name = name.removeprefix(part)
            name = re.sub(r"(lora_[AB])", rf"\1.{adapter}", name)
            name = re.sub(r"(skip_conv_\d)\.weight", r"\1.base_layer.weight", name)
            own[name] = tensor
    unexpected = network.load_state_dict(own, strict=False).unexpected_keys
    if unexpected:
        raise ValueError(f"{unexpected[0]} of the checkpoint has no place in this arrangement")
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in own)


@torch.inference_mode()
def official_translation(job: Job, requests: Requests) -> None:
    """Against "diffusers", the LoRA is fused and the context encoded once."""
    merged = job.against == "diffusers"
    model = Official(job, job.dtype, merged)
    context = model.encode([PROMPT]) if merged else None

    def translate(task: tuple[int, int]) -> Tensor:
        size, batch = task
        x = torch.stack([to_tensor(picture) for picture in pictures(size, batch)])
        x = x.to(job.device, job.dtype)
        repeated = None if context is None else context.expand(batch, -1, -1)
        translated = model(x, repeated)
        for picture in translated:
            to_picture(picture)
        return translated

    answer(requests, translate)


def official_training(job: Job, requests: Requests) -> None:
    """One iteration of the released script of pix2pix-Turbo.

    With a discriminator it takes a reconstruction step, an adversarial step with a forward pass
    of its own, and one discriminator step each on real and on fake pictures.
    """
    model = Official(job, torch.float32).train()
    discriminator = PatchDiscriminator().to(job.device)
    trained = [p for p in model.parameters() if p.requires_grad]
    fused = job.device == "cuda"
    optimizer = torch.optim.AdamW(trained, lr=5e-6, fused=fused)
    optimizer_d = torch.optim.AdamW(discriminator.parameters(), lr=5e-6, fused=fused)
    autocast = torch.autocast(job.device, torch.bfloat16, enabled=job.dtype is torch.bfloat16)
    x = torch.stack([to_tensor(picture) for picture in pictures(job.size, job.batch)])
    x = x.to(job.device)
    target = 2 * x - 1

    def descend(optimizer: torch.optim.Optimizer, loss_of: Callable[[], Tensor]) -> None:
        with autocast:
            loss = loss_of()
        loss.backward()
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # for the log

    def step(task: str) -> None:
        descend(optimizer, lambda: F.mse_loss(model(x), target))
        if not job.gan:
            return
        fakes = []

        def fooling() -> Tensor:
            fakes.append(model(x))
            return 0.5 * cross_entropy(discriminator(fakes[0]), 0.8)

        discriminator.requires_grad_(False)
        descend(optimizer, fooling)
        discriminator.requires_grad_(True)
        spectral_step(discriminator)
        fake = fakes[0].detach()
        descend(optimizer_d, lambda: 0.5 * cross_entropy(discriminator(target), 0.8))
        descend(optimizer_d, lambda: 0.5 * cross_entropy(discriminator(fake), 0.0))

    answer(requests, step)


def cross_entropy(levels: list[Tensor], label: float) -> Tensor:
    """Binary cross-entropy of the logits of a discriminator with one level."""
    (logits,) = levels
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, label))


def released_unpaired_training(job: Job, requests: Requests) -> None:
    """One iteration of the released script of CycleGAN-Turbo, on our networks, in float32.

    Two complete VAEs. The generator takes three steps (cycle, adversarial, identity), each with
    translations of its own in both directions, and the discriminators two (on fakes, on real
    pictures).
    """
    base = bases.load_base(job.base)
    generator = CycleGANTurbo(base.vae, base.unet, base.schedule, CycleGANTurboConfig())
    generator.vae_b2a = copy.deepcopy(generator.vae_b2a)
    judges = {"a2b": PatchDiscriminator(16), "b2a": PatchDiscriminator(16)}
    discriminators = nn.ModuleDict(judges)
    trained = [p for p in generator.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-6)
    optimizer_d = torch.optim.AdamW(discriminators.parameters(), lr=5e-6)
    x = torch.stack([to_tensor(picture) for picture in pictures(job.size, job.batch)])
    x = 2 * x - 1
    context = base.text_encoder(base.tokenizer(PROMPT)).expand(job.batch, -1, -1)
    side = job.size // generator.vae.factor

    def translate(pictures: Tensor, direction: str) -> Tensor:
        noise = torch.randn(job.batch, generator.vae.config.latent_channels, side, side)
        return generator(pictures, context, direction, latent_noise=noise)

    def descend(optimizer: torch.optim.Optimizer, losses: list[Tensor]) -> None:
        """A step on the sum of both directions' losses, from one graph."""
        sum(losses).backward()
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 10.0)
        optimizer.step()
        optimizer.zero_grad()

    def step(task: str) -> None:
        cycle = []
        for there, back in (("a2b", "b2a"), ("b2a", "a2b")):
            cycle.append(F.l1_loss(translate(translate(x, there), back), x))
        descend(optimizer, cycle)

        discriminators.requires_grad_(False)
        fakes = {direction: translate(x, direction) for direction in judges}
        fooling = [cross_entropy(D(fakes[direction]), 1.0) for direction, D in judges.items()]
        descend(optimizer, fooling)
        descend(optimizer, [F.l1_loss(translate(x, direction), x) for direction in judges])

        discriminators.requires_grad_(True)
        spectral_step(discriminators)
        on_fakes = []
        for direction, D in judges.items():
            on_fakes.append(0.5 * cross_entropy(D(fakes[direction].detach()), 0.0))
        descend(optimizer_d, on_fakes)
        descend(optimizer_d, [0.5 * cross_entropy(D(x), 1.0) for D in judges.values()])

    answer(requests, step)


# -------------------- LoRA as a weight

def weight_with_lora(layer: nn.Module) -> Tensor:
    """W + scale B A, with gradients for A and B."""
    B = layer.lora_B.weight.flatten(1)
    A = layer.lora_A.weight.flatten(1)
    return layer.weight + layer.scale * (B @ A).view_as(layer.weight)


def linear_of_weight(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, weight_with_lora(layer), layer.bias)


def conv_of_weight(layer: nn.Conv2d, x: Tensor) -> Tensor:
    return layer._conv_forward(x, weight_with_lora(layer), layer.bias)


def training_of_weights(job: Job, requests: Requests) -> None:
    """Our trainer with W + scale B A formed at each use, instead of a branch beside W.

    This is the other arrangement of LoRA, which our layers have no option for, so their forward
    methods are replaced in this process.
    """
    lora.LoRALinear.forward = linear_of_weight
    lora.LoRAConv2d.forward = conv_of_weight
    ours.training_steps(replace(job, run_folder=f"{job.run_folder}-as-a-weight"), requests)
