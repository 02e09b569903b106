"""See the logits from which transformers chooses tokens, in passes that are not timed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import recipe

if TYPE_CHECKING:
    import torch

MOST_NAMES = 3


class Watch:
    """Counts logit vectors, and those with a NaN or an infinite value.

    `generate()` calls it as a logits processor, which sees what the arg max sees, on every decode path. It changes
    nothing.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.checked = self.nonfinite = 0
        self.first_token: int | None = None
        self.prompt = 0  # tokens of the prompts of the current call

    def arguments(self) -> dict[str, Any]:
        """Return the argument of one call of `generate()`."""
        from transformers import LogitsProcessorList

        self.prompt = 0
        return {"logits_processor": LogitsProcessorList([self])}

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Look at the logits (rows, vocabulary) after `input_ids` (rows, tokens so far)."""
        self.prompt = self.prompt or input_ids.shape[1]
        self._count(scores, input_ids.shape[1] - self.prompt + 1)
        return scores

    def look_at_pass(self, module: Any, arguments: Any, output: Any) -> None:
        """Look at the logits of a pass of continuous batching, whose rows are at different tokens."""
        logits = output["logits"] if isinstance(output, dict) else output.logits
        self._count(logits.reshape(-1, logits.shape[-1]), None)

    def _count(self, scores: torch.Tensor, token: int | None) -> None:
        finite = scores.isfinite().all(-1)
        bad = int((~finite).sum())
        self.checked += finite.numel()
        self.nonfinite += bad
        if bad and token is not None and (self.first_token is None or token < self.first_token):
            self.first_token = token

    def weights(self) -> tuple[str, ...]:
        """Return the names of a few parameters that are not finite themselves, if logits were not."""
        if not self.nonfinite:
            return ()
        named = [(name, recipe.local(one)) for name, one in self.model.named_parameters()]
        found = [name for name, one in named if one.is_floating_point() and not bool(one.isfinite().all())]
        return tuple(found[:MOST_NAMES])
