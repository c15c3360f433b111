"""Pipelines of every family, with a few thousand random weights and tokenizers of a hundred words each."""

import functools
import warnings
from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers

from warmfed.core.rng import seeded, stream

with warnings.catch_warnings():
    # diffusers and transformers import modules of their own that are deprecated
    warnings.simplefilter("ignore")
    import diffusers
    import transformers

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SIDE, LATENT = 32, 8
CLASSES = {
    "sd15": "StableDiffusionPipeline",
    "sd21": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "sana": "SanaPipeline",
}


def _clip_words() -> Any:
    """CLIP's own files, vocab.json and merges.txt, with single letters only."""
    byte_level = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*byte_level, *(f"{letter}</w>" for letter in byte_level), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: i for i, word in enumerate(words)}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=24)


def _clip_text(words: Any, layers: int, projected: bool = False) -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, projection_dim=16, num_hidden_layers=layers,
        num_attention_heads=2, max_position_embeddings=24, bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )  # fmt: skip
    return (transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel)(config)


def _vae() -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4, sample_size=SIDE,
    )  # fmt: skip


def _unet(width: int, **more: Any) -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=LATENT, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, cross_attention_dim=width,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4, **more,
    )  # fmt: skip


def _stable(scheduler: Any, **more: Any) -> Any:
    words = _clip_words()
    return diffusers.StableDiffusionPipeline(
        vae=_vae(), text_encoder=_clip_text(words, 2), tokenizer=words, unet=_unet(16, **more), scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def _sd15() -> Any:
    return _stable(diffusers.PNDMScheduler(**_BETAS, skip_prk_steps=True, set_alpha_to_one=False))


def _sd21() -> Any:
    scheduler = diffusers.DDIMScheduler(**_BETAS, clip_sample=False, set_alpha_to_one=False, prediction_type="v_prediction")
    return _stable(scheduler, use_linear_projection=True)


def _sdxl() -> Any:
    words = _clip_words()
    unet = _unet(
        32, use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16, transformer_layers_per_block=(1, 1),
    )  # fmt: skip
    return diffusers.StableDiffusionXLPipeline(
        vae=_vae(), text_encoder=_clip_text(words, 2), text_encoder_2=_clip_text(words, 2, projected=True), tokenizer=words,
        tokenizer_2=words, unet=unet, scheduler=diffusers.EulerDiscreteScheduler(**_BETAS), add_watermarker=False,
    )  # fmt: skip


def _sana() -> Any:
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    words = transformers.GemmaTokenizer(vocab={word: i for i, word in enumerate([*special, "▁", *LETTERS])}, merges=[])
    encoder = transformers.Gemma2Model(
        transformers.Gemma2Config(
            vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, attn_implementation="eager",
        )
    )  # fmt: skip
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2, num_cross_attention_heads=2,
        cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=16, sample_size=LATENT,
    )  # fmt: skip
    vae = diffusers.AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=4, encoder_block_types="ResBlock", decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 8, 16), decoder_block_out_channels=(8, 8, 16), encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1), encoder_qkv_multiscales=((), (), ()), decoder_qkv_multiscales=((), (), ()),
        upsample_block_type="interpolate", downsample_block_type="conv", decoder_norm_types="rms_norm", scaling_factor=0.41407,
    )  # fmt: skip
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=2
    )
    return diffusers.SanaPipeline(words, encoder, vae, transformer, scheduler)


_MADE = {"sd15": _sd15, "sd21": _sd21, "sdxl": _sdxl, "sana": _sana}


def write(kind: str, folder: Path) -> str:
    """Return the folder of a pipeline that diffusers saved."""
    with seeded(stream("pipelines", kind)), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = _MADE[kind]()
        pipe.save_pretrained(folder)
    return str(folder)


@functools.cache
def opened(folder: str, kind: str) -> Any:
    """Return the plain diffusers pipeline."""
    pipe = getattr(diffusers, CLASSES[kind]).from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe
