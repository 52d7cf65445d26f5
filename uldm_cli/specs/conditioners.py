"""Conditioners, which turn what a model is told into what its backbone takes, that a config can name."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from uldm_cli.specs.base import Spec

if TYPE_CHECKING:
    from torch import nn

    from uldm_cli.core import conditioners as modules


class Class(Spec):
    """A learned vector for each class, as a context of one token."""

    kind: Literal["class"] = "class"
    n_classes: PositiveInt = Field(1000, description="Number of classes.")
    embed_dim: PositiveInt = Field(512, description="Length of a class's vector: the backbone's context_dim.")

    def build(self) -> "modules.ClassEmbedder":
        from uldm_cli.core.conditioners import ClassEmbedder

        return ClassEmbedder(self.n_classes, self.embed_dim)


class Tokens(Spec):
    """A transformer encoder over token ids: of a text, or of the boxes of a layout."""

    kind: Literal["tokens"] = "tokens"
    vocab_size: PositiveInt = Field(30522, description="Number of token ids.")
    max_seq_len: PositiveInt = Field(77, description="Tokens of the longest sequence.")
    n_embed: PositiveInt = Field(1280, description="Width of the encoder: the backbone's context_dim.")
    n_layer: PositiveInt = Field(32, description="Pairs of attention and feed-forward network.")
    tokenizer: bool = Field(True, description="The ids are those of BERT's uncased English vocabulary.")

    def build(self) -> "modules.TokenEncoder":
        from uldm_cli.core.conditioners import TokenEncoder

        return TokenEncoder(self.vocab_size, self.max_seq_len, self.n_embed, self.n_layer)


class Rescaler(Spec):
    """Resizes maps, such as a segmentation, to the latents' size, and may map their channels linearly."""

    kind: Literal["rescaler"] = "rescaler"
    n_stages: NonNegativeInt = Field(1, description="How often the map is resized.")
    method: Literal["nearest", "bilinear", "bicubic", "area"] = Field("bilinear", description="Interpolation.")
    multiplier: float = Field(0.5, gt=0, allow_inf_nan=False, description="Factor of each resizing.")
    in_channels: PositiveInt = Field(3, description="Channels of the map.")
    out_channels: PositiveInt | None = Field(None, description="Channels of the result; null leaves them as they are.")
    bias: bool = Field(False, description="Whether the map of the channels adds a constant.")

    def build(self) -> "modules.Rescaler":
        from uldm_cli.core.conditioners import Rescaler

        return Rescaler(**self.model_dump(exclude={"kind"}))


class FirstStage(Spec):
    """The latents, not scaled, that the model's own autoencoder has for an image."""

    kind: Literal["first-stage"] = "first-stage"

    def build(self) -> "modules.FirstStage":
        from uldm_cli.core.conditioners import FirstStage

        return FirstStage()


class Identity(Spec):
    """The value as it is: an image of the latents' size, or embeddings that something else computed."""

    kind: Literal["identity"] = "identity"

    def build(self) -> "nn.Module":
        from torch import nn

        return nn.Identity()
