"""Families of pipelines that can be a base: how each embeds prompts and calls its denoiser. All other code is shared.

| family | pipelines of diffusers | denoiser | text |
|---|---|---|---|
| Stable Diffusion | 1.x, 2.x, and the embedded base | U-Net | CLIP |
| Stable Diffusion XL | SDXL | U-Net, also conditioned on the pooled prompt and the image size | two CLIPs |
| Sana | Sana (Xie et al., ICLR 2025, arXiv:2410.10629) | linear transformer, rectified flow | Gemma 2, with a mask |

Sana is the supported transformer: `load_lora_weights` reads its adapters (PixArt-Σ's pipeline lacks that function), it has
one text encoder instead of SD3's three, its own sampler is DPM-Solver++, and its latents have 16×16 positions at 512 pixels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..utils.errors import InputError

Condition = dict[str, Tensor]
"""Conditioning of a denoiser, one row per image: "prompt", float [n, tokens, width], and further tensors of the family."""


@dataclass(frozen=True)
class Family:
    """The differences of one kind of pipeline from another."""

    name: str
    """Name in messages."""
    pipelines: tuple[str, ...]
    """Values of `_class_name` in model_index.json."""
    denoiser: str
    """Folder of the denoiser, and prefix of its tensors in an adapter's file."""
    readers: tuple[tuple[str, str], ...]
    """Folders of each tokenizer and its text encoder."""
    embed: Callable[[Any, Sequence[str]], Condition]
    """embed(parts, prompts) returns the conditioning of these texts; "" is the unconditional one."""
    predict: Callable[[nn.Module, Tensor, Tensor, Condition, int], Tensor]
    """predict(denoiser, noisy, time, condition, pixels per position) returns the prediction for latents [n, c, h, w]."""
    shapes: Callable[[Mapping[str, Any]], dict[str, tuple[int, ...]]]
    """shapes(configurations by folder) returns the shapes of one row of the result of `embed`."""

    def ask(
        self, denoiser: nn.Module, noisy: Tensor, time: Tensor, condition: Condition, scale: int, dtype: torch.dtype
    ) -> Tensor:
        """Return the prediction of `predict`, computed in `dtype`, in 32 bits."""
        condition = {name: table.to(dtype) for name, table in condition.items()}
        return self.predict(denoiser, noisy.to(dtype), time, condition, scale).float()

    rows: Callable[[Any, Sequence[str], int], Tensor]
    """rows(tokenizer, prompts, most tokens of the encoder) returns the token numbers that `embed` reads, int64 [n, length]."""
    classes: Mapping[str, tuple[str, ...]]
    """Allowed classes of transformers and diffusers for each part, by folder."""

    @property
    def models(self) -> tuple[str, ...]:
        """Folders with weights."""
        return (*(encoder for _, encoder in self.readers), self.denoiser, "vae")

    @property
    def parts(self) -> tuple[str, ...]:
        """All folders that are read."""
        return (*(tokenizer for tokenizer, _ in self.readers), *self.models, "scheduler")


def ids(tokenizer: Any, prompts: Sequence[str], most: int = 2**31) -> Tensor:
    """Return token numbers of texts, int64 [n, length], padded and cut to the tokenizer's length or `most`."""
    length = min(tokenizer.model_max_length, most)
    return tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt", max_length=length).input_ids


def _embed_stable(parts: Any, prompts: Sequence[str]) -> Condition:
    return {"prompt": parts.text_encoder(_read(parts.tokenizer, parts.text_encoder, prompts).to(parts.device))[0]}


def _read(tokenizer: Any, encoder: Any, prompts: Sequence[str]) -> Tensor:
    """Return `ids` of at most CLIP's maximum length, which some tokenizers do not define."""
    return ids(tokenizer, prompts, encoder.config.max_position_embeddings)


def _predict_stable(net: nn.Module, noisy: Tensor, time: Tensor, condition: Condition, scale: int) -> Tensor:
    return net(noisy, time, condition["prompt"]).sample


def _embed_xl(parts: Any, prompts: Sequence[str]) -> Condition:
    hidden, pooled = [], torch.empty(0)
    for tokenizer, encoder in (
        (parts.tokenizer, parts.text_encoder),
        (parts.more["tokenizer_2"], parts.more["text_encoder_2"]),
    ):
        found = encoder(_read(tokenizer, encoder, prompts).to(parts.device), output_hidden_states=True)
        hidden.append(found.hidden_states[-2])
        pooled = found[0]  # the projected text of the last encoder
    condition = {"prompt": torch.cat(hidden, -1), "pooled": pooled}
    if parts.index.get("force_zeros_for_empty_prompt", True):
        for row, prompt in enumerate(prompts):
            if not prompt:
                for table in condition.values():
                    table[row] = 0
    return condition


def _predict_xl(net: nn.Module, noisy: Tensor, time: Tensor, condition: Condition, scale: int) -> Tensor:
    height, width = (scale * side for side in noisy.shape[-2:])
    size = noisy.new_tensor([height, width, 0, 0, height, width]).expand(len(noisy), -1)
    more = {"text_embeds": condition["pooled"], "time_ids": size}
    return net(noisy, time, condition["prompt"], added_cond_kwargs=more).sample


SANA_TOKENS = 77
"""Tokens per prompt. diffusers uses 300; with the mask, both give equal results for short texts such as class names."""


def _read_sana(tokenizer: Any, prompts: Sequence[str]) -> Any:
    # padded on the right, as in the pipeline
    return tokenizer(
        [text.lower().strip() for text in prompts],
        padding="max_length", truncation=True, return_tensors="pt", max_length=SANA_TOKENS, padding_side="right",
    )  # fmt: skip


def _rows_sana(tokenizer: Any, prompts: Sequence[str], most: int) -> Tensor:
    words = _read_sana(tokenizer, prompts)
    return torch.where(words.attention_mask > 0, words.input_ids, -1)


def _embed_sana(parts: Any, prompts: Sequence[str]) -> Condition:
    words = _read_sana(parts.tokenizer, prompts).to(parts.device)
    hidden = parts.text_encoder(words.input_ids, attention_mask=words.attention_mask)[0]
    return {"prompt": hidden, "mask": words.attention_mask.to(hidden.dtype)}


def _predict_sana(net: Any, noisy: Tensor, time: Tensor, condition: Condition, scale: int) -> Tensor:
    times = time.expand(len(noisy)) * net.config.timestep_scale
    found = net(noisy, condition["prompt"], times, encoder_attention_mask=condition["mask"]).sample
    return found[:, : noisy.shape[1]]  # some also predict a variance


AUTOENCODERS = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderDC")
SCHEDULERS = tuple(
    f"{name}Scheduler"
    for name in (
        "DDIM", "DDPM", "DEISMultistep", "DPMSolverMultistep", "DPMSolverSinglestep", "EDMEuler", "EulerAncestralDiscrete",
        "EulerDiscrete", "FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete", "FlowMatchLCM", "HeunDiscrete",
        "KDPM2AncestralDiscrete", "KDPM2Discrete", "LCM", "LMSDiscrete", "PNDM", "SASolver", "SCM", "TCD", "UniPCMultistep",
    )
)  # fmt: skip
_CLIP_WORDS = ("CLIPTokenizer", "CLIPTokenizerFast")
_COMMON = {"tokenizer": _CLIP_WORDS, "text_encoder": ("CLIPTextModel",), "vae": AUTOENCODERS, "scheduler": SCHEDULERS}
LIBRARIES = ("diffusers", "transformers")


def library(part: str) -> str:
    """Return the library of a folder's class."""
    return LIBRARIES[part.startswith(("tokenizer", "text_encoder"))]


STABLE = Family(
    "Stable Diffusion",
    ("StableDiffusionPipeline",),
    "unet",
    (("tokenizer", "text_encoder"),),
    _embed_stable,
    _predict_stable,
    lambda made: {"prompt": (made["text_encoder"]["max_position_embeddings"], made["text_encoder"]["hidden_size"])},
    ids,
    {**_COMMON, "unet": ("UNet2DConditionModel",)},
)
XL = Family(
    "Stable Diffusion XL",
    ("StableDiffusionXLPipeline",),
    "unet",
    (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")),
    _embed_xl,
    _predict_xl,
    lambda made: {
        "prompt": (made["text_encoder"]["max_position_embeddings"], made["unet"]["cross_attention_dim"]),
        "pooled": (made["text_encoder_2"]["projection_dim"],),
    },
    ids,
    {
        **_COMMON,
        "tokenizer_2": _CLIP_WORDS,
        "text_encoder_2": ("CLIPTextModelWithProjection",),
        "unet": ("UNet2DConditionModel",),
    },
)
SANA = Family(
    "Sana",
    ("SanaPipeline",),
    "transformer",
    (("tokenizer", "text_encoder"),),
    _embed_sana,
    _predict_sana,
    lambda made: {"prompt": (SANA_TOKENS, made["text_encoder"]["hidden_size"]), "mask": (SANA_TOKENS,)},
    _rows_sana,
    {
        **_COMMON,
        "tokenizer": ("GemmaTokenizer", "GemmaTokenizerFast"),
        "text_encoder": ("Gemma2Model", "Gemma2ForCausalLM"),
        "transformer": ("SanaTransformer2DModel",),
    },
)
FAMILIES = (STABLE, XL, SANA)


def family(pipeline: str) -> Family:
    """Return the family of a pipeline's class; raise `InputError` if there is none."""
    for each in FAMILIES:
        if pipeline in each.pipelines:
            return each
    known = ", ".join(name for each in FAMILIES for name in each.pipelines)
    raise InputError(f"expected a pipeline of kind {known}, got {pipeline!r}; set another base")


def chosen(mask: Tensor, yes: Condition, no: Condition) -> Condition:
    """Return the rows of `yes` if `mask` (bool [n]) is true, else those of `no`."""
    return {name: torch.where(mask.view(-1, *[1] * (table.dim() - 1)), yes[name], table) for name, table in no.items()}


def stacked(first: Condition, second: Condition) -> Condition:
    """Return the rows of both, one after the other; one row of `first` is expanded to the rows of `second`."""
    return {name: torch.cat([first[name].expand_as(table), table]) for name, table in second.items()}
