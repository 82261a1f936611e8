"""Sources of training samples, one class for each kind."""

from dataclasses import field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Discriminator, Field

from .section import Count, Kind, Number, Positive, PositiveOrZero, Section, section


@section
class DataSource(Kind):
    """What every source of training samples has."""

    TAG: ClassVar[str] = "source"
    source: str
    path: str | None
    weight: Positive = 1.0
    """Samples drawn from this source in proportion to those of the others in the list; leave a source out to mute
    it."""
    held_out: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    """Share of the source's records that is never trained on but measured, as `validation` is. The seed does not move
    it. Records go to one side or the other one by one: a picture that several have may be on both sides, unless
    `questions_per_sample` puts them together."""
    name: str | None = None
    """What logs and errors call the source; by default its kind and the name of its file."""

    @property
    def label(self) -> str:
        """What logs and errors call the source."""
        return self.name or self.source + (f":{Path(self.path).name}" if self.path else "")


@section
class EasyVqaData(DataSource):
    """Questions about coloured shapes, the easy-VQA asset."""

    source: Literal["easy_vqa"] = "easy_vqa"
    path: str | None = None
    """Folder of the data set instead of the asset."""
    split: str = "train"
    """Part to read: `train` or `test`."""
    questions_per_sample: Count = 1
    """Questions about one picture that share its tokens; each sees the picture and itself only."""
    balance_answers: bool = False
    """Draw `questions_per_sample` of a picture's questions anew each time, those less often whose wording gives the
    answer away, so that looking pays; otherwise every question is asked once an epoch."""


@section
class ConversationData(DataSource):
    """What sources of conversations have; those about the same pictures may share their tokens."""

    questions_per_sample: Count = 1
    """Most conversations about the same pictures that share their tokens; each sees the pictures and itself only. In a
    streamed source they must be neighbours."""
    independent_turns: bool = False
    """Every question of a conversation with its reply is one of its own, which sees the first question's pictures and
    no other turn; with `questions_per_sample` they share these."""


@section
class ChatData(ConversationData):
    """JSON lines of messages."""

    source: Literal["chat"] = "chat"
    path: str
    """File; picture paths are relative to it."""


@section
class LlavaData(ConversationData):
    """Conversations as LLaVA and InternVL write them."""

    source: Literal["llava"] = "llava"
    path: str
    """File of JSON or JSON lines."""
    picture_folder: str | None = None
    """Folder that picture paths are relative to, and which they may not leave; by default the file's own."""


@section
class PictureData(DataSource):
    """Pictures alone, for distillation."""

    source: Literal["pictures"] = "pictures"
    path: str
    """Folder, read with its subfolders."""


COLUMNS = ("image", "messages", "conversations", "texts", "question", "answer", "caption", "system")
"""What is read of a row, by the names that `HuggingFaceData.columns` gives to columns."""


@section
class HuggingFaceData(ConversationData):
    """Local files or a data set of the Hub, read by `datasets`."""

    source: Literal["huggingface"] = "huggingface"
    path: str
    """File, folder or Hub id."""
    split: str | None = None
    """Part of the data set to read; by default `train` of a Hub id, and of local files all, unless the names of all of
    them begin with a split's, as in `train-00000-of-00002.parquet`."""
    columns: dict[str, str] = field(default_factory=dict)
    """What columns are called that have other names: `{image: photo, caption: title}`; see `COLUMNS`."""
    format: Literal["auto", "parquet", "webdataset", "imagefolder"] = "auto"
    """How local files are laid out; `auto` goes by their names, and by the card of a Hub id."""
    subset: str | None = None
    """Which of a data set's configurations to read."""
    revision: str | None = None
    """Commit, branch or tag of a Hub id; a commit keeps a run resumable when the data set moves on."""
    streaming: bool = False
    """Read shards one after another instead of preparing all of them on disk first."""
    prompt: str = ""
    """What the user says beside the picture where a row holds a picture and its caption only."""

    def __post_init__(self):
        unknown = [name for name in self.columns if name not in COLUMNS]
        if unknown:
            raise ValueError(f"columns: {unknown[0]!r} is none of what is read: {', '.join(COLUMNS)}.")
        if self.revision is not None and Path(self.path).exists():
            raise ValueError(f"revision belongs to a Hub id; {self.path} is a local path.")


DataConfig = Annotated[
    EasyVqaData | ChatData | LlavaData | PictureData | HuggingFaceData, Discriminator(DataSource.TAG)
]
"""A source of any kind; `source` says which."""


@section
class ExpectedData(Section):
    """What `hovle plan` assumes of the data, which it does not read; training ignores it."""

    tiles_per_sample: PositiveOrZero = 1.0
    """Picture tiles, thumbnail included."""
    text_tokens_per_sample: PositiveOrZero = 60.0
    """Tokens that are not picture, chat template included; in distillation without the random ones."""
    supervised_tokens_per_sample: PositiveOrZero = 20.0
    """Those of them that are replies."""
    word_pieces_per_sample: PositiveOrZero = 0.0
    """Image tokens that say a piece of a word; with `objective.words`, on canvas and thumbnail together."""
    read_tokens_per_sample: PositiveOrZero = 0.0
    """Image tokens whose characters are told; with `objective.words.characters`."""
    filled_ratio: Annotated[Number, Field(gt=0, le=1)] = 0.95
    """Share of packed rows that is not padding."""
