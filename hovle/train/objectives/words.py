"""Words by distillation: image tokens say, as embeddings of the language model, the words for what they show.

`data.words` tells which tokens and which words. The head that tells characters and its guide are for training only.
"""

from collections.abc import Sequence

import torch
from torch import nn

from ...model.modeling_hovle import HoVLEForConditionalGeneration
from ..config import CharactersConfig, WordsConfig
from ..data.batch import PackedBatch
from ..data.words import NO_WORD
from .letter_guide import LetterGuide

TOKENS_AT_ONCE = 256
"""Tokens compared with the whole vocabulary at a time."""

LOWEST = 0
"""The holistic layer above the stem."""


class WordTerms(nn.Module):
    """Terms of the loss at image tokens with a word.

    Args:
        config: What is asked for, and the weights.
        model: The student.

    Raises:
        ValueError: Where characters are to be told from a layer that the student lacks, or by HoVLE-HD.
    """

    def __init__(self, config: WordsConfig, model: HoVLEForConditionalGeneration):
        super().__init__()
        self.config = config
        self.weights = {
            "word_cosine": -config.weight,
            "word_cross_entropy": config.weight,
            "word_scale": config.scale_weight,
            "filler_cosine": -config.filler_weight,
            "word_pieces_left_out": 0.0,
        }
        self.only_validated: tuple[str, ...] = ("word_accuracy",)
        self.layers: tuple[int, ...] = ()
        """Layers below the last that it looks at: the one that tells characters; with a guide, the lowest."""
        self.character_head: nn.Module | None = None
        self.guide: LetterGuide | None = None
        if config.characters is not None:
            self._prepare_characters(config.characters, model)

    def _prepare_characters(self, config: CharactersConfig, model: HoVLEForConditionalGeneration) -> None:
        hidden_size, num_classes = model.config.text_config.hidden_size, num_character_classes(config)
        self.layers = (check_character_layer(config.layer, model),)
        self.character_head = CharacterHead(hidden_size, config.per_token, num_classes)
        self.only_validated = ("word_accuracy", "line_accuracy")
        self.weights |= {"character_cross_entropy": config.weight, "character_accuracy": 0.0}
        if config.guide_weight:
            self.layers = (*self.layers, LOWEST)
            self.guide = LetterGuide(model.config, config.per_token, num_classes)
            self.to_guide = nn.ModuleList(
                nn.Sequential(nn.RMSNorm(hidden_size), nn.Linear(hidden_size, width)) for width in self.guide.widths
            )
            self.weights |= {
                "guide_cross_entropy": config.weight,
                "guide_accuracy": 0.0,
                "guide_edges": config.guide_weight,
                "guide_letters": config.guide_weight,
            }

    def counts(self, batch: PackedBatch) -> dict[str, torch.Tensor]:
        """Positions each term is summed over; those of `only_validated` besides."""
        has_word, is_piece, is_filler = kinds_of_tokens(batch)
        num_pieces = is_piece.sum()
        counts = dict.fromkeys(("word_cosine", "word_cross_entropy", "word_accuracy"), num_pieces)
        counts |= {"word_scale": has_word.sum(), "filler_cosine": is_filler.sum()}
        assert batch.num_pieces is not None  # as `kinds_of_tokens` has seen
        counts["word_pieces_left_out"] = batch.num_pieces[:, 0].sum()
        if self.character_head is not None:
            assert batch.character_ids is not None
            counts["character_cross_entropy"] = self._character_weights(batch.character_ids).sum()
            counts["character_accuracy"] = (batch.character_ids > 0).sum()
            counts["line_accuracy"] = (is_piece & on_line(batch.character_ids)).sum()
        if self.guide is not None:
            assert batch.character_ids is not None
            num_guided = has_lines(batch.character_ids).sum() * batch.character_ids.shape[1]
            counts |= {
                "guide_cross_entropy": counts["character_cross_entropy"],
                "guide_accuracy": counts["character_accuracy"],
                "guide_edges": num_guided,
                "guide_letters": num_guided,
            }
        return counts

    def forward(
        self,
        outputs: torch.Tensor,
        below: Sequence[torch.Tensor],
        text_table: torch.Tensor,
        batch: PackedBatch,
        pixel_values: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Summed terms of a packed batch; out of training `only_validated` too.

        Args:
            outputs: What enters the language model at image tokens, shape `(N, S, D)`.
            below: The same of each of `layers`.
            text_table: Text embeddings, shape `(V, D)`.
            batch: The words.
            pixel_values: Its tiles, normalised, shape `(N, C, s, s)`.
        """
        has_word, is_piece, _ = kinds_of_tokens(batch)
        assert batch.word_ids is not None  # as `kinds_of_tokens` has seen
        assert batch.num_pieces is not None
        said, wanted = outputs[has_word].float(), text_table[batch.word_ids[has_word]].float()
        pieces, piece_ids = outputs[is_piece].float(), batch.word_ids[is_piece]
        cosines = nn.functional.cosine_similarity(said, wanted, dim=-1)
        of_piece = is_piece[has_word]
        norms = [vectors.norm(dim=-1).clamp(min=1e-6).log() for vectors in (said, wanted)]
        terms = {
            "word_cosine": cosines[of_piece].sum(),
            "word_cross_entropy": self._found_among_others(pieces, piece_ids, text_table),
            "word_scale": (norms[0] - norms[1]).square().sum(),
            "filler_cosine": cosines[~of_piece].sum(),
            "word_pieces_left_out": batch.num_pieces[:, 1].sum(),
        }
        is_found = None if self.training else nearest_words(pieces, text_table) == piece_ids
        if is_found is not None:
            terms["word_accuracy"] = is_found.sum()
        if self.character_head is not None:
            assert batch.character_ids is not None
            of_line = on_line(batch.character_ids)
            logits = self.character_head(below[0][of_line])
            terms |= self._told("character", logits, batch.character_ids[of_line])
            if is_found is not None:
                terms["line_accuracy"] = (is_found & of_line[is_piece]).sum()
        if self.guide is not None:
            assert batch.character_ids is not None
            terms |= self._guided(below, batch.character_ids, pixel_values)
        return terms

    def _found_among_others(self, pieces: torch.Tensor, piece_ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """Sum of `-log p(own piece)` among the micro-batch's pieces and random entries of the vocabulary.

        Which ones depends on the pieces alone, so a batch has the same loss whenever it comes.
        """
        generator = torch.Generator().manual_seed(int(piece_ids.sum()))
        others = torch.randint(len(table), (self.config.num_others,), generator=generator)
        candidates = torch.cat([piece_ids, others.to(piece_ids.device)]).unique()
        embeds = nn.functional.normalize(table[candidates].float(), dim=-1)
        logits = nn.functional.normalize(pieces, dim=-1) @ embeds.T / self.config.temperature
        own = torch.searchsorted(candidates, piece_ids)
        return nn.functional.cross_entropy(logits.float(), own, reduction="sum")

    def _character_weights(self, character_ids: torch.Tensor) -> torch.Tensor:
        """Weights of the slots: 1 where a character stands, less where none does, 0 where none is asked for."""
        assert self.config.characters is not None
        return (character_ids > 0).float() + self.config.characters.none_weight * (character_ids == 0)

    def _told(self, name: str, logits: torch.Tensor, wanted: torch.Tensor) -> dict[str, torch.Tensor]:
        """How well logits `(K, slots, classes)` tell characters of classes `(K, slots)`."""
        logits = logits.float()
        entropies = nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none")
        return {
            f"{name}_cross_entropy": (self._character_weights(wanted) * entropies.view_as(wanted)).sum(),
            f"{name}_accuracy": ((logits.argmax(dim=-1) == wanted) & (wanted > 0)).sum(),
        }

    def _guided(
        self, below: Sequence[torch.Tensor], character_ids: torch.Tensor, pixel_values: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """What the guide tells of tiles with lines, and how much of what it sees there the layers reproduce."""
        assert self.guide is not None
        is_guided = has_lines(character_ids)
        seen = self.guide(pixel_values[is_guided])
        of_line = on_line(character_ids)
        terms = self._told("guide", seen.logits[of_line[is_guided]], character_ids[of_line])
        edges, letters = (
            (reproduce(layer[is_guided].float()) - features.detach()).square().mean(dim=-1).sum()
            for reproduce, layer, features in zip(self.to_guide, reversed(below), seen[:2], strict=True)
        )
        return {**terms, "guide_edges": edges, "guide_letters": letters}


def on_line(character_ids: torch.Tensor) -> torch.Tensor:
    """Which tokens lie on a line, bool, shape `(N, S)`, of the classes of its characters `(N, S, slots)`."""
    return (character_ids != NO_WORD).any(dim=-1)


def has_lines(character_ids: torch.Tensor) -> torch.Tensor:
    """Which tiles have characters to tell, bool, shape `(N,)`, of their classes `(N, S, slots)`."""
    return on_line(character_ids).any(dim=-1)


class CharacterHead(nn.Module):
    """Tell the characters over an image token.

    Args:
        hidden_size: Of the layer it reads.
        num_slots: Characters it tells of a token.
        num_classes: What each may be: none, one of the alphabet, another one.
    """

    def __init__(self, hidden_size: int, num_slots: int, num_classes: int):
        super().__init__()
        self.norm = nn.RMSNorm(hidden_size)
        self.linear = nn.Linear(hidden_size, num_slots * num_classes)
        self.shape = (num_slots, num_classes)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits `(..., slots, classes)` of hidden states `(..., D)`."""
        return self.linear(self.norm(hidden_states.float())).unflatten(-1, self.shape)


def num_character_classes(config: CharactersConfig) -> int:
    """None, one of the alphabet, or another one."""
    return len(config.alphabet) + 2


def kinds_of_tokens(batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Image tokens with a word, with a piece and with the filler; bool, shapes `(N, S)`."""
    assert batch.word_ids is not None  # whoever teaches words packs them
    assert batch.is_filler is not None
    has_word = batch.word_ids != NO_WORD
    return has_word, has_word & ~batch.is_filler, has_word & batch.is_filler


@torch.no_grad()
def nearest_words(vectors: torch.Tensor, text_table: torch.Tensor) -> torch.Tensor:
    """Entry of the vocabulary with the largest cosine to each of `(P, D)` vectors, in float32; shape `(P,)`."""
    with torch.autocast(vectors.device.type, enabled=False):
        unit = nn.functional.normalize(text_table.float(), dim=-1)
        return torch.cat([(part.float() @ unit.T).argmax(dim=-1) for part in vectors.split(TOKENS_AT_ONCE)])


def check_character_layer(layer: int, model: HoVLEForConditionalGeneration) -> int:
    """Number of the holistic layer whose output tells characters, from 0; ValueError where there is none."""
    count = model.config.num_embedding_layers
    if model.model.is_hd:
        raise ValueError(
            "HoVLE-HD cannot take objective.words.characters: its layers see the patches before they are joined to "
            "the tokens that stand for words. Leave characters out."
        )
    if not -count <= layer < count:
        raise ValueError(
            f"objective.words.characters.layer is {layer}, but there are {count} holistic layers (from 0, or from -1 "
            "backwards)."
        )
    return layer % count
