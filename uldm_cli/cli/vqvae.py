"""`uldm vqvae`: autoencoders."""

import typer

from uldm_cli.cli import diagram, ema, vqvae_encode, vqvae_look
from uldm_cli.cli.training import add_train

app = typer.Typer()

EXAMPLES = """
Examples:
  uldm vqvae train                                           the embedded pictures of clothes, some minutes on a CPU
  uldm vqvae train autoencoder=vqvae data=images data.root=photos
                                                             one's own, in colour: a folder, .tar or .zip
  uldm vqvae train configs/fruits64/vqvae.yaml train.steps=2000
  uldm vqvae train data=images data.root=photos autoencoder=kl loss.lpips=0.5 adversarial={}
                                                             normally distributed latents, and a discriminator
"""


add_train(app, "Train an autoencoder.", EXAMPLES, command="vqvae-train")
vqvae_encode.add_to(app)
vqvae_look.add_to(app)
diagram.add_to(app)
ema.add_to(app, "vqvae", "autoencoder")
