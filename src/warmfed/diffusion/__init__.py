"""The generator: latent diffusion pipelines, LoRA adapters, synthesis. Heavy libraries are imported here only, when used."""
