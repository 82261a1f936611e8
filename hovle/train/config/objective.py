"""What a stage minimises, one class for each objective, and the teacher of distillation."""

from typing import Annotated, ClassVar, Literal

from pydantic import Discriminator, Field

from .section import Count, CountOrNone, Kind, Many, Place, Positive, PositiveOrZero, Section, Side, section

PRINTABLE = "".join(map(chr, range(33, 127)))
"""Characters of ASCII that leave a mark."""


@section
class NamedObjective(Kind):
    """What every objective has."""

    TAG: ClassVar[str] = "name"
    name: str


@section
class CharactersConfig(Section):
    """A head, used in training only, that tells the characters over each image token of a line of text."""

    weight: Positive = 0.3
    """Weight of its cross-entropy."""
    layer: Place = -3
    """Holistic layer it reads, counted as in Python lists: two below the top, whose output is the words' own."""
    per_token: Count = 3
    """Characters told of each token, those furthest left first."""
    none_weight: Positive = 0.1
    """Weight of a place without a character beside that of one with: most are empty, and at 1 the head says so of all
    of them for thousands of lines."""
    alphabet: Annotated[str, Field(min_length=1)] = PRINTABLE
    """Characters it tells apart; all others count as one more."""
    guide_weight: PositiveOrZero = 0.0
    """Weight of the squared error to what a small convolutional net sees in the same tiles, which learns the same
    characters beside the student and sooner: the lowest layer reproduces its edges, `layer` its letters. 0: none."""

    def __post_init__(self):
        if len(set(self.alphabet)) < len(self.alphabet) or any(character.isspace() for character in self.alphabet):
            raise ValueError("words.characters.alphabet must name each character once, and no space.")


@section
class WordsConfig(Section):
    """Image tokens say, in the language model's own embeddings, the words that the data's `regions` have for them.

    Such tokens have no room for features besides: the teacher is not matched there.
    """

    weight: Positive = 1.0
    """Weight of the cosine to each piece's embedding, and of finding it among others."""
    temperature: Positive = 0.05
    """Divides the cosines where pieces are found."""
    num_others: Count = 2048
    """Random entries of the vocabulary among which each piece is to be found, beside the pieces of the micro-batch."""
    scale_weight: PositiveOrZero = 1.0
    """Weight of the squared log ratio of the outputs' norms to those of the embeddings they should be."""
    filler: str = "\n"
    """What tokens of text pictures say where no piece ends; one token."""
    filler_weight: PositiveOrZero = 1.0
    """Weight of the cosine to its embedding."""
    min_pixels: PositiveOrZero = 8.0
    """Lines lower than this on their tiles, or with characters half as wide, are not asked for; names in boxes smaller
    than this neither."""
    characters: CharactersConfig | None = None
    """A head that helps to read; None: there is none."""


@section
class DistillationConfig(NamedObjective):
    """Teacher features at picture positions and the text table elsewhere."""

    name: Literal["distillation"] = "distillation"
    num_random_tokens: CountOrNone = 50
    """Random ordinary tokens after the picture, and as many again in the reply."""
    image_loss: Literal["cosine", "smooth_l1", "info_nce"] = "cosine"
    """How picture outputs are compared with teacher features: negative cosine as in the paper; smooth L1, mean over
    channels; cross-entropy in nats of finding each patch's own feature among those of its tile set."""
    temperature: Positive = 0.07
    """Divides the cosines of info_nce."""
    tiles_per_set: Count = 16
    """Tiles whose patches compete in info_nce: so many consecutive ones of a micro-batch, the rest in a last set. A
    batch cut between sets has the same loss; 1 allows any cut."""
    text_weight: PositiveOrZero = 1.0
    """Weight of the text cosine beside the image cosine."""
    scale_weight: PositiveOrZero = 0.1
    """Weight of the squared log ratio of output norms to text-embedding norms; a cosine alone leaves image outputs
    far too long for the LLM."""
    words: WordsConfig | None = None
    """Words for image tokens where the data's `regions` know them; None: none are taught."""


@section
class NextTokenConfig(NamedObjective):
    """Cross-entropy of replies."""

    name: Literal["next_token"] = "next_token"


ObjectiveConfig = Annotated[DistillationConfig | NextTokenConfig, Discriminator(NamedObjective.TAG)]
"""An objective of any kind; `name` says which."""


@section
class LayerMatch(Section):
    """One teacher layer and the holistic layer that learns to reproduce it, both counted as in Python lists."""

    teacher: Place = -1
    """Feature map or block of the teacher: 0 is its first, -1 its last."""
    student: Place = -1
    """Holistic layer: 0 is the first, -1 the last."""


@section
class TeacherConfig(Section):
    """The image teacher of distillation."""

    kind: Literal["timm", "open_clip", "transformers", "internvit"] = "timm"
    """Library that loads it; `internvit` is the vision tower of an InternVL model in transformers' layout."""
    name: str
    """timm or OpenCLIP model name (`tf_efficientnet_lite0`, `ViT-L-14`, `hf-hub:OWNER/NAME`); for `transformers` and
    `internvit` a folder or Hub id."""
    checkpoint: str | None = None
    """timm: local weights file, `asset:NAME` is fetched; None: timm's own pretrained weights from the Hub. OpenCLIP:
    local weights file or pretrained tag. The other kinds find their weights beside their config."""
    image_size: Side
    """Side in pixels at which the teacher sees a tile; its feature grid is pooled to the student's."""
    layers: Annotated[Many[LayerMatch], Field(min_length=1)] = (LayerMatch(),)
    """Which teacher layer each of some holistic layers reproduces; by default the last one the last one."""
    projected: bool = False
    """Match what InternVL's pixel shuffle and MLP make of the features, in its language model's width (internvit)."""
    standardize: bool = False
    """Subtract each feature channel's mean over some pictures and divide by its deviation. What all pictures share
    makes most of a raw cosine, and a short run learns little else; the paper does not mention it."""
    cache: str | None = None
    """Folder that keeps the teacher's features of every picture: computed once before the first step, read in every
    epoch and by later runs. For small sets seen several times."""
    max_cache_gib: PositiveOrZero = 20.0
    """Refuse to fill a cache larger than this."""

    def __post_init__(self):
        if self.projected and self.kind != "internvit":
            raise ValueError(f"teacher.projected is InternVL's own MLP; a {self.kind} teacher has none.")
        if self.checkpoint is not None and self.kind in ("transformers", "internvit"):
            raise ValueError(f"A {self.kind} teacher has its weights in the folder teacher.name; drop checkpoint.")
