"""The generator: latent diffusion pipelines, LoRA adapters and sampling. Heavy libraries are imported only here, on use."""
