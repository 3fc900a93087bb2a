"""What to do after an audit: the one advice that fits a matrix."""

from dataclasses import dataclass

from coupled_adam.audit.centering import reason_against
from coupled_adam.audit.embedding_files import Embeddings
from coupled_adam.audit.verdict import (
    ISOTROPY,
    SHIFT,
    helped_by_removal,
    nothing_learned,
    too_few_for_isotropy,
    too_few_for_shift,
)
from coupled_adam.audit.word_vectors import is_word_format
from coupled_adam.geometry import Measurements

__all__ = ["Advice"]

#: The section of docs/audit.md whose subsections are the cases.
SECTION = "What to do after an audit"


@dataclass(frozen=True)
class Advice:
    """What to do about one embedding matrix."""

    case: str
    """The heading on the page about audits that says more."""
    text: str
    """The advice, in a sentence or two."""


def advice(found: Embeddings, kind: str, measured: Measurements) -> Advice:
    """Return the advice for one matrix of a model.

    Args:
        found: what was read.
        kind: which matrix, as ``coupled_adam.audit.models.Audited.matrix`` names it.
        measured: its metrics.
    """
    if nothing_learned(measured) is not None:
        return Advice(
            "Nothing to judge",
            "Check how the array was made."
            if found.origin.kind == "numpy"
            else "Check that this is a trained matrix and the right one; --tensor NAME measures another.",
        )
    if too_few_for_shift(measured):
        return Advice("Nothing to judge", "Audit more rows: at least a few hundred, and more rows than dimensions.")
    if SHIFT.level(measured.mean_shift_ratio) != "good":
        return _about_a_shift(found, kind, measured)
    if helped_by_removal(measured):
        return Advice("Features", f"The mean is no problem. {_dominating(measured)}")
    if ISOTROPY.level(measured.isotropy) == "good" or too_few_for_isotropy(measured):
        return Advice("Nothing to correct", "Use the embeddings as they are; subtracting the mean would change little.")
    return Advice(
        "Nothing to correct",
        "Use the embeddings as they are: neither subtracting the mean nor removing a few directions makes them "
        "isotropic.",
    )


def _about_a_shift(found: Embeddings, kind: str, measured: Measurements) -> Advice:
    as_features = "If you use the vectors as features, subtract their mean first."
    if helped_by_removal(measured):
        as_features += f" {_dominating(measured)}"
    if found.origin.kind == "run":
        return Advice(
            "Training",
            "More training does not move the mean back. To keep it at the origin, start the next run with Coupled "
            f"Adam on the embedding. {as_features}",
        )
    if kind == "output":
        reason = reason_against(found)
        if reason is None:
            return Advice(
                "Untied models",
                "Add --center COPY: it writes a copy of the model with this mean subtracted. No prediction changes.",
            )
        return Advice("Untied models", f"No centered copy can be written: {reason}. {as_features}")
    if kind == "tied":
        return Advice(
            "Tied models",
            f"Leave the model as it is: subtracting the mean would also change its input embeddings. {as_features}",
        )
    if kind == "embedding" and found.origin.kind == "numpy":
        rest = f" {_dominating(measured)}" if helped_by_removal(measured) else ""
        return Advice(
            "Retrieval",
            "Before you compare rows by cosine, subtract their mean (from queries too). If this is the output "
            f"embedding of an untied model, --center COPY writes a centered copy.{rest}",
        )
    origin = found.origin
    if (origin.static or origin.kind == "spaCy" or is_word_format(origin.kind)) and reason_against(found) is None:
        rest = f" {_dominating(measured)}" if helped_by_removal(measured) else ""
        return Advice("Features", f"Add --center COPY: it writes the same vectors with their mean subtracted.{rest}")
    return Advice("Features", f"Leave the model as it is. {as_features}")


def _dominating(measured: Measurements) -> str:
    return (
        "A few directions still dominate after centering: remove them too before you compare vectors "
        f"(All-but-the-Top: isotropy {measured.isotropy_centered:.3f} → {measured.isotropy_post_processed:.3f})."
    )
