"""Base models as people have them: adapted, quantized, in half precision, sharded, offloaded, with a vision tower."""

import textwrap

import commands
import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from drafters import Oracle
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from tiny_models import FAMILIES, HIDDEN, VOCAB, tiny_model
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
)

from modeling_speculator import MLPSpeculatorConfig, MLPSpeculatorPreTrainedModel


OPTIONS = {"do_sample": False, "max_new_tokens": 24}


def prompt(rows=1):
    return torch.randint(1, VOCAB, (rows, 6), generator=torch.Generator().manual_seed(2))


def assert_same_text(model, oracle_model=None, **options):
    expected = model.generate(input_ids=prompt(), **OPTIONS, **options)
    oracle = Oracle(oracle_model or model, expected, p_right=0.7)
    out = model.generate(
        input_ids=prompt(), **OPTIONS, **options, assistant_model=oracle, return_dict_in_generate=True
    )
    assert out.sequences.tolist() == expected.tolist()
    assert out.speculation.tokens_per_step > 1.2


@pytest.mark.parametrize("merged", [False, True])
def test_peft_adapter(merged):
    base = tiny_model("llama")
    plain = base.generate(prompt(), **OPTIONS)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)).eval()
    adapted = model.merge_and_unload() if merged else model
    assert adapted.generate(input_ids=prompt(), **OPTIONS).tolist() != plain.tolist()
    assert_same_text(adapted, oracle_model=adapted if merged else model.base_model.model)


def test_peft_prefix_is_refused():
    model = get_peft_model(tiny_model("llama"), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    with pytest.raises(ValueError, match="virtual tokens.*LoRA"):
        model.generate(input_ids=prompt(), **OPTIONS, assistant_model=Oracle(tiny_model("llama"), prompt()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_with_a_speculator_in_another(dtype):
    """Where the text differs from plain decoding's, the two tokens' logits tie within rounding."""
    torch.manual_seed(0)
    config = MLPSpeculatorConfig(vocab_size=VOCAB, emb_dim=HIDDEN)
    drafter = MLPSpeculatorPreTrainedModel(config).eval()
    for family in ("llama", "gpt_bigcode", "gemma2"):
        for seed in range(4):
            model = tiny_model(family, seed=seed).to(dtype)
            plain = model.generate(prompt(), **OPTIONS)[0].tolist()
            for assistant in (drafter, Oracle(model, torch.tensor([plain]), p_right=0.7)):
                ours = model.generate(prompt(), **OPTIONS, assistant_model=assistant)[0].tolist()
                if ours != plain:
                    place = next(i for i, (a, b) in enumerate(zip(ours, plain, strict=True)) if a != b)
                    logits = model(torch.tensor([plain[:place]])).logits[0, -1].detach().float()
                    gap = float((logits[ours[place]] - logits[plain[place]]).abs())
                    assert gap <= 16 * torch.finfo(dtype).eps * float(logits.abs().max())
                    assert max(logits[ours[place]], logits[plain[place]]) >= logits.max() - gap


def test_offloaded_weights():
    model = tiny_model("llama")
    oracle = Oracle(model, model.generate(prompt(), **OPTIONS), p_right=0.7)
    expected = model.generate(prompt(), **OPTIONS).tolist()
    cpu_offload(model, execution_device="cpu")
    assert model.generate(prompt(), **OPTIONS, assistant_model=oracle).tolist() == expected


def test_a_device_map(tmp_path):
    model = tiny_model("llama")
    expected = model.generate(prompt(), **OPTIONS)
    oracle = Oracle(model, expected, p_right=0.7)
    devices = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    devices |= {"model.rotary_emb": "cpu", "lm_head": "disk"}
    model = dispatch_model(model, devices, main_device="cpu", offload_dir=str(tmp_path))
    assert len(set(model.hf_device_map.values())) > 1
    assert model.generate(prompt(), **OPTIONS, assistant_model=oracle).tolist() == expected.tolist()


def test_text_of_a_multimodal_model():
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=FAMILIES["llama"], image_token_id=63)
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    assert_same_text(model)
    image = torch.zeros(1, 3, vision.image_size, vision.image_size)
    with pytest.raises(ValueError, match="mm_encoder_outputs|pixel_values"):
        model.generate(input_ids=prompt(), pixel_values=image, **OPTIONS, assistant_model=Oracle(model, prompt()))


def test_text_of_gemma3_with_its_vision_tower():
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    torch.manual_seed(0)
    config = Gemma3Config(text_config=FAMILIES["gemma3_text"], vision_config=vision, mm_tokens_per_image=4)
    model = Gemma3ForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    expected = model.generate(input_ids=prompt(2), **OPTIONS)
    oracle = Oracle(model, expected, p_right=0.7)
    assert model.generate(input_ids=prompt(2), **OPTIONS, assistant_model=oracle).tolist() == expected.tolist()
    # As its processor returns them: 0 for text, 1 for an image.
    token_types = torch.zeros_like(prompt(2))
    out = model.generate(input_ids=prompt(2), token_type_ids=token_types, **OPTIONS, assistant_model=oracle)
    assert out.tolist() == model.generate(input_ids=prompt(2), token_type_ids=token_types, **OPTIONS).tolist()
    token_types[0, 1:4] = 1
    with pytest.raises(ValueError, match="model input `token_type_ids` with values other than 0"):
        model.generate(input_ids=prompt(2), token_type_ids=token_types, **OPTIONS, assistant_model=oracle)


DISTRIBUTED = """
    import os, torch, torch.distributed as dist
    from drafters import Oracle
    from tiny_models import tiny_model
    from transformers import AutoModelForCausalLM, GenerationConfig

    {body}
    print("rank", os.environ["RANK"], "is done", flush=True)
    dist.destroy_process_group()
"""


def run_two_processes(tmp_path, body):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(DISTRIBUTED).format(body=textwrap.dedent(body)))
    done = commands.launch(script)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("is done") == 2


def test_tensor_parallelism(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    run_two_processes(
        tmp_path,
        f"""
from transformers.distributed import DistributedConfig
folder = {str(tmp_path / "model")!r}
whole = AutoModelForCausalLM.from_pretrained(folder).eval()
whole.generation_config.eos_token_id = None
input_ids = torch.arange(1, 7)[None]
options = dict(do_sample=False, max_new_tokens=24, pad_token_id=0)
expected = whole.generate(input_ids, **options)
oracle = Oracle(whole, expected, p_right=0.7)
model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_plan="auto")).eval()
model.generation_config.eos_token_id = None
assert model.model.layers[0].self_attn.q_proj.weight.to_local().shape[0] == 16, "not sharded"
config = GenerationConfig(speculation="adaptive", **options)
try:
    model.generate(input_ids, generation_config=config, assistant_model=oracle)
    raise AssertionError("processes whose clocks differ would choose differently")
except ValueError as error:
    assert "tensor parallelism" in str(error)
for extra in ({{}}, {{"repetition_penalty": 1.2}}, {{"cache_implementation": "static"}}):
    plain = model.generate(input_ids, **options, **extra)
    out = model.generate(input_ids, assistant_model=oracle, return_dict_in_generate=True, **options, **extra)
    assert out.sequences.tolist() == plain.tolist(), extra
    assert out.speculation.tokens_per_step > 1.2 or extra
""",
    )


def test_synced_gpus(tmp_path):
    """A rank that is done goes on with forwards until all are, as sharded weights need it."""
    run_two_processes(
        tmp_path,
        """
dist.init_process_group("gloo")
rank = dist.get_rank()
model = tiny_model("llama")
calls = []
def together(module, args):  # as FSDP gathers weights: a forward of one rank waits for the other's
    calls.append(1)
    dist.all_reduce(torch.ones(1))
input_ids = torch.arange(1, 7)[None]
options = dict(do_sample=False, max_new_tokens=6 + 18 * rank)
expected = model.generate(input_ids, **options)
oracle = Oracle(model, expected, p_right=0.7, seed=rank)
model.model.layers[0].register_forward_pre_hook(together)
for extra in ({}, {"cache_implementation": "static"}):
    out = model.generate(
        input_ids, assistant_model=oracle, synced_gpus=True, return_dict_in_generate=True, **options, **extra
    )
    assert out.sequences.tolist() == expected.tolist()
    assert out.speculation.tokens == 5 + 18 * rank
    counts = [torch.zeros(1), torch.zeros(1)]
    dist.all_gather(counts, torch.tensor([float(len(calls))]))
    assert counts[0] == counts[1]
""",
    )
