"""The theorems on a GPU: eager and in CUDA graphs, float32 and bfloat16. Skipped where there is none."""

import pytest
import torch
from drafters import Oracle, context_speculator
from tiny_models import FAMILIES, HIDDEN, VOCAB, tiny_model

from modeling_speculator import MLPSpeculatorConfig, MLPSpeculatorPreTrainedModel


DEVICE = torch.device("cuda")
pytestmark = pytest.mark.skipif(
    DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="needs a GPU, which is not here"
)


@pytest.fixture(params=["published", "context"])
def speculator(request):
    """Of tokens of its own, and with a context layer and a draft vocabulary."""
    torch.manual_seed(0)
    if request.param == "context":
        return context_speculator(tiny_model("llama"), draft_vocabulary=list(range(0, VOCAB, 2))).to(DEVICE)
    return MLPSpeculatorPreTrainedModel(MLPSpeculatorConfig(vocab_size=VOCAB, emb_dim=HIDDEN)).eval().to(DEVICE)


def prompts(length=6):
    input_ids = torch.randint(1, VOCAB, (2, length), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(input_ids)
    mask[1, :2] = 0
    return {"input_ids": input_ids.to(DEVICE), "attention_mask": mask.to(DEVICE)}


def first_difference(model, inputs, ours, theirs):
    """Asserts that rows are equal up to a place where the logits of the two tokens tie within rounding."""
    for row in range(len(theirs)):
        differs = (ours[row] != theirs[row]).nonzero()
        if len(differs):
            place = int(differs[0])
            mask = torch.nn.functional.pad(inputs["attention_mask"], (0, place - 6), value=1)
            logits = model(theirs[:, :place], attention_mask=mask).logits[row, -1].float()
            gap = abs(float(logits[ours[row, place]] - logits[theirs[row, place]]))
            assert gap <= 16 * torch.finfo(model.dtype).eps * float(logits.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_greedy(family, dtype):
    model, inputs = tiny_model(family).to(DEVICE, dtype), prompts()
    options = {"max_new_tokens": 30, "do_sample": False}
    text = model.generate(**inputs, **options)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 30), value=1)
    oracle = Oracle(model, text, mask, p_right=0.7)
    for extra in ({}, {"cache_implementation": "static", "disable_compile": True}):
        out = model.generate(**inputs, **options, **extra, assistant_model=oracle, return_dict_in_generate=True)
        first_difference(model, inputs, out.sequences, text)
        assert set(out.speculation.emitted_per_step) >= {1, 2, 3}


OPTIONS = {
    "greedy": {},
    "ends": {"eos_token_id": list(range(12))},
    "sampling": {"do_sample": True, "top_p": 0.9, "temperature": 0.8},
    "walked": {"repetition_penalty": 1.3},
    "walked samples": {"repetition_penalty": 1.3, "do_sample": True},
}


@pytest.mark.parametrize(
    "dials", [{"n_candidates": 0}, {"n_candidates": 5}, {"n_tree_nodes": 7, "n_lookup_tokens": 6}]
)
@pytest.mark.parametrize("name", OPTIONS)
def test_cuda_graphs(speculator, name, dials, monkeypatch):
    """More than once, because a graph is recorded in the first call and replayed in the next."""
    monkeypatch.setattr("torch._inductor.config.triton.cudagraph_or_error", True)  # else a skip is but logged
    model = tiny_model("llama").to(DEVICE)
    for dial, value in dials.items():
        setattr(speculator.config, dial, value)
    for length in (6, 6, 9):
        inputs = prompts(length)
        texts = []
        for extra in ({}, {"cache_implementation": "static"}):
            torch.manual_seed(0)
            options = {"max_new_tokens": 30, "do_sample": False} | OPTIONS[name] | extra
            texts.append(model.generate(**inputs, **options, assistant_model=speculator).tolist())
        assert texts[0] == texts[1]


def test_one_synchronisation_a_step(speculator):
    model = tiny_model("llama").to(DEVICE)
    options = {"assistant_model": speculator, "do_sample": False, "return_dict_in_generate": True}
    inputs = prompts()

    def synchronisations(n_tokens):
        with pytest.warns(UserWarning) as caught:
            torch.cuda.set_sync_debug_mode("warn")
            try:
                out = model.generate(**inputs, **options, max_new_tokens=n_tokens)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing" in str(w.message) for w in caught), max(
            row.steps for row in out.speculation.per_sequence
        )

    (few, few_steps), (many, many_steps) = synchronisations(10), synchronisations(40)
    assert many - few <= many_steps - few_steps
