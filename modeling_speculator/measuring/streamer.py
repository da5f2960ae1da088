"""Text on a terminal as it is generated, with its steps to be seen."""

import torch
from transformers.generation.streamers import BaseStreamer


COLORS, PLAIN = ("\033[36m", "\033[33m"), "\033[0m"


class StepStreamer(BaseStreamer):
    """Prints text as it comes, the tokens of each forward of the base model in another colour."""

    def __init__(self, tokenizer, model, color: bool):
        self.tokenizer, self.color = tokenizer, color
        self.tokens, self.shown, self.forwards = None, "", 0
        self.handle = model.register_forward_hook(self.count) if color else None

    def count(self, *args) -> None:
        self.forwards += 1

    def put(self, value: torch.Tensor) -> None:
        if self.tokens is None:  # the prompt
            self.tokens = []
            return
        self.tokens += value.tolist()
        text = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        if not text.endswith("\ufffd"):  # the middle of a character
            self.show(text)

    def show(self, text: str) -> None:
        color, end = (COLORS[self.forwards % 2], PLAIN) if self.color else ("", "")
        print(color + text[len(self.shown) :] + end, end="", flush=True)
        self.shown = text

    def end(self) -> None:
        self.show(self.tokenizer.decode(self.tokens, skip_special_tokens=True))
        if self.handle is not None:
            self.handle.remove()
        print()
