"""The rivals of patches, with the settings that they are compared in (docs/log.md says what was tried)."""

from functools import partial
from pathlib import Path

from engrammar_lab.editing.codebook import CodebookSettings, codebook
from engrammar_lab.editing.covariances import KeyText
from engrammar_lab.editing.edited import Way
from engrammar_lab.editing.located import MemitSettings, RomeSettings, memit, rome
from engrammar_lab.editing.told import PromptSettings, RetrievalSettings, retrieve, tell
from engrammar_lab.editing.tuned import LoraSettings, TuneSettings, fine_tune, low_rank


def rivals(cache: Path) -> dict[str, Way]:
    """Ways of changing facts of SmolLM2-135M-Instruct, by name.

    Args:
        cache: a folder of corpora, in which second moments of keys are kept.
    """
    keys = KeyText(cache=cache)
    return {
        "prompt": partial(tell, settings=PromptSettings()),
        "retrieval": partial(retrieve, settings=RetrievalSettings(least=0.4)),
        "fine-tuning": partial(fine_tune, settings=TuneSettings(block=4, lr=2e-3)),
        "fine-tuning, bounded": partial(fine_tune, settings=TuneSettings(block=4, lr=2e-3, most=5e-3)),
        "LoRA": partial(low_rank, settings=LoraSettings()),
        "ROME": partial(rome, settings=RomeSettings(block=5, keys=keys)),
        "MEMIT": partial(memit, settings=MemitSettings(blocks=(3, 4, 5, 6, 7), held=2000.0, keys=keys)),
        "codebook": partial(codebook, settings=CodebookSettings(block=20, radius=1.0)),
    }


RIVALS = rivals(Path("data/pocket"))
