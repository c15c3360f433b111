"""Configurations of known pipelines of the hub, so that a dry run needs no download.

They hold only the differences from the defaults of diffusers' and transformers' classes. If the files of a pipeline exist,
they are used instead.
"""

from typing import Any

from torch import nn

from ..utils.errors import InputError
from . import pipeline
from .pipeline_families import Family, family

_CLIP = {"vocab_size": 49408, "max_position_embeddings": 77}
_CLIP_L = {**_CLIP, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_CLIP_H = {**_CLIP, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
_CLIP_G = {**_CLIP, "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
_LEVELS = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4, "norm_num_groups": 32}
_VAE = {
    **_LEVELS, "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4, "sample_size": 512
}  # fmt: skip
_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}

Outline = dict[str, tuple[str, str, dict[str, Any]]]
"""Library, class and configuration of each part, by folder."""


def _stable(unet: dict[str, Any], text: dict[str, Any], prediction: str) -> dict[str, Any]:
    return {
        "_class_name": "StableDiffusionPipeline",
        "tokenizer": ("transformers", "CLIPTokenizer", {}),
        "text_encoder": ("transformers", "CLIPTextModel", text),
        "unet": ("diffusers", "UNet2DConditionModel", unet),
        "vae": ("diffusers", "AutoencoderKL", {**_VAE, "scaling_factor": 0.18215}),
        "scheduler": ("diffusers", "DDIMScheduler", {**_BETAS, "prediction_type": prediction}),
    }


_UNET_2 = {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True}
KNOWN: dict[str, dict[str, Any]] = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": _stable(
        {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}, _CLIP_L, "epsilon"
    ),
    "stabilityai/stable-diffusion-2-1-base": _stable({**_UNET_2, "sample_size": 64}, _CLIP_H, "epsilon"),
    "stabilityai/stable-diffusion-2-1": _stable({**_UNET_2, "sample_size": 96}, _CLIP_H, "v_prediction"),
    "stabilityai/stable-diffusion-xl-base-1.0": {
        "_class_name": "StableDiffusionXLPipeline",
        "tokenizer": ("transformers", "CLIPTokenizer", {}),
        "tokenizer_2": ("transformers", "CLIPTokenizer", {}),
        "text_encoder": ("transformers", "CLIPTextModel", _CLIP_L),
        "text_encoder_2": ("transformers", "CLIPTextModelWithProjection", {**_CLIP_G, "projection_dim": 1280}),
        "unet": ("diffusers", "UNet2DConditionModel", {
            "sample_size": 128, "block_out_channels": [320, 640, 1280], "attention_head_dim": [5, 10, 20],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "cross_attention_dim": 2048, "transformer_layers_per_block": [1, 2, 10], "use_linear_projection": True,
            "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        }),
        "vae": ("diffusers", "AutoencoderKL", {**_VAE, "scaling_factor": 0.13025, "sample_size": 1024}),
        "scheduler": ("diffusers", "EulerDiscreteScheduler", _BETAS),
    },
    "Efficient-Large-Model/Sana_600M_512px_diffusers": {
        "_class_name": "SanaPipeline",
        "tokenizer": ("transformers", "GemmaTokenizer", {}),
        "text_encoder": ("transformers", "Gemma2Model", {
            "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
            "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
        }),
        "transformer": ("diffusers", "SanaTransformer2DModel", {
            "sample_size": 16, "num_layers": 28, "num_attention_heads": 36, "attention_head_dim": 32,
            "num_cross_attention_heads": 16, "cross_attention_head_dim": 72, "cross_attention_dim": 1152,
        }),
        "vae": ("diffusers", "AutoencoderDC", {
            "encoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
            "decoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
            "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
            "decoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
            "encoder_layers_per_block": [2, 2, 2, 3, 3, 3], "decoder_layers_per_block": [3, 3, 3, 3, 3, 3],
            "encoder_qkv_multiscales": [[], [], [], [5], [5], [5]], "decoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
            "upsample_block_type": "interpolate", "downsample_block_type": "conv", "scaling_factor": 0.41407,
        }),
        "scheduler": ("diffusers", "DPMSolverMultistepScheduler", {
            "prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0,
        }),
    },
}  # fmt: skip
"""Configurations by repository."""


def outline(base: str) -> tuple[Family, Outline]:
    """Return the family of a base and the configuration of its parts; the weights need not exist.

    Raises:
        InputError: if the base neither exists nor is known.
    """
    try:
        folder = pipeline.find(base, weights=False)
    except InputError:
        if base.partition("@")[0] not in KNOWN:
            raise
        known = dict(KNOWN[base.partition("@")[0]])
        return family(known.pop("_class_name")), known
    kind, index = pipeline.index_of(folder)
    made: Outline = {}
    for part in kind.parts:
        file = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
        made[part] = (*index.get(part, ("", "")), pipeline.json_of(file) if part in (*kind.models, "scheduler") else {})
    return kind, made


def build(library: str, name: str, config: dict[str, Any]) -> nn.Module:
    """Return a part with random weights; under `torch.device("meta")` it has no values."""
    import diffusers
    import transformers

    pipeline.quiet()
    kind = getattr({"diffusers": diffusers, "transformers": transformers}[library], name)
    if library == "transformers":
        return kind(kind.config_class(**config))
    return kind.from_config(config)


def side(base: str) -> int:
    """Return the image size in pixels, as `pipeline.side` does, also for a known base without files."""
    kind, made = outline(base)
    return int(made[kind.denoiser][2]["sample_size"]) * pipeline.scale_of(made["vae"][2])
