"""What `generate` hands out besides the text: streams, scores, logits, hidden states."""

import pytest
import torch
from drafters import oracle_for
from tiny_models import character_tokenizer, prompts
from transformers import TextStreamer
from transformers.generation.streamers import BaseStreamer


TOKENIZER = character_tokenizer()


class Streamed(BaseStreamer):
    def __init__(self):
        self.parts, self.ended, self.inference = [], False, False

    def put(self, value):
        assert not self.ended
        self.parts.append(value.tolist())
        self.inference |= value.is_inference()

    def end(self):
        self.ended = True


@pytest.mark.parametrize("options", [{}, {"eos_token_id": list(range(20))}, {"repetition_penalty": 1.5}])
@pytest.mark.parametrize("rows", [1, 3])
def test_streamer(llama, rows, options):
    inputs = prompts(rows)
    options = {"max_new_tokens": 24, "do_sample": False} | options
    expected, streamed = Streamed(), Streamed()
    text = llama.generate(**inputs, **options, streamer=expected)
    oracle = oracle_for(llama, inputs, text)
    out = llama.generate(**inputs, **options, streamer=streamed, assistant_model=oracle)
    assert out.tolist() == text.tolist()
    assert streamed.parts == expected.parts
    assert streamed.ended
    assert not streamed.inference


def test_streamed_text_is_the_final_text(llama, capsys):
    inputs = prompts(1)
    text = llama.generate(**inputs, max_new_tokens=24, do_sample=False)
    streamer = TextStreamer(TOKENIZER, skip_prompt=True)
    oracle = oracle_for(llama, inputs, text)
    llama.generate(**inputs, max_new_tokens=24, do_sample=False, streamer=streamer, assistant_model=oracle)
    assert capsys.readouterr().out.strip() == TOKENIZER.decode(text[0, 9:])


@pytest.mark.parametrize("rows", [1, 3])
def test_scores_logits_and_hidden_states(llama, rows):
    inputs = prompts(rows)
    options = {"max_new_tokens": 24, "do_sample": False, "return_dict_in_generate": True, "repetition_penalty": 1.5}
    options |= {"output_scores": True, "output_logits": True, "output_hidden_states": True}
    expected = llama.generate(**inputs, **options)
    oracle = oracle_for(llama, inputs, expected.sequences)
    out = llama.generate(**inputs, **options, assistant_model=oracle)
    assert out.sequences.tolist() == expected.sequences.tolist()
    for what in ("scores", "logits", "hidden_states"):
        torch.testing.assert_close(getattr(out, what), getattr(expected, what), atol=1e-4, rtol=1e-4)
    transition = llama.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)
    torch.testing.assert_close(
        transition,
        llama.compute_transition_scores(expected.sequences, expected.scores, normalize_logits=True),
        atol=1e-4,
        rtol=1e-4,
    )
    assert not out.scores[0].is_inference()
    assert not out.hidden_states[1][0].is_inference()


def test_scores_are_zero_once_a_row_has_ended(llama):
    inputs = prompts()
    plain = llama.generate(**inputs, max_new_tokens=24, do_sample=False)
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": int(plain[1, 15])}
    options |= {"return_dict_in_generate": True, "output_logits": True, "output_hidden_states": True}
    expected = llama.generate(**inputs, **options)
    out = llama.generate(**inputs, **options, assistant_model=oracle_for(llama, inputs, plain))
    assert out.sequences.tolist() == expected.sequences.tolist()
    lengths = [(row != 0).nonzero().max().item() + 1 - 9 for row in expected.sequences]
    assert min(lengths) < max(lengths) == len(out.logits) == len(out.hidden_states)
    for row, length in enumerate(lengths):
        for place in range(max(lengths)):
            ours, theirs = out.logits[place][row], expected.logits[place][row]
            torch.testing.assert_close(
                ours, theirs if place < length else torch.zeros_like(theirs), atol=1e-4, rtol=1e-4
            )
            state = out.hidden_states[place][-1][row, -1]
            assert bool(state.any()) == (place < length)
